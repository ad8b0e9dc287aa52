"""Published sizes, and what cars with pinhole cameras see at them.

Numbers are random, geometry is not: queries are projected and rays leave through cameras placed as
on the cars, because how neighbouring threads share cache lines depends on it.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Size:
    """Published settings of a data set, or something small."""

    name: str
    box: tuple[float, ...]  # x0 y0 z0 x1 y1 z1 of the volume, metres
    nodes: tuple[int, int, int]  # H (y), W (x), Z
    classes: int
    heads: tuple[int, int]  # count, width
    hidden: int  # features of the decoder
    points_self: int
    points_cross: tuple[int, int, int]  # of the hw, zh and wz planes
    network_image: tuple[int, int]
    image: tuple[int, int]  # that supervises
    focal: float  # of the supervising image, pixels
    mount: tuple[float, float, float]  # of the cameras, metres in the volume frame
    headings: tuple[float, ...]  # of the cameras, degrees from x to y
    rays: tuple[int, int]  # rows, columns a camera
    samples: int
    combine: bool  # form of the loss over proposals

    @property
    def planes(self) -> list[tuple[int, int]]:
        height, width, depth = self.nodes
        return [(height, width), (depth, height), (width, depth)]

    @property
    def levels(self) -> list[tuple[int, int]]:
        """Image levels at strides 4 to 32."""
        rows, cols = self.network_image
        return [(math.ceil(rows / s), math.ceil(cols / s)) for s in (4, 8, 16, 32)]

    @property
    def ray_count(self) -> int:
        return len(self.headings) * self.rays[0] * self.rays[1]


SIZES = {
    "kitti": Size(
        "kitti",
        box=(-25.6, 0.0, -2.0, 25.6, 51.2, 4.4),
        nodes=(257, 257, 33),
        classes=0,
        heads=(6, 16),
        hidden=96,
        points_self=12,
        points_cross=(8, 48, 48),
        network_image=(352, 1216),
        image=(352, 1216),
        focal=718.9,
        mount=(0.06, 0.27, -0.08),
        headings=(90.0,),
        rays=(55, 190),
        samples=256,
        combine=False,
    ),
    "nuscenes": Size(
        "nuscenes",
        box=(-40.0, -40.0, -1.0, 40.0, 40.0, 5.4),
        nodes=(257, 257, 25),
        classes=21,
        heads=(6, 16),
        hidden=96,
        points_self=12,
        points_cross=(8, 48, 48),
        network_image=(384, 800),
        image=(768, 1600),
        focal=1266.4,
        mount=(1.0, 0.0, 1.5),
        headings=(0.0, -55.0, 55.0, 180.0, 110.0, -110.0),
        rays=(48, 100),
        samples=256,
        combine=True,
    ),
    "small": Size(
        "small",
        box=(-8.0, -8.0, -1.0, 8.0, 8.0, 3.0),
        nodes=(13, 11, 5),
        classes=3,
        heads=(3, 8),
        hidden=40,
        points_self=3,
        points_cross=(2, 4, 4),
        network_image=(32, 64),
        image=(32, 64),
        focal=40.0,
        mount=(0.0, 0.0, 0.5),
        headings=(0.0, 120.0),
        rays=(5, 9),
        samples=19,
        combine=True,
    ),
}


class Draw:
    """Random tensors on a device; on "meta" only their shapes."""

    def __init__(self, device: str | torch.device, seed: int = 0, dtype=torch.float32):
        self.device, self.dtype = torch.device(device), dtype
        if self.device.type != "meta":
            self.generator = torch.Generator(self.device).manual_seed(seed)

    def uniform(self, *shape: int) -> Tensor:
        return self._draw(torch.rand, shape)

    def normal(self, *shape: int) -> Tensor:
        return self._draw(torch.randn, shape)

    def _draw(self, function, shape) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(shape, device="meta", dtype=self.dtype)
        numbers = function(*shape, generator=self.generator, device=self.device)
        return numbers.to(self.dtype)

    def put(self, tensor: Tensor) -> Tensor:
        """Computed geometry, which keeps its type."""
        return tensor.to(self.device)


# -----------------------------------------------------------------------------------------------
# Cameras. Axes x right, y down, z forward.


def _cameras(size: Size, image: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Intrinsics [3, 3] of an image size, camera axes [N, 3, 3] as columns, positions [N, 3]."""
    scale = image[1] / size.image[1]
    focal = size.focal * scale
    intrinsics = torch.tensor([[focal, 0, image[1] / 2], [0, focal, image[0] / 2], [0, 0, 1]])
    angle = torch.tensor(size.headings).deg2rad()
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    forward = torch.stack([angle.cos(), angle.sin(), zero], -1)
    right = torch.stack([angle.sin(), -angle.cos(), zero], -1)
    down = torch.stack([zero, zero, -one], -1)
    position = torch.tensor(size.mount).expand(len(angle), 3)
    return intrinsics, torch.stack([right, down, forward], -1), position


