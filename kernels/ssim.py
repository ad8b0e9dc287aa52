"""SSIM + L1 of images, and the least of it over sources and standing still (Godard et al. 2019).

Over 3 x 3 windows with reflected borders, of every channel: means m, variances v, covariance c,

    ssim   = (2 m_x m_y + C1) (2 c + C2) / ((m_x^2 + m_y^2 + C1) (v_x + v_y + C2))
    unlike = clamp((1 - ssim) / 2, 0, 1)
    error  = 0.85 mean_channels unlike + 0.15 mean_channels robust(x - y)

robust is the absolute value: the place to try another one is below. The kernels take one pixel a
lane. Backward gathers: a pixel is in the windows around its neighbours, twice in some at a border,
which are computed again; nothing but the images is kept.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import at_least_float32, check
from kernels.dispatch import launch, tl, triton, use_triton

SSIM_SHARE, L1_SHARE = 0.85, 0.15

# One warp of pixels a program: a grid of rays is small (55 x 190), and its 330 programs are what
# fills 132 processors.
PIXELS, WARPS = 32, 1


# -----------------------------------------------------------------------------------------------
# What a difference of colours costs. This is the place to try another one, three times.


def robust(difference: Tensor) -> Tensor:
    """Cost of a difference; Charbonnier would be sqrt(difference^2 + 1e-6)."""
    return difference.abs()


@triton.jit
def robust_cost(difference):
    return tl.abs(difference)


@triton.jit
def robust_slope(difference):
    """Derivative of `robust_cost`."""
    return tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))


# -----------------------------------------------------------------------------------------------
# Plain PyTorch


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    stack = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, -4)
    means = F.avg_pool2d(F.pad(stack, (1, 1, 1, 1), mode="reflect"), 3, 1)
    mean_x, mean_y, square_x, square_y, product = means.unflatten(0, (5, *x.shape[:-3])).unbind(0)
    variances = (square_x - mean_x.square()) + (square_y - mean_y.square())
    covariance = product - mean_x * mean_y
    numerator = (2 * mean_x * mean_y + 1e-4) * (2 * covariance + 9e-4)
    denominator = (mean_x.square() + mean_y.square() + 1e-4) * (variances + 9e-4)
    return ((1 - numerator / denominator) / 2).clamp(0, 1)


# -----------------------------------------------------------------------------------------------
# Windows


@triton.jit
def _reflect(index, count):
    """-1 -> 1, count -> count - 2."""
    return count - 1 - tl.abs(count - 1 - tl.abs(index))


@triton.jit
def _read(x, y, row, column, layout, mask):
    """x and y at pixels. layout: rows, columns, and what each is apart in x and in y."""
    _, _, x_row, x_column, y_row, y_column = layout
    here_x = tl.load(x + row * x_row + column * x_column, mask, other=0.0).to(tl.float32)
    here_y = tl.load(y + row * y_row + column * y_column, mask, other=0.0).to(tl.float32)
    return here_x, here_y


@triton.jit
def _moments(x, y, row, column, layout, mask):
    """Means of x and y, their variances and covariance in the windows around pixels [BLOCK]."""
    x_first, y_first = _read(x, y, row, column, layout, mask)
    zero = tl.zeros_like(x_first)
    sum_x, sum_y, square_x, square_y, product = zero, zero, zero, zero, zero
    for i in tl.static_range(3):
        at_row = _reflect(row + (i - 1), layout[0])
        for j in tl.static_range(3):
            at_column = _reflect(column + (j - 1), layout[1])
            here_x, here_y = _read(x, y, at_row, at_column, layout, mask)
            # as differences from the middle: the squares of smooth colours would cancel
            here_x -= x_first
            here_y -= y_first
            sum_x += here_x
            sum_y += here_y
            square_x += here_x * here_x
            square_y += here_y * here_y
            product += here_x * here_y
    return _from_sums((sum_x, sum_y, square_x, square_y, product), x_first, y_first)


@triton.jit
def _from_sums(sums, x_less, y_less):
    """Moments from sums over nine pixels of x - x_less, y - y_less, their squares and product."""
    mean_x, mean_y = sums[0] * (1 / 9), sums[1] * (1 / 9)
    variance_x = sums[2] * (1 / 9) - mean_x * mean_x
    variance_y = sums[3] * (1 / 9) - mean_y * mean_y
    covariance = sums[4] * (1 / 9) - mean_x * mean_y
    return x_less + mean_x, y_less + mean_y, variance_x, variance_y, covariance


@triton.jit
def _factors(moments):
    """Numerator and denominator of SSIM: of means, of variances."""
    mean_x, mean_y, variance_x, variance_y, covariance = moments
    means, squares = 2 * mean_x * mean_y + 1e-4, mean_x * mean_x + mean_y * mean_y + 1e-4
    return means, squares, 2 * covariance + 9e-4, variance_x + variance_y + 9e-4


@triton.jit
def _unlike(moments):
    means, squares, covariance, variances = _factors(moments)
    value = 0.5 - 0.5 * (means * covariance) / (squares * variances)
    return tl.where(value < 0, 0.0, tl.where(value > 1, 1.0, value))  # NaN stays


@triton.jit
def _unlike_slopes(moments):
    """Derivatives of `_unlike` with respect to the mean and variance of x and the covariance."""
    means, squares, covariance, variances = _factors(moments)
    by_squares, by_variances = 1 / squares, 1 / variances
    structure, similarity = covariance * by_variances, means * by_squares
    ratio = structure * similarity
    inside = tl.where(tl.abs(ratio) > 1, 0.0, 1.0)  # of the clamp
    by_mean = inside * by_squares * (ratio * moments[0] - structure * moments[1])
    by_variances *= inside
    return by_mean, 0.5 * by_variances * ratio, -by_variances * similarity


@triton.jit
def _compared(x, y, channels, x_channel, y_channel, row, column, layout, mask):
    """Sums over the channels of `_unlike` and of the cost of the difference, at pixels [BLOCK]."""
    unlike = tl.zeros_like(row).to(tl.float32)
    cost = unlike
    for _ in range(channels):
        unlike += _unlike(_moments(x, y, row, column, layout, mask))
        here_x, here_y = _read(x, y, row, column, layout, mask)
        cost += robust_cost(here_x - here_y)
        x += x_channel
        y += y_channel
    return unlike, cost


@triton.jit
def _times(window, pixel, count):
    """How often the window around a row holds another row at most one away, by reflection."""
    twice = ((window == 0) & (pixel == 1)) | ((window == count - 1) & (pixel == count - 2))
    return tl.where((window >= 0) & (window < count), tl.where(twice, 2.0, 1.0), 0.0)


@triton.jit
def _row_sums(x, y, x_here, y_here, row, column, layout, mask):
    """Sums over three columns of x, y, x^2, y^2 and x y, less (x, y)_here, in the windows around
    the column to the left, the column itself, and the one to the right.
    """
    _, columns, x_row, x_column, y_row, y_column = layout
    numbers = ()
    for j in tl.static_range(5):  # not by `_read`: LLVM needs more registers for both at once
        at = tl.maximum(_reflect(column + (j - 2), columns), 0)
        here_x = tl.load(x + row * x_row + at * x_column, mask, other=0.0).to(tl.float32) - x_here
        here_y = tl.load(y + row * y_row + at * y_column, mask, other=0.0).to(tl.float32) - y_here
        numbers += ((here_x, here_y, here_x * here_x, here_y * here_y, here_x * here_y),)
    sums = ()
    for j in tl.static_range(3):
        sums += (_added(numbers[j], numbers[j + 1], numbers[j + 2]),)
    return sums


@triton.jit
def _added(a, b, c):
    return (
        a[0] + b[0] + c[0],
        a[1] + b[1] + c[1],
        a[2] + b[2] + c[2],
        a[3] + b[3] + c[3],
        a[4] + b[4] + c[4],
    )


@triton.jit
def _gathered(x, y, grad, row, column, layout, mask):
    """x - y at pixels [BLOCK], and the sum of grad d unlike / d x over the windows they are in.

    grad [rows, columns]. The nine windows share the rows of a 5 x 5 neighbourhood, which is read
    once.
    """
    rows, columns = layout[0], layout[1]
    x_here, y_here = _read(x, y, row, column, layout, mask)
    highest = tl.maximum(_reflect(row - 2, rows), 0)
    upper = _row_sums(x, y, x_here, y_here, highest, column, layout, mask)
    middle = _row_sums(x, y, x_here, y_here, _reflect(row - 1, rows), column, layout, mask)
    total = tl.zeros_like(x_here)
    for i in tl.static_range(3):
        lowest = tl.maximum(_reflect(row + i, rows), 0)
        lower = _row_sums(x, y, x_here, y_here, lowest, column, layout, mask)
        at_row = row + (i - 1)
        row_times = _times(at_row, row, rows)
        for j in tl.static_range(3):
            at_column = column + (j - 1)
            times = row_times * _times(at_column, column, columns)
            counts = mask & (times > 0)
            at = at_row * columns + at_column
            moments = _from_sums(_added(upper[j], middle[j], lower[j]), x_here, y_here)
            by_mean, by_variance, by_covariance = _unlike_slopes(moments)
            slope = by_mean + 2 * by_variance * (x_here - moments[0])
            slope += by_covariance * (y_here - moments[1])
            scale = times * tl.load(grad + at, counts, other=0.0).to(tl.float32)
            total += tl.where(counts, scale * slope, 0.0)
        upper, middle = middle, lower
    return x_here - y_here, total * (1 / 9)


# -----------------------------------------------------------------------------------------------
# SSIM + L1 of images


@triton.jit
def ssim_l1_forward(x, y, out, counts, x_strides, y_strides, shares, BLOCK: tl.constexpr):
    """x, y [images, channels, rows, columns] of any strides -> out [images, rows, columns].

    counts: tiles of an image, channels, rows, columns; shares of SSIM and L1.
    """
    tiles, channels, rows, columns = counts
    image = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < rows * columns
    row, column = pixel // columns, pixel % columns
    x += image * x_strides[0]
    y += image * y_strides[0]
    layout = (rows, columns, x_strides[2], x_strides[3], y_strides[2], y_strides[3])
    unlike, cost = _compared(x, y, channels, x_strides[1], y_strides[1], row, column, layout, mask)
    error = (shares[0] * unlike + shares[1] * cost) / channels
    tl.store(out + image * rows * columns + pixel, error, mask)


@triton.jit
def ssim_l1_backward(grad, x, y, grad_x, counts, x_strides, y_strides, shares, BLOCK: tl.constexpr):
    """grad [images, rows, columns] -> grad_x [images, channels, rows, columns]."""
    tiles, channels, rows, columns = counts
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    image, channel = plane // channels, plane % channels
    pixel = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < rows * columns
    row, column = pixel // columns, pixel % columns
    x += image * x_strides[0] + channel * x_strides[1]
    y += image * y_strides[0] + channel * y_strides[1]
    grad += image * rows * columns
    layout = (rows, columns, x_strides[2], x_strides[3], y_strides[2], y_strides[3])
    difference, gathered = _gathered(x, y, grad, row, column, layout, mask)
    here = tl.load(grad + pixel, mask, other=0.0).to(tl.float32)
    slope = shares[0] * gathered + shares[1] * here * robust_slope(difference)
    tl.store(grad_x + plane * rows * columns + pixel, slope / channels, mask)


def _images(x: Tensor, y: Tensor) -> tuple[int, dict[str, object]]:
    """Tiles of all images [..., C, h, w] and what both kernels are told of these, which are copied
    where what is in the middle of [...] is expanded.
    """
    x, y = (image.reshape(math.prod(image.shape[:-3]), *image.shape[-3:]) for image in (x, y))
    images, *counts = x.shape
    tiles = triton.cdiv(counts[1] * counts[2], PIXELS)
    told = dict(x=x, y=y, counts=(tiles, *counts), x_strides=x.stride(), y_strides=y.stride())
    return images * tiles, told | dict(warps=WARPS, BLOCK=PIXELS)


@torch.library.custom_op("selfocc::ssim_l1", mutates_args=())
def _ssim_l1_op(x: Tensor, y: Tensor, ssim_share: float, l1_share: float) -> Tensor:
    out = x.new_empty(x.shape[:-3] + x.shape[-2:], dtype=torch.float32)
    tiles, told = _images(x, y)
    launch(ssim_l1_forward, (tiles,), out=out, shares=(ssim_share, l1_share), **told)
    return out


@_ssim_l1_op.register_fake
def _(x, y, ssim_share, l1_share):
    return x.new_empty(x.shape[:-3] + x.shape[-2:], dtype=torch.float32)


@torch.library.custom_op("selfocc::ssim_l1_gradient", mutates_args=())
def _ssim_l1_gradient_op(
    grad: Tensor, x: Tensor, y: Tensor, ssim_share: float, l1_share: float
) -> Tensor:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    tiles, told = _images(x, y)
    told |= dict(grad=grad.contiguous(), grad_x=grad_x, shares=(ssim_share, l1_share))
    launch(ssim_l1_backward, (tiles * x.shape[-3],), **told)
    return grad_x


@_ssim_l1_gradient_op.register_fake
def _(grad, x, y, ssim_share, l1_share):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _ssim_l1_setup(ctx, inputs, output):
    x, y, *ctx.shares = inputs
    ctx.save_for_backward(x, y)


def _ssim_l1_autograd(ctx, grad):
    x, y = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    by_x = _ssim_l1_gradient_op(grad, x, y, *ctx.shares) if wanted[0] else None
    by_y = _ssim_l1_gradient_op(grad, y, x, *ctx.shares) if wanted[1] else None  # symmetric
    return by_x, by_y, None, None


_ssim_l1_op.register_autograd(_ssim_l1_autograd, setup_context=_ssim_l1_setup)


def _weighted(x: Tensor, y: Tensor, ssim_share: float, l1_share: float) -> Tensor:
    """Means over channels: images [..., C, h, w] -> [..., h, w]."""
    if use_triton(x) and use_triton(y):
        return _ssim_l1_op(x, y, ssim_share, l1_share)
    x, y = at_least_float32(x), at_least_float32(y)
    l1 = l1_share * robust(x - y).mean(-3) if l1_share else 0.0
    return ssim_share * _ssim(x, y).mean(-3) + l1


# -----------------------------------------------------------------------------------------------


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural dissimilarity clamp((1 - SSIM) / 2, 0, 1), 3 x 3 windows, reflected borders.

    Args: x, y [..., C, h, w] in [0, 1], two pixels or more along each axis; any strides. Returns
    [..., C, h, w], differentiable in both (Monodepth2; C1 = 1e-4, C2 = 9e-4); half precision is
    read as float32, and so are results. Raises ValueError naming the argument at fault.
    """
    check(x=(x, "... C h>=2 w>=2"), y=(y, "... C h w"))
    return _weighted(x.unsqueeze(-3), y.unsqueeze(-3), 1.0, 0.0)


