"""The tables of nuScenes, streamed: those that are gigabytes are read once, into a compact index.

The index has a row for every camera image and every LiDAR scan of a key frame, with its ego pose,
sorted by scene, channel and time. It is kept in `cache.folder`, shared by any number of processes,
and made again when a table changes.
"""

import contextlib
import json
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: what two processes make at once is made twice
    fcntl = None

import numpy as np
from tqdm import tqdm

from selfocc import InputError
from selfocc.datasets import cache

CHANNELS = (
    "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT",
    "LIDAR_TOP",
)  # fmt: skip
LIDAR = CHANNELS.index("LIDAR_TOP")
FORMAT = 3  # of the index; part of its name
CHUNK = 1 << 22  # characters read at a time
LONGEST = 1 << 20  # characters of a row; what is longer is damage
NAMES = ("sensor", "calibrated_sensor", "scene", "sample", "sample_data", "ego_pose")
# is_key_frame as tools write it; 1 and 0 are equal to True and False
KEY = {True: True, False: False, "true": True, "false": False, "True": True, "False": False,
       "1": True, "0": False}  # fmt: skip
STEPS = 2_000, 20_000_000  # microseconds between the images of a camera that can be believed

Notes = dict[str, list[str]]  # what was found amiss, and where
TWICE = "rows twice in {}.json, used once"


def stream(path: Path, progress: bool = False) -> Iterator[dict]:
    """The rows of a table, a JSON list of objects, without holding it. Raises InputError."""
    decode, text, at, rows = json.JSONDecoder().raw_decode, "", 0, 0
    try:
        size = path.stat().st_size
        with (
            path.open(encoding="utf-8") as file,
            tqdm(
                total=size, desc=path.name, unit="B", unit_scale=True, disable=not progress
            ) as bar,
        ):
            while True:
                more = file.read(CHUNK)
                bar.update(len(more))
                text, at = text[at:] + more, 0
                if not rows and text[:1] == "[":
                    at = 1
                while True:
                    while text[at : at + 1] in (",", " ", "\n", "\r", "\t"):
                        at += 1
                    if text[at : at + 1] == "]":
                        return
                    if text[at : at + 1] != "{":
                        break
                    try:
                        row, at = decode(text, at)
                    except json.JSONDecodeError:
                        break  # goes on in the next chunk, or nowhere
                    rows += 1
                    yield row
                rest = text[at : at + 1]
                if not more or (rest and rest != "{") or len(text) - at > CHUNK + LONGEST:
                    raise InputError(
                        f"{path}: broken off or damaged after {rows} rows; copy it again"
                    )
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; give --data and --version of nuScenes"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file; copy it again") from None


def table(folder: Path, name: str, *columns: str, notes: Notes | None = None) -> list[list]:
    """The token and these columns of a small table, a list for each token.

    A row that is there twice is used once, which is noted. Raises InputError where a row lacks a
    column or contradicts another of its token.
    """
    path, rows = folder / f"{name}.json", {}
    notes = defaultdict(list) if notes is None else notes
    for row in stream(path):
        cells = _cells(row, ("token", *columns), path)
        if not isinstance(cells[0], str):
            raise _malformed(path, row)
        if rows.setdefault(cells[0], cells) is not cells:
            if rows[cells[0]] != cells:
                raise _contradiction(path, cells[0])
            notes[TWICE.format(name)].append(cells[0])
    return list(rows.values())


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


def rigid(rotation, translation) -> np.ndarray:
    """[..., 4, 4] of quaternions w, x, y, z [..., 4] and translations [..., 3] in metres."""
    q = np.asarray(rotation, np.float64)
    w, x, y, z = np.moveaxis(q / np.linalg.norm(q, axis=-1, keepdims=True), -1, 0)
    matrix = np.zeros((*w.shape, 4, 4))
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    for k, row in enumerate(rows):
        matrix[..., k, :3] = np.stack(row, -1)
    matrix[..., :3, 3] = translation
    matrix[..., 3, 3] = 1
    return matrix


