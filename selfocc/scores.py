"""What the frames of an evaluation score: a record for each, and tables of them all.

A record holds the counts of one frame (see metrics.py), so that the table of many frames is made of
the sum of their records, whatever process scored which frame. They are named `occupancy/METHOD`,
`seen/METHOD`, `rays/METHOD`, `semantics`, `depth/TRUTH/METHOD`, `novel/METRES` and `photometric`.
"""

import itertools
import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from selfocc import metrics, protocols
from selfocc.batch import Batch, Frames
from selfocc.geometry import Box, exact_products, image_to_image
from selfocc.journal import Record
from selfocc.labels import label_map, voxel_names
from selfocc.model import SelfOcc
from selfocc.protocols import Rules
from selfocc.sight import RANGES, Rays, Sight, cast, ring

Table = dict[str, dict[str, float]]  # method (or class) -> metric -> value
SWEEP = torch.linspace(-1, 1, 81)  # thresholds among which the best is looked for, metres
UNKNOWN_FREE = "SelfOcc, unknown counts as free"
RECORDS = 2  # version of what a record holds, so that no evaluation goes on with older ones
LIKELY = 0.25  # from this probability on, the prior stops a ray
SEEN = "occupancy where the camera sees"
MEASURED = {"exact": "exact depth", "lidar": "LiDAR depth"}  # rows of what a single image can know
DEPTH_METHODS = ("SelfOcc", "flat ground", "median prior")
DEPTH_TRUTHS = ("exact", "lidar", "stereo")
NOVEL = range(1, 11)  # metres away, at most


def truth_maps(batch: Batch) -> dict[str, Tensor]:
    """The depth truths of a batch by name, each [B, N, h, w] with 0 where there is none."""
    maps = zip(DEPTH_TRUTHS, (batch.depth, batch.lidar, batch.stereo), strict=True)
    return {name: truth for name, truth in maps if truth is not None}


class Priors:
    """What can be guessed without looking at the image, learnt from training truth."""

    def __init__(self):
        self.voxels: Tensor | int = 0  # `voxel_counts` of all frames
        self.depth: dict[str, list[tuple[Tensor, Tensor]]] = {}  # `known_depths` of each, by truth
        self.size = (0, 0, 0)  # of the maps [N, h, w]

    def add(self, labels: Tensor | None, batch: Batch) -> None:
        """labels [ny, nx, nz] as they are scored, and the depth truths of a single sample."""
        if labels is not None:
            self.voxels = self.voxels + metrics.voxel_counts(labels)
        for name, truth in truth_maps(batch).items():
            self.depth.setdefault(name, []).append(metrics.known_depths(truth[0]))
            self.size = tuple(truth.shape[1:])

    def join(self, others: Iterable["Priors"]) -> None:
        """Add what other processes have learnt."""
        for other in others:
            self.voxels = self.voxels + other.voxels
            self.size = max(self.size, other.size)
            for name, known in other.depth.items():
                self.depth.setdefault(name, []).extend(known)


