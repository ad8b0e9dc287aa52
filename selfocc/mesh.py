"""Occupied voxels as a mesh that MeshLab, Blender and Open3D open: binary PLY, coloured corners."""

from pathlib import Path

import numpy as np

from selfocc import pictures
from selfocc.files import write_file
from selfocc.geometry import Box
from selfocc.labels import class_colours

VERTEX = [("place", "<f4", 3), ("colour", "u1", 3)]
FACE = [("corners", "u1"), ("vertices", "<i4", 3)]
HEADER = "\n".join([
    "ply", "format binary_little_endian 1.0", "element vertex {}",
    *(f"property {kind}" for kind in ("float x", "float y", "float z")),
    *(f"property uchar {colour}" for colour in ("red", "green", "blue")),
    "element face {}", "property list uchar int vertex_indices", "end_header\n",
])  # fmt: skip


def write_ply(path: Path, sdf, box: Box, threshold: float, classes=None, palette=None) -> None:
    """Write the faces between voxels that are occupied and others, or the outside, as triangles.

    Voxels, of an SDF [ny, nx, nz] up to `threshold` metres, have the colours of heights (turbo), or
    of classes, uint8 [ny, nx, nz], in a labels.Palette. Triangles are counter-clockwise seen from
    outside; those of a colour share corners. Raises InputError for classes without a palette, or if
    the file cannot be written.
    """
    shape, occupied = np.array(sdf.shape), np.pad(sdf <= threshold, 1)
    paint, table = np.arange(shape[2]), pictures.turbo((np.arange(shape[2]) + 0.5) / shape[2])
    if classes is not None:
        paint, table = classes, class_colours(palette)
    paint, corners = np.broadcast_to(paint, shape), []  # of faces, [4, 4]: y, x, z, paint
    for axis, side in [(axis, side) for axis in range(3) for side in (-1, 1)]:
        bare = occupied & ~np.roll(occupied, -side, axis)
        cells = np.argwhere(bare[1:-1, 1:-1, 1:-1])
        # the corners of a face, seen from outside; y, x, z is a left-handed order
        u, v = np.eye(3, dtype=int)[[axis - 1, axis - 2]][::side]
        places = (
            cells + np.stack([0 * u, u, u + v, v])[:, None] + (np.arange(3) == axis) * (side > 0)
        )
        corners.append(np.dstack([places, np.tile(paint[*cells.T], (4, 1))]).swapaxes(0, 1))
    corners, size = np.concatenate(corners).reshape(-1, 4), (*shape + 1, len(table))
    keys, numbers = np.unique(np.ravel_multi_index(corners.T, size), return_inverse=True)
    y, x, z, paints = np.unravel_index(keys, size)
    lo, hi = np.array(box).reshape(2, 3)
    vertices, faces = np.empty(len(keys), VERTEX), np.empty(len(corners) // 2, FACE)
    vertices["place"] = lo + np.stack([x, y, z], axis=1) * (hi - lo) / shape[[1, 0, 2]]
    vertices["colour"] = table[paints]
    faces["corners"] = 3
    faces["vertices"] = numbers.reshape(-1, 4)[:, [0, 1, 2, 0, 2, 3]].reshape(-1, 3)
    header = HEADER.format(len(vertices), len(faces)).encode()
    write_file(path, header + vertices.tobytes() + faces.tobytes())
