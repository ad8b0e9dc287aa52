"""From the pixels of a real camera to those of a pinhole, and to the size that a network reads.

A ray (x, y, 1) with r^2 = x^2 + y^2 meets the image plane of OpenCV's and COLMAP's lenses at

    brown     x' = x c + 2 p1 x y + p2 (r^2 + 2 x^2)      c = 1 + k1 r^2 + k2 r^4 + k3 r^6 + k4 r^8
              y' = y c + 2 p2 x y + p1 (r^2 + 2 y^2)
    fisheye   (x', y') = (x, y) a / r     a = t (1 + k1 t^2 + k2 t^4 + k3 t^6 + k4 t^8), t = atan r

(Brown 1966; Kannala and Brandt 2006), and pixel (fx x' + cx, fy y' + cy).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from selfocc.datasets.pixels import resized, scaled

WIDEST = 2.0  # tangent of the angle off the axis that a pinhole image still shows: 63 degrees


@dataclass(frozen=True)
class Lens:
    """A camera's calibration, for images of `size`. Integer coordinates are pixel centres."""

    size: tuple[int, int]  # height, width
    fx: float
    fy: float
    cx: float
    cy: float
    kind: Literal["pinhole", "brown", "fisheye"] = "pinhole"
    radial: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)  # k1 to k4
    tangential: tuple[float, float] = (0.0, 0.0)  # p1, p2

    @property
    def intrinsics(self) -> np.ndarray:
        """[3, 3] of a pinhole with this focal length."""
        return np.array([[self.fx, 0, self.cx], [0, self.fy, self.cy], [0, 0, 1.0]])

    def project(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels (u, v) of rays (x, y, 1)."""
        r = np.hypot(x, y)
        bent, (p1, p2) = self._bent(r), self.tangential
        share = np.divide(bent, r, out=np.ones_like(r), where=r > 0)
        if self.kind == "brown":
            x, y = (
                x * share + 2 * p1 * x * y + p2 * (r * r + 2 * x * x),
                y * share + 2 * p2 * x * y + p1 * (r * r + 2 * y * y),
            )
        else:
            x, y = x * share, y * share
        return self.fx * x + self.cx, self.fy * y + self.cy

    def _bent(self, r: np.ndarray) -> np.ndarray:
        """How far from the centre a ray ends that a pinhole would show at `r`."""
        if self.kind == "pinhole":
            return r
        t = np.arctan(r) if self.kind == "fisheye" else r
        return t * (1 + sum(k * t ** (2 * n) for n, k in enumerate(self.radial, 1)))

    @lru_cache(64)  # noqa: B019 - a lens is a constant, and few are in use
    def pinhole(self) -> np.ndarray:
        """Intrinsics [3, 3] of the widest pinhole image of the same size that the lens fills."""
        height, width = self.size
        v, u = (np.linspace(0, n - 1, 64) for n in self.size)
        ends = np.zeros(64)
        u = np.concatenate([u, u, ends, ends + width - 1])
        v = np.concatenate([ends, ends + height - 1, v, v])
        x, y = (u - self.cx) / self.fx, (v - self.cy) / self.fy

        def filled(zoom: float) -> bool:
            farthest = np.hypot(x, y).max() / zoom
            rising = np.diff(self._bent(np.linspace(0, farthest, 256))) > 0  # else it folds over
            u, v = self.project(x / zoom, y / zoom)
            inside = (u >= 0) & (u <= width - 1) & (v >= 0) & (v <= height - 1)
            return farthest <= WIDEST and rising.all() and inside.all()

        low, high = 0.05, 20.0
        for _ in range(40):
            middle = (low * high) ** 0.5
            low, high = (low, middle) if filled(middle) else (middle, high)
        return self.intrinsics * np.array([[high, 1, 1], [1, high, 1], [1, 1, 1]])

    def undistorted(self, image: np.ndarray, nearest: bool = False) -> np.ndarray:
        """An image [h, w, C] or map [h, w] of this camera as `pinhole` has it, same type."""
        if self.kind == "pinhole":
            return image
        mode = "nearest" if nearest else "bilinear"
        pixels = torch.from_numpy(np.atleast_3d(image).transpose(2, 0, 1).astype(np.float32))
        grid = _sources(self)
        out = F.grid_sample(pixels[None], grid, mode, "border", align_corners=True)[0]
        out = out.permute(1, 2, 0).reshape(image.shape).numpy()
        return np.rint(out).astype(image.dtype) if image.dtype.kind == "u" else out


@lru_cache(16)
def _sources(lens: Lens) -> torch.Tensor:
    """Where the pixels of the pinhole image are in the lens's, [1, h, w, 2], -1 to 1."""
    (height, width), k = lens.size, lens.pinhole()
    v, u = np.mgrid[:height, :width].astype(np.float64)
    u, v = lens.project((u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1])
    grid = np.stack([2 * u / (width - 1) - 1, 2 * v / (height - 1) - 1], -1)
    return torch.from_numpy(grid.astype(np.float32))[None]


def horizon_row(intrinsics: np.ndarray, camera_to_volume: np.ndarray) -> float:
    """The row at which a camera sees what is level with it, in the column of its axis.

    z of the volume is up. Far away from any image where the camera looks up or down.
    """
    up = camera_to_volume[2, :3]  # in the camera
    return float(
        intrinsics[1, 2] - intrinsics[1, 1] * up[2] / np.copysign(max(abs(up[1]), 1e-6), up[1])
    )


def fitted(
    image: np.ndarray, intrinsics: np.ndarray, size: tuple[int, int], horizon: float
) -> tuple[np.ndarray, np.ndarray]:
    """The part of an image that a network of images of `size` (h, w) reads, and its intrinsics.

    uint8 [h, w, 3] is resized, x and y alike, so that it just covers the size, and cut: centred
    left and right, and so that the row `horizon` comes to the middle as far as the image reaches.
    Maps [h, w] take the nearest pixel. What has the size is returned as it is.
    """
    rows, cols, top, left = _window(image.shape[:2], size, horizon)
    if (rows, cols) != image.shape[:2]:
        ratio = np.array([cols / image.shape[1], rows / image.shape[0]])
        intrinsics = scaled(intrinsics[None], ratio)[0]
        image = resized(image, [rows, cols]) if image.ndim == 3 else _nearest(image, rows, cols)
    intrinsics = intrinsics - np.array([[0, 0, left], [0, 0, top], [0, 0, 0]])
    return image[top : top + size[0], left : left + size[1]], intrinsics


def _window(shape, size, horizon: float) -> tuple[int, int, int, int]:
    """Rows and columns after the resize, and where the cut begins."""
    scale = max(size[0] / shape[0], size[1] / shape[1])
    rows, cols = (max(round(n * scale), m) for n, m in zip(shape, size, strict=True))
    middle = (horizon + 0.5) * rows / shape[0] - size[0] / 2
    return rows, cols, round(min(max(middle, 0), rows - size[0])), (cols - size[1]) // 2


def _nearest(map_: np.ndarray, rows: int, cols: int) -> np.ndarray:
    at = (
        ((np.arange(n) + 0.5) * old / n).astype(int)
        for n, old in zip((rows, cols), map_.shape, strict=True)
    )
    return map_[np.ix_(*at)]
