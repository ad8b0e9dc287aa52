"""Pictures without a plotting library: depth maps, occupancy views, panels, video.

All images are uint8 [h, w, 3].
"""

from collections.abc import Iterable
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image, ImageDraw  # pillow comes with imageio
from torch import Tensor

from selfocc.files import write_file
from selfocc.geometry import Box

BACKGROUND = np.array([236, 240, 244], np.float32)


def turbo(values: np.ndarray) -> np.ndarray:
    """Turbo colours [..., 3] uint8 of values in [0, 1].

    The polynomial fit is by A. Mikhailov and R. Reid (Google, Apache-2.0).
    """
    x = np.clip(values, 0, 1)[..., None]
    powers = np.concatenate([x**k for k in range(6)], axis=-1)
    red = [0.13572138, 4.61539260, -42.66032258, 132.13108234, -152.94239396, 59.28637943]
    green = [0.09140261, 2.19418839, 4.84296658, -14.18503333, 4.27729857, 2.82956604]
    blue = [0.10667330, 12.64194608, -60.58204836, 110.36276771, -89.90310912, 27.34824973]
    return (np.clip(powers @ np.array([red, green, blue]).T, 0, 1) * 255).astype(np.uint8)


def depth_picture(depth: Tensor, nearest: float = 3.0) -> np.ndarray:
    """Inverse depth [h, w] as colour, near is red; 0 stands for none and is dark."""
    depth = depth.cpu().numpy()
    picture = turbo(nearest / np.maximum(depth, nearest))
    picture[depth <= 0] = 24
    return picture


def error_picture(depth: Tensor, truth: Tensor, worst: float = 0.5) -> np.ndarray:
    """Relative depth error as colour, blue is none and red is `worst` or more."""
    depth, truth = depth.cpu().numpy(), truth.cpu().numpy()
    picture = turbo(np.abs(depth - truth) / np.maximum(truth, 1e-3) / worst)
    picture[truth <= 0] = 24
    return picture


