"""Photometric error: SSIM + L1, and the error of all depth proposals of a ray (spec section 11).

For source k and a ray through pixel (u, v) with proposals t_s (z-depth) of weight w_s:

    (x, y)_s = projection of (u t_s, v t_s, t_s, 1)
    valid_s  = in front of the source and inside its image
    c_s      = source colour at (x, y)_s, bilinear
    w^_s     = w_s valid_s / max(sum w valid, eps)
    l1       = sum_s w^_s mean_channels |target - c_s|    (not the difference of the expectation)
    color    = sum_s w^_s c_s

The combined form first averages differences and colours of a proposal over the sources that see it.
Only the weights are differentiable, so colours and differences are constants and what autograd sees
is one product of weights with them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1 << 20  # proposals whose corners are looked up at once


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural dissimilarity clamp((1 - SSIM) / 2, 0, 1), 3 x 3 windows, reflected borders.

    Args: x, y [..., C, h, w] in [0, 1]. Returns [..., C, h, w] (Monodepth2; C1 = 1e-4, C2 = 9e-4).
    """
    stack = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, -4)
    means = F.avg_pool2d(F.pad(stack, (1, 1, 1, 1), mode="reflect"), 3, 1)
    mean_x, mean_y, square_x, square_y, product = means.unflatten(0, (5, *x.shape[:-3])).unbind(0)
    variances = (square_x - mean_x.square()) + (square_y - mean_y.square())
    covariance = product - mean_x * mean_y
    numerator = (2 * mean_x * mean_y + 1e-4) * (2 * covariance + 9e-4)
    denominator = (mean_x.square() + mean_y.square() + 1e-4) * (variances + 9e-4)
    return ((1 - numerator / denominator) / 2).clamp(0, 1)


def ssim_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """0.85 SSIM + 0.15 L1, averaged over channels: images [..., 3, h, w] -> error [..., h, w]."""
    return 0.85 * ssim(prediction, target).mean(-3) + 0.15 * (prediction - target).abs().mean(-3)


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
    """See `kernels.epipolar_photometric`."""
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
        error = (target[:, None, :, part, None] - color[..., :3]).abs_()
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
