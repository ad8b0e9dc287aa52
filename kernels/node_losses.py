"""Finite differences between the nodes of a volume, and SelfOcc's eikonal and Hessian losses.

Along one axis, with the ends replicated and nodes `step` metres apart:

    (D s)[i] = (s[i+1] - s[i-1]) / (2 step)        halved at the border

Second differences are D of D, or on the diagonal the compact (s[i+1] - 2 s[i] + s[i-1]) / step^2.
Differences along different axes commute. The transpose of D reads its neighbours, too:

    (D' u)[i] = (+-u[i-1] -+ u[i+1]) / (2 step)    a neighbour beyond the border is u[i] negated

so that all kernels here are gathers: no atomics, nothing kept for backward but the volume itself.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.checks import at_least_float32, check
from kernels.dispatch import launch, tl, triton, use_triton
from kernels.ray import pack

# Nodes a program and warps: four nodes a lane in the copies, one where many neighbours are read.
COPY, LOSSES, WARPS = 512, 128, 4

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
        count = max(1, 9 * sdf.numel())
        ctx.save_for_backward(grad_eikonal, grad_hessian.div_(count))
        return eikonal, total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_eikonal, grad_hessian):
        eikonal, hessian = ctx.saved_tensors
        return eikonal * grad_eikonal + hessian * grad_hessian, None, None


# -----------------------------------------------------------------------------------------------
# Reading nodes in Triton. A node is (y, x, z), the lattice (H, W, Z).


@triton.jit
def _node_of(index, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    return index // (WIDTH * DEPTH), index // DEPTH % WIDTH, index % DEPTH


@triton.jit
def _inside(i, COUNT: tl.constexpr):
    return tl.minimum(tl.maximum(i, 0), COUNT - 1)


@triton.jit
def _neighbour(node, lattice, AXIS: tl.constexpr, STEP: tl.constexpr):
    """The node STEP (1 or -1) further along an axis (0 x, 1 y, 2 z), itself at the border, and the
    sign with which the transpose of D takes it.
    """
    y, x, z = node
    height, width, depth = lattice
    if AXIS == 0:
        place, count = x + STEP, width
        x = _inside(place, count)
    elif AXIS == 1:
        place, count = y + STEP, height
        y = _inside(place, count)
    else:
        place, count = z + STEP, depth
        z = _inside(place, count)
    there = (place >= 0) & (place < count)
    return (y, x, z), tl.where(there, -1.0 * STEP, 1.0 * STEP)


@triton.jit
def _read(sdf, node, lattice):
    y, x, z = node
    return tl.load(sdf + ((y * lattice[1] + x) * lattice[2] + z)).to(tl.float32)


@triton.jit
def _slope(sdf, node, lattice, AXIS: tl.constexpr):
    """2 step D along an axis."""
    upper, _ = _neighbour(node, lattice, AXIS, 1)
    lower, _ = _neighbour(node, lattice, AXIS, -1)
    return _read(sdf, upper, lattice) - _read(sdf, lower, lattice)


@triton.jit
def _bend(sdf, node, lattice, AXIS: tl.constexpr, OTHER: tl.constexpr, COMPACT: tl.constexpr):
    """The second difference along two axes, without its factor."""
    upper, _ = _neighbour(node, lattice, OTHER, 1)
    lower, _ = _neighbour(node, lattice, OTHER, -1)
    if COMPACT and AXIS == OTHER:
        here = _read(sdf, node, lattice)
        out = (_read(sdf, upper, lattice) - here) - (here - _read(sdf, lower, lattice))
    else:
        out = _slope(sdf, upper, lattice, AXIS) - _slope(sdf, lower, lattice, AXIS)
    return out


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))  # NaN stays


# -----------------------------------------------------------------------------------------------
# The table of SDF and gradients that rays read, and its transpose


@triton.jit
def node_table_forward(
    sdf,
    table,
    half,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    ITEM: tl.constexpr,
    Y: tl.constexpr,
    X: tl.constexpr,
    Z: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sdf [B, H, W, Z] of strides ITEM, Y, X, Z -> rows [B, H, W, Z, 4]: SDF and its gradient.

    half: 1 / (2 step) along x, y, z.
    """
    item = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = index < HEIGHT * WIDTH * DEPTH
    y, x, z = _node_of(tl.where(mask, index, 0), HEIGHT, WIDTH, DEPTH)
    sdf += item * ITEM
    here = sdf + (y * Y + x * X + z * Z)
    upper = sdf + (y * Y + _inside(x + 1, WIDTH) * X + z * Z)
    lower = sdf + (y * Y + _inside(x - 1, WIDTH) * X + z * Z)
    by_x = half[0] * (tl.load(upper).to(tl.float32) - tl.load(lower).to(tl.float32))
    upper = sdf + (_inside(y + 1, HEIGHT) * Y + x * X + z * Z)
    lower = sdf + (_inside(y - 1, HEIGHT) * Y + x * X + z * Z)
    by_y = half[1] * (tl.load(upper).to(tl.float32) - tl.load(lower).to(tl.float32))
    upper = sdf + (y * Y + x * X + _inside(z + 1, DEPTH) * Z)
    lower = sdf + (y * Y + x * X + _inside(z - 1, DEPTH) * Z)
    by_z = half[2] * (tl.load(upper).to(tl.float32) - tl.load(lower).to(tl.float32))
    rows = table + item * (4 * HEIGHT * WIDTH * DEPTH) + 4 * index
    row = pack(tl.load(here).to(tl.float32), by_x, by_y, by_z)
    tl.store(rows[:, :, None] + tl.arange(0, 4)[None, None, :], row, mask[:, :, None])


