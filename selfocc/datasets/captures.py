"""Posed images as other programs write them down: nerfstudio, COLMAP, and a folder as of KITTI.

    transforms.json                   nerfstudio: camera to world, OpenGL axes
    sparse/0/{cameras,images}.bin     COLMAP, or .txt: world to camera; points3D is not needed
    poses.txt, intrinsics.txt         3x4 camera to world a line, in the order of the images' names;
      images/                         `fx fy cx cy`, or a 3x3 matrix

Camera axes become x right, y down, z forward, and integer coordinates pixel centres: nerfstudio and
COLMAP have the first one at 0.5. Everything raises InputError in one line that names the file.
"""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from selfocc import InputError, counted
from selfocc.datasets import reading
from selfocc.datasets.lens import Lens

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])  # y and z of the camera turn round
CAMERAS, IMAGES, POINTS = "cameras", "images", "points3D"  # COLMAP's tables
# its camera models: id -> name, what its parameters are, and the lens
MODELS = {
    0: ("SIMPLE_PINHOLE", "f cx cy", "pinhole"),
    1: ("PINHOLE", "fx fy cx cy", "pinhole"),
    2: ("SIMPLE_RADIAL", "f cx cy k1", "brown"),
    3: ("RADIAL", "f cx cy k1 k2", "brown"),
    4: ("OPENCV", "fx fy cx cy k1 k2 p1 p2", "brown"),
    5: ("OPENCV_FISHEYE", "fx fy cx cy k1 k2 k3 k4", "fisheye"),
    8: ("SIMPLE_RADIAL_FISHEYE", "f cx cy k1", "fisheye"),
    9: ("RADIAL_FISHEYE", "f cx cy k1 k2", "fisheye"),
}
KINDS = {name: (words.split(), lens) for name, words, lens in MODELS.values()}


class Shot(NamedTuple):
    """An image and its camera."""

    file: Path
    name: str  # of the file, as the source of the poses has it
    pose: np.ndarray  # [4, 4] camera to world, in the source's units
    lens: Lens
    mask: Path | None = None  # 0 where the image shows nothing of the world
    depth: Path | None = None  # z-depth, 16-bit PNG or .npy
    depth_unit: float = 1.0  # of its numbers, in the source's units
    points: np.ndarray | None = None  # [M, 3] of the world that were matched in it


class Capture(NamedTuple):
    folder: Path
    shots: list[Shot]
    notes: list[str]


def find(root: Path) -> list[Capture]:
    """Those of the folder, or of each of its folders."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; name the one that holds your images and poses")
    for folders in ([root], sorted(path for path in root.iterdir() if path.is_dir())):
        found = [c for folder in folders if (c := _read(folder)) is not None]
        if found:
            return found
    raise InputError(
        f"{root}: neither transforms.json (nerfstudio), sparse/0/cameras.bin or .txt (COLMAP) nor "
        "poses.txt with intrinsics.txt (as KITTI) is there, nor in a folder of it"
    )


def _read(folder: Path) -> Capture | None:
    if (folder / "transforms.json").is_file():
        return _read_nerfstudio(folder)
    for model in (folder / "sparse" / "0", folder / "sparse", folder / "colmap" / "sparse" / "0"):
        if any((model / f"cameras{end}").is_file() for end in (".bin", ".txt")):
            return _read_colmap(folder, model)
    if (folder / "poses.txt").is_file():
        return _read_plain(folder)
    return None


def _capture(folder: Path, shots: list[Shot], model: Path) -> Capture:
    """Checked: files that are there, poses that are some."""
    there = [shot for shot in shots if shot.file.is_file()]
    if not there:
        which = f"{shots[0].file}, .." if shots else "any image"
        raise InputError(f"{model}: has no image on disk: not {which}; is it of another folder?")
    notes = []
    if len(there) < len(shots):
        lost = next(shot.name for shot in shots if not shot.file.is_file())
        notes.append(f"{counted(len(shots) - len(there), 'posed image')} not on disk, {lost} first")
    posed, folders = {shot.file for shot in there}, {shot.file.parent for shot in there}
    bare = sorted(f for at in folders for f in images_in(at) if f not in posed)
    if bare:
        notes.append(f"{counted(len(bare), 'image')} without a pose left out, {bare[0].name} first")
    poses = np.stack([shot.pose[:3].ravel() for shot in there])
    reading.rigid(poses, model, [f"the pose of {shot.name}" for shot in there])
    return Capture(folder, there, notes)


def images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _lens(numbers: dict[str, float], size: tuple[int, int], kind: str, where: str) -> Lens:
    """Of fx, fy, cx, cy, k1 to k4, p1, p2; the first pixel's centre is at 0.5."""
    values = {"k1": 0.0, "k2": 0.0, "k3": 0.0, "k4": 0.0, "p1": 0.0, "p2": 0.0} | numbers
    if not all(map(math.isfinite, values.values())) or min(size) < 1:
        raise InputError(f"{where}: not all numbers of the camera are finite; restore it")
    radial, tangential = tuple(values[f"k{n}"] for n in range(1, 5)), (values["p1"], values["p2"])
    if kind == "pinhole" or (kind == "brown" and not any((*radial, *tangential))):
        kind, radial, tangential = "pinhole", (0.0,) * 4, (0.0, 0.0)
    centre = values["cx"] - 0.5, values["cy"] - 0.5
    lens = Lens(size, values["fx"], values["fy"], *centre, kind, radial, tangential)
    reading.check_camera(where, lens.intrinsics, size)
    return lens


