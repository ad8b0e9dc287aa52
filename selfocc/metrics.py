"""What a prediction is worth (spec section 12), and the baselines it has to beat.

Voxels are [ny, nx, nz] over (y, x, z); labels are uint8, 0 free, 1.. class, 255 unknown and never
scored. Depth is z-depth in metres, 0 in truth where there is none. Every metric accumulates frames
with `update` and reports with `results`; what it knows of them is one tensor, `state`, and the
state of many frames is the sum of theirs. Arguments are tensors on the CPU or numpy arrays.
"""

import math

import torch
from torch import Tensor

UNKNOWN = 255
GROUND = (9, 10, 11, 12, 17)  # SemanticKITTI: road, parking, sidewalk, other-ground, terrain


def _ratio(numerator, denominator) -> float:
    return float(numerator) / float(denominator) if denominator else 0.0


def _scores(tp, fp, fn) -> dict[str, float]:
    return {
        "iou": _ratio(tp, tp + fp + fn),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
    }


# voxels


def pool_voxels(labels: Tensor, factor: int) -> Tensor:
    """Voxels `factor` times as long: [ny, nx, nz] -> [ny/f, nx/f, nz/f] uint8.

    Occupied if any child is, by the commonest class of the occupied children (the lowest id among
    equals); free if none is and at least half are known; else unknown. Raises ValueError where
    `factor` does not divide the shape.
    """
    labels = torch.as_tensor(labels)
    if factor == 1:
        return labels
    if any(n % factor for n in labels.shape):
        raise ValueError(f"voxels {tuple(labels.shape)} cannot be pooled by {factor}")
    ny, nx, nz = (n // factor for n in labels.shape)
    children = labels.reshape(ny, factor, nx, factor, nz, factor).permute(0, 2, 4, 1, 3, 5)
    children = children.flatten(3).long()
    known = children != UNKNOWN
    classes = torch.where(known, children, 0)
    votes = torch.zeros(ny, nx, nz, int(classes.max()) + 1, dtype=torch.int32)
    votes.scatter_add_(3, classes, torch.ones_like(classes, dtype=torch.int32))
    votes[..., 0] = 0
    most, label = votes.max(dim=3)
    half_known = 2 * known.sum(dim=3) >= factor**3
    empty = torch.where(half_known, 0, UNKNOWN)
    return torch.where(most > 0, label, empty).to(torch.uint8)


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


def above_ground(
    labels: Tensor, voxel_size: float, margin: float = 0.3, ground: tuple[int, ...] = GROUND
) -> Tensor:
    """Which voxels [ny, nx, nz] lie more than `margin` metres above the ground, centre to centre.

    The ground of a column is its highest voxel of a class in `ground`, or that of the nearest
    column that has one. Labels without any ground say nothing about height: no voxel is above it.
    """
    labels = torch.as_tensor(labels)
    grounded = torch.isin(labels, torch.tensor(ground, dtype=labels.dtype))
    level = torch.arange(labels.shape[2])
    height = torch.where(grounded, level, -1).amax(dim=2)
    known = height >= 0
    if not known.any():
        return torch.zeros_like(grounded)
    return (level - fill_nearest(height, known)[..., None]) * voxel_size > margin + 1e-6


class OccupancyMetrics:
    """IoU, precision and recall of occupied voxels, pooled over all frames."""

    def __init__(self):
        self.state = torch.zeros(3, dtype=torch.int64)  # true and false positives, false negatives

    def update(self, prediction: Tensor, labels: Tensor, mask: Tensor | None = None) -> None:
        """prediction bool, labels uint8, mask bool (scored where true): [ny, nx, nz]."""
        prediction, labels = torch.as_tensor(prediction).bool(), torch.as_tensor(labels)
        scored = labels != UNKNOWN if mask is None else (labels != UNKNOWN) & mask
        occupied = (labels > 0) & scored
        found, false = prediction & occupied, prediction & scored & ~occupied
        self.state = self.state + torch.stack(
            [found.sum(), false.sum(), (~prediction & occupied).sum()]
        )

    def results(self) -> dict[str, float]:
        return _scores(*self.state.tolist())


class ThresholdCurve:
    """IoU, precision and recall of `field <= threshold` for many ascending thresholds at once."""

    def __init__(self, thresholds: Tensor):
        self.thresholds = torch.as_tensor(thresholds)
        # how many free and occupied voxels have how many thresholds below their value
        self.state = torch.zeros(2, len(self.thresholds) + 1, dtype=torch.int64)

    def update(self, field: Tensor, labels: Tensor, mask: Tensor | None = None) -> None:
        """field [ny, nx, nz] float: SDF in metres, or any score that is low where occupied."""
        field, labels = torch.as_tensor(field), torch.as_tensor(labels)
        scored = labels != UNKNOWN if mask is None else (labels != UNKNOWN) & mask
        rank = torch.searchsorted(self.thresholds, field[scored].to(self.thresholds.dtype))
        bins = self.state.shape[1]
        self.state = self.state + torch.bincount(
            (labels[scored] > 0) * bins + rank, minlength=2 * bins
        ).view(2, bins)

    def results(self) -> dict:
        """Lists over the thresholds, and the `best` of them by IoU."""
        predicted = self.state.cumsum(dim=1)[:, :-1]
        total = int(self.state[1].sum())
        curve = [
            {"threshold": float(t), **_scores(tp, fp, total - tp)}
            for t, fp, tp in zip(self.thresholds, *predicted.tolist(), strict=True)
        ]
        best = max(curve, key=lambda point: point["iou"])
        return {"best": best, **{key: [point[key] for point in curve] for key in curve[0]}}


class SemanticMetrics:
    """IoU of each class over known voxels, pooled over all frames; class 0 is free."""

    def __init__(self, classes: int = 20):
        self.state = torch.zeros(classes, classes, dtype=torch.int64)  # [truth, prediction]

    def update(self, prediction: Tensor, labels: Tensor) -> None:
        """prediction: class ids, 0 where free; labels uint8: [ny, nx, nz]."""
        prediction, labels = torch.as_tensor(prediction), torch.as_tensor(labels)
        known = labels != UNKNOWN
        n = len(self.state)
        pairs = labels[known].long() * n + prediction[known].long()
        self.state = self.state + torch.bincount(pairs, minlength=n * n).view(n, n)

    def results(self) -> dict:
        """`iou` of every class, and its mean over classes 1.. by three customs.

        miou: classes that occur in the truth; miou_ssc: all, 0 where a class never occurs
            (SemanticKITTI);
        miou_published: all, 1 where a class never occurs in the truth (spec section 13, item 22).
        """
        correct, seen = self.state.diagonal(), self.state.sum(dim=1)
        positive = self.state.sum(dim=0)
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
    """The seven errors of DEPTH_ERRORS over pairs of positive depths [M]; float64 [7]."""
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


class DepthMetrics:
    """Depth errors of each camera, averaged over frames: as predicted, and scaled by medians."""

    def __init__(self, maximum: float = MAX_DEPTH):
        self.maximum = maximum
        # [2 scalings, N cameras, sums of errors and scale, and frames with truth]
        self.state: Tensor | int = 0

    def update(self, predicted: Tensor, truth: Tensor) -> None:
        """predicted, truth: [N, ...] of one frame; scored where MIN_DEPTH < truth < maximum."""
        predicted, truth = torch.as_tensor(predicted), torch.as_tensor(truth)
        state = torch.zeros(2, len(truth), len(DEPTH_ERRORS) + 2, dtype=torch.float64)
        for camera, mask in enumerate((truth > MIN_DEPTH) & (truth < self.maximum)):
            if mask.any():
                p, t = predicted[camera][mask], truth[camera][mask]
                for i, scale in enumerate((1.0, float(t.median() / p.median()))):
                    errors = depth_errors((p * scale).clamp(MIN_DEPTH, self.maximum), t)
                    state[i, camera] = torch.cat([errors, errors.new_tensor([scale, 1])])
        self.state = self.state + state

    def per_camera(self) -> Tensor:
        """float64 [2, N, 8]: raw and median; DEPTH_ERRORS and the scale; NaN without truth."""
        return self.state[..., :-1] / self.state[..., -1:]

    def results(self) -> dict[str, dict[str, float]]:
        """{"raw" | "median": {error: mean over cameras}}, or {} if there was no truth."""
        if not torch.as_tensor(self.state).any():
            return {}
        means = self.per_camera().nanmean(dim=1).tolist()
        names = (*DEPTH_ERRORS, "scale")
        return {
            kind: dict(zip(names, row, strict=True))
            for kind, row in zip(("raw", "median"), means, strict=True)
        }


# baselines


class ConstantPrior:
    """The best guess without looking: how often each voxel was occupied in training."""

    def __init__(self):
        self.occupied = self.known = 0

    def add(self, labels: Tensor) -> None:
        """labels [ny, nx, nz] of a training frame."""
        known = torch.as_tensor(labels) != UNKNOWN
        self.known = self.known + known.int()
        self.occupied = self.occupied + (known & (torch.as_tensor(labels) > 0)).int()

    def probability(self) -> Tensor:
        """Mean occupancy [ny, nx, nz] in 0..1; 0 where training never saw."""
        return self.occupied / self.known.clamp_min(1)

    @staticmethod
    def curve() -> ThresholdCurve:
        """For update(-probability, labels): occupied where the probability >= -threshold."""
        return ThresholdCurve(-torch.arange(100, 0, -1) / 100)


class MedianDepth:
    """The best depth without looking: the median over training of each pixel of each camera."""

    def __init__(self):
        self.shape = (0, 0, 0)
        self.known: list[tuple[Tensor, Tensor]] = []  # pixels and their depths; LiDAR has few

    def add(self, depth: Tensor) -> None:
        """depth [N, h, w] of a training frame, 0 where there is none."""
        depth = torch.as_tensor(depth).float()
        self.shape = depth.shape
        pixels = (depth.flatten() > 0).nonzero()[:, 0]
        self.known.append((pixels, depth.flatten()[pixels]))

    def depth(self) -> Tensor:
        """[N, h, w]; pixels that never had truth take the nearest one that had."""
        pixels, depths = (torch.cat(parts) for parts in zip(*self.known, strict=True))
        depths, order = depths.sort()
        pixels, order = pixels[order].sort(stable=True)  # by depth within every pixel
        count = pixels.bincount(minlength=math.prod(self.shape))
        middle = count.cumsum(0) - count + (count - 1) // 2  # of an even number the lower one
        median = torch.zeros(len(count))
        median[count > 0] = depths[order][middle[count > 0]]
        return fill_nearest(median.view(self.shape), (count > 0).view(self.shape))


def flat_ground_sdf(points_z: Tensor, height: float) -> Tensor:
    """Signed distance of points at these heights (metres) to the plane z = height."""
    return points_z - height


def flat_ground_depth(
    intrinsics: Tensor,
    camera_to_volume: Tensor,
    size: tuple[int, int],
    ground_z: float,
    maximum: float = MAX_DEPTH,
) -> Tensor:
    """z-depth [N, h, w] of the plane z = ground_z, `maximum` where it is farther or never met.

    intrinsics [N, 3, 3], camera_to_volume [N, 4, 4], size (h, w).
    """
    intrinsics = torch.as_tensor(intrinsics).double()
    matrix = torch.as_tensor(camera_to_volume).double()
    v, u = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)], dim=-1).double()
    # rise of the volume's z for one metre of z-depth
    to_rise = torch.einsum("ni,nij->nj", matrix[:, 2, :3], torch.linalg.inv(intrinsics))
    rise = torch.einsum("hwj,nj->nhw", pixels, to_rise)
    depth = (ground_z - matrix[:, 2, 3, None, None]) / rise
    return torch.where(depth > 0, depth, maximum).clamp(max=maximum).float()
