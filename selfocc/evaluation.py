"""A model against the truth, frame by frame: depth, occupancy, photometric error, pictures."""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import kernels
from selfocc import metrics, pictures
from selfocc.datasets.video import Batch, Frames, VideoDataset, collate, start_worker
from selfocc.field import occupancy_grid
from selfocc.geometry import fixed_pixels, image_to_image
from selfocc.model import SelfOcc, View

Table = dict[str, dict[str, float]]  # method -> metric -> value


SPENT = 1e-4  # transmittance at which a ray ends; moves no depth by more than 1e-4 of its ray


def rendered_maps(model: SelfOcc, volume: Tensor, frames: Frames) -> tuple[Tensor, Tensor]:
    """Depth [B, N, h, w] in metres and colour [B, N, 3, h, w] of whole images.

    A regular grid of rays is rendered and interpolated to the pixels it stands for.
    """
    size = tuple(frames.images.shape[-2:])
    render = model.config.render
    pixels = fixed_pixels(render.eval_rays, size, volume.device)
    view = model.render(volume, frames, pixels, render.eval_samples, stop_below=SPENT)
    grid = torch.cat([view.depth[..., None], view.color], dim=-1).unflatten(2, render.eval_rays)
    maps = _interpolate_grid(grid.flatten(0, 1).permute(0, 3, 1, 2), size).unflatten(
        0, view.depth.shape[:2]
    )
    return maps[:, :, 0], maps[:, :, 1:]