class Scores:
    """Scores a model's frames beside baselines on the same frames; `tables` sums them up."""

    def __init__(self, model: SelfOcc, rules: Rules, priors: Priors | None = None):
        self.settings = model.config.volume
        self.rules = rules
        self.classes = 0 if rules.crude else model.config.field.classes
        if self.classes:
            self.names = voxel_names(model.config.data.dataset)
            chosen = label_map(model.config.data)
            self.voxel_class = torch.tensor(chosen.voxel_classes(model.config.data.dataset))
        fixed = torch.tensor([self.settings.threshold])
        self.thresholds = {"SelfOcc": fixed}
        if rules.dataset == "kitti" and rules.protocol != "own":
            self.thresholds[UNKNOWN_FREE] = fixed
        self.thresholds["SelfOcc, best threshold"] = SWEEP
        self.thresholds["flat ground, best threshold"] = SWEEP
        priors = priors or Priors()
        self.depth_priors = {
            name: metrics.median_depth(known, priors.size) for name, known in priors.depth.items()
        }
        self.occupancy_prior = None
        if isinstance(priors.voxels, Tensor):
            self.occupancy_prior = -metrics.prior_probability(priors.voxels)
            self.thresholds["constant prior, best threshold"] = metrics.PRIOR_THRESHOLDS
        measured = dict.fromkeys(MEASURED.values(), torch.zeros(1))
        self.seen_thresholds = measured | self.thresholds

    def occupancy(
        self,
        volume: Tensor,
        labels: Tensor,
        voxels_to_volume: np.ndarray | None = None,
        sight: Sight | None = None,
        rays: Rays | None = None,
    ) -> Record:
        """Scores of voxels and, where there are any, of classes, what the cameras see, and rays.

        volume [1, C, H, W, Z]; labels [ny, nx, nz] uint8; the matrix as in `read_voxels`.
        """
        rules, shape = self.rules, tuple(labels.shape)
        box = rules.box or self.settings.box
        sdf, likeliest = protocols.read_voxels(
            volume, self.classes, rules, self.settings.box, shape, voxels_to_volume
        )
        whole, edge = sdf.cpu(), (box[5] - box[2]) / shape[2]
        sdf = rules.crop(whole)
        flat = protocols.heights(box, shape, voxels_to_volume) - self.settings.ground
        fields = dict.fromkeys(self.thresholds, sdf)
        fields["flat ground, best threshold"] = rules.crop(flat)
        if self.occupancy_prior is not None:
            fields["constant prior, best threshold"] = self.occupancy_prior
        above = metrics.above_ground(labels, edge, rules.ground)
        record = {}
        for method, thresholds in self.thresholds.items():
            truth = labels
            if method == UNKNOWN_FREE:
                truth = torch.where(labels == metrics.UNKNOWN, 0, labels)
            counts = metrics.threshold_counts(fields[method], truth, above, thresholds)
            record[f"occupancy/{method}"] = counts
        if sight is not None:
            where = sight.seen & (labels != metrics.UNKNOWN)
            reach, labelled, high = ring(box, shape)[where], labels[where], above[where]
            if sight.ends is not None:
                fields[sight.source] = (~sight.ends).float()
            for method, thresholds in self.seen_thresholds.items():
                if method == UNKNOWN_FREE or method not in fields:
                    continue
                field = fields[method][where]
                record[f"seen/{method}"] = torch.stack([
                    metrics.threshold_counts(field[k], labelled[k], high[k], thresholds)
                    for k in (reach <= i for i in range(len(RANGES)))
                ])  # fmt: skip
        classes = None
        if likeliest is not None:
            classes = self.voxel_class[likeliest.cpu()]
            predicted = torch.where(sdf <= self.settings.threshold, classes, 0)
            record["semantics"] = metrics.confusion_counts(predicted, labels, len(self.names))
        if rays is not None:
            occupied = whole <= self.settings.threshold  # rays know no margins
            grids = {"SelfOcc": occupied, "flat ground": flat <= edge / 2}
            if self.occupancy_prior is not None:
                grids["constant prior"] = self.occupancy_prior <= -LIKELY
            if sight is not None and sight.ends is not None:
                grids[sight.source] = sight.ends
            for method, grid in grids.items():
                known = classes if method == "SelfOcc" else None
                record[f"rays/{method}"] = self._rays(rays, grid, known, box)
        return record

    def _rays(self, rays: Rays, occupied: Tensor, classes: Tensor | None, box: Box) -> Tensor:
        """`ray_counts` of what is occupied [ny, nx, nz], and of its classes where there are any."""
        place, left = cast(occupied, box, rays.origins, rays.directions)
        if classes is None:
            free = torch.zeros_like(place)
            return metrics.ray_counts(left, free, rays.left, free, 1)
        met = torch.where(place < 0, 0, classes.flatten()[place])
        return metrics.ray_counts(left, met, rays.left, rays.label.long(), len(self.names))

    def depth_maps(self, depth: Tensor, batch: Batch) -> Record:
        """Maps of depth [1, N, h, w], rendered for the target, against maps of truth."""
        record = {}
        for name, truth in truth_maps(batch).items():
            truth = protocols.scored_depth(truth, self.rules)[0].cpu()
            for method, prediction in self._depths(name, depth, batch.target).items():
                record[f"depth/{name}/{method}"] = metrics.depth_sums(prediction, truth)
        return record

    def depth_points(self, grid: Tensor, target: Frames, location: Tensor, truth: Tensor) -> Record:
        """Depth of fixed rays [1, N, rows, cols] against LiDAR points as `lidar_truth` has them."""
        record = {}
        for method, depth in self._depths("lidar", grid, target).items():
            displaced = self.rules.ends and method == "SelfOcc"
            reading = protocols.read_depth(depth, location, displaced)
            record[f"depth/lidar/{method}"] = metrics.depth_sums(reading, truth)
        return record

    def _depths(self, name: str, rendered: Tensor, target: Frames) -> dict[str, Tensor]:
        """What every method says, [N, rows, cols], where `name` is the truth."""
        flat = metrics.flat_ground_depth(
            target.intrinsics[0].cpu(),
            target.camera_to_volume[0].cpu(),
            target.images.shape[-2:],
            self.settings.ground,
        )
        depths = {"SelfOcc": rendered[0].cpu(), "flat ground": flat}
        if name in self.depth_priors:
            depths["median prior"] = self.depth_priors[name]
        return depths

    def tables(self, records: Iterable[Record]) -> dict[str, Table]:
        """{task: {method: {metric: value}}} of all frames; tasks without truth are left out."""
        totals = merge(records)
        tables: dict[str, Table] = {}
        for method, thresholds in self.thresholds.items():
            if f"occupancy/{method}" in totals:
                counts = totals[f"occupancy/{method}"]
                row, above = (metrics.best_threshold(part, thresholds) for part in counts)
                row |= {"iou_above": above["iou"], "threshold_above": above["threshold"]}
                tables.setdefault("occupancy", {})[method] = row
        for method, thresholds in self.seen_thresholds.items():
            if f"seen/{method}" in totals:
                row = {}
                for name, part in (("iou", 0), ("iou_above", 1)):
                    for reach, counts in zip(RANGES, totals[f"seen/{method}"], strict=True):
                        best = metrics.best_threshold(counts[part], thresholds)
                        row[f"{name}_{reach}"] = best["iou"]
                tables.setdefault(SEEN, {})[method] = row
        for method in (*MEASURED.values(), "SelfOcc", "flat ground", "constant prior"):
            if f"rays/{method}" in totals:
                whole, *rows = metrics.ray_scores(totals[f"rays/{method}"])
                tables.setdefault("RayIoU", {})[method] = whole
                if rows:
                    names = zip(self.names[1:], rows, strict=True)
                    by_class = {name: row for name, row in names if row}
                    mean = {k: np.mean([row[k] for row in by_class.values()]) for k in whole}
                    tables["RayIoU by class"] = {"mean": mean} | by_class
        if "semantics" in totals:
            tables["semantics"] = self._semantic_table(totals["semantics"])
        for truth, method in itertools.product(DEPTH_TRUTHS, DEPTH_METHODS):
            if f"depth/{truth}/{method}" in totals:
                rows = metrics.depth_scores(totals[f"depth/{truth}/{method}"])
                for scaling, row in zip(("", ", median scaled"), rows, strict=False):
                    tables.setdefault(f"depth, {truth}", {})[method + scaling] = row
        names = {f"novel/{k}": f"{k - 1} to {k} m away" for k in NOVEL}
        novel = {name: sums for name, sums in totals.items() if name in names}
        rows = {names[k]: metrics.depth_scores(novel[k]) for k in names if k in novel}
        if novel:
            rows["all"] = metrics.depth_scores(sum(novel.values()))
        if any(rows.values()):
            tables["novel depth"] = {name: row[0] for name, row in rows.items() if row}
        if "photometric" in totals:
            warped, identity, frames = totals["photometric"].tolist()
            tables["photometric"] = {
                "SelfOcc": {"error": warped / frames},
                "identity": {"error": identity / frames},
            }
        return tables

    def _semantic_table(self, confusion: Tensor) -> Table:
        results = metrics.class_scores(confusion)
        table = {"mIoU": {"iou": results["miou"]}}
        if self.rules.protocol != "own":
            table = {
                "mIoU": {"iou": results["miou_published"]},
                "mIoU of the classes seen": {"iou": results["miou"]},
                "mIoU, never seen counts 0": {"iou": results["miou_ssc"]},
            }
        seen = confusion.sum(dim=1)[1:].tolist()
        classes = zip(self.names[1:], results["iou"][1:], seen, strict=True)
        return table | {name: {"iou": iou} for name, iou, count in classes if count}


