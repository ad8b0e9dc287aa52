"""The kernels of `deformable`: forward, and backward that computes samples again.

The kernels read the two linear layers' raw outputs, and neither locations nor weights reach memory.
A program holds a few queries of one head and walks over their levels and points, BLOCK_P points at
a time. Its tiles are [BLOCK_Q, BLOCK_P] for what belongs to a sample and [.., BLOCK_C] for its
channels, and lanes of a warp lie beside each other along the channels first: with 16 float32
channels, four lanes read the 64 bytes of a pixel at once, and a warp reads four samples of two
queries. What belongs to a sample is computed by those four lanes alike, which costs less than
passing it around.
"""

from typing import NamedTuple

from torch import Tensor

from kernels.dispatch import tl, triton

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
