"""Pixels of a sample: crop, resize, photometric augmentation, and what the network reads."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfocc import InputError
from selfocc.config import DataConfig

CACHED = 1 << 15  # pixels that are augmented at once, so that they stay in the cache


def one_size(images, intrinsics: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Images uint8 [h, w, 3] of N cameras brought to the least height and width among them, and
    their intrinsics [N, 3, 3] to match. x and y are scaled separately, as a pinhole camera allows.
    """
    sizes = np.array([image.shape[:2] for image in images])
    least = sizes.min(0)
    images = [
        image if (size == least).all() else resized(image, least.tolist())
        for image, size in zip(images, sizes, strict=True)
    ]
    return images, scaled(intrinsics, (least / sizes)[:, ::-1])


def resized(image: np.ndarray, size: list[int]) -> np.ndarray:
    """uint8 [h, w, 3] at another size (h, w): bilinear, smoothed where it would alias."""
    pixels = torch.tensor(image).permute(2, 0, 1)[None]
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


def cropped(images, crop: tuple[int, int], where: str) -> list[np.ndarray]:
    """The top left [*crop, 3] of images [h, w, 3] of one size, not copied."""
    height, width = crop
    rows, cols = images[0].shape[:2]
    if rows < height or cols < width:
        raise InputError(
            f"{where} has {rows}x{cols} pixels, smaller than the crop {height}x{width}; choose a "
            "preset for this size or --set data.crop=H,W"
        )
    return [image[:height, :width] for image in images]


def planar(images: list[np.ndarray]) -> Tensor:
    """uint8 [N, 3, h, w] of N images uint8 [h, w, 3] of one size."""
    planes = np.empty((len(images), 3, *images[0].shape[:2]), np.uint8)
    for image, plane in zip(images, planes, strict=True):
        plane[:] = image.transpose(2, 0, 1)
    return torch.from_numpy(planes)


def resize(images: Tensor, scale: float) -> Tensor:
    """Bytes [N, 3, h, w] as floats [N, 3, int(h * scale), int(w * scale)], 0..255: bilinear,
    smoothed where it would alias."""
    if scale == 1:
        return images.float()
    return torch.stack([_shrunk(image, scale) for image in images])  # each stays in the cache


def _shrunk(image: Tensor, scale: float) -> Tensor:
    _, height, width = image.shape
    if scale == 0.5 and height % 2 == width % 2 == 0:  # bilinear too, but three times as fast
        rows = image[:, ::2].short() + image[:, 1::2]
        return (rows[..., ::2] + rows[..., 1::2]) / 4
    size = int(height * scale), int(width * scale)
    options = dict(mode="bilinear", align_corners=False, antialias=scale < 0.5)
    return F.interpolate(image[None].float(), size, **options)[0]


def for_network(
    images, intrinsics: np.ndarray, config: DataConfig, where: str, rng=None
) -> tuple[Tensor, np.ndarray]:
    """Images uint8 [h, w, 3] of one size as the network reads them, float32 [N, 3, *config.pad],
    and the intrinsics [N, 3, 3] that it takes for theirs.

    A random generator augments them where that is wanted. Raises InputError, which names `where`
    the images are from, if they are smaller than the crop.
    """
    images = resize(planar(cropped(images, config.crop, where)), config.scale)
    height, width = images.shape[-2:]
    if height > config.pad[0] or width > config.pad[1]:
        raise InputError(
            f"data.pad {config.pad} is smaller than the network's image, {height, width}; "
            "--set data.pad=H,W"
        )
    if rng is not None and config.augment:
        # Published: before the resize. Only hue and saturation differ, where pixels that make
        # one have other orders of R, G, B: on average by 0.003 of 255 (nuscenes), 0.16
        # (kitti_raw), where these are drawn.
        augment(images, rng)
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.mean, config.std))
    padded = images.new_zeros(*images.shape[:2], *config.pad)
    torch.addcmul(-mean / std, images, 1 / std, out=padded[..., :height, :width])
    intrinsics = intrinsics.copy()
    intrinsics[:, :2] *= config.scale
    return padded, intrinsics


def augment(images: Tensor, rng: np.random.Generator) -> None:
    """Brightness, contrast, saturation and hue, each with probability 1/2, unclipped and in place.

    images float [N, 3, h, w] RGB in 0..255. All cameras of a sample get the same change.
    """

    def draw(low: float, high: float, neutral: float) -> float:
        return rng.uniform(low, high) if rng.random() < 0.5 else neutral

    brightness = draw(-32, 32, 0.0)
    rng.random()  # published: contrast before or after HSV, which is the same
    contrast, saturation, hue = draw(0.8, 1.2, 1.0), draw(0.8, 1.2, 1.0), draw(-18, 18, 0.0)
    for image in images.view(*images.shape[:2], -1):
        for pixels in image.split(CACHED, dim=1):
            pixels.add_(brightness).mul_(contrast)
            if saturation != 1 or hue != 0:
                _shift_hsv(pixels, hue, saturation)


def _shift_hsv(pixels: Tensor, hue: float, saturation: float) -> None:
    """Turn the hue of RGB [3, P] by at most 30 degrees and scale its saturation, in place.

    This is linear in colours of one order of R, G, B and one hue to within a turn, so that it makes
    next to no difference whether it comes before a resize or after it.
    """
    value, least = pixels.amax(0), pixels.amin(0)
    half = (value - least) / 2
    channels = pixels - (value + least) / 2  # in -half..half
    # As the hue turns, a channel crosses to the other end while its neighbour rests at the end that
    # it leaves. `beyond` is the part of the turn for which the neighbour rests, signed by its end;
    # a channel that has crossed already stays.
    reach = half * (1 - abs(hue) / 30)
    beyond = channels - channels.clamp(-reach, reach)
    channels = (channels - beyond.roll(-1 if hue > 0 else 1, 0)).clamp(-half, half)
    share = (value.clamp_min(0) / (2 * half).clamp_min(1e-6)).clamp_max(saturation)
    torch.addcmul(value, channels - half, share, out=pixels)
