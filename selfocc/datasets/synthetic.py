"""The embedded data set: drives through random analytic streets, with exact truth.

    python -m selfocc.datasets.synthetic --export kitti DIR --scenes 2 --frames 30 --seed 0

A scene is a function of (config, seed). Frames are rendered once and cached on disk.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from selfocc import InputError
from selfocc.datasets import cache as disk
from selfocc.datasets.occupancy import occupancy, seen_from
from selfocc.datasets.sensors import look, spin
from selfocc.datasets.shading import shade
from selfocc.datasets.street import random_street

VERSION = 1  # of the world; part of the cache key
SPLITS = ("train", "val", "test")  # seed = 3 * number of the scene + place in this list


@dataclass(frozen=True)
class SyntheticConfig:
    """What the world is like. Everything is exact unless a knob says otherwise."""

    rig: str = "forward"  # forward: one KITTI-like camera; surround: a ring of six, nuScenes-like
    image_size: tuple[int, int] = (96, 320)  # height and width of every image
    frames: int = 50  # frames a scene, about 1 m apart (0.6 to 1.6 m)
    texture: float = 1.0  # contrast of all surface texture; 0 leaves every surface plain
    movers: float = 1.0  # how many moving vehicles, cyclists and pedestrians; 0 for none
    mover_speed: float = 1.0  # their speed; 1 is 2 to 50 km/h
    occluders: float = 1.0  # density of parked vehicles, trees, poles, bushes, standing people
    view_dependence: float = 0.0  # strength of reflections of sky and sun; 0 is Lambertian
    exposure: float = 0.0  # exposure of a frame varies by up to this share from the next
    pose_noise: tuple[float, float] = (0.0, 0.0)  # error of the given poses, std: metres, degrees
    label_noise: float = 0.0  # share of the pseudo segmentation that is wrong (patches, shifted edges)


@dataclass(frozen=True)
class Rig:
    """Cameras fixed to the volume frame."""

    intrinsics: np.ndarray  # [N, 3, 3]
    camera_to_volume: np.ndarray  # [N, 4, 4]
    volume_to_ego: np.ndarray  # [4, 4]; ego: x forward, y left, z up, on the ground
    box: tuple[float, ...]  # x0 y0 z0 x1 y1 z1 of the voxels, metres, volume frame
    voxel: float  # edge of a voxel, metres


# Columns: where camera x (right), y (down) and z (forward) point in a frame with x forward, y left.
_FORWARD = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])


def _camera(size, focal, yaw, position):
    """Intrinsics and pose in a frame with x forward, y left; yaw in degrees to the left."""
    height, width = size
    intrinsics = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
    c, s = np.cos(np.deg2rad(yaw)), np.sin(np.deg2rad(yaw))
    pose = np.eye(4)
    pose[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ _FORWARD
    pose[:3, 3] = position
    return intrinsics, pose


def make_rig(config):
    width = config.image_size[1]
    if config.rig == "forward":
        # Velodyne 1.73 m above ground; the camera 0.27 m ahead of it and 0.08 m below (KITTI).
        intrinsics, pose = _camera(config.image_size, 0.58 * width, 0, (0.27, 0, -0.08))
        turn = np.eye(4)
        turn[:2, :2] = [[0, -1], [1, 0]]  # velodyne (x forward) to volume (y forward)
        up = np.eye(4)
        up[2, 3] = 1.73
        return Rig(intrinsics[None], (turn @ pose)[None], up @ turn.T, (-25.6, 0, -2, 25.6, 51.2, 4.4), 0.2)
    if config.rig == "surround":
        ring = ((0, 70, 1.7, 0), (-55, 70, 1.55, -0.5), (55, 70, 1.55, 0.5),
                (180, 110, 0.05, 0), (110, 70, 1.05, 0.5), (-110, 70, 1.05, -0.5))
        cameras = [_camera(config.image_size, width / 2 / np.tan(np.deg2rad(view / 2)), yaw, (x, y, 1.5))
                   for yaw, view, x, y in ring]
        intrinsics, poses = (np.stack(m) for m in zip(*cameras, strict=True))
        return Rig(intrinsics, poses, np.eye(4), (-40, -40, -1, 40, 40, 5.4), 0.4)
    raise InputError(f"unknown rig {config.rig!r}; known: forward, surround")


def default_cache():
    return Path(os.environ.get("SELFOCC_CACHE") or Path.home() / ".cache" / "selfocc")


def synthetic_sequences(config, split, scenes, seed=0, cache=None):
    """The first `scenes` scenes of a split ("train", "val", "test"), from scene `seed` on; no seed is in two splits.

    Frames are rendered when first asked for and kept in the folder `cache` ($SELFOCC_CACHE, ~/.cache/selfocc).
    Raises InputError for a split or config that does not exist."""
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    cache = default_cache() if cache is None else Path(cache)
    numbers = range(seed, seed + scenes)
    return [SyntheticSequence(config, f"synthetic-{split}-{n:03d}", 3 * n + SPLITS.index(split), cache) for n in numbers]


class SyntheticSequence:
    """One drive; see `datasets.video.Sequence` for the protocol. Voxels every fifth frame, as in SemanticKITTI."""

    missing = ()

    def __init__(self, config, name, seed, cache):
        self.config, self.name, self.seed, self.cache = config, name, seed, cache
        self.frames = config.frames
        self.labelled = list(range(0, config.frames, 5))
        self.rig = make_rig(config)
        given = np.stack([self.cameras(f)[1][0] for f in range(self.frames)])
        self.positions = given[:, :3, 3]
        # As KITTI counts it: in the plane of x and z of the first camera.
        steps = np.diff(self.positions, axis=0) @ given[0, :3, [0, 2]].T
        self.path = np.concatenate([[0.0], np.cumsum(np.linalg.norm(steps, axis=1))])
        self._seen = {}

    def __getstate__(self):
        kept = dict(self.__dict__, _seen={})
        for name in ("street", "record"):
            kept.pop(name, None)
        return kept

    @cached_property
    def street(self):
        c = self.config
        return random_street(self.seed, c.frames, movers=c.movers, mover_speed=c.mover_speed, occluders=c.occluders)

    def frame_id(self, frame):
        return f"{frame:06d}"

    def true_volume_to_world(self, frame):
        return self.street.ego(frame) @ self.rig.volume_to_ego

    def volume_to_world(self, frame):
        """[4, 4] float64, with the pose noise of the config."""
        pose = self.true_volume_to_world(frame)
        metres, degrees = self.config.pose_noise
        if metres or degrees:
            draw = np.random.default_rng([1, self.seed, frame]).normal(size=6)
            pose = pose @ _small_motion(metres * draw[:3], np.deg2rad(degrees) * draw[3:])
        return pose

    def cameras(self, frame):
        """intrinsics [N, 3, 3], camera_to_world [N, 4, 4], float64."""
        return self.rig.intrinsics.copy(), self.volume_to_world(frame) @ self.rig.camera_to_volume

    def images(self, frame):
        """uint8 [N, h, w, 3] RGB."""
        return np.array(self.record["image"][frame])

    def depth(self, frame):
        """float32 [N, h, w] exact z-depth, 0 where the sky is."""
        return np.array(self.record["depth"][frame])

    def semantics(self, frame):
        """uint8 [N, h, w] labels, as wrong as `label_noise` makes them."""
        return np.array(self.record["label"][frame])

    def stereo_pair(self, frame):
        """None: depth is exact, there is nothing to match."""

    def lidar(self, frame):
        """float32 [M, 3]: one turn of the LiDAR, in the volume frame, seen from 1.73 m above the ground."""
        sensor = self._lidar_to_world(frame)
        sight = spin(self.street, self.street.at(frame), sensor)
        hit = np.isfinite(sight.t)
        world_to_volume = np.linalg.inv(self.true_volume_to_world(frame))
        return (sight.points()[hit] @ world_to_volume[:3, :3].T + world_to_volume[:3, 3]).astype(np.float32)

    def _lidar_to_world(self, frame):
        up = np.eye(4)
        up[2, 3] = 1.73 - self.rig.volume_to_ego[2, 3]
        return self.true_volume_to_world(frame) @ up

    def voxels(self, frame):
        """uint8 [ny, nx, nz]: 0 free, 1.. class, 255 never seen along the path (SemanticKITTI protocol)."""
        def compute():
            return occupancy(self.street.at(frame), self.street.ground, self.true_volume_to_world(frame),
                             self.rig.box, self.rig.voxel, self._views(frame))

        cells = tuple(round((self.rig.box[k + 3] - self.rig.box[k]) / self.rig.voxel) for k in (1, 0, 2))
        key = disk.key(VERSION, self.config, self.seed, "voxels", frame)
        return np.array(disk.load_or_make(self.cache / f"{key}.npy", np.dtype(np.uint8), cells, compute))

    def signed_distance(self, frame, points):
        """Exact signed distance [M], metres, of points [M, 3] in the volume frame at the time of a frame."""
        pose = self.true_volume_to_world(frame)
        world = np.asarray(points) @ pose[:3, :3].T + pose[:3, 3]
        solids = self.street.at(frame)
        distance = self.street.ground.signed_distance(world)
        for i in range(len(solids)):
            distance = np.minimum(distance, solids.signed_distance(world, i))
        return distance

    def flow(self, frame, other):
        """float32 [N, h, w, 2]: where each pixel of `frame` lies in `other`, minus where it is (pixels; u right, v down).

        Moving objects move; the sky is at infinity. NaN where the point is behind the camera of `other`."""
        now, then = self.street.at(frame), self.street.at(other)
        height, width = self.config.image_size
        flows = []
        for n in range(len(self.rig.intrinsics)):
            here, there = (self.true_volume_to_world(f) @ self.rig.camera_to_volume[n] for f in (frame, other))
            sight = look(self.street, now, self.rig.intrinsics[n], here, self.config.image_size)
            sky = np.isinf(sight.t)
            points = np.where(sky[:, None], sight.directions, np.where(sky[:, None], 0, sight.origin + np.where(
                sky, 0, sight.t)[:, None].astype(np.float64) * sight.directions))
            moving = np.flatnonzero((sight.index >= 0) & (now.mover[sight.index] >= 0))
            points[moving] = _carry(now, then, sight.index[moving], points[moving])
            camera = (points - np.where(sky[:, None], 0, there[:3, 3])) @ there[:3, :3]
            with np.errstate(divide="ignore", invalid="ignore"):
                pixel = (camera @ self.rig.intrinsics[n].T)[:, :2] / np.where(camera[:, 2:] > 0, camera[:, 2:], np.nan)
            v, u = np.mgrid[:height, :width].reshape(2, -1)
            flows.append((pixel - np.stack([u, v], -1)).reshape(height, width, 2))
        return np.stack(flows).astype(np.float32)

    @cached_property
    def record(self):
        """All rendered frames of the scene, a read-only memory map with fields image, depth and label."""
        n, (h, w) = len(self.rig.intrinsics), self.config.image_size
        kind = np.dtype([("depth", "<f4", (n, h, w)), ("image", "u1", (n, h, w, 3)), ("label", "u1", (n, h, w))])
        return disk.load_or_make(self.cache_file, kind, (self.frames,), lambda: self.render_all(kind))

    @property
    def cache_file(self):
        return self.cache / f"{disk.key(VERSION, self.config, self.seed)}.npy"

    def render_all(self, kind):
        frames = np.empty(self.frames, kind)
        for f in range(self.frames):
            frames["image"][f], frames["depth"][f], frames["label"][f] = self.render(f)
        return frames

    def render(self, frame):
        """Image uint8 [N, h, w, 3], depth float32 [N, h, w] and labels uint8 [N, h, w] of one frame."""
        config = self.config
        solids, size = self.street.at(frame), config.image_size
        pose = self.true_volume_to_world(frame)
        gain = 1 + config.exposure * np.random.default_rng([2, self.seed, frame]).uniform(-1, 1)
        images, depths, labels = [], [], []
        for intrinsics, camera in zip(self.rig.intrinsics, pose @ self.rig.camera_to_volume, strict=True):
            sight = look(self.street, solids, intrinsics, camera, size)
            colour, label = shade(self.street, solids, sight.origin, sight.directions, sight.t, sight.index, 1 / intrinsics[0, 0],
                                  texture=config.texture, view_dependence=config.view_dependence)
            images.append((np.clip(colour * gain, 0, 1) * 255 + 0.5).astype(np.uint8).reshape(*size, 3))
            depths.append(np.where(np.isinf(sight.t), 0, sight.t).reshape(size))
            labels.append(label.reshape(size))
        labels = np.stack(labels)
        if config.label_noise:
            labels = _spoil(labels, config.label_noise, np.random.default_rng([3, self.seed, frame]))
        return np.stack(images), np.stack(depths), labels

    def _views(self, frame):
        """What cameras and LiDAR see along the path from a few frames before on, about every 2 m: for `occupancy`."""
        path, reach = self.street.path, self.rig.box[4] if self.config.rig == "forward" else 40.0
        behind = 6.0 if self.config.rig == "forward" else reach
        stations = [0]
        for f in range(1, len(path)):
            if path[f] - path[stations[-1]] >= 2.0:
                stations.append(f)
        near = [f for f in stations if -behind <= path[f] - path[frame] <= reach + 5] + [frame]
        for f in near:
            if f not in self._seen:
                self._seen[f] = seen_from(self.street, self.street.at(f), self.true_volume_to_world(f), self._lidar_to_world(f),
                                          self.rig.intrinsics, self.rig.camera_to_volume, self.config.image_size)
        return [self._seen[f] for f in near]


def prerender(sequences, workers=2, progress=True):
    """Render the scenes that are not cached yet with `workers` processes."""
    todo = [s for s in sequences if not s.cache_file.exists()]
    bar = tqdm(total=len(todo), desc="rendering", unit="scene", disable=not progress or not todo)
    with bar:
        if workers > 1 and len(todo) > 1:
            with ProcessPoolExecutor(workers) as pool:
                for _ in pool.map(_render, todo):
                    bar.update()
        else:
            for sequence in todo:
                _render(sequence)
                bar.update()


def _render(sequence):
    _ = sequence.record  # renders and stores it


def _small_motion(shift, rotation):
    """[4, 4] rotation vector (radians) and shift, by Rodrigues' formula."""
    angle = max(np.linalg.norm(rotation), 1e-12)
    x, y, z = rotation / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    motion = np.eye(4)
    motion[:3, :3] += np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    motion[:3, 3] = shift
    return motion


def _carry(now, then, index, points):
    """Points on moving solids at the place their solids have `then`."""
    turn = (then.yaw - now.yaw)[index]
    cos, sin = np.cos(turn), np.sin(turn)
    x, y, z = (points - now.centre[index]).T
    return then.centre[index] + np.stack([cos * x - sin * y, sin * x + cos * y, z], -1)


def _spoil(labels, share, rng):
    """Pseudo labels as a network gives them: patches of a wrong class, and edges off by a pixel or two."""
    n, h, w = labels.shape
    shift = rng.integers(-2, 3, 2)
    coarse = rng.random((n, -(-h // 8), -(-w // 8)))
    patch = np.kron(coarse, np.ones((1, 8, 8)))[:, :h, :w] < share
    wrong = np.kron(rng.integers(1, 20, coarse.shape), np.ones((1, 8, 8), int))[:, :h, :w]
    edges = np.roll(labels, shift, (1, 2)) if rng.random() < share * 5 else labels
    return np.where(patch, wrong, edges).astype(np.uint8)
