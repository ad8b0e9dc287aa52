"""Your own footage: posed images of any cameras, which captures.py reads, as sequences.

Images that share a time stamp, or nearly, are a frame. Cameras are told apart by the folders of
their images, or by what file names have beside the longest number, which is the time stamp. Where
that goes wrong, rig.json beside the poses says it, which may also mount the cameras (one of them is
enough) in the volume:

    {"cameras": {"front": {"camera_to_volume": [[..], [..], [..], [..]]}, "left": {}},
     "frames": [{"front": "images/front/0001.png", "left": "images/left/0001.png"}, ..]}

Otherwise the volume follows from the rig: z is up, and the ground is where ground.py sees it. Of
data.rig=forward it is ahead of the camera, as in KITTI (x right, y forward, ground at -1.73 m), of
`surround` around the cameras, as in nuScenes (x forward, y left, ground at 0).
"""

import functools
import json
import os
import re
from pathlib import Path

import numpy as np

from selfocc import InputError, counted
from selfocc.batch import Sequence
from selfocc.config import DataConfig
from selfocc.datasets import cache, ground, reading
from selfocc.datasets.captures import Capture, Shot, find
from selfocc.datasets.lens import Lens, fitted, horizon_row
from selfocc.labels import PseudoLabels

VERSION = 1  # of the images that are kept; part of the cache key
GROUND = {"forward": -1.73, "surround": 0.0}  # metres in the volume, as the presets have it
ASSUMED_HEIGHT = 1.65  # metres of a camera over the ground, where nobody and nothing tells
PLAUSIBLE = 0.2, 5.0  # metres that it may be, where the scale is known
WRONG = 0.15  # by which share the ground is off that it is worth a word
STEADY = 3.0  # degrees that a camera fixed to a vehicle tilts, at most
AROUND = 100.0  # degrees between two cameras of a rig that looks around
BLUR = 1.5  # times an image is enlarged from which on that is worth a note


def posed_sequences(
    root: Path, split: str, chosen: str, config: DataConfig, labels: PseudoLabels | None = None
) -> list["PosedSequence"]:
    """The sequences of a split, `train` or `val`: the first four fifths or the end of each folder,
    or those `chosen` ("walk:0-99,drive", numbers of frames). Raises InputError.
    """
    captures = {capture.folder.resolve().name: capture for capture in find(root)}
    ranges = dict(reading.parse_range(p, min(captures)) for p in chosen.split(",") if chosen)
    if unknown := ranges.keys() - captures:
        raise InputError(f"{root}: no {min(unknown)}; it holds {', '.join(captures)}")
    sequences = []
    for name in ranges or captures:
        footage = Footage(captures[name], config)
        frames, there = ranges.get(name), range(len(footage.shots))
        if frames is None:
            frames = there if chosen else reading.held_out(there, split)
        reading.check_chosen(footage.folder, there, frames)
        sequences.append(PosedSequence(name, footage, list(frames), config, labels))
    return sequences


def suggested(root: Path) -> tuple[str, int]:
    """The preset for the footage in a folder, and the number of cameras. Raises InputError."""
    _, shots, _, _ = grouped(find(root)[0])
    axes = np.stack([shot.pose[:3, 2] for shot in shots[0]])
    apart = np.rad2deg(np.arccos(np.clip(axes @ axes.T, -1, 1)).max())
    return ("posed_surround" if apart > AROUND else "posed"), len(axes)


def grouped(
    capture: Capture,
) -> tuple[list[str], list[list[Shot]], dict[str, np.ndarray], list[str]]:
    """Names of the cameras, their shots [frames][N] in time, camera_to_volume [4, 4] by name where
    it is known, and notes. Raises InputError."""
    path = capture.folder / "rig.json"
    rig = {}
    try:
        rig = json.loads(reading.read_text(path)) if path.exists() else {}
        mounts = {
            name: np.array(camera["camera_to_volume"], np.float64).reshape(4, 4)
            for name, camera in rig.get("cameras", {}).items()
            if "camera_to_volume" in camera
        }
        for name, mount in mounts.items():
            reading.rigid(mount[None, :3].reshape(1, 12), path, [f"camera {name}"])
        if "frames" in rig:
            named = {os.path.relpath(shot.file, capture.folder): shot for shot in capture.shots}
            names = list(rig.get("cameras") or rig["frames"][0])
            shots = [[named[frame[name]] for name in names] for frame in rig["frames"]]
            return names, shots, mounts, []
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        what = f"{error} is not there" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path}: {what}; selfocc/datasets/posed.py says how it looks") from None
    names, shots, notes = _synchronised(capture)
    if len(names) == 1:
        names = list(rig.get("cameras", {}))[:1] or ["camera"]
    if unknown := mounts.keys() - set(names):
        raise InputError(f"{path}: no camera {min(unknown)}; they are {', '.join(names)}")
    return names, shots, mounts, notes


