"""Images to planes: learnt queries attend to each other and to image features.

TPV (tri-perspective view) has the three planes hw, zh and wz through the volume; BEV (bird's-eye
view) has hw alone. A plane `ab` has a on its rows and b on its columns; axes are h (metric y), w
(x) and z. TPVFormer (Huang et al. 2023) and BEVFormer (Li et al. 2022), without their memory.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

import kernels
from selfocc.config import EncoderConfig, VolumeConfig
from selfocc.geometry import constant, image_projection, move_points

PLANES = {"tpv": ("hw", "zh", "wz"), "bev": ("hw",)}
_METRIC = {"w": 0, "h": 1, "z": 2}  # grid axis -> index of x, y, z


class Encoder(nn.Module):
    """Camera features and poses -> plane features.

    The cameras of a rig keep their order (each has an embedding), but every batch item has its own
    matrices. `transposed` is `QuirkConfig.transposed_bev_grid`.
    """

    def __init__(
        self,
        config: EncoderConfig,
        volume: VolumeConfig,
        cameras: int,
        levels: int = 4,
        transposed: bool = False,
    ):
        super().__init__()
        dim = config.dim
        self.planes = PLANES[config.kind]
        self.nodes = dict(zip("hwz", volume.nodes, strict=True))
        self.plane_shapes = [(self.nodes[rows], self.nodes[cols]) for rows, cols in self.planes]
        self.queries = nn.ParameterDict(
            {
                p: nn.Parameter(torch.randn(rows * cols, dim))
                for p, (rows, cols) in zip(self.planes, self.plane_shapes, strict=True)
            }
        )
        self.position = nn.ModuleDict(
            {plane: nn.Linear(4 * config.frequencies, dim) for plane in self.planes}
        )
        for linear in self.position.values():
            nn.init.xavier_uniform_(linear.weight)
        self.camera_embedding = nn.Parameter(torch.randn(cameras, dim))
        self.level_embedding = nn.Parameter(torch.randn(levels, dim))
        self.layers = nn.ModuleList(EncoderLayer(config, levels) for _ in range(config.layers))
        nn.init.constant_(self.layers[-1].norms[-1].weight, config.plane_scale)
        fixed = partial(self.register_buffer, persistent=False)
        for axis, nodes in self.nodes.items():
            fixed(f"features_{axis}", fourier_features(nodes, config.frequencies))
        for plane, points in zip(self.planes, config.points_cross, strict=False):
            fixed(f"pillars_{plane}", self._pillars(plane, points, volume.box))
        fixed("self_reference", self._self_reference(config.points_self, transposed))

    def forward(
        self,
        features: list[Tensor],
        intrinsics: Tensor,
        camera_to_volume: Tensor,
        image_size: tuple[int, int],
        valid_size: tuple[int, int],
    ) -> list[Tensor]:
        """Plane features [B, rows, cols, dim]: hw, zh and wz, or hw alone.

        Args:
            features: image levels [B, N, dim, h_l, w_l], finest first.
            intrinsics: [B, N, 3, 3] in pixels of the network's images.
            camera_to_volume: [B, N, 4, 4].
            image_size: (h, w) of the network's images, padding included.
            valid_size: the part of it, from the top left, that is not padding.
        """
        batch = len(intrinsics)
        image_shapes = [tuple(level.shape[3:]) for level in features]
        image_tokens = self._image_tokens(features)
        projection = image_projection(intrinsics, camera_to_volume)
        seen = []
        for plane in self.planes:
            pillars = getattr(self, f"pillars_{plane}")
            fractions, visible = project_points(pillars, projection, image_size, valid_size)
            # a query takes part if any of its points is visible; its invisible ones come along
            seen.append((fractions, visible.any(dim=-1)))
        shared = (self.positional_encoding(), self.plane_shapes, self.self_reference)
        x = torch.cat([self.queries[plane] for plane in self.planes])[None]
        for layer in self.layers:
            x = layer(x, batch, *shared, image_tokens, image_shapes, seen)
        planes = x.split([rows * cols for rows, cols in self.plane_shapes], dim=1)
        shapes = self.plane_shapes
        return [plane.unflatten(1, shape) for plane, shape in zip(planes, shapes, strict=True)]

    def positional_encoding(self) -> Tensor:
        """[T, dim] of all planes, linear in the Fourier features of a node's two coordinates.

        Of x, y and z the earlier comes first. A coordinate is the same along a whole row or column,
        so the linear layer is applied to those instead of to every node.
        """
        out = []
        for plane in self.planes:
            linear = self.position[plane]
            axes = sorted(plane, key=_METRIC.get)
            halves = zip(axes, linear.weight.chunk(2, dim=1), strict=True)
            part = {axis: getattr(self, f"features_{axis}") @ half.mT for axis, half in halves}
            rows, cols = plane
            out.append((part[rows][:, None] + part[cols] + linear.bias).flatten(0, 1))
        return torch.cat(out)

    def _image_tokens(self, features: list[Tensor]) -> Tensor:
        """[B * N, V, dim]: the levels' pixels with their camera's and their level's embedding."""
        tokens = [
            level.flatten(3).mT + (self.camera_embedding[:, None] + embedding)
            for level, embedding in zip(features, self.level_embedding, strict=True)
        ]
        return torch.cat(tokens, dim=2).flatten(0, 1)

    def _pillars(self, plane: str, points: int, box) -> Tensor:
        """[Q, P, 3] metric points of each node along the axis that the plane lacks, end to end."""
        counts = [self.nodes[axis] for axis in plane] + [points]
        fractions = torch.meshgrid(*(torch.linspace(0, 1, n) for n in counts), indexing="ij")
        (other,) = set("hwz") - set(plane)
        metric = torch.empty(*counts, 3)
        for axis, fraction in zip(plane + other, fractions, strict=True):
            k = _METRIC[axis]
            metric[..., k] = box[k] + fraction * (box[k + 3] - box[k])
        return metric.flatten(0, 1)

    def _self_reference(self, points: int, transposed: bool) -> Tensor:
        """[1, T, planes, P, 2]: where the nodes of each plane read each plane.

        A coordinate that the two planes share is the node's own; along the other axis the points
        cover the whole plane. Node i of n of TPV sits at i / n as published, half a cell before its
        centre; that of BEV in the centre, or where published.
        """
        spread = {axis: torch.linspace(0, n - 1, points) / n for axis, n in self.nodes.items()}
        bev = len(self.planes) == 1
        place = {axis: (torch.arange(n) + 0.5 * bev) / n for axis, n in self.nodes.items()}
        if bev and transposed:
            place = {axis: torch.linspace(0, 1, n) for axis, n in self.nodes.items()}
        planes = []
        for plane in self.planes:
            grid = torch.meshgrid(*(place[axis] for axis in plane), indexing="ij")
            grid = [fraction.flatten()[:, None].expand(-1, points) for fraction in grid]
            own = dict(zip(plane, grid, strict=True))  # [Q, P]
            at = {axis: own.get(axis, spread[axis].expand_as(grid[0])) for axis in self.nodes}
            levels = [torch.stack([at[cols], at[rows]], dim=-1) for rows, cols in self.planes]
            planes.append(torch.stack(levels, dim=1))
        reference = torch.cat(planes)[None]
        return reference.flip(-1) if bev and transposed else reference


