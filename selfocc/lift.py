"""A shortcut from pixels to nodes, for presets that must learn in minutes (not in the paper).

Deformable attention from random queries needs many steps before the planes say much about the image
at hand. Here every pixel of the finest image level describes its own ray, at log-spaced depths, and
a node reads that frustum where it lies in it: the first answer, to which the planes add what lies
beyond a node's own pixel.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

import kernels
from selfocc.config import EncoderConfig, VolumeConfig, plane_volume
from selfocc.encoder import fourier_features
from selfocc.geometry import image_projection

CHANNELS = 8  # features at every depth of a pixel, beside the SDF
GAIN = 4.0  # metres of SDF for one unit of the head's output: it has far to go at a low rate


class FrustumLift(nn.Module):
    """What pixels say about the nodes on their rays (mean of the cameras that see a node)."""

    def __init__(self, encoder: EncoderConfig, volume: VolumeConfig, frequencies: int = 5):
        super().__init__()
        self.stride = encoder.stride
        self.bins, self.nearest = encoder.lift_bins, 2.0
        self.farthest = math.dist(volume.box[:2], volume.box[3:5])
        self.head = nn.Sequential(
            nn.Conv2d(encoder.dim, 2 * encoder.dim, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * encoder.dim, (1 + CHANNELS) * self.bins, 1),
        )
        with torch.no_grad():  # no say about the SDF at the start
            self.head[2].weight[: self.bins] = 0.0
            self.head[2].bias[: self.bins] = 0.0
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
        features: Tensor,
        intrinsics: Tensor,
        camera_to_volume: Tensor,
        image_size: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """SDF [B, H, W, Z] in metres, and features [B, h, w, Z, CHANNELS] at the nodes of the
        planes.

        Args: features [B, N, dim, h, w], the finest image level; intrinsics [B, N, 3, 3] in pixels
        of the network's images, which are image_size (h, w); camera_to_volume [B, N, 4, 4].
        """
        cameras, stride = intrinsics.shape[1], self.stride
        frustum = self.head(features.flatten(0, 1)).unflatten(1, (-1, self.bins))
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

        return GAIN * read(frustum[:, :1], 1, 1)[..., 0], read(frustum[:, 1:], *stride)

    def beside(self, planes: list[Tensor]) -> list[Tensor]:
        """TPV planes with what nodes know of where they are."""
        hw, zh, wz = planes
        y, x, z = (
            linear(getattr(self, f"features_{dim}")) for dim, linear in enumerate(self.position)
        )
        return [hw + (y[:, None] + x + self.mix.bias), zh + z[:, None], wz]

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
        share = torch.log(depth / self.nearest) / math.log(self.farthest / self.nearest)
        centre = (2 * share - 1) * ((self.bins - 1) / self.bins)
        return torch.stack([centre, v, u], dim=1), seen
