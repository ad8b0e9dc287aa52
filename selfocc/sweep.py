"""A plane sweep: depth of a target from its sources alone, and how sure it is (Collins 1996).

It teaches the lift (`loss.weight_sweep`), in the first steps of a training alone, before there is a
volume (`optim.sweep_steps`). It reads what the photometric loss reads, images and poses, and tries
the same proposals; but each pixel chooses its own, once, so that such a step costs what the
backbone costs.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from selfocc.batch import Batch, Frames
from selfocc.geometry import constant, fixed_pixels, image_to_image, inverse, pixel_rays

PLANES = 28  # depths that are tried, evenly in the logarithm
SHRINK = 2  # the sweep's pixels are of so many pixels of the images
WINDOW = 5  # pixels of the sweep, each way, that are compared
FLAT = 1e-4  # variance of grey values below which a window has no texture
OUTSIDE = 2.0  # cost of a plane that no source sees
SURE = 0.1  # by how much the second best depth must be worse, for full weight
UNSURE = 0.1  # weight below which what looks up may be the sky
SKY = 0.5  # weight of the sky
BEYOND = 2.0  # times the farthest depth, where it is


@torch.no_grad()
def sweep(
    target: Frames, sources: Frames, nearest: float, farthest: float
) -> tuple[Tensor, Tensor]:
    """z-depth [B, N, h, w] in metres of every other pixel of the target, and its weight, 0 to 1.

    A cost is 1 - the normalised cross-correlation of grey windows, and what their means differ by;
    that of the best source counts, as others may see something else there. A pixel weighs nothing
    whose second best depth, elsewhere on its ray, is as good; but where that goes for all from it
    to the top of the image, they look up, and the last plane is as good as any, it is the sky.
    """
    batch, cameras = target.images.shape[:2]
    grey = F.avg_pool2d(target.images.mean(2).flatten(0, 1)[:, None], SHRINK)
    size, whole = grey.shape[-2:], tuple(n * SHRINK for n in grey.shape[-2:])
    pixels = fixed_pixels(size, whole, grey.device) + (SHRINK - 1) / 2
    planes = torch.logspace(
        math.log10(nearest), math.log10(farthest), PLANES, device=grey.device, dtype=torch.float32
    )
    projections = image_to_image(
        target.intrinsics[:, None],
        target.camera_to_volume[:, None],
        sources.intrinsics,
        sources.camera_to_volume,
    )
    rays = F.pad(pixels, (0, 1), value=1.0).to(projections) @ projections[..., :3, :3].mT
    rays, shift = rays.float(), projections[..., :3, 3].float()
    mean, variance = _moments(grey)
    cost = grey.new_full((len(grey), PLANES, *size), OUTSIDE)
    for k, images in enumerate(sources.images.mean(3).unbind(1)):
        other = F.avg_pool2d(images.flatten(0, 1)[:, None], SHRINK)
        points = rays[:, k, :, None] * planes[:, None, None] + shift[:, k, :, None, None]
        place = points[..., :2] / points[..., 2:].clamp_min(1e-5)
        place = 2 * (place + 0.5) / constant(whole[::-1], place) - 1
        seen = (points[..., 2] > 1e-5) & (place.abs() < 1).all(-1)
        # planes one below the other, as one tall image to read
        warped = F.grid_sample(
            other,
            place.reshape(len(grey), PLANES * size[0], size[1], 2),
            padding_mode="border",
            align_corners=False,
        ).view(len(grey), PLANES, *size)
        there, spread = _moments(warped)
        together = _window(grey * warped) - mean * there
        alike = (together + FLAT) / torch.sqrt((variance + FLAT) * (spread + FLAT))
        error = 1 - alike + 2 * (mean - there).abs()
        cost = torch.minimum(cost, torch.where(seen.reshape(cost.shape), error, OUTSIDE))
    cost = F.avg_pool2d(cost, 3, 1, 1, count_include_pad=False)
    least, best = cost.min(1, keepdim=True)
    number = torch.arange(PLANES, device=cost.device)[:, None, None]
    elsewhere = torch.where((number - best).abs() > 3, cost, math.inf).amin(1)
    sure = ((elsewhere - least[:, 0]) / SURE).clamp(0, 1)
    middle = best.clamp(1, PLANES - 2)
    before, here, behind = (cost.gather(1, middle + step)[:, 0] for step in (-1, 0, 1))
    bend = (before - 2 * here + behind).clamp_min(1e-6)
    offset = (0.5 * (before - behind) / bend).clamp(-0.5, 0.5)  # of a parabola's lowest point
    share = (middle[:, 0] + offset) / (PLANES - 1)
    seen, last = least[:, 0] < OUTSIDE, best[:, 0] == PLANES - 1  # or beyond it
    sure = sure * seen * ~last
    _, directions, _ = pixel_rays(pixels, target.intrinsics, target.camera_to_volume)
    up = directions[..., 2].reshape(sure.shape) > 0
    maybe = seen & up & (cost[:, -1] - least[:, 0] < SURE) & (sure < UNSURE)
    sky = maybe.byte().cummin(dim=1).values.bool()
    depth = nearest * (farthest / nearest) ** share
    depth, sure = torch.where(sky, BEYOND * farthest, depth), torch.where(sky, SKY, sure)
    return depth.unflatten(0, (batch, cameras)), sure.unflatten(0, (batch, cameras))


def _window(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, WINDOW, 1, WINDOW // 2, count_include_pad=False)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = _window(x)
    return mean, (_window(x * x) - mean * mean).clamp_min(0)


class Teacher:
    """What a sweep says of pixels of the network's images, found once for a frame and its
    sources.
    """

    def __init__(self, nearest: float, farthest: float):
        self.reach, self.known = (nearest, farthest), {}

    def __call__(self, batch: Batch, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """z-depth [B, N, R] in metres at pixels [R, 2], and its weight.

        Pixels weigh nothing that the target lacks, or all of them where it is another frame.
        """
        if batch.images.device.type != "cpu":  # the host would have to wait for poses
            return self._read(batch, pixels).unbind(0)
        found = []
        for number, name in enumerate(batch.name):
            one = batch.each(lambda x, n=number: x[n : n + 1])
            if _moved(one):
                unknown = constant((1.0, 0.0), pixels)[:, None, None, None]
                found.append(unknown.expand(2, *one.images.shape[:2], len(pixels)))
                continue
            key = name, *one.sources.camera_to_volume.flatten().tolist()  # some are drawn
            if key not in self.known:
                self.known[key] = self._read(one, pixels).half()
            found.append(self.known[key].float())
        depth, sure = torch.cat(found, dim=1)
        return depth, sure

    def _read(self, batch: Batch, pixels: Tensor) -> Tensor:
        """[2, B, N, R]: what is returned, found anew."""
        target = batch.target
        to_target = target.intrinsics @ inverse(batch.intrinsics)
        place = (F.pad(pixels, (0, 1), value=1.0).to(to_target) @ to_target.mT)[..., :2].float()
        place = 2 * (place + 0.5) / constant(target.images.shape[:-3:-1], place) - 1
        weight = (place.abs() < 1).all(-1) & ~_moved(batch)[:, None, None]
        maps = torch.stack(sweep(target, batch.sources, *self.reach), dim=2).flatten(0, 1)
        place = place.flatten(0, 1)[:, None]
        read = F.grid_sample(maps, place, "nearest", "border", align_corners=False)
        depth, sure = read[:, :, 0].unflatten(0, weight.shape[:2]).unbind(2)
        return torch.stack([depth, sure * weight])


def _moved(batch: Batch) -> Tensor:
    """[B]: whether the target is another frame than the input."""
    moved = batch.target.camera_to_volume - batch.camera_to_volume
    return moved.abs().flatten(1).amax(1) > 1e-6
