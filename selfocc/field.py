"""From planes to the volume, and the volume read at points and on grids."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from selfocc.config import EncoderConfig, FieldConfig, VolumeConfig
from selfocc.geometry import Box, constant, node_positions

SLAB = 1 << 23  # features decoded at once; where there are more, backward computes them again


class FieldDecoder(nn.Module):
    """An MLP from plane features to SDF, colour features and semantic logits at every node.

    With `FieldConfig.ground` the SDF is the height above the plane z = ground plus what the network
    says, which is zero at the start, so that training starts from a road instead of from nothing.
    """

    def __init__(self, field: FieldConfig, encoder: EncoderConfig, volume: VolumeConfig):
        super().__init__()
        self.kind, self.nodes = encoder.kind, volume.nodes
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
            height = torch.linspace(volume.box[2], volume.box[5], volume.nodes[2]) - field.ground
            # limited, since alpha has no gradient far from a surface
            height = field.rise * torch.tanh(height / field.rise)
            with torch.no_grad():
                self.net[3].weight[:: self.channels] = 0.0
                self.net[3].bias[:: self.channels] = 0.0
        self.register_buffer("height", height, persistent=False)  # [Z] above the ground, metres

    def forward(self, planes: list[Tensor], lifted: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Volume [B, C, H, W, Z], channel 0 the SDF in metres.

        planes: TPV [hw [B, H, W, D], zh [B, Z, H, D], wz [B, W, Z, D]], or BEV [[B, H, W, D]];
        lifted: SDF [B, H, W, Z] and features [B, H, W, Z, D] that are added to those of TPV planes.
        """
        hw = planes[0]
        split = [hw] if self.kind == "bev" else [hw, planes[1].transpose(1, 2)]  # all have h first
        split += [] if lifted is None else [lifted[1]]
        whole = planes[2:]
        total = math.prod(self.nodes) * hw.shape[0] * hw.shape[-1]
        slabs = math.ceil((hw.numel() if self.kind == "bev" else total) / SLAB)
        decode, step = self._decode, math.ceil(self.nodes[0] / slabs)
        if slabs > 1 and torch.is_grad_enabled():
            # nothing in it is random, and the state of a GPU's generator is slow to fetch
            how = dict(use_reentrant=False, preserve_rng_state=False)
            decode = partial(checkpoint, self._decode, **how)
        pieces = zip(*(part.split(step, dim=1) for part in split), strict=True)
        decoded = [decode(whole, *piece) for piece in pieces]
        rows = decoded[0] if slabs == 1 else torch.cat(decoded, dim=1)
        start = 0.0 if self.height is None else self.height
        if lifted is not None:
            start = start + lifted[0]
        if isinstance(start, Tensor):
            rows = torch.cat([rows[..., :1] + start[..., None], rows[..., 1:]], dim=-1)
        return rows.permute(0, 4, 1, 2, 3)

    def _decode(self, whole: list[Tensor], hw: Tensor, *more: Tensor) -> Tensor:
        """Nodes [B, h, W, Z, C] from hw [B, h, W, D]; TPV adds hz [B, h, Z, D], wz [B, W, Z, D]."""
        if self.kind == "bev":
            return self.net(hw).unflatten(-1, (self.nodes[2], self.channels))
        hz, *lifted = more
        features = hw[:, :, :, None] + hz[:, :, None] + whole[0][:, None]
        return self.net(sum(lifted, start=features))


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