class EncoderLayer(nn.Module):
    """Self-attention among the planes, attention to the images and an MLP, each before a LayerNorm.

    The tokens of all planes go together, but each plane has its own weights for the images.
    """

    def __init__(self, config: EncoderConfig, levels: int):
        super().__init__()
        dim, heads, planes = config.dim, config.heads, PLANES[config.kind]
        self.self_attention = DeformableAttention(
            dim, heads, len(planes), config.points_self, spread=True
        )
        self.cross = nn.ModuleDict(
            {
                plane: DeformableAttention(dim, heads, levels, points, spread=False)
                for plane, points in zip(planes, config.points_cross, strict=False)
            }
        )
        self.ffn = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(2 * dim, dim)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)
        for linear in (self.ffn[0], self.ffn[3]):
            nn.init.xavier_uniform_(linear.weight)

    def forward(
        self,
        x: Tensor,
        batch: int,
        position: Tensor,
        plane_shapes: list[tuple[int, int]],
        self_reference: Tensor,
        image_tokens: Tensor,
        image_shapes: list[tuple[int, int]],
        seen: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """x [B, T, dim], of the first layer [1, T, dim] for all items -> [B, T, dim].

        Args:
            batch: B.
            position: [T, dim].
            plane_shapes, image_shapes: (rows, cols) of the planes and of the image levels.
            self_reference: [1, T, planes, P, 2].
            image_tokens: [B * N, V, dim].
            seen: fractions [B, N, Q, P, 2] of the images where the points of each plane's queries
                are, and which cameras see a query [B, N, Q].
        """
        attended = self.self_attention(x + position, x, plane_shapes, self_reference)
        x = self.norms[0](x + self.dropout(attended.expand(batch, -1, -1)))
        planes = x.split([rows * cols for rows, cols in plane_shapes], dim=1)
        attended = [
            attention(plane, image_tokens, image_shapes, *there)
            for attention, plane, there in zip(self.cross.values(), planes, seen, strict=True)
        ]
        x = self.norms[1](x + self.dropout(torch.cat(attended, dim=1)))
        return self.norms[2](x + self.dropout(self.ffn(x)))


class DeformableAttention(nn.Module):
    """Each query looks at a few learnt places of multi-level maps (Zhu et al. 2021).

    `spread` starts the p-th point of a head p + 1 pixels away from the reference, instead of one
    pixel for all.
    """

    def __init__(self, dim: int, heads: int, levels: int, points: int, spread: bool):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(dim, heads * levels * points * 2)
        self.weights = nn.Linear(dim, heads * levels * points)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self._init_weights(spread)

    def _init_weights(self, spread: bool) -> None:
        for linear in (self.offsets, self.weights):
            nn.init.zeros_(linear.weight)
        for linear in (self.value, self.output):
            nn.init.xavier_uniform_(linear.weight)
        for linear in (self.weights, self.value, self.output):
            nn.init.zeros_(linear.bias)
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction /= direction.abs().amax(dim=-1, keepdim=True)  # [heads, 2], one a head
        start = direction[:, None, None].repeat(1, self.levels, self.points, 1)
        if spread:
            start *= torch.arange(1, self.points + 1)[:, None]
        with torch.no_grad():
            self.offsets.bias.copy_(start.flatten())

    def forward(
        self,
        queries: Tensor,
        tokens: Tensor,
        level_shapes: list[tuple[int, int]],
        reference_points: Tensor,
        seen: Tensor | None = None,
    ) -> Tensor:
        """Queries [B, Q, dim], tokens [M, V, dim] -> [B, Q, dim].

        The rest as in `kernels.deformable_sampling`.
        """
        sampled = kernels.deformable_attention(
            self.value(tokens).unflatten(-1, (self.heads, -1)),
            level_shapes,
            reference_points,
            queries,
            (self.offsets.weight, self.offsets.bias),
            (self.weights.weight, self.weights.bias),
            seen,
        )
        return self.output(sampled)


def fourier_features(nodes: int, frequencies: int) -> Tensor:
    """[nodes, 2 F]: sin, cos of a pi 2^(k - 1), k < F; a is 0 at the first node, 1 at the last."""
    # arguments up to pi 2^10 would lose four digits in float32
    coordinate = torch.linspace(0, 1, nodes, dtype=torch.float64)
    angles = coordinate[:, None] * math.pi * 2.0 ** (torch.arange(frequencies) - 1)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).float()


def project_points(
    points: Tensor, projection: Tensor, image_size: tuple[int, int], valid_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Metric points [..., 3] -> fractions (x, y) [B, N, ..., 2] of the images, visible [B, N, ...].

    `projection` [B, N, 4, 4] takes homogeneous points to (u d, v d, d, 1), d the z-depth. A point
    is visible if it lies in front of the camera and inside the valid part of the image.
    """
    matrix = projection.to(points).flatten(0, -3)  # float32 as published, and under autocast too
    with torch.autocast(points.device.type, enabled=False):
        projected = move_points(points.flatten(0, -2), matrix)
    depth = projected[..., 2:]
    pixel = projected[..., :2] / depth.clamp_min(1e-5)
    valid = pixel / constant(valid_size[::-1], pixel)
    visible = (depth[..., 0] > 1e-5) & ((valid > 0) & (valid < 1)).all(dim=-1)
    fractions = pixel / constant(image_size[::-1], pixel)
    shape = (*projection.shape[:-2], *points.shape[:-1])
    return fractions.view(*shape, 2), visible.view(shape)
