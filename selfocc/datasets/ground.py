"""Where the ground is under a camera that moves, in the units of its poses, from its images alone.

Structure from motion knows neither metres nor what is up. The ground is a plane below the path:
what one image shows of it must look the same in the next ones, seen through that plane (its
homography). Heights are swept first, then height and tilt are refined together.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfocc.datasets import cache, reading
from selfocc.datasets.captures import Shot
from selfocc.datasets.pixels import resized, scaled

VERSION = 1  # part of the cache key
WIDTH = 480  # pixels of the images that are compared
ANCHORS = 16  # images, spread over the footage
NEIGHBOURS = 1, 2, 4, 8  # frames on
# what is looked at: metres down and aside of a metre ahead
DOWN, ASIDE = (0.12, 0.6), 0.35
HEIGHTS = 96  # that are tried, from LOWEST to HIGHEST times the median step between frames
LOWEST, HIGHEST = 0.1, 100.0
WINDOW = 7  # pixels, each way, that are correlated
# mean correlation that ground has at least, and how much better it is than a plane far below
AGREES, BETTER = 0.5, 0.05


class Ground(NamedTuple):
    up: np.ndarray  # [3] in the axes of the poses
    height: float  # of the camera, in their units
    agreement: float  # mean correlation of images through the plane


def upright(poses: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """What is up [3] for cameras [F, N, 4, 4] that are held upright and mostly move on the level.

    steps [F - 1, 3]: where they move is not up; of other directions the cameras tell.
    """
    held = -poses[..., :3, 1].mean((0, 1))
    spread = steps.T @ steps / max((steps**2).sum(), 1e-12)
    up = np.linalg.solve(spread + 0.01 * np.eye(3), held)
    return up / np.linalg.norm(up)


def find(folder: Path, shots: list[Shot], up: np.ndarray, free: bool) -> Ground | None:
    """The ground under the camera of these shots, None where none is seen; kept in the cache.

    up: a guess, which is refined where it is `free`. Raises InputError for images that cannot be
    read.
    """
    stamps = [(s.name, s.lens, s.pose.tobytes(), s.file.stat().st_mtime_ns) for s in shots]
    name = cache.key(VERSION, str(folder), stamps, up.round(9).tolist(), free)

    def make() -> np.ndarray:
        return np.array(_find(shots, up, free) or np.full(5, np.nan))

    found = cache.load_or_make(cache.folder() / f"{name}.npy", make, np.dtype(np.float64), (5,))
    *up, height, agreement = found.tolist()
    return None if math.isnan(height) else Ground(np.array(up), height, agreement)


def _find(shots: list[Shot], up: np.ndarray, free: bool) -> list[float] | None:
    poses = np.stack([shot.pose for shot in shots])
    step = float(np.median(np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1)))
    pairs = _pairs(poses, step)
    if not pairs:
        return None
    seen = {k: _read(shots[k]) for k in sorted({k for pair in pairs for k in pair})}
    views = [_View(seen, poses, up, *pair) for pair in pairs]
    views = [view for view in views if view.usable]
    if not views:
        return None
    heights = step * np.geomspace(LOWEST, HIGHEST, HEIGHTS)
    tilt = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        scores = torch.stack([_score(views, math.log(h), tilt) for h in heights])
    best = int(scores.argmax())
    height = torch.tensor(math.log(heights[best]), dtype=torch.float64, requires_grad=True)
    tilt.requires_grad_(free)
    variables = [height, tilt] if free else [height]
    optimiser = torch.optim.LBFGS(variables, max_iter=25, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = -_score(views, height, tilt) + 0.5 * tilt.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    with torch.no_grad():
        agreement = float(_score(views, height, tilt))
    if agreement < AGREES or agreement < float(scores[-1]) + BETTER:
        return None
    turned = np.stack([view.up_in_world(tilt.detach()) for view in views]).mean(0)
    return [*(turned / np.linalg.norm(turned)), math.exp(float(height.detach())), agreement]


def _pairs(poses: np.ndarray, step: float) -> list[tuple[int, int]]:
    """Images and later ones that the camera has moved to, and not turned much."""
    pairs = []
    for k in np.unique(np.linspace(0, len(poses) - 2, ANCHORS).round().astype(int)):
        for n in NEIGHBOURS:
            if k + n < len(poses):
                away = np.linalg.norm(poses[k + n, :3, 3] - poses[k, :3, 3])
                alike = poses[k, :3, 2] @ poses[k + n, :3, 2]
                if away > 0.5 * step and alike > 0.95:
                    pairs.append((int(k), int(k + n)))
    return pairs


def _read(shot: Shot) -> tuple[Tensor, np.ndarray]:
    """A grey image [h, w] without distortion, and its intrinsics."""
    image = shot.lens.undistorted(reading.read_image(shot.file))
    ratio = min(1.0, WIDTH / image.shape[1])
    size = [round(n * ratio) for n in image.shape[:2]]
    intrinsics = scaled(shot.lens.pinhole()[None], np.divide(size, image.shape[:2])[::-1])[0]
    return torch.from_numpy(resized(image, size)).float().mean(-1), intrinsics


class _View:
    """The part of an image that looks down ahead, and another image."""

    def __init__(self, seen: dict, poses: np.ndarray, up: np.ndarray, here: int, there: int):
        (image, k), (self.other, other_k) = seen[here], seen[there]
        self.turn = poses[here, :3, :3]
        self.down = -self.turn.T @ up
        ahead = np.array([0, 0, 1.0]) - self.down[2] * self.down
        ahead /= max(np.linalg.norm(ahead), 1e-9)
        aside = np.cross(self.down, ahead)
        v, u = np.mgrid[: image.shape[0], : image.shape[1]]
        rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(k).T
        far = (rays @ ahead).clip(1e-6)
        down, across = rays @ self.down / far, rays @ aside / far
        inside = (down > DOWN[0]) & (down < DOWN[1]) & (np.abs(across) < ASIDE)
        rows, cols = inside.any(1).nonzero()[0], inside.any(0).nonzero()[0]
        self.usable = len(rows) > 2 * WINDOW and len(cols) > 2 * WINDOW
        if not self.usable:
            return
        cut = slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1)
        motion = np.linalg.inv(poses[there]) @ poses[here]
        self.image, self.inside = image[cut], torch.from_numpy(inside[cut])
        self.rays = torch.from_numpy(rays[cut].reshape(-1, 3))
        self.axes = torch.from_numpy(np.stack([self.down, ahead, aside]))
        # to homogeneous pixels of the other image
        self.matrix = torch.from_numpy(other_k @ motion[:3, :3])
        self.shift = torch.from_numpy(other_k @ motion[:3, 3])

    def normal(self, tilt: Tensor) -> Tensor:
        """What is down [3] in the camera, tilted ahead and aside by these radians."""
        down, ahead, aside = self.axes
        down = down + tilt[0] * ahead + tilt[1] * aside
        return down / down.norm()

    def up_in_world(self, tilt: Tensor) -> np.ndarray:
        return -self.turn @ self.normal(tilt).numpy()

    def correlation(self, height: Tensor | float, tilt: Tensor) -> Tensor:
        """Of the two images, through the plane so far below, for each pixel; 0 outside."""
        reach = self.rays @ self.normal(tilt) / height  # 1 / z-depth
        place = self.rays @ self.matrix.T + reach[:, None] * self.shift
        size = torch.tensor(self.other.shape[::-1])
        grid = 2 * (place[:, :2] / place[:, 2:].clamp_min(1e-3) + 0.5) / size - 1
        seen = ((grid.abs() < 1).all(-1) & (place[:, 2] > 1e-3) & (reach > 0)).view_as(self.image)
        grid = grid.view(1, *self.image.shape, 2).float()
        warped = F.grid_sample(self.other[None, None], grid, align_corners=False)
        x, y = self.image[None, None], warped
        mean_x, mean_y = _mean(x), _mean(y)
        both = _mean(x * y) - mean_x * mean_y
        spread = (_mean(x * x) - mean_x**2).clamp_min(0) * (_mean(y * y) - mean_y**2).clamp_min(0)
        score = (both / (spread + 1.0).sqrt())[0, 0]
        return torch.where(seen & self.inside, score, 0.0)


def _mean(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, WINDOW, 1, WINDOW // 2, count_include_pad=False)


def _score(views: list[_View], log_height: Tensor | float, tilt: Tensor) -> Tensor:
    height = log_height.exp() if isinstance(log_height, Tensor) else math.exp(log_height)
    scores = [view.correlation(height, tilt).sum() / view.inside.sum() for view in views]
    return torch.stack(scores).mean()
