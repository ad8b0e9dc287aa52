"""What travels: posed frames out of a data set, batches into the model, views out of it."""

import dataclasses
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Sequence:
    """Posed frames of N cameras: what a data set offers, and what it may lack.

    Matrices are float64, lengths metres, colours 8-bit RGB. A data set overrides what it has; of
    the rest there is none.
    """

    name: str
    frames: int
    path: np.ndarray  # [frames] length of the path driven until each frame
    positions: np.ndarray  # [frames, 3] where the rig is in the world
    inputs: list[int] | None = None  # frames that may be the network's input; None: all
    labelled: Collection[int] = ()  # frames that have voxel labels
    skipped: Collection[int] = ()  # frames that the published evaluation leaves out
    missing: Collection[str] = ()  # what this sequence lacks and which metrics that costs
    damaged: Collection[str] = ()  # what is wrong with labels that are there

    def frame_id(self, frame: int) -> str:
        raise NotImplementedError

    def cameras(self, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """intrinsics [N, 3, 3] in pixels, camera_to_world [N, 4, 4]; copies."""
        raise NotImplementedError

    def volume_to_world(self, frame: int) -> np.ndarray:
        """[4, 4]."""
        raise NotImplementedError

    def image(self, frame: int, camera: int) -> np.ndarray:
        """uint8 [h, w, 3]; cameras may differ in size."""
        raise NotImplementedError

    def images(self, frame: int) -> list[np.ndarray]:
        """Those of all cameras."""
        return [self.image(frame, camera) for camera in range(len(self.cameras(frame)[0]))]

    @property
    def camera_names(self) -> Iterable[str]:
        return [f"camera {camera}" for camera in range(len(self.cameras(0)[0]))]

    def files(self, frame: int) -> list[Path]:
        """All files of a frame that are read where they are there."""
        return []

    def depth(self, frame: int) -> Iterable[np.ndarray] | None:
        """z-depth of every camera, float32 [h, w], 0 where there is none."""

    def lidar(self, frame: int) -> np.ndarray | None:
        """float32 [M, 3] in the volume frame of this frame."""

    def lidar_to_volume(self, frame: int) -> np.ndarray | None:
        """[4, 4] of the LiDAR whose rays judge voxels (RayIoU); None: they are not judged so."""

    def semantics(self, frame: int) -> Iterable[np.ndarray] | None:
        """Class ids of every camera, uint8 [h, w]."""

    def voxels(self, frame: int) -> np.ndarray | None:
        """Labels, uint8 [ny, nx, nz] over (y, x, z); 0 is free, 255 unknown."""

    def voxel_mask(self, frame: int) -> np.ndarray | None:
        """bool [ny, nx, nz]: which labels are scored; None: all."""

    def voxels_to_volume(self, frame: int) -> np.ndarray | None:
        """[4, 4] where labels have another frame than the volume."""

    def voxel_scan(self, frame: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Which voxels the scan of this frame hits, bool [ny, nx, nz]: according to a file beside
        the labels, and to the scan itself."""

    def stereo_pair(self, frame: int) -> tuple[np.ndarray, np.ndarray, float, float] | None:
        """Left and right image uint8 [h, w, 3], focal length in pixels, baseline in metres."""

    def has_other_eye(self, frame: int) -> bool:
        """Whether the image of the other camera of a stereo pair is on disk."""
        return False

    def other_eye(self, frame: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]] | None:
        """Of that camera: intrinsics [N, 3, 3], camera_to_world [N, 4, 4], images."""


class Tensors:
    """Base of a dataclass that holds tensors, which move together."""

    def to(self, device: torch.device):
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self):
        """In page-locked memory, from which `to` copies beside the computation; for DataLoader."""
        return self.each(lambda tensor: tensor.contiguous().pin_memory())

    def fill(self, other) -> None:
        """Take the numbers of another one, and keep the memory."""
        for name, x in vars(self).items():
            if isinstance(x, Tensors):
                x.fill(getattr(other, name))
            elif isinstance(x, Tensor):
                x.copy_(getattr(other, name), non_blocking=True)

    def each(self, function):
        """The same with what `function` makes of every tensor."""
        held = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed = {n: function(x) for n, x in held.items() if isinstance(x, Tensor)}
        changed |= {n: x.each(function) for n, x in held.items() if isinstance(x, Tensors)}
        return dataclasses.replace(self, **changed)


@dataclass
class Frames(Tensors):
    """Images of one time stamp or several, cameras in the volume frame of the *input* frame."""

    images: Tensor  # [..., N, 3, h, w] RGB in [0, 1]; bytes where they are until `Batch.to`
    intrinsics: Tensor  # [..., N, 3, 3] float64, pixels of `images`
    camera_to_volume: Tensor  # [..., N, 4, 4] float64


@dataclass
class Batch(Tensors):
    """What the model sees and what supervises or judges it; a sample lacks the leading B."""

    name: list[str]
    images: Tensor  # [B, N, 3, h, w] normalised and padded, for the network
    intrinsics: Tensor  # [B, N, 3, 3] float64, pixels of `images`
    camera_to_volume: Tensor  # [B, N, 4, 4] float64
    target: Frames  # [B, N, ...] the frame that is rendered and supervised
    sources: Frames  # [B, 2, N, ...] the frames before and after it
    depth: Tensor | None = None  # [B, N, h, w] exact z-depth of the target, 0 where there is none
    lidar: Tensor | None = None  # the same of the target's LiDAR points
    stereo: Tensor | None = None  # the same by block matching: evaluation, where no other is there
    semantics: Tensor | None = None  # [B, N, h, w] class ids of the target
    voxels: Tensor | None = None  # [B, ny, nx, nz] uint8 labels around the input frame, 255 unknown

    def to(self, device: torch.device) -> "Batch":
        """On the device, where images of target and sources that came as bytes become colours."""
        batch = super().to(device)
        for frames in (batch.target, batch.sources):
            if frames.images.dtype == torch.uint8:
                frames.images = frames.images / 255
        return batch


def collate(samples: list[Batch]) -> Batch:
    """Stack samples; truth that one of them lacks is dropped for all."""

    def stack(values):
        if isinstance(values[0], list):
            return [name for names in values for name in names]
        if isinstance(values[0], Frames):
            fields = dataclasses.fields(Frames)
            return Frames(*(stack([getattr(v, f.name) for v in values]) for f in fields))
        if any(value is None for value in values):
            return None
        return torch.stack(values) if len(values) > 1 else values[0][None]  # spares a copy

    return Batch(*(stack([getattr(s, f.name) for s in samples]) for f in dataclasses.fields(Batch)))


class Scene(NamedTuple):
    """What depths of the target's rays are held against, rays through pixels [R, 2]."""

    target: Tensor  # [B, N, R, 3] its colours at the rays
    sources: Tensor  # [B, K, N, 3, h, w] images
    projections: Tensor  # [B, K, N, 4, 4] from the target's pixels and depths to the sources'


@dataclass
class View(Tensors):
    """What rays through `pixels` of N cameras see. Depths are z-depths in metres."""

    pixels: Tensor  # [R, 2] (u, v) in the target images
    depth: Tensor  # [B, N, R] expected depth
    color: Tensor  # [B, N, R, 3] RGB, background included
    opacity: Tensor  # [B, N, R]
    semantics: Tensor | None  # [B, N, R, classes] composited class probabilities
    eikonal: Tensor | None  # [B, N, R] sum over the samples of (|gradient| - 1)^2
    weights: Tensor | None = None  # [B, N, R, S] of the depth proposals
    proposals: Tensor | None = None  # [B, N, R, S] their depths
    sdf: Tensor | None = None  # [B, N, R, S] SDF at the samples
    compared: tuple[Tensor, ...] | None = None  # what kernels.epipolar_photometric finds of them
    swept: Tensor | None = None  # 0-d, how far the lift's depth is from that of a plane sweep


@dataclass
class Noise(Tensors):
    """What a training step draws: its rays, and random numbers, uniform in [0, 1)."""

    pixels: Tensor  # [R, 2] (u, v) of the rays in the target images, one grid for the whole batch
    jitter: Tensor  # [B, N, R] shift of a ray's samples
    background: Tensor  # [B, N, R, 3]
    shift: Tensor  # [B, 3] of the grid on which sparsity is measured
