"""Rendering a volume along rays: trilinear samples, alpha from SDF, compositing (spec sections 6, 8 and 9).

For sample i of a ray o + t e, taken at the start t_i of interval [t_i, t_i+1) of length delta_i:

    s, g, f = SDF, its gradient by node differences, features     trilinear at o + t_i e, border outside the box
    alpha_i = NeuS (s, e . g, delta_i)                            or another function of `ALPHAS`
    T_i     = prod_{j<i} (1 - alpha_j + 1e-4),  w_i = alpha_i T_i
    out     = sum_i w_i value_i

The volume is first laid out as a table with one row a node, [SDF, gradient, colours, logits], so that a sample is a sum of
eight rows: `embedding_bag`, several times faster than `grid_sample` on a CPU. Its transpose, needed backward, is the
same operation over the samples sorted by cell. Positions get no gradient. Rays are worked on in chunks that are recomputed
backward, so memory holds per-sample numbers of one chunk and of what the caller keeps.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 1 << 19  # samples worked on at once
EPSILON = 1e-4  # keeps transmittance positive; published value
SH0 = 0.28209479177387814  # spherical harmonic of degree 0, from features to colour

Box = tuple[float, float, float, float, float, float]
Spacing = tuple[float, float, float]


@dataclass
class Rendering:
    """What rays see. Distances are metres along the ray; fields that were not asked for are None."""

    distance: Tensor  # [B, R] expected distance, sum w t_mid / (sum w + 1e-10)
    opacity: Tensor  # [B, R] sum of the weights
    color: Tensor  # [B, R, colours] composited foreground, no background
    semantics: Tensor | None = None  # [B, R, classes] composited softmax
    normal: Tensor | None = None  # [B, R, 3] unit
    weights: Tensor | None = None  # [B, R, S]
    mids: Tensor | None = None  # [B, R, S] distance of the interval middles, the depth proposals
    deltas: Tensor | None = None  # [B, R, S] interval lengths
    sdf: Tensor | None = None  # [B, R, S]
    eikonal: Tensor | None = None  # [B, R] sum over the samples of (|gradient| - 1)^2


def render_rays(
    volume: Tensor,
    origins: Tensor,
    directions: Tensor,
    near: Tensor,
    far: Tensor,
    inv_s: Tensor,
    *,
    box: Box,
    samples: int,
    jitter: Tensor | None = None,
    anneal: float = 1.0,
    alpha: str = "neus",
    classes: int = 0,
    keep_samples: bool = False,
    normals: bool = False,
) -> Rendering:
    """Composite the volume along rays (spec sections 8 and 9). See `kernels.render_rays`."""
    batch, channels, *nodes = volume.shape
    colors = channels - 1 - classes
    table = _NodeTable.apply(volume, _spacing(box, nodes), colors)
    march = _March(tuple(nodes), box, samples, anneal, ALPHAS[alpha], (colors, classes), keep_samples, normals)

    item = torch.arange(batch, dtype=torch.int32, device=volume.device) * (table.shape[0] // batch)
    item = item[:, None].expand(near.shape)
    rays = [origins, directions, near, far, item] + ([] if jitter is None else [jitter])
    rays = [x.flatten(0, 1) for x in rays]
    count = max(1, CHUNK // samples)
    pieces = zip(*(x.split(count) for x in rays), strict=True)
    if near.numel() <= count or not torch.is_grad_enabled():
        chunks = [march(table, inv_s, *piece) for piece in pieces]
    else:
        chunks = [
            checkpoint(march, table, inv_s, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces
        ]
    merged = {
        name: torch.cat([chunk[name] for chunk in chunks]).unflatten(0, near.shape) for name in chunks[0]
    }
    return Rendering(**merged)


def _spacing(box: Box, nodes) -> Spacing:
    height, width, depth = nodes
    return tuple((box[a + 3] - box[a]) / (n - 1) for a, n in enumerate((width, height, depth)))


# ---------------------------------------------------------------------------------------------------------------------
# From density to alpha. A function of the SDF (or raw channel 0), the cosine e . gradient, the interval length and the
# learnt sharpness; this is the place to try another one.


def neus_alpha(sdf: Tensor, cosine: Tensor, delta: Tensor, inv_s: Tensor, anneal: float) -> Tensor:
    """NeuS opacity with annealed cosine (spec section 9; Wang et al. 2021, eq. 13)."""
    half = F.relu(-cosine) if anneal == 1.0 else F.relu(0.5 - 0.5 * cosine) * (1 - anneal) + F.relu(-cosine) * anneal
    half = half * (0.5 * delta)
    before = torch.sigmoid((sdf + half) * inv_s)
    after = torch.sigmoid((sdf - half) * inv_s)
    return ((before - after + 1e-5) / (before + 1e-5)).clamp(0.0, 1.0)


def volsdf_alpha(sdf: Tensor, cosine: Tensor, delta: Tensor, inv_s: Tensor, anneal: float) -> Tensor:
    """Opacity of the density inv_s * Laplace CDF(-sdf), scale 1 / inv_s (VolSDF, Yariv et al. 2021, eq. 2)."""
    tail = 0.5 * torch.exp(-sdf.abs() * inv_s)
    return -torch.expm1(-delta * inv_s * torch.where(sdf > 0, tail, 1 - tail))


def density_alpha(sdf: Tensor, cosine: Tensor, delta: Tensor, inv_s: Tensor, anneal: float) -> Tensor:
    """Opacity of the density softplus(-channel 0), in 1/metre: the paper's arm without SDF (section 4.4)."""
    return -torch.expm1(-delta * F.softplus(-sdf))


