"""What can be seen of voxels: by the cameras of the input image, and by the rays of a LiDAR.

Voxels are [ny, nx, nz] over (y, x, z) of a box; all geometry is in the frame of that box, metres.

**Where the camera sees.** A voxel counts as seen if it ends the sight of a pixel, or if its centre
lies before the depth of the pixel it is seen in. Depth is exact where there is such a map (the
embedded world); elsewhere it is that of the truth itself: every ray of the image ends in the first
occupied voxel, and what is unknown hides nothing. So a voxel is seen if the ray of a pixel gets to
it before it meets another occupied one. A ray to every centre instead would call nearly all of the
ground hidden, since it grazes the ground voxels before it. Occ3D brings its own mask; for
nuScenes-Occupancy there is no such table.

**RayIoU** (SparseOcc, Liu et al., ECCV 2024, section 4). Rays of a LiDAR are cast into truth and
prediction; a ray is right where the two distances at which it leaves the first occupied voxel
differ by less than 1, 2, 4 m (and, by class, the classes agree). Only rays count whose truth meets
something, and nothing unknown before. The rays start at up to eight places of the LiDAR along the
drive. The embedded world is judged by the same rays as Occ3D, and not by those of its own LiDAR, so
that figures compare: they lie evenly on the ground, where a LiDAR's crowd near the car.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from selfocc.geometry import Box, fixed_pixels, inverse, move_points, pixel_rays
from selfocc.protocols import centres

RANGES = (12.8, 25.6, 51.2)  # metres ahead and aside (VoxFormer, SSCBench), one within the other
RAYS = 1 << 15  # of a camera, at most, that are cast into voxels: those of the embedded world


def ring(box: Box, shape: tuple[int, int, int]) -> Tensor:
    """The first of RANGES [ny, nx, nz] that reaches a voxel; as many as there are beyond all."""
    x, y, _ = centres(box, shape)
    away = torch.maximum(x.abs(), y.abs()[:, None])
    return torch.bucketize(away, torch.tensor(RANGES))[..., None].expand(shape)


def cast(occupied: Tensor, box: Box, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """The first occupied voxel on rays: (its place as flattened, -1 for none; where it is left).

    occupied bool [ny, nx, nz]; origins [R, 3] or [3], directions [R, 3] of any length; what is left
    is in multiples of it, inf where nothing is met. From voxel to voxel as Amanatides and Woo do.
    """
    ny, nx, nz = occupied.shape
    count = torch.tensor([nx, ny, nz])
    lo, hi = torch.tensor(box).view(2, 3)
    edge = (hi - lo) / count
    start, move = ((origins - lo) / edge).expand_as(directions), directions / edge
    move = torch.where(move.abs() < 1e-9, 1e-9, move)  # in voxels from here on
    faces = torch.stack([-start, count - start]) / move
    enter, leave = faces.amin(0).amax(1).clamp_min(0), faces.amax(0).amin(1)
    rays = (enter < leave).nonzero()[:, 0]
    start, move = start[rays], move[rays]
    cell = (start + move * enter[rays, None]).floor().long().clamp_min(0).minimum(count - 1)
    border = ((cell + (move > 0) - start) / move).T.contiguous()  # where the voxel ends along x y z
    # a layer of voxels around the box stops what leaves it
    state = F.pad(occupied.to(torch.uint8), (1,) * 6, value=2).flatten()
    number = F.pad(
        torch.arange(occupied.numel()).view(occupied.shape), (1,) * 6, value=-1
    ).flatten()
    stride = torch.tensor([nz + 2, (nx + 2) * (nz + 2), 1])
    here, jump = ((cell + 1) * stride).sum(1), (move.sign().long() * stride).T.contiguous()
    pitch = 1 / move.abs().T
    place = torch.full((len(directions),), -1)
    left = torch.full((len(directions),), torch.inf)
    while len(rays):
        for _ in range(8):  # what has stopped is sorted out now and then
            x, y, z = border
            first = (border == torch.minimum(x, y).minimum(z)) & (state[here] == 0)
            border = border + pitch * first
            here = here + (jump * first).sum(0)
        kind = state[here]
        hit, on = kind == 1, kind == 0
        place[rays[hit]], left[rays[hit]] = number[here[hit]], border[:, hit].amin(0)
        rays, here = rays[on], here[on]
        border, pitch, jump = (v[:, on] for v in (border, pitch, jump))
    return place, left


# cameras


@dataclass
class Sight:
    """What the cameras of the input can tell of voxels [ny, nx, nz]."""

    seen: Tensor  # bool
    ends: Tensor | None = None  # bool, in which the depth of `source` ends, or there is none
    source: str = ""  # exact depth or LiDAR depth


@dataclass
class Cameras:
    """N pinhole cameras in the frame of the voxels."""

    intrinsics: Tensor  # [N, 3, 3] float64
    to_voxels: Tensor  # [N, 4, 4] float64

    def every(self, stride: int) -> "Cameras":
        """The same, with pixels `stride` times as long."""
        intrinsics = self.intrinsics.clone()
        intrinsics[:, :2, 2] -= (stride - 1) / 2
        intrinsics[:, :2] /= stride
        return Cameras(intrinsics, self.to_voxels)

    def rays(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Origins [N, 3], directions [N, h w, 3] of the pixels, a metre of z-depth long."""
        origins, directions, stretch = pixel_rays(
            fixed_pixels(size, size), self.intrinsics, self.to_voxels
        )
        return origins[:, 0], directions * stretch[..., None]


