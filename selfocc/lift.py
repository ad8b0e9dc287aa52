"""A shortcut from pixels to nodes, for presets that must learn in minutes (not in the paper).

Deformable attention from random queries needs many steps before the planes say much about the image
at hand. Reading the image features where a node projects gives the decoder a first answer from the
first step on; the planes add what lies beyond a node's own pixel.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from selfocc.config import EncoderConfig, VolumeConfig
from selfocc.encoder import fourier_features
from selfocc.geometry import image_projection, node_positions


class PixelLift(nn.Module):
    """Image features at each node's projection (mean of the cameras that see it), and its place."""

    def __init__(self, encoder: EncoderConfig, volume: VolumeConfig, frequencies: int = 5):
        super().__init__()
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
    ) -> Tensor:
        """Node features [B, H, W, Z, dim].

        Args: features [B, N, dim, h, w], the finest image level; intrinsics [B, N, 3, 3] in pixels
        of the network's images, which are image_size (h, w); camera_to_volume [B, N, 4, 4].
        """
        batch, cameras = intrinsics.shape[:2]
        projection = image_projection(intrinsics, camera_to_volume).float().flatten(0, 1)
        points = self.points.flatten(0, 2)
        image = points @ projection[:, :3, :3].mT + projection[:, None, :3, 3]  # [B N, nodes, 3]
        depth = image[..., 2]
        size = image.new_tensor([image_size[1], image_size[0]])
        where = 2 * (image[..., :2] / depth.clamp_min(1e-5)[..., None] + 0.5) / size - 1
        seen = (depth > 1e-5) & (where.abs() < 1).all(-1)
        sampled = F.grid_sample(features.flatten(0, 1), where[:, None], align_corners=False)[
            :, :, 0
        ]
        sampled = (sampled * seen[:, None]).unflatten(0, (batch, cameras)).sum(1)
        count = seen.unflatten(0, (batch, cameras)).sum(1).clamp_min(1)
        lifted = (sampled / count[:, None]).mT.unflatten(1, self.points.shape[:3])
        y, x, z = (
            linear(getattr(self, f"features_{axis}")) for axis, linear in enumerate(self.position)
        )
        return lifted + (y[:, None, None] + x[:, None] + z)
