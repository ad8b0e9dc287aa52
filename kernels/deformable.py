"""Multi-scale deformable sampling (Zhu et al. 2021, eq. 3; spec section 4).

    a         = softmax(logits)                          over the levels l and points p
    (x, y)    = reference * (w_l, h_l) + displacement(offset) - 1/2         pixels of level l
    out[q, k] = sum_lp a * bilinear(value_l[k], x, y)    head k; zero outside the level

With pairs, a query is sampled once in every value map it is paired with, and its result is the mean
over those pairs.

The kernels read the two linear layers' raw outputs, and neither locations nor weights reach memory.
A program holds a few queries of one head and walks over their levels and points, BLOCK_P points at
a time. Its tiles are [BLOCK_Q, BLOCK_P] for what belongs to a sample and [.., BLOCK_C] for its
channels, and lanes of a warp lie beside each other along the channels first: with 16 float32
channels, four lanes read the 64 bytes of a pixel at once, and a warp reads four samples of two
queries. What belongs to a sample is computed by those four lanes alike, which costs less than
passing it around. The reference is in `deformable_cpu.py`.
"""

import torch
from torch import Tensor

from kernels.deformable_cpu import Sampling
from kernels.dispatch import launch, tl, triton, use_triton

# Chosen from the binaries for sm_80 to sm_120, not timed: at published sizes 53 to 98 registers a
# thread (126 forward on sm_86, which has room), no spills, and on sm_90 about 95 instructions
# forward and 170 backward for the eight samples that a warp does at once. One warp a program needs
# no barriers, and 32 of them fit on a processor of sm_90; with two or four ptxas spills. A lane
# reads 16 bytes of a pixel forward; backward it has four channels, which sm_90 and later add to the
# sums with one instruction (red.v4.f32). Two lanes a pixel at least: then a tile of samples has
# fewer elements than there are lanes, and Triton lets each lane load the numbers of its own sample,
# rather than passing them through shared memory.
WARPS = 1
REGISTERS, REGISTERS_FIXED = 104, 128  # of backward; left alone, ptxas spills up to 24 bytes
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
def _pair(pairs, by_query, begin, count, turn):
    """Of queries [BLOCK_Q]: their pair in this turn, the map it reads, whether there is one."""
    exists = turn < count
    pair = tl.load(by_query + begin + turn, exists, other=0)
    return pair, tl.load(pairs + 2 * pair, exists, other=0), exists


