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

from typing import NamedTuple

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
    short = 0 if published_pixels else 1
    spans = zip(pixels.unbind(-1), (width - short, height - short), strict=True)
    grid = torch.stack([2 * at / span - 1 for at, span in spans], dim=-1)
    grid = grid.to(images.dtype).expand(images.shape[0], -1, -1)
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
# A ray in its sources, its proposals, and what their colours come to. A program has one ray, tiles
# are [SOURCES, BLOCK], program ids are ray, camera and item.


class Scene(NamedTuple):
    """Images that rays are compared with, as `epipolar_photometric` takes them."""

    pixels: Tensor
    target: Tensor
    images: Tensor
    projections: Tensor
    shape: tuple[int, int, int]  # sources, rows, columns; 3.6 wants what may be 1 in a tuple within
    target_strides: tuple[int, ...]
    image_strides: tuple[int, ...]  # of items, sources and cameras
    pixel_strides: tuple[int, ...]  # of channels, rows and columns
    read: tuple[float, float]  # pixel u is read at index u read[0]


class Sight(NamedTuple):
    """A ray in its sources: which of [SOURCES, 1] there are, slope and start of its line in them
    (x, y, z), their images, the colour to be found, and where its results lie [SOURCES or 1, 1],
    those that are stored.
    """

    known: Tensor
    slope: tuple[Tensor, ...]
    start: tuple[Tensor, ...]
    image: Tensor
    goal: tuple[Tensor, ...]
    results: Tensor
    answers: Tensor


class Compared(NamedTuple):
    """Proposals [SOURCES or 1, BLOCK]: difference from the goal, colour, visibility (1 or 0)."""

    difference: Tensor
    red: Tensor
    green: Tensor
    blue: Tensor
    seen: Tensor


@triton.jit
def look(scene, COMBINE: tl.constexpr, SOURCES: tl.constexpr):
    """The `Sight` of a program's ray. A proposal at depth t is at slope t + start, homogeneous;
    matrices are multiplied in their own precision.
    """
    ray, rays = tl.program_id(0), tl.num_programs(0)
    camera, cameras = tl.program_id(1), tl.num_programs(1)
    item, sources = tl.program_id(2).to(tl.int64), scene.shape[0]
    source = tl.arange(0, SOURCES)[:, None]
    known = source < sources
    view = (item * sources + source) * cameras + camera
    u, v = tl.load(scene.pixels + 2 * ray), tl.load(scene.pixels + 2 * ray + 1)
    slope, start, goal = (), (), ()
    target = scene.target + item * scene.target_strides[0] + camera * scene.target_strides[1]
    target += ray * scene.target_strides[2]
    for axis in tl.static_range(3):
        row = scene.projections + 16 * view + 4 * axis
        along = tl.load(row, known, other=0.0) * u + tl.load(row + 1, known, other=0.0) * v
        slope += ((along + tl.load(row + 2, known, other=0.0)).to(tl.float32),)
        start += (tl.load(row + 3, known, other=0.0).to(tl.float32),)
        goal += (tl.load(target + axis * scene.target_strides[3]).to(tl.float32),)
    strides = scene.image_strides
    image = scene.images + item * strides[0] + camera.to(tl.int64) * strides[2]
    image += source.to(tl.int64) * strides[1]
    answers = known
    if COMBINE:
        view = tl.zeros([1, 1], tl.int64) + item * cameras + camera
        answers = view >= 0
    return Sight(known, slope, start, image, goal, view * rays + ray, answers)


@triton.jit
def seen_at(sight, t, height, width):
    """Pixels x, y of proposals at depths t in the sources, and whether these see them."""
    z = sight.slope[2] * t + sight.start[2]
    front = tl.maximum(z, 1e-5)
    x = (sight.slope[0] * t + sight.start[0]) / front
    y = (sight.slope[1] * t + sight.start[1]) / front
    return x, y, (z > 0) & (x > 0) & (x < width) & (y > 0) & (y < height)