def open_index(folder: Path) -> np.ndarray:
    """The index of the tables in `folder` (.../v1.0-trainval), a read-only memory map.

    Fields: scene, sample and mount (places in scene.json, sample.json and calibrated_sensor.json),
    channel (place in CHANNELS), key, time (microseconds), rotation (w, x, y, z) and translation
    of the ego pose, size (height, width), token (of the sample_data), file, and twice: whether
    sample_data.json and ego_pose.json have the row more than once. Raises InputError for damaged
    tables and for rows of one token that contradict each other.
    """
    try:
        stats = [(folder / f"{name}.json").stat() for name in NAMES]
    except OSError as error:
        raise InputError(
            f"{error.filename}: {error.strerror}; --data names the folder that holds "
            f"{folder.name}, samples and sweeps"
        ) from None
    key = cache.key(FORMAT, str(folder.resolve()), [(s.st_size, s.st_mtime_ns) for s in stats])
    path = cache.folder() / f"nuscenes-{key}.npy"
    index = _load(path)
    if index is None:
        cache.check_writable(path.parent)
        try:
            with path.with_suffix(".lock").open("w") as lock:
                with contextlib.suppress(OSError, AttributeError):  # some systems have no locks
                    fcntl.flock(lock, fcntl.LOCK_EX)
                index = _load(path)  # another process may have made it meanwhile
                if index is None:
                    _store(path, make_index(folder))
                    index = _load(path)
        except OSError as error:
            raise InputError(
                f"{path.parent}: cannot keep the index of nuScenes ({error.strerror}); free some "
                "space or set SELFOCC_CACHE to another folder"
            ) from None
    return index


def _load(path: Path) -> np.ndarray | None:
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None


def _store(path: Path, index: np.ndarray) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, index)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def make_index(folder: Path) -> np.ndarray:
    """See `open_index`."""
    channel_of = dict(table(folder, "sensor", "channel"))
    mounts = {}
    for place, (token, sensor) in enumerate(table(folder, "calibrated_sensor", "sensor_token")):
        if sensor not in channel_of:
            raise _dangling(folder, "calibrated_sensor", token, "sensor", sensor)
        name = channel_of[sensor]
        mounts[token] = place, CHANNELS.index(name) if name in CHANNELS else None
    scenes = {row[0]: place for place, row in enumerate(table(folder, "scene"))}
    samples = {}
    for place, (token, scene) in enumerate(table(folder, "sample", "scene_token")):
        if scene not in scenes:
            raise _dangling(folder, "sample", token, "scene", scene)
        samples[token] = place, scenes[scene]

    numbers, files, tokens, pose_of, pose_tokens = [], [], [], [], {}
    columns = (
        "token", "sample_token", "calibrated_sensor_token", "ego_pose_token", "is_key_frame",
        "timestamp", "height", "width", "filename",
    )  # fmt: skip
    path = folder / "sample_data.json"
    for row in stream(path, progress=True):
        token, sample, mount, pose, key, time, height, width, file = _cells(row, columns, path)
        try:
            if mount not in mounts:
                raise _dangling(folder, "sample_data", token, "calibrated_sensor", mount)
            place, channel = mounts[mount]
            key = KEY[key]
            if channel is None or (channel == LIDAR and not key):
                continue
            if sample not in samples:
                raise _dangling(folder, "sample_data", token, "sample", sample)
            time, height, width = whole(time), whole(height or 0), whole(width or 0)
            numbers.append(
                (samples[sample][1], channel, time, samples[sample][0], place, key, height, width)
            )
            files.append(_below(file).encode())
            tokens.append(token.encode())
            pose_of.append(pose_tokens.setdefault(pose, len(pose_tokens)))
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
            raise _malformed(path, row) from None
    poses, repeated_pose = _read_poses(folder, pose_tokens)

    numbers = np.array(numbers, np.int64).reshape(-1, 8)
    files, tokens = (np.array(a, dtype=np.bytes_ if a else "S1") for a in (files, tokens))
    pose_of = np.array(pose_of, np.int64)
    kept, repeated = _once(path, tokens, numbers, pose_of, files)
    dtype = np.dtype([
        ("scene", "<i4"), ("sample", "<i4"), ("mount", "<i4"), ("channel", "i1"), ("key", "?"),
        ("time", "<i8"), ("rotation", "<f8", 4), ("translation", "<f8", 3), ("size", "<i4", 2),
        ("token", tokens.dtype), ("file", files.dtype), ("twice", "?", 2),
    ])  # fmt: skip
    order = kept[np.lexsort((numbers[kept, 2], numbers[kept, 1], numbers[kept, 0]))]
    numbers, pose_of = numbers[order], pose_of[order]
    index = np.empty(len(order), dtype)
    for column, field in enumerate(("scene", "channel", "time", "sample", "mount", "key")):
        index[field] = numbers[:, column]
    index["size"], index["token"], index["file"] = numbers[:, 6:], tokens[order], files[order]
    index["rotation"], index["translation"] = poses[pose_of, :4], poses[pose_of, 4:]
    index["twice"][:, 0], index["twice"][:, 1] = repeated[order], repeated_pose[pose_of]
    _check_times(path, index)
    return index


