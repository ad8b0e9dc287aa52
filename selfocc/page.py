"""A page that shows voxels in any browser: one file, which asks nothing of the network.

page.html is the page, and finds the surfaces; here it gets its data. An SDF travels as bytes: byte
b says that it is at most `threshold + (b - 128) * STEP` metres and more than one STEP less. So
what the page shows at a threshold, which is always a number of steps away, is exact.
"""

import base64
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as iio
import numpy as np

from selfocc import InputError, pictures
from selfocc.files import write_file
from selfocc.geometry import Box
from selfocc.labels import Palette, class_colours

STEP = 1 / 64  # metres; 127 of them are the 2 m around the threshold that the page knows
FREE = 255
TEMPLATE = Path(__file__).with_suffix(".html")


class Shown(NamedTuple):
    """One frame of the page; voxels [ny, nx, nz] are the same of all frames."""

    name: str  # e.g. "street-003/000040"
    sdf: np.ndarray  # float, metres at voxel centres
    classes: np.ndarray | None  # uint8, likeliest class
    pictures: dict[str, np.ndarray]  # title -> uint8 [h, w, 3]
    truth: np.ndarray | None = None  # bool, occupied voxels of the truth


def write_page(
    path: Path,
    frames: Iterable[Shown],
    box: Box,
    threshold: float,
    title: str,
    palette: Palette | None = None,
    ahead: Sequence[float] | None = None,
) -> None:
    """Write the page.

    Args:
        box: that the voxels divide.
        threshold: metres of the SDF up to which voxels are occupied, until the reader changes it.
        palette: of the classes, where frames have any.
        ahead: (x, y, ...) where the car looks to; by default +y, or +x in a box around the car.

    Raises InputError without frames, where frames differ in shape, for classes without a palette,
    and if the file cannot be written.
    """
    written, shape, seen = [], None, set()
    for frame in frames:
        shape = shape or frame.sdf.shape
        for grid in (frame.sdf, frame.classes, frame.truth):
            if grid is not None and grid.shape != shape:
                raise InputError(f"{frame.name}: voxels are {grid.shape}, not {shape} as others")
        if frame.classes is not None:
            seen |= set(np.unique(frame.classes[frame.sdf <= threshold]).tolist())
        written.append(_frame(frame, threshold))
    if not written:
        raise InputError("a page needs a frame at least")
    if ahead is None:
        ahead = (1, 0) if box[1] < box[4] / -2 else (0, 1)
    numbers = (np.arange(shape[2]) + 0.5) / shape[2]
    front = np.array(ahead[:2]) / np.hypot(*ahead[:2])
    content = {
        "title": title, "box": box, "shape": shape, "threshold": threshold, "step": STEP,
        "ahead": front.tolist(), "heights": pictures.turbo(numbers).tolist(),
        "ticks": pictures.height_ticks(box), "frames": written,
    }  # fmt: skip
    if seen:
        content["colours"] = class_colours(palette).tolist()
        content["names"] = {k: name for k, (name, _) in palette.items() if k in seen}
    text = json.dumps(content).replace("<", "\\u003c")  # no name ends the script
    write_file(path, TEMPLATE.read_text("utf-8").replace("{/* data */}", text).encode())


def quantised(sdf: np.ndarray, threshold: float) -> np.ndarray:
    """The SDF as bytes (see above); what is not a number is free."""
    levels = np.ceil((sdf - threshold) / STEP) + 128
    return np.fmax(np.fmin(levels, FREE), 0).astype(np.uint8)


def _frame(frame: Shown, threshold: float) -> dict:
    written = {"name": frame.name, "sdf": _packed(quantised(frame.sdf, threshold))}
    if frame.classes is not None:
        written["classes"] = _packed(frame.classes)
    if frame.truth is not None:  # as an SDF of which no threshold matters
        written["truth"] = _packed(np.where(frame.truth, 0, FREE).astype(np.uint8))
    jpegs = {
        name: iio.imwrite("<bytes>", picture, extension=".jpg", quality=90)
        for name, picture in frame.pictures.items()
    }
    return written | {"pictures": {k: base64.b64encode(j).decode() for k, j in jpegs.items()}}


def _packed(grid: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(grid.tobytes(), 9)).decode()
