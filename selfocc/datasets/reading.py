"""Reading what the data sets have in common: tables, calibration, images, scans.

Everything here raises InputError, in one line that names the file and says what to do.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import imageio.v3 as iio
import numpy as np

from selfocc import InputError, counted
from selfocc.files import as_named

# [h, w] of the rectified images of each date by their focal length and principal point; odometry is
# cut from them: 03 is of 2011_09_26, 04 to 12 of 2011_09_30, the others of 2011_10_03
RECTIFIED = {
    (721.5377, 609.5593, 172.8540): (375, 1242),  # 2011_09_26
    (707.0493, 604.0814, 180.5066): (370, 1224),  # 2011_09_28
    (718.3351, 600.3891, 181.5122): (374, 1238),  # 2011_09_29
    (707.0912, 601.8873, 183.1104): (370, 1226),  # 2011_09_30
    (718.8560, 607.1928, 185.2157): (376, 1241),  # 2011_10_03
}
UNRECTIFIED = (512, 1392)  # [h, w] before rectification
# Where principal points lie, as shares of width and height. KITTI's are at 0.485 to 0.494 and 0.461
# to 0.495, nuScenes' at 0.49 to 0.52 and 0.53 to 0.56. Images that are resized to less than 0.75 or
# more than 1.4 of the width that the calibration is for leave the range; cropping leaves it free to
# move up and down more than to the sides.
CENTRAL_X, CENTRAL_Y = (0.35, 0.65), (0.25, 0.75)

HELD_OUT = 0.2  # of a drive, its end, where nobody says what is for validation

# what follows x, y, z in the points of a scan
COLUMNS = {4: "remission", 5: "intensity and ring"}
FARTHEST = 300.0  # metres along an axis; the scanners see 120

# velodyne (x forward, y left, z up) -> volume (x right, y forward, z up)
VELO_TO_VOLUME = np.array([[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], np.float64)


def path_length(positions: np.ndarray) -> np.ndarray:
    """Metres driven until each of the positions [frames, k]."""
    steps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    return np.concatenate([[0.0], np.cumsum(steps)])


def driven(poses: np.ndarray) -> np.ndarray:
    """Metres driven until each of a camera's poses [frames, 4, 4], as KITTI counts them: in the
    plane of x and z of the first."""
    return path_length(poses[:, :3, 3] @ poses[0, :3, [0, 2]].T)


def held_out(numbers: list[int], split: str) -> list[int]:
    """The first four fifths for split `train`, the end for `val`."""
    first = int(len(numbers) * (1 - HELD_OUT))
    return numbers[:first] if split == "train" else numbers[first:]


def around(root: Path, holds: str) -> Iterator[Path]:
    """A data folder and the two above it, as they are named and as their links lead."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; name the one that holds KITTI's {holds}")
    for place in (as_named(root), root.resolve()):
        yield from (place, *list(place.parents)[:2])


def numbered(folder: Path, *suffixes: str, digits: int = 6) -> list[int]:
    """Sorted numbers of the files 000000<suffix>, ... in a folder that may be absent."""
    stems = {path.stem for path in folder.glob("*") if path.suffix in suffixes}
    return sorted(int(stem) for stem in stems if len(stem) == digits and stem.isdecimal())


def check_chosen(folder: Path, there: list[int], chosen: Iterable[int]) -> None:
    """Refuse frame numbers that are none, or not all among those on disk."""
    absent = sorted(set(chosen) - set(there))
    if absent or not chosen:
        what = f"no frame {absent[0]}" if absent else f"{chosen} chooses nothing"
        raise InputError(f"{folder}: {what}; it holds {there[0]} to {there[-1]}")


def read_text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = "not a text file" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise InputError(f"{path}: cannot be read ({reason}); restore the file") from error


def parse(text: str, count: int, where: str) -> np.ndarray:
    """`count` finite numbers from a line of text."""
    try:
        values = np.array([float(word) for word in text.split()])
    except ValueError as error:
        raise InputError(f"{where}: {error}; restore the file") from error
    if len(values) != count:
        found = counted(len(values), "number")
        raise InputError(f"{where}: {found} instead of {count}; restore the file")
    if not np.isfinite(values).all():
        raise InputError(f"{where}: not all numbers are finite; restore the file")
    return values


def read_table(path: Path, columns: int) -> np.ndarray:
    """[rows, columns] float64 of a text file; blank lines are allowed at its end."""
    lines = read_text(path).rstrip().splitlines()
    rows = [parse(line, columns, f"{path}, line {i}") for i, line in enumerate(lines, 1)]
    return np.array(rows).reshape(-1, columns)


