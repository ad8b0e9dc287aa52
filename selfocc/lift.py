"""A shortcut from pixels to nodes, for presets that must learn in minutes (not in the paper).

Deformable attention from random queries needs many steps before the planes say much about the image
at hand. Here every pixel of the finest image level describes its own ray, at log-spaced depths, and
a node reads that frustum where it lies in it: the first answer, to which the planes add what lies
beyond a node's own pixel.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfocc.config import EncoderConfig, VolumeConfig
from selfocc.encoder import fourier_features
from selfocc.geometry import constant, image_projection, move_points, node_positions

CHANNELS = 8  # features at every depth of a pixel, beside the SDF
GAIN = 4.0  # metres of SDF for one unit of the head's output: it has far to go at a low rate


class FrustumLift(nn.Module):
    """What pixels say about the nodes on their rays (mean of the cameras that see a node)."""

    def __init__(self, encoder: EncoderConfig, volume: VolumeConfig, frequencies: int = 5):
        super().__init__()
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
        for axis, nodes in enumerate(volume.nodes):
            self.register_buffer(
                f"features_{axis}", fourier_features(nodes, frequencies), persistent=False
            )
        self.register_buffer("points", node_positions(volume.box, volume.nodes), persistent=False)

    def forward(
        self,
        features: Tensor,
        intrinsics: Tensor,
        camera_to_volume: Tensor,
        image_size: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """SDF [B, H, W, Z] in metres and features [B, H, W, Z, dim], to be added to the planes'.

        Args: features [B, N, dim, h, w], the finest image level; intrinsics [B, N, 3, 3] in pixels
        of the network's images, which are image_size (h, w); camera_to_volume [B, N, 4, 4].
        """
        batch, cameras = intrinsics.shape[:2]
        frustum = self.head(features.flatten(0, 1)).unflatten(1, (-1, self.bins))
        place, seen = self._place(intrinsics, camera_to_volume, image_size)
        sampled = F.grid_sample(
            frustum, place[:, None, None], padding_mode="border", align_corners=False
        )[:, :, 0, 0]  # [B N, 1 + CHANNELS, nodes]
        sampled = (sampled * seen[:, None]).unflatten(0, (batch, cameras)).sum(1)
        count = seen.unflatten(0, (batch, cameras)).sum(1).clamp_min(1)
        lifted = (sampled / count[:, None]).mT.unflatten(1, self.points.shape[:3])
        y, x, z = (
            linear(getattr(self, f"features_{axis}")) for axis, linear in enumerate(self.position)
        )
        position = y[:, None, None] + x[:, None] + z
        return GAIN * lifted[..., 0], self.mix(lifted[..., 1:]) + position

    def _place(self, intrinsics, camera_to_volume, image_size) -> tuple[Tensor, Tensor]:
        """Where nodes lie in the frustums [B N, nodes, 3], as grid_sample wants it: u and v from
        edge to edge of the image, depth between the centres of the outer bins; and
        whether they do.
        """
        projection = image_projection(intrinsics, camera_to_volume).float().flatten(0, 1)
        image = move_points(self.points.flatten(0, 2), projection)
        depth = image[..., 2].clamp_min(1e-5)
        size = constant(image_size[::-1], image)
        where = 2 * (image[..., :2] / depth[..., None] + 0.5) / size - 1
        seen = (image[..., 2] > 1e-5) & (where.abs() < 1).all(-1)
        share = torch.log(depth / self.nearest) / math.log(self.farthest / self.nearest)
        centre = (2 * share - 1) * (self.bins - 1) / self.bins
        return torch.cat([where, centre[..., None]], dim=-1), seen
