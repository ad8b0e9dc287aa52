"""Multi-scale deformable sampling (Zhu et al. 2021, eq. 3).

    a         = softmax(logits)                          over the levels l and points p
    (x, y)    = reference * (w_l, h_l) + displacement(offset) - 1/2         pixels of level l
    out[q, k] = sum_lp a * bilinear(value_l[k], x, y)    head k; zero outside the level

With cameras, a query is sampled once in the maps of each that sees it, and its result is the mean
over those. Which do is for the kernels to read, so that nobody has to count them before.

The kernels read the two linear layers' raw outputs, and neither locations nor weights reach memory.
A program holds a few queries of one head and walks over their levels and points, BLOCK_P points at
a time. Its tiles are [BLOCK_Q, BLOCK_P] for what belongs to a sample and [.., BLOCK_C] for its
channels, and lanes of a warp lie beside each other along the channels first: with 16 float32
channels, four lanes read the 64 bytes of a pixel at once, and a warp reads four samples of two
queries. What belongs to a sample is computed by those four lanes alike, which costs less than
passing it around. What CPUs use is in `deformable_cpu.py`.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.checks import check
from kernels.deformable_cpu import Sampling
from kernels.dispatch import autocast_type, launch, tl, triton, use_triton

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


# -----------------------------------------------------------------------------------------------
# How far an offset moves a sample, in pixels. This is the place to try another way, three times;
# 8 tanh(offset / 8), say, never leaves a window.


def displacement(offset: Tensor) -> Tensor:
    return offset


@triton.jit
def displaced(offset):
    return offset


@triton.jit
def displaced_slope(offset):
    """Derivative of `displaced`."""
    return tl.zeros_like(offset) + 1.0


# -----------------------------------------------------------------------------------------------
# Samples


class Shape(NamedTuple):
    """Constants of a launch. A program has block_q queries, tiles of block_p points, block_c >=
    width channels.
    """

    heads: int
    width: int
    levels: int
    points: int
    cameras: int  # 0 where a query reads the maps of its own item
    block_q: int
    block_p: int
    block_c: int


@triton.jit
def _locate(reference, size, offset, exists):
    """Pixel to the left of (or above) samples [BLOCK_Q, BLOCK_P], and how far they are from it.

    What does not exist, is far outside, or is NaN lies two pixels outside, where all is zero.
    """
    at = reference * size + displaced(offset) - 0.5
    at = tl.where(exists & (at > -2), at, -2.0)
    at = tl.where(at < size, at, size)
    low = tl.floor(at)
    return low.to(tl.int32), at - low


@triton.jit
def _corners(first, step, ROW: tl.constexpr):
    """Pointers to the pixels (x, y), (x + 1, y), (x, y + 1), (x + 1, y + 1), the first given."""
    return first, first + ROW, first + step, first + step + ROW


@triton.jit
def _corners_exist(x, y, h, w, inside):
    """Masks [BLOCK_Q, BLOCK_P, BLOCK_C] of those; inside: channels that there are."""
    left, right = (x >= 0) & (x < w), (x >= -1) & (x < w - 1)
    above, below = (y >= 0) & (y < h), (y >= -1) & (y < h - 1)
    upper = ((left & above)[:, :, None] & inside, (right & above)[:, :, None] & inside)
    lower = ((left & below)[:, :, None] & inside, (right & below)[:, :, None] & inside)
    return upper + lower


@triton.jit
def _corner_weights(fx, fy, attention):
    """Bilinear weights of the corners times the attention."""
    below = attention * fy
    above = attention - below
    above_right, below_right = above * fx, below * fx
    return above - above_right, above_right, below - below_right, below_right


@triton.jit
def _bilinear_derivatives(corners, fx, fy):
    """The bilinear sum of the corners' values, and its derivatives by x and y."""
    slope_above, slope_below = corners[1] - corners[0], corners[3] - corners[2]
    above, below = corners[0] + slope_above * fx, corners[2] + slope_below * fx
    by_y = below - above
    return above + by_y * fy, slope_above + (slope_below - slope_above) * fy, by_y