def ends(depth: Tensor, cameras: Cameras, box: Box, shape: tuple[int, int, int]) -> Tensor:
    """Voxels, bool, in which z-depth [N, h, w] ends; 0 is no depth."""
    origins, directions = cameras.rays(depth.shape[1:])
    reach = depth.flatten(1)[..., None]
    points = (origins[:, None] + directions * reach)[reach[..., 0] > 0]
    count = torch.tensor([shape[1], shape[0], shape[2]])
    lo, hi = torch.tensor(box).view(2, 3)
    cell = ((points - lo) / (hi - lo) * count).floor().long()
    x, y, z = cell[((cell >= 0) & (cell < count)).all(1)].T
    found = torch.zeros(shape, dtype=torch.bool)
    found[y, x, z] = True
    return found


def before(depth: Tensor, cameras: Cameras, box: Box, shape: tuple[int, int, int]) -> Tensor:
    """Voxels, bool, whose centre lies before the z-depth [N, h, w] of its pixel in some camera.

    0 is the sky. With `ends`, what cameras of exact depth see.
    """
    depth = torch.where(depth > 0, depth, torch.inf)
    x, y, z = centres(box, shape)
    y, x, z = torch.meshgrid(y, x, z, indexing="ij")
    points = torch.stack([x, y, z], dim=-1).flatten(0, 2)
    seen = torch.zeros(len(points), dtype=torch.bool)
    height, width = depth.shape[1:]
    for depths, intrinsics, to_camera in zip(
        depth, cameras.intrinsics.float(), inverse(cameras.to_voxels).float(), strict=True
    ):
        u, v, away = (move_points(points, to_camera) @ intrinsics.T).unbind(1)
        u, v = (u / away).round(), (v / away).round()
        inside = (away > 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
        pixel = (v[inside] * width + u[inside]).long()
        seen[inside] |= away[inside] < depths.flatten()[pixel]
    return seen.view(shape)


def seen_in_truth(labels: Tensor, cameras: Cameras, size: tuple[int, int], box: Box) -> Tensor:
    """Voxels, bool, that cameras of size (h, w) see, by the truth [ny, nx, nz] uint8 alone."""
    stride = math.ceil(math.sqrt(size[0] * size[1] / RAYS))
    cameras, size = cameras.every(stride), (size[0] // stride, size[1] // stride)
    occupied, depths = (labels > 0) & (labels < 255), []
    seen = torch.zeros(labels.numel(), dtype=torch.bool)
    for origin, directions in zip(*cameras.rays(size), strict=True):
        place, depth = cast(occupied, box, origin, directions)
        seen[place[place >= 0]] = True
        depths.append(depth.view(size))
    return seen.view(labels.shape) | before(torch.stack(depths), cameras, box, labels.shape)


# LiDAR


@dataclass
class Rays:
    """Rays and what they meet in the truth; only those that count."""

    origins: Tensor  # [R, 3]
    directions: Tensor  # [R, 3], a metre long
    left: Tensor  # [R] metres at which the first occupied voxel is left
    label: Tensor  # [R] its class, uint8


@functools.cache
def lidar_directions() -> Tensor:
    """Unit directions [R, 3] of SparseOcc's rays, 360 a beam.

    Ten beams that meet level ground at 1, 2 .. 10 heights of the LiDAR, and from there on evenly in
    angle up to 0.21 rad (nuScenes' LiDAR ends there).
    """
    pitch = [-math.atan(1 / k) for k in range(1, 11)]
    while pitch[-1] < 0.21:
        pitch.append(2 * pitch[-1] - pitch[-2])
    up, around = torch.meshgrid(
        torch.tensor(pitch), torch.deg2rad(torch.arange(360.0)), indexing="ij"
    )
    rays = torch.stack([up.cos() * around.cos(), up.cos() * around.sin(), up.sin()], dim=-1)
    return rays.flatten(0, 1)


def lidar_rays(labels: Tensor, box: Box, origins: Tensor) -> Rays:
    """The rays from places [T, 3] in the truth [ny, nx, nz] uint8."""
    beams = lidar_directions()
    starts, directions = origins.repeat_interleave(len(beams), 0), beams.repeat(len(origins), 1)
    place, left = cast(labels > 0, box, starts, directions)
    label = torch.where(place < 0, 255, labels.flatten()[place.clamp_min(0)])
    met = label < 255
    return Rays(starts[met], directions[met], left[met], label[met])


def lidar_places(poses: Tensor, own: int, box: Box) -> Tensor:
    """At most eight of the places of a LiDAR that lie a metre or more inside a box in plan.

    poses [T, 4, 4] in the frame of the box, along a drive; that of the frame itself (`own`) counts
    in any case. Evenly spread.
    """
    places, (lo, hi) = poses[:, :3, 3].float(), torch.tensor(box).view(2, 3)
    inside = ((places > lo + 1) & (places < hi - 1))[:, :2].all(1)
    inside[own] = True
    places = places[inside]
    return places[
        torch.linspace(0, len(places) - 1, min(8, len(places)), dtype=torch.float64).round().long()
    ]
