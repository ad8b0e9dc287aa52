"""nuScenes with voxels (Caesar et al. 2020, Tian et al. 2023, Wang et al. 2023) as sequences.

    VERSION/*.json                      the official tables
    samples, sweeps/CHANNEL/...         six cameras at 12 Hz, LIDAR_TOP of key frames (2 Hz)
    gts, nuScenes-Occupancy             voxels of Occ3D and of OpenOccupancy (nuscenes_voxels.py)

World: nuScenes' global frame. Every sensor is placed by its own ego pose (spec section 1). Volume:
the ego frame (x forward, y left, z up) at the time of LIDAR_TOP, or the LiDAR's own (x right, y
forward). Frames are key frames and, between them, sweeps: those of the camera that has the fewest
there, with the nearest in time of every other camera (spec 1.1). Only key frames are inputs.
"""

import re
from pathlib import Path

import numpy as np

from selfocc import InputError
from selfocc.datasets import kitti_files
from selfocc.datasets.nuscenes_tables import CHANNELS, LIDAR, open_index, rigid, table
from selfocc.datasets.nuscenes_voxels import VOXELS
from selfocc.labels import PseudoLabels

CAMERAS = CHANNELS[:LIDAR]
# where LIDAR_TOP sits, for scenes that have no scan: x right, y forward, above the rear axle
NOMINAL_LIDAR_TO_EGO = np.array(
    [[0, 1, 0, 0.94], [-1, 0, 0, 0], [0, 0, 1, 1.84], [0, 0, 0, 1]], np.float64
)
# The official validation scenes; all others of the 850 of v1.0-trainval are for training.
VAL_RANGES = (
    "3 12-18 35-36 38-39 92-110 221 268-278 329-332 344-346 519-524 552-565 625-627 629-630 "
    "632-638 770-771 775 777-778 780-784 794-800 802 904-917 919-931 962-963 966-969 971-972 "
    "1059-1073"
)
MINI_VAL = frozenset(("scene-0103", "scene-0916"))


def official_val(version: str) -> frozenset[str]:
    """Names of the validation scenes of v1.0-mini (2), or of any other version (150)."""
    if version == "v1.0-mini":
        return MINI_VAL
    ends = [[int(n) for n in part.split("-")] for part in VAL_RANGES.split()]
    return frozenset(f"scene-{n:04d}" for e in ends for n in range(e[0], e[-1] + 1))


def nuscenes_sequences(
    root: Path,
    version: str,
    split: str,
    chosen: str = "",
    volume_frame: str = "ego",
    labels: PseudoLabels | None = None,
    voxels: str = "occ3d",
) -> list["NuScenesSequence"]:
    """The scenes of split `train` or `val`, or those `chosen`: "scene-0061,scene-0103:0-1", where
    numbers are key frames. Scenes that lack images of key frames are left out, which a line of the
    first one's `missing` tells. Raises InputError.
    """
    if volume_frame not in ("ego", "lidar"):
        raise InputError(f"data.volume_frame is {volume_frame!r}; it may be ego or lidar")
    if voxels not in VOXELS:
        raise InputError(f"data.voxels is {voxels!r}; it may be {' or '.join(VOXELS)}")
    folder = root / version
    index = open_index(folder)
    scenes = table(folder, "scene", "token", "name")
    names = [name for _, name in scenes]
    if chosen:
        ranges = dict(_parse(part) for part in chosen.split(","))
        unknown = set(ranges) - set(names)
        if unknown:
            raise InputError(f"{folder}: no {min(unknown)}; it has {names[0]} to {names[-1]}")
    else:
        val = official_val(version)
        ranges = {name: None for name in names if (name in val) == (split == "val")}
    samples = np.array([token for (token,) in table(folder, "sample", "token")])
    mounts = _Mounts(folder)
    bounds = np.searchsorted(index["scene"], np.arange(len(names) + 1))
    present = _Present(root)
    sequences, skipped = [], []
    for place, (token, name) in enumerate(scenes):
        if name not in ranges:
            continue
        rows = np.array(index[bounds[place] : bounds[place + 1]])
        there = np.array([present(file.decode()) for file in rows["file"]], bool)
        if not (there | ~rows["key"] | (rows["channel"] == LIDAR)).all() or not rows["key"].any():
            skipped.append(name)
            continue
        sequences.append(
            NuScenesSequence(
                root,
                name,
                token,
                rows[there],
                samples,
                mounts,
                ranges[name],
                volume_frame,
                labels,
                voxels,
            )
        )
    if not sequences:
        what = f"images of {skipped[0]} are missing" if skipped else f"none is of split {split}"
        raise InputError(f"{folder}: no scene can be used: {what}; look at --data and --version")
    if skipped:
        sequences[0].missing.insert(
            0, f"{len(skipped)} scenes skipped ({skipped[0]}, ..): images of key frames are missing"
        )
    return sequences