def _once(path: Path, tokens: np.ndarray, *columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of the first row of every token, in order, and of all rows whether there are more.

    Raises InputError where two rows of a token differ in a column.
    """
    order = np.argsort(tokens, kind="stable")
    again = np.flatnonzero(tokens[order[1:]] == tokens[order[:-1]])
    first, second = order[again], order[again + 1]
    for column in columns:
        differ = column[first] != column[second]
        differ = differ.any(1) if differ.ndim > 1 else differ
        if differ.any():
            raise _contradiction(path, tokens[first[differ][0]].decode())
    kept, repeated = np.ones(len(tokens), bool), np.zeros(len(tokens), bool)
    kept[second], repeated[first] = False, True
    return np.flatnonzero(kept), repeated


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


def _read_poses(folder: Path, places: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Of the tokens, in the order of their places: rotation and translation [poses, 7], and
    whether the table has them more than once."""
    poses = np.full((len(places), 7), np.nan)
    found, repeated = np.zeros(len(places), bool), np.zeros(len(places), bool)
    path = folder / "ego_pose.json"
    for row in stream(path, progress=True):
        token, rotation, translation = _cells(row, ("token", "rotation", "translation"), path)
        place = places.get(token)
        if place is None:
            continue
        before = poses[place].copy() if found[place] else None
        try:
            (w, x, y, z), (a, b, c) = rotation, translation
            poses[place] = w, x, y, z, a, b, c
        except (ValueError, TypeError):
            raise InputError(f"{path}: row {token} is no pose; copy the table again") from None
        if before is not None:
            repeated[place] = True
            if not np.array_equal(before, poses[place], equal_nan=True):
                raise _contradiction(path, token)
        found[place] = True
    if not found.all():
        lost = next(token for token, place in places.items() if not found[place])
        raise _dangling(folder, "sample_data", "?", "ego_pose", lost)
    bad = ~np.isfinite(poses).all(1) | ~unit(poses[:, :4])
    if bad.any():
        token = next(token for token, place in places.items() if bad[place])
        raise InputError(f"{path}: pose {token} is not finite or no rotation; copy the table again")
    return poses, repeated


def unit(rotation: np.ndarray) -> np.ndarray:
    """Whether quaternions [..., 4] have length 1, as rotations do."""
    return np.abs(np.linalg.norm(rotation, axis=-1) - 1) < 1e-3


def _contradiction(path: Path, token: str) -> InputError:
    return InputError(
        f"{path}: the rows of token {token} contradict each other; copy the table again"
    )


def _malformed(path: Path, row: dict) -> InputError:
    return InputError(f"{path}: row {row.get('token', '?')} is malformed; copy the table again")


def _dangling(folder: Path, name: str, token: str, other: str, lost: str) -> InputError:
    return InputError(
        f"{folder / name}.json: row {token} refers to {other} {lost}, which {other}.json does not "
        "have; all tables must be of one version"
    )
