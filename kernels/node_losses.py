"""Finite differences between the nodes of a volume, and SelfOcc's eikonal and Hessian losses.

Along one axis, with the ends replicated and nodes `step` metres apart:

    (D s)[i] = (s[i+1] - s[i-1]) / (2 step)        halved at the border

Second differences are D of D, or on the diagonal the compact (s[i+1] - 2 s[i] + s[i-1]) / step^2.
Differences along different axes commute. The transpose of D reads its neighbours, too:

    (D' u)[i] = (+-u[i-1] -+ u[i+1]) / (2 step)    a neighbour beyond the border is u[i] negated

so that all kernels here are gathers: no atomics, nothing kept for backward but the volume itself.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.checks import at_least_float32, check
from kernels.dispatch import launch, tl, triton, use_triton
from kernels.ray import pack

# Nodes a program and warps: four nodes a lane in the copies, one where many neighbours are read.
COPY, LOSSES, WARPS = 512, 128, 4

Spacing = tuple[float, float, float]  # between nodes along x, y and z, metres


def difference(x: Tensor, dim: int, step: float) -> Tensor:
    """D along a dimension of two nodes or more."""
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
        count = max(1, 9 * sdf.numel())
        ctx.save_for_backward(grad_eikonal, grad_hessian.div_(count))
        return eikonal, total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_eikonal, grad_hessian):
        eikonal, hessian = ctx.saved_tensors
        return eikonal * grad_eikonal + hessian * grad_hessian, None, None


# -----------------------------------------------------------------------------------------------
# Reading nodes in Triton. A node is (y, x, z).


class Lattice(NamedTuple):
    """Nodes along each axis, and how far items and neighbours are apart in memory."""

    height: int
    width: int
    depth: int
    item: int
    y: int
    x: int
    z: int


@triton.jit
def _mine(LATTICE: tl.constexpr, BLOCK: tl.constexpr):
    """Item and nodes [1, BLOCK] of a program, and which of them there are."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = index < LATTICE.height * LATTICE.width * LATTICE.depth
    at = tl.where(mask, index, 0)
    row = at // LATTICE.depth
    node = (row // LATTICE.width, row % LATTICE.width, at % LATTICE.depth)
    return tl.program_id(1).to(tl.int64), node, mask


@triton.jit
def _inside(i, COUNT: tl.constexpr):
    return tl.minimum(tl.maximum(i, 0), COUNT - 1)


@triton.jit
def _neighbour(node, LATTICE: tl.constexpr, AXIS: tl.constexpr, STEP: tl.constexpr):
    """The node STEP (1 or -1) further along an axis (0 x, 1 y, 2 z), itself at the border, and the
    sign with which the transpose of D takes it.
    """
    y, x, z = node
    if AXIS == 0:
        place, count = x + STEP, LATTICE.width
        x = _inside(place, count)
    elif AXIS == 1:
        place, count = y + STEP, LATTICE.height
        y = _inside(place, count)
    else:
        place, count = z + STEP, LATTICE.depth
        z = _inside(place, count)
    there = (place >= 0) & (place < count)
    return (y, x, z), tl.where(there, -1.0 * STEP, 1.0 * STEP)


@triton.jit
def _at(field, node, LATTICE: tl.constexpr):
    y, x, z = node
    return field + (y * LATTICE.y + x * LATTICE.x + z * LATTICE.z)


@triton.jit
def _read(field, node, LATTICE: tl.constexpr):
    return tl.load(_at(field, node, LATTICE)).to(tl.float32)


@triton.jit
def _slope(sdf, node, LATTICE: tl.constexpr, AXIS: tl.constexpr):
    """2 step D along an axis."""
    upper, _ = _neighbour(node, LATTICE, AXIS, 1)
    lower, _ = _neighbour(node, LATTICE, AXIS, -1)
    return _read(sdf, upper, LATTICE) - _read(sdf, lower, LATTICE)


@triton.jit
def _slopes(sdf, node, half, LATTICE: tl.constexpr):
    """The gradient, x, y, z."""
    return (
        half[0] * _slope(sdf, node, LATTICE, 0),
        half[1] * _slope(sdf, node, LATTICE, 1),
        half[2] * _slope(sdf, node, LATTICE, 2),
    )


@triton.jit
def _bend(
    sdf, node, LATTICE: tl.constexpr, AXIS: tl.constexpr, OTHER: tl.constexpr, COMPACT: tl.constexpr
):
    """The second difference along two axes, without its factor."""
    upper, _ = _neighbour(node, LATTICE, OTHER, 1)
    lower, _ = _neighbour(node, LATTICE, OTHER, -1)
    if COMPACT and AXIS == OTHER:
        here = _read(sdf, node, LATTICE)
        out = (_read(sdf, upper, LATTICE) - here) - (here - _read(sdf, lower, LATTICE))
    else:
        out = _slope(sdf, upper, LATTICE, AXIS) - _slope(sdf, lower, LATTICE, AXIS)
    return out


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))  # NaN stays


