"""The tables of nuScenes, streamed: those that are gigabytes are read once, into a compact index.

The index has a row for every camera image and every LiDAR scan of a key frame, with its ego pose,
sorted by scene, channel and time. It is kept in `cache.folder`, shared by any number of processes,
and made again when a table changes.
"""

import contextlib
import functools
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from selfocc import InputError
from selfocc.datasets import cache, reading
from selfocc.files import fcntl

CHANNELS = (
    "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT",
    "LIDAR_TOP",
)  # fmt: skip
LIDAR = CHANNELS.index("LIDAR_TOP")
FORMAT = 4  # of the index; part of its name
CHUNK = 1 << 22  # characters read at a time
LONGEST = 1 << 20  # characters of a row; what is longer is damage
BETWEEN = re.compile(r"[\s,]*")  # the rows of a table
NAMES = ("sensor", "calibrated_sensor", "scene", "sample", "sample_data", "ego_pose")
# is_key_frame as tools write it; 1 and 0 are equal to True and False
KEY = {True: True, False: False, "true": True, "false": False, "True": True, "False": False,
       "1": True, "0": False}  # fmt: skip
STEPS = 2_000, 20_000_000  # microseconds between the images of a camera that can be believed
TWICE = "rows twice in {}.json, used once"


def stream(path: Path, progress: bool = False) -> Iterator[dict]:
    """The rows of a table, a JSON list of objects, without holding it. Raises InputError."""
    decode, rows = json.JSONDecoder().raw_decode, 0
    try:
        size = path.stat().st_size
        bar = tqdm(total=size, desc=path.name, unit="B", unit_scale=True, disable=not progress)
        with path.open(encoding="utf-8") as file, bar:
            text = file.read(1).strip("[")  # what follows are rows, commas, and a last ]
            while True:
                more, at = file.read(CHUNK), 0
                bar.update(len(more))
                text += more
                while (at := BETWEEN.match(text, at).end()) < len(text) and text[at] == "{":
                    try:
                        row, at = decode(text, at)
                    except json.JSONDecodeError:
                        break  # goes on in the next chunk, or nowhere
                    rows += 1
                    yield row
                text = text[at:]
                if text[:1] == "]":
                    return
                if not more or text[:1] not in ("", "{") or len(text) > CHUNK + LONGEST:
                    raise InputError(
                        f"{path}: broken off or damaged after {rows} rows; copy it again"
                    )
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; give --data and --version of nuScenes"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file; copy it again") from None


def _cells(row: dict, columns: tuple[str, ...], path: Path) -> list:
    try:
        return [row[column] for column in columns]
    except KeyError as error:
        where = row.get("token", "?")
        raise InputError(f"{path}: row {where} has no {error}; copy the table again") from None


def whole(value) -> int:
    """A whole number, also where a tool has written it as 1.5e15 or "1500". Raises ValueError."""
    number = int(value)
    if (isinstance(value, float) and number != value) or abs(number) >> 63:
        raise ValueError(value)
    return number


def _below(file: str) -> str:
    """A file's place below the data folder, also where it was written from the root of a disk."""
    file = file.replace("\\", "/")
    if re.match(r"\.?/|\w:", file):
        file = re.sub(r".*/(?=(samples|sweeps)/)", "", file)
    return file


def unit(rotation: np.ndarray) -> np.ndarray:
    """Whether quaternions [..., 4] have length 1, as rotations do."""
    return np.abs(np.linalg.norm(rotation, axis=-1) - 1) < 1e-3


