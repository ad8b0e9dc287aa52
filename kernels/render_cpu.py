"""The plain-PyTorch reference of `render_rays`, fast on a CPU.

The volume is first laid out as a table with one row a node, [SDF, gradient, colours, logits], whose
rows are interpolated (trilinear.py). Positions get no gradient. Long lists of rays are walked in
chunks that backward computes again, so that memory holds the samples of one chunk and what the
caller keeps.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from kernels.alpha import ALPHAS, Knobs
from kernels.composite import EPSILON, Weights
from kernels.node_losses import Spacing, axes, difference, difference_adjoint
from kernels.trilinear import Trilinear, cells

CHUNK = 1 << 20  # samples worked on at once
SH0 = 0.28209479177387814  # spherical harmonic of degree 0, from features to colour

Box = tuple[float, float, float, float, float, float]


class Options(NamedTuple):
    """What of a rendering is not a tensor; as in `kernels.render_rays` and `render_photometric`."""

    box: list[float]
    samples: int
    knobs: list[float]
    alpha: str
    classes: int
    backdrop: bool
    stop_below: float = 0.0
    keep_samples: bool = False
    combine: bool = False
    published_pixels: bool = False
    bend: float = 0.0
    read: float = 0.0


def render_reference(
    volume: Tensor, inv_s: Tensor, rays: list[Tensor], options: Options
) -> dict[str, Tensor]:
    """The fields of a `Rendering` by name; rays: origins, directions, near, far, maybe jitter."""
    batch, channels, *nodes = volume.shape
    table = _NodeTable.apply(
        volume, node_spacing(options.box, nodes), channels - 1 - options.classes
    )
    march, near = _March(tuple(nodes), options), rays[2]
    item = torch.arange(batch, dtype=torch.int32, device=volume.device) * math.prod(nodes)
    item = item[:, None].expand(near.shape)
    rays = [x.detach().flatten(0, 1) for x in (item, *rays)]
    count = max(1, CHUNK // options.samples)
    pieces = zip(*(x.split(count) for x in rays), strict=True)
    if near.numel() <= count or not torch.is_grad_enabled():
        chunks = [march(table, inv_s, *piece) for piece in pieces]
    else:
        chunks = [
            checkpoint(march, table, inv_s, *piece, use_reentrant=False, preserve_rng_state=False)
            for piece in pieces
        ]
    return {
        name: torch.cat([chunk[name] for chunk in chunks]).unflatten(0, near.shape)
        for name in chunks[0]
    }


def node_spacing(box: Box, nodes) -> Spacing:
    """Metres between nodes along x, y and z; nodes [H, W, Z]."""
    height, width, depth = nodes
    return tuple((box[a + 3] - box[a]) / (n - 1) for a, n in enumerate((width, height, depth)))


@dataclass(frozen=True)
class _March:
    """What is the same for all rays of a rendering; called with a chunk of them."""

    nodes: tuple[int, int, int]
    options: Options

    def __call__(
        self, table, inv_s, item, origins, directions, near, far, jitter=None
    ) -> dict[str, Tensor]:
        options = self.options
        read, delta, mid = self._intervals(near, far, jitter)
        cell, fraction = self._cells(origins, directions, read, item)
        rows = Trilinear.apply(table, cell, fraction, self.nodes)
        geometry, features = rows.unflatten(0, read.shape).tensor_split([4], dim=-1)
        # by columns, the layout that arithmetic wants
        sdf, *gradient = geometry.movedim(-1, 0).contiguous().unbind(0)
        color, logits = features.tensor_split([features.shape[-1] - options.classes], dim=-1)
        x, y, z = directions.unsqueeze(-1).unbind(-2)
        cosine = torch.addcmul(torch.addcmul(gradient[0] * x, gradient[1], y), gradient[2], z)
        opaque = ALPHAS[options.alpha].reference
        alpha = opaque(sdf, cosine, delta, inv_s, Knobs(*options.knobs))
        if options.backdrop:
            alpha = torch.cat([alpha[..., :-1], torch.ones_like(alpha[..., :1])], dim=-1)
        weights, _ = Weights.apply(alpha)
        if options.stop_below > 0:
            passed = torch.cumprod((1 - alpha.detach()).add_(EPSILON), dim=-1)
            reaches = torch.cat([torch.ones_like(passed[:, :1]), passed[:, :-1]], dim=-1)
            weights = torch.where(reaches > options.stop_below, weights, 0.0)

        color = (weights[:, None] @ F.relu(color))[:, 0]
        opacity = weights.sum(-1)
        distance = (weights * mid).sum(-1) / (opacity + 1e-10)
        out = dict(distance=distance, opacity=opacity, color=color)
        if options.classes:
            out["semantics"] = (weights[:, None] @ logits.softmax(-1))[:, 0]
        if options.keep_samples:
            squares = gradient[0].square() + gradient[1].square() + gradient[2].square()
            norm = torch.sqrt(squares + torch.finfo(squares.dtype).tiny)  # differentiable at zero
            out |= dict(weights=weights, mids=mid, deltas=delta, sdf=sdf)
            out["eikonal"] = (norm - 1).square().sum(-1)
        return out

    def _intervals(self, near, far, jitter) -> tuple[Tensor, Tensor, Tensor]:
        """Where intervals are read, their length and middle [R, S]; jitter [R] shifts those of a
        ray.
        """
        edges = torch.linspace(0, 1, self.options.samples + 1, dtype=near.dtype, device=near.device)
        if jitter is not None:
            middle = (edges[1:] + edges[:-1]) / 2
            lower, upper = torch.cat([edges[:1], middle]), torch.cat([middle, edges[-1:]])
            edges = lower + (upper - lower) * jitter[:, None]
        if self.options.bend:
            edges = edges * (1 + self.options.bend * (edges - 1))
        t = edges * far[:, None] + (1 - edges) * near[:, None]
        start, end = t[:, :-1], t[:, 1:]
        read = torch.lerp(start, end, self.options.read) if self.options.read else start
        return read, end - start, (start + end) / 2

    def _cells(self, origins, directions, t, item) -> tuple[Tensor, Tensor]:
        """`trilinear.cells` of the samples."""
        (height, width, depth), box, places = self.nodes, self.options.box, []
        for axis, n in ((1, height), (0, width), (2, depth)):
            scale = (n - 1) / (box[axis + 3] - box[axis])
            offset = (origins[:, axis, None] - box[axis]) * scale
            places.append(torch.addcmul(offset, directions[:, axis, None] * scale, t))
        return cells(places, self.nodes, item[:, None])


class _NodeTable(torch.autograd.Function):
    """One row a node, [B * H * W * Z, K]: SDF, its gradient (x, y, z), colours, the other channels.

    Colours are stored as SH0 * feature + 0.5, since an affine map commutes with interpolation.
    """

    @staticmethod
    def forward(ctx, volume, spacing, colors):
        rows = volume.permute(0, 2, 3, 4, 1)
        ctx.spacing, ctx.colors, ctx.shape = spacing, colors, rows.shape[:-1]
        table = rows.new_empty(*rows.shape[:-1], rows.shape[-1] + 3)
        table[..., 0] = rows[..., 0]
        sdf = rows[..., 0].contiguous()
        for k, axis in enumerate(axes(spacing)):
            table[..., 1 + k] = difference(sdf, *axis)
        table[..., 4:] = rows[..., 1:]
        table[..., 4 : 4 + colors].mul_(SH0).add_(0.5)
        return table.flatten(0, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad.unflatten(0, ctx.shape)
        rows = grad.new_empty(*ctx.shape, grad.shape[-1] - 3)
        sdf = grad[..., 0].contiguous()
        for k, axis in enumerate(axes(ctx.spacing)):
            sdf += difference_adjoint(grad[..., 1 + k].contiguous(), *axis)
        rows[..., 0] = sdf
        rows[..., 1:] = grad[..., 4:]
        rows[..., 1 : 1 + ctx.colors] *= SH0
        return rows.permute(0, 4, 1, 2, 3), None, None