def rgb_picture(image: Tensor) -> np.ndarray:
    """RGB [3, h, w] in [0, 1] as uint8 [h, w, 3]."""
    return (image.detach().permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def occupancy_picture(
    occupied: Tensor, box: Box, view: str, size: tuple[int, int] = (192, 320)
) -> np.ndarray:
    """Occupied voxels [ny, nx, nz] coloured by height, seen from `above` or from `behind`.

    Voxels are drawn as cubes by walking each pixel's ray through the grid, shaded by the face it
    enters.
    """
    lo, hi = (torch.tensor(box[i : i + 3], dtype=torch.float32) for i in (0, 3))
    origins, directions = _viewing_rays(lo, hi, view, size)
    grid = occupied.permute(1, 0, 2).cpu()  # x, y, z
    cells = torch.tensor(grid.shape, dtype=torch.float32)
    origins = (origins - lo) / (hi - lo) * cells
    directions = directions / (hi - lo) * cells
    hit, cell, face = _walk(grid, origins, directions)
    height = (cell[:, 2].float() + 0.5) / cells[2]
    color = (
        turbo(height.numpy()).astype(np.float32) * np.array([0.72, 0.86, 1.0])[face.numpy(), None]
    )
    picture = np.where(hit.numpy()[:, None], color, BACKGROUND)
    return picture.astype(np.uint8).reshape(*size, 3)


def _viewing_rays(
    lo: Tensor, hi: Tensor, view: str, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    rows, cols = size
    v, u = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(cols) + 0.5, indexing="ij")
    u, v = u.reshape(-1) / cols, v.reshape(-1) / rows
    if view == "above":
        extent = hi - lo
        scale = max(extent[0] / cols, extent[1] / rows)
        x = (lo[0] + hi[0]) / 2 + (u - 0.5) * cols * scale
        y = (lo[1] + hi[1]) / 2 - (v - 0.5) * rows * scale
        origins = torch.stack([x, y, torch.full_like(x, float(hi[2]) + 1)], dim=1)
        return origins, torch.tensor([1e-4, 1e-4, -1.0]).expand_as(origins)
    # from behind and above, looking along y at a point in the near half of the box
    eye = torch.stack(
        [(lo[0] + hi[0]) / 2, lo[1] - 0.22 * (hi[1] - lo[1]), hi[2] + 0.2 * (hi[1] - lo[1])]
    )
    look = torch.stack([eye[0], lo[1] + 0.42 * (hi[1] - lo[1]), lo[2]]) - eye
    forward = look / look.norm()
    right = torch.tensor([1.0, 0.0, 0.0])
    up = torch.linalg.cross(right, forward)
    directions = (
        forward + (u - 0.5)[:, None] * right * 1.1 + (0.5 - v)[:, None] * up * 1.1 * rows / cols
    )
    return eye.expand_as(directions), directions + 1e-6


def _walk(grid: Tensor, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First occupied cell on each ray: (hit [R], cell [R, 3], axis of the face entered [R]).

    origins and directions [R, 3] are in units of cells.
    """
    count = len(origins)
    cells = torch.tensor(grid.shape)
    inverse = 1 / directions
    enter_axis = torch.minimum(-origins * inverse, (cells - origins) * inverse)
    enter, face = enter_axis.max(dim=1)
    leave = torch.maximum(-origins * inverse, (cells - origins) * inverse).amin(dim=1)
    start = origins + directions * (enter.clamp_min(0) + 1e-4)[:, None]
    cell = start.floor().long()
    step = directions.sign().long()
    next_plane = ((cell + (step > 0).long()) - origins) * inverse
    hit = torch.zeros(count, dtype=torch.bool)
    active = torch.nonzero((leave > enter) & (leave > 0)).squeeze(1)
    for _ in range(int(cells.sum())):
        inside = ((cell[active] >= 0) & (cell[active] < cells)).all(dim=1)
        active = active[inside]
        if not len(active):
            break
        x, y, z = cell[active].T
        full = grid[x, y, z].bool()
        hit[active[full]] = True
        active = active[~full]
        axis = next_plane[active].argmin(dim=1)
        face[active] = axis
        cell[active, axis] += step[active, axis]
        next_plane[active, axis] += inverse[active, axis].abs()
    return hit, cell.clamp(min=torch.zeros(3, dtype=torch.long), max=cells - 1), face


def caption(picture: np.ndarray, text: str) -> np.ndarray:
    """The picture with a line of text in its top left corner."""
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = draw.textbbox((4, 2), text)
    draw.rectangle((left - 3, top - 2, right + 3, bottom + 2), fill=(0, 0, 0))
    draw.text((4, 2), text, fill=(255, 255, 255))
    return np.asarray(image)


def tile(rows: list[list[np.ndarray]], gap: int = 4) -> np.ndarray:
    """Pictures in rows and columns, each scaled to the widest of the first row."""
    width = max(picture.shape[1] for picture in rows[0])
    lines = []
    for row in rows:
        scaled = [_to_width(picture, width) for picture in row]
        height = max(picture.shape[0] for picture in scaled)
        padded = [
            np.pad(p, ((0, height - len(p) + gap), (0, gap), (0, 0)), constant_values=255)
            for p in scaled
        ]
        lines.append(np.concatenate(padded, axis=1))
    full = max(line.shape[1] for line in lines)
    lines = [
        np.pad(line, ((0, 0), (0, full - line.shape[1]), (0, 0)), constant_values=255)
        for line in lines
    ]
    return np.concatenate(lines)


def _to_width(picture: np.ndarray, width: int) -> np.ndarray:
    if picture.shape[1] == width:
        return picture
    height = round(picture.shape[0] * width / picture.shape[1])
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST))


def write_picture(path: Path, picture: np.ndarray):
    """Write a PNG. Raises InputError if the disk is full or the folder not writable."""
    write_file(path, iio.imwrite("<bytes>", picture, extension=".png"))


def write_video(path: Path, pictures: Iterable[np.ndarray], fps: int = 8) -> Path:
    """Write an mp4 where imageio has a plugin for it, otherwise a GIF; returns the file's path.

    Raises InputError if the disk is full or the folder not writable.
    """
    pictures = [p[: p.shape[0] // 2 * 2, : p.shape[1] // 2 * 2] for p in pictures]  # for H.264
    try:
        path = path.with_suffix(".mp4")
        content = iio.imwrite("<bytes>", pictures, extension=".mp4", fps=fps)
    except (ImportError, OSError, ValueError):
        path = path.with_suffix(".gif")
        content = iio.imwrite("<bytes>", pictures, extension=".gif", duration=1000 / fps, loop=0)
    write_file(path, content)
    return path