def _parse(text: str) -> tuple[str, range | None]:
    match = re.fullmatch(r"\s*([\w-]+?)(?::(\d+)-(\d+))?\s*", text)
    if not match:
        raise InputError(f"cannot read {text!r}: expected scene-0061, or key frames scene-0061:0-9")
    name, first, last = match.groups()
    return name, None if first is None else range(int(first), int(last) + 1)


class _Mounts:
    """Where sensors are on the vehicle: to_ego [M, 4, 4], intrinsics [M, 3, 3] (zero for LiDAR)."""

    def __init__(self, folder: Path):
        rows = table(
            folder, "calibrated_sensor", "token", "rotation", "translation", "camera_intrinsic"
        )
        path = folder / "calibrated_sensor.json"
        self.intrinsics = np.zeros((len(rows), 3, 3))
        try:
            self.to_ego = rigid([row[1] for row in rows], [row[2] for row in rows])
            for place, row in enumerate(rows):
                if row[3]:
                    self.intrinsics[place] = row[3]
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}: {error}; copy the table again") from None
        if not (np.isfinite(self.to_ego).all() and np.isfinite(self.intrinsics).all()):
            raise InputError(f"{path}: not all numbers are finite; copy the table again")


class _Present:
    """Whether a file is on disk, by listing every folder once."""

    def __init__(self, root: Path):
        self.root, self.folders = root, {}

    def __call__(self, file: str) -> bool:
        folder, _, name = file.rpartition("/")
        if folder not in self.folders:
            path = self.root / folder
            self.folders[folder] = {p.name for p in path.iterdir()} if path.is_dir() else set()
        return name in self.folders[folder]


def _synchronised(rows: np.ndarray) -> np.ndarray:
    """Rows of the six cameras in every frame [frames, 6], in time.

    rows: those of a scene. Sweeps between two key frames follow the camera with the fewest.
    """
    cameras = [np.flatnonzero(rows["channel"] == c) for c in range(len(CAMERAS))]
    keys = [c[rows["key"][c]] for c in cameras]
    common = set.intersection(*(set(rows["sample"][k].tolist()) for k in keys))
    keys = [k[np.isin(rows["sample"][k], list(common))] for k in keys]
    frames = []
    for j in range(len(keys[0])):
        frames.append([k[j] for k in keys])
        if j + 1 < len(keys[0]):
            between = [c[(c > k[j]) & (c < k[j + 1])] for c, k in zip(cameras, keys, strict=True)]
            lead = rows["time"][min(between, key=len)]
            nearest = [
                b[np.abs(rows["time"][b] - lead[:, None]).argmin(1)] if len(lead) else lead
                for b in between
            ]
            frames.extend(np.stack(nearest, 1))
    return np.array(frames).reshape(-1, len(CAMERAS))