class Lines(dict[str, np.ndarray]):
    """The numbers of a calibration file by the key of their line."""

    def __init__(self, path: Path):
        self.path = path

    def __missing__(self, key: str):
        raise InputError(f"{self.path}: line {key} is missing; restore it")

    def projection(self, key: str) -> np.ndarray:
        """That of a rectified camera, [3, 4], checked."""
        projection = self[key].reshape(3, 4)
        zeros = projection[[0, 1, 2, 2], [1, 0, 0, 1]]
        if zeros.any() or projection[2, 2] != 1 or min(projection[0, 0], projection[1, 1]) <= 0:
            raise InputError(f"{self.path}: line {key} is no rectified projection; restore it")
        return projection


def read_calibration(path: Path, sizes: dict[str, int]) -> Lines:
    """The lines `key: numbers` whose key is in `sizes`, float64 arrays of that many numbers."""
    lines = Lines(path)
    for line in filter(str.strip, read_text(path).splitlines()):
        key, colon, numbers = line.partition(":")
        if not colon:
            raise InputError(f"{path}: '{line[:40]}' is no 'key: numbers'; restore the file")
        if key in sizes:
            lines[key] = parse(numbers, sizes[key], f"{path}, line {key}")
    return lines


def rigid(rows: np.ndarray, path: Path, names: list[str] | None = None) -> np.ndarray:
    """[n, 4, 4] from [n, 12], refusing what is no rotation and translation.

    names: of the rows, by default the numbers of their lines.
    """
    last = np.tile([0.0, 0.0, 0.0, 1.0], (len(rows), 1))
    matrices = np.concatenate([rows, last], axis=1).reshape(-1, 4, 4)
    for bad, what in (
        (~np.isfinite(rows).all(axis=1), "not all numbers are finite"),
        (not_rotations(matrices[:, :3, :3]), "its 3x3 part is no rotation"),
    ):
        if bad.any():
            row = int(bad.argmax())
            where = names[row] if names else f"line {row + 1}"
            raise InputError(f"{path}, {where}: {what}; restore the file")
    return matrices


def not_rotations(matrices: np.ndarray) -> np.ndarray:
    """Which of the matrices [n, 3, 3] are none, bool [n]."""
    skew = np.abs(matrices @ matrices.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2))
    handed = np.sum(np.cross(matrices[:, 0], matrices[:, 1]) * matrices[:, 2], axis=1)
    return (skew > 1e-3) | (handed < 0)


def from_quaternion(rotation, translation) -> np.ndarray:
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


def read_poses(path: Path, numbers: list[int], of: str, digits: int = 6) -> np.ndarray:
    """[frames, 4, 4] of these frames of a sequence, of which the file has a line for each."""
    table = read_table(path, 12)
    if len(table) <= numbers[-1]:
        raise InputError(
            f"{path}: {counted(len(table), 'line')}, but {of} goes on to frame "
            f"{numbers[-1]:0{digits}d}; restore the file or choose fewer frames"
        )
    return rigid(table, path)[numbers]


def read_exactly(path: Path, dtype: str, count: int) -> np.ndarray:
    values = np.frombuffer(_read_bytes(path), np.uint8)
    check_bytes(path, values.nbytes, count * np.dtype(dtype).itemsize)
    return values.view(dtype)


def check_bytes(path: Path, found: int, expected: int) -> None:
    if found != expected:
        raise InputError(
            f"{path}: {counted(found, 'byte')} instead of {expected}; copy the file again"
        )


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); copy it again") from error


def check_rectified(
    where: Path | str,
    intrinsics: np.ndarray,
    size: tuple[int, ...],
    made_for: tuple[int, int] | None = None,
) -> None:
    """`check_camera` of KITTI's images, whose calibration tells their size.

    made_for [h, w]: the size of the images that the calibration says it is for.
    """
    (fx, fy), (cx, cy), (height, width) = intrinsics[[0, 1], [0, 1]], intrinsics[:2, 2], size[:2]
    expected = [size for (f, x, y), size in RECTIFIED.items()
                if np.allclose((fx, fy, cx, cy), (f, f, x, y), atol=0.02)]  # fmt: skip
    for rows, columns in expected if made_for is None else [made_for, *expected]:
        if (height, width) != (rows, columns):
            raise InputError(
                f"{where}: is for images of {rows}x{columns} pixels, but they have "
                f"{height}x{width}; {_mend(size)}"
            )
    check_camera(where, intrinsics, size)


def _mend(size: tuple[int, ...]) -> str:
    if size[:2] == UNRECTIFIED:
        return "these are unrectified images; take the rectified ones (`_sync`)"
    return "scale its numbers as the images were, or restore the images"