ALPHAS: dict[str, Callable[..., Tensor]] = {"neus": neus_alpha, "volsdf": volsdf_alpha, "density": density_alpha}


# ---------------------------------------------------------------------------------------------------------------------
# Compositing


class _Weights(torch.autograd.Function):
    """alpha [..., S] -> weights [..., S] and the transmittance left [...]."""

    @staticmethod
    def forward(ctx, alpha):
        through = torch.cumprod((1 - alpha).add_(EPSILON), dim=-1)
        weights = alpha.clone()
        weights[..., 1:] *= through[..., :-1]
        ctx.save_for_backward(alpha, through, weights)
        return weights, through[..., -1].clone()

    @staticmethod
    def backward(ctx, grad, grad_left):
        alpha, through, weights = ctx.saved_tensors
        # d w_j / d alpha_i = -w_j / (1 - alpha_i + eps) for j > i, so every sample needs the sum over those behind it.
        behind = (weights * grad).flip(-1).cumsum(-1).flip(-1)
        behind = torch.cat([behind[..., 1:], torch.zeros_like(behind[..., :1])], dim=-1)
        behind += (through[..., -1] * grad_left)[..., None]
        result = grad - 0
        result[..., 1:] *= through[..., :-1]
        return result.addcdiv_(behind, (1 - alpha).add_(EPSILON), value=-1)


