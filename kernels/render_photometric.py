"""Rendering rays and the photometric error of all their samples in one walk.

`render_rays` followed by `epipolar_photometric`, the samples' middles being the depth proposals and
their weights those of the rendering (spec sections 8, 9 and 11):

    w_i = alpha_i prod_{j<i} (1 - alpha_j + eps)
    out = sum_i w_i value_i              distance, opacity, colours, classes
    l1  = sum_i w_i valid_i d_i / W,  color = sum_i w_i valid_i c_i / W,  W = sum_i w_i valid_i

A program walks one ray, a tile of samples at a time: volume and sources are read side by side, and
no weight is written. What forward keeps for backward are its results and the light that enters each
tile. Backward walks the tiles from the last to the first, reads everything again, and knows then
what all samples behind a tile wanted of the light they got.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.alpha import ALPHAS, alpha_of, alpha_slopes
from kernels.dispatch import launch, tl, triton, use_triton
from kernels.node_losses import node_table, node_table_adjoint
from kernels.proposals import (
    at_least_epsilon,
    check_views,
    compared_proposals,
    epipolar_photometric,
    ray_in_sources,
    result_gradient,
)
from kernels.ray import (
    LANES,
    add_channels,
    alpha_gradient,
    appearance,
    appearance_gradient,
    interval,
    locate,
    pack,
    read_channels,
    read_geometry,
    read_ray,
    some,
    some_places,
    transmittance,
    whole,
)
from kernels.render import FEATURES, Rendering, render_rays
from kernels.render_cpu import Box, node_spacing
from kernels.ssim import at_least_float32

# A ray a warp, a sample a lane: no barriers. Compiled for cuda 90 at published sizes: 102 to 119
# registers forward, 137 to 149 backward. Sources are read first, while little else is in registers.
WARPS = 1
REGISTERS_FIXED = 200  # of the deterministic backward; left alone, ptxas spills up to 16 bytes


@triton.jit
def _surface(
    table,
    ray,
    sample,
    span,
    samples,
    low,
    scale,
    inv_s,
    anneal,
    nodes,
    ALPHA: tl.constexpr,
    BACKDROP: tl.constexpr,
):
    """Place, geometry (SDF and its gradient), cosine and alpha of samples [1, BLOCK]; span:
    their interval's start, length and middle.
    """
    place = locate(ray, span[0], low, scale, nodes[0], nodes[1], nodes[2])
    geometry = read_geometry(table, place, nodes[0], nodes[1], nodes[2])
    cosine = geometry[1] * ray[3] + geometry[2] * ray[4] + geometry[3] * ray[5]
    alpha = alpha_of(geometry[0], cosine, span[1], inv_s, anneal, ALPHA)
    if BACKDROP:
        alpha = tl.where(sample == samples - 1, 1.0, alpha)
    return place, geometry, cosine, alpha


@triton.jit
def _norm(geometry):
    squares = geometry[1] * geometry[1] + geometry[2] * geometry[2] + geometry[3] * geometry[3]
    return tl.sqrt(squares + 1.1754943508222875e-38)  # differentiable at zero, as in the reference


@triton.jit
def _forward(
    table,
    volume,
    inv_s,
    origins,
    directions,
    near,
    far,
    jitter,
    stretch,
    pixels,
    target,
    images,
    projections,
    distance,
    opacity,
    sums,
    eikonal,
    lights,
    l1,
    color,
    valid,
    total,
    samples,
    tiles,
    low_x,
    low_y,
    low_z,
    scale_x,
    scale_y,
    scale_z,
    anneal,
    sources,
    height,
    width,
    target_batch,
    target_camera,
    target_ray,
    target_channel,
    image_batch,
    image_source,
    image_camera,
    channel_stride,
    row_stride,
    column_stride,
    read_x,
    read_y,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    ITEM: tl.constexpr,
    C: tl.constexpr,
    Y: tl.constexpr,
    X: tl.constexpr,
    Z: tl.constexpr,
    JITTER: tl.constexpr,
    ALPHA: tl.constexpr,
    BACKDROP: tl.constexpr,
    COLORS: tl.constexpr,
    CLASSES: tl.constexpr,
    CHANNELS: tl.constexpr,
    COMBINE: tl.constexpr,
    SOURCES: tl.constexpr,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
):
    """Rays [B, N, R] -> distance, opacity, eikonal, sums [.., colours + classes], lights
    [.., tiles], and of the sources l1, color, valid, total [B, K or 1, N, R].
    """
    pixel, rays = tl.program_id(0), tl.num_programs(0)
    camera, cameras = tl.program_id(1), tl.num_programs(1)
    item = tl.program_id(2).to(tl.int64)
    index = tl.zeros([1, 1], tl.int64) + (item * cameras + camera) * rays + pixel
    ray = read_ray(index, origins, directions, near, far, jitter, samples, JITTER)
    metre = tl.load(stretch + index).to(tl.float32)
    sharpness = tl.load(inv_s).to(tl.float32)
    table += item * (HEIGHT * WIDTH * DEPTH * 4)
    volume += item * ITEM

    known, line, image, goal, results, answers = ray_in_sources(
        pixels,
        target,
        images,
        projections,
        (item, camera, pixel),
        (cameras, rays, sources),
        (target_batch, target_camera, target_ray, target_channel),
        (image_batch, image_source, image_camera),
        COMBINE,
        SOURCES,
    )

    zero = tl.zeros([1, BLOCK], tl.float32)
    sum_weight, sum_mid, sum_eikonal = zero, zero, zero
    sum_shown = tl.zeros([1, FEW, CHANNELS], tl.float32)
    zero = tl.zeros([1 if COMBINE else SOURCES, BLOCK], tl.float32)
    sum_l1, sum_red, sum_green, sum_blue, sum_seen, ever = zero, zero, zero, zero, zero, zero
    channel = tl.arange(0, CHANNELS)[None, None, :]
    light = tl.full([1, 1], 1.0, tl.float32)
    for tile in range(tiles):
        sample = tile * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = sample < samples
        span = interval(sample, ray, samples, JITTER)
        # first, while there is little to keep in registers
        difference, red, green, blue, seen = compared_proposals(
            line,
            image,
            (channel_stride, row_stride, column_stride),
            span[2] / metre,
            inside & known,
            goal,
            (height, width),
            (read_x, read_y),
            COMBINE,
        )
        place, geometry, _, alpha = _surface(
            table,
            ray,
            sample,
            span,
            samples,
            (low_x, low_y, low_z),
            (scale_x, scale_y, scale_z),
            sharpness,
            anneal,
            (HEIGHT, WIDTH, DEPTH),
            ALPHA,
            BACKDROP,
        )
        tl.store(lights + index * tiles + tile, light)
        reaches, light = transmittance(alpha, inside, light, BLOCK)
        weight = tl.where(inside, alpha * reaches, 0.0)
        sum_weight += weight
        sum_mid += weight * span[2]
        gap = _norm(geometry) - 1
        sum_eikonal += tl.where(inside, gap * gap, 0.0)
        sum_l1 += weight * difference
        sum_red += weight * red
        sum_green += weight * green
        sum_blue += weight * blue
        sum_seen += weight * seen
        ever = tl.maximum(ever, seen)
        for part in range(0, BLOCK, FEW):
            share = some(weight, part, FEW, BLOCK)[:, :, None]
            there = some_places(place, part, FEW, BLOCK)
            live = share != 0
            if CHANNELS > 1 + COLORS + CLASSES:
                live &= channel <= COLORS + CLASSES
            features = read_channels(volume, there, channel, live, Y, X, Z, C)
            sum_shown += share * appearance(features, channel, COLORS, CLASSES)

    all_weight = tl.sum(sum_weight, 1, keep_dims=True)
    tl.store(opacity + index, all_weight)
    tl.store(distance + index, tl.sum(sum_mid, 1, keep_dims=True) / (all_weight + 1e-10))
    tl.store(eikonal + index, tl.sum(sum_eikonal, 1, keep_dims=True))
    channel = tl.arange(0, CHANNELS)[None, :]
    at = sums + index * (COLORS + CLASSES) + (channel - 1)
    tl.store(at, tl.sum(sum_shown, 1), (channel > 0) & (channel <= COLORS + CLASSES))
    weight_seen = tl.sum(sum_seen, 1, keep_dims=True)
    share = 1 / at_least_epsilon(weight_seen)
    tl.store(total + results, weight_seen, answers)
    tl.store(valid + results, tl.max(ever, 1, keep_dims=True) > 0, answers)
    tl.store(l1 + results, tl.sum(sum_l1, 1, keep_dims=True) * share, answers)
    tl.store(color + 3 * results, tl.sum(sum_red, 1, keep_dims=True) * share, answers)
    tl.store(color + 3 * results + 1, tl.sum(sum_green, 1, keep_dims=True) * share, answers)
    tl.store(color + 3 * results + 2, tl.sum(sum_blue, 1, keep_dims=True) * share, answers)


@triton.jit
def _backward(
    grad_distance,
    grad_opacity,
    grad_sums,
    grad_eikonal,
    grad_l1,
    grad_color,
    distance,
    opacity,
    lights,
    l1,
    color,
    total,
    table,
    volume,
    inv_s,
    origins,
    directions,
    near,
    far,
    jitter,
    stretch,
    pixels,
    target,
    images,
    projections,
    grad_table,
    grad_volume,
    grad_inv_s,
    magnitude,
    fixed,
    samples,
    tiles,
    low_x,
    low_y,
    low_z,
    scale_x,
    scale_y,
    scale_z,
    anneal,
    sources,
    height,
    width,
    target_batch,
    target_camera,
    target_ray,
    target_channel,
    image_batch,
    image_source,
    image_camera,
    channel_stride,
    row_stride,
    column_stride,
    read_x,
    read_y,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    ITEM: tl.constexpr,
    C: tl.constexpr,
    Y: tl.constexpr,
    X: tl.constexpr,
    Z: tl.constexpr,
    JITTER: tl.constexpr,
    ALPHA: tl.constexpr,
    BACKDROP: tl.constexpr,
    COLORS: tl.constexpr,
    CLASSES: tl.constexpr,
    CHANNELS: tl.constexpr,
    COMBINE: tl.constexpr,
    SOURCES: tl.constexpr,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
    SCATTER: tl.constexpr,
):
    """Adds to grad_table [B, H, W, Z, 4] and grad_volume [B, H, W, Z, 1 + COLORS + CLASSES];
    grad_inv_s [B, N R] is a ray's part.

    SCATTER: "float" adds in float32; "measure" adds nothing, but writes the sum of what a ray would
    add, without signs, to magnitude [B, N R]; "fixed" adds integers of 1 / fixed, whose sum does
    not depend on the order.
    """
    pixel, rays = tl.program_id(0), tl.num_programs(0)
    camera, cameras = tl.program_id(1), tl.num_programs(1)
    item = tl.program_id(2).to(tl.int64)
    index = tl.zeros([1, 1], tl.int64) + (item * cameras + camera) * rays + pixel
    ray = read_ray(index, origins, directions, near, far, jitter, samples, JITTER)
    metre = tl.load(stretch + index).to(tl.float32)
    sharpness = tl.load(inv_s).to(tl.float32)
    table += item * (HEIGHT * WIDTH * DEPTH * 4)
    grad_table += item * (HEIGHT * WIDTH * DEPTH * 4)
    volume += item * ITEM
    GRAD_C: tl.constexpr = 1 + COLORS + CLASSES
    grad_volume += item * (HEIGHT * WIDTH * DEPTH * GRAD_C)

    known, line, image, goal, results, answers = ray_in_sources(
        pixels,
        target,
        images,
        projections,
        (item, camera, pixel),
        (cameras, rays, sources),
        (target_batch, target_camera, target_ray, target_channel),
        (image_batch, image_source, image_camera),
        COMBINE,
        SOURCES,
    )

    by_l1, by_red, by_green, by_blue, offset = result_gradient(
        grad_l1, grad_color, l1, color, total, results, answers
    )
    by_mid = tl.load(grad_distance + index) / (tl.load(opacity + index) + 1e-10)
    by_weight = tl.load(grad_opacity + index) - by_mid * tl.load(distance + index)
    by_eikonal = tl.load(grad_eikonal + index)
    channel = tl.arange(0, CHANNELS)[None, None, :]
    wanted = (channel > 0) & (channel <= COLORS + CLASSES)
    by_shown = tl.load(
        grad_sums + index[:, :, None] * (COLORS + CLASSES) + channel - 1, wanted, other=0.0
    )

    unit = 1.0
    if SCATTER == "fixed":
        unit = tl.load(fixed)
    added = tl.zeros([1, BLOCK], tl.float32)
    later = tl.zeros([1, 1], tl.float32)
    sum_inv_s = tl.zeros([1, BLOCK], tl.float32)
    for done in range(tiles):
        tile = tiles - 1 - done
        sample = tile * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = sample < samples
        span = interval(sample, ray, samples, JITTER)
        difference, red, green, blue, seen = compared_proposals(
            line,
            image,
            (channel_stride, row_stride, column_stride),
            span[2] / metre,
            inside & known,
            goal,
            (height, width),
            (read_x, read_y),
            COMBINE,
        )
        by_source = by_l1 * difference + by_red * red + by_green * green + by_blue * blue
        grad = tl.sum(by_source - offset * seen, 0, keep_dims=True) + by_weight + by_mid * span[2]
        place, geometry, cosine, alpha = _surface(
            table,
            ray,
            sample,
            span,
            samples,
            (low_x, low_y, low_z),
            (scale_x, scale_y, scale_z),
            sharpness,
            anneal,
            (HEIGHT, WIDTH, DEPTH),
            ALPHA,
            BACKDROP,
        )
        light = tl.load(lights + index * tiles + tile)
        reaches, _ = transmittance(alpha, inside, light, BLOCK)
        weight = tl.where(inside, alpha * reaches, 0.0)
        for part in range(0, BLOCK, FEW):
            share = some(weight, part, FEW, BLOCK)[:, :, None]
            there = some_places(place, part, FEW, BLOCK)
            live = share != 0
            if CHANNELS > 1 + COLORS + CLASSES:
                live &= channel <= COLORS + CLASSES
            features = read_channels(volume, there, channel, live, Y, X, Z, C)
            shown = appearance(features, channel, COLORS, CLASSES)
            grad += whole(tl.sum(by_shown * shown, 2), part, FEW, BLOCK)
            feature = share * appearance_gradient(shown, by_shown, channel, COLORS, CLASSES)
            if SCATTER == "measure":
                added += whole(tl.sum(tl.where(live, tl.abs(feature), 0.0), 2), part, FEW, BLOCK)
            else:
                add_channels(
                    grad_volume,
                    there,
                    channel,
                    feature,
                    live,
                    unit,
                    GRAD_C * WIDTH * DEPTH,
                    GRAD_C * DEPTH,
                    GRAD_C,
                    1,
                    SCATTER == "fixed",
                )

        grad_alpha, later = alpha_gradient(alpha, reaches, weight, grad, inside, later, BLOCK)
        if BACKDROP:
            grad_alpha = tl.where(sample == samples - 1, 0.0, grad_alpha)
        slopes = alpha_slopes(geometry[0], cosine, span[1], sharpness, anneal, ALPHA)
        sum_inv_s += tl.where(inside, grad_alpha * slopes[2], 0.0)
        norm = _norm(geometry)
        by_cosine, pull = grad_alpha * slopes[1], by_eikonal * 2 * (norm - 1) / norm
        by_sdf = grad_alpha * slopes[0]
        by_x = by_cosine * ray[3] + pull * geometry[1]
        by_y = by_cosine * ray[4] + pull * geometry[2]
        by_z = by_cosine * ray[5] + pull * geometry[3]
        size = tl.abs(by_sdf) + tl.abs(by_x) + tl.abs(by_y) + tl.abs(by_z)
        moved = inside & (size != 0)
        if SCATTER == "measure":
            added += tl.where(moved, size, 0.0)
        else:
            add_channels(
                grad_table,
                place,
                tl.arange(0, 4)[None, None, :],
                pack(by_sdf, by_x, by_y, by_z),
                moved[:, :, None],
                unit,
                4 * WIDTH * DEPTH,
                4 * DEPTH,
                4,
                1,
                SCATTER == "fixed",
            )
    if SCATTER == "measure":
        tl.store(magnitude + index, tl.sum(added, 1, keep_dims=True))
    tl.store(grad_inv_s + index, tl.sum(sum_inv_s, 1, keep_dims=True))


# -----------------------------------------------------------------------------------------------
# Operators


@dataclass(frozen=True)
class _Options:
    """What is not a tensor, in the order in which the operators take it."""

    box: list[float]
    samples: int
    anneal: float
    alpha: str
    classes: int
    backdrop: bool
    jittered: bool
    combine: bool
    published_pixels: bool


class _Walk:
    """What both kernels are told of the constant tensors and the options.

    read: origins, directions, near, far, jitter (any tensor if there is none), stretch, pixels,
    target, sources, projections.
    """

    def __init__(self, volume: Tensor, inv_s: Tensor, read: list[Tensor], options: _Options):
        *rest, target, sources, projections = read
        batch, channels, height, width, depth = volume.shape
        item, c, y, x, z = volume.stride()
        _, count, cameras, _, rows, columns = sources.shape
        self.volume, self.options = volume, options
        self.blocks = -(-options.samples // LANES)
        self.rays, self.views = (batch, cameras, target.shape[2]), (batch, count, cameras)
        self.grid = (target.shape[2], cameras, batch)
        self.spacing = node_spacing(options.box, volume.shape[2:])
        rest = [tensor.contiguous() for tensor in rest]
        self.tensors = [volume, inv_s, *rest, target, sources, projections.contiguous()]
        shrink = ((columns - 1) / columns, (rows - 1) / rows)
        self.numbers = [
            options.samples,
            self.blocks,
            *options.box[:3],
            *(1 / step for step in self.spacing),
            options.anneal,
            count,
            rows,
            columns,
            *target.stride(),
            *sources.stride(),
            *(shrink if options.published_pixels else (1.0, 1.0)),
        ]
        wide = 1 << (channels - 1).bit_length()
        self.constants = dict(
            HEIGHT=height,
            WIDTH=width,
            DEPTH=depth,
            ITEM=item,
            C=c,
            Y=y,
            X=x,
            Z=z,
            JITTER=options.jittered,
            ALPHA=options.alpha,
            BACKDROP=options.backdrop,
            COLORS=channels - 1 - options.classes,
            CLASSES=options.classes,
            CHANNELS=wide,
            COMBINE=options.combine,
            SOURCES=1 << (count - 1).bit_length(),
            BLOCK=LANES,
            FEW=min(LANES, max(1, FEATURES // wide)),
        )

    def table(self) -> Tensor:
        return node_table(self.volume, self.spacing)


def _results(volume: Tensor, read: list[Tensor], options: _Options) -> tuple[Tensor, ...]:
    """distance, opacity, sums, eikonal, lights, l1, color, valid, total, not yet filled."""
    target, sources, _ = read[-3:]
    batch, cameras, rays, _ = target.shape
    lines = volume.new_empty(batch, cameras * rays, dtype=torch.float32)
    sums = lines.new_empty(*lines.shape, volume.shape[1] - 1)
    lights = lines.new_empty(*lines.shape, -(-options.samples // LANES))
    l1 = lines.new_empty(batch, 1 if options.combine else sources.shape[1], cameras, rays)
    color, valid = l1.new_empty(*l1.shape, 3), torch.empty_like(l1, dtype=torch.bool)
    opacity, eikonal, total = torch.empty_like(lines), torch.empty_like(lines), torch.empty_like(l1)
    return lines, opacity, sums, eikonal, lights, l1, color, valid, total


def _forward_triton(
    volume: Tensor, inv_s: Tensor, read: list[Tensor], options: _Options
) -> tuple[Tensor, ...]:
    out, walk = _results(volume, read, options), _Walk(volume, inv_s, read, options)
    tensors = (walk.table(), *walk.tensors, *out)
    launch(_forward, walk.grid, *tensors, *walk.numbers, warps=WARPS, **walk.constants)
    return out


def _backward_triton(
    grads: list[Tensor],
    saved: list[Tensor],
    volume: Tensor,
    inv_s: Tensor,
    read: list[Tensor],
    options: _Options,
) -> tuple[Tensor, Tensor]:
    """grads: of distance, opacity, sums, eikonal, l1, color; saved: distance, opacity, lights, l1,
    color, total. Returns those of volume and inv_s, float32.
    """
    walk = _Walk(volume, inv_s, read, options)
    given = (*(grad.contiguous() for grad in grads), *saved, walk.table(), *walk.tensors)
    by_inv_s = torch.empty_like(saved[0])
    batch, channels, *nodes = volume.shape
    shapes = [(batch, *nodes, 4), (batch, *nodes, channels)]

    def scattered(how: str, dtype: torch.dtype, magnitude: Tensor, fixed: Tensor) -> list[Tensor]:
        into = [volume.new_zeros(shape, dtype=dtype) for shape in shapes]
        tensors = (*given, *into, by_inv_s, magnitude, fixed)
        constants = dict(walk.constants, SCATTER=how)
        limit = None if how == "float" else REGISTERS_FIXED
        launch(
            _backward,
            walk.grid,
            *tensors,
            *walk.numbers,
            warps=WARPS,
            registers=limit,
            **constants,
        )
        return into

    if torch.are_deterministic_algorithms_enabled():
        magnitude = torch.empty_like(by_inv_s)
        scattered("measure", torch.float32, magnitude, magnitude)
        # no sum exceeds that of all magnitudes, hence none overflows; NaN makes everything NaN
        fixed = 2.0**61 / magnitude.double().sum().clamp_min(1e-50)
        by_table, by_volume = scattered("fixed", torch.int64, magnitude, fixed)
        by_table, by_volume = (by_table / fixed).float(), (by_volume / fixed).float()
    else:
        by_table, by_volume = scattered("float", torch.float32, by_inv_s, by_inv_s)
    by_volume = by_volume.permute(0, 4, 1, 2, 3)
    node_table_adjoint(by_table, walk.spacing, by_volume)
    return by_volume, by_inv_s.sum()


@torch.library.custom_op("selfocc::render_photometric", mutates_args=())
def _op(
    volume: Tensor,
    inv_s: Tensor,
    read: list[Tensor],
    box: list[float],
    samples: int,
    anneal: float,
    alpha: str,
    classes: int,
    backdrop: bool,
    jittered: bool,
    combine: bool,
    published_pixels: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = _Options(
        box, samples, anneal, alpha, classes, backdrop, jittered, combine, published_pixels
    )
    return _forward_triton(volume, inv_s, read, options)


@_op.register_fake
def _(volume, inv_s, read, *options):
    return _results(volume, read, _Options(*options))


@torch.library.custom_op("selfocc::render_photometric_gradient", mutates_args=())
def _gradient_op(
    grads: list[Tensor],
    saved: list[Tensor],
    volume: Tensor,
    inv_s: Tensor,
    read: list[Tensor],
    box: list[float],
    samples: int,
    anneal: float,
    alpha: str,
    classes: int,
    backdrop: bool,
    jittered: bool,
    combine: bool,
    published_pixels: bool,
) -> tuple[Tensor, Tensor]:
    options = _Options(
        box, samples, anneal, alpha, classes, backdrop, jittered, combine, published_pixels
    )
    return _backward_triton(grads, saved, volume, inv_s, read, options)


@_gradient_op.register_fake
def _(grads, saved, volume, *_):
    batch, channels, *nodes = volume.shape
    by_volume = volume.new_empty(batch, *nodes, channels, dtype=torch.float32)
    return by_volume.permute(0, 4, 1, 2, 3), by_volume.new_empty(())


def _setup(ctx, inputs, output):
    volume, inv_s, read, *ctx.options = inputs
    distance, opacity, _, _, lights, l1, color, valid, total = output
    ctx.mark_non_differentiable(lights, valid, total)
    ctx.save_for_backward(distance, opacity, lights, l1, color, total, volume, inv_s, *read)


def _autograd(ctx, distance, opacity, sums, eikonal, _lights, l1, color, _valid, _total):
    *saved, volume, inv_s = ctx.saved_tensors[:8]
    read = [*ctx.saved_tensors[8:]]
    grads = [distance, opacity, sums, eikonal, l1, color]
    by_volume, by_inv_s = _gradient_op(grads, saved, volume, inv_s, read, *ctx.options)
    constant = [None] * len(read), *[None] * len(ctx.options)
    return by_volume.to(volume.dtype), by_inv_s.to(inv_s.dtype), *constant


_op.register_autograd(_autograd, setup_context=_setup)


# -----------------------------------------------------------------------------------------------


def render_photometric(
    volume: Tensor,
    origins: Tensor,
    directions: Tensor,
    near: Tensor,
    far: Tensor,
    inv_s: Tensor,
    stretch: Tensor,
    pixels: Tensor,
    target: Tensor,
    sources: Tensor,
    projections: Tensor,
    *,
    box: Box,
    samples: int,
    jitter: Tensor | None = None,
    anneal: float = 1.0,
    alpha: str = "neus",
    classes: int = 0,
    backdrop: bool = False,
    combine: bool = False,
    published_pixels: bool = False,
) -> tuple[Rendering, Tensor, Tensor, Tensor]:
    """`render_rays` and `epipolar_photometric` of its samples at once, of N cameras with R rays.

    Differentiable in volume and inv_s. Half precision is read as float32, and so are results.

    Args:
        volume, inv_s, box, samples, anneal, alpha, classes, backdrop: as in `render_rays`.
        origins, directions, near, far, jitter: as there, of N R rays, camera by camera.
        stretch: [B, N R] metres along a ray for a metre of z-depth.
        pixels, target, sources, projections, combine, published_pixels: as in
            `epipolar_photometric`.

    Returns a `Rendering` with distance, opacity, color, semantics and eikonal, and what
    `epipolar_photometric` returns.
    Raises ValueError naming the argument at fault.
    """
    lines = (origins, directions, near, far)
    scene = (pixels, target, sources, projections)
    if volume.ndim != 5 or min(volume.shape[2:]) < 2:
        raise ValueError(
            f"volume must be [B, C, H, W, Z], two nodes or more an axis, got {[*volume.shape]}"
        )
    if not 0 <= classes < volume.shape[1]:
        raise ValueError(f"classes is {classes}, but the volume has {volume.shape[1]} channels")
    if target.ndim != 4 or target.shape[0] != volume.shape[0]:
        raise ValueError(f"target must be [{volume.shape[0]}, N, R, 3], got {[*target.shape]}")
    batch, cameras, rays, _ = target.shape
    expected = dict(near=near, far=far, stretch=stretch, origins=origins, directions=directions)
    if jitter is not None:
        expected["jitter"] = jitter
    for name, tensor in expected.items():
        shape = (batch, cameras * rays) + ((3,) if name in ("origins", "directions") else ())
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {[*shape]}, got {[*tensor.shape]}")
    if inv_s.numel() != 1:
        raise ValueError(f"inv_s must hold one number, got {[*inv_s.shape]}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if alpha not in ALPHAS:
        raise ValueError(f"alpha must be one of {', '.join(ALPHAS)}, got {alpha!r}")
    check_views((batch, cameras, rays, samples), None, *scene)
    shown = dict(combine=combine, published_pixels=published_pixels)
    march = dict(box=box, samples=samples, anneal=anneal, alpha=alpha, classes=classes)
    march |= dict(backdrop=backdrop)
    shaking = near if jitter is None else jitter
    read = [*lines, shaking, stretch, *scene]
    if not all(map(use_triton, (volume, inv_s, *read[:-1]))):
        seen = render_rays(volume, *lines, inv_s, jitter=jitter, keep_samples=True, **march)
        proposals = (seen.weights, seen.mids / at_least_float32(stretch)[..., None])
        proposals = (x.unflatten(1, (cameras, rays)) for x in proposals)
        results = epipolar_photometric(*proposals, *scene, **shown)
        nothing = dict(normal=None, weights=None, mids=None, deltas=None, sdf=None)
        return replace(seen, **nothing), *results
    # in the order of `_Options`, spelled out: Dynamo of torch 2.11 cannot look into one
    options = ([*box], samples, anneal, alpha, classes, backdrop, jitter is not None)
    options = (*options, combine, published_pixels)
    distance, opacity, sums, eikonal, _, l1, color, valid, _ = _op(volume, inv_s, read, *options)
    colors, semantics = sums.split([volume.shape[1] - 1 - classes, classes], dim=-1)
    semantics = semantics if classes else None
    seen = Rendering(distance, opacity, colors, semantics=semantics, eikonal=eikonal)
    return seen, l1, color, valid