def _interpolate_grid(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """[M, C, rows, cols] at pixels (j w / cols, i h / rows) -> [M, C, h, w], bilinear.

    Beyond the last row and column the border is extended.
    """
    coordinates = []
    for n, rays in zip(size, grid.shape[-2:], strict=True):
        index = torch.arange(n, device=grid.device) * (rays / n)
        coordinates.append(2 * index / max(rays - 1, 1) - 1)
    y, x = torch.meshgrid(*coordinates, indexing="ij")
    where = torch.stack([x, y], dim=-1).expand(len(grid), -1, -1, -1)
    return F.grid_sample(grid, where, align_corners=True, padding_mode="border")


def truth_maps(batch: Batch) -> dict[str, Tensor]:
    """The depth truths of a batch by name, each [B, N, h, w] with 0 where there is none."""
    maps = {"exact": batch.depth, "lidar": batch.lidar, "stereo": batch.stereo}
    return {name: truth for name, truth in maps.items() if truth is not None}


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


def loader(dataset: VideoDataset, frames: int | None, workers: int) -> DataLoader:
    """Single evaluation samples in order; at most `frames` of them, evenly spread."""
    count = len(dataset) if frames is None else min(frames, len(dataset))
    chosen = np.unique(np.linspace(0, len(dataset) - 1, count).round().astype(int))
    return DataLoader(
        Subset(dataset, chosen.tolist()),
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=start_worker,
    )


class Priors:
    """What can be guessed without looking at the image, learnt from training truth."""

    def __init__(self):
        self.occupancy = metrics.ConstantPrior()
        self.depth: dict[str, metrics.MedianDepth] = {}

    def add(self, model: SelfOcc, batch: Batch) -> None:
        _, labels = scored_labels(model, batch)
        if labels is not None:
            self.occupancy.add(labels[0])
        for name, truth in truth_maps(batch).items():
            self.depth.setdefault(name, metrics.MedianDepth()).add(truth[0])


class Evaluation:
    """Scores of a model over frames, beside the baselines on the same frames.

    `tables()` gives {task: {method: {metric: value}}}: occupancy of all scored voxels and of those
    more than 0.3 m above the ground; depth against each truth there is; photometric error of the
    views warped by the rendered depth.
    """

    def __init__(self, model: SelfOcc, priors: Priors | None = None):
        self.model = model
        self.settings = model.config.volume
        fixed, sweep = torch.tensor([self.settings.threshold]), torch.linspace(-1, 1, 81)
        curves = {
            "SelfOcc": lambda: metrics.ThresholdCurve(fixed),
            "SelfOcc, best threshold": lambda: metrics.ThresholdCurve(sweep),
            "flat ground, best threshold": lambda: metrics.ThresholdCurve(sweep),
        }
        self.depth_priors, self.occupancy_prior = {}, None
        if priors is not None:
            self.depth_priors = {name: prior.depth() for name, prior in priors.depth.items()}
        if priors is not None and isinstance(priors.occupancy.known, Tensor):
            self.occupancy_prior = -priors.occupancy.probability()
            curves["constant prior, best threshold"] = metrics.ConstantPrior.curve
        self.curves = {method: (curve(), curve()) for method, curve in curves.items()}
        self.labelled_frames = 0
        self.depth: dict[str, dict[str, metrics.DepthMetrics]] = {}
        self.novel: metrics.NovelDepthMetrics = metrics.NovelDepthMetrics()
        self.photometric: list[tuple[float, float]] = []

    def add_occupancy(self, volume: Tensor, batch: Batch) -> None:
        shape, labels = scored_labels(self.model, batch)
        if labels is None:
            return
        self.labelled_frames += 1
        labels = labels[0].cpu()
        box = self.settings.box
        edge = (box[5] - box[2]) / shape[2]
        sdf = occupancy_grid(volume, box, shape)[0].cpu()
        z = box[2] + (torch.arange(shape[2]) + 0.5) * edge
        flat = metrics.flat_ground_sdf(z, self.settings.ground).expand(shape)
        if self.settings.crop_margins:
            sdf, flat = (metrics.crop_margins_kitti(f, self.settings.voxel) for f in (sdf, flat))
        above = metrics.above_ground(labels, edge)
        fields = [sdf, sdf, flat] + ([] if self.occupancy_prior is None else [self.occupancy_prior])
        for (whole, high), field in zip(self.curves.values(), fields, strict=True):
            whole.update(field, labels)
            high.update(field, labels, above)

    def add_depth(self, depth: Tensor, batch: Batch) -> None:
        """depth [1, N, h, w] rendered for the target of `batch`."""
        target = batch.target
        flat = metrics.flat_ground_depth(
            target.intrinsics[0].cpu(),
            target.camera_to_volume[0].cpu(),
            depth.shape[-2:],
            self.settings.ground,
        )
        for name, truth in truth_maps(batch).items():
            predictions = {"SelfOcc": depth[0].cpu(), "flat ground": flat}
            if name in self.depth_priors:
                predictions["median prior"] = self.depth_priors[name]
            scores = self.depth.setdefault(name, {})
            for method, prediction in predictions.items():
                scores.setdefault(method, metrics.DepthMetrics()).update(prediction, truth[0].cpu())

    def add_photometric(self, depth: Tensor, batch: Batch) -> None:
        """Mean over pixels of the sources' least SSIM + L1, warped by `depth` and unwarped."""
        errors = _photometric_errors(depth, batch)
        if errors is not None:
            self.photometric.append(errors)

    def tables(self) -> dict[str, Table]:
        tables: dict[str, Table] = {}
        if self.labelled_frames:
            tables["occupancy"] = {m: _occupancy_row(*curves) for m, curves in self.curves.items()}
        for name, scores in self.depth.items():
            table = {}
            for method, metric in scores.items():
                for scaling, row in metric.results().items():
                    table[method if scaling == "raw" else f"{method}, median scaled"] = row
            if table:
                tables[f"depth, {name}"] = table
        novel = self.novel.results()
        if novel:
            tables["novel depth"] = {
                f"{k - 1} to {k} m ahead": row["raw"] for k, row in novel.items() if row
            }
        if self.photometric:
            warped, identity = np.mean(self.photometric, axis=0)
            tables["photometric"] = {
                "SelfOcc": {"error": float(warped)},
                "identity": {"error": float(identity)},
            }
        return tables


def _occupancy_row(whole: metrics.ThresholdCurve, high: metrics.ThresholdCurve) -> dict[str, float]:
    best, best_high = whole.results()["best"], high.results()["best"]
    return {
        "iou": best["iou"],
        "precision": best["precision"],
        "recall": best["recall"],
        "threshold": best["threshold"],
        "iou_above": best_high["iou"],
        "threshold_above": best_high["threshold"],
    }


def _photometric_errors(depth: Tensor, batch: Batch) -> tuple[float, float] | None:
    target, sources = batch.target, _other_frames(batch)
    height, width = depth.shape[-2:]
    if not sources.images.shape[1]:
        return None
    v, u = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)]).to(depth).flatten(1)  # [3, h w]
    points = F.pad(pixels * depth.flatten(2)[:, :, None], (0, 0, 0, 1), value=1.0)
    matrix = image_to_image(
        target.intrinsics[:, None],
        target.camera_to_volume[:, None],
        sources.intrinsics,
        sources.camera_to_volume,
    )
    projected = matrix.to(depth) @ points[:, None]  # [1, K, N, 4, h w]
    z = projected[..., 2, :].clamp_min(1e-5)
    x, y = projected[..., 0, :] / z, projected[..., 1, :] / z
    seen = (projected[..., 2, :] > 0) & (x > 0) & (x < width - 1) & (y > 0) & (y < height - 1)
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1)
    images = sources.images.flatten(0, 2)
    warped = F.grid_sample(
        images, grid.flatten(0, 2).unflatten(1, (height, width)), align_corners=True
    )
    goal = target.images[:, None].expand_as(sources.images).flatten(0, 2)
    seen = seen.flatten(0, 2).unflatten(1, (height, width))
    error = torch.where(seen, kernels.ssim_l1(warped, goal), torch.inf)
    error, identity = (
        e.unflatten(0, (sources.images.shape[1], -1)).amin(0)
        for e in (error, kernels.ssim_l1(images, goal))
    )
    seen = error.isfinite()
    return error[seen].mean().item(), identity[seen].mean().item()


