"""Cameras and a spinning LiDAR in the street: their rays, and which solids may meet which rays."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from selfocc.street.world import FAR, first_hits, rectangle_pairs, turned

NEAR = 0.05
_EDGES = np.array([(i, i | 1 << k) for i in range(8) for k in range(3) if not i >> k & 1])

BEAMS, STEPS = 64, 720  # of the LiDAR: an HDL-64 with a coarse azimuth
ELEVATIONS = np.deg2rad(np.linspace(2.0, -24.8, BEAMS))
LIDAR_RANGE = 80.0  # metres
REFLECTANCE = 0.25  # of every LiDAR return; the world does not model it


@dataclass(frozen=True)
class Sight:
    """What a camera sees along rays origin + t direction."""

    origin: np.ndarray  # [3] world
    directions: np.ndarray  # [R, 3] world, float32
    t: np.ndarray  # [R] of the first hits; inf: nothing
    index: np.ndarray  # [R] the solid that was hit; -1: ground or nothing


def look(street, solids, intrinsics, camera_to_world, size):
    """A pinhole image of size (h, w), row by row; t is z-depth."""
    height, width = size
    rays = _pixel_rays(*intrinsics[[0, 1, 0, 1], [0, 1, 2, 2]], height, width)
    directions = (rays @ camera_to_world[:3, :3].T).astype(np.float32)
    origin = camera_to_world[:3, 3]
    pairs = rectangle_pairs(*rectangles(solids, intrinsics, camera_to_world, size), width)
    return Sight(origin, directions, *first_hits(street.ground, solids, origin, directions, *pairs))


@lru_cache(8)
def _pixel_rays(fx, fy, cx, cy, height, width):
    v, u = np.mgrid[:height, :width].reshape(2, -1)
    return np.stack([(u - cx) / fx, (v - cy) / fy, np.ones(height * width)], -1)


def rectangles(solids, intrinsics, camera_to_world, size, far=FAR):
    """Pixels [top:bottom, left:right] around the bounding boxes of solids; none where unseen."""
    rotation, origin = camera_to_world[:3, :3], camera_to_world[:3, 3]
    corners = (solids.corners() - origin) @ rotation
    # A box that crosses the near plane is bounded by its corners before the plane and by where its
    # edges cut it.
    a, b = corners[:, _EDGES[:, 0]], corners[:, _EDGES[:, 1]]
    za, zb = a[..., 2], b[..., 2]
    cut = (za - NEAR) * (zb - NEAR) < 0
    share = np.where(cut, (NEAR - za) / np.where(cut, zb - za, 1), 0)
    points = np.concatenate([corners, a + share[..., None] * (b - a)], 1)
    ahead = np.concatenate([corners[..., 2] >= NEAR, cut], 1)
    depth = np.maximum(points[..., 2], NEAR)
    bounds = []
    for axis, limit in ((1, size[0]), (0, size[1])):
        pixel = intrinsics[axis, axis] * points[..., axis] / depth + intrinsics[axis, 2]
        low = np.where(ahead, pixel, np.inf).min(1)
        high = np.where(ahead, pixel, -np.inf).max(1)
        seen = (low <= high) & (np.where(ahead, depth, np.inf).min(1) < far)
        low, high = np.where(seen, low, 0), np.where(seen, high, 0)
        for edge in (np.ceil(low), np.floor(high) + 1):
            bounds.append(np.where(seen, np.clip(edge, 0, limit), 0).astype(np.int64))
    return bounds


def spin(street, solids, sensor_to_world):
    """A turn of the LiDAR at the origin of a frame with z up: ranges of `spin_rays`, inf: none."""
    directions = (spin_rays() @ sensor_to_world[:3, :3].T).astype(np.float32)
    origin = sensor_to_world[:3, 3]
    pairs = rectangle_pairs(*_sectors(solids, sensor_to_world), STEPS)
    t, _ = first_hits(street.ground, solids, origin, directions, *pairs)
    return np.where(t > LIDAR_RANGE, np.float32(np.inf), t)


@lru_cache(1)
def spin_rays():
    """Unit directions [BEAMS * STEPS, 3] of the LiDAR in its own frame, the highest beam first."""
    azimuth = 2 * np.pi * (np.arange(STEPS) + 0.5) / STEPS
    up, around = (g.ravel() for g in np.meshgrid(ELEVATIONS, azimuth, indexing="ij"))
    return np.stack([np.cos(up) * np.cos(around), np.cos(up) * np.sin(around), np.sin(up)], -1)


def _sectors(solids, sensor_to_world):
    """Beams [first:last] and steps [left:right] around solids; steps may run on past the last."""
    corners = (solids.corners() - sensor_to_world[:3, 3]) @ sensor_to_world[:3, :3]
    centre = corners.mean(1)
    azimuth = np.arctan2(corners[..., 1], corners[..., 0])
    middle = np.arctan2(centre[:, 1], centre[:, 0])
    away = (azimuth - middle[:, None] + np.pi) % (2 * np.pi) - np.pi
    low, high = away.min(1), away.max(1)
    around = high - low >= np.pi
    low, high = np.where(around, -np.pi, low) + middle, np.where(around, np.pi, high) + middle
    left = np.floor(low / (2 * np.pi) * STEPS - 0.5).astype(np.int64)
    right = np.minimum(np.ceil(high / (2 * np.pi) * STEPS + 0.5).astype(np.int64), left + STEPS)

    # The nearest distance in plan, with a margin for the tilt of the sensor.
    rel = sensor_to_world[:3, 3] - solids.centre
    local = np.stack(turned(np.cos(solids.yaw), -np.sin(solids.yaw), rel[:, 0], rel[:, 1]), -1)
    gap = np.linalg.norm(np.maximum(np.abs(local) - solids.half[:, :2], 0), axis=1)
    tilt = 0.12 * (np.abs(rel[:, 2]) + solids.half[:, 2])
    nearest = np.maximum(gap - tilt, 0.01)
    farthest = np.linalg.norm(corners[..., :2], axis=-1).max(1)
    top, bottom = corners[..., 2].max(1), corners[..., 2].min(1)
    up = np.arctan2(top, np.where(top > 0, nearest, farthest))
    down = np.arctan2(bottom, np.where(bottom < 0, nearest, farthest))
    per_radian = (BEAMS - 1) / (ELEVATIONS[0] - ELEVATIONS[-1])
    first = np.floor((ELEVATIONS[0] - up) * per_radian).clip(0, BEAMS).astype(np.int64)
    last = np.ceil((ELEVATIONS[0] - down) * per_radian + 1).clip(0, BEAMS).astype(np.int64)
    first, last = (np.where(nearest < LIDAR_RANGE, beam, 0) for beam in (first, last))
    return first, last, left % STEPS, left % STEPS + right - left
