"""The walk along a ray through a volume: what its samples are, read, show and stop, in Triton.

A program holds a tile [RAYS, BLOCK]: BLOCK samples of each of its rays, one a lane. Per-ray numbers
are [RAYS, 1], the channels of a sample are the last axis of [RAYS, BLOCK, CHANNELS]. All of a tile
lies in one warp, so nothing here meets a barrier.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import tl, triton

LANES = 64 if torch.version.hip else 32  # of a warp, each of which holds one sample


class Rays(NamedTuple):
    """Rays [B, R] as a kernel gets them."""

    origins: Tensor  # [B, R, 3]
    directions: Tensor  # [B, R, 3]
    near: Tensor
    far: Tensor
    jitter: Tensor  # is looked at if there is one


class Grid(NamedTuple):
    """Nodes of a volume and what its channels are; `channels`: 1 + colors + classes or more, a
    power of two.
    """

    height: int
    width: int
    depth: int
    colors: int
    classes: int
    channels: int


class Strides(NamedTuple):
    """Of a volume's items, nodes and channels."""

    item: int
    y: int
    x: int
    z: int
    c: int


class Line(NamedTuple):
    """A ray [RAYS, 1]; `step`: length of an interval."""

    origin_x: Tensor
    origin_y: Tensor
    origin_z: Tensor
    x: Tensor
    y: Tensor
    z: Tensor
    near: Tensor
    step: Tensor
    jitter: Tensor


class Intervals(NamedTuple):
    """How a ray is divided, as `kernels.render_rays` has it."""

    jitter: bool
    bend: float
    read: float


class Span(NamedTuple):
    """Length and middle of a sample's interval, and where it is read, metres along the ray."""

    length: Tensor
    middle: Tensor
    read: Tensor


class Place(NamedTuple):
    """The lowest node of a sample's cell, and where in the cell it lies, 0 to 1."""

    node_y: Tensor
    node_x: Tensor
    node_z: Tensor
    y: Tensor
    x: Tensor
    z: Tensor


class Surface(NamedTuple):
    """What a volume is at samples: SDF, its gradient, cosine between that and the ray, opacity."""

    sdf: Tensor
    x: Tensor
    y: Tensor
    z: Tensor
    cosine: Tensor
    alpha: Tensor


# -----------------------------------------------------------------------------------------------
# Where samples are


@triton.jit
def read_ray(rays, index, samples):
    """The `Line` of a ray."""
    near = tl.load(rays.near + index).to(tl.float32)
    far = tl.load(rays.far + index).to(tl.float32)
    return Line(
        tl.load(rays.origins + 3 * index).to(tl.float32),
        tl.load(rays.origins + 3 * index + 1).to(tl.float32),
        tl.load(rays.origins + 3 * index + 2).to(tl.float32),
        tl.load(rays.directions + 3 * index).to(tl.float32),
        tl.load(rays.directions + 3 * index + 1).to(tl.float32),
        tl.load(rays.directions + 3 * index + 2).to(tl.float32),
        near,
        (far - near) / samples,
        tl.load(rays.jitter + index).to(tl.float32),
    )


@triton.jit
def _shift(edge, jitter, samples, JITTER: tl.constexpr):
    """How far an edge moves, in intervals: between the middles of those it parts."""
    lower = tl.where(edge > 0, -0.5, 0.0)
    upper = tl.where(edge < samples, 0.5, 0.0)
    return lower + (upper - lower) * jitter if JITTER else 0.0 * lower


@triton.jit
def interval(sample, line, samples, INTERVALS: tl.constexpr):
    """The `Span` of samples [1, BLOCK] along a ray."""
    first = _shift(sample, line.jitter, samples, INTERVALS.jitter)
    second = _shift(sample + 1, line.jitter, samples, INTERVALS.jitter)
    start = line.step * (sample + first)
    length = line.step * (1 + (second - first))
    if INTERVALS.bend != 0:
        start *= 1 + INTERVALS.bend * ((sample + first) / samples - 1)
        length *= 1 + INTERVALS.bend * ((2 * sample + 1 + (first + second)) / samples - 1)
    start += line.near
    read = start + INTERVALS.read * length if INTERVALS.read != 0 else start
    return Span(length, start + 0.5 * length, read)


@triton.jit
def _along(origin, direction, t, low, scale, NODES: tl.constexpr):
    """Lowest node and fraction along an axis; the border beyond the box, and for NaN."""
    place = (origin - low) * scale + direction * scale * t
    place = tl.minimum(tl.where(place > 0, place, 0.0), NODES - 1.0)
    node = tl.minimum(place.to(tl.int32), NODES - 2)
    return node, place - node


@triton.jit
def locate(line, t, low, scale, GRID: tl.constexpr):
    """The `Place` of the samples at distances t; low and scale: x, y, z of the box's first corner
    and nodes a metre.
    """
    node_x, x = _along(line.origin_x, line.x, t, low[0], scale[0], GRID.width)
    node_y, y = _along(line.origin_y, line.y, t, low[1], scale[1], GRID.height)
    node_z, z = _along(line.origin_z, line.z, t, low[2], scale[2], GRID.depth)
    return Place(node_y, node_x, node_z, y, x, z)


# -----------------------------------------------------------------------------------------------
# Reading the volume there, and adding to it


