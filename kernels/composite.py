"""Front-to-back compositing of given opacities: where ablations start.

    T_i = prod_{j<i} (1 - alpha_j + 1e-4)
    w_i = alpha_i T_i,  left = T behind the last,  sums = sum_i w_i value_i

The epsilon, a published value, keeps T positive. Backward, with g_i = d loss / d w_i:

    d loss / d alpha_i = T_i g_i - (sum_{j>i} w_j g_j + left g_left) / (1 - alpha_i + 1e-4)

The Triton kernels give a row to a warp, one sample a lane. Forward leaves T at the first sample of
every tile; backward walks from the last tile to the first and computes the others again.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.checks import at_least_float32, check
from kernels.dispatch import launch, tl, triton, use_triton
from kernels.ray import LANES, alpha_gradient, transmittance

EPSILON = 1e-4
# Channels of the values at once. Compiled for cuda 90: 43 to 72 registers forward, 72 to 96
# backward, where 32 channels spill.
FORWARD, BACKWARD = 32, 8
WARPS = 1


class Weights(torch.autograd.Function):
    """alpha [..., S] -> weights [..., S] and the transmittance left [...]: the reference."""

    @staticmethod
    def forward(ctx, alpha):
        through = torch.cumprod((1 - alpha).add_(EPSILON), dim=-1)
        weights = alpha.clone()
        weights[..., 1:] *= through[..., :-1]
        ctx.save_for_backward(alpha, through, weights)
        return weights, through[..., -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_left):
        alpha, through, weights = ctx.saved_tensors
        # d w_j / d alpha_i = -w_j / (1 - alpha_i + eps) for j > i: sum over what lies behind i
        behind = (weights * grad).flip(-1).cumsum(-1).flip(-1)
        behind = torch.cat([behind[..., 1:], torch.zeros_like(behind[..., :1])], dim=-1)
        behind += (through[..., -1] * grad_left)[..., None]
        result = grad.clone()
        result[..., 1:] *= through[..., :-1]
        return result.addcdiv_(behind, (1 - alpha).add_(EPSILON), value=-1)


# -----------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def composite_forward(
    alpha,
    values,
    weights,
    left,
    sums,
    light,
    samples,
    width,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """alpha [rows, samples], values [rows, samples, width] -> weights as alpha, left [rows], sums
    [rows, width], light [rows, blocks]. Program (i, 0) writes what all channels share.
    """
    row = tl.program_id(0) + tl.zeros([1, 1], tl.int64)
    # a block, since Triton 3.9's interpreter joins no scalar with the mask
    first = tl.program_id(1) + tl.zeros([1, 1], tl.int32) == 0
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, None, :]
    entering = tl.full([1, 1], 1.0, tl.float32)
    total = tl.zeros([1, CHANNELS], tl.float32)
    for start in range(0, samples, BLOCK):
        sample = start + tl.arange(0, BLOCK)[None, :]
        inside = sample < samples
        at = row * samples + sample
        opacity = tl.load(alpha + at, inside, other=0.0).to(tl.float32)
        block = row * tl.cdiv(samples, BLOCK) + start // BLOCK
        tl.store(light + block, entering, first)
        reaches, entering = transmittance(opacity, inside, entering, BLOCK)
        weight = opacity * reaches
        tl.store(weights + at, weight, inside & first)
        seen = inside[:, :, None] & (channel < width)
        value = tl.load(values + (at[:, :, None] * width + channel), seen, other=0.0)
        total += tl.sum(weight[:, :, None] * value.to(tl.float32), 1)
    tl.store(left + row, entering, first)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    tl.store(sums + row * width + channel, total, channel < width)


@triton.jit
def composite_backward(
    grad_weights,
    grad_left,
    grad_sums,
    alpha,
    values,
    left,
    light,
    grad_alpha,
    grad_values,
    samples,
    width,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradients of weights, left and sums -> those of alpha and values; shapes as in forward."""
    row = tl.program_id(0) + tl.zeros([1, 1], tl.int64)
    later = tl.load(grad_left + row).to(tl.float32)
    later *= tl.load(left + row)
    blocks = tl.cdiv(samples, BLOCK)
    for done in range(blocks):
        block = blocks - 1 - done
        sample = block * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = sample < samples
        at = row * samples + sample
        opacity = tl.load(alpha + at, inside, other=0.0).to(tl.float32)
        entering = tl.load(light + row * blocks + block)
        reaches, _ = transmittance(opacity, inside, entering, BLOCK)
        weight = opacity * reaches
        grad = tl.load(grad_weights + at, inside, other=0.0).to(tl.float32)
        for start in range(0, width, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)[None, None, :]
            at_sum = grad_sums + (row[:, :, None] * width + channel)
            by_sum = tl.load(at_sum, channel < width, other=0.0)
            by_sum = by_sum.to(tl.float32)
            seen = inside[:, :, None] & (channel < width)
            place = at[:, :, None] * width + channel
            value = tl.load(values + place, seen, other=0.0).to(tl.float32)
            grad += tl.sum(value * by_sum, 2)
            tl.store(grad_values + place, weight[:, :, None] * by_sum, seen)
        grad, later = alpha_gradient(opacity, reaches, weight, grad, inside, later, BLOCK)
        tl.store(grad_alpha + at, grad, inside)


