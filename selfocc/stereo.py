"""Depth from a rectified stereo pair by block matching: truth where there is no LiDAR.

Census transform (Zabih & Woodfill 1994), Hamming distance summed over two window shapes, winner
takes all, then every test that costs coverage and buys certainty: left-right agreement, a unique
minimum, texture, and agreement with the neighbours. What fails one of them is 0, so that a judge
of depth can trust what is left.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Odd (rows, columns) over which the cost is averaged; the better one counts at each pixel. The flat
# window suits the road, whose disparity changes with every row, the upright one poles and walls.
WINDOWS = ((5, 17), (11, 9))
UNIQUENESS = 0.12  # by how much, relative, the second-best disparity must be worse than the best
TEXTURE = 1.5  # least mean horizontal gradient in a window of 5 x 5, grey levels a pixel
SUPPORT = 0.5  # least share of a window of 9 x 9 that is certain too and of the same surface


def stereo_depth(
    pair: tuple[np.ndarray, np.ndarray, float, float], nearest: float = 4.0
) -> np.ndarray:
    """z-depth of the left image, float32 [h, w] metres, 0 where it is not certain.

    pair: left and right uint8 [h, w, 3], focal length in pixels, baseline in metres. Nothing nearer
        than `nearest` metres is searched for.
    """
    left, right, focal, baseline = pair
    search = int(focal * baseline / nearest) + 1
    disparity = block_matching(_grey(left), _grey(right), search).numpy()
    return np.divide(focal * baseline, disparity, out=np.zeros_like(disparity), where=disparity > 0)


def _grey(image: np.ndarray) -> Tensor:
    return torch.tensor(image).float() @ torch.tensor([0.299, 0.587, 0.114])


def block_matching(left: Tensor, right: Tensor, max_disparity: int) -> Tensor:
    """Disparity of the left image, float32 [h, w] pixels, 0 where it is not certain.

    left, right: float [h, w] grey in 0..255. Disparities 1..max_disparity are searched.
    """
    cost, cost_right = _matching_cost(left, right, max_disparity)
    best, index = cost.min(dim=0)
    disparity = _subpixel(cost, best, index)

    valid = (index > 0) & (index < max_disparity)
    valid &= _agrees_with_right(index, cost_right)
    valid &= _second_best(cost, index) > best * (1 + UNIQUENESS)
    gradient = F.pad((left[:, 2:] - left[:, :-2]).abs() / 2, (1, 1))
    valid &= _box(gradient, (5, 5)) > TEXTURE
    disparity = disparity * valid
    return disparity * (_support(disparity) >= SUPPORT)


def _census(image: Tensor) -> Tensor:
    """Which of the 24 neighbours in 5 x 5 are darker than the centre, a bit each; int32 [h, w]."""
    h, w = image.shape
    padded = F.pad(image[None, None], (2, 2, 2, 2), mode="replicate")[0, 0]
    code = torch.zeros(h, w, dtype=torch.int32)
    for k in (k for k in range(25) if k != 12):
        code = (code << 1) | (padded[k // 5 : k // 5 + h, k % 5 : k % 5 + w] < image)
    return code


def _box(image: Tensor, window: tuple[int, int]) -> Tensor:
    """Mean over an odd window (rows, columns), borders replicated; [h, w]."""
    rows, cols = window
    pad = (cols // 2, cols // 2, rows // 2, rows // 2)
    total = F.pad(image[None, None], pad, mode="replicate")[0, 0]
    for axis, length in enumerate(window):
        # running sums: independent of the window's size, unlike pooling, and exact for counts
        running = total.cumsum(axis)
        rest = running.shape[axis] - length
        total = running.narrow(axis, length - 1, rest + 1).clone()
        total.narrow(axis, 1, rest).sub_(running.narrow(axis, 0, rest))
    return total / (rows * cols)


def _matching_cost(left: Tensor, right: Tensor, max_disparity: int) -> tuple[Tensor, Tensor]:
    """Mean Hamming distances [max_disparity + 1, h, w]; the right image's best disparity [h, w]."""
    left, right = _census(left).numpy(), _census(right).numpy()
    h, w = left.shape
    outside = 24.0  # no bit agrees
    cost = torch.full((max_disparity + 1, h, w), outside)
    best_right = torch.full((h, w), outside)
    index_right = torch.zeros(h, w, dtype=torch.long)
    for d in range(min(max_disparity + 1, w - max(cols for _, cols in WINDOWS))):
        bits = torch.from_numpy(np.bitwise_count(left[:, d:] ^ right[:, : w - d])).float()
        value = torch.stack([_box(bits, window) for window in WINDOWS]).amin(dim=0)
        cost[d, :, d:] = value
        better = value < best_right[:, : w - d]
        best_right[:, : w - d] = torch.where(better, value, best_right[:, : w - d])
        index_right[:, : w - d].masked_fill_(better, d)
    return cost, index_right


def _subpixel(cost: Tensor, best: Tensor, index: Tensor) -> Tensor:
    """The vertex of the parabola through the best disparity and its two neighbours."""
    inner = index.clamp(1, len(cost) - 2)
    before, after = (cost.gather(0, (inner + step)[None])[0] for step in (-1, 1))
    curvature = (before + after - 2 * best).clamp_min(1e-6)
    return index + ((before - after) / (2 * curvature)).clamp(-0.5, 0.5)


def _agrees_with_right(index: Tensor, index_right: Tensor) -> Tensor:
    column = torch.arange(index.shape[1]) - index
    back = index_right.gather(1, column.clamp_min(0))
    return (column >= 0) & ((back - index).abs() <= 1)


def _second_best(cost: Tensor, index: Tensor) -> Tensor:
    """The least cost more than one pixel away from the best."""
    near = (torch.arange(-1, 2)[:, None, None] + index).clamp(0, len(cost) - 1)
    return cost.scatter(0, near, torch.inf).amin(dim=0)


def _support(disparity: Tensor, radius: int = 4, slope: float = 0.4) -> Tensor:
    """Share of the window around a pixel that is within 1 + slope * (rows apart) of its
    disparity."""
    h, w = disparity.shape
    padded = F.pad(disparity, (radius,) * 4)
    agreeing = torch.zeros(h, w)
    for row in range(2 * radius + 1):
        for col in range(2 * radius + 1):
            other = padded[row : row + h, col : col + w]
            tolerance = 1 + slope * abs(row - radius)
            agreeing += (other > 0) & ((other - disparity).abs() <= tolerance)
    return agreeing / (2 * radius + 1) ** 2