# -----------------------------------------------------------------------------------------------
# The table of SDF and gradients that rays read, and its transpose


@triton.jit
def node_table_forward(
    sdf, table, half, SDF: tl.constexpr, TABLE: tl.constexpr, BLOCK: tl.constexpr
):
    """sdf [B, H, W, Z] -> rows [B, H, W, Z, 4]: SDF and its gradient; both of any strides.

    half: 1 / (2 step) along x, y, z.
    """
    item, node, mask = _mine(SDF, BLOCK)
    sdf += item * SDF.item
    by_x, by_y, by_z = _slopes(sdf, node, half, SDF)
    row = pack(_read(sdf, node, SDF), by_x, by_y, by_z)
    rows = _at(table + item * TABLE.item, node, TABLE)
    tl.store(rows[:, :, None] + tl.arange(0, 4)[None, None, :], row, mask[:, :, None])


@triton.jit
def node_table_backward(
    table, sdf, half, SDF: tl.constexpr, TABLE: tl.constexpr, BLOCK: tl.constexpr
):
    """The gradient of the SDF, given that of the table."""
    item, node, mask = _mine(SDF, BLOCK)
    table += item * TABLE.item
    out = tl.load(_at(table, node, TABLE))
    for axis in tl.static_range(3):
        for side in tl.static_range(2):
            there, sign = _neighbour(node, SDF, axis, 2 * side - 1)
            out += half[axis] * sign * tl.load(_at(table, there, TABLE) + (1 + axis))
    tl.store(_at(sdf + item * SDF.item, node, SDF), out, mask)


def node_table(volume: Tensor, spacing: Spacing) -> Tensor:
    """[B, H, W, Z, 4], float32: channel 0 of a volume [B, C, H, W, Z] and its gradient x, y, z."""
    batch, _, *nodes = volume.shape
    table = volume.new_empty(batch, *nodes, 4, dtype=torch.float32)
    launch(node_table_forward, **_table(volume, table, spacing))
    return table


def node_table_adjoint(table: Tensor, spacing: Spacing, grad_volume: Tensor) -> None:
    """Writes into channel 0 of grad_volume the gradient of the SDF, given that of its table."""
    launch(node_table_backward, **_table(grad_volume, table, spacing))


def _table(volume: Tensor, table: Tensor, spacing: Spacing) -> dict[str, object]:
    """What both launches are told."""
    sdf = volume[:, 0]
    told = dict(sdf=sdf, table=table, SDF=_lattice(sdf), TABLE=_lattice(table[..., 0]))
    return told | _grid(sdf, spacing, COPY)


def _lattice(sdf: Tensor) -> Lattice:
    """As constants divisions become multiplications, and aligned rows are read as such."""
    return Lattice(*sdf.shape[1:], *sdf.stride())


def _grid(sdf: Tensor, spacing: Spacing, block: int) -> dict[str, object]:
    """Of a launch over the nodes of [B, H, W, Z], `block` of them a program."""
    return dict(
        grid=(triton.cdiv(sdf.shape[1:].numel(), block), len(sdf)),
        half=tuple(0.5 / step for step in spacing),
        BLOCK=block,
        warps=WARPS,
    )


# -----------------------------------------------------------------------------------------------
# Losses of all nodes


@triton.jit
def node_losses_forward(
    sdf, partial, half, SDF: tl.constexpr, COMPACT: tl.constexpr, BLOCK: tl.constexpr
):
    """sdf [B, H, W, Z] -> partial [2, programs]: sums of (|gradient| - 1)^2 and of all |second
    differences|.
    """
    item, node, mask = _mine(SDF, BLOCK)
    sdf += item * SDF.item
    squares, total = tl.zeros([1, BLOCK], tl.float32), tl.zeros([1, BLOCK], tl.float32)
    for axis in tl.static_range(3):
        slope = half[axis] * _slope(sdf, node, SDF, axis)
        squares += slope * slope
        for other in tl.static_range(axis, 3):
            # along one axis compactly 1 / step^2, along two of them each stands for two
            twice = 4.0 if COMPACT and axis == other else 1.0 if axis == other else 2.0
            bend = _bend(sdf, node, SDF, axis, other, COMPACT)
            total += twice * half[axis] * half[other] * tl.abs(bend)
    error = tl.sqrt(squares) - 1
    at = item * tl.num_programs(0) + tl.program_id(0)
    tl.store(partial + at, tl.sum(tl.where(mask, error * error, 0.0)))
    total = tl.sum(tl.where(mask, total, 0.0))
    tl.store(partial + tl.num_programs(1) * tl.num_programs(0) + at, total)


