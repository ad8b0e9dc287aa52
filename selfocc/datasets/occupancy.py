"""Voxel labels in the manner of SemanticKITTI: solid matter that was seen along the path, and what nothing ever saw."""

from dataclasses import dataclass

import numpy as np

from selfocc.datasets.sensors import BEAMS, ELEVATIONS, STEPS, look, spin

UNKNOWN = 255
TOLERANCE = 0.3  # metres a point may lie behind the surface that was measured and still count as seen


@dataclass(frozen=True)
class View:
    """What the sensors saw from one place."""

    lidar_to_world: np.ndarray
    ranges: np.ndarray  # [BEAMS, STEPS] metres, inf: nothing
    cameras: list  # of (intrinsics, camera_to_world, z-depth [h, w])


def seen_from(street, solids, volume_to_world, lidar_to_world, intrinsics, camera_to_volume, size):
    shrink = 2  # half the resolution is enough for cells of 0.4 m
    small = (size[0] // shrink, size[1] // shrink)
    cameras = []
    for k, pose in zip(intrinsics, volume_to_world @ camera_to_volume, strict=True):
        k = k.copy()
        k[:2] /= shrink
        cameras.append((k, pose, look(street, solids, k, pose, small).t.reshape(small)))
    return View(lidar_to_world, spin(street, solids, lidar_to_world).t.reshape(BEAMS, STEPS), cameras)


def _cells(box, edge):
    """Centres [ny, nx, nz, 3] of the cells of a box."""
    x, y, z = (np.arange(round((box[k + 3] - box[k]) / edge)) * edge + box[k] + edge / 2 for k in range(3))
    gy, gx, gz = np.meshgrid(y, x, z, indexing="ij")
    return np.stack([gx, gy, gz], -1).astype(np.float32)


def occupancy(solids, ground, volume_to_world, box, edge, views):
    """uint8 [ny, nx, nz]: 0 free, the class of the nearest solid where matter touches the cell, 255 never seen."""
    distance, label = signed_distance_grid(solids, ground, volume_to_world, box, edge)
    occupied = distance <= edge / 2
    coarse = _visible(_cells(box, 2 * edge), volume_to_world, views)
    # A cell of the visibility grid that holds a surface is known if it or a neighbour was seen through.
    ny, nx, nz = coarse.shape
    surface = occupied.reshape(ny, 2, nx, 2, nz, 2).any((1, 3, 5))
    known = coarse | (surface & _grown(coarse))
    known = known.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    return np.where(known, np.where(occupied, label, 0), UNKNOWN).astype(np.uint8)


def signed_distance_grid(solids, ground, volume_to_world, box, edge):
    """Signed distance (clipped at 2 cells) and label of the nearest solid, at the cell centres."""
    centres = _cells(box, edge)
    rotation, origin = volume_to_world[:3, :3].astype(np.float32), volume_to_world[:3, 3].astype(np.float32)
    world = centres @ rotation.T + origin
    distance = ground.signed_distance(world).astype(np.float32)
    label = ground.label(world[..., 0], world[..., 1])
    lo, shape = np.array(box[:3]), centres.shape[:3]
    corners = (solids.corners() - volume_to_world[:3, 3]) @ volume_to_world[:3, :3]
    low = np.clip(np.floor((corners.min(1) - lo) / edge - 2.5), 0, None).astype(int)
    high = np.ceil((corners.max(1) - lo) / edge + 2.5).astype(int)
    inside = (high > low).all(1) & (low < np.array(shape)[[1, 0, 2]]).all(1) & (high > 0).all(1)
    for i in np.flatnonzero(inside):
        block = tuple(slice(a, max(b, 0)) for a, b in zip(low[i][[1, 0, 2]], high[i][[1, 0, 2]], strict=True))
        d = solids.signed_distance(world[block], i)
        nearer = d < distance[block]
        distance[block] = np.where(nearer, d, distance[block])
        label[block] = np.where(nearer, solids.label[i], label[block])
    return distance, label


def _grown(mask):
    """A mask and its six neighbours."""
    out = mask.copy()
    for axis in range(3):
        ahead = [slice(None)] * 3
        behind = [slice(None)] * 3
        ahead[axis], behind[axis] = slice(1, None), slice(None, -1)
        out[tuple(ahead)] |= mask[tuple(behind)]
        out[tuple(behind)] |= mask[tuple(ahead)]
    return out


def _visible(centres, volume_to_world, views):
    """Which points [.., 3] (volume frame) some sensor saw through or saw."""
    shape = centres.shape[:-1]
    points = (centres.reshape(-1, 3) @ volume_to_world[:3, :3].T.astype(np.float32)
              + volume_to_world[:3, 3].astype(np.float32))
    seen = np.zeros(len(points), bool)
    left = np.arange(len(points))
    for view in views:
        fresh = _seen_by_lidar(points[left], view)
        for camera in view.cameras:
            fresh |= _seen_by_camera(points[left], *camera)
        seen[left[fresh]] = True
        left = left[~fresh]
    return seen.reshape(shape)


def _seen_by_camera(points, intrinsics, camera_to_world, depth):
    local = (points - camera_to_world[:3, 3].astype(np.float32)) @ camera_to_world[:3, :3].astype(np.float32)
    z = np.maximum(local[:, 2], np.float32(0.1))
    u = np.rint(np.float32(intrinsics[0, 0]) * local[:, 0] / z + np.float32(intrinsics[0, 2]))
    v = np.rint(np.float32(intrinsics[1, 1]) * local[:, 1] / z + np.float32(intrinsics[1, 2]))
    height, width = depth.shape
    inside = np.flatnonzero((local[:, 2] > 0.1) & (u >= 0) & (u < width) & (v >= 0) & (v < height))
    seen = np.zeros(len(points), bool)
    seen[inside] = z[inside] < depth[v[inside].astype(int), u[inside].astype(int)] + TOLERANCE
    return seen


def _seen_by_lidar(points, view):
    local = (points - view.lidar_to_world[:3, 3].astype(np.float32)) @ view.lidar_to_world[:3, :3].astype(np.float32)
    plan = np.hypot(local[:, 0], local[:, 1])
    beam = np.rint((ELEVATIONS[0] - np.arctan2(local[:, 2], plan)) * ((BEAMS - 1) / (ELEVATIONS[0] - ELEVATIONS[-1])))
    step = np.floor(np.arctan2(local[:, 1], local[:, 0]) * (STEPS / (2 * np.pi))).astype(int) % STEPS
    inside = np.flatnonzero((beam >= 0) & (beam < BEAMS))
    seen = np.zeros(len(points), bool)
    reach = np.minimum(view.ranges[beam[inside].astype(int), step[inside]], 80)
    seen[inside] = np.hypot(plan[inside], local[inside, 2]) < reach + TOLERANCE
    return seen
