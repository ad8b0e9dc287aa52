"""How each data set is judged (paper section 4): what is scored, where, and how it is read.

Three protocols, named in every table:

- `published`: what the published evaluation scripts compute, so that figures compare with papers.
- `corrected`: the same without their errors. Voxels are read at their centres, not on points that
  run from end to end of the box. The depth map is read where its rays are, not up to a stride to
  the left of it and above. Metres ahead are those driven, not the sum over skipped frames too.
  Scans are projected with the cameras of their own time stamp.
- `own`: the embedded world's. The SDF of a voxel is the lowest at its centre and corners, as a
  voxel of the truth is occupied where any part of it is; pooled and cropped as the preset says.
  Depth maps are interpolated to the pixels of the image and compared with maps (exact, LiDAR or
  stereo), the nearest point of a pixel. Also there for the other data sets, to compare with the
  embedded world.

With `data.voxels=openoccupancy`, nuScenes is judged against nuScenes-Occupancy instead of Occ3D:
512 x 512 x 40 voxels of 0.2 m in the frame of LIDAR_TOP, all of them but noise; the lowest 1 m, the
highest 0.8 m and the outer 1.2 m are taken as free. The published script takes the volume's frame
for the LiDAR's, noise for occupied, what lies beyond the volume for what is at its border, and
scores no classes. Corrected and own, what lies beyond the volume is free.

| | SemanticKITTI (`kitti`) | Occ3D (`nuscenes`) | `kitti_raw` |
|---|---|---|---|
| voxels | 256 x 256 x 32 of 0.2 m | 200 x 200 x 16 of 0.4 m, camera mask | none |
| taken as free | above 3.6 m, last 1.2 m ahead and aside | above 3.8 m, outer 2.4 m | |
| depth | 0.001 to 80 m | 1 to 80 m | 0.1 to 80 m, Eigen crop |
| novel depth | later frames, 0.4 m apart, up to 10 m | key frames 0.4 to 10 m away | as kitti |

Beside what is published, every protocol scores voxels where the camera sees, by range, and by rays
of a LiDAR (Occ3D and the embedded world); sight.py says how. No published figure changes by that.

LiDAR points are projected and the rendered grid is read there, between rays. Dense truth (exact,
stereo, KITTI's annotated depth) is in no published script: maps are compared pixel by pixel.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import add, sub

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfocc import InputError
from selfocc.batch import Sequence
from selfocc.config import Config
from selfocc.datasets.nuscenes_voxels import OpenOccupancy
from selfocc.field import occupancy_grid
from selfocc.geometry import Box, move_points
from selfocc.metrics import GROUND, MIN_DEPTH, UNKNOWN, pool_voxels

PROTOCOLS = ("published", "corrected", "own")
EIGEN = (0.03594771, 0.40810811, 0.96405229, 0.99189189)  # left, top, right, bottom of the image
WHOLE = (0.0, 0.0, 1.0, 1.0)
Matrix = np.ndarray | Tensor
Ranges = tuple[tuple[int, int | None], ...]
ALL = ((0, None),) * 3
POINTS = 1 << 18  # read at once, which limits memory


@dataclass(frozen=True)
class Rules:
    """What a protocol says of one data set."""

    protocol: str  # published | corrected | own
    dataset: str  # kitti | kitti_raw | nuscenes
    box: Box | None = None  # that the labelled voxels divide; None: the model's own
    scored: Ranges = ALL  # first and end of y, x and z; other voxels are taken as free
    ground: tuple[int, ...] = GROUND  # voxel classes of the ground
    nearest: float = MIN_DEPTH  # metres; LiDAR points between this and 80 m count
    window: tuple[float, float, float, float] = WHOLE  # of the image: left, top, right, bottom
    axes: tuple[int, ...] = (0, 1, 2)  # of positions, in which distances are measured
    novel_rays: tuple[int, int] | None = None  # rows, columns of novel depth, at most
    openoccupancy: bool = False  # voxels are those of nuScenes-Occupancy

    @property
    def ends(self) -> bool:
        """Whether voxels are read on points from end to end of the box, not at their centres."""
        return self.protocol == "published"

    @property
    def crude(self) -> bool:
        """Whether neither the frame of the labels nor noise nor classes are heeded (see above)."""
        return self.openoccupancy and self.protocol == "published"

    def crop(self, prediction: Tensor) -> Tensor:
        """The published post-processing: nothing is occupied near the borders of the box.

        prediction [ny, nx, nz]: occupancy or classes (free = 0) or SDF (free = inf); a copy is
        returned.
        """
        scored = tuple(slice(*ends) for ends in self.scored)
        cropped = torch.full_like(prediction, torch.inf if prediction.is_floating_point() else 0)
        cropped[scored] = prediction[scored]
        return cropped


def choose(settings: Config, name: str | None = None) -> Rules:
    """The rules for a configuration's data under a protocol; None is the data set's default.

    The embedded world and own footage follow SemanticKITTI, or Occ3D where the rig is a ring.
    InputError for a protocol that does not exist.
    """
    embedded = settings.data.dataset in ("synthetic", "posed")
    name = name or ("own" if embedded else "published")
    if name not in PROTOCOLS:
        raise InputError(f"--protocol {name}: unknown; known: {', '.join(PROTOCOLS)}")
    dataset = settings.data.dataset
    if embedded:
        dataset = "nuscenes" if settings.data.rig == "surround" else "kitti"
    ground_axes = (0, 1, 2) if embedded else (0, 2)
    rules = {
        "kitti": Rules(
            name,
            dataset,
            (-25.6, 0.0, -2.0, 25.6, 51.2, 4.4),
            ((0, -6), (6, -6), (0, 28)),
            axes=ground_axes,
        ),
        "kitti_raw": Rules(name, dataset, nearest=0.1, window=EIGEN, axes=ground_axes),
        "nuscenes": Rules(
            name,
            dataset,
            (-40.0, -40.0, -1.0, 40.0, 40.0, 5.4),
            ((6, -6), (6, -6), (0, 12)),
            GROUND if embedded else (11, 12, 13, 14),
            nearest=1.0,
            novel_rays=(96, 200),
        ),
    }[dataset]
    if settings.data.dataset == "nuscenes" and settings.data.voxels == "openoccupancy":
        scored = ((6, -6), (6, -6), (5, -4))
        rules = replace(rules, box=OpenOccupancy.box, scored=scored, openoccupancy=True)
    if name != "own":
        return rules
    scored, pooled = ALL, settings.volume.voxel
    if settings.volume.crop_margins and rules.scored != ALL:  # in voxels that are pooled
        scored = tuple((-(-first // pooled), end // pooled) for first, end in rules.scored)
    box = rules.box if rules.openoccupancy else None  # wider than the model's own
    return replace(rules, box=box, scored=scored, nearest=MIN_DEPTH, window=WHOLE, novel_rays=None)


# voxels


def scored_labels(labels: Tensor, mask: np.ndarray | None, rules: Rules, pool: int) -> Tensor:
    """The labels [ny, nx, nz] of a frame as they are scored, unknown where they are not.

    mask bool: what a camera sees (Occ3D). Own protocol: pooled by `pool`.
    """
    if mask is not None:
        labels = torch.where(torch.from_numpy(mask), labels, UNKNOWN)
    if rules.crude:  # any class will do, as none is scored
        labels = torch.where(labels == UNKNOWN, 1, labels)
    return pool_voxels(labels, pool) if rules.protocol == "own" else labels


def read_voxels(
    volume: Tensor,
    classes: int,
    rules: Rules,
    box: Box,
    shape: tuple[int, int, int],
    voxels_to_volume: Matrix | None = None,
) -> tuple[Tensor, Tensor | None]:
    """SDF [ny, nx, nz] in metres and, of a volume with classes, the likeliest one (int64).

    Args:
        volume: [1, C, H, W, Z] over `box`, the last `classes` channels logits.
        shape: (ny, nx, nz) labelled voxels.
        voxels_to_volume: [4, 4] where the labels have another frame than the volume.
    """
    extent, matrix = rules.box or box, None if rules.crude else voxels_to_volume

    def read(classes: int, extent: Box, shape: tuple[int, int, int]):
        """What is returned, at the protocol's point of each voxel of `extent`."""
        channels = [0, *range(volume.shape[1] - classes, volume.shape[1])]
        if not rules.ends and (rules.openoccupancy or matrix is not None):
            return _read_centres(volume[:, channels], box, extent, shape, matrix)
        parts = (volume[:, c : c + 1] for c in channels)
        grid = torch.cat([occupancy_grid(part, box, shape, rules.ends, extent) for part in parts])
        if matrix is not None:
            grid = move_grid(grid, extent, matrix)
        return grid[0], grid[1:].argmax(0) if classes else None

    sdf, likeliest = read(classes, extent, shape)
    if rules.protocol != "own":
        return sdf, likeliest
    # corners are the centres of voxels that begin half a voxel earlier, one more along each axis
    lo, hi, counts = extent[:3], extent[3:], (shape[1], shape[0], shape[2])
    half = [(b - a) / n / 2 for a, b, n in zip(lo, hi, counts, strict=True)]
    first, last = (map(move, ends, half) for move, ends in ((sub, lo), (add, hi)))
    corners, _ = read(0, (*first, *last), tuple(n + 1 for n in shape))
    return torch.minimum(sdf, -F.max_pool3d(-corners[None], 2, stride=1)[0]), likeliest


