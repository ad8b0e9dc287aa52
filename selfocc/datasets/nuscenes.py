"""nuScenes with voxels (Caesar et al. 2020, Tian et al. 2023, Wang et al. 2023) as sequences.

    VERSION/*.json                      the official tables
    samples, sweeps/CHANNEL/...         six cameras at 12 Hz, LIDAR_TOP of key frames (2 Hz)
    gts, nuScenes-Occupancy             voxels of Occ3D and of OpenOccupancy (nuscenes_voxels.py)

World: nuScenes' global frame. Every sensor is placed by its own ego pose. Volume:
the ego frame (x forward, y left, z up) at the time of LIDAR_TOP, or the LiDAR's own (x right, y
forward). Frames are key frames and, between them, sweeps: those of the camera that has the fewest
there, with the nearest in time of every other camera. Only key frames are inputs.
"""

import functools
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path

import numpy as np

from selfocc import InputError
from selfocc.batch import Sequence
from selfocc.datasets import reading
from selfocc.datasets.nuscenes_tables import CHANNELS, LIDAR, NAMES, TWICE, Tables
from selfocc.datasets.nuscenes_voxels import Occ3D, OpenOccupancy, names_in
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
LATEST = 100_000  # microseconds from a sample's time to its key frames; cameras take up to 50,000
APART = 0.2  # seconds between frames from which on that is worth a note


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
    numbers are key frames. Scenes that lack images of key frames are left out. Lines of the first
    one's `missing` tell of that, of key frames left out, and of rows that are there twice. Raises
    InputError.
    """
    folder = root / version
    tables = Tables(folder)
    index, names = tables.index(), tables.scenes
    if chosen:
        ranges = dict(reading.parse_range(part, "scene-0061") for part in chosen.split(","))
        unknown = set(ranges) - set(names)
        if unknown:
            raise InputError(f"{folder}: no {min(unknown)}; it has {names[0]} to {names[-1]}")
    else:
        val = official_val(version)
        ranges = {name: None for name in names if (name in val) == (split == "val")}
    bounds = np.searchsorted(index["scene"], np.arange(len(names) + 1))
    listed = functools.cache(lambda folder: names_in(root / folder))
    sequences = []
    for token, place in tables.places["scene"].items():
        name = names[place]
        if name not in ranges:
            continue
        rows = np.array(index[bounds[place] : bounds[place + 1]])
        files = (file.decode().rpartition("/") for file in rows["file"])
        there = np.array([file in listed(folder) for folder, _, file in files], bool)
        for table_name, repeated in zip(("sample_data", "ego_pose"), rows["twice"].T, strict=True):
            where = [f"{name} {row['token'].decode()}" for row in rows[repeated]]
            tables.notes[TWICE.format(table_name)] += where
        if not (there | ~rows["key"] | (rows["channel"] == LIDAR)).all():
            tables.notes["scenes skipped"].append(f"images of {name} are missing")
            continue
        found = rows[there]
        views = _synchronised(found, tables, name)
        if not len(views[0]):
            tables.notes["scenes skipped"].append(f"{name} has no key frame of all six cameras")
            continue
        if any(name == sequence.name for sequence in sequences):
            raise InputError(
                f"{folder}/scene.json: {name} is there with two tokens; mend the table"
            )
        sequence = NuScenesSequence(
            root, name, token, found, *views, tables, ranges[name], volume_frame, labels, voxels
        )
        # the images of one rig, and of every other scene one: a look at each takes a while
        sequences.append(sequence)
        sequence.check_sizes(range(6) if len(sequences) == 1 else [len(sequences) % 6])
    notes = [
        f"{what}: {len(places)} ({places[0]}{', ..' if len(places) > 1 else ''})"
        for what, places in tables.notes.items()
        if places
    ]
    if not sequences:
        what = "; ".join(notes) or f"none is of split {split}"
        raise InputError(f"{folder}: no scene can be used: {what}; look at --data and --version")
    sequences[0].missing[:0] = notes
    return sequences


def _key_rows(rows: np.ndarray, channel: int, tables: Tables, name: str) -> dict[int, int]:
    """The row of every sample's key frame of a sensor; of two, that nearer to the sample's time."""
    keys = np.flatnonzero((rows["channel"] == channel) & rows["key"])
    samples = rows["sample"][keys]
    off = np.abs(rows["time"][keys] - tables.times[samples])
    found = {}
    for k in np.argsort(off, kind="stable"):
        sample = int(samples[k])
        where = f"{name} {CHANNELS[channel]} {tables.samples[sample]}"
        if sample in found:
            tables.notes["key frames twice for a sample, the one nearer in time used"].append(where)
        elif off[k] > LATEST:
            seconds = f"{where} by {off[k] / 1e6:.2f} s"
            tables.notes["sensor data left out, too far off their sample's time"].append(seconds)
        else:
            found[sample] = int(keys[k])
    return found


def _synchronised(rows: np.ndarray, tables: Tables, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the six cameras in every frame [frames, 6], in time, and which are key frames.

    rows: those of a scene. Key frames are paired by their sample, and sweeps between two by their
    time: they follow the camera with the fewest.
    """
    time = np.array(rows["time"])
    cameras = [np.flatnonzero(rows["channel"] == c) for c in range(len(CAMERAS))]
    times = [time[c] for c in cameras]  # ascending, as the index is
    keys = [_key_rows(rows, c, tables, name) for c in range(len(CAMERAS))]
    samples = sorted(set().union(*keys), key=lambda sample: (tables.times[sample], sample))
    complete = []
    for sample in samples:
        lacking = [channel for channel, k in zip(CAMERAS, keys, strict=True) if sample not in k]
        if lacking:
            where = f"{name} {tables.samples[sample]}: {', '.join(lacking)}"
            tables.notes["key frames left out that lack a camera"].append(where)
        else:
            complete.append([k[sample] for k in keys])
    frames, is_key = [], []
    for here, then in zip_longest(complete, complete[1:]):
        frames.append(here)
        is_key.append(True)
        if then is not None:
            between = [
                c[t.searchsorted(time[a], "right") : t.searchsorted(time[b])]
                for c, t, a, b in zip(cameras, times, here, then, strict=True)
            ]
            lead = np.unique(time[min(between, key=len)])
            nearest = [
                b[np.abs(time[b] - lead[:, None]).argmin(1)] if len(lead) else lead for b in between
            ]
            frames.extend(np.stack(nearest, 1))
            is_key += [False] * len(lead)
    return np.array(frames, np.int64).reshape(-1, len(CAMERAS)), np.array(is_key, bool)


