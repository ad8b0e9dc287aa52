"""Pieces of walking a ray through a volume in Triton, shared by everything that renders.

A program holds a tile [RAYS, BLOCK]: BLOCK samples of each of its rays, one a lane. Per-ray numbers
are [RAYS, 1], the channels of a sample are the last axis of [RAYS, BLOCK, CHANNELS]. All of a tile
lies in one warp, so nothing here meets a barrier.

Where samples lie in the volume: `Place` below is the tuple (y, x, z, fraction_y, fraction_x,
fraction_z) of a sample's cell, lowest node first, and of its position in it, 0 to 1.
"""

import torch

from kernels.dispatch import tl, triton

LANES = 64 if torch.version.hip else 32  # of a warp, each of which holds one sample
BLOCK = 32  # samples of a ray at once, after which forward leaves the transmittance for backward


# -----------------------------------------------------------------------------------------------
# Where samples are


@triton.jit
def read_ray(ray, origins, directions, near, far, jitter, samples, JITTER: tl.constexpr):
    """Origin x, y, z, direction x, y, z, nearest distance, length of an interval, jitter."""
    start, end = tl.load(near + ray).to(tl.float32), tl.load(far + ray).to(tl.float32)
    random = 0.0 * start
    if JITTER:
        random = tl.load(jitter + ray).to(tl.float32)
    return (
        tl.load(origins + 3 * ray).to(tl.float32),
        tl.load(origins + 3 * ray + 1).to(tl.float32),
        tl.load(origins + 3 * ray + 2).to(tl.float32),
        tl.load(directions + 3 * ray).to(tl.float32),
        tl.load(directions + 3 * ray + 1).to(tl.float32),
        tl.load(directions + 3 * ray + 2).to(tl.float32),
        start,
        (end - start) / samples,
        random,
    )


@triton.jit
def _shift(edge, jitter, samples, JITTER: tl.constexpr):
    """How far an edge moves, in intervals: between the middles of those it parts."""
    lower = tl.where(edge > 0, -0.5, 0.0)
    upper = tl.where(edge < samples, 0.5, 0.0)
    return lower + (upper - lower) * jitter if JITTER else 0.0 * lower


@triton.jit
def interval(sample, ray, samples, JITTER: tl.constexpr):
    """Start, length and middle of the intervals of samples [1, BLOCK] along a ray, metres."""
    _, _, _, _, _, _, near, step, jitter = ray
    first = _shift(sample, jitter, samples, JITTER)
    second = _shift(sample + 1, jitter, samples, JITTER)
    start = near + step * (sample + first)
    delta = step * (1 + (second - first))
    return start, delta, start + 0.5 * delta


@triton.jit
def _along(origin, direction, t, low, scale, NODES: tl.constexpr):
    """Lowest node and fraction along an axis; the border beyond the box, and for NaN."""
    place = (origin - low) * scale + direction * scale * t
    place = tl.minimum(tl.where(place > 0, place, 0.0), NODES - 1.0)
    node = tl.minimum(place.to(tl.int32), NODES - 2)
    return node, place - node