def _tile(values: Tensor, most: int) -> dict[str, int]:
    channels = min(most, triton.next_power_of_2(max(1, values.shape[-1])))
    return dict(BLOCK=LANES, CHANNELS=channels)


def _results(alpha: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weights, left, sums and light, not yet filled."""
    rows, samples, width = values.shape
    weights = alpha.new_empty(rows, samples, dtype=torch.float32)
    left, light = weights.new_empty(rows), weights.new_empty(rows, -(-samples // LANES))
    return weights, left, weights.new_empty(rows, width), light


@torch.library.custom_op("selfocc::composite", mutates_args=())
def _composite_op(alpha: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, samples, width = values.shape
    tile = _tile(values, FORWARD)
    weights, left, sums, light = _results(alpha, values)
    launch(
        composite_forward,
        (rows, max(1, triton.cdiv(width, tile["CHANNELS"]))),
        alpha=alpha.contiguous(),
        values=values.contiguous(),
        weights=weights,
        left=left,
        sums=sums,
        light=light,
        samples=samples,
        width=width,
        warps=WARPS,
        **tile,
    )
    return weights, left, sums, light


@torch.library.custom_op("selfocc::composite_gradient", mutates_args=())
def _composite_gradient_op(
    grad_weights: Tensor,
    grad_left: Tensor,
    grad_sums: Tensor,
    alpha: Tensor,
    values: Tensor,
    left: Tensor,
    light: Tensor,
) -> tuple[Tensor, Tensor]:
    rows, samples, width = values.shape
    tile = _tile(values, BACKWARD)
    grad_alpha = alpha.new_empty(alpha.shape, dtype=torch.float32)
    grad_values = alpha.new_empty(values.shape, dtype=torch.float32)
    launch(
        composite_backward,
        (rows,),
        grad_weights=grad_weights.contiguous(),
        grad_left=grad_left.contiguous(),
        grad_sums=grad_sums.contiguous(),
        alpha=alpha.contiguous(),
        values=values.contiguous(),
        left=left,
        light=light,
        grad_alpha=grad_alpha,
        grad_values=grad_values,
        samples=samples,
        width=width,
        warps=WARPS,
        **tile,
    )
    return grad_alpha, grad_values


_composite_op.register_fake(_results)


@_composite_gradient_op.register_fake
def _(grad_weights, grad_left, grad_sums, alpha, values, left, light):
    grad_alpha = alpha.new_empty(alpha.shape, dtype=torch.float32)
    return grad_alpha, alpha.new_empty(values.shape, dtype=torch.float32)


def _composite_setup(ctx, inputs, output):
    _, left, _, light = output
    ctx.mark_non_differentiable(light)
    ctx.save_for_backward(*inputs, left, light)


def _composite_autograd(ctx, grad_weights, grad_left, grad_sums, _):
    alpha, values, left, light = ctx.saved_tensors
    by_alpha, by_values = _composite_gradient_op(
        grad_weights, grad_left, grad_sums, alpha, values, left, light
    )
    return by_alpha.to(alpha.dtype), by_values.to(values.dtype)


_composite_op.register_autograd(_composite_autograd, setup_context=_composite_setup)


# -----------------------------------------------------------------------------------------------


def composite(alpha: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Front-to-back compositing (Wang et al. 2021, eq. 11). Half precision is read as float32.

    Args: alpha [..., S] opacities in [0, 1], one S or more; values [..., S, K].
    Returns weights [..., S]; transmittance [...] behind the last sample; sums [..., K].
    Raises ValueError naming the argument at fault.
    """
    check(alpha=(alpha, "... S>=1"), values=(values, "... S K"))
    if use_triton(alpha) and use_triton(values):
        rows = math.prod(alpha.shape[:-1])
        flat = alpha.reshape(rows, alpha.shape[-1]), values.reshape(rows, *values.shape[-2:])
        weights, left, sums, _ = _composite_op(*flat)
        shape = alpha.shape[:-1]
        return weights.view(alpha.shape), left.view(shape), sums.view(*shape, sums.shape[-1])
    weights, left = Weights.apply(at_least_float32(alpha))
    return weights, left, (weights[..., None, :] @ at_least_float32(values))[..., 0, :]