def _synchronised(capture: Capture) -> tuple[list[str], list[list[Shot]], list[str]]:
    cameras: dict[str, dict[float, Shot]] = {}
    twice = []
    for shot in sorted(capture.shots, key=lambda shot: _natural(shot.name)):
        camera, stamp = _stamped(shot.file)
        taken = cameras.setdefault(camera, {})
        if stamp is None:
            stamp = len(taken)
        elif stamp in taken:
            twice.append(shot.name)
        taken.setdefault(stamp, shot)
    notes = [f"time stamps twice, the first used: {len(twice)} ({twice[0]})"] if twice else []
    times = [np.array(sorted(taken)) for taken in cameras.values()]
    lead = min(times, key=len)
    gap = np.median(np.diff(lead)) / 2 if len(lead) > 1 else 0
    shots = []
    for stamp in lead:
        nearest = [t[np.abs(t - stamp).argmin()] for t in times]
        if all(abs(t - stamp) <= gap for t in nearest):
            pairs = zip(cameras.values(), nearest, strict=True)
            shots.append([taken[t.item()] for taken, t in pairs])
    if not shots:
        raise InputError(
            f"{capture.folder}: images of {', '.join(cameras)} share no time stamps; write "
            "rig.json (selfocc/datasets/posed.py says how it looks)"
        )
    if len(cameras) > 1:
        notes.append(f"{len(cameras)} cameras: {', '.join(cameras)}")
    if len(shots) < max(map(len, times)):
        most = counted(max(map(len, times)), "time stamp")
        notes.append(f"{len(shots)} of {most} have an image of every camera")
    return list(cameras), shots, notes


def _stamped(path: Path) -> tuple[str, float | None]:
    """The camera and the time stamp that the path of an image tells."""
    runs = list(re.finditer(r"\d+(\.\d+)?", path.stem))
    if not runs:
        return path.parent.name, None
    stamp = max(runs, key=lambda run: (len(run[0]), run.start()))
    rest = f"{path.stem[: stamp.start()]}*{path.stem[stamp.end() :]}".strip("*_-. ")
    number = float(stamp[0]) if "." in stamp[0] else int(stamp[0])
    return "/".join(filter(None, (path.parent.name, rest))), number


