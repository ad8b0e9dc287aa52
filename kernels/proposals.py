"""Photometric error of all depth proposals of a ray (SelfOcc, MVS-embedded depth).

For source k and a ray through pixel (u, v) with proposals t_s (z-depth) of weight w_s:

    (x, y)_s = projection of (u t_s, v t_s, t_s, 1)
    valid_s  = in front of the source and inside its image
    c_s      = source colour at (x, y)_s, bilinear
    d_s      = mean_channels robust(target - c_s)         (`ssim.robust`: |.|)
    W        = max(sum w valid, eps)
    l1       = sum_s w_s valid_s d_s / W                  (not the difference of the expectation)
    color    = sum_s w_s valid_s c_s / W

The combined form first averages d and c of a proposal over the sources that see it, and valid_s is
whether one does. Only the weights are differentiable:

    d out / d w_s = valid_s (out_s - out) / W,  out_s = d_s or c_s; without "- out" where W is eps

The Triton kernels give a ray to one warp. Its proposals project to an epipolar line, so that the
lanes read neighbouring pixels; no colour is written. Backward is a gather that reads them again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import at_least_float32, check
from kernels.dispatch import launch, tl, triton, use_triton
from kernels.ssim import robust, robust_cost

CHUNK = 1 << 20  # proposals whose corners the reference looks up at once

# Proposals a program takes at once, for all sources: one a lane of its only warp, hence no barriers
# and no exchange between lanes before the last sums. More take shuffles between layouts and up to
# three times the registers.
PROPOSALS, WARPS = 64 if torch.version.hip else 32, 1


def sample_image(images: Tensor, pixels: Tensor, published_pixels: bool = False) -> Tensor:
    """Colours at pixels, bilinear, border colours outside; differentiable in the pixels.

    Args: images [M, C, h, w]; pixels [M or 1, R, 2] (u, v). Pixel u is read at index u, or with
    `published_pixels` at u (w - 1) / w as the published code does. Returns [M, R, C].
    """
    height, width = images.shape[-2:]
    size = pixels.new_tensor([width, height])
    span = size if published_pixels else size - 1
    grid = (2 * pixels / span - 1).to(images.dtype).expand(images.shape[0], -1, -1)
    colors = F.grid_sample(images, grid[:, None], padding_mode="border", align_corners=True)
    return colors[:, :, 0].transpose(1, 2)


# -----------------------------------------------------------------------------------------------
# Plain PyTorch


def _reference(
    weights: Tensor,
    depths: Tensor,
    pixels: Tensor,
    target: Tensor,
    sources: Tensor,
    projections: Tensor,
    combine: bool,
    published_pixels: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    colors, differences = _proposals(depths, pixels, target, sources, projections, published_pixels)
    if combine:
        count = colors[..., 3:].sum(1, keepdim=True).clamp_min_(1.0)
        colors = colors.sum(1, keepdim=True).div_(count)
        differences = differences.sum(1, keepdim=True).div_(count[..., 0])
    weights = weights[:, None]
    sums = (weights[..., None, :] @ colors)[..., 0, :]
    norm = sums[..., 3].clamp_min(torch.finfo(weights.dtype).eps)
    l1 = (weights * differences).sum(-1) / norm
    return l1, sums[..., :3] / norm[..., None], (colors[..., 3] > 0).any(-1)


@torch.no_grad()
def _proposals(
    depths, pixels, target, sources, projections, published_pixels
) -> tuple[Tensor, Tensor]:
    """Colours with visibility [B, K, N, R, S, 4] and absolute differences [B, K, N, R, S].

    Both are zero where a proposal is invalid.
    """
    batch, count, cameras, _, height, width = sources.shape
    samples = depths.shape[-1]
    table = sources.new_ones(batch, count, cameras, height, width, 4)
    table[..., :3] = sources.permute(0, 1, 2, 4, 5, 3)
    table = table.flatten(0, -2)
    image = torch.arange(batch * count * cameras, dtype=torch.int32, device=depths.device)
    image = (image * (height * width)).view(batch, count, cameras, 1, 1)

    homogeneous = torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=-1).to(projections.dtype)
    rays = (homogeneous @ projections[..., :3, :3].mT).to(
        depths.dtype
    )  # [B, K, N, R, 3]: one metre of target depth
    offset = projections[..., :3, 3].to(depths.dtype)[..., None, None, :]

    shape = (batch, count, cameras, depths.shape[2], samples)
    colors, differences = depths.new_empty(*shape, 4), depths.new_empty(shape)
    step = max(1, CHUNK // (batch * count * cameras * samples))
    for first in range(0, depths.shape[2], step):
        part = slice(first, first + step)
        t, ray = depths[:, None, :, part], rays[:, :, :, part, None]
        x, y, z = (torch.addcmul(offset[..., axis], ray[..., axis], t) for axis in range(3))
        front = z > 0
        z.clamp_(min=1e-5)
        x, y = x.div_(z), y.div_(z)
        valid = front & (x > 0) & (x < width) & (y > 0) & (y < height)
        if published_pixels:
            x, y = x.mul_((width - 1) / width), y.mul_((height - 1) / height)
        color = _bilinear(table, x, y, valid, image, (height, width))
        colors[:, :, :, part] = color
        error = robust(target[:, None, :, part, None] - color[..., :3])
        differences[:, :, :, part] = error.mean(-1).mul_(valid)
    return colors, differences


def _bilinear(
    table: Tensor, x: Tensor, y: Tensor, valid: Tensor, image: Tensor, size: tuple[int, int]
) -> Tensor:
    """Bilinear look-up of a pixel table [images * h * w, 4] times `valid`: [..., 4]."""
    height, width = size
    x, y = x.nan_to_num_(0.0).clamp_(0, width - 1), y.nan_to_num_(0.0).clamp_(0, height - 1)
    left, top = x.int().clamp_(max=width - 2), y.int().clamp_(max=height - 2)
    x, y = x - left, y - top
    pixel = left.add_(top.mul_(width)).add_(image).flatten()
    weights = x.new_empty(x.numel(), 4)
    below = (y * valid).flatten()
    above = valid.to(y.dtype).flatten() - below
    x = x.flatten()
    for row, side in enumerate((above, below)):
        right = side * x
        torch.sub(side, right, out=weights[:, 2 * row])
        weights[:, 2 * row + 1] = right
    corners = torch.tensor([0, 1, width, width + 1], dtype=torch.int32, device=pixel.device)
    out = F.embedding_bag(pixel[:, None] + corners, table, per_sample_weights=weights, mode="sum")
    return out.view(*valid.shape, 4)


# -----------------------------------------------------------------------------------------------
# Where a proposal is seen, and what is seen there: [SOURCES, BLOCK]


@triton.jit
def project(pixel, projection, known):
    """The line of proposals of a ray in its sources, (slope_x, y, z, start_x, y, z) [SOURCES, 1].

    A proposal at depth t is at slope t + start, homogeneous. pixel: pointer to (u, v); projection:
    pointers [SOURCES, 1] to matrices, multiplied in their own precision. Zero where not `known`.
    """
    u, v = tl.load(pixel), tl.load(pixel + 1)
    out = ()
    for axis in tl.static_range(3):
        row = projection + 4 * axis
        slope = tl.load(row, known, other=0.0) * u + tl.load(row + 1, known, other=0.0) * v
        out += ((slope + tl.load(row + 2, known, other=0.0)).to(tl.float32),)
    for axis in tl.static_range(3):
        out += (tl.load(projection + 4 * axis + 3, known, other=0.0).to(tl.float32),)
    return out


@triton.jit
def seen_at(line, t, height, width):
    """Pixels x, y of proposals at depths t in the sources, and whether these see them."""
    slope_x, slope_y, slope_z, start_x, start_y, start_z = line
    z = slope_z * t + start_z
    front = tl.maximum(z, 1e-5)
    x, y = (slope_x * t + start_x) / front, (slope_y * t + start_y) / front
    return x, y, (z > 0) & (x > 0) & (x < width) & (y > 0) & (y < height)


@triton.jit
def read_colors(image, strides, x, y, seen, height, width, scale_x, scale_y):
    """Red, green and blue at pixels (x scale_x, y scale_y), bilinear, zero where not seen.

    image: pointers [SOURCES, 1]; strides of a channel, a row and a column.
    """
    channel_stride, row_stride, column_stride = strides
    x = tl.where(seen, tl.minimum(x * scale_x, width - 1), 0.0)
    y = tl.where(seen, tl.minimum(y * scale_y, height - 1), 0.0)
    left, top = tl.minimum(x.to(tl.int32), width - 2), tl.minimum(y.to(tl.int32), height - 2)
    x, y = x - left, y - top
    corner = image + (top * row_stride + left * column_stride)
    out = ()
    for _ in tl.static_range(3):
        a = tl.load(corner, seen, other=0.0).to(tl.float32)
        b = tl.load(corner + column_stride, seen, other=0.0).to(tl.float32)
        c = tl.load(corner + row_stride, seen, other=0.0).to(tl.float32)
        d = tl.load(corner + (row_stride + column_stride), seen, other=0.0).to(tl.float32)
        above, below = a + x * (b - a), c + x * (d - c)
        out += (above + y * (below - above),)
        corner += channel_stride
    return out


@triton.jit
def compared_proposals(line, image, strides, t, inside, target, size, scale, COMBINE: tl.constexpr):
    """Difference, red, green, blue and visibility (1 or 0) of proposals [SOURCES or 1, BLOCK].

    t: depths [1, BLOCK], those `inside`; target: the three colours of the ray.
    """
    height, width = size
    x, y, seen = seen_at(line, t, height, width)
    seen &= inside
    colors = read_colors(image, strides, x, y, seen, height, width, scale[0], scale[1])
    difference = robust_cost(target[0] - colors[0]) + robust_cost(target[1] - colors[1])
    difference = (difference + robust_cost(target[2] - colors[2])) / 3
    difference = tl.where(seen, difference, 0.0)
    seen = seen.to(tl.float32)
    red, green, blue = colors
    if COMBINE:
        count = tl.sum(seen, 0, keep_dims=True)
        share = 1 / tl.maximum(count, 1)
        difference = tl.sum(difference, 0, keep_dims=True) * share
        red = tl.sum(red, 0, keep_dims=True) * share
        green = tl.sum(green, 0, keep_dims=True) * share
        blue = tl.sum(blue, 0, keep_dims=True) * share
        seen = tl.minimum(count, 1)
    return difference, red, green, blue, seen


@triton.jit
def at_least_epsilon(total):
    """What the sum of weights becomes before anything is divided by it."""
    return tl.maximum(total, 1.1920928955078125e-07)  # finfo(float32).eps


@triton.jit
def result_gradient(grad_l1, grad_color, l1, color, total, results, answers):
    """Gradients of the weighted sums of difference, red, green and blue, and minus that of the
    weights' own sum [SOURCES or 1, 1], given those of the results.
    """
    weight = tl.load(total + results, answers, other=1.0)
    scale = 1 / at_least_epsilon(weight)
    by_l1 = tl.load(grad_l1 + results, answers, other=0.0).to(tl.float32) * scale
    offset = by_l1 * tl.load(l1 + results, answers, other=0.0)
    out = (by_l1,)
    for channel in tl.static_range(3):
        at = 3 * results + channel
        by_color = tl.load(grad_color + at, answers, other=0.0).to(tl.float32) * scale
        offset += by_color * tl.load(color + at, answers, other=0.0)
        out += (by_color,)
    return out + (tl.where(weight < at_least_epsilon(weight), 0.0, offset),)  # noqa: RUF005


@triton.jit
def ray_in_sources(
    pixels,
    target,
    images,
    projections,
    place,
    counts,
    target_strides,
    image_strides,
    COMBINE: tl.constexpr,
    SOURCES: tl.constexpr,
):
    """What a program needs of its ray: which of [SOURCES, 1] are `known`, its `line` in them, their
    images, its target colour, and where its results lie [SOURCES or 1, 1], those that are stored.

    place: item, camera, ray; counts: cameras, rays, sources; strides: of batch, camera, ray and
    channel, and of batch, source and camera.
    """
    item, camera, ray = place
    cameras, rays, sources = counts
    source = tl.arange(0, SOURCES)[:, None]
    known = source < sources
    view = (item * sources + source) * cameras + camera
    line = project(pixels + 2 * ray, projections + 16 * view, known)
    image = images + item * image_strides[0] + camera.to(tl.int64) * image_strides[2]
    image += source.to(tl.int64) * image_strides[1]
    target += item * target_strides[0] + camera * target_strides[1] + ray * target_strides[2]
    goal = (
        tl.load(target).to(tl.float32),
        tl.load(target + target_strides[3]).to(tl.float32),
        tl.load(target + 2 * target_strides[3]).to(tl.float32),
    )
    answers = known
    if COMBINE:
        view = tl.zeros([1, 1], tl.int64) + item * cameras + camera
        answers = view >= 0
    return known, line, image, goal, view * rays + ray, answers


# -----------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def epipolar_forward(
    weights,
    depths,
    pixels,
    target,
    images,
    projections,
    l1,
    color,
    valid,
    total,
    samples,
    sources,
    size,
    target_strides,
    image_strides,
    scale,
    COMBINE: tl.constexpr,
    SOURCES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """weights, depths [B, N, R, S] -> l1, color, valid, total (sum w valid) [B, K or 1, N, R].

    size: rows and columns of images; scale: what pixels (x, y) are multiplied by.
    """
    ray, rays = tl.program_id(0), tl.num_programs(0)
    camera, cameras = tl.program_id(1), tl.num_programs(1)
    item = tl.program_id(2).to(tl.int64)
    known, line, image, goal, results, answers = ray_in_sources(
        pixels,
        target,
        images,
        projections,
        (item, camera, ray),
        (cameras, rays, sources),
        target_strides,
        image_strides,
        COMBINE,
        SOURCES,
    )
    strides = (image_strides[3], image_strides[4], image_strides[5])
    first = ((item * cameras + camera) * rays + ray) * samples
    zero = tl.zeros([1 if COMBINE else SOURCES, BLOCK], tl.float32)
    sum_l1, sum_red, sum_green, sum_blue, sum_weight, ever = zero, zero, zero, zero, zero, zero
    for start in range(0, samples, BLOCK):
        sample = start + tl.arange(0, BLOCK)[None, :]
        inside = sample < samples
        t = tl.load(depths + first + sample, inside, other=0.0).to(tl.float32)
        weight = tl.load(weights + first + sample, inside, other=0.0).to(tl.float32)
        difference, red, green, blue, seen = compared_proposals(
            line, image, strides, t, inside & known, goal, size, scale, COMBINE
        )
        sum_l1 += weight * difference
        sum_red += weight * red
        sum_green += weight * green
        sum_blue += weight * blue
        sum_weight += weight * seen
        ever = tl.maximum(ever, seen)

    all_weight = tl.sum(sum_weight, 1, keep_dims=True)
    norm = 1 / at_least_epsilon(all_weight)
    tl.store(total + results, all_weight, answers)
    tl.store(valid + results, tl.max(ever, 1, keep_dims=True) > 0, answers)
    tl.store(l1 + results, tl.sum(sum_l1, 1, keep_dims=True) * norm, answers)
    tl.store(color + 3 * results, tl.sum(sum_red, 1, keep_dims=True) * norm, answers)
    tl.store(color + 3 * results + 1, tl.sum(sum_green, 1, keep_dims=True) * norm, answers)
    tl.store(color + 3 * results + 2, tl.sum(sum_blue, 1, keep_dims=True) * norm, answers)


@triton.jit
def epipolar_backward(
    grad_l1,
    grad_color,
    l1,
    color,
    total,
    depths,
    pixels,
    target,
    images,
    projections,
    grad_weights,
    samples,
    sources,
    size,
    target_strides,
    image_strides,
    scale,
    COMBINE: tl.constexpr,
    SOURCES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of l1 and color [B, K or 1, N, R] -> grad_weights [B, N, R, S]."""
    ray, rays = tl.program_id(0), tl.num_programs(0)
    camera, cameras = tl.program_id(1), tl.num_programs(1)
    item = tl.program_id(2).to(tl.int64)
    known, line, image, goal, results, answers = ray_in_sources(
        pixels,
        target,
        images,
        projections,
        (item, camera, ray),
        (cameras, rays, sources),
        target_strides,
        image_strides,
        COMBINE,
        SOURCES,
    )
    strides = (image_strides[3], image_strides[4], image_strides[5])
    by_l1, by_red, by_green, by_blue, offset = result_gradient(
        grad_l1, grad_color, l1, color, total, results, answers
    )
    first = ((item * cameras + camera) * rays + ray) * samples
    for start in range(0, samples, BLOCK):
        sample = start + tl.arange(0, BLOCK)[None, :]
        inside = sample < samples
        t = tl.load(depths + first + sample, inside, other=0.0).to(tl.float32)
        difference, red, green, blue, seen = compared_proposals(
            line, image, strides, t, inside & known, goal, size, scale, COMBINE
        )
        slope = by_l1 * difference + by_red * red + by_green * green + by_blue * blue
        slope = tl.sum(slope - offset * seen, 0, keep_dims=True)
        tl.store(grad_weights + first + sample, slope, inside)