def ssim_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """0.85 SSIM + 0.15 L1, averaged over channels: images [..., C, h, w] -> error [..., h, w].

    Everything else as in `ssim`.
    """
    check(prediction=(prediction, "... C h>=2 w>=2"), target=(target, "... C h w"))
    return _weighted(prediction, target, SSIM_SHARE, L1_SHARE)


def least_photometric(
    color: Tensor,
    l1: Tensor,
    target: Tensor,
    rays: tuple[int, int],
    *,
    valid: Tensor | None = None,
    identity: Tensor | None = None,
    unseen: float = 1e3,
) -> Tensor:
    """Error [B, N, R] of the source that explains a ray best, in place of L1 of its colour.

    Rays lie on a grid, row by row, over which SSIM is taken. Differentiable in color and l1.

    Args:
        color: [B, K, N, R, 3] composited colours of K sources.
        l1: [B, K, N, R] what stands for their L1, from `epipolar_photometric`.
        target: [B, N, R, 3] true colours.
        rays: rows and columns of the grid, two or more; R = rows * columns.
        valid: [B, K, N, R] bool; where it is false, the error is `unseen`.
        identity: [B, any, N, R, 3] colours of sources at the target's own pixels: the error can
            also be that of standing still, and then teaches nothing.

    Raises ValueError naming the argument at fault.
    """
    check(
        color=(color, "B K>=1 N R 3"),
        l1=(l1, "B K N R"),
        target=(target, "B N R 3"),
        valid=(valid, "B K N R", torch.bool),
        identity=(identity, "B I N R 3"),
    )
    count = color.shape[3]
    if min(rays) < 2 or rays[0] * rays[1] != count:
        raise ValueError(f"rays must be rows and columns of {count} rays, 2 or more, got {rays}")

    def grid(x: Tensor) -> Tensor:  # [B, K, N, R, 3] -> [B, K, N, 3, rows, columns]
        return x.unflatten(-2, rays).movedim(-1, -3)

    goal = grid(target[:, None])
    unlike = _weighted(grid(color), goal.expand_as(grid(color)), SSIM_SHARE, 0.0)
    error = unlike.flatten(-2) + L1_SHARE * at_least_float32(l1)
    if valid is not None:
        error = torch.where(valid, error, unseen)
    if identity is not None:
        still = ssim_l1(grid(identity), goal.expand_as(grid(identity)))
        error = torch.cat([error, still.flatten(-2)], dim=1)
    return error.min(dim=1).values
