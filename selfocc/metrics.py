"""What a prediction is worth, and the baselines it has to beat.

Voxels are [ny, nx, nz] over (y, x, z); labels are uint8, 0 free, 1.. class, 255 unknown and never
scored. Depth is z-depth in metres, 0 in truth where there is none. A metric is two functions: one
counts a frame, the other makes scores of the sum of the counts of many. Tensors are on the CPU.
"""

import math

import torch
from torch import Tensor

UNKNOWN = 255
GROUND = (9, 10, 11, 12, 17)  # SemanticKITTI: road, parking, sidewalk, other-ground, terrain
ABOVE = 0.3  # metres above the ground from which on occupancy gets hard


def _ratio(numerator, denominator) -> float:
    return float(numerator) / float(denominator) if denominator else 0.0


# voxels


def pool_voxels(labels: Tensor, factor: int) -> Tensor:
    """Voxels `factor` times as long: [ny, nx, nz] -> [ny/f, nx/f, nz/f] uint8.

    Occupied if any child is, by the commonest class of the occupied children (the lowest id among
    equals); free if none is and at least half are known; else unknown. Raises ValueError where
    `factor` does not divide the shape.
    """
    if factor == 1:
        return labels
    if any(n % factor for n in labels.shape):
        raise ValueError(f"voxels {tuple(labels.shape)} cannot be pooled by {factor}")
    ny, nx, nz = (n // factor for n in labels.shape)
    children = labels.reshape(ny, factor, nx, factor, nz, factor).permute(0, 2, 4, 1, 3, 5)
    children = children.flatten(3)
    known = children != UNKNOWN
    pooled = torch.where(2 * known.sum(dim=3) >= factor**3, 0, UNKNOWN).to(torch.uint8)
    classes = torch.where(known, children, 0)
    occupied = (classes > 0).any(dim=3)
    classes = classes[occupied].long()
    votes = torch.zeros(len(classes), UNKNOWN, dtype=torch.int32)
    votes.scatter_add_(1, classes, torch.ones_like(classes, dtype=torch.int32))
    pooled[occupied] = (votes[:, 1:].argmax(dim=1) + 1).to(torch.uint8)
    return pooled


def fill_nearest(values: Tensor, known: Tensor) -> Tensor:
    """Give unknown pixels of [..., h, w] the value of the nearest known one.

    By jump flooding, which errs by less than a pixel in rare places. A map in which nothing is
    known comes back as it is.
    """
    h, w = values.shape[-2:]
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    seed = torch.where(known, y * w + x, -1)
    distance = torch.where(known, 0, 1 << 60)
    step = 1 << max(h, w).bit_length()
    while step := step // 2:
        for shift in ((i, j) for i in (-step, 0, step) for j in (-step, 0, step)):
            # rolling wraps around, which is harmless: a seed carries its own position
            other = seed.roll(shift, (-2, -1))
            away = torch.where(other >= 0, (y - other // w) ** 2 + (x - other % w) ** 2, 1 << 60)
            nearer = away < distance
            seed, distance = torch.where(nearer, other, seed), torch.where(nearer, away, distance)
    filled = values.flatten(-2).gather(-1, seed.clamp_min(0).flatten(-2)).view_as(values)
    return torch.where(seed >= 0, filled, values)


def above_ground(labels: Tensor, voxel_size: float, ground: tuple[int, ...] = GROUND) -> Tensor:
    """Which voxels [ny, nx, nz] lie more than ABOVE metres above the ground, centre to centre.

    The ground of a column is its highest voxel of a class in `ground`, or that of the nearest
    column that has one. Labels without any ground say nothing about height: no voxel is above it.
    """
    grounded = torch.isin(labels, torch.tensor(ground, dtype=labels.dtype))
    level = torch.arange(labels.shape[2])
    height = torch.where(grounded, level, -1).amax(dim=2)
    known = height >= 0
    if not known.any():
        return torch.zeros_like(grounded)
    return (level - fill_nearest(height, known)[..., None]) * voxel_size > ABOVE + 1e-6


def threshold_counts(field: Tensor, labels: Tensor, above: Tensor, thresholds: Tensor) -> Tensor:
    """How many free and occupied voxels have k thresholds below their value: int64 [2, 2, T + 1].

    First all known voxels, then those in the mask `above`. field [ny, nx, nz]: SDF in metres, or
    any score that is low where occupied; thresholds [T] ascending.
    """
    known = labels != UNKNOWN
    rank = torch.searchsorted(thresholds, field[known].to(thresholds.dtype))
    kind, bins = 2 * above[known] + (labels[known] > 0), len(thresholds) + 1
    below, high = torch.bincount(kind * bins + rank, minlength=4 * bins).view(2, 2, bins)
    return torch.stack([below + high, high])


def best_threshold(counts: Tensor, thresholds: Tensor) -> dict[str, float]:
    """The threshold of best IoU when `field <= threshold` is occupied, the first of equals; its
    IoU, precision and recall. counts [2, T + 1]: one of `threshold_counts`."""
    total, curve = int(counts[1].sum()), []
    for threshold, false, found in zip(
        thresholds, *counts.cumsum(dim=1)[:, :-1].tolist(), strict=True
    ):
        curve.append({
            "iou": _ratio(found, total + false),
            "precision": _ratio(found, found + false),
            "recall": _ratio(found, total),
            "threshold": float(threshold),
        })  # fmt: skip
    return max(curve, key=lambda point: point["iou"])


def confusion_counts(prediction: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Known voxels by class, int64 [truth, prediction]; prediction: class ids, 0 where free."""
    known = labels != UNKNOWN
    pairs = labels[known].long() * classes + prediction[known].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


RAY_ERRORS = (1.0, 2.0, 4.0)  # metres below which a ray is right


def ray_counts(
    left: Tensor, label: Tensor, truth: Tensor, truth_label: Tensor, classes: int
) -> Tensor:
    """Of rays [R] that meet something in the truth, int64 [5, classes]: how many meet a class in
    the truth, in the prediction, and in both with an error below each of RAY_ERRORS.

    left, truth: metres, inf where nothing is met; labels int64 below `classes`, 0 where free. In
    place of class 0 stands whatever is occupied.
    """
    met, near = left.isfinite(), (left - truth).abs() < torch.tensor(RAY_ERRORS)[:, None]
    right = near & (label == truth_label)
    by_class = [truth_label, label, *(label[rays] for rays in right)]
    counts = torch.stack([torch.bincount(ids, minlength=classes) for ids in by_class])
    counts[:, 0] = torch.stack([torch.tensor(len(met)), met.sum(), *near.sum(dim=1)])
    return counts


def ray_scores(counts: Tensor) -> list[dict[str, float]]:
    """RayIoU of each column of `ray_counts`, by error and their mean; {} where none is met."""
    rows = []
    for truth, met, *right in counts.T.tolist():
        ious = [_ratio(found, truth + met - found) for found in right]
        row = {f"ray_{error:g}": iou for error, iou in zip(RAY_ERRORS, ious, strict=True)}
        rows.append(row | {"ray": sum(ious) / len(ious)} if truth + met else {})
    return rows


def class_scores(confusion: Tensor) -> dict:
    """`iou` of every class, and its mean over classes 1.. by three customs.

    miou: classes that occur in the truth; miou_ssc: all, 0 where a class never occurs
        (SemanticKITTI); miou_published: all, 1 where a class never occurs in the truth.
    """
    correct, seen, positive = confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)
    iou = [_ratio(*counts) for counts in zip(correct, seen + positive - correct, strict=True)]
    present = (seen[1:] > 0).tolist()
    occurring = [value for value, here in zip(iou[1:], present, strict=True) if here]
    return {
        "iou": iou,
        "miou": _ratio(sum(occurring), len(occurring)),
        "miou_ssc": _ratio(sum(iou[1:]), len(present)),
        "miou_published": _ratio(sum(occurring) + present.count(False), len(present)),
    }


# depth

DEPTH_ERRORS = ("abs_rel", "sq_rel", "rmse", "rmse_log", "a1", "a2", "a3")
MIN_DEPTH, MAX_DEPTH = 1e-3, 80.0


def depth_errors(predicted: Tensor, truth: Tensor) -> Tensor:
    """DEPTH_ERRORS over pairs of positive depths [M]; float64 [7]."""
    predicted, truth = predicted.double(), truth.double()
    ratio = torch.maximum(predicted / truth, truth / predicted)
    difference = predicted - truth
    return torch.stack([
        (difference.abs() / truth).mean(),
        (difference**2 / truth).mean(),
        (difference**2).mean().sqrt(),
        ((predicted.log() - truth.log()) ** 2).mean().sqrt(),
        *((ratio < 1.25**k).double().mean() for k in (1, 2, 3)),
    ])  # fmt: skip


def depth_sums(predicted: Tensor, truth: Tensor) -> Tensor:
    """Of a frame, [N, ...] each: float64 [2, N, 9], as predicted and scaled by medians.

    The nine are DEPTH_ERRORS, the scale, and 1; all 0 for a camera without truth. Scored where
    MIN_DEPTH < truth < MAX_DEPTH.
    """
    sums = torch.zeros(2, len(truth), len(DEPTH_ERRORS) + 2, dtype=torch.float64)
    for camera, mask in enumerate((truth > MIN_DEPTH) & (truth < MAX_DEPTH)):
        if mask.any():
            p, t = predicted[camera][mask], truth[camera][mask]
            for i, scale in enumerate((1.0, float(t.median() / p.median()))):
                errors = depth_errors((p * scale).clamp(MIN_DEPTH, MAX_DEPTH), t)
                sums[i, camera] = torch.cat([errors, errors.new_tensor([scale, 1])])
    return sums


def depth_means(sums: Tensor) -> Tensor:
    """Of every camera, over frames: [2, N, 8] of DEPTH_ERRORS and scale; NaN without truth."""
    return sums[..., :-1] / sums[..., -1:]


def depth_scores(sums: Tensor) -> list[dict[str, float]]:
    """As predicted, and scaled by medians: {error: mean over cameras}; [] if there was no truth."""
    if not sums.any():
        return []
    names = (*DEPTH_ERRORS, "scale")
    rows = depth_means(sums).nanmean(dim=1).tolist()
    return [dict(zip(names, row, strict=True)) for row in rows]


# baselines


PRIOR_THRESHOLDS = -torch.arange(100, 0, -1) / 100  # of minus the probability


def voxel_counts(labels: Tensor) -> Tensor:
    """Of a training frame: which voxels are known, and which occupied; int32 [2, ny, nx, nz]."""
    known = labels != UNKNOWN
    return torch.stack([known, known & (labels > 0)]).int()


def prior_probability(counts: Tensor) -> Tensor:
    """The best guess without looking: how often each voxel [ny, nx, nz] was occupied where it was
    known in training; 0 where it never was."""
    known, occupied = counts
    return occupied / known.clamp_min(1)


def known_depths(depth: Tensor) -> tuple[Tensor, Tensor]:
    """Of a training frame [N, h, w]: the pixels (as flattened) that have depth, and it."""
    pixels = (depth.flatten() > 0).nonzero()[:, 0]
    return pixels, depth.flatten()[pixels].float()


def median_depth(known: list[tuple[Tensor, Tensor]], shape: tuple[int, int, int]) -> Tensor:
    """The best depth without looking: the median of the training frames in each pixel [N, h, w].

    known: `known_depths` of each. Pixels that never had truth take the nearest one that had.
    """
    pixels, depths = (torch.cat(parts) for parts in zip(*known, strict=True))
    depths, order = depths.sort()
    pixels, order = pixels[order].sort(stable=True)  # by depth within every pixel
    count = pixels.bincount(minlength=math.prod(shape))
    middle = count.cumsum(0) - count + (count - 1) // 2  # of an even number the lower one
    median = torch.zeros(len(count))
    median[count > 0] = depths[order][middle[count > 0]]
    return fill_nearest(median.view(shape), (count > 0).view(shape))


def flat_ground_depth(
    intrinsics: Tensor, camera_to_volume: Tensor, size: tuple[int, int], ground_z: float
) -> Tensor:
    """z-depth [N, h, w] of the plane z = ground_z, MAX_DEPTH where it is farther or never met.

    intrinsics [N, 3, 3], camera_to_volume [N, 4, 4], float64; size (h, w).
    """
    v, u = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)], dim=-1).double()
    # rise of the volume's z for one metre of z-depth
    to_rise = torch.einsum("ni,nij->nj", camera_to_volume[:, 2, :3], torch.linalg.inv(intrinsics))
    rise = torch.einsum("hwj,nj->nhw", pixels, to_rise)
    depth = (ground_z - camera_to_volume[:, 2, 3, None, None]) / rise
    return torch.where(depth > 0, depth, MAX_DEPTH).clamp(max=MAX_DEPTH).float()