def novel_record(distance: float, predicted: Tensor, truth: Tensor) -> Record:
    """Depth [N, ...] seen from `distance` metres away; bucket k holds distances in (k - 1, k]."""
    return {f"novel/{math.ceil(distance)}": metrics.depth_sums(predicted, truth)}


def merge(records: Iterable[Record]) -> Record:
    """The sum of records."""
    total: Record = {}
    for record in records:
        for name, counts in record.items():
            total[name] = total.get(name, 0) + counts
    return total


def photometric_record(depth: Tensor, batch: Batch) -> Record:
    """Mean over pixels of the sources' least SSIM + L1, warped by depth [1, N, h, w] and unwarped.

    Empty where there is no other frame to warp, or none that sees what the target does.
    """
    height, width = depth.shape[-2:]
    here, poses = batch.target.camera_to_volume[0], batch.sources.camera_to_volume[0]
    # at the ends of a drive a source may be the target itself
    other = [k for k, pose in enumerate(poses) if not torch.equal(pose, here)]
    if not other:
        return {}
    target, sources = batch.target.each(lambda x: x[0]), batch.sources.each(lambda x: x[0, other])
    v, u = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)]).to(depth).flatten(1)  # [3, h w]
    points = F.pad(pixels * depth[0].flatten(1)[:, None], (0, 0, 0, 1), value=1.0)
    matrix = image_to_image(
        target.intrinsics, target.camera_to_volume, sources.intrinsics, sources.camera_to_volume
    )
    with exact_products():
        projected = matrix.to(depth) @ points  # [K, N, 4, h w]
    x, y, z, _ = projected.flatten(0, 1).unflatten(2, (height, width)).unbind(1)  # [K N, h, w]
    in_front, z = z > 0, z.clamp_min(1e-5)
    x, y = x / z, y / z
    seen = in_front & (x > 0) & (x < width - 1) & (y > 0) & (y < height - 1)
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1)
    images = sources.images.flatten(0, 1)
    warped = F.grid_sample(images, grid, align_corners=True)
    goal = target.images.expand_as(sources.images).flatten(0, 1)
    error = torch.where(seen, kernels.ssim_l1(warped, goal), torch.inf)
    error, identity = (
        e.unflatten(0, (len(other), -1)).amin(0) for e in (error, kernels.ssim_l1(images, goal))
    )
    seen = error.isfinite()
    if not seen.any():
        return {}
    errors = error[seen].mean().item(), identity[seen].mean().item()
    return {"photometric": torch.tensor([*errors, 1]).double()}
