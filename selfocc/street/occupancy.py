"""Voxel labels after SemanticKITTI: what was seen along the path, solid or free."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from selfocc.street.sensors import BEAMS, ELEVATIONS, LIDAR_RANGE, STEPS, look
from selfocc.street.world import KERB_HEIGHT

UNKNOWN = 255
TOLERANCE = 0.3  # metres behind the surface that was measured within which a point counts as seen


@dataclass(frozen=True)
class View:
    """What the sensors saw from one place."""

    lidar_to_world: np.ndarray
    ranges: np.ndarray  # [BEAMS, STEPS] metres, inf: nothing
    cameras: list  # of (intrinsics, camera_to_world, z-depth [h, w])


def seen_from(street, solids, lidar_to_world, ranges, intrinsics, camera_to_world, size):
    """The view of a LiDAR and of cameras [N, 3, 3], [N, 4, 4], whose images are halved in size.

    ranges: what `spin` gives."""
    half = (size[0] // 2, size[1] // 2)
    shrink = np.diag([0.5, 0.5, 1.0])
    cameras = [
        (shrink @ k, pose, look(street, solids, shrink @ k, pose, half).t.reshape(half))
        for k, pose in zip(intrinsics, camera_to_world, strict=True)
    ]
    return View(lidar_to_world, ranges.reshape(BEAMS, STEPS), cameras)


@lru_cache(4)
def _centres(box, edge):
    """Centres [ny, nx, nz, 3] of the cells of a box; read only."""
    x, y, z = (
        np.arange(round((box[k + 3] - box[k]) / edge)) * edge + box[k] + edge / 2 for k in range(3)
    )
    gy, gx, gz = np.meshgrid(y, x, z, indexing="ij")
    centres = np.stack([gx, gy, gz], -1).astype(np.float32)
    centres.flags.writeable = False
    return centres


def occupancy(solids, ground, volume_to_world, box, edge, views):
    """uint8 [ny, nx, nz]: 0 free, the nearest solid's class where one touches, 255 unseen."""
    distance, label = signed_distance_grid(solids, ground, volume_to_world, box, edge)
    outside = _of_blocks(np.maximum, distance) > -TOLERANCE  # elsewhere it is dark, in something
    seen = _seen_blocks(volume_to_world, box, edge, views, outside)
    # A block that holds a surface is known if it or a neighbour was seen or seen through.
    surface = _of_blocks(np.minimum, distance) <= edge / 2
    known = _cells_of(seen | (surface & _grown(seen)))
    return np.where(known, np.where(distance <= edge / 2, label, 0), UNKNOWN).astype(np.uint8)


def seen_cells(volume_to_world, box, edge, views):
    """bool [ny, nx, nz]: which cells of a box some view saw or saw through."""
    ny, nx, nz = (round((box[k + 3] - box[k]) / (2 * edge)) for k in (1, 0, 2))
    return _cells_of(_seen_blocks(volume_to_world, box, edge, views, np.ones((ny, nx, nz), bool)))


def _seen_blocks(volume_to_world, box, edge, views, where):
    """Which blocks of 2x2x2 cells of the mask `where` [ny/2, nx/2, nz/2] were seen, by centre."""
    seen = np.zeros(where.shape, bool)
    seen[where] = _visible(_centres(box, 2 * edge)[where], volume_to_world, views)
    return seen


def _of_blocks(either, cells):
    """The largest or smallest of every 2x2x2 cells; either: np.maximum or np.minimum."""
    cells = either(cells[::2], cells[1::2])
    cells = either(cells[:, ::2], cells[:, 1::2])
    return either(cells[..., ::2], cells[..., 1::2])


def _cells_of(blocks):
    return blocks.repeat(2, 0).repeat(2, 1).repeat(2, 2)