def _views(views: list[Tensor], combine: bool, published_pixels: bool) -> dict[str, object]:
    """What both kernels are told of depths, pixels, target, sources and projections."""
    depths, pixels, target, sources, projections = views
    _, count, _, _, height, width = sources.shape
    return dict(
        depths=depths.contiguous(),
        pixels=pixels.contiguous(),
        target=target,
        images=sources,
        projections=projections.contiguous(),
        samples=depths.shape[-1],
        sources=count,
        size=(height, width),
        target_strides=target.stride(),
        image_strides=sources.stride(),
        scale=((width - 1) / width, (height - 1) / height) if published_pixels else (1.0, 1.0),
        COMBINE=combine,
        SOURCES=triton.next_power_of_2(count),
        BLOCK=PROPOSALS,
        warps=WARPS,
    )


def _results(weights: Tensor, views: list[Tensor], combine: bool) -> tuple[Tensor, ...]:
    """l1, color, valid and total, not yet filled."""
    batch, cameras, rays, _ = weights.shape
    count = 1 if combine else views[3].shape[1]
    l1 = weights.new_empty(batch, count, cameras, rays, dtype=torch.float32)
    color = l1.new_empty(*l1.shape, 3)
    return l1, color, torch.empty_like(l1, dtype=torch.bool), torch.empty_like(l1)