# nerfstudio


def _read_nerfstudio(folder: Path) -> Capture:
    path = folder / "transforms.json"
    try:
        whole = json.loads(reading.read_text(path))
        frames = whole["frames"]
        applied = np.eye(4)
        applied[:3] = np.array(whole.get("applied_transform", applied[:3]), float)[:3]
        back = np.linalg.inv(applied)  # to the axes and units of the program that made the poses
        scale = 1 / float(whole.get("applied_scale", 1))
        shots = [_nerfstudio_shot(path, whole | frame, back, scale) for frame in frames]
    except (ValueError, KeyError, TypeError, AttributeError, np.linalg.LinAlgError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path}: is no transforms.json of nerfstudio ({what}); mend it") from None
    return _capture(folder, shots, path)


def _nerfstudio_shot(path: Path, values: dict, back: np.ndarray, scale: float) -> Shot:
    name = values["file_path"]
    files = [path.parent / name, *((path.parent / name).with_suffix(end) for end in SUFFIXES)]
    file = next((f for f in files if f.is_file()), files[0])
    pose = np.eye(4)
    pose[:3] = np.array(values["transform_matrix"], float)[:3]
    pose = back @ pose @ OPENGL
    pose[:3, 3] *= scale
    extra = {
        kind: path.parent / values[key] if values.get(key) else None
        for kind, key in (("mask", "mask_path"), ("depth", "depth_file_path"))
    }
    unit = scale * float(values.get("depth_unit_scale_factor", 1e-3))
    return Shot(file, name, pose, _nerfstudio_lens(path, values), **extra, depth_unit=unit)


def _nerfstudio_lens(path: Path, values: dict) -> Lens:
    distorted = any(values.get(name) for name in ("k1", "k2", "k3", "k4", "p1", "p2"))
    model = values.get("camera_model", "OPENCV" if distorted else "PINHOLE")
    where = f"{path}, {values['file_path']}"
    if model not in KINDS:
        raise InputError(f"{where}: camera_model {model} is not among {', '.join(KINDS)}")
    width, height = float(values["w"]), float(values["h"])
    needed = ("k1", "k2", "k3", "k4") if model == "OPENCV_FISHEYE" else ()
    numbers = {name: float(values[name]) for name in needed}
    numbers |= {n: float(values[n]) for n in ("k1", "k2", "k3", "k4", "p1", "p2") if n in values}
    numbers |= {"fx": float(values["fl_x"]), "fy": float(values.get("fl_y", values["fl_x"]))}
    middle = {"cx": float(values.get("cx", width / 2)), "cy": float(values.get("cy", height / 2))}
    return _lens(numbers | middle, (round(height), round(width)), KINDS[model][1], where)


# COLMAP


def _read_colmap(folder: Path, model: Path) -> Capture:
    read = _binary if (model / "cameras.bin").is_file() else _text
    cameras = {number: _colmap_lens(model, number, *rest) for number, *rest in read(model, CAMERAS)}
    points = dict(read(model, POINTS)) if any(model.glob(f"{POINTS}.*")) else {}
    places = [folder / "images", folder]
    shots = []
    for numbers, camera, name, matched in read(model, IMAGES):
        if camera not in cameras:
            raise InputError(f"{model}: {name} is of camera {camera}, which it has not; restore it")
        file = next((at / name for at in places if (at / name).is_file()), places[0] / name)
        seen = np.array([points[p] for p in matched if p in points]).reshape(-1, 3)
        pose = np.linalg.inv(reading.from_quaternion(numbers[:4], numbers[4:]))
        shots.append(Shot(file, name, pose, cameras[camera], points=seen if len(seen) else None))
    return _capture(folder, shots, model)


