"""The embedded data set: drives through random analytic streets, with exact truth.

A scene is a function of (config, seed). What is rendered once is cached on disk by its content. In
selfocc/street, `scene.py` invents a street out of `objects.py`, `world.py` is its geometry,
`looks.py` its light and what a camera makes of it, `shading.py` its surfaces, `shadows.py` its
shadows, `sensors.py` casts the rays, `occupancy.py` labels voxels, and `rigs.py` mounts the
cameras. export.py writes scenes as files of other data sets.
"""

import os
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from selfocc import InputError
from selfocc.batch import Sequence
from selfocc.datasets import cache as disk
from selfocc.datasets import reading
from selfocc.street.looks import develop, drifted, exposure_for
from selfocc.street.occupancy import View, occupancy, seen_from
from selfocc.street.rigs import LIDAR_HEIGHT, make_rig
from selfocc.street.scene import Street, random_street
from selfocc.street.sensors import BEAMS, STEPS, look, spin, spin_rays
from selfocc.street.shading import shade
from selfocc.street.shadows import Shadows

VERSION = 7  # of the world; part of the cache key
SPLITS = ("train", "val", "test")  # seed = 3 * number of the scene + place in this list
LABEL_EVERY = 5  # frames, as in SemanticKITTI
STATION = 2.0  # metres between the places on the path from which voxels are seen


@dataclass(frozen=True)
class SyntheticConfig:
    """What the world is like. Everything is exact unless a knob says otherwise."""

    rig: str = "forward"  # forward: one KITTI-like camera; surround: a ring of six, nuScenes-like
    image_size: tuple[int, int] = (96, 320)  # height and width of every image
    frames: int = 50  # frames a scene, 0.6 to 1.6 m apart
    texture: float = 1.0  # contrast of all surface texture; 0 leaves every surface plain
    relief: float = 1.0  # 1: grades up to 5.5% and crossfall up to 3.5%; 0: a level street
    looks: float = 1.0  # spread of light, weather, scenery and cameras' pictures; 0: a plain world
    rigs: float = 1.0  # spread of focal length, pitch, height (see `make_rig`); 0: one rig for all
    movers: float = 1.0  # number of moving vehicles, cyclists and pedestrians; 0: none
    mover_speed: float = 1.0  # their speed; 1: 3 to 50 km/h at 10 frames a second
    occluders: float = 1.0  # density of parked vehicles, trees, poles, bushes, standing people
    view_dependence: float = 0.0  # strength of the reflections of sky and sun; 0: Lambertian
    exposure: float = 0.0  # every frame is brighter or darker by up to this share
    pose_noise: tuple[float, float] = (0.0, 0.0)  # std of the error of given poses: metres, degrees
    label_noise: float = 0.0  # share of the pseudo segmentation that lies in wrong patches