@triton.jit
def _begin(counts, S: tl.constexpr):
    """Queries [BLOCK_Q] of a program and which of them are its own; their rows of heads; channels;
    where their values [BLOCK_Q or 1, 1, BLOCK_C] and reference points [BLOCK_Q, 1] begin.
    """
    queries, total, references, tokens = counts
    head = tl.program_id(0) % S.heads
    query = tl.program_id(0) // S.heads * S.block_q + tl.arange(0, S.block_q)
    mine = query < total
    query = tl.minimum(query, total - 1)  # instead of masks, the last one is computed repeatedly
    row = query.to(tl.int64) * S.heads + head
    channel = tl.arange(0, S.block_c)
    values, points = head * S.width + channel[None, None, :], tl.zeros_like(row)[:, None]
    if S.cameras == 0:
        image = (query // queries).to(tl.int64) * tokens * (S.heads * S.width)
        values += image[:, None, None]
        points = (query % references).to(tl.int64)[:, None] * (2 * S.levels * S.points)
    return query, mine, row, channel, values, points


@triton.jit
def _turns(sees, query, queries, S: tl.constexpr):
    """Of queries [BLOCK_Q]: which cameras see them, a bit each; how many, the most, whether any;
    their first camera, and their first row of reference points.
    """
    CAMERAS: tl.constexpr = S.cameras
    if CAMERAS > 0:
        bits, count = tl.zeros_like(query), tl.zeros_like(query)
        first = query // queries * CAMERAS
        row = first * queries + query % queries
        for camera in tl.static_range(CAMERAS):
            seen = tl.load(sees + row + camera * queries).to(tl.int32)
            bits += seen << camera
            count += seen
        out = (bits, count, tl.max(count, axis=0), count > 0, first, row)
    else:
        out = (query, query, 1, query >= 0, query, query)
    return out


@triton.jit
def _samples(logits, offsets, norm, seen, level, start, S: tl.constexpr):
    """BLOCK_P points of a level: point, sample, which there are, attention, offset by x and y."""
    point = start + tl.arange(0, S.block_p)[None, :]
    valid = seen[:, None]
    if S.points % S.block_p != 0:
        valid = valid & (point < S.points)
    sample = level * S.points + point
    logit = tl.load(logits + sample, valid, other=-float("inf")).to(tl.float32)
    offset_x = tl.load(offsets + 2 * sample, valid, other=0.0).to(tl.float32)
    offset_y = tl.load(offsets + 2 * sample + 1, valid, other=0.0).to(tl.float32)
    return point, sample, valid, tl.exp(logit - norm[:, None]), offset_x, offset_y


@triton.jit
def _located(reference_points, turns, left, samples, h, w, counts, S: tl.constexpr):
    """Samples in a turn: pixels x, y to their upper left, how far from there, offsets of that pixel
    in value and of the reference point, and which exist. left: bits of the cameras to come.
    """
    point, sample, exists, _attention, offset_x, offset_y = samples
    if S.cameras > 0:
        there = left > 0
        lowest = (left & -left).to(tl.float32)  # exact, and its exponent says which bit it is
        camera = (lowest.to(tl.int32, bitcast=True) >> 23) - 127
        image = (turns[4] + camera).to(tl.int64) * counts[3] * (S.heads * S.width)
        at = (turns[5] + camera * counts[0])[:, None] * (2 * S.points) + 2 * point
        exists = there[:, None] & exists
    else:
        at = 2 * sample
    reference_x = tl.load(reference_points + at, exists, other=0.0).to(tl.float32)
    reference_y = tl.load(reference_points + at + 1, exists, other=0.0).to(tl.float32)
    x, fx = _locate(reference_x, w, offset_x, exists)
    y, fy = _locate(reference_y, h, offset_y, exists)
    pixel = ((y * w + x) * (S.heads * S.width))[:, :, None]
    if S.cameras > 0:
        pixel = image[:, None, None] + pixel
    return x, y, fx, fy, pixel, at, exists


@triton.jit
def _tile(logits, first, seen, column, S: tl.constexpr):
    """BLOCK_P BLOCK_C logits of a row from `first` on, -inf where there are none."""
    mask = seen[:, None, None] & (first + column < S.levels * S.points)
    return tl.load(logits[:, :, None] + first + column, mask, other=-float("inf")).to(tl.float32)


@triton.jit
def _log_norm(logits, seen, channel, S: tl.constexpr):
    """log sum exp of the rows at logits [BLOCK_Q, 1]; 0 where none is seen [BLOCK_Q].

    In tiles of the shape that samples have later: reductions then end in the lanes that need them.
    """
    column = tl.arange(0, S.block_p)[None, :, None] * S.block_c + channel[None, None, :]
    top = tl.full([S.block_q, S.block_p, S.block_c], -float("inf"), tl.float32)
    for first in range(0, S.levels * S.points, S.block_p * S.block_c):
        top = tl.maximum(top, _tile(logits, first, seen, column, S))
    top = tl.where(seen, tl.max(tl.max(top, axis=2), axis=1), 0.0)
    total = tl.full([S.block_q, S.block_p, S.block_c], 0.0, tl.float32)
    for first in range(0, S.levels * S.points, S.block_p * S.block_c):
        total += tl.exp(_tile(logits, first, seen, column, S) - top[:, None, None])
    total = tl.sum(tl.sum(total, axis=2), axis=1)
    return top + tl.log(tl.where(seen, total, 1.0))


# -----------------------------------------------------------------------------------------------
# Forward


@triton.jit
def deformable_forward(
    value,
    reference_points,
    offsets,
    logits,
    sees,
    out,
    norms,
    sizes,
    counts,
    S: tl.constexpr,
):
    """out [total, heads, width], norms [total, heads]: log sum exp of the logits.

    sees: by which cameras a query is seen; sizes: h, w of every level; counts: queries, total = B
    queries, rows of reference points, tokens; S: a `Shape`.
    """
    LEVELS: tl.constexpr = S.levels
    ROW: tl.constexpr = S.heads * S.width
    SAMPLES: tl.constexpr = LEVELS * S.points
    query, mine, row, channel, values, points = _begin(counts, S)
    inside = (channel < S.width)[None, None, :]
    offsets += row[:, None] * (2 * SAMPLES)
    logits += row[:, None] * SAMPLES
    value += values
    reference_points += points
    turns = _turns(sees, query, counts[0], S)
    count, rounds, seen = turns[1], turns[2], turns[3]

    norm = _log_norm(logits, seen, channel, S)
    tl.store(norms + row, norm, mine)
    result = tl.full([S.block_q, S.block_p, S.block_c], 0.0, tl.float32)
    for level in tl.static_range(LEVELS):
        h, w = sizes[2 * level], sizes[2 * level + 1]
        for start in range(0, S.points, S.block_p):
            samples = _samples(logits, offsets, norm, seen, level, start, S)
            left = turns[0]
            for _turn in range(rounds):
                x, y, fx, fy, pixel, _at, _exists = _located(
                    reference_points, turns, left, samples, h, w, counts, S
                )
                left &= left - 1
                pixels = _corners(value + pixel, w * ROW, ROW)
                exist = _corners_exist(x, y, h, w, inside)
                weights = _corner_weights(fx, fy, samples[3])
                corners = ()
                for i in tl.static_range(4):
                    corners += (tl.load(pixels[i], exist[i], other=0.0),)
                for i in tl.static_range(4):
                    result += corners[i].to(tl.float32) * weights[i][:, :, None]
        value += h * w * ROW
    result = tl.sum(result, axis=1)
    if S.cameras > 0:
        result = tl.where(seen[:, None], result / tl.maximum(count, 1)[:, None], 0.0)
    mask = mine[:, None] & (channel < S.width)[None, :]
    tl.store(out + row[:, None] * S.width + channel[None, :], result, mask)


# -----------------------------------------------------------------------------------------------
# Backward


@triton.jit
def _scatter(sums, numbers, mask, scale, FIXED: tl.constexpr):
    """sums += numbers, which several programs may do at the same place.

    With FIXED the sums are integers, units of 1 / scale: these do not depend on the order.
    """
    if FIXED:
        tl.atomic_add(sums, (numbers * scale).to(tl.int64), mask, sem="relaxed")
    else:
        tl.atomic_add(sums, numbers, mask, sem="relaxed")


@triton.jit
def deformable_backward(
    grad,
    value,
    reference_points,
    offsets,
    logits,
    sees,
    out,
    norms,
    grads,
    scales,
    sizes,
    counts,
    S: tl.constexpr,
    VALUE: tl.constexpr,
    REFERENCE: tl.constexpr,
    FIXED: tl.constexpr,
):
    """grads of value, reference_points, offsets and logits, given that of out. With VALUE, with
    REFERENCE: adds to the first, to the second, which are zero.

    Through the softmax: by logit = a (by a - sum of a by a), the sum being grad * out.
    """
    LEVELS: tl.constexpr = S.levels
    ROW: tl.constexpr = S.heads * S.width
    SAMPLES: tl.constexpr = LEVELS * S.points
    grad_value, grad_reference, grad_offsets, grad_logits = grads
    query, mine, row, channel, values, points = _begin(counts, S)
    inside = (channel < S.width)[None, None, :]
    offsets += row[:, None] * (2 * SAMPLES)
    logits += row[:, None] * SAMPLES
    grad_offsets += row[:, None] * (2 * SAMPLES)
    grad_logits += row[:, None] * SAMPLES
    value += values
    grad_value += values
    reference_points += points
    grad_reference += points
    if FIXED:
        value_scale, reference_scale = tl.load(scales), tl.load(scales + 1)
    else:
        value_scale, reference_scale = 1.0, 1.0

    there = mine[:, None, None] & inside
    of_row = row[:, None, None] * S.width + channel[None, None, :]
    upstream = tl.load(grad + of_row, there, other=0.0).to(tl.float32)  # [BLOCK_Q, 1, BLOCK_C]
    mean = tl.sum(upstream * tl.load(out + of_row, there, other=0.0).to(tl.float32), axis=2)
    norm = tl.load(norms + row)
    turns = _turns(sees, query, counts[0], S)
    count, rounds, seen = turns[1], turns[2], turns[3]
    if S.cameras > 0:
        upstream = upstream / tl.maximum(count, 1)[:, None, None]

    for level in tl.static_range(LEVELS):
        h, w = sizes[2 * level], sizes[2 * level + 1]
        for start in range(0, S.points, S.block_p):
            samples = _samples(logits, offsets, norm, seen, level, start, S)
            point, sample, _valid, attention, offset_x, offset_y = samples
            zero = tl.full([S.block_q, S.block_p], 0.0, tl.float32)
            by_attention, by_x, by_y = zero, zero, zero
            left = turns[0]
            for _turn in range(rounds):
                x, y, fx, fy, pixel, at, exists = _located(
                    reference_points, turns, left, samples, h, w, counts, S
                )
                left &= left - 1
                pixels = _corners(value + pixel, w * ROW, ROW)
                exist = _corners_exist(x, y, h, w, inside)
                dots = ()
                for i in tl.static_range(4):
                    corner = tl.load(pixels[i], exist[i], other=0.0).to(tl.float32)
                    dots += (tl.sum(corner * upstream, axis=2),)
                slopes = _bilinear_derivatives(dots, fx, fy)
                by_attention += slopes[0]
                by_x += slopes[1]
                by_y += slopes[2]
                if REFERENCE:
                    exists = mine[:, None] & exists
                    slope_x, slope_y = attention * slopes[1] * w, attention * slopes[2] * h
                    _scatter(grad_reference + at, slope_x, exists, reference_scale, FIXED)
                    _scatter(grad_reference + at + 1, slope_y, exists, reference_scale, FIXED)
                if VALUE:
                    weights = _corner_weights(fx, fy, attention)
                    sums = _corners(grad_value + pixel, w * ROW, ROW)
                    for i in tl.static_range(4):
                        share = weights[i][:, :, None] * upstream
                        _scatter(sums[i], share, exist[i], value_scale, FIXED)
            mask = mine[:, None]
            if S.points % S.block_p != 0:
                mask = mask & (point < S.points)
            by_x *= attention * displaced_slope(offset_x)
            by_y *= attention * displaced_slope(offset_y)
            tl.store(grad_offsets + 2 * sample, by_x, mask)
            tl.store(grad_offsets + 2 * sample + 1, by_y, mask)
            tl.store(grad_logits + sample, attention * (by_attention - mean), mask)
        value += h * w * ROW
        grad_value += h * w * ROW


# -----------------------------------------------------------------------------------------------
# Launches


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
