"""The tables of nuScenes, streamed: those that are gigabytes are read once, into a compact index.

The index has a row for every camera image and every LiDAR scan of a key frame, with its ego pose,
sorted by scene, channel and time. It is kept in `cache.folder`, shared by any number of processes,
and made again when a table changes.
"""

import contextlib
import json
import os
import tempfile
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
FORMAT = 2  # of the index; part of its name
CHUNK = 1 << 22  # characters read at a time
LONGEST = 1 << 20  # characters of a row; what is longer is damage
NAMES = ("sensor", "calibrated_sensor", "scene", "sample", "sample_data", "ego_pose")


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


def table(folder: Path, name: str, *columns: str) -> list[list]:
    """These columns of a small table, a list for each row. Raises InputError where one lacks."""
    return [
        _cells(row, columns, folder / f"{name}.json") for row in stream(folder / f"{name}.json")
    ]


def _cells(row: dict, columns: tuple[str, ...], path: Path) -> list:
    try:
        return [row[column] for column in columns]
    except KeyError as error:
        where = row.get("token", "?")
        raise InputError(f"{path}: row {where} has no {error}; copy the table again") from None


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


def open_index(folder: Path, progress: bool = True) -> np.ndarray:
    """The index of the tables in `folder` (.../v1.0-trainval), a read-only memory map.

    Fields: scene, sample and mount (places in scene.json, sample.json and calibrated_sensor.json),
    channel (place in CHANNELS), key, time (microseconds), rotation (w, x, y, z) and translation
    of the ego pose, size (height, width), token (of the sample_data), file. Raises InputError for
    damaged tables.
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
                    _store(path, make_index(folder, progress))
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


def make_index(folder: Path, progress: bool) -> np.ndarray:
    """See `open_index`."""
    channel_of = {token: channel for token, channel in table(folder, "sensor", "token", "channel")}
    mounts = {}
    for place, (token, sensor) in enumerate(
        table(folder, "calibrated_sensor", "token", "sensor_token")
    ):
        if sensor not in channel_of:
            raise _dangling(folder, "calibrated_sensor", token, "sensor", sensor)
        name = channel_of[sensor]
        mounts[token] = place, CHANNELS.index(name) if name in CHANNELS else None
    scenes = {row[0]: place for place, row in enumerate(table(folder, "scene", "token"))}
    samples = {}
    for place, (token, scene) in enumerate(table(folder, "sample", "token", "scene_token")):
        if scene not in scenes:
            raise _dangling(folder, "sample", token, "scene", scene)
        samples[token] = place, scenes[scene]

    numbers, files, tokens, pose_of, pose_tokens = [], [], [], [], {}
    columns = (
        "token", "sample_token", "calibrated_sensor_token", "ego_pose_token", "is_key_frame",
        "timestamp", "height", "width", "filename",
    )  # fmt: skip
    path = folder / "sample_data.json"
    for row in stream(path, progress):
        token, sample, mount, pose, key, time, height, width, file = _cells(row, columns, path)
        if mount not in mounts:
            raise _dangling(folder, "sample_data", token, "calibrated_sensor", mount)
        place, channel = mounts[mount]
        if channel is None or (channel == LIDAR and not key):
            continue
        if sample not in samples:
            raise _dangling(folder, "sample_data", token, "sample", sample)
        numbers.append(
            (samples[sample][1], channel, time, samples[sample][0], place, key, height, width)
        )
        files.append(file.encode())
        tokens.append(token.encode())
        pose_of.append(pose_tokens.setdefault(pose, len(pose_tokens)))
    poses = _read_poses(folder, pose_tokens, progress)

    numbers = np.array(numbers, np.int64).reshape(-1, 8)
    files, tokens = (np.array(a, dtype=np.bytes_ if a else "S1") for a in (files, tokens))
    dtype = np.dtype([
        ("scene", "<i4"), ("sample", "<i4"), ("mount", "<i4"), ("channel", "i1"), ("key", "?"),
        ("time", "<i8"), ("rotation", "<f8", 4), ("translation", "<f8", 3), ("size", "<i4", 2),
        ("token", tokens.dtype), ("file", files.dtype),
    ])  # fmt: skip
    order = np.lexsort((numbers[:, 2], numbers[:, 1], numbers[:, 0]))
    numbers, poses = numbers[order], poses[np.array(pose_of, np.int64)[order]]
    index = np.empty(len(order), dtype)
    for field, column in (
        ("scene", 0),
        ("channel", 1),
        ("time", 2),
        ("sample", 3),
        ("mount", 4),
        ("key", 5),
    ):
        index[field] = numbers[:, column]
    index["size"], index["token"], index["file"] = numbers[:, 6:], tokens[order], files[order]
    index["rotation"], index["translation"] = poses[:, :4], poses[:, 4:]
    return index


def _read_poses(folder: Path, places: dict[str, int], progress: bool) -> np.ndarray:
    """Rotation and translation [poses, 7] of the tokens, in the order of their places."""
    poses = np.full((len(places), 7), np.nan)
    found = np.zeros(len(places), bool)
    path = folder / "ego_pose.json"
    for row in stream(path, progress):
        token, rotation, translation = _cells(row, ("token", "rotation", "translation"), path)
        place = places.get(token)
        if place is not None:
            if len(rotation) != 4 or len(translation) != 3:
                raise InputError(f"{path}: row {token} is no pose; copy the table again")
            poses[place] = *rotation, *translation
            found[place] = True
    if not found.all():
        lost = next(token for token, place in places.items() if not found[place])
        raise _dangling(folder, "sample_data", "?", "ego_pose", lost)
    bad = ~np.isfinite(poses).all(1) | (np.abs(np.linalg.norm(poses[:, :4], axis=1) - 1) > 1e-3)
    if bad.any():
        token = next(token for token, place in places.items() if bad[place])
        raise InputError(f"{path}: pose {token} is not finite or no rotation; copy the table again")
    return poses


def _dangling(folder: Path, name: str, token: str, other: str, lost: str) -> InputError:
    return InputError(
        f"{folder / name}.json: row {token} refers to {other} {lost}, which {other}.json does not "
        "have; all tables must be of one version"
    )
