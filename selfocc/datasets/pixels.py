"""Pixels of a sample: crop, resize, photometric augmentation."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfocc import InputError


def one_size(images, intrinsics: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Images [h, w, 3] of N cameras, 0..255, brought to the least height and width among them, and
    their intrinsics [N, 3, 3] to match. x and y are scaled separately, as a pinhole camera allows.
    """
    sizes = np.array([image.shape[:2] for image in images])
    least = sizes.min(0)
    images = [
        image if (size == least).all() else _smaller(image, least.tolist())
        for image, size in zip(images, sizes, strict=True)
    ]
    return images, scaled(intrinsics, (least / sizes)[:, ::-1])


def _smaller(image: np.ndarray, size: list[int]) -> np.ndarray:
    pixels = torch.tensor(image).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)
    return pixels[0].permute(1, 2, 0).numpy()


def scaled(intrinsics: np.ndarray, scale) -> np.ndarray:
    """Intrinsics [N, 3, 3] of images that are resized by `scale`, one number or [N, 2] of x and y.

    Integer coordinates are pixel centres, so that a resize moves the origin by half a pixel.
    """
    intrinsics, scale = intrinsics.copy(), np.broadcast_to(scale, (len(intrinsics), 2))
    intrinsics[:, :2] *= scale[..., None]
    intrinsics[:, :2, 2] += (scale - 1) / 2
    return intrinsics


def cropped(images, crop: tuple[int, int], where: str) -> Tensor:
    """The top left of images [h, w, 3] of N cameras, float [N, 3, *crop]."""
    height, width = crop
    rows, cols = images[0].shape[:2]
    if rows < height or cols < width:
        raise InputError(
            f"{where} has {rows}x{cols} pixels, smaller than the crop {height}x{width}; choose a "
            "preset for this size or --set data.crop=H,W"
        )
    images = np.stack([image[:height, :width] for image in images])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float()


def resize(images: Tensor, scale: float) -> Tensor:
    """Bilinear resize of [N, 3, h, w] to int(size * scale), smoothed where it would alias."""
    if scale == 1:
        return images
    size = [int(n * scale) for n in images.shape[-2:]]
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=scale < 0.5)


def photometric_augmentation(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue, each with probability 1/2, unclipped.

    images [N, 3, h, w] RGB in 0..255. All cameras of a sample get the same change.
    """

    def chance():
        return rng.random() < 0.5

    if chance():
        images = images + rng.uniform(-32, 32)
    contrast_first = chance()
    contrast = rng.uniform(0.8, 1.2) if chance() else 1.0
    if contrast_first:
        images = images * contrast
    saturation = rng.uniform(0.8, 1.2) if chance() else 1.0
    hue = rng.uniform(-18, 18) if chance() else 0.0
    if saturation != 1 or hue != 0:
        images = _shift_hsv(images, hue, saturation)
    return images if contrast_first else images * contrast


def _shift_hsv(images: Tensor, hue: float, saturation: float) -> Tensor:
    value, _ = images.max(dim=1, keepdim=True)
    chroma = value - images.amin(dim=1, keepdim=True)
    r, g, b = images.split(1, dim=1)
    safe = chroma.clamp_min(1e-6)
    sector = torch.where(
        value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    )
    sector = (sector + hue / 60) % 6
    # a channel of HSV -> RGB falls off with the distance of the hue from its own sector
    offsets = torch.tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1)
    k = (offsets + sector) % 6
    fall = torch.minimum(k, 4 - k).clamp(0, 1)
    return value - torch.minimum(chroma * saturation, value.clamp_min(0)) * fall
