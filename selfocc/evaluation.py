"""A model over the frames of a data set, scored frame by frame.

Frames are read ahead by workers, may be shared out among the processes of torchrun, and each is
written down as soon as it is scored (see journal.py). What is scored is in scores.py, and how in
protocols.py.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from selfocc import InputError, config, distributed, metrics, protocols, sight
from selfocc.batch import Batch, Frames, Sequence, View, collate
from selfocc.config import VolumeConfig
from selfocc.datasets.loader import read_ahead
from selfocc.datasets.video import VideoDataset
from selfocc.geometry import image_projection
from selfocc.journal import Journal, Record
from selfocc.labels import label_map
from selfocc.model import SelfOcc
from selfocc.protocols import Rules
from selfocc.render import render_grid, to_images
from selfocc.scores import (
    DEPTH_TRUTHS,
    MEASURED,
    RECORDS,
    SEEN,
    Priors,
    Scores,
    Table,
    merge,
    novel_record,
    photometric_record,
    truth_maps,
)


def ray_depth_error(batch: Batch, view: View) -> float | None:
    """AbsRel of the rendered rays where the truth is known, for the progress bar."""
    for truth in truth_maps(batch).values():
        u, v = view.pixels.round().long().T
        height, width = truth.shape[-2:]
        truth = truth[..., v.clamp(max=height - 1), u.clamp(max=width - 1)]
        known = (truth > 0) & (truth < 80)
        if known.any():
            return ((view.depth.detach() - truth).abs() / truth)[known].mean().item()
    return None


@dataclass
class Later:
    """Another frame than the input from whose cameras depth is rendered.

    Arrays, as a worker hands over tensors in shared memory, and there are dozens of these.
    """

    distance: float  # metres from the input
    camera_to_volume: np.ndarray  # [N, 4, 4], the volume of the input
    location: np.ndarray  # [N, M, 2] of its LiDAR points, as fractions of the images
    depth: np.ndarray  # [N, M] of these, 0 where not scored


@dataclass
class Sample:
    """An evaluation sample and the truth that its protocol asks for."""

    index: int
    batch: Batch  # of one
    labels: Tensor | None = None  # [ny, nx, nz] uint8
    masked: bool = False  # whether the data say which of them cameras see, and others are unknown
    voxels_to_volume: np.ndarray | None = None  # as the sequence has it
    seen: sight.Sight | None = None  # of the voxels
    rays: sight.Rays | None = None  # of a LiDAR in the voxels
    location: Tensor | None = None  # [N, M, 2] of LiDAR points, as fractions of the images
    depth: Tensor | None = None  # [N, M] of these, 0 where not scored
    later: list[Later] = dataclasses.field(default_factory=list)


class Samples(Dataset):
    """The samples of a data set as a protocol scores them, voxels in `volume`."""

    def __init__(
        self, dataset: VideoDataset, rules: Rules, tasks: Iterable[str], volume: VolumeConfig
    ):
        self.dataset, self.rules, self.tasks, self.volume = dataset, rules, tasks, volume

    def labelled(self, index: int) -> Sample:
        """The sample with no other truth than labels and what the batch has."""
        sequence, frame = self.dataset.locate(index)
        sample = Sample(index, collate([self.dataset[index]]))
        if "occupancy" in self.tasks and sample.batch.voxels is not None:
            mask = sequence.voxel_mask(frame)
            sample.labels, sample.masked = self._labels(sample, mask), mask is not None
            sample.voxels_to_volume = sequence.voxels_to_volume(frame)
        return sample

    def __getitem__(self, index: int) -> Sample:
        sequence, frame = self.dataset.locate(index)
        sample = self.labelled(index)
        batch, own = sample.batch, self.rules.protocol == "own"
        # ten million voxels of OpenOccupancy and six cameras would take 14 s a frame
        if sample.labels is not None and not self.rules.openoccupancy:
            sample.seen = self._sight(sample)
            sample.rays = self._rays(sample, sequence, frame)
        if "depth" in self.tasks and not own:
            points = sequence.lidar(frame)
            if points is not None:
                sample.location, sample.depth = self._scan(points, batch.target, self.rules)
        if "novel_depth" in self.tasks and own:
            sample.later = list(self._later_maps(index))
        elif "novel_depth" in self.tasks:
            targets = protocols.novel_targets(sequence, frame, self.rules)
            later = (self._later_scan(sequence, frame, batch.target, *t) for t in targets)
            sample.later = [entry for entry in later if entry is not None]
        return sample

    def _labels(self, sample: Sample, mask: np.ndarray | None) -> Tensor:
        voxels = sample.batch.voxels[0]
        return protocols.scored_labels(voxels, mask, self.rules, self.volume.voxel)

    def _to_voxels(self, sample: Sample) -> np.ndarray:
        """[4, 4] from the volume to the frame of the labels."""
        matrix = sample.voxels_to_volume
        return np.eye(4) if matrix is None else np.linalg.inv(matrix)

    def _sight(self, sample: Sample) -> sight.Sight:
        """What the cameras see of the voxels; all that is labelled, where a mask has told."""
        labels, box, target = sample.labels, self.rules.box or self.volume.box, sample.batch.target
        to_voxels = torch.from_numpy(self._to_voxels(sample)) @ target.camera_to_volume[0]
        cameras = sight.Cameras(target.intrinsics[0], to_voxels)
        maps, size = truth_maps(sample.batch), tuple(target.images.shape[-2:])
        name = next((name for name in MEASURED if name in maps), None)
        ends = name and sight.ends(maps[name][0], cameras, box, labels.shape)
        if sample.masked:
            seen = torch.ones(labels.shape, dtype=torch.bool)
        elif name == "exact":
            seen = ends | sight.before(maps[name][0], cameras, box, labels.shape)
        else:
            seen = sight.seen_in_truth(labels, cameras, size, box)
        return sight.Sight(seen, ends, MEASURED.get(name, ""))

    def _rays(self, sample: Sample, sequence: Sequence, frame: int) -> sight.Rays | None:
        """Those of a LiDAR; what no camera sees is as good as what one sees."""
        if sequence.lidar_to_volume(frame) is None:
            return None
        to_voxels = self._to_voxels(sample) @ np.linalg.inv(sequence.volume_to_world(frame))
        labelled, box = sorted(sequence.labelled), self.rules.box or self.volume.box
        poses = [sequence.volume_to_world(f) @ sequence.lidar_to_volume(f) for f in labelled]
        poses = torch.from_numpy(to_voxels @ np.stack(poses))
        places = sight.lidar_places(poses, labelled.index(frame), box)
        labels = self._labels(sample, None) if sample.masked else sample.labels
        return sight.lidar_rays(labels, box, places)

    def _scan(self, points: np.ndarray, cameras: Frames, rules: Rules) -> tuple[Tensor, Tensor]:
        """`lidar_truth` without the points that no camera scores."""
        matrix = image_projection(cameras.intrinsics[0], cameras.camera_to_volume[0])
        size = tuple(cameras.images.shape[-2:])
        location, depth = protocols.lidar_truth(torch.from_numpy(points), matrix, size, rules)
        scored = (depth > 0).any(dim=0)
        return location[:, scored], depth[:, scored]

    def _later_maps(self, index: int) -> Iterator[Later]:
        """Later frames with the truth of every pixel."""
        for distance, later in self.dataset.future(index):
            truth = next(iter(truth_maps(later).values()), None)  # [N, h, w] of a sample
            if truth is not None:
                height, width = truth.shape[-2:]
                v, u = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
                location = torch.stack([u / width, v / height], dim=-1).flatten(0, 1)
                location = location.expand(len(truth), -1, -1)
                cameras = later.target.camera_to_volume.numpy()
                yield Later(distance, cameras, location.numpy(), truth.flatten(1).numpy())

    def _later_scan(
        self, sequence: Sequence, frame: int, here: Frames, distance: float, other: int
    ) -> Later | None:
        points = sequence.lidar(other)
        if points is None:
            return None
        _, camera_to_world = sequence.cameras(other)
        there, then = (
            np.linalg.inv(sequence.volume_to_world(f)) @ camera_to_world for f in (frame, other)
        )
        at_scan = here  # the published script projects the later scan with the input's cameras
        if not self.rules.ends:
            at_scan = dataclasses.replace(here, camera_to_volume=torch.from_numpy(then)[None])
        rules = dataclasses.replace(self.rules, nearest=metrics.MIN_DEPTH)
        location, depth = self._scan(points, at_scan, rules)
        return Later(distance, there, location.numpy(), depth.numpy())


class Labelled(Samples):
    """The same with what priors learn from."""

    def __getitem__(self, index: int) -> Sample:
        return self.labelled(index)


def evenly(dataset: VideoDataset, frames: int | None) -> list[int]:
    """Indices of at most `frames` samples, evenly spread; None is all."""
    count = len(dataset) if frames is None else min(frames, len(dataset))
    return np.unique(np.linspace(0, len(dataset) - 1, count).round().astype(int)).tolist()


def in_turn(indices: Iterable[int], workers: int) -> list[int]:
    """The order in which workers, who take turns, each read a run of their own: whoever has read a
    frame of the embedded world knows half of the next one of its sequence."""
    runs = np.array_split(indices, max(1, workers))
    return [int(i) for turn in zip_longest(*runs) for i in turn if i is not None]


def score(
    model: SelfOcc, scores: Scores, sample: Sample, device: torch.device, tasks: Iterable[str]
) -> Record:
    """The record of one sample (a `Sample` of the same rules and tasks).

    Raises InputError where the volume is not finite, which would score as if it were free.
    """
    batch = sample.batch.to(device)
    volume, voxels, _ = model.see(batch)
    if not volume.isfinite().all():
        raise InputError(
            "the network's volume is not finite: its weights have diverged, or are not of these "
            "settings; evaluate an earlier checkpoint"
        )
    rules, record = scores.rules, {}
    size = tuple(batch.target.images.shape[-2:])
    if sample.labels is not None:
        matrix, seen, rays = sample.voxels_to_volume, sample.seen, sample.rays
        record |= scores.occupancy(voxels, sample.labels, matrix, seen, rays)
    if "depth" in tasks:
        grid, color = render_grid(model, volume, batch.target, size, model.config.render.eval_rays)
        depth, _ = to_images(grid, color, size)
        record |= scores.depth_maps(depth, batch)
        if sample.depth is not None:
            record |= scores.depth_points(grid, batch.target, sample.location, sample.depth)
        record |= photometric_record(depth, batch)
    novel, rays = [], model.config.render.eval_rays
    if rules.novel_rays is not None:
        rays = tuple(map(min, rays, rules.novel_rays))
    for later in sample.later:
        moved = torch.from_numpy(later.camera_to_volume)[None].to(device)
        cameras = dataclasses.replace(batch.target, camera_to_volume=moved)
        depth, _ = render_grid(model, volume, cameras, size, rays)
        location, truth = torch.from_numpy(later.location), torch.from_numpy(later.depth)
        depth = protocols.read_depth(depth[0].cpu(), location, rules.ends)
        novel.append(novel_record(later.distance, depth, truth))
    return record | merge(novel)


@torch.no_grad()
def evaluate(
    model: SelfOcc,
    dataset: VideoDataset,
    device: torch.device,
    tasks: Iterable[str] = ("occupancy", "depth"),
    priors: Priors | None = None,
    frames: int | None = None,
    rules: Rules | None = None,
    journal: Journal | None = None,
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
) -> dict[str, Table]:
    """Tables (see `Scores.tables`) of at most `frames` frames, evenly spread; None is all.

    Each of `world` processes scores its share, and all get the tables. Frames that the journal
    holds are not scored again.
    """
    training = model.training
    model.eval()
    settings = model.config
    rules = rules or protocols.choose(settings)
    scores = Scores(model, rules, priors)
    samples = Samples(dataset, rules, tasks, settings.volume)
    mine = np.array_split(evenly(dataset, frames), world)[rank].tolist()
    records = {} if journal is None else journal.records
    keep = records.__setitem__ if journal is None else journal.add
    workers = settings.optim.workers
    todo = in_turn([index for index in mine if index not in records], workers)
    bar = tqdm(
        read_ahead(Subset(samples, todo), workers, world, batch_size=None),
        desc="evaluating",
        unit="frame",
        initial=len(mine) - len(todo),
        total=len(mine),
        disable=not progress,
    )
    for sample in bar:
        keep(sample.index, score(model, scores, sample, device, tasks))
    model.train(training)
    if world > 1:
        records = distributed.gather_dicts(records)
    return scores.tables(records[index] for index in sorted(records))


def identity(
    model: SelfOcc,
    dataset: VideoDataset,
    training: VideoDataset,
    tasks: Iterable[str],
    rules: Rules,
    frames: int | None,
    prior_frames: int,
    rank: int = 0,
) -> str:
    """A digest of everything on which the records of an evaluation depend.

    That is weights, settings, and the files read, by name, size and time of change: those of every
    sequence with a frame that is scored, and of the training frames that the priors learn from.
    The first process takes it, for all.
    """
    if rank > 0:
        return distributed.gather_dicts({})[0]
    digest = hashlib.sha256()
    scored = [dataset.locate(index) for index in evenly(dataset, frames)]
    names = [f"{sequence.name}/{sequence.frame_id(frame)}" for sequence, frame in scored]
    places = [(s, f) for s in {id(s): s for s, _ in scored}.values() for f in range(s.frames)]
    places += [training.locate(index) for index in evenly(training, prior_frames)]
    read = sorted({file for sequence, frame in places for file in sequence.files(frame)})
    settings = config.to_dict(model.config)
    optim = model.config.optim
    settings["optim"] = {"bf16": optim.bf16, "tf32": optim.tf32}  # the rest is of training
    what = [RECORDS, settings, sorted(tasks), rules.protocol, names, prior_frames]
    what.append(list(map(_stamp, read)))
    if model.config.field.classes:
        what.append(dataclasses.asdict(label_map(model.config.data)))
    digest.update(json.dumps(what).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return distributed.gather_dicts({0: digest.hexdigest()})[0]


def _stamp(file: Path) -> tuple[str, int, int] | None:
    """Name, size and time of change of a file; None where there is none."""
    try:
        stat = file.stat()
    except OSError:
        return None
    return str(file), stat.st_size, stat.st_mtime_ns


def validate(
    model: SelfOcc, dataset: VideoDataset, frames: int, device: torch.device
) -> dict[str, float]:
    """The few numbers worth watching during training."""
    tables = evaluate(model, dataset, device, frames=frames, progress=False)
    numbers = {}
    if "occupancy" in tables:
        row = tables["occupancy"]["SelfOcc"]
        numbers |= {"IoU": row["iou"], "IoU_above": row["iou_above"]}
    if SEEN in tables:
        row = tables[SEEN]["SelfOcc"]
        numbers |= {"IoU_seen": row["iou_25.6"], "IoU_seen_above": row["iou_above_25.6"]}
    if "semantics" in tables:
        # where classes that never occur count 1, few frames would look good
        means = tables["semantics"]
        numbers["mIoU"] = means.get("mIoU of the classes seen", means["mIoU"])["iou"]
    for truth in DEPTH_TRUTHS:
        if f"depth, {truth}" in tables:
            numbers[f"AbsRel_{truth}"] = tables[f"depth, {truth}"]["SelfOcc"]["abs_rel"]
    if "photometric" in tables:
        numbers |= {f"photometric_{m}": row["error"] for m, row in tables["photometric"].items()}
    return numbers


def gather_priors(
    model: SelfOcc, training: VideoDataset, frames: int, rules: Rules, rank: int = 0, world: int = 1
) -> Priors:
    """Priors from at most `frames` training frames (a data set opened with train=False).

    Each of `world` processes reads its share, and all get the priors.
    """
    mine, priors = Priors(), Priors()
    samples = Labelled(training, rules, ("occupancy",), model.config.volume)
    workers = model.config.optim.workers
    workers += workers > 0  # the model waits meanwhile, which frees a core
    share = np.array_split(evenly(training, frames), world)[rank]
    read = read_ahead(Subset(samples, in_turn(share, workers)), workers, world, batch_size=None)
    for sample in tqdm(read, desc="priors from training truth", disable=rank > 0):
        mine.add(sample.labels, sample.batch)
    priors.join(distributed.gather_dicts({rank: mine}).values())
    return priors