@triton.jit
def node_losses_backward(
    grad, sdf, grad_sdf, half, SDF: tl.constexpr, COMPACT: tl.constexpr, BLOCK: tl.constexpr
):
    """Gradients [2] of both sums -> grad_sdf, laid out as sdf."""
    item, node, mask = _mine(SDF, BLOCK)
    sdf += item * SDF.item
    by_eikonal, by_hessian = tl.zeros([1, BLOCK], tl.float32), tl.zeros([1, BLOCK], tl.float32)
    for axis in tl.static_range(3):
        for side in tl.static_range(2):
            there, sign = _neighbour(node, SDF, axis, 2 * side - 1)
            by_eikonal += sign * half[axis] * _eikonal_slope(sdf, there, half, SDF, axis)
        for other in tl.static_range(axis, 3):
            total = tl.zeros([1, BLOCK], tl.float32)
            if COMPACT and axis == other:
                total -= 2 * _sign(_bend(sdf, node, SDF, axis, axis, True))
                for side in tl.static_range(2):
                    there, _ = _neighbour(node, SDF, axis, 2 * side - 1)
                    total += _sign(_bend(sdf, there, SDF, axis, axis, True))
            else:
                for side in tl.static_range(4):
                    there, first = _neighbour(node, SDF, axis, 2 * (side // 2) - 1)
                    there, second = _neighbour(there, SDF, other, 2 * (side % 2) - 1)
                    total += first * second * _sign(_bend(sdf, there, SDF, axis, other, False))
            twice = 4.0 if COMPACT and axis == other else 1.0 if axis == other else 2.0
            by_hessian += twice * half[axis] * half[other] * total
    out = tl.load(grad) * by_eikonal + tl.load(grad + 1) * by_hessian
    tl.store(_at(grad_sdf + item * SDF.item, node, SDF), out, mask)


@triton.jit
def _eikonal_slope(sdf, node, half, LATTICE: tl.constexpr, AXIS: tl.constexpr):
    """d (|gradient| - 1)^2 / d gradient along an axis, at a node; zero where the field is flat."""
    slopes = _slopes(sdf, node, half, LATTICE)
    norm = tl.sqrt(slopes[0] * slopes[0] + slopes[1] * slopes[1] + slopes[2] * slopes[2])
    return tl.where(norm > 0, 2 - 2 / norm, 0.0) * slopes[AXIS]


@torch.library.custom_op("selfocc::node_losses", mutates_args=())
def _node_losses_op(sdf: Tensor, spacing: list[float], compact: bool) -> Tensor:
    told = _losses(sdf, spacing, compact)
    partial = sdf.new_empty(2, math.prod(told["grid"]), dtype=torch.float32)
    launch(node_losses_forward, partial=partial, **told)
    return partial.sum(1)


@_node_losses_op.register_fake
def _(sdf, spacing, compact):
    return sdf.new_empty(2, dtype=torch.float32)


@torch.library.custom_op("selfocc::node_losses_gradient", mutates_args=())
def _node_losses_gradient_op(
    grad: Tensor, sdf: Tensor, spacing: list[float], compact: bool
) -> Tensor:
    out = sdf.new_empty(sdf.shape, dtype=torch.float32)
    told = _losses(sdf, spacing, compact)
    launch(node_losses_backward, grad=grad.contiguous(), grad_sdf=out, **told)
    return out


@_node_losses_gradient_op.register_fake
def _(grad, sdf, spacing, compact):
    return sdf.new_empty(sdf.shape, dtype=torch.float32)


def _losses(sdf: Tensor, spacing: list[float], compact: bool) -> dict[str, object]:
    """What both launches are told."""
    sdf = sdf.contiguous()
    return dict(sdf=sdf, SDF=_lattice(sdf), COMPACT=compact) | _grid(sdf, spacing, LOSSES)


def _node_losses_setup(ctx, inputs, output):
    sdf, ctx.spacing, ctx.compact = inputs
    ctx.save_for_backward(sdf)


def _node_losses_autograd(ctx, grad):
    (sdf,) = ctx.saved_tensors
    out = _node_losses_gradient_op(grad, sdf, ctx.spacing, ctx.compact)
    return out.to(sdf.dtype), None, None


_node_losses_op.register_autograd(_node_losses_autograd, setup_context=_node_losses_setup)


# -----------------------------------------------------------------------------------------------


def node_losses(sdf: Tensor, spacing: Spacing, compact: bool) -> tuple[Tensor, Tensor]:
    """Eikonal and Hessian terms of all nodes.

    Args: sdf [B, H, W, Z] in metres, two nodes or more an axis, of any strides; spacing of nodes
    along x, y, z in metres; `compact` takes the second differences of the diagonal over adjacent
    nodes, not over two. Half precision is read as float32, and so are results.
    Returns, both 0-d, the sum of (|gradient| - 1)^2 and the mean absolute second difference.
    Raises ValueError naming the argument at fault.
    """
    check(sdf=(sdf, "B H>=2 W>=2 Z>=2"))
    if use_triton(sdf):
        eikonal, hessian = _node_losses_op(sdf, list(spacing), compact).unbind()
        return eikonal, hessian / max(1, 9 * sdf.numel())
    return _NodeLosses.apply(at_least_float32(sdf), spacing, compact)