def _colmap_lens(model: Path, number: int, kind: int | str, width: int, height: int, parameters):
    where = f"{model}, camera {number}"
    kind = MODELS[kind][0] if kind in MODELS else kind
    if kind not in KINDS:
        raise InputError(f"{where}: camera model {kind} is not among {', '.join(KINDS)}")
    names, lens = KINDS[kind]
    if len(names) != len(parameters):
        raise InputError(f"{where}: {kind} has {len(names)} parameters, not {len(parameters)}")
    numbers = dict(zip(names, map(float, parameters), strict=True))
    if "f" in numbers:
        numbers["fx"] = numbers["fy"] = numbers.pop("f")
    return _lens(numbers, (height, width), lens, where)


def _text(model: Path, table: str) -> Iterator[tuple]:
    """Rows of a table: cameras (id, kind, width, height, parameters), images (7 numbers, camera id,
    name, ids of its points), points (id, place)."""
    path = model / f"{table}.txt"
    lines = [line for line in reading.read_text(path).splitlines() if not line.startswith("#")]
    try:
        if table == IMAGES:
            for pose, matches in zip(lines[::2], [*lines[1::2], ""], strict=False):
                _, *numbers, camera, name = pose.split(maxsplit=9)
                numbers = reading.parse(" ".join(numbers), 7, f"{path}, {name}")
                yield numbers, int(camera), name, map(int, matches.split()[2::3])
            return
        for line in filter(str.strip, lines):
            number, *words = line.split()
            if table == CAMERAS:
                yield int(number), words[0], int(words[1]), int(words[2]), words[3:]
            else:
                yield int(number), reading.parse(" ".join(words[:3]), 3, str(path))
    except (ValueError, IndexError) as error:
        raise InputError(f"{path}: is no table of COLMAP ({error}); restore it") from None


def _binary(model: Path, table: str) -> Iterator[tuple]:
    """The same of a .bin file."""
    path = model / f"{table}.bin"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); copy it again") from None
    place = 0

    def take(kinds: str) -> tuple:
        nonlocal place
        values = struct.unpack_from(f"<{kinds}", data, place)
        place += struct.calcsize(f"<{kinds}")
        return values

    try:
        for _ in range(take("Q")[0]):
            if table == CAMERAS:
                number, kind, width, height = take("iiQQ")
                count = len(MODELS[kind][1].split()) if kind in MODELS else 0
                yield number, kind, width, height, take(f"{count}d")
            elif table == IMAGES:
                _, *numbers, camera = take("I7dI")
                end = data.index(b"\0", place)
                name, place = data[place:end].decode(), end + 1
                found = np.frombuffer(data, "<f8, <f8, <i8", *take("Q"), place)
                place += found.nbytes
                yield numbers, camera, name, found["f2"].tolist()
            else:
                number, x, y, z, *_, track = take("Q3d3BdQ")
                place += 8 * track
                yield number, np.array([x, y, z])
        if place > len(data):
            raise ValueError
    except (struct.error, ValueError):
        raise InputError(f"{path}: ends too early; copy it again") from None


# a folder as of KITTI


def _read_plain(folder: Path) -> Capture:
    poses, calibration, images = (folder / n for n in ("poses.txt", "intrinsics.txt", "images"))
    if not images.is_dir():
        raise InputError(f"{images}: no such folder, where the images of {poses} belong")
    files = images_in(images)
    table = reading.rigid(reading.read_table(poses, 12), poses)
    if len(files) != len(table):
        found = f"{counted(len(table), 'line')} of {poses} and {counted(len(files), 'image')}"
        raise InputError(f"{folder}: {found} in images; each image needs a line")
    if not files:
        raise InputError(f"{images}: no image ({', '.join(SUFFIXES)})")
    text = reading.read_text(calibration).split()
    numbers = reading.parse(" ".join(text), 9 if len(text) == 9 else 4, str(calibration))
    if len(numbers) == 9:
        numbers = numbers[[0, 4, 2, 5]]
    named = dict(zip(("fx", "fy", "cx", "cy"), numbers, strict=True))
    named["cx"], named["cy"] = named["cx"] + 0.5, named["cy"] + 0.5
    lens = _lens(named, reading.image_size(files[0]), "pinhole", str(calibration))
    shots = [Shot(f, f.name, pose, lens) for f, pose in zip(files, table, strict=True)]
    return _capture(folder, shots, poses)
