"""Occupied voxels as a mesh that MeshLab, Blender and Open3D open: binary PLY, coloured corners."""

from pathlib import Path

import numpy as np

from selfocc import pictures
from selfocc.files import write_file
from selfocc.geometry import Box
from selfocc.labels import Palette, class_colours

COLOUR = ("red", "green", "blue")
VERTEX = [(name, "<f4") for name in "xyz"] + [(name, "u1") for name in COLOUR]
FACE = [("corners", "u1"), ("vertices", "<i4", 3)]
HEADER = "\n".join([
    "ply", "format binary_little_endian 1.0", "element vertex {}",
    *(f"property float {name}" for name in "xyz"), *(f"property uchar {name}" for name in COLOUR),
    "element face {}", "property list uchar int vertex_indices", "end_header\n",
])  # fmt: skip


def write_ply(
    path: Path,
    sdf: np.ndarray,
    box: Box,
    threshold: float,
    classes: np.ndarray | None = None,
    palette: Palette | None = None,
) -> None:
    """Write the faces between voxels that are occupied and others, or the outside, as triangles.

    Args:
        sdf: [ny, nx, nz] metres; at most `threshold` means occupied.
        classes: uint8 [ny, nx, nz], coloured as the palette says; by default height is (turbo).

    Triangles are counter-clockwise seen from outside. Corners are shared where their colour is the
    same. Raises InputError for classes without a palette, or if the file cannot be written.
    """
    ny, nx, nz = sdf.shape
    occupied = np.pad(sdf <= threshold, 1)
    if classes is None:
        paint = np.broadcast_to(np.arange(nz), sdf.shape)
        table = pictures.turbo((np.arange(nz) + 0.5) / nz)
    else:
        paint, table = classes, class_colours(palette)
    lattice = np.array([(nx + 1) * (nz + 1), nz + 1, 1])  # how corners are numbered, over y, x, z
    quads, paints = [], []
    for axis in range(3):
        for side in (-1, 1):
            bare = occupied & ~np.roll(occupied, -side, axis)
            cells = np.argwhere(bare[1:-1, 1:-1, 1:-1])
            # the corners of a face, seen from outside; y, x, z is a left-handed order
            u, v = np.eye(3, dtype=int)[[axis - 1, axis - 2]][::side]
            corners = np.stack([0 * u, u, u + v, v]) + (np.arange(3) == axis) * (side > 0)
            quads.append((cells[:, None] + corners) @ lattice)
            paints.append(paint[tuple(cells.T)])
    quads, paints = np.concatenate(quads), np.concatenate(paints).astype(np.int64)
    keys, numbers = np.unique(quads * len(table) + paints[:, None], return_inverse=True)
    places = np.stack(np.unravel_index(keys // len(table), (ny + 1, nx + 1, nz + 1)), axis=1)
    lo, hi = np.array(box).reshape(2, 3)
    vertices, faces = np.empty(len(keys), VERTEX), np.empty(2 * len(quads), FACE)
    metres = lo + places[:, [1, 0, 2]] * (hi - lo) / (nx, ny, nz)
    for name, column in zip(
        vertices.dtype.names, (*metres.T, *table[keys % len(table)].T), strict=True
    ):
        vertices[name] = column
    faces["corners"] = 3
    faces["vertices"] = numbers.reshape(-1, 4)[:, [0, 1, 2, 0, 2, 3]].reshape(-1, 3)
    header = HEADER.format(len(vertices), len(faces)).encode()
    write_file(path, header + vertices.tobytes() + faces.tobytes())