@cache
def rays_of(size: Size) -> dict[str, Tensor]:
    """Origins and directions [1, N R, 3], near and far [1, N R], z-depth of a metre, pixels."""
    intrinsics, axes, position = _cameras(size, size.image)
    rows, cols = (
        (torch.arange(n) + 0.5) * (pixels / n)
        for n, pixels in zip(size.rays, size.image, strict=True)
    )
    v, u = torch.meshgrid(rows, cols, indexing="ij")
    pixels = torch.stack([u, v], -1).reshape(-1, 2)
    homogeneous = torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1)
    directions = torch.einsum("nij,rj->nri", axes, homogeneous @ intrinsics.inverse().mT)
    stretch = directions.norm(dim=-1)
    directions = (directions / stretch[..., None]).flatten(0, 1)
    origins = position[:, None].expand(-1, len(pixels), -1).flatten(0, 1)
    low, high = torch.tensor(size.box).view(2, 3)
    first, second = (low - origins) / (directions + 1e-6), (high - origins) / (directions + 1e-6)
    near = torch.minimum(first, second).amax(-1).clamp_min(0)
    far = torch.maximum(torch.maximum(first, second).amin(-1), near + 1e-6)
    return dict(
        origins=origins[None],
        directions=directions[None],
        near=near[None],
        far=far[None],
        stretch=stretch,
        pixels=pixels,
    )


@cache
def projections_of(size: Size, moves: tuple[float, ...] = (-1.0, 1.0)) -> Tensor:
    """[1, K, N, 4, 4] from a camera to itself when the car has moved some metres along x or y."""
    intrinsics, axes, _ = _cameras(size, size.image)
    intrinsics = torch.block_diag(intrinsics.double(), torch.ones(1, 1).double())
    ahead = axes[0, :, 2].double()
    out = []
    for move in moves:
        shift = torch.eye(4).double().repeat(len(axes), 1, 1)
        shift[:, :3, 3] = -move * (axes.double().mT @ ahead)
        out.append(intrinsics @ shift @ intrinsics.inverse())
    return torch.stack(out)[None]


@cache
def seen_queries(size: Size, plane: int) -> tuple[Tensor, Tensor]:
    """Where queries are in the images [1, N, Q, P, 2], as fractions, and who is seen [1, N, Q]."""
    missing = (2, 1, 0)[plane]  # of H, W, Z, the axis that a plane lacks
    counts = list(size.nodes)
    counts[missing] = size.points_cross[plane]
    y, x, z = (
        torch.linspace(size.box[axis], size.box[axis + 3], n)
        for axis, n in zip((1, 0, 2), counts, strict=True)
    )
    y, x, z = torch.meshgrid(y, x, z, indexing="ij")
    order = {0: (0, 1, 2), 1: (2, 0, 1), 2: (1, 2, 0)}[plane]  # rows, columns, points
    pillars = torch.stack([x, y, z], -1).permute(*order, 3).flatten(0, 1)  # [Q, P, 3]

    intrinsics, axes, position = _cameras(size, size.network_image)
    image = (pillars - position[:, None, None]) @ axes[:, None] @ intrinsics.mT  # [N, Q, P, 3]
    depth = image[..., 2:]
    rows, cols = size.network_image
    fraction = image[..., :2] / depth.clamp_min(1e-5) / torch.tensor([cols, rows])
    seen = (depth[..., 0] > 1e-5) & ((fraction > 0) & (fraction < 1)).all(-1)
    return fraction[None], seen.any(-1)[None]


@cache
def cross_view_references(size: Size) -> Tensor:
    """[1, T, 3, P, 2]: a node's own coordinates, and along the third axis the whole plane."""
    names = ("hw", "zh", "wz")
    counts = dict(zip("hwz", size.nodes, strict=True))
    points = size.points_self
    parts = []
    for plane in names:
        grid = torch.meshgrid(*(torch.arange(counts[a]) / counts[a] for a in plane), indexing="ij")
        own = {a: g.flatten()[:, None].expand(-1, points) for a, g in zip(plane, grid, strict=True)}
        (other,) = set("hwz") - set(plane)
        own[other] = torch.linspace(0, 1, points).expand(grid[0].numel(), points)
        levels = [torch.stack([own[cols], own[rows]], -1) for rows, cols in names]
        parts.append(torch.stack(levels, 1))
    return torch.cat(parts)[None]


def road(size: Size, draw: Draw) -> Tensor:
    """[1, 4 + classes, H, W, Z]: ground with noise, so that some rays end early and others not.

    The channels of a node are neighbours in memory, as the decoder writes them.
    """
    noise = draw.normal(1, *size.nodes, 4 + size.classes).permute(0, 4, 1, 2, 3)
    height = torch.linspace(size.box[2], size.box[5], size.nodes[2]) - size.box[2] - 0.3
    noise[:, 0].mul_(0.1).add_(draw.put(height.clamp(-0.5, 0.5)).to(draw.dtype))
    return noise
