"""Cameras, rays, boxes and the grid <-> metre mapping.

Conventions used everywhere:

- Camera axes: x right, y down, z forward. Pixel (u, v) has u to the right, v down, and integer
  coordinates at pixel centres.
- `intrinsics` [..., 3, 3] are in pixels of the image they belong to; `camera_to_volume`
  [..., 4, 4] maps camera points to the volume frame, in metres.
- A volume has nodes at both ends of its box: node i of n sits at `lo + i / (n - 1) * (hi - lo)`.
  Grid axes are (H, W, Z) for metric axes (y, x, z).
- Depth is z-depth in the camera; a length along the ray is called distance.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

Box = tuple[float, float, float, float, float, float]  # x0, y0, z0, x1, y1, z1 in metres


def constant(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    """A vector of these numbers, made once: the host waits whenever it gives numbers to a GPU."""
    return _constant(numbers, like.dtype, like.device)


@functools.cache
def _constant(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


def node_positions(box: Box, nodes: tuple[int, int, int], device=None) -> Tensor:
    """Metric positions [H, W, Z, 3] (x, y, z) of a volume's nodes in the volume frame, metres."""
    y, x, z = (
        torch.linspace(box[axis], box[axis + 3], n, device=device)
        for axis, n in zip((1, 0, 2), nodes, strict=True)
    )
    y, x, z = torch.meshgrid(y, x, z, indexing="ij")
    return torch.stack([x, y, z], dim=-1)


def node_spacing(box: Box, nodes: tuple[int, int, int]) -> tuple[float, float, float]:
    """Distance in metres between neighbouring nodes along x, y and z."""
    height, width, depth = nodes
    counts = (width, height, depth)
    return tuple((box[a + 3] - box[a]) / (counts[a] - 1) for a in range(3))


def fixed_pixels(rays: tuple[int, int], image_size: tuple[int, int], device=None) -> Tensor:
    """Pixels [rows * cols, 2] (u, v) of a regular grid that starts at pixel 0."""
    return _pixel_grid(rays, (image_size[0] / rays[0], image_size[1] / rays[1]), (0.0, 0.0), device)


def cellular_pixels(
    rays: tuple[int, int], image_size: tuple[int, int], uniform: Tensor, spread: float = 0.0
) -> Tensor:
    """Pixels [rows * cols, 2] (u, v) of a grid with random stride and offset.

    `uniform` holds four numbers in [0, 1): horizontal and vertical stride, horizontal and vertical
    offset. The grid stays regular, so that 3x3 windows over neighbouring rays (SSIM) mean the same
    everywhere. The stride is at least `spread` of the way from one pixel to the widest that fits.
    """
    height, width = image_size
    rows, cols = rays
    stride_u, stride_v, offset_u, offset_v = uniform.tolist()
    stride_u, stride_v = (spread + (1 - spread) * s for s in (stride_u, stride_v))
    step_u = stride_u * (width / cols - 1) + 1
    step_v = stride_v * (height / rows - 1) + 1
    start = (offset_v * (height - rows * step_v), offset_u * (width - cols * step_u))
    return _pixel_grid(rays, (step_v, step_u), start)


def _pixel_grid(rays, step, start, device=None) -> Tensor:
    v = torch.arange(rays[0], device=device) * step[0] + start[0]
    u = torch.arange(rays[1], device=device) * step[1] + start[1]
    v, u = torch.meshgrid(v, u, indexing="ij")
    return torch.stack([u, v], dim=-1).reshape(-1, 2)


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Inside, matrix products of float32 are not rounded to TF32: pixels need more than 11 bits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def move_points(points: Tensor, matrix: Tensor) -> Tensor:
    """Points [M, 3] moved by matrices [..., 4, 4]: [..., M, 3], to the last bit of their type."""
    with exact_products():
        return points @ matrix[..., :3, :3].mT + matrix[..., None, :3, 3]


def pixel_rays(
    pixels: Tensor, intrinsics: Tensor, camera_to_volume: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rays through pixels.

    Args: pixels [R, 2] (u, v); intrinsics [..., 3, 3]; camera_to_volume [..., 4, 4].
    Returns float32: origins [..., R, 3] and unit directions [..., R, 3] in the volume frame, and
    stretch [..., R], the distance along the ray that makes one metre of z-depth.
    """
    rays_to_volume = camera_to_volume[..., :3, :3] @ inverse(intrinsics)
    homogeneous = torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1).to(rays_to_volume)
    directions = (homogeneous @ rays_to_volume.mT).float()
    stretch = directions.norm(dim=-1)
    origins = camera_to_volume[..., None, :3, 3].float().expand_as(directions)
    return origins, directions / stretch[..., None], stretch


def ray_box(origins: Tensor, directions: Tensor, box: Box) -> tuple[Tensor, Tensor]:
    """Distances [...] at which rays enter and leave the box; never behind the camera.

    A ray that misses the box gets an interval of 1e-6 m. The published code adds 1e-6 to every
    direction component to avoid division by zero; so do we, since all published depths contain it.
    """
    bounds = constant(box, origins)
    slope = 1.0 / (directions + 1e-6)
    first = (bounds[:3] - origins) * slope
    second = (bounds[3:] - origins) * slope
    near = torch.minimum(first, second).amax(dim=-1).clamp_min(0.0)
    far = torch.maximum(first, second).amin(dim=-1)
    return near, torch.maximum(far, near + 1e-6)


def image_projection(intrinsics: Tensor, camera_to_volume: Tensor) -> Tensor:
    """[..., 4, 4] that takes homogeneous volume points to (u d, v d, d, 1), d the z-depth."""
    return _homogeneous(intrinsics) @ inverse(camera_to_volume)


def image_to_image(
    intrinsics: Tensor, camera_to_volume: Tensor, other_intrinsics: Tensor, other_to_volume: Tensor
) -> Tensor:
    """[..., 4, 4] that takes (u d, v d, d, 1) of one camera to the same of another."""
    back = camera_to_volume @ inverse(_homogeneous(intrinsics))
    return image_projection(other_intrinsics, other_to_volume) @ back


def inverse(matrix: Tensor) -> Tensor:
    """Of matrices [..., 3, 3], or of affine ones [..., 4, 4], whose last row is 0 0 0 1.

    By cofactors, in a few launches that no host waits for, and that a CUDA graph may hold.
    """
    if matrix.shape[-1] == 4:
        out = matrix.clone()
        linear = out[..., :3, :3] = inverse(matrix[..., :3, :3])
        out[..., :3, 3:] = linear @ -matrix[..., :3, 3:]
        return out
    a, b, c = matrix.unbind(-2)
    columns = [torch.linalg.cross(*rows) for rows in ((b, c), (c, a), (a, b))]
    return torch.stack(columns, dim=-1) / torch.linalg.vecdot(a, columns[0])[..., None, None]


def _homogeneous(intrinsics: Tensor) -> Tensor:
    out = torch.eye(4, dtype=intrinsics.dtype, device=intrinsics.device)
    out = out.expand(*intrinsics.shape[:-2], 4, 4).clone()
    out[..., :3, :3] = intrinsics
    return out