def _read_centres(
    volume: Tensor, box: Box, extent: Box, shape: tuple[int, int, int], matrix: Matrix | None
) -> tuple[Tensor, Tensor | None]:
    """What `read_voxels` returns, read where `matrix` moves the centres of voxels of `extent`.

    volume [1, 1 + classes, H, W, Z]. The SDF is inf, which is free, beyond the volume's box.
    """
    x, y, z = (positions.to(volume) for positions in centres(extent, shape))
    matrix = torch.as_tensor(np.eye(4) if matrix is None else matrix).to(volume)
    lo, hi = volume.new_tensor(box).view(2, 3)
    sdf, likeliest = [], []
    for rows in y.split(max(1, POINTS // (shape[1] * shape[2]))):
        points = torch.stack(torch.meshgrid(rows, x, z, indexing="ij"), dim=-1)[..., [1, 0, 2]]
        points = move_points(points, matrix)
        place = 2 * (points - lo) / (hi - lo) - 1
        values = F.grid_sample(  # the fastest axis comes first
            volume, place[None, ..., [2, 0, 1]], padding_mode="border", align_corners=True
        )[0]
        outside = (place.abs() > 1 + 1e-5).any(dim=-1)
        sdf.append(torch.where(outside, torch.inf, values[0]))
        if len(values) > 1:
            likeliest.append(values[1:].argmax(0))
    return torch.cat(sdf), torch.cat(likeliest) if likeliest else None


def centres(box: Box, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Where the centres of (ny, nx, nz) voxels of a box are along x, y and z, metres."""
    return tuple(
        box[axis] + (torch.arange(n) + 0.5) * ((box[axis + 3] - box[axis]) / n)
        for axis, n in enumerate((shape[1], shape[0], shape[2]))
    )


def heights(box: Box, shape: tuple[int, int, int], voxels_to_volume: Matrix | None) -> Tensor:
    """Metres [ny, nx, nz] of the centres of voxels along z of the volume frame."""
    x, y, z = centres(box, shape)
    if voxels_to_volume is None:
        return z.expand(shape)
    along_x, along_y, along_z, shift = torch.as_tensor(voxels_to_volume)[2].float()
    return x[:, None] * along_x + y[:, None, None] * along_y + z * along_z + shift


def move_grid(grid: Tensor, box: Box, matrix: Matrix) -> Tensor:
    """A grid [C, ny, nx, nz] over `box`, read where `matrix` [4, 4] moves its points; trilinear.

    Its points run from end to end of the box and beyond lies 0 (which is occupied), as published.
    """
    lo, hi = (torch.tensor(box[i : i + 3], dtype=torch.float64) for i in (0, 3))
    shares = [
        torch.linspace(0, 1, n, dtype=torch.float64)
        for n in (grid.shape[2], grid.shape[1], grid.shape[3])
    ]
    x, y, z = (lo[a] + share * (hi[a] - lo[a]) for a, share in enumerate(shares))
    y, x, z = torch.meshgrid(y, x, z, indexing="ij")
    matrix = torch.as_tensor(matrix).double().cpu()
    points = torch.stack([x, y, z], dim=-1) @ matrix[:3, :3].T + matrix[:3, 3]
    place = (2 * (points - lo) / (hi - lo) - 1)[..., [2, 0, 1]]  # the fastest axis comes first
    return F.grid_sample(
        grid[None], place[None].to(grid), align_corners=True, padding_mode="zeros"
    )[0]


# depth


def lidar_truth(
    points: Tensor, volume_to_image: Tensor, size: tuple[int, int], rules: Rules
) -> tuple[Tensor, Tensor]:
    """LiDAR points as the published protocol reads them: location [N, M, 2], depth [N, M].

    points [M, 3] in the volume frame; volume_to_image [N, 4, 4] projects to (u d, v d, d, 1); size
    (h, w). Locations are fractions of the image; depth is 0 where a point is not scored.
    """
    matrix = torch.as_tensor(volume_to_image).double()
    q = F.pad(torch.as_tensor(points).double(), (0, 1), value=1.0) @ matrix.transpose(-1, -2)
    depth = q[..., 2]
    location = q[..., :2] / depth.clamp_min(1e-5)[..., None] / torch.tensor([size[1], size[0]])
    lo, hi = torch.tensor(rules.window).double().view(2, 2)
    seen = (depth > rules.nearest) & ((location > lo) & (location < hi)).all(dim=-1)
    return location, torch.where(seen, depth, 0)


def scored_depth(truth: Tensor, rules: Rules) -> Tensor:
    """Maps of true depth [..., h, w], 0 outside the window and nearer than what is scored."""
    h, w = truth.shape[-2:]
    left, top, right, bottom = (int(x * n) for x, n in zip(rules.window, (w, h, w, h), strict=True))
    inside = torch.zeros_like(truth, dtype=torch.bool)
    inside[..., top:bottom, left:right] = True
    return torch.where(inside & (truth > rules.nearest), truth, 0)


def read_depth(depth: Tensor, location: Tensor, displaced: bool = False) -> Tensor:
    """Maps of depth [N, rows, cols] read bilinearly at fractions [N, M, 2] of the image; [N, M].

    Row i and column j of a map are at fractions i / rows and j / cols of the image. `displaced`
    reads as published: as if the last row and column were at the image's end.
    """
    size = torch.tensor([depth.shape[2], depth.shape[1]]).to(location)
    grid = location if displaced else location * size / (size - 1).clamp_min(1)
    grid = (2 * grid[:, None] - 1).to(depth.dtype)
    return F.grid_sample(depth[:, None], grid, padding_mode="border", align_corners=True)[:, 0, 0]


def novel_targets(sequence: Sequence, frame: int, rules: Rules) -> Iterator[tuple[float, int]]:
    """Frames from whose cameras depth is rendered, encoding only `frame`: (metres away, frame).

    nuScenes: key frames before and after it, in a straight line 0.4 to 10 m away (the published
    list of neighbours is a file whose making is not public). KITTI: frames that follow, each 0.4 m
    or more from the one chosen before, until 10 m.
    """
    positions = sequence.positions
    if rules.dataset == "nuscenes":
        keys = range(sequence.frames) if sequence.inputs is None else sequence.inputs
        away = np.linalg.norm(positions - positions[frame], axis=1)
        for side in ([k for k in reversed(keys) if k < frame], [k for k in keys if k > frame]):
            for other in itertools.takewhile(lambda k: away[k] <= 10, side):
                if away[other] > 0.4:
                    yield float(away[other]), other
        return
    last, driven = frame, 0.0
    for other in range(frame + 1, sequence.frames):
        step = float(np.linalg.norm((positions[other] - positions[last])[list(rules.axes)]))
        driven += step
        if step < 0.4 or other in sequence.skipped:
            continue
        metres = driven if rules.ends else float(sequence.path[other] - sequence.path[frame])
        if metres > 10:
            return
        last = other
        yield metres, other