def _natural(name: str) -> list:
    """A key that sorts 2 before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


class Footage:
    """The frames of a capture in metres, z up, and the volume in each. Raises InputError."""

    def __init__(self, capture: Capture, config: DataConfig):
        self.folder, self.config = capture.folder, config
        self.names, self.shots, mounts, notes = grouped(capture)
        self.notes = [*capture.notes, *notes]
        poses = np.stack([[shot.pose for shot in frame] for frame in self.shots])
        if len(poses) < 2:
            raise InputError(f"{self.folder}: one frame alone; depth is learnt from several")
        steps = np.diff(poses[:, 0, :3, 3], axis=0)
        length = float(np.linalg.norm(steps, axis=1).sum())
        if length < 1e-9:
            raise InputError(f"{self.folder}: the cameras do not move, so that nothing shows depth")
        self.metres = config.scale_metres or 1.0
        if config.path_length:
            self.metres = config.path_length / length
        if mounts:
            name = next(n for n in self.names if n in mounts)
            lead = self.names.index(name)
            poses[..., :3, 3] *= self.metres
            self.camera_to_world = poses
            self.volume_to_world = poses[:, lead] @ np.linalg.inv(mounts[name])
            self.to_world = np.diag([self.metres, self.metres, self.metres, 1.0])
        else:
            self._place(poses, steps)
        camera_to_volume = np.linalg.inv(self.volume_to_world)[:, None] @ self.camera_to_world
        self.horizon = [self._horizon(n, camera_to_volume[:, n]) for n in range(len(self.names))]

    def _place(self, poses: np.ndarray, steps: np.ndarray) -> None:
        """Metres, up and the volume of poses in any units and axes."""
        config = self.config
        motion = steps / np.linalg.norm(steps, axis=1, keepdims=True).clip(1e-12)
        along = np.einsum("fi,fni->n", motion, poses[:-1, :, :3, 2])
        lead = int(np.abs(along).argmax())
        up = np.array(config.up) if config.up else ground.upright(poses, steps)
        up = up / np.linalg.norm(up)
        known = config.scale_metres or config.path_length or not config.camera_height
        limits = tuple(h / self.metres for h in PLAUSIBLE) if known else (0.0, np.inf)
        seen = ground.height([frame[lead] for frame in self.shots], up, limits)
        if not known and seen is None:
            raise InputError(
                f"{self.folder}: no ground is seen whose distance --camera-height could tell; give "
                "--scale METRES or --path-length METRES"
            )
        if not known:
            self.metres = config.camera_height / seen
        height = config.camera_height or (seen and seen * self.metres) or ASSUMED_HEIGHT
        below = f"the ground is seen {(seen or 0) * self.metres:.2f} m below {self.names[lead]}"
        if seen is None:
            below = f"no ground is seen; {self.names[lead]} is taken to be {height:g} m up"
        elif abs(seen * self.metres / height - 1) > WRONG:
            below += f", not {height:g} as --camera-height says: one of it and the scale is wrong"
        told = config.scale_metres or config.path_length or config.camera_height
        how = "" if told else ", as nothing tells otherwise (--scale, --camera-height)"
        axis = ", ".join(f"{x:.3f}" for x in up)
        self.notes.append(
            f"{below}; a unit of the poses is {self.metres:.4g} m{how}; up is {axis} in their axes"
        )
        right = poses[0, lead, :3, 0] - (poses[0, lead, :3, 0] @ up) * up
        right /= np.linalg.norm(right)
        self.to_world = np.eye(4)
        self.to_world[:3, :3] = self.metres * np.stack([right, np.cross(up, right), up])
        poses = self.to_world @ poses
        poses[..., :3, :3] /= self.metres
        self.camera_to_world = poses
        # what is up in the lead camera, which a vehicle holds still
        ups = poses[:, lead, 2, :3]
        mean = ups.mean(0) / np.linalg.norm(ups.mean(0))
        if np.rad2deg(np.arccos(np.clip(ups @ mean, -1, 1))).max() < STEADY:
            ups = np.broadcast_to(mean, ups.shape)
        around = config.rig == "surround"
        ahead = np.array([0, 0, -1.0 if around and along[lead] < 0 else 1.0])
        ahead = ahead - ups * (ups @ ahead)[:, None]
        ahead /= np.linalg.norm(ahead, axis=1, keepdims=True).clip(1e-9)
        right = np.cross(ahead, ups)
        mount = np.tile(np.eye(4), (len(poses), 1, 1))  # the lead camera in the volume
        mount[:, :3, :3] = np.stack([ahead, -right, ups] if around else [right, ahead, ups], 1)
        mount[:, 2, 3] = height + GROUND[config.rig]
        self.volume_to_world = poses[:, lead] @ np.linalg.inv(mount)
        if around:
            rig = np.linalg.inv(self.volume_to_world)[:, None] @ poses
            middle = np.eye(4)
            middle[:2, 3] = rig[..., :2, 3].mean((0, 1))
            self.volume_to_world = self.volume_to_world @ middle

    def _horizon(self, camera: int, camera_to_volume: np.ndarray) -> int:
        """The row of the undistorted images of a camera at which the horizon mostly is."""
        pairs = zip(self.shots, camera_to_volume, strict=True)
        rows = [horizon_row(frame[camera].lens.pinhole(), pose) for frame, pose in pairs]
        return round(float(np.clip(np.median(rows), -1e4, 1e5)))


class PosedSequence(Sequence):
    """Frames `numbers` of footage."""

    def __init__(
        self,
        name: str,
        footage: Footage,
        numbers: list[int],
        config: DataConfig,
        labels: PseudoLabels | None = None,
    ):
        self.name, self.frames, self._labels, self.config = name, len(numbers), labels, config
        self._names, self._to_world = footage.names, footage.to_world
        self._shots = [footage.shots[n] for n in numbers]
        self._horizon, self._metres = footage.horizon, footage.metres
        self._camera_to_world = footage.camera_to_world[numbers]
        self._volume_to_world = footage.volume_to_world[numbers]
        self.positions = self._camera_to_world[:, 0, :3, 3]
        self.path = reading.driven(self._camera_to_world[:, 0])
        self._intrinsics = np.stack(
            [
                [_intrinsics(s.lens, *self._fit(n)) for n, s in enumerate(shots)]
                for shots in self._shots
            ]
        )
        self.missing = [*footage.notes, *self._survey()]

    def _survey(self) -> list[str]:
        missing = []
        for name, shot in zip(self._names, self._shots[0], strict=True):
            self._check_size(shot)
            enlarged = max(n / m for n, m in zip(self.config.crop, shot.lens.size, strict=True))
            if self.config.fit == "horizon" and enlarged > BLUR:
                missing.append(f"images of {name} are enlarged {enlarged:.1f} times to data.crop")
        if all(s.depth is None and s.points is None for shots in self._shots for s in shots):
            missing.append("no depth_file_path nor points3D: depth is not scored")
        return [*missing, "no voxels: occupancy is not scored"]

    @property
    def camera_names(self) -> list[str]:
        return self._names

    def _check_size(self, shot: Shot) -> None:
        size = reading.image_size(shot.file)
        if size != shot.lens.size:
            got, want = ("x".join(map(str, size)) for size in (size, shot.lens.size))
            raise InputError(
                f"{shot.file}: {got} pixels, but its intrinsics are for {want}; scale them as the "
                "images were, or restore the images"
            )

    def frame_id(self, frame: int) -> str:
        """The name of the first camera's image."""
        return self._shots[frame][0].file.stem

    def files(self, frame: int) -> list[Path]:
        extra = (
            [] if self._labels is None else [self._labels.file(s.file) for s in self._shots[frame]]
        )
        return [f for s in self._shots[frame] for f in (s.file, s.mask, s.depth) if f] + extra

    def cameras(self, frame: int) -> tuple[np.ndarray, np.ndarray]:
        return self._intrinsics[frame].copy(), self._camera_to_world[frame].copy()

    def volume_to_world(self, frame: int) -> np.ndarray:
        return self._volume_to_world[frame]

    def _fit(self, camera: int) -> tuple[tuple[int, int] | None, int]:
        """Height and width to which images are brought, None for their own; their horizon."""
        return (self.config.crop if self.config.fit == "horizon" else None), self._horizon[camera]

    def image(self, frame: int, camera: int) -> np.ndarray:
        """Undistorted, as the network's size asks for, and black where a mask says so."""
        shot, (size, horizon) = self._shots[frame][camera], self._fit(camera)

        def make() -> np.ndarray:
            self._check_size(shot)
            image = reading.read_image(shot.file)
            if shot.mask is not None:
                shown = reading.read_image(shot.mask)
                if shown.shape != image.shape:
                    raise InputError(f"{shot.mask}: is not of the size of {shot.file}; mend it")
                image = np.where(shown > 0, image, 0).astype(np.uint8)
            image = shot.lens.undistorted(image)
            return image if size is None else fitted(image, np.eye(3), size, horizon)[0]

        if shot.lens.kind == "pinhole" and size in (None, shot.lens.size):
            return make()
        stamps = [
            (f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in (shot.file, shot.mask) if f
        ]
        name = cache.key(VERSION, str(shot.file), stamps, shot.lens, size, horizon)
        kind = np.dtype(np.uint8), (*(size or shot.lens.size), 3)
        return np.array(cache.load_or_make(cache.folder() / f"{name}.npy", make, *kind))

    def depth(self, frame: int) -> list[np.ndarray] | None:
        """What depth_file_path names; 0 for cameras without it."""
        if all(shot.depth is None for shot in self._shots[frame]):
            return None
        return [self._depth(shot, n) for n, shot in enumerate(self._shots[frame])]

    def _depth(self, shot: Shot, camera: int) -> np.ndarray:
        depth = np.zeros(shot.lens.size, np.float32)
        if shot.depth is not None:
            depth = reading.read_map(shot.depth, shot.lens.size)
        return self._nearest(depth * np.float32(shot.depth_unit * self._metres), shot, camera)

    def _nearest(self, map_: np.ndarray, shot: Shot, camera: int) -> np.ndarray:
        """A map of the image as the image is."""
        size, horizon = self._fit(camera)
        map_ = shot.lens.undistorted(map_, nearest=True)
        return map_ if size is None else fitted(map_, np.eye(3), size, horizon)[0]

    def semantics(self, frame: int) -> list[np.ndarray] | None:
        """Pseudo labels; None without --labels."""
        if self._labels is None:
            return None
        return [
            self._nearest(self._labels.read(shot.file, shot.lens.size), shot, camera)
            for camera, shot in enumerate(self._shots[frame])
        ]

    def lidar(self, frame: int) -> np.ndarray | None:
        """Points that were matched in the images of this frame."""
        points = [shot.points for shot in self._shots[frame] if shot.points is not None]
        if not points:
            return None
        matrix = np.linalg.inv(self._volume_to_world[frame]) @ self._to_world
        return (np.concatenate(points) @ matrix[:3, :3].T + matrix[:3, 3]).astype(np.float32)


@functools.lru_cache(4096)
def _intrinsics(lens: Lens, size: tuple[int, int] | None, horizon: int) -> np.ndarray:
    """[3, 3] of the images that the network gets."""
    pinhole = lens.pinhole()
    if size is None:
        return pinhole
    return fitted(np.zeros(lens.size, np.uint8), pinhole, size, horizon)[1]
