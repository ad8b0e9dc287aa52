"""From sequences of posed frames to samples: which frame is rendered, and from which others.

A data set is a list of `batch.Sequence`; `synthetic.py`, `kitti.py`, ... each define one kind. All
that SelfOcc does with video (choosing frames as the published loaders do, preparing images,
expressing every camera in the volume frame of the input time stamp) is here, once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from selfocc import InputError, counted
from selfocc.batch import Batch, Frames, Sequence
from selfocc.config import DataConfig
from selfocc.datasets.pixels import cropped, for_network, one_size, planar, resize, scaled
from selfocc.stereo import stereo_depth

# Which images an anchor is compared with: those of a frame, those of a frame for each camera, or of
# another eye: intrinsics [N, 3, 3], camera_to_world [N, 4, 4] and images uint8 [N, h, w, 3]
Source = int | list[int] | tuple[np.ndarray, np.ndarray, np.ndarray]

# the first and last frames of a sequence have a neighbour on one side only: above this share of the
# frames used, what is left out is worth a word
ENDS = 0.1
# metres: `composite` sources are mostly this far away, and as far around it
COMPOSITE_DISTANCE = COMPOSITE_SPREAD = 0.5
LEAST = 0.05  # metres between frames; what moves less shows no depth
DRAWS = 10_000  # of a training sample, of which one has sources where settings are sane


class VideoDataset(torch.utils.data.Dataset):
    """Samples from sequences.

    An integer key gives the evaluation sample: the input frame is also the target. A key (index,
    seed) gives a training sample, whose anchor, sources and augmentation follow from the seed
    alone, so that a resumed run repeats them exactly. Every index can give one: frames that cannot
    are left out, which `notes` tell beside what the sequences lack. Raises InputError where no
    frame can be used.
    """

    def __init__(self, sequences: list[Sequence], config: DataConfig, train: bool):
        self.sequences = sequences
        self.config = config
        self.train = train
        self.target_crop = config.target_crop or config.crop
        self.index, left_out = [], []
        for s, sequence in enumerate(sequences):
            frames = self._candidates(sequence)
            used = self._usable(sequence, frames, config)
            self.index += [(s, frame) for frame in used]
            left_out.append(sorted(set(frames) - set(used)))
        self.notes = list(dict.fromkeys(line for s in sequences for line in s.missing))
        lost = sum(map(len, left_out))
        name = f"{sequences[0].name}{', ..' if len(sequences) > 1 else ''}" if sequences else ""
        if sequences and not self.index:
            raise InputError(f"no usable frame in {name}: {self._reason(left_out)}")
        if train and lost > ENDS * len(self.index):
            those = f"{lost} of {lost + len(self.index)} frames of {name} are left out"
            self.notes.append(f"{those}: {self._reason(left_out)}")

    @classmethod
    def every_frame(cls, sequence: Sequence, config: DataConfig) -> "VideoDataset":
        """Evaluation samples of all frames of one sequence, in order, labelled or not."""
        dataset = cls([], config, train=False)
        dataset.sequences, dataset.index = [sequence], [(0, f) for f in range(sequence.frames)]
        return dataset

    def _candidates(self, sequence: Sequence) -> list[int]:
        """The frames that may be input."""
        if not self.train and sequence.labelled:
            return sequence.labelled
        return list(range(sequence.frames)) if sequence.inputs is None else sequence.inputs

    def _usable(self, sequence: Sequence, frames: list[int], config: DataConfig) -> list[int]:
        """Those of the frames that give samples under these settings."""
        if not self.train and (sequence.labelled or sequence.inputs):
            return frames  # judged, whatever is around them

        @functools.cache
        def has_sources(frame: int) -> bool:
            """As `_draw_sources` has it."""
            sides = [len(side) > 0 for side in self._either_side(sequence, frame, config.source)]
            if all(sides) or not any(sides):
                return all(sides)
            return config.one_sided or (
                config.stereo_source and (not self.train or sequence.has_other_eye(frame))
            )

        def rendered(frame: int) -> bool:
            """Whether `_draw_anchor` may come upon a frame that has sources."""
            if not self.train or config.anchor_input > 0:
                return has_sources(frame)
            past, _ = self._either_side(sequence, frame, config.past)
            _, future = self._either_side(sequence, frame, config.future)
            return bool(
                (config.anchor_past > 0 and any(map(has_sources, past.tolist())))
                or (config.anchor_past < 1 and any(map(has_sources, future.tolist())))
            )

        return [frame for frame in frames if has_sources(frame) and rendered(frame)]

    def _reason(self, left_out: list[list[int]]) -> str:
        """What the frames lack that each sequence leaves out, and which settings would use them."""
        config = self.config
        near, far = config.source
        sides = "before or after" if config.one_sided else "before and after"
        eye = ", nor on one side and the other eye" if config.stereo_source else ""
        lacking = (
            f"they, or the frames to render for them, have no frame {near:g} to {far:g} m {sides} "
            f"them{eye}; "
        )
        longest = max(self.sequences, key=lambda sequence: sequence.path[-1])
        way, steps = float(longest.path[-1]), np.diff(longest.path)
        changes = {
            "one_sided=true": {"one_sided": True},
            "stereo_source=true": {"stereo_source": True},
            "anchor_input=0.5": {"anchor_input": config.anchor_input or 0.5},
        }
        if len(steps) and way / 4 >= LEAST:
            near = min(near, float(f"{way / 4:.1g}"))
            far = max(far, math.ceil(2 * np.median(steps)))
            changes[f"source={near:g},{far:g}"] = {"source": (near, far)}
        found = []
        for text, change in changes.items():
            other = dataclasses.replace(config, **change)
            if other != config:
                pairs = zip(self.sequences, left_out, strict=True)
                used = sum(len(self._usable(s, frames, other)) for s, frames in pairs if frames)
                found += [f"--set data.{text} would use {used}"] if used else []
        return lacking + (
            ", ".join(found)
            or f"the longest sequence, {longest.name}, has {counted(longest.frames, 'frame')} on "
            f"{way:.1f} m; choose more frames, or others"
        )

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: int | tuple[int, int]) -> Batch:
        if isinstance(key, tuple):
            return self._training_sample(*key)
        sequence, frame = self.locate(key)
        nearest = [
            int(side[0]) if len(side) else frame
            for side in self._either_side(sequence, frame, self.config.source)
        ]
        sample = self._sample(sequence, frame, frame, nearest, None)
        if sample.depth is None and sample.lidar is None:
            pair = sequence.stereo_pair(frame)
            sample.stereo = None if pair is None else self._label_map(stereo_depth(pair)[None])
        labels = sequence.voxels(frame)
        if labels is not None:
            sample.voxels = torch.from_numpy(labels)
        return sample

    def locate(self, index: int) -> tuple[Sequence, int]:
        """The sequence and the frame behind an index."""
        s, frame = self.index[index]
        return self.sequences[s], frame

    def _training_sample(self, index: int, seed: int) -> Batch:
        rng = np.random.default_rng(seed)
        for _ in range(DRAWS):
            sequence, frame = self.locate(index)
            anchor = self._draw_anchor(sequence, frame, rng)
            sources = None if anchor is None else self._draw_sources(sequence, anchor, rng)
            if sources is not None:
                return self._sample(sequence, frame, anchor, sources, rng)
            index = int(rng.integers(len(self)))
        raise InputError(
            f"none of {DRAWS} frames drawn to be rendered has neighbours: data.anchor_input, "
            f"{self.config.anchor_input:g}, is too small, or data.source too narrow"
        )

    def _draw_anchor(self, sequence: Sequence, frame: int, rng: np.random.Generator) -> int | None:
        if rng.random() < self.config.anchor_input:
            return frame
        past = rng.random() < self.config.anchor_past
        window = self.config.past if past else self.config.future
        candidates = np.sort(self._either_side(sequence, frame, window)[0 if past else 1])
        return int(rng.choice(candidates)) if len(candidates) else None

    def _draw_sources(
        self, sequence: Sequence, anchor: int, rng: np.random.Generator
    ) -> list[Source] | None:
        """What the anchor is compared with, before and after it; None where that is lacking."""
        before, after = self._either_side(sequence, anchor, self.config.source)
        if self.config.one_sided:
            before, after = (before if len(before) else after), (after if len(after) else before)
        sides = before, after
        if self.config.neighbours == "composite":
            sources = [self._draw_for_each_camera(sequence, anchor, side, rng) for side in sides]
        else:
            sources = [int(side[0]) if len(side) else None for side in sides]
        some = any(source is not None for source in sources)
        if self.config.stereo_source and some and sequence.has_other_eye(anchor):
            other_eye = sequence.other_eye(anchor)
            replaced = None if rng.random() < 1 / 3 else int(rng.random() < 0.5)
            sources = [
                other_eye if source is None or k == replaced else source
                for k, source in enumerate(sources)
            ]
        return None if any(source is None for source in sources) else sources

    def _draw_for_each_camera(self, sequence, anchor, candidates, rng) -> list[int] | None:
        """A frame for every camera, most likely one half a metre away."""
        if not len(candidates):
            return None
        distance = self._distance(sequence, anchor, candidates)
        logits = -((distance - COMPOSITE_DISTANCE) ** 2) / (2 * COMPOSITE_SPREAD**2)
        likely = np.exp(logits - logits.max())
        cameras = len(sequence.cameras(anchor)[0])
        return rng.choice(candidates, cameras, p=likely / likely.sum()).tolist()

    def _distance(self, sequence: Sequence, frame, other) -> np.ndarray:
        """Metres from frames to others, which are numbers, arrays of them, or slices."""
        if self.config.distance == "straight":
            ways = sequence.positions[other] - sequence.positions[frame]
            return np.linalg.norm(ways, axis=-1)
        return np.abs(sequence.path[other] - sequence.path[frame])

    def _either_side(self, sequence: Sequence, frame: int, window) -> list[np.ndarray]:
        """Frames before and after `frame`, nearest first, whose distance lies in the window.

        The search ends at the first frame beyond the window: a loop that comes back is not near.
        """
        distance = self._distance(sequence, frame, slice(None))
        sides = []
        for frames in (np.arange(frame - 1, -1, -1), np.arange(frame + 1, sequence.frames)):
            frames = frames[~np.logical_or.accumulate(distance[frames] > window[1])]
            sides.append(frames[distance[frames] >= window[0]])
        return sides

    def future(
        self, index: int, maximum: float = 10.0, step: float = 0.4
    ) -> Iterator[tuple[float, Batch]]:
        """Later frames as targets, at least `step` metres apart: (metres ahead, sample)."""
        sequence, frame = self.locate(index)
        distances = self._distance(sequence, frame, slice(None))
        last = frame
        for other in range(frame + 1, sequence.frames):
            if distances[other] > maximum:
                return
            if self._distance(sequence, last, other) >= step:
                last = other
                sample = self._sample(sequence, frame, other, [other, other], None)
                yield float(distances[other]), sample

    def _sample(self, sequence, frame, anchor, sources, rng) -> Batch:
        world_to_volume = np.linalg.inv(sequence.volume_to_world(frame))
        image = functools.cache(sequence.image)  # input, target and sources may share some
        images, intrinsics, camera_to_world, where = _seen(sequence, image, frame)
        read, read_intrinsics = for_network(images, intrinsics, self.config, where, rng)
        target = self._frames(sequence, image, [anchor], world_to_volume).each(lambda x: x[0])
        depth = self._label_map(sequence.depth(anchor))
        exact = self.train and depth is not None  # truth enough; scans are for judging
        return Batch(
            name=[f"{sequence.name}/{sequence.frame_id(frame)}"],
            images=read,
            intrinsics=torch.from_numpy(read_intrinsics),
            camera_to_volume=torch.from_numpy(world_to_volume @ camera_to_world),
            target=target,
            sources=self._frames(sequence, image, sources, world_to_volume),
            depth=depth,
            lidar=None if exact else self._lidar_map(sequence, anchor, target),
            semantics=self._label_map(sequence.semantics(anchor)),
        )

    def _frames(self, sequence, image, of: list[Source], world_to_volume: np.ndarray) -> Frames:
        """[len(of), N, ...]. Images that are not resized are bytes until `Batch.to`."""
        seen = [_seen(sequence, image, source) for source in of]
        crops = [c for shown, _, _, where in seen for c in cropped(shown, self.target_crop, where)]
        images, scale = planar(crops), self.config.target_scale
        if scale != 1:
            images = resize(images, scale) / 255
        return Frames(
            images.unflatten(0, (len(of), -1)),
            torch.from_numpy(np.stack([scaled(intrinsics, scale) for _, intrinsics, *_ in seen])),
            torch.from_numpy(world_to_volume @ np.stack([pose for *_, pose, _ in seen])),
        )

    def _label_map(self, labels: Iterable[np.ndarray] | None) -> Tensor | None:
        """Maps [h, w] of every camera as its images are, by the nearest pixel."""
        if labels is None:
            return None
        least = np.array([label.shape for label in labels]).min(0)
        scale = self.config.target_scale
        pixels = [(np.arange(int(n * scale)) + 0.5) / scale for n in self.target_crop]
        maps = []
        for label in labels:
            ratios = label.shape / least
            rows, cols = ((p * ratio).astype(int) for p, ratio in zip(pixels, ratios, strict=True))
            maps.append(label[np.ix_(rows, cols)])
        return torch.from_numpy(np.stack(maps))

    def _lidar_map(self, sequence: Sequence, frame: int, target: Frames) -> Tensor | None:
        points = sequence.lidar(frame)
        if points is None:
            return None
        sizes = [target.images.shape[-2:]] * len(target.images)
        maps = scan_maps(sequence, frame, points, target.intrinsics.numpy(), sizes)
        return torch.from_numpy(np.stack(maps))


def _seen(sequence: Sequence, image: Callable, source: Source):
    """Images [N] of [h, w, 3], of one size; their intrinsics [N, 3, 3], a copy; camera_to_world
    [N, 4, 4]; and whose they are."""
    if isinstance(source, tuple):
        intrinsics, camera_to_world, images = source
        where = f"{sequence.name}, other eye"
    else:
        cameras = functools.cache(sequence.cameras)
        frames = source if isinstance(source, list) else [source] * len(cameras(source)[0])
        intrinsics = np.stack([cameras(f)[0][camera] for camera, f in enumerate(frames)])
        camera_to_world = np.stack([cameras(f)[1][camera] for camera, f in enumerate(frames)])
        images = [image(frame, camera) for camera, frame in enumerate(frames)]
        where = f"{sequence.name} frame {sequence.frame_id(frames[0])}"
    images, intrinsics = one_size(images, intrinsics)
    return images, intrinsics, camera_to_world, where


def scan_maps(sequence: Sequence, frame: int, points: np.ndarray, intrinsics, sizes):
    """z-depth of the points of a scan in every camera of its frame, as `project_points`.

    intrinsics [N, 3, 3] of images of sizes [h, w].
    """
    _, camera_to_world = sequence.cameras(frame)
    to_cameras = np.linalg.inv(camera_to_world) @ sequence.volume_to_world(frame)
    cameras = zip(to_cameras, intrinsics, sizes, strict=True)
    return [project_points(points, *camera) for camera in cameras]


def project_points(
    points: np.ndarray, to_camera: np.ndarray, intrinsics: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """z-depth map float32 [h, w] of points [M, 3] in metres: the nearest of a pixel, 0 for none."""
    camera = points.astype(np.float64) @ to_camera[:3, :3].T + to_camera[:3, 3]
    camera = camera[camera[:, 2] > 1e-3]
    u, v = np.rint((camera @ intrinsics[:2].T) / camera[:, 2:]).astype(np.int64).T
    inside = (u >= 0) & (u < size[1]) & (v >= 0) & (v < size[0])
    depth = np.full(size[0] * size[1], np.inf, np.float32)
    np.minimum.at(depth, v[inside] * size[1] + u[inside], camera[inside, 2].astype(np.float32))
    return np.where(np.isinf(depth), 0, depth).reshape(size)
