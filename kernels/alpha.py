"""Opacity of a sample: the place to try another one.

    alpha(sdf, cosine, delta, inv_s, knobs) in [0, 1]

from the SDF in metres (channel 0 of the volume), the cosine e . gradient, the length of the
interval in metres, the sharpness inv_s in 1/metre, and the numbers in `Knobs`. Each stands here
three times: in PyTorch, which is its meaning, in Triton, and its derivatives in Triton, with
respect to SDF, cosine and inv_s. A new one is named in `ALPHAS`. A new knob is a field of `Knobs`,
and thereby an argument of `render_rays` and `render_photometric`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import tl, triton


class Knobs(NamedTuple):
    """Numbers that alphas take besides, each by its name."""

    anneal: float = 1.0  # share of the full cosine in NeuS alpha, 0 to 1


# -----------------------------------------------------------------------------------------------
# NeuS


def neus_alpha(sdf: Tensor, cosine: Tensor, delta: Tensor, inv_s: Tensor, knobs: Knobs) -> Tensor:
    """NeuS opacity (Wang et al. 2021, eq. 13), its cosine annealed as in their code."""
    slope = F.relu(-cosine)
    if knobs.anneal < 1.0:
        slope = F.relu(0.5 - 0.5 * cosine) * (1 - knobs.anneal) + slope * knobs.anneal
    half = slope * (0.5 * delta)
    before = torch.sigmoid((sdf + half) * inv_s)
    after = torch.sigmoid((sdf - half) * inv_s)
    return ((before - after + 1e-5) / (before + 1e-5)).clamp(0.0, 1.0)


@triton.jit
def _annealed(cosine, anneal):
    return tl.maximum(0.5 - 0.5 * cosine, 0.0) * (1 - anneal) + tl.maximum(-cosine, 0.0) * anneal


@triton.jit
def neus(sdf, cosine, delta, inv_s, knobs):
    half = _annealed(cosine, knobs.anneal) * (0.5 * delta)
    before = tl.sigmoid((sdf + half) * inv_s)
    # before - after, with the digits that the difference would lose where both are almost one
    fall = before * tl.sigmoid((half - sdf) * inv_s) * opacity(2 * half * inv_s)
    alpha = (fall + 1e-5) / (before + 1e-5)
    return tl.where(alpha < 0, 0.0, tl.where(alpha > 1, 1.0, alpha))  # NaN stays


@triton.jit
def neus_slopes(sdf, cosine, delta, inv_s, knobs):
    half = _annealed(cosine, knobs.anneal) * (0.5 * delta)
    before, after = tl.sigmoid((sdf + half) * inv_s), tl.sigmoid((sdf - half) * inv_s)
    scale = 1 / (before + 1e-5)
    # derivatives of alpha with respect to the arguments of both sigmoids
    by_before = after * scale * scale * before * (1 - before)
    by_after = -scale * after * (1 - after)
    by_half = (by_before - by_after) * inv_s
    by_slope = by_half * (0.5 * delta)
    turn = tl.where(cosine < 1, -0.5 * (1 - knobs.anneal), 0.0)
    turn -= tl.where(cosine < 0, knobs.anneal, 0.0)
    by_inv_s = by_before * (sdf + half) + by_after * (sdf - half)
    return (by_before + by_after) * inv_s, by_slope * turn, by_inv_s


# -----------------------------------------------------------------------------------------------
# VolSDF


def volsdf_alpha(sdf: Tensor, cosine: Tensor, delta: Tensor, inv_s: Tensor, knobs: Knobs) -> Tensor:
    """Opacity of density inv_s * CDF(-sdf), Laplace of scale 1 / inv_s (VolSDF 2021, eq. 2)."""
    tail = 0.5 * torch.exp(-sdf.abs() * inv_s)
    return -torch.expm1(-delta * inv_s * torch.where(sdf > 0, tail, 1 - tail))


@triton.jit
def volsdf(sdf, cosine, delta, inv_s, knobs):
    tail = 0.5 * tl.exp(-tl.abs(sdf) * inv_s)
    return opacity(delta * inv_s * tl.where(sdf > 0, tail, 1 - tail))


@triton.jit
def volsdf_slopes(sdf, cosine, delta, inv_s, knobs):
    tail = 0.5 * tl.exp(-tl.abs(sdf) * inv_s)
    share = tl.where(sdf > 0, tail, 1 - tail)
    by_depth = delta * tl.exp(-delta * inv_s * share)
    by_inv_s = by_depth * (share - inv_s * sdf * tail)
    return -by_depth * inv_s * inv_s * tail, tl.zeros_like(sdf), by_inv_s


# -----------------------------------------------------------------------------------------------
# Density


def density_alpha(
    sdf: Tensor, cosine: Tensor, delta: Tensor, inv_s: Tensor, knobs: Knobs
) -> Tensor:
    """Opacity of density softplus(-channel 0), 1/metre: the paper's ablation without SDF."""
    return -torch.expm1(-delta * F.softplus(-sdf))


@triton.jit
def density(sdf, cosine, delta, inv_s, knobs):
    return opacity(delta * softplus(-sdf))


@triton.jit
def density_slopes(sdf, cosine, delta, inv_s, knobs):
    zero = tl.zeros_like(sdf)
    return -delta * tl.sigmoid(-sdf) * tl.exp(-delta * softplus(-sdf)), zero, zero


@triton.jit
def softplus(x):
    return tl.where(x < 0, 0.0, x) + one_plus_log(tl.exp(-tl.abs(x)))


@triton.jit
def one_plus_log(x):
    """log(1 + x) for x in [0, 1], with the digits of a small x."""
    rounded = 1 + x
    return tl.where(rounded == 1, x, tl.log(rounded) * x / (rounded - 1))


@triton.jit
def opacity(depth):
    """1 - exp(-depth) of an optical depth >= 0, with the digits of a small one."""
    series = depth * (1 - depth / 2 * (1 - depth / 3 * (1 - depth / 4 * (1 - depth / 5))))
    return tl.where(depth < 0.1, series, 1 - tl.exp(-depth))


# -----------------------------------------------------------------------------------------------
# Chosen by name


class Alpha(NamedTuple):
    reference: Callable[..., Tensor]
    value: Callable  # in Triton
    slopes: Callable  # in Triton: derivatives with respect to sdf, cosine and inv_s


ALPHAS = {
    "neus": Alpha(neus_alpha, neus, neus_slopes),
    "volsdf": Alpha(volsdf_alpha, volsdf, volsdf_slopes),
    "density": Alpha(density_alpha, density, density_slopes),
}