class Tables:
    """The tables in a folder (.../v1.0-trainval). Raises InputError for damaged tables, and for
    rows of one token that contradict each other.

    places: of the rows of each small table, by their tokens. scenes: names; samples [S]: tokens,
    times [S] in microseconds; mounts: tokens of the sensors on the vehicle, to_ego [M, 4, 4] and
    intrinsics [M, 3, 3] (zero for LiDAR). notes: what is amiss, and where.
    """

    def __init__(self, folder: Path):
        self.folder, self.notes, self.places = folder, defaultdict(list), {}
        self.check_camera = functools.cache(self._check_camera)  # scenes share cameras
        try:
            stats = [self.path(name).stat() for name in NAMES]
        except OSError as error:
            raise InputError(
                f"{error.filename}: {error.strerror}; --data names the folder that holds "
                f"{folder.name}, samples and sweeps"
            ) from None
        self._changed = [(s.st_size, s.st_mtime_ns) for s in stats]
        (sensors,) = self._read("sensor", "channel")
        (self.scenes,) = self._read("scene", "name")
        scenes, times = self._read("sample", "scene_token", "timestamp")
        self.samples = np.array(list(self.places["sample"]))
        self._scene_of = self._referred("sample", "scene", scenes)
        try:
            self.times = np.array([whole(time) for time in times], np.int64)
        except (ValueError, TypeError) as error:
            raise InputError(f"{self.path('sample')}: timestamp: {error}; copy it again") from None
        mounted, *numbers = self._read(
            "calibrated_sensor", "sensor_token", "rotation", "translation", "camera_intrinsic"
        )
        self.mounts = list(self.places["calibrated_sensor"])
        names = [sensors[k] for k in self._referred("calibrated_sensor", "sensor", mounted)]
        self._channels = [CHANNELS.index(name) if name in CHANNELS else None for name in names]
        self._place_sensors(*numbers)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _read(self, name: str, *columns: str) -> list[list]:
        """These columns of a small table; a row that is there twice is used once, and noted."""
        path, rows = self.path(name), {}
        for row in stream(path):
            token, *cells = _cells(row, ("token", *columns), path)
            if not isinstance(token, str):
                raise self._malformed(name, row)
            if rows.setdefault(token, cells) is not cells:
                if rows[token] != cells:
                    raise self._contradiction(name, token)
                self.notes[TWICE.format(name)].append(token)
        self.places[name] = {token: place for place, token in enumerate(rows)}
        return [[cells[k] for cells in rows.values()] for k in range(len(columns))]

    def _referred(self, name: str, other: str, tokens: list[str]) -> list[int]:
        """The places in the table `other` of what each row of a table refers to."""
        rows = zip(self.places[name], tokens, strict=True)
        return [self._refer(name, token, other, to) for token, to in rows]

    def _refer(self, name: str, token: str, other: str, to: str) -> int:
        if to not in self.places[other]:
            raise self._dangling(name, token, other, to)
        return self.places[other][to]

    def _dangling(self, name: str, token: str, other: str, lost: str) -> InputError:
        return InputError(
            f"{self.path(name)}: row {token} refers to {other} {lost}, which {other}.json does not "
            "have; all tables must be of one version"
        )

    def _contradiction(self, name: str, token: str) -> InputError:
        return InputError(
            f"{self.path(name)}: the rows of token {token} contradict each other; copy the table "
            "again"
        )

    def _malformed(self, name: str, row: dict) -> InputError:
        token = row.get("token", "?")
        return InputError(f"{self.path(name)}: row {token} is malformed; copy the table again")

    def _place_sensors(self, rotations: list, translations: list, intrinsics: list) -> None:
        path = self.path("calibrated_sensor")
        self.intrinsics = np.zeros((len(intrinsics), 3, 3))
        try:
            rotation = np.array(rotations, np.float64).reshape(-1, 4)
            self.to_ego = reading.from_quaternion(rotation, np.array(translations).reshape(-1, 3))
            for place, numbers in enumerate(intrinsics):
                if numbers:
                    self.intrinsics[place] = np.array(numbers, np.float64).reshape(3, 3)
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}: {error}; copy the table again") from None
        if not (np.isfinite(self.to_ego).all() and np.isfinite(self.intrinsics).all()):
            raise InputError(f"{path}: not all numbers are finite; copy the table again")
        bad = np.flatnonzero(~unit(rotation))
        if len(bad):
            token = self.mounts[bad[0]]
            raise InputError(f"{path}: rotation of {token} is none; copy the table again")

    def _check_camera(self, mount: int, height: int, width: int) -> None:
        """Refuse intrinsics that are none, or not of images of this size."""
        k, where = self.intrinsics[mount], self.path("calibrated_sensor")
        if min(k[0, 0], k[1, 1]) <= 0 or k[1, 0] or (k[2] != (0, 0, 1)).any():
            raise InputError(
                f"{where}: camera_intrinsic of {self.mounts[mount]} is none; copy the table again"
            )
        reading.check_camera(where, k, (height, width))

    def index(self) -> np.ndarray:
        """A row for every camera image and every LiDAR scan of a key frame, a read-only memory map.

        Fields: scene, sample and mount (places in scene.json, sample.json and
        calibrated_sensor.json), channel (place in CHANNELS), key, time (microseconds), size
        (height, width), token (of the sample_data), file, rotation (w, x, y, z) and translation of
        the ego pose, pose (its place among those that are used), and twice: whether
        sample_data.json and ego_pose.json have the row more than once.
        """
        key = cache.key(FORMAT, str(self.folder.resolve()), self._changed)
        path = cache.folder() / f"nuscenes-{key}.npy"
        index = cache.load(path)
        if index is None:
            cache.check_writable(path.parent)
            with path.with_suffix(".lock").open("w") as lock:
                # without locks, what two processes make at once is made twice
                with contextlib.suppress(OSError, AttributeError):
                    fcntl.flock(lock, fcntl.LOCK_EX)
                # another process may have made it meanwhile
                index = cache.load_or_make(path, self._make_index, what="the index of nuScenes")
        return index

    def _make_index(self) -> np.ndarray:
        columns = (
            "token", "sample_token", "calibrated_sensor_token", "ego_pose_token", "is_key_frame",
            "timestamp", "height", "width", "filename",
        )  # fmt: skip
        rows, poses, path = [], {}, self.path("sample_data")
        unknown = (0,) * 4, (0,) * 3, (False,) * 2  # until all rows are read
        for row in stream(path, progress=True):
            token, sample, mount, pose, key, time, height, width, file = _cells(row, columns, path)
            try:
                mount, key = self._refer("sample_data", token, "calibrated_sensor", mount), KEY[key]
                channel = self._channels[mount]
                if channel is None or (channel == LIDAR and not key):
                    continue
                sample = self._refer("sample_data", token, "sample", sample)
                time, size = whole(time), (whole(height or 0), whole(width or 0))
                texts = token.encode(), _below(file).encode()
                pose = poses.setdefault(pose, len(poses))
            except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
                raise self._malformed("sample_data", row) from None
            scene = self._scene_of[sample]
            rows.append((scene, sample, mount, channel, key, time, size, *texts, pose, *unknown))
        longest = [max((len(row[column]) for row in rows), default=1) for column in (7, 8)]
        index = np.array(rows, [
            ("scene", "<i4"), ("sample", "<i4"), ("mount", "<i4"), ("channel", "i1"), ("key", "?"),
            ("time", "<i8"), ("size", "<i8", 2), ("token", f"S{longest[0]}"),
            ("file", f"S{longest[1]}"), ("pose", "<i4"), ("rotation", "<f8", 4),
            ("translation", "<f8", 3), ("twice", "?", 2),
        ])  # fmt: skip
        numbers, repeated = self._read_poses(poses)
        index = self._once(index)
        index["rotation"], index["translation"] = np.split(numbers[index["pose"]], [4], axis=1)
        index["twice"][:, 1] = repeated[index["pose"]]
        index = index[np.lexsort((index["time"], index["channel"], index["scene"]))]
        _check_times(path, index)
        return index

    def _once(self, index: np.ndarray) -> np.ndarray:
        """Without rows that are there twice, which is kept in mind."""
        order = np.argsort(index["token"], kind="stable")
        tokens = index["token"][order]
        again = np.flatnonzero(tokens[1:] == tokens[:-1])
        first, second = order[again], order[again + 1]
        differ = index[first] != index[second]
        if differ.any():
            raise self._contradiction("sample_data", index["token"][first[differ][0]].decode())
        index["twice"][first, 0] = True
        return np.delete(index, second)

    def _read_poses(self, places: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """Of the tokens, in the order of their places: rotation and translation [poses, 7], and
        whether the table has them more than once."""
        poses, count = np.zeros((len(places), 7)), np.zeros(len(places), int)
        path = self.path("ego_pose")
        for row in stream(path, progress=True):
            token, rotation, translation = _cells(row, ("token", "rotation", "translation"), path)
            place = places.get(token)
            if place is None:
                continue
            try:
                (w, x, y, z), (a, b, c) = rotation, translation
                pose = np.array([w, x, y, z, a, b, c], np.float64)
            except (ValueError, TypeError):
                raise InputError(f"{path}: row {token} is no pose; copy the table again") from None
            if count[place] and not np.array_equal(pose, poses[place], equal_nan=True):
                raise self._contradiction("ego_pose", token)
            poses[place] = pose
            count[place] += 1
        bad = ~np.isfinite(poses).all(1) | ~unit(poses[:, :4])
        for token, place in places.items():
            if not count[place]:
                raise self._dangling("sample_data", "?", "ego_pose", token)
            if bad[place]:
                raise InputError(
                    f"{path}: pose {token} is not finite or no rotation; copy the table again"
                )
        return poses, count > 1


def _check_times(path: Path, index: np.ndarray) -> None:
    """Refuse time stamps that are no microseconds, by the images of each camera in a scene."""
    follows = (np.diff(index["scene"]) == 0) & (np.diff(index["channel"]) == 0)
    steps = np.diff(index["time"])[follows]
    steps = steps[steps > 0]
    if len(steps) and not STEPS[0] <= np.median(steps) <= STEPS[1]:
        raise InputError(
            f"{path}: images of a camera are {np.median(steps):g} microseconds apart; timestamp "
            "must count microseconds"
        )
