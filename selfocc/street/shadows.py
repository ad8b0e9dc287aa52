"""Cast shadows: the street as the sun sees it, once for what stands and a frame for what moves.

The sun is a pinhole camera 1500 m away. Crowns let light through where a noise has holes.
"""

from functools import cached_property

import numpy as np

from selfocc.street.sensors import rectangles
from selfocc.street.shading import value_noise
from selfocc.street.world import FOLIAGE, rectangle_pairs

AWAY = 1500.0  # metres to the sun
TEXEL = 0.15  # metres
BEFORE, AFTER, ASIDE, UP = 20.0, 30.0, 22.0, 6.0  # metres around the path that lie in the map
PAIRS = 1 << 18  # of rays and solids at a time
LEAVES, HOLES = 0.35, 0.05  # texels per wave of the noise and its level above which light passes


class Shadows:
    """Where the sun of a street shines. Beyond the map it shines everywhere."""

    def __init__(self, street):
        self.street, sun = street, street.sun
        path, ground = street.path, street.ground
        y = np.linspace(path[0] - BEFORE, path[-1] + AFTER, 24)[:, None, None]
        x = ground.centre(y) + np.array([-ASIDE, ASIDE])[:, None]
        corners = np.broadcast_arrays(x, y, ground.height(x, y) + np.array([0, UP]))
        corners = np.stack(corners, -1).reshape(-1, 3)
        right = np.array([0, 1.0, 0]) - sun * sun[1]
        right /= np.linalg.norm(right)
        self.pose = np.eye(4)  # sun to world; z: the way light goes
        self.pose[:3, :3] = np.stack([right, np.cross(-sun, right), -sun], 1)
        self.pose[:3, 3] = corners.mean(0) + AWAY * sun
        local = (corners - self.pose[:3, 3]) @ self.pose[:3, :3]
        focal = AWAY / TEXEL
        pixel = local[:, :2] / local[:, 2:] * focal
        low = np.floor(pixel.min(0))
        width, height = (np.ceil(pixel.max(0)) - low).astype(int) + 1
        self.size = height, width
        self.intrinsics = np.array([[focal, 0, -low[0]], [0, focal, -low[1]], [0, 0, 1]])

    @cached_property
    def directions(self):
        """[h * w, 3] of the rays of the map, world, float32; depth 1 long."""
        v, u = np.indices(self.size).reshape(2, -1)
        rays = np.linalg.inv(self.intrinsics) @ np.stack([u, v, np.ones(len(u))])
        return (self.pose[:3, :3] @ rays).astype(np.float32).T

    @cached_property
    def standing(self):
        """Depth [h, w] from the sun to what stands; inf: nothing before the ground."""
        solids = self.street.at(0)
        depth = np.full(self.size, np.inf, np.float32)
        return self._add(depth, solids.only(solids.mover < 0))

    def at(self, solids):
        """The same with what moves, given the solids at the time of a frame."""
        return self._add(self.standing.copy(), solids.only(solids.mover >= 0))

    def _add(self, depth, solids):
        bounds = rectangles(solids, self.intrinsics, self.pose, self.size, far=np.inf)
        top, bottom, left, right = bounds = np.stack(bounds)
        part = np.cumsum((bottom - top) * (right - left)) // PAIRS
        for k in np.unique(part):
            some = np.flatnonzero(part == k)
            solid, ray = rectangle_pairs(*bounds[:, some], self.size[1])
            solid = some[solid]
            leaf = np.flatnonzero(solids.style[solid] == FOLIAGE)
            v, u = np.divmod(ray[leaf], np.int32(self.size[1]))
            gap = value_noise(u * np.float32(LEAVES), v * np.float32(LEAVES)) > HOLES
            kept = np.ones(len(ray), bool)
            kept[leaf[gap]] = False
            solid, ray = solid[kept], ray[kept]
            t = solids.cast(self.pose[:3, 3], self.directions, solid, ray)
            np.minimum.at(depth.ravel(), ray, t)
        return depth

    def lit(self, depth, points, facing):
        """Share [M] of the sun that reaches points [M, 3], given a map of `at`.

        facing [M]: cosine between normal and sun; what looks away is 0."""
        share = np.zeros(len(points), np.float32)
        sunny = np.flatnonzero(facing > 0)
        rotation, origin = self.pose[:3, :3].astype(np.float32), self.pose[:3, 3].astype(np.float32)
        x, y, z = ((points[sunny] - origin) @ rotation).T
        focal, (height, width) = np.float32(self.intrinsics[0, 0]), self.size
        u = focal * x / z + np.float32(self.intrinsics[0, 2])
        v = focal * y / z + np.float32(self.intrinsics[1, 2])
        inside = (u >= 0) & (u < width - 1) & (v >= 0) & (v < height - 1)
        share[sunny[~inside]] = 1
        at, u, v, z = sunny[inside], u[inside], v[inside], z[inside]
        cos = facing[at]
        # A texel covers a span of depths on a slanted surface.
        z = z - np.float32(TEXEL) * (1 + np.minimum(np.sqrt(1 - np.minimum(cos, 1) ** 2) / cos, 5))
        iu, iv = u.astype(np.int32), v.astype(np.int32)
        fu, fv = u - iu, v - iv
        i, flat = iv * np.int32(width) + iu, depth.ravel()
        upper = (flat[i] > z) * (1 - fu) + (flat[i + 1] > z) * fu
        lower = (flat[i + width] > z) * (1 - fu) + (flat[i + width + 1] > z) * fu
        share[at] = upper + fv * (lower - upper)
        return share
