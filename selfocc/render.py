"""Whole images rendered from a volume."""

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from selfocc.batch import Frames
from selfocc.geometry import fixed_pixels
from selfocc.model import SelfOcc

SPENT = 1e-4  # transmittance at which a ray ends; moves no depth by more than 1e-4 of its ray
MEMORY_SHARE = 0.25  # of the free memory that the rays rendered at once may take
ASSUMED_FREE = 2 << 30  # bytes, where the system does not say


def render_grid(
    model: SelfOcc, volume: Tensor, cameras: Frames, size: tuple[int, int], rays: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Depth [B, N, rows, cols] in metres and colour [B, N, rows, cols, 3] of a grid of rays.

    Ray (i, j) goes through pixel (j w / cols, i h / rows) of images of `size` (h, w). Only the
    matrices of `cameras` are used. As many rays are rendered at once as fit the free memory.
    """
    volume = volume[:, : 1 + model.config.field.colors]  # classes are not asked for
    pixels = fixed_pixels(rays, size, volume.device)
    views = cameras.intrinsics.shape[0] * cameras.intrinsics.shape[1]
    chunk = max(1, _rays_at_once(volume) // views)
    parts = [
        model.render(volume, cameras, part, model.config.render.eval_samples, stop_below=SPENT)
        for part in pixels.split(chunk)
    ]
    depth, color = (
        torch.cat([getattr(part, name) for part in parts], dim=2).unflatten(2, rays)
        for name in ("depth", "color")
    )
    return depth, color


def _rays_at_once(volume: Tensor) -> int:
    if volume.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(volume.device)
    else:
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError):  # Windows has no sysconf, and macOS does not say
            free = ASSUMED_FREE
    # a ray comes with 10 numbers and goes with a number a channel, some of which are copied
    return int(MEMORY_SHARE * free / (4 * 3 * (10 + volume.shape[1])))


def rendered_maps(model: SelfOcc, volume: Tensor, frames: Frames) -> tuple[Tensor, Tensor]:
    """Depth [B, N, h, w] in metres and colour [B, N, 3, h, w] of whole images.

    A regular grid of rays is rendered and interpolated to the pixels it stands for.
    """
    size = tuple(frames.images.shape[-2:])
    return to_images(*render_grid(model, volume, frames, size, model.config.render.eval_rays), size)


def to_images(depth: Tensor, color: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A grid of rays as `render_grid` gives it, interpolated to the pixels of images (h, w)."""
    grid = torch.cat([depth[..., None], color], dim=-1).flatten(0, 1).permute(0, 3, 1, 2)
    maps = _interpolate_grid(grid, size).unflatten(0, depth.shape[:2])
    return maps[:, :, 0], maps[:, :, 1:]


def _interpolate_grid(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """[M, C, rows, cols] at pixels (j w / cols, i h / rows) -> [M, C, h, w], bilinear.

    Beyond the last row and column the border is extended.
    """
    coordinates = []
    for n, rays in zip(size, grid.shape[-2:], strict=True):
        index = torch.arange(n, device=grid.device) * (rays / n)
        coordinates.append(2 * index / max(rays - 1, 1) - 1)
    y, x = torch.meshgrid(*coordinates, indexing="ij")
    where = torch.stack([x, y], dim=-1).expand(len(grid), -1, -1, -1)
    return F.grid_sample(grid, where, align_corners=True, padding_mode="border")
