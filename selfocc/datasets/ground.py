"""What is up, and how far below a camera the ground is, in the units of its poses.

Structure from motion knows neither metres nor what is up. Cameras are held upright and mostly move
on the level; the ground is a plane below the path, and what one image shows of it must look the
same in another one, seen through that plane (its homography).
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfocc.datasets import cache, reading
from selfocc.datasets.captures import Shot
from selfocc.datasets.pixels import resized, scaled

VERSION = 3  # of what is kept; part of the cache key
STRAIGHT = 0.1  # share of the way in a direction that is taken to be level
WIDTH = 480  # pixels of the images that are compared
ANCHORS = 12  # images, spread over the footage
NEIGHBOURS = 1, 3, 9  # frames on
LEAST_PAIRS = 4
BASELINE = 0.6, 2.0  # of the pairs that measure, as multiples of the height
# what is looked at: metres down and aside of a metre ahead
DOWN, ASIDE = (0.12, 0.6), 0.35
# heights that are tried first, as multiples of the median step between frames; then finer ones
COARSE, FINE = np.geomspace(0.1, 100, 64), np.linspace(0.88, 1.14, 14)
WINDOW = 7  # pixels, each way, that are correlated
# mean correlation that ground has at least, and how much of it a plane at any height has at most;
# KITTI's has 0.33, and 0.4 of it
AGREES, ANYWHERE = 0.1, 0.7


def upright(poses: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """What is up [3] for cameras [F, N, 4, 4] that move by steps [F - 1, 3].

    That is up in their images on average, less what of it is along directions they mostly move in.
    """
    held = -poses[..., :3, 1].mean((0, 1))
    shares, axes = np.linalg.eigh(steps.T @ steps / max((steps**2).sum(), 1e-12))
    level = shares**2 / (shares**2 + STRAIGHT**2)
    up = held - axes @ (level * (axes.T @ held))
    return up / np.linalg.norm(up)


def height(
    shots: list[Shot], up: np.ndarray, limits: tuple[float, float] = (0.0, np.inf)
) -> float | None:
    """Of the camera of these shots above the ground, in the units of its poses, within limits; None
    where no ground is seen. Kept in the cache.

    The ground is taken to lie along the way from image to image. Where poses climb by a degree that
    the road does not, the height is wrong by about 9 % of KITTI's images, by less of taller ones.

    Raises InputError for images that cannot be read.
    """
    stamps = [(str(s.file), s.lens, s.pose.tobytes(), s.file.stat().st_mtime_ns) for s in shots]
    name = cache.key("ground", VERSION, stamps, up.round(6).tolist(), limits)

    def make() -> np.ndarray:
        return np.array([_height(shots, up, limits) or np.nan])

    found = cache.load_or_make(cache.folder() / f"{name}.npy", make, np.dtype(np.float64), (1,))
    return None if np.isnan(found[0]) else float(found[0])


@torch.no_grad()
def _height(shots: list[Shot], up: np.ndarray, limits: tuple[float, float]) -> float | None:
    poses = np.stack([shot.pose for shot in shots])
    images = functools.cache(lambda k: _read(shots[k]))
    anchors = np.unique(np.linspace(0, len(poses) - 2, ANCHORS).round().astype(int)).tolist()
    step = float(np.median(np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1)))
    pairs = [(k, k + n) for k in anchors for n in NEIGHBOURS if k + n < len(poses)]
    coarse = step * COARSE
    coarse = coarse[(coarse > limits[0]) & (coarse < limits[1])]
    scores = _scores(images, poses, up, pairs, coarse) if len(coarse) > 2 else None
    if scores is None or scores.argmax() in (0, len(coarse) - 1):
        return None
    best = coarse[scores.argmax()]
    pairs = []
    for k in anchors:
        away = np.linalg.norm(poses[k + 1 :, :3, 3] - poses[k, :3, 3], axis=1) / best
        fits = np.flatnonzero((away > BASELINE[0]) & (away < BASELINE[1]))[:4]
        pairs += [(k, k + 1 + int(n)) for n in fits]
    finer = _scores(images, poses, up, pairs, best * FINE)
    if finer is not None:
        top = int(finer.argmax().clip(1, len(FINE) - 2))
        before, here, after = finer[top - 1 : top + 2]
        bend = max(2 * here - before - after, 1e-9)
        best *= FINE[top] + (FINE[1] - FINE[0]) * float(np.clip((after - before) / bend / 2, -1, 1))
    agreement = float(scores.max())
    if agreement < AGREES or float(np.median(scores)) > ANYWHERE * agreement:
        return None
    return best


def _scores(images, poses, up, pairs: list[tuple[int, int]], heights) -> np.ndarray | None:
    """Mean correlation of pairs of images through the ground at each height; None of too few."""
    views = [_View(images, poses, up, *pair) for pair in pairs]
    views = [view for view in views if view.usable]
    if len(views) < LEAST_PAIRS:
        return None
    return np.array([np.mean([view.correlation(h) for view in views]) for h in heights])


def _read(shot: Shot) -> tuple[Tensor, np.ndarray]:
    """A grey image [h, w] without distortion, and its intrinsics."""
    image = shot.lens.undistorted(reading.read_image(shot.file))
    ratio = min(1.0, WIDTH / image.shape[1])
    size = [round(n * ratio) for n in image.shape[:2]]
    intrinsics = scaled(shot.lens.pinhole()[None], np.divide(size, image.shape[:2])[::-1])[0]
    return torch.from_numpy(resized(image, size)).float().mean(-1), intrinsics


class _View:
    """The part of an image that looks down ahead, and another image."""

    def __init__(self, images, poses: np.ndarray, up: np.ndarray, here: int, there: int):
        (image, k), (self.other, other_k) = images(here), images(there)
        motion = np.linalg.inv(poses[there]) @ poses[here]
        way = poses[here, :3, :3].T @ (poses[there, :3, 3] - poses[here, :3, 3])
        way /= max(np.linalg.norm(way), 1e-12)
        down = -poses[here, :3, :3].T @ up
        down -= (down @ way) * way  # the way goes along the ground, which may climb
        down /= max(np.linalg.norm(down), 1e-9)
        ahead = np.array([0, 0, 1.0]) - down[2] * down
        ahead /= max(np.linalg.norm(ahead), 1e-9)
        aside = np.cross(down, ahead)
        v, u = np.mgrid[: image.shape[0], : image.shape[1]]
        rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(k).T
        far = (rays @ ahead).clip(1e-6)
        slope, across = rays @ down / far, rays @ aside / far
        inside = (slope > DOWN[0]) & (slope < DOWN[1]) & (np.abs(across) < ASIDE)
        rows, cols = inside.any(1).nonzero()[0], inside.any(0).nonzero()[0]
        self.usable = len(rows) > 2 * WINDOW and len(cols) > 2 * WINDOW
        if not self.usable:
            return
        cut = slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1)
        self.image, self.inside = image[cut], torch.from_numpy(inside[cut])
        rays = torch.from_numpy(rays[cut].reshape(-1, 3))
        self.sinking = rays @ torch.from_numpy(down)
        # to homogeneous pixels of the other image
        self.far = rays @ torch.from_numpy(other_k @ motion[:3, :3]).T
        self.shift = torch.from_numpy(other_k @ motion[:3, 3])

    def correlation(self, height: float) -> float:
        """Mean of windows of the two images, through the plane so far below; 0 outside."""
        place = self.far + (self.sinking / height)[:, None] * self.shift
        size = torch.tensor(self.other.shape[::-1])
        grid = 2 * (place[:, :2] / place[:, 2:].clamp_min(1e-3) + 0.5) / size - 1
        seen = ((grid.abs() < 1).all(-1) & (place[:, 2] > 1e-3)).view_as(self.image)
        grid = grid.view(1, *self.image.shape, 2).float()
        warped = F.grid_sample(self.other[None, None], grid, align_corners=False)
        x, y = self.image[None, None], warped
        mean_x, mean_y = _mean(x), _mean(y)
        both = _mean(x * y) - mean_x * mean_y
        spread = (_mean(x * x) - mean_x**2).clamp_min(0) * (_mean(y * y) - mean_y**2).clamp_min(0)
        score = (both / (spread + 1.0).sqrt())[0, 0]
        return float(score[seen & self.inside].sum() / self.inside.sum())


def _mean(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, WINDOW, 1, WINDOW // 2, count_include_pad=False)
