"""The kernels of `render.render_rays`: forward, and backward that computes samples again.

B items of R rays of S samples; [B, R] is one axis here. The strides of the volume, ITEM, Y, X, Z
and C, are constants of the kernel: only then are rows of four channels read and added as one.

A tile holds BLOCK samples of each of RAYS rays. Their channels are taken FEW samples at once, and
where these are not all of them, they lie across the lanes: a warp reads a node's row as one.
"""

from kernels.alpha import alpha_of, alpha_slopes
from kernels.dispatch import tl, triton
from kernels.ray import (
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


@triton.jit
def _unit(x, y, z):
    """Length of a gradient, and the gradient divided by it."""
    # the smallest normal number, as in the reference: a flat field has a gradient
    norm = tl.sqrt(x * x + y * y + z * z + 1.1754943508222875e-38)
    scale = 1 / tl.maximum(norm, 1e-12)
    return norm, x * scale, y * scale, z * scale


@triton.jit
def render_forward(
    volume,
    table,
    origins,
    directions,
    near,
    far,
    jitter,
    inv_s,
    distance,
    opacity,
    color,
    semantics,
    normal,
    weights,
    mids,
    deltas,
    sdf,
    eikonal,
    light,
    count,
    rays,
    samples,
    low_x,
    low_y,
    low_z,
    scale_x,
    scale_y,
    scale_z,
    anneal,
    stop_below,
    spent,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    ITEM: tl.constexpr,
    Y: tl.constexpr,
    X: tl.constexpr,
    Z: tl.constexpr,
    C: tl.constexpr,
    COLORS: tl.constexpr,
    CLASSES: tl.constexpr,
    CHANNELS: tl.constexpr,
    ALPHA: tl.constexpr,
    JITTER: tl.constexpr,
    BACKDROP: tl.constexpr,
    KEEP: tl.constexpr,
    NORMALS: tl.constexpr,
    RAYS: tl.constexpr,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
    STEP: tl.constexpr,
):
    """All `count` = B R rays. light [B R, blocks]: T at every STEPth sample, 0 where none comes.

    spent: light so little that what is left of a ray cannot raise it above stop_below again.
    """
    number = tl.program_id(0) * RAYS + tl.arange(0, RAYS)[:, None]
    known = number < count
    number = tl.where(known, number, 0)
    item, number = (number // rays).to(tl.int64), number.to(tl.int64)
    ray = read_ray(number, origins, directions, near, far, jitter, samples, JITTER)
    _, _, _, x, y, z, _, _, _ = ray
    sharpness = tl.load(inv_s).to(tl.float32)
    volume += item * ITEM
    table += item * (4 * HEIGHT * WIDTH * DEPTH)
    channel = tl.arange(0, CHANNELS)[None, None, :]
    low, scale = (low_x, low_y, low_z), (scale_x, scale_y, scale_z)
    first = number * samples
    blocks = tl.cdiv(samples, STEP)

    zero = tl.zeros([RAYS, BLOCK], tl.float32)
    sum_weight, sum_distance, sum_eikonal = zero, zero, zero
    sum_x, sum_y, sum_z = zero, zero, zero
    shown = tl.zeros([RAYS, FEW, CHANNELS], tl.float32)
    entering = tl.where(known, 1.0, 0.0)
    lit_rays = tl.sum(tl.where(known, 1, 0))
    start = 0
    while (start < samples) & (lit_rays > 0):
        sample = start + tl.arange(0, BLOCK)[None, :]
        inside = known & (sample < samples)
        t, delta, mid = interval(sample, ray, samples, JITTER)
        place = locate(ray, t, low, scale, HEIGHT, WIDTH, DEPTH)
        s, by_x, by_y, by_z = read_geometry(table, place, HEIGHT, WIDTH, DEPTH)
        cosine = by_x * x + by_y * y + by_z * z
        alpha = alpha_of(s, cosine, delta, sharpness, anneal, ALPHA)
        if BACKDROP:
            alpha = tl.where(sample == samples - 1, 1.0, alpha)
        if start % STEP == 0:
            tl.store(light + number * blocks + start // STEP, entering, known)
        reaches, entering = transmittance(alpha, inside, entering, BLOCK)
        lit = inside & ~(reaches <= stop_below)  # NaN stays
        weight = tl.where(lit, alpha * reaches, 0.0)
        sum_weight += weight
        sum_distance += weight * mid
        if COLORS + CLASSES > 0:
            for part in range(0, BLOCK, FEW):
                share = some(weight, part, FEW, BLOCK)[:, :, None]
                there = some_places(place, part, FEW, BLOCK)
                seen = share != 0
                if CHANNELS > 1 + COLORS + CLASSES:
                    seen &= channel <= COLORS + CLASSES
                features = read_channels(volume, there, channel, seen, Y, X, Z, C)
                shown += share * appearance(features, channel, COLORS, CLASSES)
        if KEEP or NORMALS:
            norm, unit_x, unit_y, unit_z = _unit(by_x, by_y, by_z)
            if NORMALS:
                sum_x += weight * unit_x
                sum_y += weight * unit_y
                sum_z += weight * unit_z
            if KEEP:
                sum_eikonal += tl.where(inside, (norm - 1) * (norm - 1), 0.0)
                tl.store(weights + first + sample, weight, inside)
                tl.store(mids + first + sample, mid, inside)
                tl.store(deltas + first + sample, delta, inside)
                tl.store(sdf + first + sample, s, inside)
        if not KEEP:
            lit_rays = tl.sum(tl.where(entering <= spent, 0, 1))
        start += BLOCK

    total = tl.sum(sum_weight, 1, keep_dims=True)
    tl.store(opacity + number, total, known)
    metres = tl.sum(sum_distance, 1, keep_dims=True) / (total + 1e-10)
    tl.store(distance + number, metres, known)
    channel = tl.arange(0, CHANNELS)[None, :]
    shown = tl.sum(shown, 1)
    if COLORS > 0:
        at = color + number * COLORS + (channel - 1)
        tl.store(at, shown, known & (channel >= 1) & (channel <= COLORS))
    if CLASSES > 0:
        at = semantics + number * CLASSES + (channel - 1 - COLORS)
        tl.store(at, shown, known & (channel > COLORS) & (channel <= COLORS + CLASSES))
    if NORMALS:
        tl.store(normal + 3 * number, tl.sum(sum_x, 1, keep_dims=True), known)
        tl.store(normal + 3 * number + 1, tl.sum(sum_y, 1, keep_dims=True), known)
        tl.store(normal + 3 * number + 2, tl.sum(sum_z, 1, keep_dims=True), known)
    if KEEP:
        tl.store(eikonal + number, tl.sum(sum_eikonal, 1, keep_dims=True), known)


@triton.jit
def render_backward(
    grad_distance,
    grad_opacity,
    grad_color,
    grad_semantics,
    grad_normal,
    grad_weights,
    grad_sdf,
    grad_eikonal,
    volume,
    table,
    origins,
    directions,
    near,
    far,
    jitter,
    inv_s,
    distance,
    opacity,
    light,
    grad_volume,
    grad_table,
    grad_inv_s,
    magnitudes,
    scales,
    rays,
    samples,
    low_x,
    low_y,
    low_z,
    scale_x,
    scale_y,
    scale_z,
    anneal,
    stop_below,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    ITEM: tl.constexpr,
    Y: tl.constexpr,
    X: tl.constexpr,
    Z: tl.constexpr,
    C: tl.constexpr,
    GRAD_ITEM: tl.constexpr,
    GRAD_Y: tl.constexpr,
    GRAD_X: tl.constexpr,
    GRAD_Z: tl.constexpr,
    GRAD_C: tl.constexpr,
    COLORS: tl.constexpr,
    CLASSES: tl.constexpr,
    CHANNELS: tl.constexpr,
    ALPHA: tl.constexpr,
    JITTER: tl.constexpr,
    BACKDROP: tl.constexpr,
    NORMALS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_SDF: tl.constexpr,
    HAS_EIKONAL: tl.constexpr,
    SCATTER: tl.constexpr,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
):
    """One ray a program: gradients of the results -> of the volume's channels but the first, of the
    rows of the table, and of inv_s, the last by ray.

    SCATTER: "float" adds in float32; "measure" sums magnitudes of what would be added to table and
    volume, by ray, into `magnitudes` [B R, 2]; "fixed" adds integers of 1 / `scales` [2].
    """
    number = tl.program_id(0) + tl.zeros([1, 1], tl.int32)
    item, number = (number // rays).to(tl.int64), number.to(tl.int64)
    ray = read_ray(number, origins, directions, near, far, jitter, samples, JITTER)
    _, _, _, x, y, z, _, _, _ = ray
    sharpness = tl.load(inv_s).to(tl.float32)
    volume += item * ITEM
    grad_volume += item * GRAD_ITEM
    table += item * (4 * HEIGHT * WIDTH * DEPTH)
    grad_table += item * (4 * HEIGHT * WIDTH * DEPTH)
    channel = tl.arange(0, CHANNELS)[None, None, :]
    low, scale = (low_x, low_y, low_z), (scale_x, scale_y, scale_z)
    first = number * samples
    blocks = tl.cdiv(samples, BLOCK)

    by_metre = tl.load(grad_distance + number).to(tl.float32)
    by_metre /= tl.load(opacity + number) + 1e-10
    metres = tl.load(distance + number)
    by_opacity = tl.load(grad_opacity + number).to(tl.float32)
    if COLORS + CLASSES > 0:
        is_color = (channel >= 1) & (channel <= COLORS)
        at = grad_color + number[:, :, None] * COLORS + (channel - 1)
        by_shown = tl.load(at, is_color, other=0.0).to(tl.float32)
        if CLASSES > 0:
            is_class = (channel > COLORS) & (channel <= COLORS + CLASSES)
            at = grad_semantics + number[:, :, None] * CLASSES + (channel - 1 - COLORS)
            by_shown += tl.load(at, is_class, other=0.0).to(tl.float32)
    if NORMALS:
        by_normal_x = tl.load(grad_normal + 3 * number).to(tl.float32)
        by_normal_y = tl.load(grad_normal + 3 * number + 1).to(tl.float32)
        by_normal_z = tl.load(grad_normal + 3 * number + 2).to(tl.float32)
    if HAS_EIKONAL:
        by_error = tl.load(grad_eikonal + number).to(tl.float32)

    zero = tl.zeros([1, BLOCK], tl.float32)
    by_sharpness, rows_added, features_added = zero, zero, zero
    later = tl.zeros([1, 1], tl.float32)
    for done in range(blocks):
        block = blocks - 1 - done
        entering = tl.load(light + number * blocks + block)
        # where no light comes, only what was kept of the samples has a gradient
        if tl.sum(tl.where((entering != 0) | HAS_SDF | HAS_EIKONAL, 1, 0)) > 0:
            sample = block * BLOCK + tl.arange(0, BLOCK)[None, :]
            inside = sample < samples
            t, delta, mid = interval(sample, ray, samples, JITTER)
            place = locate(ray, t, low, scale, HEIGHT, WIDTH, DEPTH)
            s, by_x, by_y, by_z = read_geometry(table, place, HEIGHT, WIDTH, DEPTH)
            cosine = by_x * x + by_y * y + by_z * z
            alpha = alpha_of(s, cosine, delta, sharpness, anneal, ALPHA)
            if BACKDROP:
                alpha = tl.where(sample == samples - 1, 1.0, alpha)
            reaches, _ = transmittance(alpha, inside, entering, BLOCK)
            lit = inside & ~(reaches <= stop_below)
            weight = tl.where(lit, alpha * reaches, 0.0)

            by_weight = by_opacity + by_metre * (mid - metres)
            if HAS_WEIGHTS:
                by_weight += tl.load(grad_weights + first + sample, inside, other=0.0)
            if COLORS + CLASSES > 0:
                for part in range(0, BLOCK, FEW):
                    share = some(weight, part, FEW, BLOCK)[:, :, None]
                    there = some_places(place, part, FEW, BLOCK)
                    live = share != 0
                    if CHANNELS > 1 + COLORS + CLASSES:
                        live &= channel <= COLORS + CLASSES
                    features = read_channels(volume, there, channel, live, Y, X, Z, C)
                    shown = appearance(features, channel, COLORS, CLASSES)
                    by_weight += whole(tl.sum(shown * by_shown, 2), part, FEW, BLOCK)
                    by_feature = share * appearance_gradient(
                        shown, by_shown, channel, COLORS, CLASSES
                    )
                    if SCATTER == "measure":
                        size = tl.sum(tl.where(live, tl.abs(by_feature), 0.0), 2)
                        features_added += whole(size, part, FEW, BLOCK)
                    else:
                        add_channels(
                            grad_volume,
                            there,
                            channel,
                            by_feature,
                            live,
                            tl.load(scales + 1) if SCATTER == "fixed" else 1.0,
                            GRAD_Y,
                            GRAD_X,
                            GRAD_Z,
                            GRAD_C,
                            SCATTER == "fixed",
                        )
            if NORMALS or HAS_EIKONAL:
                norm, unit_x, unit_y, unit_z = _unit(by_x, by_y, by_z)
            if NORMALS:
                turn = by_normal_x * unit_x + by_normal_y * unit_y + by_normal_z * unit_z
                by_weight += turn

            by_weight = tl.where(lit, by_weight, 0.0)
            by_alpha, later = alpha_gradient(
                alpha, reaches, weight, by_weight, inside, later, BLOCK
            )
            if BACKDROP:
                by_alpha = tl.where(sample == samples - 1, 0.0, by_alpha)
            slopes = alpha_slopes(s, cosine, delta, sharpness, anneal, ALPHA)
            by_s, by_cosine = by_alpha * slopes[0], by_alpha * slopes[1]
            by_sharpness += by_alpha * slopes[2]
            grad_x, grad_y, grad_z = by_cosine * x, by_cosine * y, by_cosine * z
            if HAS_SDF:
                by_s += tl.load(grad_sdf + first + sample, inside, other=0.0)
            if HAS_EIKONAL:
                by_norm = 2 * by_error * (norm - 1)
                grad_x += by_norm * unit_x
                grad_y += by_norm * unit_y
                grad_z += by_norm * unit_z
            if NORMALS:
                share = weight / tl.maximum(norm, 1e-12)
                grad_x += share * (by_normal_x - turn * unit_x)
                grad_y += share * (by_normal_y - turn * unit_y)
                grad_z += share * (by_normal_z - turn * unit_z)

            size = tl.abs(by_s) + tl.abs(grad_x) + tl.abs(grad_y) + tl.abs(grad_z)
            live = inside & (size != 0)
            if SCATTER == "measure":
                rows_added += tl.where(live, size, 0.0)
            else:
                add_channels(
                    grad_table,
                    place,
                    tl.arange(0, 4)[None, None, :],
                    pack(by_s, grad_x, grad_y, grad_z),
                    live[:, :, None],
                    tl.load(scales) if SCATTER == "fixed" else 1.0,
                    4 * WIDTH * DEPTH,
                    4 * DEPTH,
                    4,
                    1,
                    SCATTER == "fixed",
                )
    tl.store(grad_inv_s + number, tl.sum(by_sharpness, 1, keep_dims=True))
    if SCATTER == "measure":
        tl.store(magnitudes + 2 * number, tl.sum(rows_added, 1, keep_dims=True))
        tl.store(magnitudes + 2 * number + 1, tl.sum(features_added, 1, keep_dims=True))