def composite(alpha: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Front-to-back compositing (spec section 9).

    Args: alpha [..., S] opacities in [0, 1]; values [..., S, K].
    Returns weights [..., S]; transmittance [...] behind the last sample; sums [..., K].
    """
    weights, left = _Weights.apply(alpha)
    return weights, left, (weights[..., None, :] @ values)[..., 0, :]


# ---------------------------------------------------------------------------------------------------------------------
# Marching


@dataclass(frozen=True)
class _March:
    """Everything about a rendering that is the same for all its rays; called with a chunk of them."""

    nodes: tuple[int, int, int]
    box: Box
    samples: int
    anneal: float
    alpha: Callable[..., Tensor]
    widths: tuple[int, int]  # colours, classes
    keep_samples: bool
    normals: bool

    def __call__(self, table, inv_s, origins, directions, near, far, item, jitter=None) -> dict[str, Tensor]:
        start, delta, mid = self._intervals(near, far, jitter)
        cell, fraction = self._cells(origins, directions, start, item)
        geometry, features = _Interpolate.apply(table, cell, fraction, self.nodes)
        sdf, *gradient = geometry.unflatten(1, start.shape).unbind(0)
        color, logits = features.unflatten(0, start.shape).split(self.widths, dim=-1)
        x, y, z = directions.unsqueeze(-1).unbind(-2)
        cosine = torch.addcmul(torch.addcmul(gradient[0] * x, gradient[1], y), gradient[2], z)
        alpha = self.alpha(sdf, cosine, delta, inv_s, self.anneal)
        weights, _, color = composite(alpha, F.relu(color))

        opacity = weights.sum(-1)
        out = dict(distance=(weights * mid).sum(-1) / (opacity + 1e-10), opacity=opacity, color=color)
        if self.widths[1]:
            out["semantics"] = (weights[:, None] @ logits.softmax(-1))[:, 0]
        if self.normals or self.keep_samples:
            squares = gradient[0].square() + gradient[1].square() + gradient[2].square()
            norm = torch.sqrt(squares + torch.finfo(squares.dtype).tiny)  # differentiable at zero
        if self.normals:
            unit = torch.stack(gradient, dim=-1) / norm.clamp_min(1e-12)[..., None]
            out["normal"] = F.normalize((weights[:, None] @ unit)[:, 0], dim=-1)
        if self.keep_samples:
            out |= dict(weights=weights, mids=mid, deltas=delta, sdf=sdf, eikonal=(norm - 1).square().sum(-1))
        return out

    def _intervals(self, near, far, jitter) -> tuple[Tensor, Tensor, Tensor]:
        """Start, length and middle [R, S] of the intervals; jitter [R] moves all edges of a ray (spec section 8)."""
        edges = torch.linspace(0, 1, self.samples + 1, dtype=near.dtype, device=near.device)
        if jitter is not None:
            middle = (edges[1:] + edges[:-1]) / 2
            lower, upper = torch.cat([edges[:1], middle]), torch.cat([middle, edges[-1:]])
            edges = lower + (upper - lower) * jitter[:, None]
        t = edges * far[:, None] + (1 - edges) * near[:, None]
        start, end = t[:, :-1], t[:, 1:]
        return start, end - start, (start + end) / 2

    def _cells(self, origins, directions, t, item) -> tuple[Tensor, Tensor]:
        """Lowest node of the cell each sample is in, int32 [M], and the place in that cell [3, M] along y, x, z."""
        cell, fraction = item[:, None], torch.empty(3, *t.shape, dtype=t.dtype, device=t.device)
        height, width, depth = self.nodes
        for k, (axis, n, stride) in enumerate(((1, height, width * depth), (0, width, depth), (2, depth, 1))):
            scale = (n - 1) / (self.box[axis + 3] - self.box[axis])
            offset = (origins[:, axis, None] - self.box[axis]) * scale
            place = torch.addcmul(offset, directions[:, axis, None] * scale, t)
            place = place.nan_to_num_(0.0).clamp_(0, n - 1)  # an invalid ray must not read beside the table
            index = place.int().clamp_(max=n - 2)
            torch.sub(place, index, out=fraction[k])
            cell = cell + index * stride
        return cell.flatten(), fraction.flatten(1)


class _Interpolate(torch.autograd.Function):
    """Trilinear interpolation of table [nodes, K] in cells [M] at fractions [3, M] (y, x, z).

    Returns the first four columns as rows [4, M], the layout that arithmetic wants, and the others [M, K - 4].
    """

    @staticmethod
    def forward(ctx, table, cell, fraction, nodes):
        ctx.save_for_backward(cell, fraction)
        ctx.nodes, ctx.table = nodes, table.shape
        weights = table.new_empty(cell.shape[0], 8)
        for k, weight in enumerate(_corner_weights(fraction)):
            weights[:, k] = weight
        corners = torch.tensor(_corner_offsets(nodes), dtype=torch.int32, device=table.device)
        out = F.embedding_bag(cell[:, None] + corners, table, per_sample_weights=weights, mode="sum")
        return out[:, :4].t().contiguous(), out[:, 4:]

    @staticmethod
    def backward(ctx, grad_geometry, grad_features):
        cell, fraction = ctx.saved_tensors
        rows, columns = ctx.table
        grad = grad_geometry.new_empty(cell.shape[0], columns)
        grad[:, :4] = grad_geometry.t()
        grad[:, 4:] = grad_features

        cell, order = cell.sort()
        starts = torch.arange(rows + 1, dtype=torch.int32, device=cell.device)
        starts = torch.searchsorted(cell, starts, out_int32=True)
        order = order.int()
        fraction = fraction.index_select(1, order)
        result = grad.new_zeros(rows, columns)
        for offset, weight in zip(_corner_offsets(ctx.nodes), _corner_weights(fraction), strict=True):
            part = F.embedding_bag(
                order, grad, starts, per_sample_weights=weight, mode="sum", include_last_offset=True
            )
            result[offset:] += part[: rows - offset]
        return result, None, None, None


def _corner_offsets(nodes) -> list[int]:
    """Rows from a cell's lowest node to its eight corners; the last axis (z) changes fastest."""
    _, width, depth = nodes
    return [y * width * depth + x * depth + z for y in (0, 1) for x in (0, 1) for z in (0, 1)]


def _corner_weights(fraction: Tensor):
    """Trilinear weights [M] of the eight corners, one after the other."""
    y, x, z = fraction
    for side in (1 - y, y):
        right = side * x
        for edge in (side - right, right):
            above = edge * z
            yield edge - above
            yield above


# ---------------------------------------------------------------------------------------------------------------------
# Finite differences between nodes


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
        for k, axis in enumerate(_axes(spacing)):
            table[..., 1 + k] = _difference(sdf, *axis)
        table[..., 4:] = rows[..., 1:]
        table[..., 4 : 4 + colors].mul_(SH0).add_(0.5)
        return table.flatten(0, 3)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.unflatten(0, ctx.shape)
        rows = grad.new_empty(*ctx.shape, grad.shape[-1] - 3)
        sdf = grad[..., 0].contiguous()
        for k, axis in enumerate(_axes(ctx.spacing)):
            sdf += _difference_adjoint(grad[..., 1 + k].contiguous(), *axis)
        rows[..., 0] = sdf
        rows[..., 1:] = grad[..., 4:]
        rows[..., 1 : 1 + ctx.colors] *= SH0
        return rows.permute(0, 4, 1, 2, 3), None, None


class _Difference(torch.autograd.Function):
    """Central difference along one dimension with replicated ends, divided by two steps."""

    @staticmethod
    def forward(ctx, x, dim, step):
        ctx.dim, ctx.step = dim, step
        return _difference(x, dim, step)

    @staticmethod
    def backward(ctx, grad):
        return _difference_adjoint(grad, ctx.dim, ctx.step), None, None


def _difference(x: Tensor, dim: int, step: float) -> Tensor:
    n = x.shape[dim]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.sub(x.narrow(dim, 2, n - 2), x.narrow(dim, 0, n - 2), out=out.narrow(dim, 1, n - 2))
    torch.sub(x.narrow(dim, 1, 1), x.narrow(dim, 0, 1), out=out.narrow(dim, 0, 1))
    torch.sub(x.narrow(dim, n - 1, 1), x.narrow(dim, n - 2, 1), out=out.narrow(dim, n - 1, 1))
    return out.mul_(0.5 / step)


def _difference_adjoint(g: Tensor, dim: int, step: float) -> Tensor:
    n = g.shape[dim]
    out = torch.empty_like(g, memory_format=torch.contiguous_format)
    torch.sub(g.narrow(dim, 0, n - 2), g.narrow(dim, 2, n - 2), out=out.narrow(dim, 1, n - 2))
    torch.add(g.narrow(dim, 0, 1), g.narrow(dim, 1, 1), out=out.narrow(dim, 0, 1)).neg_()
    torch.add(g.narrow(dim, n - 2, 1), g.narrow(dim, n - 1, 1), out=out.narrow(dim, n - 1, 1))
    return out.mul_(0.5 / step)


def _second_difference(x: Tensor, dim: int, step: float) -> Tensor:
    """(x[i+1] - 2 x[i] + x[i-1]) / step^2 with replicated ends: its own adjoint."""
    n = x.shape[dim]
    slope = x.narrow(dim, 1, n - 1) - x.narrow(dim, 0, n - 1)
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    out.narrow(dim, 0, n - 1).add_(slope)
    out.narrow(dim, 1, n - 1).sub_(slope)
    return out.mul_(1 / step**2)


def _axes(spacing: Spacing) -> list[tuple[int, float]]:
    """Dimension of [..., H, W, Z] and node distance along x, y, z."""
    return list(zip((-2, -3, -1), spacing, strict=True))


def node_gradients(sdf: Tensor, spacing: Spacing) -> Tensor:
    """Central differences of nodes with replicated borders (spec section 6), so halved at the border.

    Args: sdf [B, H, W, Z]; spacing of nodes along x, y, z in metres. Returns [B, 3, H, W, Z] in the order x, y, z.
    """
    return torch.stack([_Difference.apply(sdf, dim, step) for dim, step in _axes(spacing)], dim=1)


def node_second_differences(sdf: Tensor, spacing: Spacing, compact: bool) -> Tensor:
    """All second differences [B, 3, 3, H, W, Z] (axes x, y, z), 1/metre (spec section 6).

    They are differences of differences; `compact` takes the diagonal over neighbouring nodes instead.
    """
    gradient = node_gradients(sdf, spacing)
    rows = [node_gradients(g, spacing) for g in gradient.unbind(1)]
    if compact:
        for axis, (dim, step) in enumerate(_axes(spacing)):
            diagonal = _SecondDifference.apply(sdf, dim, step)
            rows[axis] = torch.cat([rows[axis][:, :axis], diagonal[:, None], rows[axis][:, axis + 1 :]], dim=1)
    return torch.stack(rows, dim=1)


class _SecondDifference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, step):
        ctx.dim, ctx.step = dim, step
        return _second_difference(x, dim, step)

    @staticmethod
    def backward(ctx, grad):
        return _second_difference(grad, ctx.dim, ctx.step), None, None


