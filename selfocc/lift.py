"""A shortcut from pixels to nodes, for presets that must learn in minutes (not in the paper).

Deformable attention from random queries needs many steps before the planes say much about the image
at hand. Here every pixel of the finest backbone stage describes its own ray: how far it reaches,
and what else there is to say at log-spaced depths. A node reads that frustum where it lies in it:
the first answer, to which the planes add what lies beyond a node's own pixel.

A depth makes a truncated signed distance (Curless and Levoy 1996): what is before it is free, what
is just behind it is not, and of what lies farther behind the pixel knows nothing. How far is just
behind depends on what is asked. Rays must not slip through between two pixels at the edge of a
thing; voxels should not be filled there, so that they are read from a thinner shell.

The backbone has most to learn, and can do so before there is a volume, from the depth that a plane
sweep finds (sweep.py).
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from selfocc.config import EncoderConfig, FieldConfig, VolumeConfig, plane_volume
from selfocc.encoder import fourier_features
from selfocc.field import ground_sdf
from selfocc.geometry import constant, fixed_pixels, image_projection, pixel_rays

CHANNELS = 8  # features at every depth of a pixel
# logarithm of depth for one unit of the head's output: it has far to go at a low rate
GAIN = 4.0
HARMONICS = 1, 2, 4, 8  # of a pixel's depth on the road
RAY = 4 + 2 * len(HARMONICS)  # what a pixel knows of its ray


class FrustumHead(nn.Module):
    """Backbone stages and rays [n, RAY, h, w] of the finest -> so many outputs a pixel of it.

    Each level is mixed before the next finer one joins it, unlike in the pyramid: how far away a
    thing is shows around it, above all where it stands on the road. So all know where they look.
    """

    def __init__(self, channels: list[int], dim: int, outputs: int):
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in channels)
        self.mixes = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in channels)
        self.look = nn.Conv2d(RAY, dim, 1)
        self.hidden = nn.Conv2d(dim + RAY, 2 * dim, 3, padding=1)
        self.last = nn.Conv2d(2 * dim, outputs, 1)
        self.to(memory_format=torch.channels_last)

    def forward(self, stages: list[Tensor], rays: Tensor) -> Tensor:
        look, x = self.look(rays), None
        for stage, lateral, mix in zip(
            stages[::-1], self.laterals[::-1], self.mixes[::-1], strict=True
        ):
            size = stage.shape[2:]
            level = lateral(stage) + F.interpolate(look, size, mode="area")
            x = F.silu(mix(level if x is None else level + F.interpolate(x, size)))
        return self.last(F.silu(self.hidden(torch.cat([x, rays], dim=1))))


class FrustumLift(nn.Module):
    """What pixels say about the nodes on their rays (mean of the cameras that see a node)."""

    def __init__(
        self,
        channels: list[int],
        encoder: EncoderConfig,
        volume: VolumeConfig,
        field: FieldConfig,
        frequencies: int = 5,
    ):
        super().__init__()
        self.stride = encoder.stride
        self.bins, self.nearest = encoder.lift_bins, 2.0
        self.farthest = math.dist(volume.box[:2], volume.box[3:5])
        self.ground, self.field = volume.ground, field
        self.head = FrustumHead(channels, encoder.dim, 1 + CHANNELS * self.bins)
        with torch.no_grad():  # the road at the start
            self.head.last.weight[0] = 0.0
            self.head.last.bias[0] = 0.0
        self.mix = nn.Linear(CHANNELS, encoder.dim)
        self.position = nn.ModuleList(
            nn.Linear(2 * frequencies, encoder.dim, bias=False) for _ in volume.nodes
        )
        fixed = partial(self.register_buffer, persistent=False)
        for dim, nodes in enumerate(plane_volume(encoder, volume).nodes):
            fixed(f"features_{dim}", fourier_features(nodes, frequencies))
        for axis, dim in enumerate((1, 0, 2)):  # of x, y, z in [H, W, Z]
            ends = volume.box[axis], volume.box[axis + 3]
            fixed(f"nodes_{axis}", torch.linspace(*ends, volume.nodes[dim], dtype=torch.float64))

    def forward(
        self,
        stages: list[Tensor],
        intrinsics: Tensor,
        camera_to_volume: Tensor,
        image_size: tuple[int, int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """SDFs [B, H, W, Z, K] in metres that are added to the decoder's, features [B, h, w, Z,
        CHANNELS] at the nodes of the planes, and what `depth` gives. The first SDF is for rays,
        the second, which is not made in training, for voxels.

        Args: stages of the backbone [B N, c_l, h_l, w_l], finest first; intrinsics [B, N, 3, 3] in
        pixels of the network's images, which are image_size (h, w); camera_to_volume [B, N, 4, 4].
        """
        cameras, stride = intrinsics.shape[1], self.stride
        share, frustum, climb = self._describe(stages, intrinsics, camera_to_volume, image_size)
        height = camera_to_volume[..., 2, 3].float().flatten()
        sdfs = self._truncated(share, climb, height)[:, : 1 if self.training else 2]
        place, seen = self._place(intrinsics, camera_to_volume, image_size)

        def read(maps: Tensor, y: int, x: int) -> Tensor:
            """Channels of the frustums [B, h, w, Z, C] at every y-th and x-th node."""
            where, there = place[:, :, ::y, ::x], seen[:, ::y, ::x]
            values = kernels.sample_maps(maps, where.flatten(2).mT, there.flatten(1))
            values = values.view(-1, cameras, *there.shape[1:], maps.shape[1])
            if cameras == 1:
                return values[:, 0]
            count = there.unflatten(0, (-1, cameras)).sum(1).clamp_min(1)
            return values.sum(1) / count[..., None]

        depth = self._metres(share.unflatten(0, (-1, cameras)))
        return read(sdfs, 1, 1), read(frustum, *stride), depth

    def depth(
        self,
        stages: list[Tensor],
        intrinsics: Tensor,
        camera_to_volume: Tensor,
        image_size: tuple[int, int],
    ) -> Tensor:
        """z-depth [B, N, h, w] in metres that the pixels of the finest stage say.

        Arguments as in `forward`.
        """
        share = self._describe(stages, intrinsics, camera_to_volume, image_size)[0]
        return self._metres(share.unflatten(0, intrinsics.shape[:2]))

    def beside(self, planes: list[Tensor]) -> list[Tensor]:
        """TPV planes with what nodes know of where they are."""
        hw, zh, wz = planes
        y, x, z = (
            linear(getattr(self, f"features_{dim}")) for dim, linear in enumerate(self.position)
        )
        return [hw + (y[:, None] + x + self.mix.bias), zh + z[:, None], wz]

    def _describe(
        self, stages, intrinsics, camera_to_volume, image_size
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Depth of pixels [B N, h, w] as a share (see `_share`); their features at the bins [B N,
        CHANNELS, bins, h, w]; and `_rays`' climb.
        """
        shape = stages[0].shape[2:]
        rays, climb = self._rays(shape, intrinsics, camera_to_volume, image_size)
        out = self.head(stages, rays)
        road = rays[:, 3].clamp(0.0, 1.15)
        share = road + GAIN / math.log(self.farthest / self.nearest) * out[:, 0]
        return share, out[:, 1:].unflatten(1, (-1, self.bins)), climb

    def _truncated(self, share: Tensor, climb: Tensor, height: Tensor) -> Tensor:
        """What makes the SDF of the start that of the pixels' depth, for rays and for voxels, at
        the bins [B N, 2, bins, h, w].

        It falls by a metre a metre, or by one a bin where that is longer, from 1 to -1. height
        [B N] of the cameras.
        """
        bins = torch.linspace(0, 1, self.bins, device=share.device)
        bins = self._metres(bins)[:, None, None]
        width = (bins * (math.log(self.farthest / self.nearest) / (self.bins - 1))).clamp_min(1)
        ahead = (self._metres(share)[:, None] - bins) / width
        sdf = ahead.clamp(-1, 1)
        if self.field.ground is not None:
            z = height[:, None, None, None] + climb[:, None] * bins
            sdf = sdf - ground_sdf(z, self.field)
        # it ends two to four widths behind, or in the second half of the first one
        ends = torch.stack([0.5 * ahead + 2, 2 * ahead + 2], dim=1).clamp(0, 1)
        return sdf[:, None] * ends

    def _metres(self, share: Tensor) -> Tensor:
        """The inverse of `_share`."""
        return self.nearest * (self.farthest / self.nearest) ** share.clamp(-0.25, 1.25)

    def _rays(self, shape, intrinsics, camera_to_volume, image_size) -> tuple[Tensor, Tensor]:
        """Where the pixels of a map look [B N, RAY, *shape]: directions in the volume frame, and
        the logarithm of the depth at which they meet a flat road, with its harmonics. And how far
        they climb in a metre of depth [B N, *shape].
        """
        pixels = centres(shape, image_size, intrinsics.device)
        origins, directions, stretch = pixel_rays(pixels, intrinsics, camera_to_volume)
        climb = directions[..., 2] * stretch
        down = climb.clamp_max(-1e-3)  # what looks up meets it far away
        road = ((self.ground - origins[..., 2]) / down).clamp_min(0.1)
        share = self._share(road).clamp(-0.25, 1.25)[..., None]
        waves = share * (math.pi * constant(HARMONICS, share))
        rays = torch.cat([directions, share, waves.sin(), waves.cos()], dim=-1).flatten(0, 1)
        rays = rays.unflatten(1, shape).permute(0, 3, 1, 2)
        return rays, climb.flatten(0, 1).unflatten(1, shape)

    def _share(self, depth: Tensor) -> Tensor:
        """Where z-depths lie between the first bin, 0, and the last, 1."""
        return torch.log(depth / self.nearest) / math.log(self.farthest / self.nearest)

    def _place(self, intrinsics, camera_to_volume, image_size) -> tuple[Tensor, Tensor]:
        """Where nodes lie in the frustums [B N, 3, H, W, Z]: depth between the centres of the outer
        bins, v and u from edge to edge of the image, all -1 to 1 as `sample_maps` has it; and
        whether they do.
        """
        projection = image_projection(intrinsics, camera_to_volume).flatten(0, 1)
        # linear in each of a node's coordinates, so that they are multiplied apart
        x, y, z = (
            (projection[:, :3, k, None] * getattr(self, f"nodes_{k}")).float() for k in range(3)
        )
        y = y + projection[:, :3, 3:].float()
        image = (y[:, :, :, None] + x[:, :, None])[..., None] + z[:, :, None, None]
        depth = image[:, 2].clamp_min(1e-5)
        height, width = image_size
        u = 2 * (image[:, 0] / depth + 0.5) / width - 1
        v = 2 * (image[:, 1] / depth + 0.5) / height - 1
        seen = (image[:, 2] > 1e-5) & (u.abs() < 1) & (v.abs() < 1)
        centre = (2 * self._share(depth) - 1) * ((self.bins - 1) / self.bins)
        return torch.stack([centre, v, u], dim=1), seen


def centres(shape, image_size: tuple[int, int], device: torch.device) -> Tensor:
    """Pixels [R, 2] of the image in the middle of those of a map."""
    height, width = (size / n for n, size in zip(shape, image_size, strict=True))
    pixels = fixed_pixels(shape, image_size, device)
    return pixels + constant(((width - 1) / 2, (height - 1) / 2), pixels)
