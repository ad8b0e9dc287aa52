"""Scenes of any images, in Python.

model = selfocc.load("street")
scene = model.predict(image, intrinsics, model.level_camera(height=1.65))
scene.voxels, scene.sdf, scene.semantics, scene.depth()
scene.save("scene.html")  # or .ply, .npz
"""

import io
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from selfocc import InputError, checkpoint, counted, distributed, labels, pictures
from selfocc.batch import Frames
from selfocc.datasets import lens, reading
from selfocc.datasets.pixels import for_network, planar
from selfocc.files import write_file
from selfocc.geometry import Box
from selfocc.inference import Input, Predictor, Voxels
from selfocc.mesh import write_ply
from selfocc.model import SelfOcc
from selfocc.page import Shown, write_page
from selfocc.render import rendered_maps
from selfocc.settings import change

WIDTH = 640  # pixels of a picture
TEXT = pictures.text_size(2 * WIDTH)


class ScenePredictor(Predictor):
    """A `Predictor` that also takes images as they come, of any size; see `selfocc.load`."""

    @classmethod
    def load(cls, name: str | Path, device: str | None = None) -> "ScenePredictor":
        saved = checkpoint.load(Path(name))
        config = change(saved.config, ["backbone.weights=none"])
        labels.check_classes(config)
        distributed.allow_tf32(config.optim.tf32)
        model = SelfOcc(config).to(distributed.choose_device(device))
        checkpoint.restore(saved, model)
        return cls(model)

    def voxels(self, seen: Input) -> Voxels:
        found = self.model.see(seen)
        self.volume = found.volume  # of a graph, the memory that it always uses
        return self._read(found.voxels)

    def level_camera(self, height: float, pitch: float = 0.0) -> np.ndarray:
        """camera_to_volume [4, 4] of a camera `height` metres above the ground of the origin.

        It looks along y of a volume that lies ahead, along x of one around; `pitch` degrees down.
        """
        volume, angle = self.model.config.volume, np.deg2rad(pitch)
        forward = np.eye(3)[1 if volume.box[1] + volume.box[4] > 0 else 0]
        down, cos, sin = np.array([0.0, 0.0, -1.0]), np.cos(angle), np.sin(angle)
        axes = np.cross(down, forward), cos * down - sin * forward, cos * forward + sin * down
        return np.c_[[*axes, [0, 0, volume.ground + height]], [0, 0, 0, 1]].T

    @torch.inference_mode()
    def predict(self, images, intrinsics, camera_to_volume) -> "Scene":
        """What the images of one time show. Raises InputError for what cannot be these.

        Args (arrays or tensors; of a rig all of its cameras, in the order of the training data):
            images: RGB [h, w, 3], uint8 or floats in [0, 1], of a rig a list or [N, h, w, 3].
                The network reads the part that `lens.fitted` cuts to its size.
            intrinsics: [3, 3] or [N, 3, 3], pixels of these images, which no lens distorts.
            camera_to_volume: [4, 4] or [N, 4, 4] in the volume's frame, as `level_camera` makes it.
        """
        images, known = _images(images), len(self.model.encoder.camera_embedding)
        if len(images) != known:
            raise InputError(
                f"{counted(len(images), 'image')} given, but the network sees a rig of "
                f"{counted(known, 'camera')} at once; give selfocc.load(..).predict one of each"
            )
        intrinsics = _matrices("intrinsics", intrinsics, known, 3)
        poses = _matrices("camera_to_volume", camera_to_volume, known, 4)
        if (
            not np.allclose(poses[:, 3], [0, 0, 0, 1])
            or reading.not_rotations(poses[:, :3, :3]).any()
        ):
            raise InputError("camera_to_volume is no rotation and translation [R t], 0 0 0 1")
        config, cut = self.model.config, []
        for number, (image, k, pose) in enumerate(zip(images, intrinsics, poses, strict=True)):
            name = f"intrinsics of image {number}"
            if not np.allclose(k, [[k[0, 0], 0, k[0, 2]], [0, k[1, 1], k[1, 2]], [0, 0, 1]]):
                raise InputError(f"{name}: not fx 0 cx, 0 fy cy, 0 0 1")
            reading.check_camera(name, k, image.shape)
            cut.append(lens.fitted(image, k, config.data.crop, lens.horizon_row(k, pose)))
        seen, matrices = zip(*cut, strict=True)
        seen, matrices = for_network(seen, np.stack(matrices), config.data, "the images")
        found = self(seen[None], *(torch.from_numpy(x)[None] for x in (matrices, poses)))
        sdf = found.sdf.clone().cpu().numpy()  # on a GPU the next frame overwrites what is found
        classes = None if found.classes is None else found.classes.byte().cpu().numpy()
        known = self.box, config.volume.threshold, labels.voxel_palette(config.data.dataset)
        volume = self.volume[:, : 1 + config.field.colors].clone()
        return Scene(sdf, classes, *known, images, intrinsics, poses, self.model, volume)


