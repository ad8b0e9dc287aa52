"""Files that KITTI odometry and KITTI raw have in common: tables, calibration, images, scans.

Everything here raises InputError, in one line that names the file and says what to do.
"""

import re
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from PIL import Image  # pillow comes with imageio

from selfocc import InputError

# A of the spec: velodyne (x forward, y left, z up) -> volume (x right, y forward, z up)
VELO_TO_VOLUME = np.array([[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], np.float64)


def numbered(folder: Path, suffix: str, digits: int = 6) -> list[int]:
    """Sorted numbers of the files 000000<suffix>, ... in a folder that may be absent."""
    stems = (path.stem for path in folder.glob(f"*{suffix}"))
    return sorted(int(stem) for stem in stems if len(stem) == digits and stem.isdecimal())


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
        raise InputError(f"{where}: {len(values)} numbers instead of {count}; restore the file")
    if not np.isfinite(values).all():
        raise InputError(f"{where}: not all numbers are finite; restore the file")
    return values


def read_table(path: Path, columns: int) -> np.ndarray:
    """[rows, columns] float64 of a text file; blank lines are allowed at its end."""
    lines = read_text(path).rstrip().splitlines()
    rows = [parse(line, columns, f"{path}, line {i}") for i, line in enumerate(lines, 1)]
    return np.array(rows).reshape(-1, columns)


def read_calibration(path: Path, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """The lines `key: numbers` whose key is in `sizes`, float64 arrays of that many numbers."""
    entries = {}
    for line in filter(str.strip, read_text(path).splitlines()):
        key, colon, numbers = line.partition(":")
        if not colon:
            raise InputError(f"{path}: '{line[:40]}' is no 'key: numbers'; restore the file")
        if key in sizes:
            entries[key] = parse(numbers, sizes[key], f"{path}, line {key}")
    return entries


def rigid(rows: np.ndarray, path: Path, where: str | None = None) -> np.ndarray:
    """[n, 4, 4] from [n, 12], refusing what is no rotation and translation."""
    last = np.tile([0.0, 0.0, 0.0, 1.0], (len(rows), 1))
    matrices = np.concatenate([rows, last], axis=1).reshape(-1, 4, 4)
    rotation = matrices[:, :3, :3]
    gram = rotation @ rotation.transpose(0, 2, 1)
    skew = np.abs(gram - np.eye(3)).max(axis=(1, 2))
    bad = np.flatnonzero((skew > 1e-3) | (np.linalg.det(rotation) < 0))
    if len(bad):
        where = where or f"line {bad[0] + 1}"
        raise InputError(f"{path}, {where}: its 3x3 part is no rotation; restore the file")
    return matrices


def read_exactly(path: Path, dtype: str, count: int) -> np.ndarray:
    values = np.fromfile(path, np.uint8)
    expected = count * np.dtype(dtype).itemsize
    if values.nbytes != expected:
        raise InputError(
            f"{path}: {values.nbytes} bytes instead of {expected}; copy the file again"
        )
    return values.view(dtype)


def read_projection(path: Path, key: str, numbers: np.ndarray) -> np.ndarray:
    """The projection [3, 4] of a rectified camera from its 12 numbers, checked."""
    projection = numbers.reshape(3, 4)
    zeros = projection[[0, 1, 2, 2], [1, 0, 0, 1]]
    if zeros.any() or projection[2, 2] != 1 or min(projection[0, 0], projection[1, 1]) <= 0:
        raise InputError(f"{path}: line {key} is no rectified projection; restore it")
    return projection


def read_image(path: Path) -> np.ndarray:
    """uint8 [h, w, 3] RGB; grey is repeated."""
    try:
        image = iio.imread(path, plugin="pillow")
    except Exception as error:  # decoders raise whatever the damage makes them raise
        kind = path.suffix[1:].upper()
        raise InputError(f"{path}: damaged or unreadable {kind}; copy it again") from error
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"{path}: {image.dtype} {image.shape} is not 8-bit grey or RGB")
    return image


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image, of which only the header is read."""
    try:
        with Image.open(path) as image:
            return image.size[::-1]
    except Exception as error:  # decoders raise whatever the damage makes them raise
        kind = path.suffix[1:].upper()
        raise InputError(f"{path}: damaged or unreadable {kind}; copy it again") from error


def check_camera(path: Path, intrinsics: np.ndarray, size: tuple[int, int]) -> None:
    """Refuse intrinsics [3, 3] whose principal point is not about the middle of images [h, w]."""
    u, v = intrinsics[:2, 2]
    height, width = size
    if not (0.25 * width < u < 0.75 * width and 0.25 * height < v < 0.75 * height):
        raise InputError(
            f"{path}: principal point {u:.0f}, {v:.0f} is far from the middle of images of "
            f"{width}x{height} pixels; calibration and images must be of one size"
        )


def check_size(path: Path, image: np.ndarray, size: tuple[int, ...], first: str) -> None:
    """Refuse an image whose [h, w] is not that of the sequence, which `first` has."""
    if image.shape[:2] != size[:2]:
        got, want = ("x".join(map(str, shape[:2])) for shape in (image.shape, size))
        raise InputError(f"{path}: {got} pixels, but {first} has {want}; a sequence needs one size")


def read_scan(path: Path) -> np.ndarray | None:
    """A Velodyne scan in the volume frame, float32 [M, 3]; None where there is none."""
    if not path.exists():
        return None
    raw = path.read_bytes()
    if not raw or len(raw) % 16:
        raise InputError(f"{path}: torn, {len(raw)} bytes are not whole points; copy it again")
    points = np.frombuffer(raw, "<f4").reshape(-1, 4)[:, :3]
    if not np.isfinite(points).all():
        raise InputError(f"{path}: holds points that are not finite; copy it again")
    return points @ VELO_TO_VOLUME[:3, :3].T.astype(np.float32)


def read_depth(path: Path) -> np.ndarray:
    """float32 [h, w] metres, 0 where there is none, from a 16-bit PNG of metres * 256."""
    try:
        image = iio.imread(path, plugin="pillow")
    except Exception as error:  # decoders raise whatever the damage makes them raise
        raise InputError(f"{path}: damaged or unreadable PNG; copy it again") from error
    if image.dtype == np.uint8 or image.ndim != 2:
        raise InputError(f"{path}: {image.dtype} {image.shape} is no 16-bit depth; copy it again")
    return image.astype(np.float32) / 256


def parse_range(text: str) -> tuple[str, range | None]:
    """A sequence and the frames chosen of it, from `06` or `06:0-39`."""
    match = re.fullmatch(r"\s*(\w+)(?::(\d+)-(\d+))?\s*", text)
    if not match:
        raise InputError(
            f"cannot read {text!r}: expected a sequence such as 06, or with frames, 06:0-39"
        )
    name, first, last = match.groups()
    return name, None if first is None else range(int(first), int(last) + 1)