@triton.jit
def _log_norm(
    logits,
    seen,
    channel,
    SAMPLES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """log sum exp of the rows at logits [BLOCK_Q, 1]; 0 where none is seen [BLOCK_Q].

    In tiles of the shape that samples have later: reductions then end in the lanes that need them.
    """
    column = tl.arange(0, BLOCK_P)[None, :, None] * BLOCK_C + channel[None, None, :]
    top = tl.full([BLOCK_Q, BLOCK_P, BLOCK_C], -float("inf"), tl.float32)
    for start in range(0, SAMPLES, BLOCK_P * BLOCK_C):
        mask = seen[:, None, None] & (start + column < SAMPLES)
        logit = tl.load(logits[:, :, None] + start + column, mask, other=-float("inf"))
        top = tl.maximum(top, logit.to(tl.float32))
    top = tl.max(tl.max(top, axis=2), axis=1)
    top = tl.where(seen, top, 0.0)
    total = tl.zeros([BLOCK_Q, BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, SAMPLES, BLOCK_P * BLOCK_C):
        mask = seen[:, None, None] & (start + column < SAMPLES)
        logit = tl.load(logits[:, :, None] + start + column, mask, other=-float("inf"))
        total += tl.exp(logit.to(tl.float32) - top[:, None, None])
    total = tl.sum(tl.sum(total, axis=2), axis=1)
    return top + tl.log(tl.where(seen, total, 1.0))


# -----------------------------------------------------------------------------------------------
# Forward


@triton.jit
def _forward(
    value,
    reference_points,
    offsets,
    logits,
    pairs,
    by_query,
    first,
    out,
    norms,
    sizes,
    queries,
    total,
    references,
    tokens,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out [total, HEADS, WIDTH], norms [total, HEADS]: log sum exp of the logits.

    total = B * queries; sizes: h, w of every level; references: rows of reference points.
    """
    SAMPLES: tl.constexpr = LEVELS * POINTS
    ROW: tl.constexpr = HEADS * WIDTH
    head = tl.program_id(0) % HEADS
    query = tl.program_id(0) // HEADS * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mine = query < total
    query = tl.minimum(query, total - 1)  # instead of masks, the last one is computed repeatedly
    channel = tl.arange(0, BLOCK_C)
    inside = (channel < WIDTH)[None, None, :]
    row = query.to(tl.int64) * HEADS + head
    offsets += row[:, None] * (2 * SAMPLES)
    logits += row[:, None] * SAMPLES
    value += head * WIDTH + channel[None, None, :]
    if PAIRS:
        begin = tl.load(first + query)
        count = tl.load(first + query + 1) - begin
        rounds = tl.max(count, axis=0)
        seen = count > 0
    else:
        rounds = 1
        seen = tl.full([BLOCK_Q], True, tl.int1)
        value += ((query // queries).to(tl.int64) * tokens * ROW)[:, None, None]
        reference_points += (query % references).to(tl.int64)[:, None] * (2 * SAMPLES)

    norm = _log_norm(logits, seen, channel, SAMPLES, BLOCK_Q, BLOCK_P, BLOCK_C)
    tl.store(norms + row, norm, mine)
    result = tl.zeros([BLOCK_Q, BLOCK_P, BLOCK_C], tl.float32)
    for level in tl.static_range(LEVELS):
        h, w = sizes[2 * level], sizes[2 * level + 1]
        for start in range(0, POINTS, BLOCK_P):
            point = start + tl.arange(0, BLOCK_P)[None, :]
            valid = seen[:, None]
            if POINTS % BLOCK_P != 0:
                valid = valid & (point < POINTS)
            sample = level * POINTS + point
            logit = tl.load(logits + sample, valid, other=-float("inf")).to(tl.float32)
            attention = tl.exp(logit - norm[:, None])
            offset_x = tl.load(offsets + 2 * sample, valid, other=0.0).to(tl.float32)
            offset_y = tl.load(offsets + 2 * sample + 1, valid, other=0.0).to(tl.float32)
            for turn in range(rounds):
                if PAIRS:
                    pair, image, exists = _pair(pairs, by_query, begin, count, turn)
                    at = reference_points + pair[:, None] * (2 * POINTS) + 2 * point
                    pixels = value + (image * tokens * ROW)[:, None, None]
                    exists = exists[:, None] & valid
                else:
                    at, pixels, exists = reference_points + 2 * sample, value, valid
                reference_x = tl.load(at, exists, other=0.0).to(tl.float32)
                reference_y = tl.load(at + 1, exists, other=0.0).to(tl.float32)
                x, fx = _locate(reference_x, w, offset_x, exists)
                y, fy = _locate(reference_y, h, offset_y, exists)
                pixels = _corners(pixels + ((y * w + x) * ROW)[:, :, None], w * ROW, ROW)
                exist = _corners_exist(x, y, h, w, inside)
                weights = _corner_weights(fx, fy, attention)
                corners = ()
                for i in tl.static_range(4):
                    corners += (tl.load(pixels[i], exist[i], other=0.0),)
                for i in tl.static_range(4):
                    result += corners[i].to(tl.float32) * weights[i][:, :, None]
        value += h * w * ROW
    result = tl.sum(result, axis=1)
    if PAIRS:
        result = tl.where(seen[:, None], result / tl.maximum(count, 1)[:, None], 0.0)
    mask = mine[:, None] & (channel < WIDTH)[None, :]
    tl.store(out + row[:, None] * WIDTH + channel[None, :], result, mask)


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
def _backward(
    grad,
    value,
    reference_points,
    offsets,
    logits,
    pairs,
    by_query,
    first,
    out,
    norms,
    grad_value,
    grad_reference,
    grad_offsets,
    grad_logits,
    scales,
    sizes,
    queries,
    total,
    references,
    tokens,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    PAIRS: tl.constexpr,
    VALUE: tl.constexpr,
    REFERENCE: tl.constexpr,
    FIXED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Derivatives of sum(grad * out). With VALUE, with REFERENCE: adds those to sums of zero.

    Through the softmax: by logit = a (by a - sum of a by a), the sum being grad * out.
    """
    SAMPLES: tl.constexpr = LEVELS * POINTS
    ROW: tl.constexpr = HEADS * WIDTH
    head = tl.program_id(0) % HEADS
    query = tl.program_id(0) // HEADS * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mine = query < total
    query = tl.minimum(query, total - 1)
    channel = tl.arange(0, BLOCK_C)
    inside = (channel < WIDTH)[None, None, :]
    row = query.to(tl.int64) * HEADS + head
    offsets += row[:, None] * (2 * SAMPLES)
    logits += row[:, None] * SAMPLES
    grad_offsets += row[:, None] * (2 * SAMPLES)
    grad_logits += row[:, None] * SAMPLES
    in_head = head * WIDTH + channel[None, None, :]
    value += in_head
    grad_value += in_head
    if FIXED:
        value_scale, reference_scale = tl.load(scales), tl.load(scales + 1)
    else:
        value_scale, reference_scale = 1.0, 1.0

    there = mine[:, None, None] & inside
    of_row = row[:, None, None] * WIDTH + channel[None, None, :]
    upstream = tl.load(grad + of_row, there, other=0.0).to(tl.float32)  # [BLOCK_Q, 1, BLOCK_C]
    mean = tl.sum(upstream * tl.load(out + of_row, there, other=0.0).to(tl.float32), axis=2)
    norm = tl.load(norms + row)[:, None]
    if PAIRS:
        begin = tl.load(first + query)
        count = tl.load(first + query + 1) - begin
        rounds = tl.max(count, axis=0)
        seen = count > 0
        upstream = upstream / tl.maximum(count, 1)[:, None, None]
    else:
        rounds = 1
        seen = tl.full([BLOCK_Q], True, tl.int1)
        image = ((query // queries).to(tl.int64) * tokens * ROW)[:, None, None]
        value += image
        grad_value += image
        place = (query % references).to(tl.int64)[:, None] * (2 * SAMPLES)
        reference_points += place
        grad_reference += place

    for level in tl.static_range(LEVELS):
        h, w = sizes[2 * level], sizes[2 * level + 1]
        for start in range(0, POINTS, BLOCK_P):
            point = start + tl.arange(0, BLOCK_P)[None, :]
            valid = seen[:, None]
            if POINTS % BLOCK_P != 0:
                valid = valid & (point < POINTS)
            sample = level * POINTS + point
            logit = tl.load(logits + sample, valid, other=-float("inf")).to(tl.float32)
            attention = tl.exp(logit - norm)
            offset_x = tl.load(offsets + 2 * sample, valid, other=0.0).to(tl.float32)
            offset_y = tl.load(offsets + 2 * sample + 1, valid, other=0.0).to(tl.float32)
            by_attention = tl.zeros([BLOCK_Q, BLOCK_P], tl.float32)
            by_x = tl.zeros([BLOCK_Q, BLOCK_P], tl.float32)
            by_y = tl.zeros([BLOCK_Q, BLOCK_P], tl.float32)
            for turn in range(rounds):
                if PAIRS:
                    pair, image, exists = _pair(pairs, by_query, begin, count, turn)
                    at = pair[:, None].to(tl.int32) * (2 * POINTS) + 2 * point
                    image = (image * tokens * ROW)[:, None, None]
                    exists = exists[:, None] & valid
                else:
                    at, exists = 2 * sample, valid
                reference_x = tl.load(reference_points + at, exists, other=0.0).to(tl.float32)
                reference_y = tl.load(reference_points + at + 1, exists, other=0.0).to(tl.float32)
                x, fx = _locate(reference_x, w, offset_x, exists)
                y, fy = _locate(reference_y, h, offset_y, exists)
                first_pixel = ((y * w + x) * ROW)[:, :, None]
                if PAIRS:
                    first_pixel = image + first_pixel
                pixels = _corners(value + first_pixel, w * ROW, ROW)
                exist = _corners_exist(x, y, h, w, inside)
                dots = ()
                for i in tl.static_range(4):
                    pixel = tl.load(pixels[i], exist[i], other=0.0).to(tl.float32)
                    dots += (tl.sum(pixel * upstream, axis=2),)
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
                    sums = _corners(grad_value + first_pixel, w * ROW, ROW)
                    for i in tl.static_range(4):
                        share = weights[i][:, :, None] * upstream
                        _scatter(sums[i], share, exist[i], value_scale, FIXED)
            mask = mine[:, None]
            if POINTS % BLOCK_P != 0:
                mask = mask & (point < POINTS)
            by_x *= attention * displaced_slope(offset_x)
            by_y *= attention * displaced_slope(offset_y)
            tl.store(grad_offsets + 2 * sample, by_x, mask)
            tl.store(grad_offsets + 2 * sample + 1, by_y, mask)
            tl.store(grad_logits + sample, attention * (by_attention - mean), mask)
        value += h * w * ROW
        grad_value += h * w * ROW


# -----------------------------------------------------------------------------------------------
# Launches


def _pairs_by_query(pairs: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The pairs of query i are by_query[first[i] : first[i + 1]]. Nothing waits for the GPU."""
    query, by_query = pairs[:, 1].int().sort(stable=True)
    numbers = torch.arange(total + 1, dtype=torch.int32, device=pairs.device)
    return by_query, torch.searchsorted(query, numbers, out_int32=True)


def _problem(
    lane_bytes: int,
    value: Tensor,
    sizes: list[int],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    *pairs: Tensor | None,
) -> tuple[tuple[int], list[Tensor], tuple, dict[str, int]]:
    """What both launches share: grid, inputs, sizes, constants. Lanes read lane_bytes of value."""
    batch, queries, heads, levels, points, _ = offsets.shape
    tokens, _, width = value.shape[1:]
    block_c = triton.next_power_of_2(width)
    block_p = min(BLOCK_P, triton.next_power_of_2(points))
    lanes = max(2, block_c * value.element_size() // lane_bytes)
    block_q = max(1, 32 * WARPS // (lanes * block_p))
    programs = triton.cdiv(batch * queries, block_q) * heads
    tensors = [x.contiguous() for x in (value, reference_points, offsets, logits)]
    tensors += [logits if x is None else x.contiguous() for x in pairs]
    # with pairs nobody asks, and a number that changes from batch to batch would be compiled anew
    references = reference_points.shape[0] * queries if pairs[0] is None else 1
    counts = (tuple(sizes), queries, batch * queries, references, tokens)
    constants = dict(HEADS=heads, WIDTH=width, LEVELS=levels, POINTS=points)
    constants |= dict(PAIRS=pairs[0] is not None)
    constants |= dict(BLOCK_Q=block_q, BLOCK_P=block_p, BLOCK_C=block_c)
    return (programs,), tensors, counts, constants


@torch.library.custom_op("selfocc::deformable_sampling", mutates_args=())
def _forward_triton(
    value: Tensor,
    sizes: list[int],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    pairs: Tensor | None,
    by_query: Tensor | None,
    first: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, queries, heads = offsets.shape[:3]
    inputs = (value, sizes, reference_points, offsets, logits, pairs, by_query, first)
    grid, tensors, counts, constants = _problem(FORWARD_BYTES, *inputs)
    out = value.new_empty(batch, queries, heads * value.shape[3], dtype=torch.float32)
    norms = value.new_empty(batch, queries, heads, dtype=torch.float32)
    launch(_forward, grid, *tensors, out, norms, *counts, warps=WARPS, **constants)
    return out, norms


@_forward_triton.register_fake
def _(value, sizes, reference_points, offsets, logits, pairs, by_query, first):
    batch, queries, heads = offsets.shape[:3]
    out = value.new_empty(batch, queries, heads * value.shape[3], dtype=torch.float32)
    return out, value.new_empty(batch, queries, heads, dtype=torch.float32)


@torch.library.custom_op("selfocc::deformable_sampling_gradient", mutates_args=())
def _backward_triton(
    grad: Tensor,
    value: Tensor,
    sizes: list[int],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    pairs: Tensor | None,
    by_query: Tensor | None,
    first: Tensor | None,
    out: Tensor,
    norms: Tensor,
    wanted_value: bool,
    wanted_reference: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (value, sizes, reference_points, offsets, logits, pairs, by_query, first)
    lane_bytes = BACKWARD_CHANNELS * value.element_size()
    grid, tensors, counts, constants = _problem(lane_bytes, *inputs)
    fixed = torch.are_deterministic_algorithms_enabled()
    dtype = torch.int64 if fixed else torch.float32
    scales = _scales(grad, value, norms, max(sizes), len(offsets)) if fixed else norms
    by_value = value.new_zeros(value.shape if wanted_value else 0, dtype=dtype)
    by_reference = value.new_zeros(reference_points.shape if wanted_reference else 0, dtype=dtype)
    by_offsets = torch.empty_like(offsets, memory_format=torch.contiguous_format)
    by_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    launch(
        _backward,
        grid,
        grad.contiguous(),
        *tensors,
        out,
        norms,
        by_value,
        by_reference,
        by_offsets,
        by_logits,
        scales,
        *counts,
        warps=WARPS,
        registers=REGISTERS_FIXED if fixed else REGISTERS,
        VALUE=wanted_value,
        REFERENCE=wanted_reference,
        FIXED=fixed,
        **constants,
    )
    if fixed:
        by_value, by_reference = by_value.float() / scales[0], by_reference.float() / scales[1]
    by_value, by_reference = by_value.to(value.dtype), by_reference.to(reference_points.dtype)
    return by_value, by_reference, by_offsets, by_logits


@_backward_triton.register_fake
def _(grad, value, sizes, reference_points, offsets, logits, *others):
    wanted_value, wanted_reference = others[-2:]
    return (
        value.new_empty(value.shape if wanted_value else 0),
        reference_points.new_empty(reference_points.shape if wanted_reference else 0),
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


def _setup(ctx, inputs, output):
    value, ctx.sizes, *tensors = inputs
    ctx.save_for_backward(value, *tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad, _):
    value, *tensors = ctx.saved_tensors
    wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[2])
    by_value, by_reference, *others = _backward_triton(grad, value, ctx.sizes, *tensors, *wanted)
    by_value, by_reference = by_value if wanted[0] else None, by_reference if wanted[1] else None
    return by_value, None, by_reference, *others, None, None, None


_forward_triton.register_autograd(_autograd, setup_context=_setup)


# -----------------------------------------------------------------------------------------------


def deformable_sampling(
    value: Tensor,
    level_shapes: list[tuple[int, int]],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    pairs: Tensor | None = None,
) -> Tensor:
    """Attention-weighted bilinear samples of multi-level feature maps.

    Args:
        value: [M, V, heads, dh] tokens of M stacks of maps, one level after another, each row by
            row. M is B without pairs.
        level_shapes: (h, w) of every level; V is the sum of their areas.
        reference_points: (x, y) as fractions of the map, 0 and 1 at its outer edges. Without pairs
            [1 or B, Q, L, P, 2], with pairs [K, P, 2], shared by the levels.
        offsets: [B, Q, heads, L, P, 2] in pixels of the level.
        logits: [B, Q, heads, L * P] before the softmax over levels and points.
        pairs: int64 [K, 2] (row of value, flat query b * Q + q), sorted by the first column. A
            query's result is the mean over its pairs; one without pairs gets zero at no cost.

    Returns [B, Q, heads * dh] in value's dtype, differentiable in all four; sums are in float32, or
    float64 for float64 values. On a GPU, what is not contiguous is copied. Under
    `torch.use_deterministic_algorithms(True)` gradients are the same bit for bit in every run.
    Raises TypeError and ValueError that name the argument.
    """
    _check(value, level_shapes, reference_points, offsets, logits, pairs)
    shapes = [(int(h), int(w)) for h, w in level_shapes]
    if not use_triton(value):
        moves = displacement(offsets)
        return Sampling.apply(value, shapes, reference_points, moves, logits, pairs)
    by_query, first = None, None
    if pairs is not None:
        by_query, first = _pairs_by_query(pairs, offsets.shape[0] * offsets.shape[1])
    sizes = [side for shape in shapes for side in shape]
    out, _ = _forward_triton(
        value, sizes, reference_points, offsets, logits, pairs, by_query, first
    )
    return out.to(value.dtype)


def _check(value, level_shapes, reference_points, offsets, logits, pairs) -> None:
    if value.ndim != 4:
        raise ValueError(f"value must be [M, V, heads, dh], got {list(value.shape)}")
    if offsets.ndim != 6 or offsets.shape[2] != value.shape[2] or offsets.shape[5] != 2:
        raise ValueError(
            f"offsets must be [B, Q, {value.shape[2]} heads, L, P, 2], got {list(offsets.shape)}"
        )
    batch, queries, heads, levels, points, _ = offsets.shape
    if 0 in (levels, points, value.shape[3]):
        raise ValueError(
            f"offsets {list(offsets.shape)} and value {list(value.shape)} must have a level, a "
            "point and a channel at least"
        )
    if len(level_shapes) != levels:
        raise ValueError(f"level_shapes has {len(level_shapes)} levels, offsets {levels}")
    tokens = sum(h * w for h, w in level_shapes)
    if value.shape[1] != tokens:
        raise ValueError(
            f"value has {value.shape[1]} tokens, level_shapes {list(level_shapes)} make {tokens}"
        )
    if logits.shape != (batch, queries, heads, levels * points):
        raise ValueError(
            f"logits must be {[batch, queries, heads, levels * points]}, got {list(logits.shape)}"
        )
    for name, tensor in (("value", value), ("offsets", offsets), ("logits", logits)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    tensors = {"reference_points": reference_points, "offsets": offsets, "logits": logits}
    if pairs is None:
        expected = [[n, queries, levels, points, 2] for n in (1, batch)]
        if value.shape[0] != batch:
            raise ValueError(
                f"value has {value.shape[0]} maps for a batch of {batch}; "
                "pairs say which map a query reads"
            )
    else:
        tensors["pairs"] = pairs
        if pairs.dtype != torch.int64 or pairs.ndim != 2 or pairs.shape[1] != 2:
            raise TypeError(f"pairs must be int64 [K, 2], got {pairs.dtype} {list(pairs.shape)}")
        expected = [[len(pairs), points, 2]]
    if list(reference_points.shape) not in expected:
        raise ValueError(
            f"reference_points must be {expected[-1]}, got {list(reference_points.shape)}"
        )
    for name, size in (
        ("value", value.shape[1:].numel()),
        ("reference_points", reference_points.numel()),
    ):
        if size >= 2**31:
            raise ValueError(f"{name} is too large: the kernels count to 2^31, not {size}")
    for name, tensor in tensors.items():
        if tensor.device != value.device:
            raise ValueError(f"{name} is on {tensor.device}, value on {value.device}")
