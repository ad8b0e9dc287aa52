"""From planes to the volume, and the volume read at points and on grids."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from selfocc.config import EncoderConfig, FieldConfig, VolumeConfig
from selfocc.geometry import Box, constant, node_positions


class FieldDecoder(nn.Module):
    """An MLP from plane features to SDF, colour features and semantic logits at every node.

    With `FieldConfig.ground` the SDF is the height above the plane z = ground plus what the network
    says, which is zero at the start, so that training starts from a road instead of from nothing.
    """

    def __init__(self, field: FieldConfig, encoder: EncoderConfig, volume: VolumeConfig):
        super().__init__()
        self.kind, self.nodes, self.stride = encoder.kind, volume.nodes, encoder.stride
        self.channels = 1 + field.colors + field.classes
        outputs = self.channels * (volume.nodes[2] if self.kind == "bev" else 1)
        self.net = nn.Sequential(
            nn.Softplus(),
            nn.Linear(encoder.dim, field.hidden),
            nn.Softplus(),
            nn.Linear(field.hidden, outputs),
        )
        height = None
        if field.ground is not None:
            heights = torch.linspace(volume.box[2], volume.box[5], volume.nodes[2])
            height = ground_sdf(heights, field)
            with torch.no_grad():
                self.net[3].weight[:: self.channels] = 0.0
                self.net[3].bias[:: self.channels] = 0.0
        self.register_buffer("height", height, persistent=False)  # [Z] above the ground, metres

    def forward(
        self,
        planes: list[Tensor],
        lifted: tuple[Tensor, Tensor] | None = None,
        mix: Tensor | None = None,
    ) -> Tensor:
        """Volume [B, C, H, W, Z], channel 0 the SDF in metres.

        planes: TPV [hw [B, h, w, D], zh [B, Z, h, D], wz [B, w, Z, D]], or BEV [[B, h, w, D]].
        lifted: SDF [B, H, W, Z] that is added, and features [B, h, w, Z, L] that are added to those
        of TPV planes, mixed as in `kernels.decode`.
        """
        sdf, features = lifted or (None, None)
        if self.kind == "bev":
            hidden = self.net[:3](planes[0]).to(planes[0].dtype)
            with torch.autocast(hidden.device.type, enabled=False):  # as `kernels.decode`
                nodes = self.net[3](hidden).unflatten(-1, (self.nodes[2], self.channels))
        else:
            first, last = self.net[1], self.net[3]
            network = first.weight, first.bias, last.weight, last.bias
            nodes = kernels.decode(*planes, network, features, mix)
        volume = nodes.permute(0, 4, 1, 2, 3)
        if self.stride != (1, 1):
            volume = F.interpolate(volume, self.nodes, mode="trilinear", align_corners=True)
        if self.height is not None:
            volume[:, 0] += self.height
        if sdf is not None:
            volume[:, 0] += sdf
        return volume


def ground_sdf(z: Tensor, field: FieldConfig) -> Tensor:
    """SDF of the road from which training starts, at heights z; limited, since alpha has no
    gradient far from a surface.
    """
    return field.rise * torch.tanh((z - field.ground) / field.rise)


def sample_sdf(volume: Tensor, box: Box, points: Tensor) -> Tensor:
    """SDF [B, ...] in metres at points [B or 1, ..., 3] (x, y, z) of the volume frame, trilinear.

    Outside the box the value at its border counts.
    """
    batch, *shape = torch.broadcast_shapes(
        points.shape[:-1], (volume.shape[0], *[1] * (points.ndim - 2))
    )
    bounds = constant(box, points)
    grid = 2 * (points - bounds[:3]) / (bounds[3:] - bounds[:3]) - 1
    grid = grid.roll(1, -1).to(volume.dtype)  # z, x, y: the fastest axis comes first
    grid = grid.reshape(points.shape[0], -1, 1, 1, 3).expand(batch, -1, -1, -1, -1)
    sdf = F.grid_sample(volume[:, :1], grid, padding_mode="border", align_corners=True)
    return sdf.reshape(batch, *shape)


def shifted_grid_sdf(
    volume: Tensor, box: Box, shape: tuple[int, int, int], shift: Tensor
) -> Tensor:
    """SDF [B, ny, nx, nz] on a grid from one end of the box to the other, its points moved.

    shift: [B, 3] of the whole grid, or [B, ny, nx, nz, 3] of every point, along x, y, z in voxels
    of the box divided by `shape`.
    """
    counts = (shape[1], shape[0], shape[2])
    pitch = constant(tuple((box[a + 3] - box[a]) / n for a, n in enumerate(counts)), volume)
    grid = node_positions(box, shape, device=volume.device).to(volume.dtype)
    shift = shift.to(volume) * pitch
    return sample_sdf(
        volume, box, grid + (shift[:, None, None, None] if shift.ndim == 2 else shift)
    )


def occupancy_grid(
    volume: Tensor,
    box: Box,
    shape: tuple[int, int, int],
    published: bool = False,
    extent: Box | None = None,
) -> Tensor:
    """SDF [B, ny, nx, nz] in metres at voxel centres; at most the threshold means occupied.

    Trilinear, one axis after the other.

    Args:
        volume: [B, C, H, W, Z] over `box`.
        shape: (ny, nx, nz) voxels.
        published: points that include both ends instead of voxel centres.
        extent: the box that is divided into voxels, `box` unless given.
    """
    volume, extent = volume[:, :1], extent or box
    for dim, axis, n in zip((4, 3, 2), (2, 0, 1), (shape[2], shape[1], shape[0]), strict=True):
        steps = torch.arange(n, dtype=volume.dtype, device=volume.device)
        share = steps / max(1, n - 1) if published else (steps + 0.5) / n
        metres = extent[axis] + share * (extent[axis + 3] - extent[axis])
        nodes = volume.shape[dim]
        place = (metres - box[axis]) / (box[axis + 3] - box[axis]) * (nodes - 1)
        place = place.clamp(0, nodes - 1)
        lower = place.long().clamp(max=nodes - 2)
        fraction = (place - lower).view(-1, *[1] * (4 - dim))
        volume = volume.index_select(dim, lower).lerp(volume.index_select(dim, lower + 1), fraction)
    return volume[:, 0]