class NuScenesSequence(Sequence):
    """One scene. Raises InputError on what is malformed.

    rows are those of the scene, `views` and `is_key` its frames as `_synchronised` has them.
    """

    camera_names = CAMERAS

    def __init__(
        self, root, name, token, rows, views, is_key, tables, keys, volume_frame, labels, voxels
    ):
        self.root, self.name, self._labels = root, name, labels
        self._tables = [tables.path(table) for table in NAMES]
        self.missing: list[str] = []
        number = np.cumsum(is_key) - 1  # key frame at or before each frame
        if keys is not None:
            if not keys or keys[-1] > number[-1]:
                raise InputError(f"{name}: key frames are 0 to {number[-1]}; choose among them")
            first, last = (np.flatnonzero(number == k)[0] for k in (keys[0], keys[-1]))
            views, is_key = views[first : last + 1], is_key[first : last + 1]
        self._views = rows[views]  # [frames, 6]
        self.frames = len(views)
        self.inputs = np.flatnonzero(is_key).tolist()
        self.tokens = tables.samples[self._views["sample"][:, 0]]
        ego = reading.from_quaternion(self._views["rotation"], self._views["translation"])
        self._camera_to_world = ego @ tables.to_ego[self._views["mount"]]
        self._intrinsics = tables.intrinsics[self._views["mount"]]
        kinds = np.c_[self._views["mount"].ravel(), self._views["size"].reshape(-1, 2)]
        for mount, height, width in np.unique(kinds, axis=0).tolist():
            tables.check_camera(mount, height, width)
        self.positions = ego[:, 0, :3, 3]
        self.path = reading.path_length(self.positions)

        self._ego_to_world = ego[:, 0]  # at the time of CAM_FRONT where there is no scan
        self._lidar_to_ego = np.broadcast_to(NOMINAL_LIDAR_TO_EGO, ego[:, 0].shape).copy()
        scans = _key_rows(rows, LIDAR, tables, name)
        samples = self._views["sample"][self.inputs, 0].tolist()
        pairs = zip(self.inputs, samples, strict=True)
        row_of = {frame: scans[sample] for frame, sample in pairs if sample in scans}
        frames, found = list(row_of), rows[np.array(list(row_of.values()), np.int64)]
        if scans:
            self._lidar_to_ego[:] = tables.to_ego[rows["mount"][next(iter(scans.values()))]]
            self._ego_to_world[frames] = reading.from_quaternion(
                found["rotation"], found["translation"]
            )
        self._scans = {f: file.decode() for f, file in zip(frames, found["file"], strict=True)}
        scan_tokens = {f: t.decode() for f, t in zip(frames, found["token"], strict=True)}
        self._volume_to_ego = self._lidar_to_ego if volume_frame == "lidar" else None
        if voxels == "occ3d":
            tokens = {frame: str(self.tokens[frame]) for frame in self.inputs}
            self._voxels = Occ3D(root, name, tokens)
        else:
            self._voxels = OpenOccupancy(root, token, scan_tokens)
        self.labelled = sorted(self._voxels.files)
        self._survey()

    def _survey(self) -> None:
        apart = np.median(np.diff(self._views["time"][:, 0])) / 1e6 if self.frames > 1 else 0
        if apart > APART:
            sweeps = "no" if self.frames == len(self.inputs) else "few"
            self.missing.append(f"{sweeps} sweeps: frames are {apart:.1f} s apart")
        sizes = self._views["size"][0]
        least = sizes.min(0)
        for channel, size in zip(CAMERAS, sizes, strict=True):
            if (size != least).any():
                had, has = (f"{width}x{height}" for height, width in (size, least))
                self.missing.append(f"{channel} of {had} pixels is scaled to {has}, as others are")
        if not self._scans:
            self.missing.append("no LIDAR_TOP in some scenes: depth is not scored there")
        if not self.labelled:
            self.missing.append(
                f"no {self._voxels.title} of some scenes: occupancy is not scored there"
            )

    def frame_id(self, frame: int) -> str:
        """The sample's token; of a sweep, followed by the time of CAM_FRONT in microseconds."""
        token = str(self.tokens[frame])
        return token if frame in self.inputs else f"{token}-{self._views[frame, 0]['time']}"

    def files(self, frame: int) -> list[Path]:
        images = [self.root / row["file"].decode() for row in self._views[frame]]
        scan = [self.root / self._scans[frame]] if frame in self._scans else []
        voxels = [self._voxels.files[frame]] if frame in self._voxels.files else []
        labels = [] if self._labels is None else map(self._labels.file, images)
        return [*self._tables, *images, *scan, *voxels, *labels]

    def cameras(self, frame: int) -> tuple[np.ndarray, np.ndarray]:
        return self._intrinsics[frame].copy(), self._camera_to_world[frame].copy()

    def volume_to_world(self, frame: int) -> np.ndarray:
        ego = self._ego_to_world[frame]
        return ego if self._volume_to_ego is None else ego @ self._volume_to_ego[frame]

    def image(self, frame: int, camera: int) -> np.ndarray:
        path = self._path(frame, camera)
        image = reading.read_image(path)
        self._check_size(path, image.shape[:2], frame, camera)
        return image

    def check_sizes(self, cameras: Iterable[int]) -> None:
        """Look at one image of each of these cameras. Raises InputError."""
        for camera in cameras:
            path = self._path(0, camera)
            self._check_size(path, reading.image_size(path), 0, camera)

    def _path(self, frame: int, camera: int) -> Path:
        return self.root / self._views[frame, camera]["file"].decode()

    def _check_size(self, path: Path, size: tuple[int, int], frame: int, camera: int) -> None:
        told = self._views[frame, camera]["size"]
        if size != tuple(told):
            got, want = ("x".join(map(str, size)) for size in (size, told))
            raise InputError(
                f"{path}: {got} pixels, but sample_data.json says {want}; copy it again"
            )

    def semantics(self, frame: int) -> list[np.ndarray] | None:
        """Pseudo labels; None without --labels."""
        if self._labels is None:
            return None
        sizes = self._views["size"][frame].tolist()
        return [
            self._labels.read(self._path(frame, camera), tuple(size))
            for camera, size in enumerate(sizes)
        ]

    def lidar(self, frame: int) -> np.ndarray | None:
        """The scan of a key frame."""
        if frame not in self._scans:
            return None
        points = reading.read_points(self.root / self._scans[frame], 5)
        if self._volume_to_ego is not None:
            return points.copy()
        mount = self._lidar_to_ego[frame]
        return (points @ mount[:3, :3].T + mount[:3, 3]).astype(np.float32)

    def lidar_to_volume(self, frame: int) -> np.ndarray:
        return self._lidar_to_ego[frame].copy() if self._volume_to_ego is None else np.eye(4)

    def voxels(self, frame: int) -> np.ndarray | None:
        return self._voxels.labels(frame) if frame in self._voxels.files else None

    def voxel_mask(self, frame: int) -> np.ndarray | None:
        """What the cameras see."""
        return self._voxels.mask(frame) if frame in self._voxels.files else None

    def voxels_to_volume(self, frame: int) -> np.ndarray | None:
        """Voxels are in the ego frame or the LiDAR's, whatever the volume's frame."""
        if self._voxels.frame == ("ego" if self._volume_to_ego is None else "lidar"):
            return None
        lidar_to_ego = self._lidar_to_ego[frame]
        return lidar_to_ego.copy() if self._volume_to_ego is None else np.linalg.inv(lidar_to_ego)