class _NodeLosses(torch.autograd.Function):
    """Values and gradients in one pass, since both are sums over nodes."""

    @staticmethod
    def forward(ctx, sdf, spacing, compact):
        axes = _axes(spacing)
        first = [_difference(sdf, dim, step) for dim, step in axes]
        norm = (first[0].square() + first[1].square()).add_(first[2].square()).sqrt_()
        eikonal = (norm - 1).square().sum()
        factor = torch.where(norm > 0, 2 - 2 / norm, 0.0)
        grad_eikonal = sum(_difference_adjoint(g * factor, *axis) for g, axis in zip(first, axes, strict=True))

        total, grad_hessian = 0.0, torch.zeros_like(grad_eikonal)
        for i, axis in enumerate(axes):
            if compact:
                diagonal = _second_difference(sdf, *axis)
                grad_hessian += _second_difference(diagonal.sign(), *axis)
            else:
                diagonal = _difference(first[i], *axis)
                grad_hessian += _difference_adjoint(_difference_adjoint(diagonal.sign(), *axis), *axis)
            total = total + diagonal.abs_().sum()
            for other in axes[i + 1 :]:  # mixed differences commute, so each stands for two
                mixed = _difference(first[i], *other)
                grad_hessian += _difference_adjoint(_difference_adjoint(mixed.sign(), *other), *axis).mul_(2)
                total = total + 2 * mixed.abs_().sum()
        count = 9 * sdf.numel()
        ctx.save_for_backward(grad_eikonal, grad_hessian.div_(count))
        return eikonal, total / count

    @staticmethod
    def backward(ctx, grad_eikonal, grad_hessian):
        eikonal, hessian = ctx.saved_tensors
        return eikonal * grad_eikonal + hessian * grad_hessian, None, None


def node_losses(sdf: Tensor, spacing: Spacing, compact: bool) -> tuple[Tensor, Tensor]:
    """Eikonal and Hessian terms of all nodes, without holding all second differences (spec sections 6 and 11).

    Args: sdf [B, H, W, Z]; spacing and `compact` as in `node_second_differences`.
    Returns the sum of (|gradient| - 1)^2 over nodes, and the mean absolute second difference, both 0-d.
    """
    return _NodeLosses.apply(sdf, spacing, compact)