def signed_distance_grid(solids, ground, volume_to_world, box, edge):
    """Signed distance (clipped at 2 cells) and label of the nearest solid, at the cell centres."""
    centres = _centres(box, edge)
    world = _moved(centres, volume_to_world)
    # One height a column is a first guess; only cells near the ground are worth the exact distance.
    foot = world[:, :, :1]
    guess = world[..., 2] - ground.height(foot[..., 0], foot[..., 1])
    close = np.abs(guess) < 1.5 * edge + KERB_HEIGHT + 0.02 * (box[5] - box[2])
    near = np.flatnonzero(close)
    points = np.moveaxis(world, -1, 0).reshape(3, -1).take(near, axis=1).T
    distance = guess
    np.put(distance, near, ground.signed_distance(points))
    label = np.repeat(ground.label(foot[..., 0], foot[..., 1]), world.shape[2], 2)
    np.put(label, near, ground.label(points[:, 0], points[:, 1]))
    lo, shape = np.array(box[:3]), centres.shape[:3]
    corners = (solids.corners() - volume_to_world[:3, 3]) @ volume_to_world[:3, :3]
    low = np.clip(np.floor((corners.min(1) - lo) / edge - 2.5), 0, None).astype(int)
    high = np.ceil((corners.max(1) - lo) / edge + 2.5).astype(int)
    inside = (high > low).all(1) & (low < np.array(shape)[[1, 0, 2]]).all(1) & (high > 0).all(1)
    for i in np.flatnonzero(inside):
        block = tuple(
            slice(a, max(b, 0)) for a, b in zip(low[i][[1, 0, 2]], high[i][[1, 0, 2]], strict=True)
        )
        d = solids.signed_distance(world[block], i)
        nearer = d < distance[block]
        distance[block][nearer] = d[nearer]
        label[block][nearer] = solids.label[i]
    return distance, label


def _grown(mask):
    """A mask and its six neighbours."""
    out = mask.copy()
    for axis in range(3):
        grown, along = np.moveaxis(out, axis, 0), np.moveaxis(mask, axis, 0)
        grown[1:] |= along[:-1]
        grown[:-1] |= along[1:]
    return out


def _visible(points, volume_to_world, views):
    """Which points [M, 3] (volume frame) some sensor saw or saw through."""
    points = _moved(points, volume_to_world)
    unseen = np.ones(len(points), bool)
    left = np.arange(len(points))  # those of them that no sensor has seen yet
    for view in views:
        for sees, sensor in [(_camera_sees, c) for c in view.cameras] + [(_lidar_sees, view)]:
            fresh = sees(points, sensor)
            unseen[left[fresh]] = False
            if len(fresh):
                still = np.flatnonzero(unseen[left])
                left, points = left[still], points.T.take(still, axis=1).T
    return ~unseen


def _moved(points, pose):
    """Points [.., 3] moved by a pose. Each coordinate lies in one piece, which makes them fast."""
    moved = pose[:3, :3].astype(np.float32) @ points.reshape(-1, 3).T
    moved += pose[:3, 3:].astype(np.float32)
    return np.moveaxis(moved.reshape(3, *points.shape[:-1]), 0, -1)


def _camera_sees(points, camera):
    intrinsics, camera_to_world, depth = camera
    local = _moved(points, np.linalg.inv(camera_to_world))
    z = np.maximum(local[:, 2], np.float32(0.1))
    u, v = (
        np.rint(np.float32(intrinsics[k, k]) * local[:, k] / z + np.float32(intrinsics[k, 2]))
        for k in (0, 1)
    )
    height, width = depth.shape
    inside = np.flatnonzero((local[:, 2] > 0.1) & (u >= 0) & (u < width) & (v >= 0) & (v < height))
    reach = depth[v[inside].astype(int), u[inside].astype(int)]
    return inside[z[inside] < reach + TOLERANCE]


def _lidar_sees(points, view):
    local = _moved(points, np.linalg.inv(view.lidar_to_world))
    plan = np.hypot(local[:, 0], local[:, 1])
    # angles take long: those far outside the beams are left out by their slope
    steepest, flattest = np.tan(ELEVATIONS[[-1, 0]] + [-0.01, 0.01]).astype(np.float32)
    near = np.flatnonzero((local[:, 2] > plan * steepest) & (local[:, 2] < plan * flattest))
    local, plan = local.T.take(near, axis=1).T, plan[near]
    slope = np.float32(BEAMS - 1) / np.float32(ELEVATIONS[0] - ELEVATIONS[-1])
    beam = np.rint((np.float32(ELEVATIONS[0]) - np.arctan2(local[:, 2], plan)) * slope)
    inside = np.flatnonzero((beam >= 0) & (beam < BEAMS))
    local, plan = local.T.take(inside, axis=1).T, plan[inside]
    turn = np.arctan2(local[:, 1], local[:, 0]) * np.float32(STEPS / (2 * np.pi))
    step = np.floor(turn).astype(int) % STEPS
    reach = np.minimum(view.ranges[beam[inside].astype(int), step], LIDAR_RANGE)
    return near[inside[np.hypot(plan, local[:, 2]) < reach + TOLERANCE]]