def _other_frames(batch: Batch) -> Frames:
    """The sources of a single sample that are not the target itself, as at the ends of a drive."""
    sources, here = batch.sources, batch.target.camera_to_volume
    other = [
        k for k, pose in enumerate(sources.camera_to_volume[0]) if not torch.equal(pose, here[0])
    ]
    return Frames(*(getattr(sources, f.name)[:, other] for f in dataclasses.fields(Frames)))


@torch.no_grad()
def evaluate(
    model: SelfOcc,
    dataset: VideoDataset,
    device: torch.device,
    tasks: Iterable[str] = ("occupancy", "depth"),
    priors: Priors | None = None,
    frames: int | None = None,
    progress: bool = True,
) -> dict[str, Table]:
    """Tables (see `Evaluation.tables`) of at most `frames` frames, evenly spread; None is all."""
    training = model.training
    model.eval()
    scores = Evaluation(model, priors)
    batches = loader(dataset, frames, model.config.optim.workers)
    bar = tqdm(batches, desc="evaluating", disable=not progress)
    for index, batch in zip(batches.dataset.indices, bar, strict=True):
        batch = batch.to(device)
        volume = model.volume(batch)
        if "occupancy" in tasks:
            scores.add_occupancy(volume, batch)
        if "depth" in tasks:
            depth, _ = rendered_maps(model, volume, batch.target)
            scores.add_depth(depth, batch)
            scores.add_photometric(depth, batch)
        if "novel_depth" in tasks:
            for distance, later in dataset.future(index):
                later = collate([later]).to(device)
                depth, _ = rendered_maps(model, volume, later.target)
                for truth in truth_maps(later).values():
                    scores.novel.update(distance, depth[0].cpu(), truth[0].cpu())
                    break
    model.train(training)
    return scores.tables()


