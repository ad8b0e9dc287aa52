"""What tells whether poses, calibration and images of a video belong together.

Nothing needs features or training: patches are matched along their epipolar lines, and points of a
scan are followed from one frame into the next.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfocc.batch import Frames, Sequence
from selfocc.datasets.captures import OPENGL
from selfocc.geometry import fixed_pixels, image_to_image

REACH = 8  # pixels searched to both sides of an epipolar line
RADIUS = 4  # of a patch, pixels
PATCHES = 200
NEAREST, FARTHEST, DEPTHS = 2.0, 200.0, 48  # metres of z-depth searched, evenly in inverse depth
NEAR = 0.5  # metres from a camera, before which nothing is projected
FITS = 2  # pixels: what is found as far from its line at most is where poses say
# how to read the matrices that are given -> camera_to_world in OpenCV's axes, in whatever world
CONVENTIONS = {
    "as given": lambda given: given,
    "with the cameras' y and z flipped": lambda given: given @ OPENGL,
    "inverted": np.linalg.inv,
    "inverted and then flipped": lambda given: np.linalg.inv(given) @ OPENGL,
}


class Matches(NamedTuple):
    """Where P corners of a camera's image are found in another frame."""

    corners: Tensor  # [P, 2] (u, v)
    lines: Tensor  # [P, D, 2] where they may be there, from FARTHEST on; NaN behind the camera
    places: Tensor  # [P, 2] what looks most alike near the line
    found: Tensor  # [P] bool, whether that looks alike
    offsets: Tensor  # [P] pixels from there to the line


def find_matches(sequence: Sequence, frame: int, other: int) -> list[Matches]:
    """Patches of `frame` in `other`, for every camera.

    Corners, whose place is certain in all directions, are compared at every depth and at offsets of
    -REACH..REACH pixels perpendicular to the line. If nothing fits, offsets are random, REACH / 2
    in the median; what moves by itself is a minority.
    """
    seen = _seen_twice(sequence, frame, other)
    return [_matches(_corners(here), here, *more) for here, *more in seen]


def offsets(sequence: Sequence, frame: int, other: int) -> Tensor | None:
    """Pixels [M] off their epipolar lines of what is found, of all cameras; None without any."""
    found = torch.cat([m.offsets[m.found] for m in find_matches(sequence, frame, other)])
    return found if len(found) else None


def fitting(sequence: Sequence, frame: int, other: int) -> Tensor:
    """Which patches are found on their lines as each of CONVENTIONS has them, bool [4, P]."""
    fits = []
    for here, there, *poses, k_here, k_there in _seen_twice(sequence, frame, other):
        corners, fit = _corners(here)[::2], []  # enough to tell
        for read in CONVENTIONS.values():
            found = _matches(corners, here, there, *map(read, poses), k_here, k_there)
            fit.append(found.found & (found.offsets <= FITS))
        fits.append(torch.stack(fit))
    return torch.cat(fits, 1)


def parallax(target: Frames, sources: Frames, depth: float) -> float:
    """Pixels between where a surface at `depth` metres is seen and one that is infinitely far away.

    The median over a grid of pixels of the target [N, ...], each in all sources [K, N, ...].
    """
    there = sources.intrinsics, sources.camera_to_volume
    matrix = image_to_image(target.intrinsics, target.camera_to_volume, *there)
    size = target.images.shape[-2:]
    rays = F.pad(fixed_pixels((16, 32), size).double(), (0, 1), value=1.0)
    seen = [F.pad(rays * z, (0, 1), value=w) @ matrix.mT for z, w in ((depth, 1), (1, 0))]
    near, far = (points[..., :2] / points[..., 2:3].clamp_min(1e-3) for points in seen)
    return float((near - far).norm(dim=-1).median())


def brightness_changes(sequence: Sequence, frame: int, other: int) -> np.ndarray:
    """By how many percent the mean of each camera's image [N] differs in another frame."""
    before, after = ([image.mean() for image in sequence.images(f)] for f in (frame, other))
    return 100 * np.abs(np.divide(after, np.maximum(before, 1)) - 1)


def scan_agreement(sequence: Sequence, frame: int, other: int) -> tuple[float, float] | None:
    """By how much grey values (0..255) at the scan points of `frame` differ from `other`; median.

    First where poses say that the points are in `other`, then at the same pixels. None where no
    point is seen in both.
    """
    points, differences = moved(sequence.lidar(frame), sequence.volume_to_world(frame)), []
    for here, there, pose, other_pose, k_here, k_there in _seen_twice(sequence, frame, other):
        a, b = project(points, k_here, pose), project(points, k_there, other_pose)
        places = np.stack([a, b])
        inside = ((places > 0) & (places < np.array(here.shape[::-1]) - 1)).all((0, 2))
        a, b = torch.from_numpy(places[:, inside])
        now = _sample(here, a)
        differences.append(torch.stack([now - _sample(there, b), now - _sample(there, a)]).abs())
    differences = torch.cat(differences, 1)
    return tuple(differences.median(1).values.tolist()) if differences.numel() else None


