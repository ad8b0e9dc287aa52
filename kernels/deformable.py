"""Multi-scale deformable sampling (Zhu et al. 2021, eq. 3).

    a         = softmax(logits)                          over the levels l and points p
    (x, y)    = reference * (w_l, h_l) + displacement(offset) - 1/2         pixels of level l
    out[q, k] = sum_lp a * bilinear(value_l[k], x, y)    head k; zero outside the level

With cameras, a query is sampled once in the maps of each that sees it, and its result is the mean
over those. Which do is for the kernels to read, so that nobody has to count them before.

The kernels are in `deformable_triton.py`; what CPUs use is in `deformable_cpu.py`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.checks import check
from kernels.deformable_cpu import Sampling
from kernels.deformable_triton import (
    Shape,
    deformable_backward,
    deformable_forward,
    displacement,
)
from kernels.dispatch import autocast_type, launch, plainly_exported, triton, use_triton

# Chosen from the binaries for sm_80 to sm_120, then found among the fastest on an H200. One warp a
# program needs no barriers, and 32 of them fit on a processor of sm_90; with two or four ptxas
# spills. A lane reads 16 bytes of a pixel forward; backward it has four channels, which sm_90 and
# later add to the sums with one instruction (red.v4.f32). Two lanes a pixel at least: then a tile
# of samples has fewer elements than there are lanes, and Triton lets each lane load the numbers of
# its own sample, rather than passing them through shared memory.
WARPS = 1
REGISTERS, REGISTERS_FIXED = 104, 128  # of backward; left alone, ptxas spills
BLOCK_P = 4
FORWARD_BYTES = 16
BACKWARD_CHANNELS = 4


def _problem(
    lane_bytes: int,
    value: Tensor,
    sizes: list[int],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    sees: Tensor | None,
) -> dict[str, object]:
    """What both launches share. Lanes read lane_bytes of value."""
    batch, queries, heads, levels, points, _ = offsets.shape
    tokens, _, width = value.shape[1:]
    cameras = 0 if sees is None else sees.shape[1]
    block_c = triton.next_power_of_2(width)
    block_p = min(BLOCK_P, triton.next_power_of_2(points))
    lanes = max(2, block_c * value.element_size() // lane_bytes)
    block_q = max(1, 32 * WARPS // (lanes * block_p))
    references = reference_points.shape[0] * queries  # with cameras nobody asks
    return dict(
        grid=(triton.cdiv(batch * queries, block_q) * heads,),
        value=value.contiguous(),
        reference_points=reference_points.contiguous(),
        offsets=offsets.contiguous(),
        logits=logits.contiguous(),
        sees=None if sees is None else sees.contiguous(),
        sizes=tuple(sizes),
        counts=(queries, batch * queries, references, tokens),
        S=Shape(heads, width, levels, points, cameras, block_q, block_p, block_c),
        warps=WARPS,
    )


def _results(value: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """out and norms, not yet filled."""
    batch, queries, heads = offsets.shape[:3]
    out = value.new_empty(batch, queries, heads * value.shape[3], dtype=torch.float32)
    return out, out.new_empty(batch, queries, heads)


@torch.library.custom_op("selfocc::deformable_sampling", mutates_args=())
def _deformable_op(
    value: Tensor,
    sizes: list[int],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    sees: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out, norms = _results(value, offsets)
    told = _problem(FORWARD_BYTES, value, sizes, reference_points, offsets, logits, sees)
    launch(deformable_forward, out=out, norms=norms, **told)
    return out, norms


@_deformable_op.register_fake
def _(value, sizes, reference_points, offsets, logits, sees):
    return _results(value, offsets)


@torch.library.custom_op("selfocc::deformable_sampling_gradient", mutates_args=())
def _deformable_gradient_op(
    grad: Tensor,
    out: Tensor,
    norms: Tensor,
    value: Tensor,
    sizes: list[int],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    sees: Tensor | None,
    wanted_value: bool,
    wanted_reference: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    fixed = torch.are_deterministic_algorithms_enabled()
    dtype = torch.int64 if fixed else torch.float32
    scales = _scales(grad, value, norms, max(sizes), len(offsets)) if fixed else norms
    by_value = value.new_zeros(value.shape if wanted_value else 0, dtype=dtype)
    by_reference = value.new_zeros(reference_points.shape if wanted_reference else 0, dtype=dtype)
    by_offsets = torch.empty_like(offsets, memory_format=torch.contiguous_format)
    by_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    lane_bytes = BACKWARD_CHANNELS * value.element_size()
    launch(
        deformable_backward,
        grad=grad.contiguous(),
        out=out,
        norms=norms,
        grads=(by_value, by_reference, by_offsets, by_logits),
        scales=scales,
        registers=REGISTERS_FIXED if fixed else REGISTERS,
        VALUE=wanted_value,
        REFERENCE=wanted_reference,
        FIXED=fixed,
        **_problem(lane_bytes, value, sizes, reference_points, offsets, logits, sees),
    )
    if fixed:
        by_value, by_reference = by_value.float() / scales[0], by_reference.float() / scales[1]
    by_value, by_reference = by_value.to(value.dtype), by_reference.to(reference_points.dtype)
    return by_value, by_reference, by_offsets, by_logits


@_deformable_gradient_op.register_fake
def _(grad, out, norms, value, sizes, reference_points, offsets, logits, sees, *wanted):
    return (
        value.new_empty(value.shape if wanted[0] else 0),
        reference_points.new_empty(reference_points.shape if wanted[1] else 0),
        torch.empty_like(offsets, memory_format=torch.contiguous_format),
        torch.empty_like(logits, memory_format=torch.contiguous_format),
    )


def _scales(grad: Tensor, value: Tensor, norms: Tensor, longest: int, batch: int) -> Tensor:
    """[2]: integer units to a one in the sums for value and for reference points, powers of two.

    The weights of a query sum to one, so that no sum exceeds the bounds below. NaN where something
    is not finite, which integers could not say.
    """
    if grad.numel() == 0 or value.numel() == 0:
        return grad.new_ones(2, dtype=torch.float32)
    heads, width = value.shape[2:]
    largest = grad.abs().amax().double()
    by_value = largest * norms[..., 0].numel()
    by_reference = largest * value.abs().amax() * (2 * heads * width * longest * batch)
    bounds = torch.stack([by_value, by_reference]) + 0 * (norms.sum() + largest)
    return (61 - bounds.log2()).floor().clamp(-120, 120).exp2().float()


def _deformable_setup(ctx, inputs, output):
    value, ctx.sizes, *tensors = inputs
    ctx.save_for_backward(*output, value, *tensors)
    ctx.mark_non_differentiable(output[1])


def _deformable_autograd(ctx, grad, _):
    out, norms, value, *tensors = ctx.saved_tensors
    wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[2])
    by_value, by_reference, *others = _deformable_gradient_op(
        grad, out, norms, value, ctx.sizes, *tensors, *wanted
    )
    by_value, by_reference = by_value if wanted[0] else None, by_reference if wanted[1] else None
    return by_value, None, by_reference, *others, None


_deformable_op.register_autograd(_deformable_autograd, setup_context=_deformable_setup)


# -----------------------------------------------------------------------------------------------


@plainly_exported
def deformable_sampling(
    value: Tensor,
    level_shapes: list[tuple[int, int]],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    seen: Tensor | None = None,
) -> Tensor:
    """Attention-weighted bilinear samples of multi-level feature maps.

    Args:
        value: [B, V, heads, dh] tokens of maps, one level after another, each row by row; with
            cameras [B * N, V, heads, dh].
        level_shapes: (h, w) of every level; V is the sum of their areas.
        reference_points: (x, y) as fractions of the map, 0 and 1 at its outer edges,
            [1 or B, Q, L, P, 2]; with cameras [B, N, Q, P, 2], shared by the levels.
        offsets: [B, Q, heads, L, P, 2] in pixels of the level.
        logits: [B, Q, heads, L * P] before the softmax over levels and points.
        seen: bool [B, N, Q], which of up to 31 cameras see which queries. A query's result is the
            mean over those; one that is not seen gets zero at no cost.

    Returns [B, Q, heads * dh] in value's dtype, differentiable in all four; sums are in float32, or
    float64 for float64 values. On a GPU, what is not contiguous is copied. Under
    `torch.use_deterministic_algorithms(True)` gradients are the same bit for bit in every run.
    Raises ValueError that names the argument.
    """
    _check(value, level_shapes, reference_points, offsets, logits, seen)
    shapes = [(int(h), int(w)) for h, w in level_shapes]
    if not use_triton(value):
        pairs = None
        if seen is not None:
            item, camera, query = seen.nonzero(as_tuple=True)  # sorted by camera
            _, cameras, queries = seen.shape
            pairs = torch.stack([item * cameras + camera, item * queries + query], dim=1)
            reference_points = reference_points[item, camera, query]
        moves = displacement(offsets)
        return Sampling.apply(value, shapes, reference_points, moves, logits, pairs)
    sizes = [side for shape in shapes for side in shape]
    out, _ = _deformable_op(value, sizes, reference_points, offsets, logits, seen)
    return out.to(value.dtype)


class _Attention(torch.autograd.Function):
    """Sampling in Triton, of which backward makes offsets and logits again: they are linear in the
    queries, and many times larger.
    """

    @staticmethod
    def forward(ctx, value, levels, reference_points, queries, moves, weighs, seen, *parameters):
        ctx.sizes, ctx.shapes = [int(side) for shape in levels for side in shape], (moves, weighs)
        raw = _projected(queries, parameters, ctx.shapes)
        _check(value, levels, reference_points, *raw, seen)
        out, norms = _deformable_op(value, ctx.sizes, reference_points, *raw, seen)
        ctx.save_for_backward(out, norms, value, reference_points, queries, seen, *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        out, norms, value, reference_points, queries, seen, *parameters = ctx.saved_tensors
        raw = _projected(queries, parameters, ctx.shapes)
        by_value, _, *by_raw = _deformable_gradient_op(
            grad, out, norms, value, ctx.sizes, reference_points, *raw, seen, True, False
        )
        # a column of ones sums over the queries as well, for the biases; eight keep rows aligned
        rows = F.pad(queries.flatten(0, 1), (0, 8), value=1.0)
        dim, by_queries, by_parameters = queries.shape[2], 0, []
        for by, weight in zip(by_raw, parameters[::2], strict=True):
            by = by.flatten(2)
            by_queries = by_queries + by @ weight
            sums = by.flatten(0, 1).mT @ rows
            by_parameters += [sums[:, :dim], sums[:, dim]]
        return by_value, None, None, by_queries, None, None, None, *by_parameters


def _projected(queries: Tensor, parameters: tuple[Tensor, ...], shapes) -> list[Tensor]:
    """Offsets and logits, of these shapes behind [B, Q]."""
    pairs = zip(parameters[::2], parameters[1::2], shapes, strict=True)
    return [F.linear(queries, weight, bias).unflatten(-1, shape) for weight, bias, shape in pairs]


def deformable_attention(
    value: Tensor,
    level_shapes: list[tuple[int, int]],
    reference_points: Tensor,
    queries: Tensor,
    offsets: tuple[Tensor, Tensor],
    logits: tuple[Tensor, Tensor],
    seen: Tensor | None = None,
) -> Tensor:
    """`deformable_sampling` with offsets and logits that are linear in the queries [B, Q, D].

    offsets: weight [heads L P 2, D] and bias; logits: weight [heads L P, D] and bias. Triton's
    backward makes both again instead of keeping them, and has no gradient of the reference points.
    Under autocast all but these are cast as `F.linear` casts. Other arguments, results and errors
    as there.
    """
    heads, levels = value.shape[2], len(level_shapes)
    shapes = (heads, levels, -1, 2), (heads, -1)
    parameters = *offsets, *logits
    if not use_triton(value) or reference_points.requires_grad:
        raw = _projected(queries, parameters, shapes)
        return deformable_sampling(value, level_shapes, reference_points, *raw, seen)
    if (dtype := autocast_type(value)) is not None:
        queries, *parameters = (x.to(dtype) for x in (queries, *parameters))
    arguments = value, level_shapes, reference_points, queries, *shapes, seen
    return _Attention.apply(*arguments, *parameters).to(value.dtype)


def _check(value, level_shapes, reference_points, offsets, logits, seen) -> None:
    known = {"LP": math.prod(offsets.shape[3:5])}
    references = ("1" if reference_points.shape[:1] == (1,) else "B") + " Q L P 2"
    if seen is not None:
        references, known["BN"] = "B N Q P 2", math.prod(seen.shape[:2])
        if seen.shape[1] > 31:
            raise ValueError(f"seen is of {seen.shape[1]} cameras, the kernels take up to 31")
    check(
        known,
        value=(value, f"{'B' if seen is None else 'BN'} V heads dh>=1"),
        offsets=(offsets, "B Q heads L>=1 P>=1 2"),
        logits=(logits, "B Q heads LP"),
        seen=(seen, "B N Q", torch.bool),
        reference_points=(reference_points, references),
    )
    levels = offsets.shape[3]
    if len(level_shapes) != levels:
        raise ValueError(f"level_shapes has {len(level_shapes)} levels, offsets {levels}")
    tokens = sum(h * w for h, w in level_shapes)
    if value.shape[1] != tokens:
        raise ValueError(
            f"value has {value.shape[1]} tokens, level_shapes {list(level_shapes)} make {tokens}"
        )
    for name, size in (
        ("value", value.shape[1:].numel()),
        ("reference_points", reference_points.numel()),
    ):
        if size >= 2**31:
            raise ValueError(f"{name} is too large: the kernels count to 2^31, not {size}")