def validate(
    model: SelfOcc, dataset: VideoDataset, frames: int, device: torch.device
) -> dict[str, float]:
    """The few numbers worth watching during training."""
    tables = evaluate(model, dataset, device, frames=frames, progress=False)
    numbers = {}
    if "occupancy" in tables:
        row = tables["occupancy"]["SelfOcc"]
        numbers |= {"IoU": row["iou"], "IoU_above": row["iou_above"]}
    for name, table in tables.items():
        if name.startswith("depth"):
            numbers[f"AbsRel_{name.removeprefix('depth, ')}"] = table["SelfOcc"]["abs_rel"]
    if "photometric" in tables:
        numbers |= {f"photometric_{m}": row["error"] for m, row in tables["photometric"].items()}
    return numbers


def gather_priors(model: SelfOcc, training: VideoDataset, frames: int) -> Priors:
    """Priors from at most `frames` training frames (a data set opened with train=False)."""
    priors = Priors()
    batches = loader(training, frames, model.config.optim.workers)
    for batch in tqdm(batches, desc="priors from training truth"):
        priors.add(model, batch)
    return priors


@torch.no_grad()
def panel(model: SelfOcc, dataset: VideoDataset, index: int, device: torch.device):
    """A picture of one frame: image, rendered colour, depth and its error, occupancy."""
    training = model.training
    model.eval()
    batch = collate([dataset[index]]).to(device)
    volume = model.volume(batch)
    depth, color = rendered_maps(model, volume, batch.target)
    image, color = (pictures.rgb_picture(p[0, 0]) for p in (batch.target.images, color))
    shown = [
        pictures.caption(image, f"image {batch.name[0]}"),
        pictures.caption(color, "rendered colour"),
    ]
    rows = [shown, [pictures.caption(pictures.depth_picture(depth[0, 0]), "rendered depth")]]
    for name, truth in truth_maps(batch).items():
        error = pictures.error_picture(depth[0, 0], truth[0, 0])
        rows[1].append(pictures.caption(error, f"relative error against {name}, red is 50 %"))
        break
    rows += _occupancy_rows(model, volume, batch)
    model.train(training)
    return pictures.tile(rows)


def _occupancy_rows(model: SelfOcc, volume: Tensor, batch: Batch) -> list[list]:
    settings = model.config.volume
    shape, labels = scored_labels(model, batch)
    occupied = occupancy_grid(volume, settings.box, shape).cpu() <= settings.threshold
    columns = [("predicted", occupied[0])]
    if labels is not None:
        known = labels[0] != 255
        columns[0] = ("predicted, where known", occupied[0] & known)
        columns.append(("truth", (labels[0] > 0) & known))
    return [
        [
            pictures.caption(
                pictures.occupancy_picture(grid, settings.box, view), f"{name}, from {view}"
            )
            for name, grid in columns
        ]
        for view in ("behind", "above")
    ]


def scored_labels(model: SelfOcc, batch: Batch) -> tuple[tuple[int, int, int], Tensor | None]:
    """Shape [ny, nx, nz] of the voxel grid that is scored, and the labels on it if known."""
    if batch.voxels is not None:
        labels = torch.stack(
            [metrics.pool_voxels(v, model.config.volume.voxel) for v in batch.voxels.cpu()]
        )
        return tuple(labels.shape[1:]), labels
    box = model.config.volume.box
    edge = 0.2 * model.config.volume.voxel
    return tuple(round((box[a + 3] - box[a]) / edge) for a in (1, 0, 2)), None


def fly_through(
    model: SelfOcc, dataset: VideoDataset, device: torch.device
) -> Iterator[np.ndarray]:
    """Panels of every frame of the first sequence, in order, for a video."""
    sequence = dataset.sequences[0]
    along = VideoDataset.every_frame(sequence, dataset.config)
    for index in range(len(along)):
        yield panel(model, along, index, device)