@triton.jit
def locate(ray, t, low, scale, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    """The `Place` of the samples at distances t; low and scale: x, y, z of the box's first corner
    and nodes a metre.
    """
    origin_x, origin_y, origin_z, x, y, z, _, _, _ = ray
    node_x, fraction_x = _along(origin_x, x, t, low[0], scale[0], WIDTH)
    node_y, fraction_y = _along(origin_y, y, t, low[1], scale[1], HEIGHT)
    node_z, fraction_z = _along(origin_z, z, t, low[2], scale[2], DEPTH)
    return node_y, node_x, node_z, fraction_y, fraction_x, fraction_z


# -----------------------------------------------------------------------------------------------
# Reading the volume there, and adding to it


@triton.jit
def corner_share(place, CORNER: tl.constexpr):
    """Trilinear weight of a corner of the cell; bits 4, 2, 1: the upper node along y, x, z."""
    _, _, _, y, x, z = place
    share = y if CORNER & 4 else 1 - y
    share *= x if CORNER & 2 else 1 - x
    share *= z if CORNER & 1 else 1 - z
    return share


@triton.jit
def node_offset(place, Y: tl.constexpr, X: tl.constexpr, Z: tl.constexpr):
    """Where the lowest corner of the cell lies in memory; Y, X, Z are the strides."""
    node_y, node_x, node_z, _, _, _ = place
    return node_y * Y + node_x * X + node_z * Z


@triton.jit
def corner_step(CORNER: tl.constexpr, Y: tl.constexpr, X: tl.constexpr, Z: tl.constexpr):
    """How far from there another corner lies."""
    return (CORNER // 4) * Y + (CORNER // 2 % 2) * X + (CORNER % 2) * Z


@triton.jit
def _read(pointers, mask):
    out = tl.load(pointers) if mask is None else tl.load(pointers, mask, other=0.0)
    return out.to(tl.float32)


@triton.jit
def read_channels(
    volume,
    place,
    channel,
    mask,
    Y: tl.constexpr,
    X: tl.constexpr,
    Z: tl.constexpr,
    C: tl.constexpr,
):
    """Trilinear values [RAYS, SAMPLES, CHANNELS], 0 outside the mask if there is one; volume:
    pointers [RAYS, 1]; Y, X, Z, C: strides.
    """
    # one address a sample, from which the other corners are constants away
    lowest = (volume + node_offset(place, Y, X, Z))[:, :, None] + channel * C
    out = corner_share(place, 0)[:, :, None] * _read(lowest, mask)
    for corner in tl.static_range(1, 8):
        value = _read(lowest + corner_step(corner, Y, X, Z), mask)
        out += corner_share(place, corner)[:, :, None] * value
    return out


@triton.jit
def add_channels(
    target,
    place,
    channel,
    value,
    mask,
    scale,
    Y: tl.constexpr,
    X: tl.constexpr,
    Z: tl.constexpr,
    C: tl.constexpr,
    FIXED: tl.constexpr,
):
    """The transpose of `read_channels`: adds to `target` by atomics, if FIXED as integers of
    1 / scale, whose sum does not depend on the order.
    """
    lowest = (target + node_offset(place, Y, X, Z))[:, :, None] + channel * C
    for corner in tl.static_range(8):
        part = corner_share(place, corner)[:, :, None] * value
        if FIXED:
            part = (part.to(tl.float64) * scale).to(tl.int64)
        tl.atomic_add(lowest + corner_step(corner, Y, X, Z), part, mask, sem="relaxed")


@triton.jit
def some(x, first, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """x [RAYS, BLOCK] of COUNT samples from `first` on."""
    if COUNT == BLOCK:
        out = x
    else:
        index = tl.zeros([x.shape[0], COUNT], tl.int32) + first + tl.arange(0, COUNT)[None, :]
        out = tl.gather(x, index, 1)
    return out


@triton.jit
def whole(x, first, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of `some`, zero for the other samples."""
    if COUNT == BLOCK:
        out = x
    else:
        index = tl.zeros([x.shape[0], BLOCK], tl.int32) + tl.arange(0, BLOCK)[None, :] - first
        there = (index >= 0) & (index < COUNT)
        out = tl.where(there, tl.gather(x, tl.where(there, index, 0), 1), 0.0)
    return out


@triton.jit
def some_places(place, first, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    node_y, node_x, node_z, y, x, z = place
    return (
        some(node_y, first, COUNT, BLOCK),
        some(node_x, first, COUNT, BLOCK),
        some(node_z, first, COUNT, BLOCK),
        some(y, first, COUNT, BLOCK),
        some(x, first, COUNT, BLOCK),
        some(z, first, COUNT, BLOCK),
    )


@triton.jit
def unpack(x):
    """[RAYS, BLOCK, 4] -> four times [RAYS, BLOCK], all in the lanes that hold them."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def pack(a, b, c, d):
    """The inverse of `unpack`."""
    pairs = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(pairs, [a.shape[0], a.shape[1], 4])


@triton.jit
def read_geometry(table, place, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    """SDF and its gradient x, y, z [RAYS, BLOCK] from the rows of `differences.node_table`."""
    row = tl.arange(0, 4)[None, None, :]
    # every place lies in the volume, hence no mask
    return unpack(read_channels(table, place, row, None, 4 * WIDTH * DEPTH, 4 * DEPTH, 4, 1))


# -----------------------------------------------------------------------------------------------
# What a sample shows


@triton.jit
def appearance(features, channel, COLORS: tl.constexpr, CLASSES: tl.constexpr):
    """Colours and probabilities of the classes [RAYS, BLOCK, CHANNELS] from interpolated channels,
    the first of which is the SDF and means nothing here.
    """
    color = 0.28209479177387814 * features + 0.5  # SH0
    out = tl.where(color < 0, 0.0, color)
    if CLASSES > 0:
        logit = (channel > COLORS) & (channel <= COLORS + CLASSES)
        shifted = tl.where(logit, features, float("-inf"))
        powers = tl.exp(shifted - tl.max(shifted, 2, keep_dims=True))
        out = tl.where(logit, powers / tl.sum(powers, 2, keep_dims=True), out)
    return out


@triton.jit
def appearance_gradient(shown, grad, channel, COLORS: tl.constexpr, CLASSES: tl.constexpr):
    """Gradient of interpolated channels, given that of what `appearance` made of them."""
    out = tl.where(shown > 0, 0.28209479177387814 * grad, 0.0)
    if CLASSES > 0:
        logit = (channel > COLORS) & (channel <= COLORS + CLASSES)
        mean = tl.sum(tl.where(logit, shown * grad, 0.0), 2, keep_dims=True)
        out = tl.where(logit, shown * (grad - mean), out)
    return out


# -----------------------------------------------------------------------------------------------
# Light


@triton.jit
def before(x, first, BLOCK: tl.constexpr):
    """x of the sample before, `first` [RAYS, 1] for the first of a tile."""
    if BLOCK == 1:
        out = first + 0.0 * x
    else:
        lane = tl.zeros_like(x).to(tl.int32) + tl.arange(0, BLOCK)[None, :]
        out = tl.where(lane > 0, tl.gather(x, tl.maximum(lane - 1, 0), 1), first)
    return out


@triton.jit
def behind(x, last, BLOCK: tl.constexpr):
    """x of the sample behind, `last` [RAYS, 1] for the last of a tile."""
    if BLOCK == 1:
        out = last + 0.0 * x
    else:
        lane = tl.zeros_like(x).to(tl.int32) + tl.arange(0, BLOCK)[None, :]
        out = tl.gather(x, tl.minimum(lane + 1, BLOCK - 1), 1)
        out = tl.where(lane < BLOCK - 1, out, last)
    return out


@triton.jit
def _column(x, COLUMN: tl.constexpr):
    return tl.gather(x, tl.full([x.shape[0], 1], COLUMN, tl.int32), 1)


@triton.jit
def transmittance(alpha, inside, light, BLOCK: tl.constexpr):
    """Light that reaches every sample [RAYS, BLOCK], and what leaves the tile [RAYS, 1], given what
    enters it; samples that are not `inside` stop nothing. 1e-4 is the published epsilon.
    """
    passed = tl.where(inside, 1 - alpha + 1e-4, 1.0)
    if BLOCK == 1:
        reaches, leaves = light + 0.0 * alpha, light * passed
    else:
        product = light * tl.cumprod(passed, 1)
        reaches = before(product, light, BLOCK)
        leaves = _column(product, BLOCK - 1)
    return reaches, leaves


@triton.jit
def alpha_gradient(alpha, light, weight, grad, inside, later, BLOCK: tl.constexpr):
    """Gradient of alpha, given that of the weights; and `later` [RAYS, 1], the sum of weight grad
    over the samples behind the tile, with those of the tile.

        d w_j / d alpha_i = light_i if j = i, and -w_j / (1 - alpha_i + eps) for j > i
    """
    part = tl.where(inside, weight * grad, 0.0)
    if BLOCK == 1:
        total, rest = part, later + 0.0 * part
    else:
        sums = tl.cumsum(part, 1, reverse=True)
        total = _column(sums, 0)
        rest = behind(sums, 0.0 * total, BLOCK) + later
    out = light * grad - rest / (1 - alpha + 1e-4)
    return tl.where(inside, out, 0.0), later + total