@triton.jit
def _corner_share(place, CORNER: tl.constexpr):
    """Trilinear weight of a corner of the cell; bits 4, 2, 1: the upper node along y, x, z."""
    share = place.y if CORNER & 4 else 1 - place.y
    share *= place.x if CORNER & 2 else 1 - place.x
    share *= place.z if CORNER & 1 else 1 - place.z
    return share


@triton.jit
def _lowest(pointer, place, channel, STRIDES: tl.constexpr):
    """Pointers [RAYS, SAMPLES, CHANNELS] to the lowest corners, from which the others are constants
    away.
    """
    node = place.node_y * STRIDES.y + place.node_x * STRIDES.x + place.node_z * STRIDES.z
    return (pointer + node)[:, :, None] + channel * STRIDES.c


@triton.jit
def _step(CORNER: tl.constexpr, STRIDES: tl.constexpr):
    """How far from the lowest corner another one lies."""
    return (CORNER // 4) * STRIDES.y + (CORNER // 2 % 2) * STRIDES.x + (CORNER % 2) * STRIDES.z


@triton.jit
def _read(pointers, mask):
    out = tl.load(pointers) if mask is None else tl.load(pointers, mask, other=0.0)
    return out.to(tl.float32)


@triton.jit
def read_channels(volume, place, channel, mask, STRIDES: tl.constexpr):
    """Trilinear values [RAYS, SAMPLES, CHANNELS], 0 outside the mask if there is one."""
    lowest = _lowest(volume, place, channel, STRIDES)
    out = _corner_share(place, 0)[:, :, None] * _read(lowest, mask)
    for corner in tl.static_range(1, 8):
        value = _read(lowest + _step(corner, STRIDES), mask)
        out += _corner_share(place, corner)[:, :, None] * value
    return out


@triton.jit
def add_channels(
    target, place, channel, value, mask, unit, STRIDES: tl.constexpr, SCATTER: tl.constexpr
):
    """The transpose of `read_channels`: adds to `target` by atomics, with SCATTER "fixed" as
    integers of 1 / unit (a pointer), whose sum does not depend on the order. With "measure" it adds
    nothing, but returns the magnitude [RAYS, SAMPLES] of what would be.
    """
    if SCATTER == "measure":
        size = tl.sum(tl.where(mask, tl.abs(value), 0.0), 2)
    else:
        size = tl.zeros([value.shape[0], value.shape[1]], tl.float32)
        lowest = _lowest(target, place, channel, STRIDES)
        for corner in tl.static_range(8):
            part = _corner_share(place, corner)[:, :, None] * value
            if SCATTER == "fixed":
                part = (part.to(tl.float64) * tl.load(unit)).to(tl.int64)
            tl.atomic_add(lowest + _step(corner, STRIDES), part, mask, sem="relaxed")
    return size


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
def surface(
    table,
    place,
    line,
    last,
    length,
    inv_s,
    knobs,
    TABLE: tl.constexpr,
    ALPHA: tl.constexpr,
    BACKDROP: tl.constexpr,
):
    """The `Surface` at samples, from the rows of `node_losses.node_table`; last: which sample is
    the last of its ray, where a backdrop hangs.
    """
    # every place lies in the volume, hence no mask
    row = tl.arange(0, 4)[None, None, :]
    sdf, x, y, z = unpack(read_channels(table, place, row, None, TABLE))
    cosine = x * line.x + y * line.y + z * line.z
    alpha = ALPHA(sdf, cosine, length, inv_s, knobs)
    if BACKDROP:
        alpha = tl.where(last, 1.0, alpha)
    return Surface(sdf, x, y, z, cosine, alpha)


@triton.jit
def norm(at):
    """Length of a `Surface`'s gradient, differentiable at zero as in the reference."""
    return tl.sqrt(at.x * at.x + at.y * at.y + at.z * at.z + 1.1754943508222875e-38)


# -----------------------------------------------------------------------------------------------
# What a sample shows


@triton.jit
def _is_class(channel, GRID: tl.constexpr):
    return (channel > GRID.colors) & (channel <= GRID.colors + GRID.classes)


@triton.jit
def shown_by(
    volume,
    weight,
    place,
    first,
    channel,
    GRID: tl.constexpr,
    VOLUME: tl.constexpr,
    FEW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of the FEW samples from `first` on: their weights, places, which of [RAYS, FEW, CHANNELS] are
    read, and colours and probabilities of the classes, in which channel 0, the SDF, means nothing.
    """
    share = some(weight, first, FEW, BLOCK)[:, :, None]
    there = Place(*[some(x, first, FEW, BLOCK) for x in place])
    live = share != 0
    if GRID.channels > 1 + GRID.colors + GRID.classes:
        live &= channel <= GRID.colors + GRID.classes
    features = read_channels(volume, there, channel, live, VOLUME)
    color = 0.28209479177387814 * features + 0.5  # SH0
    shown = tl.where(color < 0, 0.0, color)
    if GRID.classes > 0:
        logit = _is_class(channel, GRID)
        shifted = tl.where(logit, features, float("-inf"))
        powers = tl.exp(shifted - tl.max(shifted, 2, keep_dims=True))
        shown = tl.where(logit, powers / tl.sum(powers, 2, keep_dims=True), shown)
    return share, there, live, shown


@triton.jit
def shown_gradient(shown, grad, channel, GRID: tl.constexpr):
    """Gradient of interpolated channels, given that of what `shown_by` made of them."""
    out = tl.where(shown > 0, 0.28209479177387814 * grad, 0.0)
    if GRID.classes > 0:
        logit = _is_class(channel, GRID)
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
