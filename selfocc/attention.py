"""Deformable attention, and the encoder layer made of it (spec section 4)."""

import math

import torch
from torch import Tensor, nn

from kernels.deformable import deformable_sampling


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
        pairs: Tensor | None = None,
    ) -> Tensor:
        """queries [B, Q, dim], tokens [M, V, dim] -> [B, Q, dim]; else as `deformable_sampling`."""
        shape = (self.heads, self.levels, self.points)
        sampled = deformable_sampling(
            self.value(tokens).unflatten(-1, (self.heads, -1)),
            level_shapes,
            reference_points,
            self.offsets(queries).unflatten(-1, (*shape, 2)),
            self.weights(queries).unflatten(-1, (self.heads, -1)),
            pairs,
        )
        return self.output(sampled)


class EncoderLayer(nn.Module):
    """Self-attention among the planes, attention to the images and an MLP, each before a LayerNorm.

    The tokens of all planes go together, but each plane has its own weights for the images.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        levels: int,
        points_cross: dict[str, int],
        points_self: int,
        dropout: float,
    ):
        super().__init__()
        self.self_attention = DeformableAttention(
            dim, heads, len(points_cross), points_self, spread=True
        )
        self.cross = nn.ModuleDict(
            {
                plane: DeformableAttention(dim, heads, levels, p, spread=False)
                for plane, p in points_cross.items()
            }
        )
        self.ffn = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(2 * dim, dim)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        for linear in (self.ffn[0], self.ffn[3]):
            nn.init.xavier_uniform_(linear.weight)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        plane_shapes: list[tuple[int, int]],
        self_reference: Tensor,
        image_tokens: Tensor,
        image_shapes: list[tuple[int, int]],
        visible: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """x [B, T, dim] -> the same.

        Args:
            position: [T, dim].
            plane_shapes, image_shapes: (rows, cols) of the planes and of the image levels.
            self_reference: [1, T, planes, P, 2].
            image_tokens: [B * N, V, dim].
            visible: what `visible_pairs` gives for each plane.
        """
        attended = self.self_attention(x + position, x, plane_shapes, self_reference)
        x = self.norms[0](x + self.dropout(attended))
        planes = x.split([rows * cols for rows, cols in plane_shapes], dim=1)
        attended = [
            attention(plane, image_tokens, image_shapes, reference, pairs)
            for attention, plane, (pairs, reference) in zip(
                self.cross.values(), planes, visible, strict=True
            )
        ]
        x = self.norms[1](x + self.dropout(torch.cat(attended, dim=1)))
        return self.norms[2](x + self.dropout(self.ffn(x)))
