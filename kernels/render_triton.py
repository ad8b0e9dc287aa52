"""The kernels of `render`: a walk along rays, forward, and backward that computes samples again.

B items, N cameras of R rays, S samples; [B, N R] is one axis of the tensors. Strides of volumes are
constants: only then are rows of four channels read and added as one.

A tile holds BLOCK samples of each of RAYS rays. Their channels are taken FEW samples at once, and
where these are not all of them, they lie across the lanes: a warp reads a node's row as one.
"""

from typing import NamedTuple

from torch import Tensor

from kernels.dispatch import tl, triton
from kernels.proposals import (
    compare,
    look,
    no_sums,
    store_sums,
    sum_gradients,
    weight_gradient,
    with_sums,
)
from kernels.ray import (
    add_channels,
    alpha_gradient,
    interval,
    locate,
    norm,
    pack,
    read_ray,
    shown_by,
    shown_gradient,
    surface,
    transmittance,
    whole,
)


class Field(NamedTuple):
    """What rays are rendered from."""

    volume: Tensor  # [B, C, H, W, Z]
    table: Tensor  # [B, H, W, Z, 4] SDF and its gradient, `node_losses.node_table`
    inv_s: Tensor
    stretch: Tensor  # [B, N R] metres along a ray for one of z-depth; is looked at with a scene


class Results(NamedTuple):
    """What forward writes, in the order in which the operator returns it."""

    distance: Tensor | None = None  # [B, N R]
    opacity: Tensor | None = None  # [B, N R]
    sums: Tensor | None = None  # [B, N R, colours + classes]
    light: Tensor | None = (
        None  # [B, N R, tiles] what enters every STEPth sample, 0 where none comes
    )
    eikonal: Tensor | None = None  # [B, N R]
    weights: Tensor | None = None  # [B, N R, S], as the next three
    mids: Tensor | None = None
    deltas: Tensor | None = None
    sdf: Tensor | None = None
    l1: Tensor | None = None  # [B, sources or 1, N, R], as the next three
    color: Tensor | None = None  # [.., 3]
    valid: Tensor | None = None
    total: Tensor | None = None  # sum of the weights that are seen


class Gradients(NamedTuple):
    """Of the results that have one."""

    distance: Tensor
    opacity: Tensor
    sums: Tensor
    eikonal: Tensor
    weights: Tensor
    sdf: Tensor
    l1: Tensor
    color: Tensor


class Added(NamedTuple):
    """Where backward adds."""

    volume: Tensor  # [B, H, W, Z, C]
    table: Tensor  # [B, H, W, Z, 4]
    inv_s: Tensor  # [B, N R] a ray's part
    magnitudes: Tensor  # [B, N R, 2] what a ray adds to table and volume, summed without signs
    units: Tensor  # [2] what is one in the integers of table and volume, if they are integers