@triton.jit
def read_colors(image, strides, x, y, seen, height, width):
    """Red, green and blue at pixels, bilinear, zero where not seen; image: pointers."""
    x = tl.where(seen, tl.minimum(x, width - 1), 0.0)
    y = tl.where(seen, tl.minimum(y, height - 1), 0.0)
    left, top = tl.minimum(x.to(tl.int32), width - 2), tl.minimum(y.to(tl.int32), height - 2)
    x, y = x - left, y - top
    corner = image + (top * strides[1] + left * strides[2])
    out = ()
    for _ in tl.static_range(3):
        a = tl.load(corner, seen, other=0.0).to(tl.float32)
        b = tl.load(corner + strides[2], seen, other=0.0).to(tl.float32)
        c = tl.load(corner + strides[1], seen, other=0.0).to(tl.float32)
        d = tl.load(corner + (strides[1] + strides[2]), seen, other=0.0).to(tl.float32)
        above, below = a + x * (b - a), c + x * (d - c)
        out += (above + y * (below - above),)
        corner += strides[0]
    return out


@triton.jit
def compare(sight, scene, t, inside, COMBINE: tl.constexpr):
    """Proposals at depths t [1, BLOCK], those `inside`, become `Compared`."""
    height, width = scene.shape[1], scene.shape[2]
    x, y, seen = seen_at(sight, t, height, width)
    seen &= inside & sight.known
    x, y = x * scene.read[0], y * scene.read[1]
    red, green, blue = read_colors(sight.image, scene.pixel_strides, x, y, seen, height, width)
    difference = robust_cost(sight.goal[0] - red) + robust_cost(sight.goal[1] - green)
    difference = (difference + robust_cost(sight.goal[2] - blue)) / 3
    difference = tl.where(seen, difference, 0.0)
    seen = seen.to(tl.float32)
    if COMBINE:
        count = tl.sum(seen, 0, keep_dims=True)
        share = 1 / tl.maximum(count, 1)
        difference = tl.sum(difference, 0, keep_dims=True) * share
        red = tl.sum(red, 0, keep_dims=True) * share
        green = tl.sum(green, 0, keep_dims=True) * share
        blue = tl.sum(blue, 0, keep_dims=True) * share
        seen = tl.minimum(count, 1)
    return Compared(difference, red, green, blue, seen)