@triton.jit
def node_table_backward(
    rows,
    grad_sdf,
    half,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    ITEM: tl.constexpr,
    Y: tl.constexpr,
    X: tl.constexpr,
    Z: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of rows [B, H, W, Z, 4] -> grad_sdf [B, H, W, Z] of strides ITEM, Y, X, Z."""
    item = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = index < HEIGHT * WIDTH * DEPTH
    node = _node_of(tl.where(mask, index, 0), HEIGHT, WIDTH, DEPTH)
    y, x, z = node
    rows += item * (4 * HEIGHT * WIDTH * DEPTH)
    out = tl.load(rows + 4 * ((y * WIDTH + x) * DEPTH + z))
    for axis in tl.static_range(3):
        total = tl.zeros_like(out)
        for side in tl.static_range(2):
            there, sign = _neighbour(node, (HEIGHT, WIDTH, DEPTH), axis, 2 * side - 1)
            at = (there[0] * WIDTH + there[1]) * DEPTH + there[2]
            total += sign * tl.load(rows + 4 * at + (1 + axis))
        out += half[axis] * total
    tl.store(grad_sdf + item * ITEM + (y * Y + x * X + z * Z), out, mask)


def node_table(volume: Tensor, spacing: Spacing) -> Tensor:
    """[B, H, W, Z, 4], float32: channel 0 of a volume [B, C, H, W, Z] and its gradient x, y, z."""
    batch, _, *nodes = volume.shape
    table = volume.new_empty(batch, *nodes, 4, dtype=torch.float32)
    launch(node_table_forward, sdf=volume, table=table, **_copy(volume, spacing))
    return table


def node_table_adjoint(rows: Tensor, spacing: Spacing, grad_volume: Tensor) -> None:
    """Writes into channel 0 of grad_volume the gradient of the SDF, given that of its table."""
    launch(node_table_backward, rows=rows, grad_sdf=grad_volume, **_copy(grad_volume, spacing))


def _copy(volume: Tensor, spacing: Spacing) -> dict[str, object]:
    """What both launches share. Sizes and strides are constants: divisions become multiplications,
    aligned rows are read as such.
    """
    item, _, y, x, z = volume.stride()
    return _lattice(volume[:, 0], spacing, COPY) | dict(ITEM=item, Y=y, X=x, Z=z)


def _lattice(sdf: Tensor, spacing: Spacing, block: int) -> dict[str, object]:
    """Grid and constants of a launch over the nodes of [B, H, W, Z], `block` of them a program."""
    batch, height, width, depth = sdf.shape
    return dict(
        grid=(triton.cdiv(height * width * depth, block), batch),
        half=tuple(0.5 / step for step in spacing),
        HEIGHT=height,
        WIDTH=width,
        DEPTH=depth,
        BLOCK=block,
        warps=WARPS,
    )


# -----------------------------------------------------------------------------------------------
# Losses of all nodes


@triton.jit
def node_losses_forward(
    sdf,
    partial,
    half,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    COMPACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sdf [B, H, W, Z] -> partial [2, programs]: sums of (|gradient| - 1)^2 and of all |second
    differences|.
    """
    nodes: tl.constexpr = HEIGHT * WIDTH * DEPTH
    item, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    index = block * BLOCK + tl.arange(0, BLOCK)
    mask = index < nodes
    node = _node_of(tl.where(mask, index, 0), HEIGHT, WIDTH, DEPTH)
    lattice = (HEIGHT, WIDTH, DEPTH)
    sdf += item * nodes
    squares, total = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for axis in tl.static_range(3):
        slope = half[axis] * _slope(sdf, node, lattice, axis)
        squares += slope * slope
        for other in tl.static_range(axis, 3):
            # along one axis compactly 1 / step^2, along two of them each stands for two
            twice = 4.0 if COMPACT and axis == other else 1.0 if axis == other else 2.0
            bend = _bend(sdf, node, lattice, axis, other, COMPACT)
            total += twice * half[axis] * half[other] * tl.abs(bend)
    error = tl.sqrt(squares) - 1
    at = item * tl.num_programs(0) + block
    tl.store(partial + at, tl.sum(tl.where(mask, error * error, 0.0), 0))
    total = tl.sum(tl.where(mask, total, 0.0), 0)
    tl.store(partial + tl.num_programs(1) * tl.num_programs(0) + at, total)


@triton.jit
def node_losses_backward(
    grad,
    sdf,
    grad_sdf,
    half,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    COMPACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients [2] of both sums -> grad_sdf [B, H, W, Z]."""
    nodes: tl.constexpr = HEIGHT * WIDTH * DEPTH
    item = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < nodes
    node = _node_of(tl.where(mask, index, 0), HEIGHT, WIDTH, DEPTH)
    lattice = (HEIGHT, WIDTH, DEPTH)
    sdf += item * nodes
    by_eikonal, by_hessian = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for axis in tl.static_range(3):
        for side in tl.static_range(2):
            there, sign = _neighbour(node, lattice, axis, 2 * side - 1)
            by_eikonal += sign * half[axis] * _eikonal_slope(sdf, there, lattice, half, axis)
        for other in tl.static_range(axis, 3):
            total = tl.zeros([BLOCK], tl.float32)
            if COMPACT and axis == other:
                total -= 2 * _sign(_bend(sdf, node, lattice, axis, axis, True))
                for side in tl.static_range(2):
                    there, _ = _neighbour(node, lattice, axis, 2 * side - 1)
                    total += _sign(_bend(sdf, there, lattice, axis, axis, True))
            else:
                for side in tl.static_range(4):
                    there, first = _neighbour(node, lattice, axis, 2 * (side // 2) - 1)
                    there, second = _neighbour(there, lattice, other, 2 * (side % 2) - 1)
                    bend = _bend(sdf, there, lattice, axis, other, False)
                    total += first * second * _sign(bend)
            twice = 4.0 if COMPACT and axis == other else 1.0 if axis == other else 2.0
            by_hessian += twice * half[axis] * half[other] * total
    out = tl.load(grad) * by_eikonal + tl.load(grad + 1) * by_hessian
    tl.store(grad_sdf + item * nodes + index, out, mask)


@triton.jit
def _eikonal_slope(sdf, node, lattice, half, AXIS: tl.constexpr):
    """d (|gradient| - 1)^2 / d gradient along an axis, at a node; zero where the field is flat."""
    slopes = (
        half[0] * _slope(sdf, node, lattice, 0),
        half[1] * _slope(sdf, node, lattice, 1),
        half[2] * _slope(sdf, node, lattice, 2),
    )
    norm = tl.sqrt(slopes[0] * slopes[0] + slopes[1] * slopes[1] + slopes[2] * slopes[2])
    return tl.where(norm > 0, 2 - 2 / norm, 0.0) * slopes[AXIS]


@torch.library.custom_op("selfocc::node_losses", mutates_args=())
def _node_losses_op(sdf: Tensor, spacing: list[float], compact: bool) -> Tensor:
    told = _lattice(sdf, spacing, LOSSES)
    partial = sdf.new_empty(2, math.prod(told["grid"]), dtype=torch.float32)
    launch(node_losses_forward, sdf=sdf.contiguous(), partial=partial, COMPACT=compact, **told)
    return partial.sum(1)


@_node_losses_op.register_fake
def _(sdf, spacing, compact):
    return sdf.new_empty(2, dtype=torch.float32)


@torch.library.custom_op("selfocc::node_losses_gradient", mutates_args=())
def _node_losses_gradient_op(
    grad: Tensor, sdf: Tensor, spacing: list[float], compact: bool
) -> Tensor:
    out = sdf.new_empty(sdf.shape, dtype=torch.float32)
    told = dict(grad=grad.contiguous(), sdf=sdf.contiguous(), grad_sdf=out, COMPACT=compact)
    launch(node_losses_backward, **told, **_lattice(sdf, spacing, LOSSES))
    return out


@_node_losses_gradient_op.register_fake
def _(grad, sdf, spacing, compact):
    return sdf.new_empty(sdf.shape, dtype=torch.float32)


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

    Args: sdf [B, H, W, Z], two nodes or more an axis, of any strides; spacing and `compact` as in
    `node_second_differences`. Half precision is read as float32, and so are results.
    Returns, both 0-d, the sum of (|gradient| - 1)^2 and the mean absolute second difference.
    Raises ValueError naming the argument at fault.
    """
    check(sdf=(sdf, "B H>=2 W>=2 Z>=2"))
    if use_triton(sdf):
        eikonal, hessian = _node_losses_op(sdf, list(spacing), compact).unbind()
        return eikonal, hessian / max(1, 9 * sdf.numel())
    return _NodeLosses.apply(at_least_float32(sdf), spacing, compact)