def moved(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Points [M, 3] moved by a matrix [4, 4]."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def project(points: np.ndarray, intrinsics: np.ndarray, camera_to_world: np.ndarray) -> np.ndarray:
    """Pixels [M, 2] of points [M, 3] of the world; NaN nearer than NEAR."""
    points = moved(points, np.linalg.inv(camera_to_world))
    depth = np.where(points[:, 2:] > NEAR, points[:, 2:], np.nan)
    return (points @ intrinsics.T / depth)[:, :2]


def _seen_twice(sequence, frame, other):
    """For every camera: grey images [h, w] of both frames, camera_to_world [4, 4] of both, and both
    intrinsics."""
    (k_here, here), (k_there, there) = sequence.cameras(frame), sequence.cameras(other)
    images = (
        [torch.tensor(image).float().mean(-1) for image in sequence.images(f)]
        for f in (frame, other)
    )
    return zip(*images, here, there, k_here, k_there, strict=True)


def _corners(image: Tensor) -> Tensor:
    """Pixels (u, v) [P, 2] of the strongest corners (Shi & Tomasi), one in each cell at most."""
    dy, dx = torch.gradient(image)
    window = 2 * RADIUS + 1
    products = torch.stack([dx * dx, dx * dy, dy * dy])[:, None]
    products = F.avg_pool2d(products, (window, 1), 1, (RADIUS, 0))  # columns first: less to add
    xx, xy, yy = F.avg_pool2d(products, (1, window), 1, (0, RADIUS))[:, 0]
    least = (xx + yy) / 2 - (((xx - yy) / 2) ** 2 + xy**2).sqrt()
    border = RADIUS + 1
    inner = torch.zeros_like(least)
    inner[border:-border, border:-border] = least[border:-border, border:-border]
    cell = max(8, int((image.numel() / PATCHES) ** 0.5))
    strength, place = F.max_pool2d(inner[None, None], cell, return_indices=True)
    strength, place = strength.flatten(), place.flatten()
    place = place[strength > max(1.0, float(strength.median()))]
    return torch.stack([place % image.shape[1], place // image.shape[1]], -1).double()


def _matches(corners, here, there, pose, other_pose, k_here, k_there) -> Matches:
    motion = np.linalg.inv(other_pose) @ pose
    motion, k_here, k_there = (torch.from_numpy(np.array(m)) for m in (motion, k_here, k_there))
    rays = F.pad(corners, (0, 1), value=1.0) @ torch.linalg.inv(k_here).T
    depth = 1 / torch.linspace(1 / FARTHEST, 1 / NEAREST, DEPTHS, dtype=torch.float64)
    points = (rays[:, None] * depth[:, None]) @ motion[:3, :3].T + motion[:3, 3]  # [P, D, 3]
    line = points @ k_there.T
    line = torch.where(points[..., 2:] > 0.1, line[..., :2] / line[..., 2:], torch.nan)
    tangent = line[:, 1] - line[:, 0]
    length = tangent.norm(dim=-1, keepdim=True)
    # where the camera hardly moves the line is a point, and any direction tells
    right = tangent.new_tensor([1, 0])
    tangent = torch.where(length > 1e-3, tangent / length.clamp_min(1e-9), right)
    normal = torch.stack([-tangent[:, 1], tangent[:, 0]], -1)
    offset = torch.arange(-REACH, REACH + 1, dtype=torch.float64)
    place = (line[:, :, None] + offset[:, None] * normal[:, None, None]).float()  # [P, D, O, 2]
    y, x = torch.meshgrid(*[torch.arange(-RADIUS, RADIUS + 1.0)] * 2, indexing="ij")
    patch = torch.stack([x, y], -1).flatten(0, 1)
    want = _standard(_sample(here, corners[:, None].float() + patch))
    score = torch.full(place.shape[:3], -1.0)
    limit = torch.tensor(there.shape[::-1]) - 1 - RADIUS
    inside = ((place > RADIUS) & (place < limit)).all(-1)
    for p in range(len(corners)):  # a corner at a time keeps the patches in the cache
        got = _standard(_sample(there, place[p][inside[p]][:, None] + patch))
        score[p][inside[p]] = (got * want[p]).mean(-1)
    score, deep = score.max(dim=1)  # over depth: [P, O]
    best, index = score.max(dim=1)
    # the vertex of the parabola through the best offset and its neighbours
    inner = index.clamp(1, 2 * REACH - 1)[:, None]
    before, middle, after = (score.gather(1, inner + step)[:, 0] for step in (-1, 0, 1))
    bend = (2 * middle - before - after).clamp_min(1e-6)
    vertex = offset[index] + ((after - before) / (2 * bend)).clamp(-0.5, 0.5)
    each = torch.arange(len(corners))
    places = line[each, deep[each, index]] + vertex[:, None] * normal
    return Matches(corners, line, places, best > 0.8, vertex.abs())


def _standard(patches: Tensor) -> Tensor:
    """Patches [..., K] of mean 0 and variance 1, so that brightness and contrast do not count."""
    patches = patches - patches.mean(-1, keepdim=True)
    return patches / patches.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)


def _sample(image: Tensor, pixels: Tensor) -> Tensor:
    """Grey values [...] at pixels (u, v) [..., 2] inside the image, bilinear."""
    last = torch.tensor(image.shape[::-1]) - 1
    grid = (2 * pixels / last - 1).float().view(1, 1, -1, 2)
    values = F.grid_sample(image[None, None], grid, align_corners=True, padding_mode="border")
    return values.view(pixels.shape[:-1])