class NuScenesSequence:
    """One scene; the protocol of `datasets.video`. Raises InputError on what is malformed."""

    camera_names = CAMERAS

    def __init__(
        self, root, name, token, rows, samples, mounts, keys, volume_frame, labels, voxels
    ):
        self.root, self.name, self._labels = root, name, labels
        self.missing: list[str] = []
        views = _synchronised(rows)
        if not len(views):
            raise InputError(f"{name}: sample_data.json has no key frame of all six cameras")
        number = np.cumsum(rows["key"][views[:, 0]]) - 1  # key frame at or before each frame
        if keys is not None:
            if not keys or keys[-1] > number[-1]:
                raise InputError(f"{name}: key frames are 0 to {number[-1]}; choose among them")
            first, last = (np.flatnonzero(number == k)[0] for k in (keys[0], keys[-1]))
            views = views[first : last + 1]
        self._views = rows[views]  # [frames, 6]
        self.frames = len(views)
        is_key = self._views["key"][:, 0]
        self.inputs = np.flatnonzero(is_key).tolist()
        self.tokens = samples[self._views["sample"][:, 0]]
        ego = rigid(self._views["rotation"], self._views["translation"])
        self._camera_to_world = ego @ mounts.to_ego[self._views["mount"]]
        self._intrinsics = mounts.intrinsics[self._views["mount"]]
        if not self._intrinsics[..., 0, 0].all():
            raise InputError(f"{name}: a camera has no camera_intrinsic in calibrated_sensor.json")
        self.positions = ego[:, 0, :3, 3]
        steps = np.linalg.norm(np.diff(self.positions, axis=0), axis=1)
        self.path = np.concatenate([[0.0], np.cumsum(steps)])

        self._ego_to_world = ego[:, 0]  # at the time of CAM_FRONT where there is no scan
        self._lidar_to_ego = np.broadcast_to(NOMINAL_LIDAR_TO_EGO, ego[:, 0].shape).copy()
        scans = {int(r["sample"]): r for r in rows[rows["channel"] == LIDAR]}
        if scans:
            self._lidar_to_ego[:] = mounts.to_ego[next(iter(scans.values()))["mount"]]
        self._scans: dict[int, str] = {}
        scan_tokens: dict[int, str] = {}
        for frame in self.inputs:
            scan = scans.get(int(self._views["sample"][frame, 0]))
            if scan is not None:
                self._scans[frame] = scan["file"].decode()
                scan_tokens[frame] = scan["token"].decode()
                self._ego_to_world[frame] = rigid(scan["rotation"], scan["translation"])
        self._volume_to_ego = self._lidar_to_ego if volume_frame == "lidar" else None
        if voxels == "occ3d":
            tokens = {frame: str(self.tokens[frame]) for frame in self.inputs}
            self._voxels = VOXELS[voxels](root, name, tokens)
        else:
            self._voxels = VOXELS[voxels](root, token, scan_tokens)
        self.labelled = sorted(self._voxels.files)
        self._survey()

    def _survey(self) -> None:
        if self.frames == len(self.inputs) > 1:
            self.missing.append("no sweeps: frames are half a second apart")
        if not self._scans:
            self.missing.append("no LIDAR_TOP in some scenes: depth is not scored there")
        if not self.labelled:
            self.missing.append(
                f"no {self._voxels.title} of some scenes: occupancy is not scored there"
            )

    def frame_id(self, frame: int) -> str:
        """The sample's token; of a sweep, followed by the time of CAM_FRONT in microseconds."""
        token = str(self.tokens[frame])
        first = self._views[frame, 0]
        return token if first["key"] else f"{token}-{first['time']}"

    def cameras(self, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """intrinsics [6, 3, 3] in pixels, camera_to_world [6, 4, 4], float64."""
        return self._intrinsics[frame].copy(), self._camera_to_world[frame].copy()

    def volume_to_world(self, frame: int) -> np.ndarray:
        """[4, 4] float64."""
        ego = self._ego_to_world[frame]
        return ego if self._volume_to_ego is None else ego @ self._volume_to_ego[frame]

    def image(self, frame: int, camera: int) -> np.ndarray:
        """uint8 [h, w, 3] RGB."""
        row = self._views[frame, camera]
        path = self.root / row["file"].decode()
        image = kitti_files.read_image(path)
        if image.shape[:2] != tuple(row["size"]):
            got, want = ("x".join(map(str, size)) for size in (image.shape[:2], row["size"]))
            raise InputError(
                f"{path}: {got} pixels, but sample_data.json says {want}; copy it again"
            )
        return image

    def images(self, frame: int) -> np.ndarray:
        """uint8 [6, h, w, 3] RGB."""
        return np.stack([self.image(frame, camera) for camera in range(len(CAMERAS))])

    def depth(self, frame: int) -> None:
        """nuScenes has no dense depth."""

    def stereo_pair(self, frame: int) -> None:
        """nuScenes has no stereo."""

    def other_eye(self, frame: int) -> None:
        """nuScenes has no stereo."""

    def semantics(self, frame: int) -> np.ndarray | None:
        """Pseudo labels, uint8 [6, h, w]; None without --labels."""
        if self._labels is None:
            return None
        files = [self.root / row["file"].decode() for row in self._views[frame]]
        return self._labels.read(files, tuple(self._views["size"][frame, 0]))

    def lidar(self, frame: int) -> np.ndarray | None:
        """The scan of a key frame, float32 [M, 3] in its volume frame; None where there is none."""
        if frame not in self._scans:
            return None
        points = kitti_files.read_points(self.root / self._scans[frame], 5)
        if self._volume_to_ego is not None:
            return points.copy()
        mount = self._lidar_to_ego[frame]
        return (points @ mount[:3, :3].T + mount[:3, 3]).astype(np.float32)

    def voxels(self, frame: int) -> np.ndarray | None:
        """Labels [ny, nx, nz] as nuscenes_voxels.py has them; None where there are none."""
        return self._voxels.labels(frame) if frame in self._voxels.files else None

    def voxel_mask(self, frame: int) -> np.ndarray | None:
        """bool [ny, nx, nz]: what the cameras see; None where that is not known."""
        return self._voxels.mask(frame) if frame in self._voxels.files else None

    def voxels_to_volume(self, frame: int) -> np.ndarray:
        """[4, 4]: voxels are in the ego frame or the LiDAR's, whatever the volume's frame."""
        if self._voxels.frame == ("ego" if self._volume_to_ego is None else "lidar"):
            return np.eye(4)
        lidar_to_ego = self._lidar_to_ego[frame]
        return lidar_to_ego.copy() if self._volume_to_ego is None else np.linalg.inv(lidar_to_ego)
