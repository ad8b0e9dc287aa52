"""Images to voxels, as evaluation reads them, and as fast as the device can.

    predict = Predictor(model)
    sdf, classes = predict(images, intrinsics, camera_to_volume)
    occupied = sdf <= model.config.volume.threshold

Nothing is rendered and nothing kept for gradients. On a GPU the whole way is one CUDA graph. Its
kernels read cameras as they read images, so that every frame may have others.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from selfocc import InputError, graphs, protocols
from selfocc.labels import label_map
from selfocc.model import SelfOcc
from selfocc.protocols import Rules


class Input(NamedTuple):
    """What `SelfOcc.see` reads of a batch."""

    images: Tensor  # [1, N, 3, h, w] normalised and padded, as the model's data.pad
    intrinsics: Tensor  # [1, N, 3, 3] float64, pixels of `images`
    camera_to_volume: Tensor  # [1, N, 4, 4] float64


class Voxels(NamedTuple):
    """What is where: voxels [ny, nx, nz] over y, x and z."""

    sdf: Tensor  # metres; at most `volume.threshold` means occupied
    classes: Tensor | None  # likeliest class (int64) of the data set's voxels; 0 where free


class Predictor:
    """A model that only sees, on its own device.

    Args:
        model: in evaluation mode from now on. Its `optim.bf16` counts, and what the caller has
            made of `optim.tf32` (`distributed.allow_tf32`).
        rules: how voxels are read (protocols.py), of protocol `own` by default; borders that a
            protocol takes as free are not.
        shape: (ny, nx, nz) voxels; by default of 0.2 m times `volume.voxel`.
        compiled: backbone and pyramid by torch.compile, whose first frame then takes a minute.
        graph: replay a CUDA graph. What is returned is then overwritten by the next frame.

    Raises InputError where a graph is asked for that cannot be.
    """

    def __init__(
        self,
        model: SelfOcc,
        rules: Rules | None = None,
        shape: tuple[int, int, int] | None = None,
        compiled: bool = False,
        graph: bool | None = None,
    ):
        self.model, config = model.eval(), model.config
        self.rules = rules or protocols.choose(config, "own")
        device = next(model.parameters()).device
        self.graph = device.type == "cuda" and not self.rules.openoccupancy
        if graph is not None:
            if graph and not self.graph:
                raise InputError(
                    "a CUDA graph needs a GPU, and other voxels than those of OpenOccupancy"
                )
            self.graph = graph
        self.box, edge = self.rules.box or config.volume.box, 0.2 * config.volume.voxel
        size = (round((self.box[a + 3] - self.box[a]) / edge) for a in (1, 0, 2))
        self.shape = shape or tuple(size)
        self.classes = 0 if self.rules.crude else config.field.classes
        if self.classes:
            known = label_map(config.data).voxel_classes(config.data.dataset)
            self.voxel_class = torch.tensor(known, device=device)
        if compiled:
            model.backbone.compile()
            model.fpn.compile()
        self.captured: tuple[Input, Callable[[], Voxels]] | None = None

    @torch.inference_mode()
    def __call__(self, images: Tensor, intrinsics: Tensor, camera_to_volume: Tensor) -> Voxels:
        """One frame, shaped as `Input` says, from anywhere; in page-locked memory best."""
        given = Input(images, intrinsics, camera_to_volume)
        if not self.graph:
            device = next(self.model.parameters()).device
            return self.voxels(Input(*(x.to(device, non_blocking=True) for x in given)))
        if self.captured is None or self.captured[0].images.shape != images.shape:
            self.captured = self._capture(given)
        read, replay = self.captured
        for mine, x in zip(read, given, strict=True):
            mine.copy_(x, non_blocking=True)
        return replay()

    def voxels(self, seen: Input) -> Voxels:
        """The same of what is on the device, without a graph."""
        return self._read(self.model.see(seen).voxels)

    def _read(self, volume: Tensor) -> Voxels:
        config = self.model.config
        box, rules = config.volume.box, self.rules
        sdf, likeliest = protocols.read_voxels(volume, self.classes, rules, box, self.shape)
        classes = None
        if likeliest is not None:
            occupied = sdf <= config.volume.threshold
            classes = torch.where(occupied, self.voxel_class[likeliest], 0)
        return Voxels(sdf, classes)

    def _capture(self, given: Input) -> tuple[Input, Callable[[], Voxels]]:
        device = next(self.model.parameters()).device
        read = Input(*(x.to(device, copy=True) for x in given))
        beside = torch.cuda.Stream(device)
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            for _ in range(3):
                self.voxels(read)
        torch.cuda.current_stream(device).wait_stream(beside)
        return read, graphs.capture(lambda: self.voxels(read))