@torch.library.custom_op("selfocc::epipolar_photometric", mutates_args=())
def _epipolar_op(
    weights: Tensor, views: list[Tensor], combine: bool, published_pixels: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    l1, color, valid, total = _results(weights, views, combine)
    batch, cameras, rays, _ = weights.shape
    launch(
        epipolar_forward,
        (rays, cameras, batch),
        weights=weights.contiguous(),
        l1=l1,
        color=color,
        valid=valid,
        total=total,
        **_views(views, combine, published_pixels),
    )
    return l1, color, valid, total


@_epipolar_op.register_fake
def _(weights, views, combine, published_pixels):
    return _results(weights, views, combine)


@torch.library.custom_op("selfocc::epipolar_photometric_gradient", mutates_args=())
def _epipolar_gradient_op(
    grad_l1: Tensor,
    grad_color: Tensor,
    l1: Tensor,
    color: Tensor,
    total: Tensor,
    views: list[Tensor],
    combine: bool,
    published_pixels: bool,
) -> Tensor:
    batch, cameras, rays, _ = views[0].shape
    grad_weights = views[0].new_empty(views[0].shape, dtype=torch.float32)
    launch(
        epipolar_backward,
        (rays, cameras, batch),
        grad_l1=grad_l1.contiguous(),
        grad_color=grad_color.contiguous(),
        l1=l1,
        color=color,
        total=total,
        grad_weights=grad_weights,
        **_views(views, combine, published_pixels),
    )
    return grad_weights


@_epipolar_gradient_op.register_fake
def _(grad_l1, grad_color, l1, color, total, views, *_):
    return views[0].new_empty(views[0].shape, dtype=torch.float32)


def _epipolar_setup(ctx, inputs, output):
    weights, views, *ctx.options = inputs
    l1, color, valid, total = output
    ctx.dtype = weights.dtype
    ctx.mark_non_differentiable(valid, total)
    ctx.save_for_backward(l1, color, total, *views)


def _epipolar_autograd(ctx, grad_l1, grad_color, *_):
    l1, color, total, *views = ctx.saved_tensors
    grads = grad_l1, grad_color
    by_weights = _epipolar_gradient_op(*grads, l1, color, total, views, *ctx.options)
    return by_weights.to(ctx.dtype), [None] * len(views), None, None


_epipolar_op.register_autograd(_epipolar_autograd, setup_context=_epipolar_setup)


# -----------------------------------------------------------------------------------------------


def epipolar_photometric(
    weights: Tensor,
    depths: Tensor,
    pixels: Tensor,
    target: Tensor,
    sources: Tensor,
    projections: Tensor,
    *,
    combine: bool = False,
    published_pixels: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Photometric difference over all depth proposals of rays.

    Differentiable in the weights only. Half precision is read as float32, and so are results.

    Args:
        weights: [B, N, R, S] of the proposals.
        depths: [B, N, R, S] their z-depths in metres.
        pixels: [R, 2] (u, v) of the rays in the target images.
        target: [B, N, R, 3] target colours there.
        sources: [B, K, N, 3, h, w] images of K >= 1 other time stamps, of any strides; two pixels
            or more along each axis.
        projections: [B, K, N, 4, 4], target (u d, v d, d, 1) to source (u d, v d, d, 1).
        combine: average over the sources proposal by proposal instead of returning one result a
            source.
        published_pixels: read pixel u at index u (w - 1) / w, as the published code does.

    Returns, with one entry in place of K if `combine`: expected absolute difference [B, K, N, R],
    composited source colour [B, K, N, R, 3], and whether any proposal projects into the image [B,
    K, N, R].
    Raises ValueError naming the argument at fault.
    """
    check(
        weights=(weights, "B N R S"),
        depths=(depths, "B N R S"),
        **shapes_of_views(pixels, target, sources, projections),
    )
    views = [depths, pixels, target, sources, projections]
    if all(map(use_triton, (weights, *views[:-1]))):
        return _epipolar_op(weights, views, combine, published_pixels)[:3]
    tensors = map(at_least_float32, (weights, *views))
    return _reference(*tensors, combine, published_pixels)


def shapes_of_views(pixels, target, sources, projections) -> dict[str, tuple[Tensor, str]]:
    """For `check`."""
    return dict(
        target=(target, "B N R 3"),
        pixels=(pixels, "R 2"),
        sources=(sources, "B K>=1 N 3 h>=2 w>=2"),
        projections=(projections, "B K N 4 4"),
    )