@dataclass(eq=False)
class Scene:
    """What the images of one time show; voxels divide `box` and have the axes (y, x, z)."""

    sdf: np.ndarray  # float32 [ny, nx, nz] metres, the least at a voxel's centre and corners
    semantics: np.ndarray | None  # uint8 [ny, nx, nz] classes of labels.voxel_names; 0 where free
    box: Box
    threshold: float  # a voxel is occupied where its SDF is at most this
    palette: labels.Palette  # names and colours of the classes
    images: list[np.ndarray]  # uint8 [h, w, 3] of N cameras, as they were given
    intrinsics: np.ndarray  # [N, 3, 3]
    camera_to_volume: np.ndarray  # [N, 4, 4]
    model: SelfOcc = field(repr=False)
    volume: Tensor = field(repr=False)  # the field without classes

    @property
    def voxels(self) -> np.ndarray:
        """Which voxels are occupied, bool [ny, nx, nz]."""
        return self.sdf <= self.threshold

    @torch.inference_mode()
    def depth(self, camera: int = 0) -> np.ndarray:
        """z-depth of every pixel of the image that was given, float32 [h, w] metres.

        Rendered on a grid of `render.eval_rays`, which is interpolated.
        """
        matrices = (x[camera][None, None] for x in (self.intrinsics, self.camera_to_volume))
        frames = Frames(planar([self.images[camera]])[None], *map(torch.from_numpy, matrices))
        maps, _ = rendered_maps(self.model, self.volume, frames.to(self.volume.device))
        return maps[0, 0].cpu().numpy()

    @cached_property
    def views(self) -> dict[str, np.ndarray]:
        """The images and their rendered depth, each of all cameras, uint8 [h, WIDTH, 3]."""
        cameras = range(len(self.images))
        depths = [pictures.depth_picture(torch.from_numpy(self.depth(k))) for k in cameras]
        rows, names = pictures.rig_rows(self.camera_to_volume), [f"camera {k}" for k in cameras]
        rig = partial(pictures.rig, rows=rows, names=names, width=WIDTH, size=TEXT)
        return {"image": rig(self.images, smooth=True), "rendered depth": rig(depths)}

    def panel(self, name: str) -> np.ndarray:
        """One picture, uint8 [h, w, 3]: images and depth, and beside them occupied voxels."""
        image, depth = self.views.values()
        turned = torch.from_numpy(self.voxels), self.box, self.camera_to_volume[0, :3, 2]
        behind = pictures.occupancy_picture(*pictures.facing_y(*turned), "behind")
        behind, ticks = pictures.scaled(behind, WIDTH), pictures.height_ticks(self.box)
        image = pictures.caption(image, f"image {name}", TEXT)
        depth = pictures.caption(depth, "rendered depth", TEXT, pictures.DEPTH_TICKS)
        behind = pictures.caption(behind, "occupied, from behind", TEXT, ticks)
        return pictures.tile([[pictures.tile([[image], [depth]]), behind]])

    def save(self, path: str | Path) -> None:
        """Write arrays (.npz), a mesh of the occupied voxels (.ply), or a page in which they can be
        turned (.html). Raises InputError for other endings and full disks."""
        path = Path(path)
        found = dict(sdf=self.sdf, box=self.box, threshold=self.threshold)
        if path.suffix == ".npz":
            found |= {} if self.semantics is None else {"semantics": self.semantics}
            np.savez_compressed(buffer := io.BytesIO(), **found)
            write_file(path, buffer.getvalue())
        elif path.suffix == ".ply":
            write_ply(path, **found, classes=self.semantics, palette=self.palette)
        elif path.suffix == ".html":
            frame = Shown(path.stem, self.sdf, self.semantics, self.views)
            about = self.box, self.threshold, path.stem, self.palette
            write_page(path, [frame], *about, self.camera_to_volume[0, :3, 2])
        else:
            raise InputError(f"{path}: a scene is saved as .npz, .ply or .html")


def _images(given) -> list[np.ndarray]:
    """uint8 [h, w, 3] of every camera, copied: a camera may reuse its memory."""
    several = isinstance(given, list | tuple) or getattr(given, "ndim", 3) == 4
    images = []
    for k, image in enumerate(given if several else [given]):
        image = np.array(image.detach().cpu().numpy() if isinstance(image, Tensor) else image)
        if image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise InputError(f"image {k} has shape {list(image.shape)}, not [h, w, 3]")
        if image.dtype.kind == "f" and image.min() >= 0 and image.max() <= 1:
            image = np.rint(255 * image).astype(np.uint8)
        if image.dtype != np.uint8:
            raise InputError(f"image {k} is {image.dtype}, but neither uint8 nor within 0 and 1")
        images.append(image)
    return images


def _matrices(name: str, given, count: int, edge: int) -> np.ndarray:
    """float64 [count, edge, edge], finite."""
    try:
        matrices = torch.as_tensor(given, dtype=torch.float64, device="cpu").numpy().copy()
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: cannot be read as numbers ({error})") from None
    matrices = matrices[None] if matrices.ndim == 2 else matrices
    if matrices.shape != (count, edge, edge):
        raise InputError(f"{name}: shape {list(matrices.shape)}, not [{count}, {edge}, {edge}]")
    if not np.isfinite(matrices).all():
        raise InputError(f"{name}: not all numbers are finite")
    return matrices