def synthetic_sequences(
    config: SyntheticConfig, split: str, scenes: int, seed: int = 0, cache: Path | None = None
) -> list["SyntheticSequence"]:
    """Scenes number `seed` to `seed + scenes - 1` of a split: train, val or test.

    No scene is in two splits. Frames are rendered when first asked for and kept in the folder
    `cache` (default: `cache.folder`). Raises InputError for a split that does not exist.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if config.frames < 1 or min(config.image_size) < 8 or scenes < 0:
        raise InputError(
            "the embedded world needs at least 1 frame and images of at least 8x8 pixels"
        )
    folder = cache or disk.folder()
    return [
        SyntheticSequence(config, f"synthetic-{split}-{n:03d}", 3 * n + SPLITS.index(split), folder)
        for n in range(seed, seed + scenes)
    ]


class SyntheticSequence(Sequence):
    """One drive, with exact truth.

    Whatever is rendered raises InputError if the cache folder cannot be written.
    """

    def __init__(self, config: SyntheticConfig, name: str, seed: int, cache: Path):
        self.config, self.name, self.seed, self.cache = config, name, seed, cache
        self.frames = config.frames
        self.labelled = list(range(0, config.frames, LABEL_EVERY))
        rng = self._random("rig", 0)
        self.rig = make_rig(config.rig, config.image_size, rng, config.rigs)

    def __getstate__(self):
        # Workers open the memory map and invent the street themselves.
        return {k: v for k, v in self.__dict__.items() if k not in ("street", "shadows", "_record")}

    @cached_property
    def street(self) -> Street:
        c = self.config
        return random_street(
            self.seed, c.frames, relief=c.relief, movers=c.movers, mover_speed=c.mover_speed,
            occluders=c.occluders, looks=c.looks,
        )  # fmt: skip

    @cached_property
    def shadows(self) -> Shadows:
        return Shadows(self.street)

    @cached_property
    def poses(self) -> np.ndarray:
        """[frames, 4, 4] volume to world; kept, as a street takes its time to be invented."""

        def drive():
            ego = [self.street.ego(f) for f in range(self.frames)]
            return np.stack(ego) @ self.rig.volume_to_ego

        kind = np.dtype(np.float64), (self.frames, 4, 4)
        return np.array(self._stored(("poses",), *kind, drive))

    @cached_property
    def positions(self) -> np.ndarray:
        return self._first_camera[:, :3, 3]

    @cached_property
    def path(self) -> np.ndarray:
        return reading.driven(self._first_camera)

    @cached_property
    def _first_camera(self) -> np.ndarray:
        return np.stack([self.cameras(frame)[1][0] for frame in range(self.frames)])

    def frame_id(self, frame: int) -> str:
        return f"{frame:06d}"

    @property
    def camera_names(self) -> tuple[str, ...]:
        return self.rig.names

    def true_volume_to_world(self, frame: int) -> np.ndarray:
        """[4, 4], without pose noise: where the frame was rendered."""
        if frame < self.frames:
            return self.poses[frame].copy()
        return self.street.ego(frame) @ self.rig.volume_to_ego

    def volume_to_world(self, frame: int) -> np.ndarray:
        """[4, 4], as wrong as `pose_noise` makes it."""
        pose = self.true_volume_to_world(frame)
        metres, degrees = self.config.pose_noise
        if metres or degrees:
            error = self._random("pose", frame).normal(size=(2, 3))
            pose = pose @ _small_motion(metres * error[0], np.deg2rad(degrees) * error[1])
        return pose

    def cameras(self, frame: int) -> tuple[np.ndarray, np.ndarray]:
        pose = self.volume_to_world(frame)
        return self.rig.intrinsics.copy(), pose @ self.rig.camera_to_volume

    def image(self, frame: int, camera: int) -> np.ndarray:
        return np.array(self._record["image"][frame, camera])

    def depth(self, frame: int) -> np.ndarray:
        """Exact, 0 where the sky is."""
        return np.array(self._record["depth"][frame])

    def semantics(self, frame: int) -> np.ndarray:
        """As wrong as `label_noise` makes them."""
        return np.array(self._record["label"][frame])

    def lidar(self, frame: int) -> np.ndarray:
        """One turn of a LiDAR 1.73 m above the ground."""
        lidar_to_volume, ranges = self.lidar_to_volume(), self._ranges(frame)
        hit = np.isfinite(ranges)
        points = (ranges[hit, None] * spin_rays()[hit]) @ lidar_to_volume[:3, :3].T
        return (points + lidar_to_volume[:3, 3]).astype(np.float32)

    def _ranges(self, frame: int, keep: bool = True) -> np.ndarray:
        """Of the LiDAR; what is kept is on disk."""

        def scan():
            lidar_to_world = self.true_volume_to_world(frame) @ self.lidar_to_volume()
            return spin(self.street, self.street.at(frame), lidar_to_world)

        if not keep:
            return scan()
        stored = self._stored(("lidar", frame), np.dtype(np.float32), (BEAMS * STEPS,), scan)
        return np.array(stored)

    def voxels(self, frame: int) -> np.ndarray:
        """255 is what was never seen along the path."""

        def label():
            solids, pose = self.street.at(frame), self.true_volume_to_world(frame)
            views = self._views_near(frame)
            return occupancy(solids, self.street.ground, pose, self.rig.box, self.rig.voxel, views)

        stored = self._stored(("voxels", frame), np.dtype(np.uint8), self.rig.grid, label)
        return np.array(stored)

    def signed_distance(self, frame: int, points: np.ndarray) -> np.ndarray:
        """That of the street [M], at points [M, 3] in the volume frame."""
        pose = self.true_volume_to_world(frame)
        world = np.asarray(points) @ pose[:3, :3].T + pose[:3, 3]
        return self.street.signed_distance(frame, world)

    def render(
        self,
        frame: int,
        shift: float = 0.0,
        intrinsics: np.ndarray | None = None,
        size: tuple[int, int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image uint8 [N, h, w, 3], z-depth float32 [N, h, w], labels uint8 [N, h, w]; not cached.

        shift: metres the cameras are moved to their right, for the other eye of a stereo pair;
        intrinsics [N, 3, 3] and size (h, w): of other images than the rig's."""
        config, looks = self.config, self.street.looks
        size = size or config.image_size
        intrinsics = self.rig.intrinsics if intrinsics is None else intrinsics
        gain = 1 + config.exposure * self._random("exposure", frame).uniform(-1, 1)
        gain = np.float32(gain * drifted(self.gain, looks, frame))
        poses = self.true_volume_to_world(frame) @ self.rig.camera_to_volume
        poses[:, :3, 3] += shift * poses[:, :3, 0]
        noise = self._random("noise", frame)
        rendered = []
        for light, depth, label in self._seen(frame, intrinsics, poses, size):
            rendered.append((develop(light, gain, looks, noise), depth, label))
        images, depths, labels = (np.stack(maps) for maps in zip(*rendered, strict=True))
        if config.label_noise:
            labels = _spoil(labels, config.label_noise, self._random("labels", frame))
        return images, depths, labels

    def _seen(self, frame, intrinsics, poses, size):
        """Light [h, w, 3], z-depth [h, w], labels [h, w] of each camera at the time of a frame."""
        street, config, solids = self.street, self.config, self.street.at(frame)
        sunshine = None
        if street.looks.shadows:
            sunshine = partial(self.shadows.lit, self.shadows.at(solids))
        for k, pose in zip(intrinsics, poses, strict=True):
            sight = look(street, solids, k, pose, size)
            light, label = shade(
                street, solids, sight, 1 / k[0, 0], sunshine, texture=config.texture,
                view_dependence=config.view_dependence,
            )  # fmt: skip
            depth = np.where(np.isinf(sight.t), 0, sight.t)
            yield light.reshape(*size, 3), depth.reshape(size), label.reshape(size)

    @cached_property
    def gain(self) -> float:
        """What the camera multiplies light by, from a small look at some frames."""
        if self.street.looks.brightness is None:
            return 1.0
        size = tuple(max(n // 4, 8) for n in self.config.image_size)
        shrink = np.diag([size[1], size[0], 1]) / np.array([*self.config.image_size[::-1], 1])
        metered = []
        for frame in sorted({0, self.frames // 2, self.frames - 1}):
            poses = self.true_volume_to_world(frame) @ self.rig.camera_to_volume
            seen = self._seen(frame, shrink @ self.rig.intrinsics, poses, size)
            metered += [light[depth > 0] for light, depth, _ in seen]
        return exposure_for(np.concatenate(metered), self.street.looks)

    def cached(self) -> bool:
        """Whether frames and poses are on disk."""
        return all(self._file((what,)).exists() for what in ("frames", "poses"))

    @cached_property
    def _record(self) -> np.ndarray:
        """All frames, a read-only memory map [frames] with fields depth, image and label."""
        maps = (len(self.rig.intrinsics), *self.config.image_size)
        dtype = np.dtype(
            [("depth", "<f4", maps), ("image", "u1", (*maps, 3)), ("label", "u1", maps)]
        )

        def render():
            frames = np.empty(self.frames, dtype)
            for f in range(self.frames):
                frames["image"][f], frames["depth"][f], frames["label"][f] = self.render(f)
            return frames

        return self._stored(("frames",), dtype, (self.frames,), render)

    def _stored(self, what, dtype, shape, make):
        return disk.load_or_make(self._file(what), make, dtype, shape)

    def _file(self, what) -> Path:
        return self.cache / f"{disk.key(VERSION, self.config, self.seed, what)}.npy"

    def _random(self, what, frame):
        place = ("pose", "exposure", "labels", "rig", "noise").index(what)
        return np.random.default_rng([place, self.seed, frame])

    def lidar_to_volume(self, frame: int = 0) -> np.ndarray:
        """[4, 4], a shift: the axes of the LiDAR are those of the volume, at any frame."""
        matrix = np.eye(4)
        matrix[2, 3] = LIDAR_HEIGHT - self.rig.volume_to_ego[2, 3]
        return matrix

    @lru_cache(128)  # noqa: B019 - on purpose one small store for all sequences, most recent views
    def view(self, frame: int) -> View:
        """What LiDAR and cameras see at a frame, or further along the path."""
        pose, rig = self.true_volume_to_world(frame), self.rig
        ranges = self._ranges(frame, keep=frame in self.labelled)  # the scans that are judged by
        return seen_from(
            self.street, self.street.at(frame), pose @ self.lidar_to_volume(), ranges,
            rig.intrinsics, pose @ rig.camera_to_volume, self.config.image_size,
        )  # fmt: skip

    def _views_near(self, frame):
        """Views from a frame and from stations along the path, wherever they may see into its box.

        The path goes on beyond the last frame, so late frames are known as well as early ones."""
        path, at = self.street.path, self.street.path[frame]
        stations = np.unique(np.searchsorted(path, np.arange(path[0], path[-1], STATION)))
        near = [s for s in stations if -self.rig.behind <= path[s] - at <= self.rig.ahead]
        return [self.view(s) for s in [frame, *near]]


def prerender(sequences: list[SyntheticSequence]):
    """Render what is not cached yet, on up to 16 cores."""
    todo = [sequence for sequence in sequences if not sequence.cached()]
    if not todo:
        return
    disk.check_writable(todo[0].cache)
    workers = min(os.cpu_count() or 1, 16, len(todo))
    ignore = signal.signal, (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    with ProcessPoolExecutor(workers, None, *ignore) as pool:
        for _ in tqdm(pool.map(_render, todo), "rendering", len(todo), unit="scene"):
            pass


def _render(sequence):
    sequence.image(0, 0)
    sequence.volume_to_world(0)


def _small_motion(shift, rotation):
    """[4, 4] from a shift and a rotation vector in radians, by Rodrigues' formula."""
    angle = max(np.linalg.norm(rotation), 1e-12)
    x, y, z = rotation / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    motion = np.eye(4)
    motion[:3, :3] += np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    motion[:3, 3] = shift
    return motion


def _spoil(labels, share, rng):
    """Pseudo labels as a network might give them: patches of a wrong class, edges a pixel off."""
    n, h, w = labels.shape
    coarse = (n, -(-h // 8), -(-w // 8))

    def spread(patches):
        return patches.repeat(8, 1).repeat(8, 2)[:, :h, :w]

    wrong = spread(rng.integers(1, 20, coarse))
    shifted = np.roll(labels, rng.integers(-1, 2, 2), (1, 2))
    return np.where(spread(rng.random(coarse) < share), wrong, shifted).astype(np.uint8)