def check_camera(where: Path | str, intrinsics: np.ndarray, size: tuple[int, ...]) -> None:
    """Refuse intrinsics [3, 3] that cannot be those of images of `size` [h, w].

    `where` is the calibration.
    """
    (fx, fy), (cx, cy), (height, width) = intrinsics[[0, 1], [0, 1]], intrinsics[:2, 2], size[:2]
    (left, right), (top, bottom) = CENTRAL_X, CENTRAL_Y
    if not (
        left < (cx + 0.5) / width < right
        and top < (cy + 0.5) / height < bottom
        and 0.2 < fx / width < 5
        and 0.4 < fx / fy < 2.5
    ):
        raise InputError(
            f"{where}: focal lengths {fx:.0f}, {fy:.0f} and principal point {cx:.0f}, {cy:.0f} do "
            f"not suit images of {height}x{width} pixels; {_mend(size)}"
        )


def _decoded(path: Path, read: Callable):
    try:
        return read(path)
    except Exception as error:  # decoders raise whatever the damage makes them raise
        kind = path.suffix[1:].upper()
        raise InputError(f"{path}: damaged or unreadable {kind}; copy it again") from error


_pixels = partial(iio.imread, plugin="pillow", writeable_output=False)  # spares a copy


def read_image(path: Path) -> np.ndarray:
    """uint8 [h, w, 3] RGB, perhaps read-only; grey is repeated."""
    image = _decoded(path, _pixels)
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(
            f"{path}: {image.dtype} {image.shape} is not 8-bit grey or RGB; convert it"
        )
    return image


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image, of which only the header is read."""
    return _decoded(path, partial(iio.improps, plugin="pillow")).shape[:2]


def read_points(path: Path, columns: int) -> np.ndarray:
    """The points of a scan, float32 [M, 3], from a file of 4 (KITTI) or 5 (nuScenes) columns.

    A scan says nowhere how many it has, so what follows x, y and z must look like it.
    """
    raw = _read_bytes(path)
    if _plausible(raw, columns):
        return np.frombuffer(raw, "<f4").reshape(-1, columns)[:, :3]
    other = 9 - columns
    if _plausible(raw, other):
        why = f"holds {other} floats a point (x, y, z, {COLUMNS[other]})"
        raise InputError(
            f"{path}: {why}, not {columns} (.., {COLUMNS[columns]}); convert it, or take the scan "
            "of this data set"
        )
    if not raw or len(raw) % (4 * columns):
        raise InputError(f"{path}: torn, {len(raw)} bytes are not whole points; copy it again")
    if not np.isfinite(np.frombuffer(raw, "<f4")).all():
        raise InputError(f"{path}: holds points that are not finite; copy it again")
    raise InputError(
        f"{path}: is not {columns} float32 a point, x, y, z in metres and {COLUMNS[columns]}; "
        "convert it, or copy it again"
    )


def _plausible(raw: bytes, columns: int) -> bool:
    """Whether these bytes are points of so many columns: intensities of 0 to 255 (KITTI's of 0 to
    1) and, in the fifth, the number of one of at most 128 beams."""
    if not raw or len(raw) % (4 * columns):
        return False
    points = np.frombuffer(raw, "<f4").reshape(-1, columns)
    intensity, ring = points[:, 3], points[:, 4:]
    return bool(
        (np.abs(points[:, :3]) < FARTHEST).all()
        and ((intensity >= 0) & (intensity <= 255)).all()
        and ((ring >= 0) & (ring < 128) & (ring == np.floor(ring))).all()
    )


def read_depth(path: Path) -> np.ndarray:
    """float32 [h, w] metres, 0 where there is none, from a 16-bit PNG of metres * 256."""
    image = _decoded(path, _pixels)
    if image.dtype == np.uint8 or image.ndim != 2:
        raise InputError(f"{path}: {image.dtype} {image.shape} is no 16-bit depth; copy it again")
    return image.astype(np.float32) / 256


def read_map(path: Path, size: tuple[int, int]) -> np.ndarray:
    """float32 of `size` [h, w] from a .npy file or a 16-bit PNG; 0 where there is none."""
    map_ = _decoded(path, np.load if path.suffix == ".npy" else _pixels).squeeze()
    if map_.shape != size or not np.isfinite(map_).all():
        raise InputError(f"{path}: {map_.shape} is no depth of its image {size}; copy it again")
    return map_.astype(np.float32)


def parse_range(text: str, example: str = "06") -> tuple[str, range | None]:
    """A sequence and the frames chosen of it, from `06` or `06:0-39`; also `scene-0061`."""
    match = re.fullmatch(r"\s*([\w-]+?)(?::(\d+)-(\d+))?\s*", text)
    if not match:
        raise InputError(
            f"cannot read {text!r}: expected a sequence such as {example}, or with (key) frames, "
            f"{example}:0-9"
        )
    name, first, last = match.groups()
    return name, None if first is None else range(int(first), int(last) + 1)