@triton.jit
def no_sums(COMBINE: tl.constexpr, SOURCES: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of weights times `Compared` and of whether one was seen, before any is added."""
    zero = tl.zeros([1 if COMBINE else SOURCES, BLOCK], tl.float32)
    return zero, zero, zero, zero, zero, zero


@triton.jit
def with_sums(sums, weight, here):
    """Sums to which a weight times `Compared` is added."""
    return (
        sums[0] + weight * here.difference,
        sums[1] + weight * here.red,
        sums[2] + weight * here.green,
        sums[3] + weight * here.blue,
        sums[4] + weight * here.seen,
        tl.maximum(sums[5], here.seen),
    )


@triton.jit
def _at_least_epsilon(total):
    """What the sum of weights becomes before anything is divided by it."""
    return tl.maximum(total, 1.1920928955078125e-07)  # finfo(float32).eps


@triton.jit
def store_sums(l1, color, valid, total, sums, sight):
    """Results from sums over the proposals of a ray."""
    results, answers = sight.results, sight.answers
    weight = tl.sum(sums[4], 1, keep_dims=True)
    norm = 1 / _at_least_epsilon(weight)
    tl.store(total + results, weight, answers)
    tl.store(valid + results, tl.max(sums[5], 1, keep_dims=True) > 0, answers)
    tl.store(l1 + results, tl.sum(sums[0], 1, keep_dims=True) * norm, answers)
    for channel in tl.static_range(3):
        shown = tl.sum(sums[1 + channel], 1, keep_dims=True) * norm
        tl.store(color + 3 * results + channel, shown, answers)


@triton.jit
def sum_gradients(grad_l1, grad_color, l1, color, total, sight):
    """Gradients of the weighted sums of difference, red, green and blue, and minus that of the
    weights' own sum [SOURCES or 1, 1], given those of the results.
    """
    results, answers = sight.results, sight.answers
    weight = tl.load(total + results, answers, other=1.0)
    scale = 1 / _at_least_epsilon(weight)
    by_l1 = tl.load(grad_l1 + results, answers, other=0.0).to(tl.float32) * scale
    offset = by_l1 * tl.load(l1 + results, answers, other=0.0)
    out = (by_l1,)
    for channel in tl.static_range(3):
        at = 3 * results + channel
        by_color = tl.load(grad_color + at, answers, other=0.0).to(tl.float32) * scale
        offset += by_color * tl.load(color + at, answers, other=0.0)
        out += (by_color,)
    return out + (tl.where(weight < _at_least_epsilon(weight), 0.0, offset),)  # noqa: RUF005


@triton.jit
def weight_gradient(here, by_sums):
    """Gradient [1, BLOCK] of the weights of `Compared` proposals."""
    by_l1, by_red, by_green, by_blue, offset = by_sums
    slope = by_l1 * here.difference + by_red * here.red + by_green * here.green
    return tl.sum(slope + by_blue * here.blue - offset * here.seen, 0, keep_dims=True)


# -----------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def _proposals_of(samples):
    """Where the first proposal of a program's ray lies in [B, N, R, S]."""
    item, camera = tl.program_id(2).to(tl.int64), tl.program_id(1)
    view = item * tl.num_programs(1) + camera
    return (view * tl.num_programs(0) + tl.program_id(0)) * samples


@triton.jit
def epipolar_forward(
    weights,
    depths,
    scene,
    l1,
    color,
    valid,
    total,
    samples,
    COMBINE: tl.constexpr,
    SOURCES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """weights, depths [B, N, R, S] -> l1, color, valid, total (sum w valid) [B, K or 1, N, R]."""
    sight, first = look(scene, COMBINE, SOURCES), _proposals_of(samples)
    sums = no_sums(COMBINE, SOURCES, BLOCK)
    for start in range(0, samples, BLOCK):
        sample = start + tl.arange(0, BLOCK)[None, :]
        inside = sample < samples
        t = tl.load(depths + first + sample, inside, other=0.0).to(tl.float32)
        weight = tl.load(weights + first + sample, inside, other=0.0).to(tl.float32)
        sums = with_sums(sums, weight, compare(sight, scene, t, inside, COMBINE))
    store_sums(l1, color, valid, total, sums, sight)


@triton.jit
def epipolar_backward(
    grad_l1,
    grad_color,
    l1,
    color,
    total,
    depths,
    scene,
    grad_weights,
    samples,
    COMBINE: tl.constexpr,
    SOURCES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of l1 and color [B, K or 1, N, R] -> grad_weights [B, N, R, S]."""
    sight, first = look(scene, COMBINE, SOURCES), _proposals_of(samples)
    by_sums = sum_gradients(grad_l1, grad_color, l1, color, total, sight)
    for start in range(0, samples, BLOCK):
        sample = start + tl.arange(0, BLOCK)[None, :]
        inside = sample < samples
        t = tl.load(depths + first + sample, inside, other=0.0).to(tl.float32)
        here = compare(sight, scene, t, inside, COMBINE)
        tl.store(grad_weights + first + sample, weight_gradient(here, by_sums), inside)


def scene_of(
    pixels: Tensor, target: Tensor, sources: Tensor, projections: Tensor, published_pixels: bool
) -> Scene:
    """As kernels get it."""
    count, *_, rows, columns = sources.shape[1:]
    strides, shrink = sources.stride(), ((columns - 1) / columns, (rows - 1) / rows)
    return Scene(
        pixels.contiguous(),
        target,
        sources,
        projections.contiguous(),
        shape=(count, rows, columns),
        target_strides=target.stride(),
        image_strides=strides[:3],
        pixel_strides=strides[3:],
        read=shrink if published_pixels else (1.0, 1.0),
    )


def _told(views: list[Tensor], combine: bool, published_pixels: bool) -> dict[str, object]:
    """Grid and what both kernels are told of depths, pixels, target, sources and projections."""
    depths, *images = views
    batch, cameras, rays, samples = depths.shape
    return dict(
        grid=(rays, cameras, batch),
        depths=depths.contiguous(),
        scene=scene_of(*images, published_pixels),
        samples=samples,
        COMBINE=combine,
        SOURCES=triton.next_power_of_2(images[2].shape[1]),
        BLOCK=PROPOSALS,
        warps=WARPS,
    )


def _results(weights: Tensor, views: list[Tensor], combine: bool, *_) -> tuple[Tensor, ...]:
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
    out = dict(l1=l1, color=color, valid=valid, total=total)
    told = _told(views, combine, published_pixels)
    launch(epipolar_forward, weights=weights.contiguous(), **out, **told)
    return l1, color, valid, total


_epipolar_op.register_fake(_results)


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
    grad_weights = views[0].new_empty(views[0].shape, dtype=torch.float32)
    launch(
        epipolar_backward,
        grad_l1=grad_l1.contiguous(),
        grad_color=grad_color.contiguous(),
        l1=l1,
        color=color,
        total=total,
        grad_weights=grad_weights,
        **_told(views, combine, published_pixels),
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
