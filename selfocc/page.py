"""A page that shows voxels in any browser: one file, which asks nothing of the network.

page.html finds the surfaces; here it gets its data. Byte b of an SDF says that it is at most
`threshold + (b - 128) * STEP` metres and more than one STEP less. What the page shows is exact, as
its thresholds are a number of steps away.
"""

import base64
import json
import zlib
from collections.abc import Iterable
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
    ahead: np.ndarray | None = None,
) -> None:
    """Write the page of voxels that divide `box`, occupied up to `threshold` metres of the SDF.

    palette: of classes; ahead: (x, y, ...) where the car looks to, +y, or +x in a box around it.
    InputError: no frames, of several shapes, classes without a palette, the file cannot be written.
    """
    written, shape, seen = [], None, set()
    for name, sdf, classes, views, truth in frames:
        written.append(packed := {"name": name, "pictures": {}})
        for key, view in views.items():
            packed["pictures"][key] = iio.imwrite("<bytes>", view, extension=".jpg", quality=90)
        shape, levels = shape or sdf.shape, np.ceil((sdf - threshold) / STEP) + 128
        grids = {"sdf": np.fmax(np.fmin(levels, FREE), 0), "classes": classes}  # not a number: free
        grids["truth"] = None if truth is None else np.where(truth, 0, FREE)
        for key, grid in grids.items():
            if grid is not None and grid.shape != shape:
                raise InputError(f"{name}: voxels are {grid.shape}, not {shape} as others")
            if grid is not None:  # with a margin of free voxels
                packed[key] = zlib.compress(np.pad(grid.astype("u1"), 1, constant_values=FREE), 9)
        if classes is not None:
            seen |= set(np.unique(classes[sdf <= threshold]).tolist())
    if not written:
        raise InputError("a page needs a frame at least")
    if ahead is None:
        ahead = (1, 0) if box[1] < box[4] / -2 else (0, 1)
    front = np.array(ahead[:2]) / np.hypot(*ahead[:2])
    heights = pictures.turbo((np.arange(shape[2]) + 0.5) / shape[2]).tolist()
    content = dict(title=title, box=box, shape=shape, threshold=threshold, step=STEP)
    content |= dict(ahead=front.tolist(), heights=heights, frames=written)
    if seen:
        content["colours"] = class_colours(palette).tolist()
        content["names"] = {k: name for k, (name, _) in palette.items() if k in seen}
    text = json.dumps(content, default=lambda packed: base64.b64encode(packed).decode())
    text = text.replace("<", "\\u003c")  # no name ends the script
    page = Path(__file__).with_suffix(".html").read_text("utf-8")
    write_file(path, page.replace("{/* data */}", text).encode())