@triton.jit
def render_forward(
    rays,
    field,
    scene,
    out,
    count,
    samples,
    low,
    scale,
    knobs,
    stop_below,
    spent,
    GRID: tl.constexpr,
    VOLUME: tl.constexpr,
    TABLE: tl.constexpr,
    ALPHA: tl.constexpr,
    INTERVALS: tl.constexpr,
    BACKDROP: tl.constexpr,
    COMBINE: tl.constexpr,
    SOURCES: tl.constexpr,
    RAYS: tl.constexpr,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
    STEP: tl.constexpr,
):
    """`count` rays of every camera and item -> `Results`; what is None in `out` is not asked for.

    spent: light so little that what is left of a ray cannot raise it above stop_below again.
    """
    item, ray = tl.program_id(2).to(tl.int64), tl.program_id(0) * RAYS
    ray += tl.arange(0, RAYS)[:, None]
    known = ray < count if RAYS > 1 else tl.full([1, 1], 1, tl.int1)
    index = (item * tl.num_programs(1) + tl.program_id(1)) * count + tl.where(known, ray, 0)
    line = read_ray(rays, index, samples)
    sharpness = tl.load(field.inv_s).to(tl.float32)
    volume, table = field.volume + item * VOLUME.item, field.table + item * TABLE.item
    if scene is not None:
        metre = tl.load(field.stretch + index).to(tl.float32)
        sight, sums = look(scene, COMBINE, SOURCES), no_sums(COMBINE, SOURCES, BLOCK)

    tiles, first = tl.cdiv(samples, STEP), index * samples
    zero = tl.zeros([RAYS, BLOCK], tl.float32)
    sum_weight, sum_distance, sum_eikonal = zero, zero, zero
    CHANNELS: tl.constexpr = GRID.channels
    sum_shown = tl.zeros([RAYS, FEW, CHANNELS], tl.float32)
    channel = tl.arange(0, CHANNELS)[None, None, :]
    light = tl.where(known, 1.0, 0.0)
    lit_rays = tl.sum(tl.where(known, 1, 0))
    start = 0
    while (start < samples) & (lit_rays > 0):
        sample = start + tl.arange(0, BLOCK)[None, :]
        inside = known & (sample < samples)
        span = interval(sample, line, samples, INTERVALS)
        if scene is not None:  # first, while there is little to keep in registers
            here = compare(sight, scene, span.middle / metre, inside, COMBINE)
        place = locate(line, span.read, low, scale, GRID)
        last = sample == samples - 1
        at = surface(
            table, place, line, last, span.length, sharpness, knobs, TABLE, ALPHA, BACKDROP
        )
        if start % STEP == 0:
            tl.store(out.light + index * tiles + start // STEP, light, known)
        reaches, light = transmittance(at.alpha, inside, light, BLOCK)
        lit = inside & ~(reaches <= stop_below)  # NaN stays
        weight = tl.where(lit, at.alpha * reaches, 0.0)
        sum_weight += weight
        sum_distance += weight * span.middle
        if out.eikonal is not None:
            gap = norm(at) - 1
            sum_eikonal += tl.where(inside, gap * gap, 0.0)
        if scene is not None:
            sums = with_sums(sums, weight, here)
        if out.sums is not None:
            for part in range(0, BLOCK, FEW):
                share, _, _, shown = shown_by(
                    volume, weight, place, part, channel, GRID, VOLUME, FEW, BLOCK
                )
                sum_shown += share * shown
        if out.weights is not None:
            tl.store(out.weights + first + sample, weight, inside)
            tl.store(out.mids + first + sample, span.middle, inside)
            tl.store(out.deltas + first + sample, span.length, inside)
            tl.store(out.sdf + first + sample, at.sdf, inside)
        if out.eikonal is None:  # nothing is wanted of samples that no light reaches
            lit_rays = tl.sum(tl.where(light <= spent, 0, 1))
        start += BLOCK

    total = tl.sum(sum_weight, 1, keep_dims=True)
    tl.store(out.opacity + index, total, known)
    tl.store(out.distance + index, tl.sum(sum_distance, 1, keep_dims=True) / (total + 1e-10), known)
    if out.eikonal is not None:
        tl.store(out.eikonal + index, tl.sum(sum_eikonal, 1, keep_dims=True), known)
    if out.sums is not None:
        channel = tl.arange(0, CHANNELS)[None, :]
        wanted = known & (channel > 0) & (channel <= GRID.colors + GRID.classes)
        shown = out.sums + index * (GRID.colors + GRID.classes) + (channel - 1)
        tl.store(shown, tl.sum(sum_shown, 1), wanted)
    if scene is not None:
        store_sums(out.l1, out.color, out.valid, out.total, sums, sight)


@triton.jit
def render_backward(
    grads,
    out,
    rays,
    field,
    scene,
    into,
    count,
    samples,
    low,
    scale,
    knobs,
    stop_below,
    GRID: tl.constexpr,
    VOLUME: tl.constexpr,
    TABLE: tl.constexpr,
    ADDED: tl.constexpr,
    ALPHA: tl.constexpr,
    SLOPES: tl.constexpr,
    INTERVALS: tl.constexpr,
    BACKDROP: tl.constexpr,
    COMBINE: tl.constexpr,
    SOURCES: tl.constexpr,
    SCATTER: tl.constexpr,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
):
    """One ray a program: `Gradients` of the results that forward wrote -> `Added`.

    SCATTER: "float" adds in float32; "measure" only writes magnitudes; "fixed" adds integers.
    """
    item = tl.program_id(2).to(tl.int64)
    index = (item * tl.num_programs(1) + tl.program_id(1)) * count + tl.program_id(0)
    index += tl.zeros([1, 1], tl.int64)
    line = read_ray(rays, index, samples)
    sharpness = tl.load(field.inv_s).to(tl.float32)
    volume, table = field.volume + item * VOLUME.item, field.table + item * TABLE.item
    to_volume, to_table = into.volume + item * ADDED.item, into.table + item * TABLE.item

    by_middle = tl.load(grads.distance + index) / (tl.load(out.opacity + index) + 1e-10)
    distance = tl.load(out.distance + index)
    by_opacity = tl.load(grads.opacity + index)
    channel = tl.arange(0, GRID.channels)[None, None, :]
    if grads.sums is not None:
        wanted = (channel > 0) & (channel <= GRID.colors + GRID.classes)
        sums = grads.sums + index[:, :, None] * (GRID.colors + GRID.classes) + (channel - 1)
        by_shown = tl.load(sums, wanted, other=0.0)
    if grads.eikonal is not None:
        by_eikonal = tl.load(grads.eikonal + index)
    if scene is not None:
        metre = tl.load(field.stretch + index).to(tl.float32)
        sight = look(scene, COMBINE, SOURCES)
        by_sums = sum_gradients(grads.l1, grads.color, out.l1, out.color, out.total, sight)

    tiles, first = tl.cdiv(samples, BLOCK), index * samples
    zero = tl.zeros([1, BLOCK], tl.float32)
    sum_inv_s, sum_rows, sum_features = zero, zero, zero
    later = tl.zeros([1, 1], tl.float32)
    for done in range(tiles):
        tile = tiles - 1 - done
        light = tl.load(out.light + index * tiles + tile)
        # where no light comes, only what was kept of the samples has a gradient
        kept = grads.sdf is not None or grads.eikonal is not None
        if tl.sum(tl.where((light != 0) | kept, 1, 0)) > 0:
            sample = tile * BLOCK + tl.arange(0, BLOCK)[None, :]
            inside = sample < samples
            span = interval(sample, line, samples, INTERVALS)
            by_weight = by_opacity + by_middle * (span.middle - distance)
            if scene is not None:
                here = compare(sight, scene, span.middle / metre, inside, COMBINE)
                by_weight += weight_gradient(here, by_sums)
            if grads.weights is not None:
                by_weight += tl.load(grads.weights + first + sample, inside, other=0.0)
            place = locate(line, span.read, low, scale, GRID)
            last = sample == samples - 1
            at = surface(
                table, place, line, last, span.length, sharpness, knobs, TABLE, ALPHA, BACKDROP
            )
            reaches, _ = transmittance(at.alpha, inside, light, BLOCK)
            lit = inside & ~(reaches <= stop_below)
            weight = tl.where(lit, at.alpha * reaches, 0.0)
            if grads.sums is not None:
                for part in range(0, BLOCK, FEW):
                    share, there, live, shown = shown_by(
                        volume, weight, place, part, channel, GRID, VOLUME, FEW, BLOCK
                    )
                    by_weight += whole(tl.sum(shown * by_shown, 2), part, FEW, BLOCK)
                    by_feature = share * shown_gradient(shown, by_shown, channel, GRID)
                    unit = into.units + 1
                    size = add_channels(
                        to_volume, there, channel, by_feature, live, unit, ADDED, SCATTER
                    )
                    if SCATTER == "measure":
                        sum_features += whole(size, part, FEW, BLOCK)

            by_weight = tl.where(lit, by_weight, 0.0)
            by_alpha, later = alpha_gradient(
                at.alpha, reaches, weight, by_weight, inside, later, BLOCK
            )
            if BACKDROP:
                by_alpha = tl.where(last, 0.0, by_alpha)
            slopes = SLOPES(at.sdf, at.cosine, span.length, sharpness, knobs)
            by_sdf, by_cosine = by_alpha * slopes[0], by_alpha * slopes[1]
            sum_inv_s += by_alpha * slopes[2]
            by_x, by_y, by_z = by_cosine * line.x, by_cosine * line.y, by_cosine * line.z
            if grads.sdf is not None:
                by_sdf += tl.load(grads.sdf + first + sample, inside, other=0.0)
            if grads.eikonal is not None:
                length = norm(at)
                pull = by_eikonal * 2 * (length - 1) / length
                by_x += pull * at.x
                by_y += pull * at.y
                by_z += pull * at.z
            size = tl.abs(by_sdf) + tl.abs(by_x) + tl.abs(by_y) + tl.abs(by_z)
            live = (inside & (size != 0))[:, :, None]
            row, rows = tl.arange(0, 4)[None, None, :], pack(by_sdf, by_x, by_y, by_z)
            size = add_channels(to_table, place, row, rows, live, into.units, TABLE, SCATTER)
            if SCATTER == "measure":
                sum_rows += size
    tl.store(into.inv_s + index, tl.sum(sum_inv_s, 1, keep_dims=True))
    if SCATTER == "measure":
        tl.store(into.magnitudes + 2 * index, tl.sum(sum_rows, 1, keep_dims=True))
        tl.store(into.magnitudes + 2 * index + 1, tl.sum(sum_features, 1, keep_dims=True))
