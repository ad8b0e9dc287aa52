"""Cameras of the embedded world: a single one as in KITTI, or a ring of six as in nuScenes."""

from dataclasses import dataclass

import numpy as np

from selfocc import InputError

LIDAR_HEIGHT = 1.73  # metres above ground


@dataclass(frozen=True)
class Rig:
    """Cameras fixed to the volume frame, and the voxels to label."""

    names: tuple[str, ...]  # of the cameras
    intrinsics: np.ndarray  # [N, 3, 3] pixels
    camera_to_volume: np.ndarray  # [N, 4, 4]
    volume_to_ego: np.ndarray  # [4, 4]; ego: x forward, y left, z up, on the ground
    box: tuple[float, ...]  # x0 y0 z0 x1 y1 z1, metres, volume frame
    voxel: float  # edge, metres
    ahead: float  # metres of the path ahead that lie in the box
    behind: float  # metres of the path behind from which something in the box was seen

    @property
    def grid(self) -> tuple[int, int, int]:
        """Voxels along y, x, z."""
        return tuple(round((self.box[k + 3] - self.box[k]) / self.voxel) for k in (1, 0, 2))


def make_rig(name: str, image_size: tuple[int, int], rng=None, spread: float = 0.0) -> Rig:
    """The rig "forward" or "surround" for images of (height, width). Raises InputError.

    With a random generator, "forward" is mounted and built a little differently; at `spread` 1
    focal length by up to 8 %, optical axis by 4 % of the height, pitch by 1.5 degrees, height by
    0.1 m."""
    if name == "forward":
        change = np.zeros(4) if rng is None else spread * rng.uniform(-1, 1, 4)
        return _forward(image_size, *change)
    if name == "surround":
        return _surround(image_size)
    raise InputError(f"unknown rig {name!r}; known: forward, surround")


def _forward(size, zoom, shift, nod, lift):
    # KITTI: the camera is 0.27 m ahead of the velodyne and 0.08 m below it; f = 707 pixels of 1226.
    focal, place = 0.58 * (1 + 0.08 * zoom) * size[1], (0.27, 0, -0.08 + 0.1 * lift)
    intrinsics, camera_to_velo = _camera(size, focal, 0, place)
    intrinsics[1, 2] += 0.04 * shift * size[0]
    if nod:
        cos, sin = np.cos(np.deg2rad(1.5 * nod)), np.sin(np.deg2rad(1.5 * nod))
        camera_to_velo[:3, :3] @= [[1, 0, 0], [0, cos, -sin], [0, sin, cos]]
    velo_to_volume = np.eye(4)
    velo_to_volume[:2, :2] = [[0, -1], [1, 0]]  # x forward becomes y forward
    velo_to_ego = np.eye(4)
    velo_to_ego[2, 3] = LIDAR_HEIGHT
    return Rig(
        ("front",), intrinsics[None], (velo_to_volume @ camera_to_velo)[None],
        velo_to_ego @ velo_to_volume.T,
        box=(-25.6, 0, -2, 25.6, 51.2, 4.4), voxel=0.2, ahead=51.2, behind=6,
    )  # fmt: skip


def _surround(size):
    ring = {  # yaw, field of view, x and y
        "front": (0, 70, 1.7, 0), "front right": (-55, 70, 1.55, -0.5),
        "front left": (55, 70, 1.55, 0.5), "back": (180, 110, 0.05, 0),
        "back left": (110, 70, 1.05, 0.5), "back right": (-110, 70, 1.05, -0.5),
    }  # fmt: skip
    cameras = [
        _camera(size, size[1] / 2 / np.tan(np.deg2rad(view / 2)), yaw, (x, y, 1.5))
        for yaw, view, x, y in ring.values()
    ]
    intrinsics, poses = (np.stack(matrices) for matrices in zip(*cameras, strict=True))
    box = (-40, -40, -1, 40, 40, 5.4)
    return Rig(tuple(ring), intrinsics, poses, np.eye(4), box, voxel=0.4, ahead=40, behind=40)


def _camera(size, focal, yaw, position):
    """Intrinsics [3, 3]; pose [4, 4] in a frame with x forward, y left. Yaw in degrees, left."""
    height, width = size
    intrinsics = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
    cos, sin = np.cos(np.deg2rad(yaw)), np.sin(np.deg2rad(yaw))
    looking_ahead = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # columns: camera x, y, z
    pose = np.eye(4)
    pose[:3, :3] = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ looking_ahead
    pose[:3, 3] = position
    return intrinsics, pose
