"""Finite differences between the nodes of a volume, and losses made of them (spec 6 and 11).

Along one axis, with the ends replicated and nodes `step` metres apart:

    (D s)[i] = (s[i+1] - s[i-1]) / (2 step)        halved at the border

Second differences are D of D, or on the diagonal the compact (s[i+1] - 2 s[i] + s[i-1]) / step^2.
Differences along different axes commute.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Spacing = tuple[float, float, float]  # between nodes along x, y and z, metres


class _Difference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, step):
        ctx.dim, ctx.step = dim, step
        return difference(x, dim, step)

    @staticmethod
    def backward(ctx, grad):
        return difference_adjoint(grad, ctx.dim, ctx.step), None, None


def difference(x: Tensor, dim: int, step: float) -> Tensor:
    """D along a dimension of two nodes or more, not differentiable by itself."""
    n = x.shape[dim]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.sub(x.narrow(dim, 2, n - 2), x.narrow(dim, 0, n - 2), out=out.narrow(dim, 1, n - 2))
    torch.sub(x.narrow(dim, 1, 1), x.narrow(dim, 0, 1), out=out.narrow(dim, 0, 1))
    torch.sub(x.narrow(dim, n - 1, 1), x.narrow(dim, n - 2, 1), out=out.narrow(dim, n - 1, 1))
    return out.mul_(0.5 / step)


def difference_adjoint(g: Tensor, dim: int, step: float) -> Tensor:
    """D transposed: the gradient of `difference` with respect to its argument."""
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


def axes(spacing: Spacing) -> list[tuple[int, float]]:
    """Dimension of [..., H, W, Z] and node distance along x, y, z."""
    return list(zip((-2, -3, -1), spacing, strict=True))


def node_gradients(sdf: Tensor, spacing: Spacing) -> Tensor:
    """Central differences with replicated borders: [B, 3, H, W, Z], order x, y, z.

    Args: sdf [B, H, W, Z] in metres; spacing of nodes along x, y, z in metres.
    """
    return torch.stack([_Difference.apply(sdf, dim, step) for dim, step in axes(spacing)], dim=1)


def node_second_differences(sdf: Tensor, spacing: Spacing, compact: bool) -> Tensor:
    """All second differences [B, 3, 3, H, W, Z], axes x, y, z, 1/metre.

    They are differences of differences; `compact` takes the diagonal over adjacent nodes instead.
    """
    gradient = node_gradients(sdf, spacing)
    rows = [node_gradients(g, spacing) for g in gradient.unbind(1)]
    if compact:
        for axis, (dim, step) in enumerate(axes(spacing)):
            diagonal = _SecondDifference.apply(sdf, dim, step)
            rows[axis] = torch.cat(
                [rows[axis][:, :axis], diagonal[:, None], rows[axis][:, axis + 1 :]], dim=1
            )
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
    """Values and gradients in one pass: both need the same differences."""

    @staticmethod
    def forward(ctx, sdf, spacing, compact):
        along = axes(spacing)
        first = [difference(sdf, dim, step) for dim, step in along]
        norm = (first[0].square() + first[1].square()).add_(first[2].square()).sqrt_()
        eikonal = (norm - 1).square().sum()
        factor = torch.where(norm > 0, 2 - 2 / norm, 0.0)
        grad_eikonal = sum(
            difference_adjoint(g * factor, *axis) for g, axis in zip(first, along, strict=True)
        )

        total, grad_hessian = 0.0, torch.zeros_like(grad_eikonal)
        for i, axis in enumerate(along):
            if compact:
                diagonal = _second_difference(sdf, *axis)
                grad_hessian += _second_difference(diagonal.sign(), *axis)
            else:
                diagonal = difference(first[i], *axis)
                grad_hessian += difference_adjoint(
                    difference_adjoint(diagonal.sign(), *axis), *axis
                )
            total = total + diagonal.abs_().sum()
            for other in along[i + 1 :]:  # mixed differences commute, so each stands for two
                mixed = difference(first[i], *other)
                grad_hessian += difference_adjoint(
                    difference_adjoint(mixed.sign(), *other), *axis
                ).mul_(2)
                total = total + 2 * mixed.abs_().sum()
        count = 9 * sdf.numel()
        ctx.save_for_backward(grad_eikonal, grad_hessian.div_(count))
        return eikonal, total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_eikonal, grad_hessian):
        eikonal, hessian = ctx.saved_tensors
        return eikonal * grad_eikonal + hessian * grad_hessian, None, None


def node_losses(sdf: Tensor, spacing: Spacing, compact: bool) -> tuple[Tensor, Tensor]:
    """Eikonal and Hessian terms of all nodes, one second difference in memory at a time.

    Args: sdf [B, H, W, Z]; spacing and `compact` as in `node_second_differences`.
    Returns, both 0-d, the sum of (|gradient| - 1)^2 and the mean absolute second difference.
    """
    return _NodeLosses.apply(sdf, spacing, compact)
