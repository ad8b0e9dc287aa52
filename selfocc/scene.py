"""Scenes of any images, in Python.

model = selfocc.load("street")
scene = model.predict(image, intrinsics, model.level_camera(height=1.65))
scene.voxels, scene.sdf, scene.semantics, scene.depth()
scene.save("scene.html")  # or .ply, .npz, .png
"""

import io
from dataclasses import dataclass, field
from functools import partial
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
from selfocc.panels import occupancy_rows
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
        """camera_to_volume [4, 4] of a camera at the origin, `height` metres above the ground.

        It looks along y of a volume that lies ahead, along x of one around; `pitch` degrees down.
        """
        volume, angle = self.model.config.volume, np.deg2rad(pitch)
        along = 1 if volume.box[1] + volume.box[4] > 0 else 0
        forward, down = np.eye(3)[along], np.array([0.0, 0.0, -1.0])
        pose = np.eye(4)
        pose[:3, 0] = np.cross(down, forward)
        pose[:3, 1] = np.cos(angle) * down - np.sin(angle) * forward
        pose[:3, 2] = np.cos(angle) * forward + np.sin(angle) * down
        pose[2, 3] = volume.ground + height
        return pose

    @torch.inference_mode()
    def predict(self, images, intrinsics, camera_to_volume) -> "Scene":
        """What the images of one time show.

        Args (arrays or tensors; of a rig all of its cameras, in the order of the training data):
            images: RGB [h, w, 3], uint8 or floats in [0, 1], of a rig a list or [N, h, w, 3].
                The network reads the part that `lens.fitted` cuts to its size.
            intrinsics: [3, 3] or [N, 3, 3], pixels of these images, which no lens distorts.
            camera_to_volume: [4, 4] or [N, 4, 4] in the volume's frame, as `level_camera` makes it.

        Raises InputError for what cannot be these.
        """
        images = _images(images)
        cameras, known = len(images), len(self.model.encoder.camera_embedding)
        if cameras != known:
            raise InputError(
                f"{counted(cameras, 'image')} given, but the network sees a rig of "
                f"{counted(known, 'camera')} at once; give selfocc.load(..).predict one of each"
            )
        intrinsics = _matrices("intrinsics", intrinsics, cameras, 3)
        poses = _matrices("camera_to_volume", camera_to_volume, cameras, 4)
        for number, (image, k) in enumerate(zip(images, intrinsics, strict=True)):
            name = f"intrinsics of image {number}"
            if not np.allclose(k, [[k[0, 0], 0, k[0, 2]], [0, k[1, 1], k[1, 2]], [0, 0, 1]]):
                raise InputError(f"{name}: not fx 0 cx, 0 fy cy, 0 0 1")
            reading.check_camera(name, k, image.shape)
        rotated = not reading.not_rotations(poses[:, :3, :3]).any()
        if not (rotated and np.allclose(poses[:, 3], [0, 0, 0, 1])):
            raise InputError("camera_to_volume is no rotation and translation [R t], 0 0 0 1")
        config = self.model.config.data
        cut = [
            lens.fitted(image, k, config.crop, lens.horizon_row(k, pose))
            for image, k, pose in zip(images, intrinsics, poses, strict=True)
        ]
        seen, matrices = (list(parts) for parts in zip(*cut, strict=True))
        seen, matrices = for_network(seen, np.stack(matrices), config, "the images")
        found = self(seen[None], *(torch.from_numpy(x)[None] for x in (matrices, poses)))
        classes, colors = found.classes, self.model.config.field.colors
        return Scene(
            sdf=found.sdf.cpu().numpy().copy(),  # on a GPU the next frame overwrites what is found
            semantics=None if classes is None else classes.byte().cpu().numpy(),
            box=self.box,
            threshold=self.model.config.volume.threshold,
            palette=labels.voxel_palette(config.dataset),
            images=images,
            intrinsics=intrinsics,
            camera_to_volume=poses,
            model=self.model,
            volume=self.volume[:, : 1 + colors].clone(),
        )


@dataclass(eq=False)
class Scene:
    """What the images of one time show, in NumPy's arrays.

    Voxels divide `box` and have the axes (y, x, z).
    """

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
    _depths: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def voxels(self) -> np.ndarray:
        """Which voxels are occupied, bool [ny, nx, nz]."""
        return self.sdf <= self.threshold

    @torch.inference_mode()
    def depth(self, camera: int = 0) -> np.ndarray:
        """z-depth of every pixel of the image that was given, float32 [h, w] metres.

        Rendered at the first call, on a grid of `render.eval_rays` that is interpolated.
        """
        if camera not in range(len(self.images)):
            raise InputError(f"there is no camera {camera}; the scene has {len(self.images)}")
        if camera not in self._depths:
            matrices = (x[camera][None, None] for x in (self.intrinsics, self.camera_to_volume))
            frames = Frames(planar([self.images[camera]])[None], *map(torch.from_numpy, matrices))
            maps, _ = rendered_maps(self.model, self.volume, frames.to(self.volume.device))
            self._depths[camera] = maps[0, 0].cpu().numpy()
        return self._depths[camera]

    def views(self) -> dict[str, np.ndarray]:
        """The images and their rendered depth, each of all cameras, uint8 [h, WIDTH, 3]."""
        cameras = range(len(self.images))
        depths = [pictures.depth_picture(torch.from_numpy(self.depth(k))) for k in cameras]
        rows, names = pictures.rig_rows(self.camera_to_volume), [f"camera {k}" for k in cameras]
        rig = partial(pictures.rig, rows=rows, names=names, width=WIDTH, size=TEXT)
        return {"image": rig(self.images, smooth=True), "rendered depth": rig(depths)}

    def panel(self, name: str) -> np.ndarray:
        """One picture, uint8 [h, w, 3], of images, depth and occupancy."""
        image, depth = self.views().values()
        row = [pictures.caption(image, f"image {name}", TEXT)]
        row += [pictures.caption(depth, "rendered depth", TEXT, pictures.DEPTH_TICKS)]
        columns, ahead = [("occupied", torch.from_numpy(self.voxels))], self.camera_to_volume[0]
        behind, above = occupancy_rows(columns, self.box, ahead[:3, 2], WIDTH, TEXT)
        return pictures.tile([row, behind + above])

    def shown(self, name: str) -> Shown:
        """As a frame of a page."""
        return Shown(name, self.sdf, self.semantics, self.views())

    def save(self, path: str | Path) -> None:
        """Write arrays (.npz), a mesh of the occupied voxels (.ply), a page in which they can be
        turned (.html) or a picture (.png). Raises InputError for other endings and full disks."""
        path = Path(path)
        if path.suffix == ".npz":
            classes = {} if self.semantics is None else {"semantics": self.semantics}
            arrays = dict(sdf=self.sdf, box=self.box, threshold=self.threshold, **classes)
            np.savez_compressed(buffer := io.BytesIO(), **arrays)
            write_file(path, buffer.getvalue())
        elif path.suffix == ".ply":
            write_ply(path, self.sdf, self.box, self.threshold, self.semantics, self.palette)
        elif path.suffix == ".html":
            frames, ahead = [self.shown(path.stem)], self.camera_to_volume[0, :3, 2]
            write_page(path, frames, self.box, self.threshold, path.stem, self.palette, ahead)
        elif path.suffix == ".png":
            pictures.write_picture(path, self.panel(path.stem))
        else:
            raise InputError(f"{path}: a scene is saved as .npz, .ply, .html or .png")


def _images(given) -> list[np.ndarray]:
    """uint8 [h, w, 3] of every camera."""
    several = isinstance(given, list | tuple) or getattr(given, "ndim", 3) == 4
    images = []
    for k, image in enumerate(given if several else [given]):
        image = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
        if image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise InputError(f"image {k} has shape {list(image.shape)}, not [h, w, 3]")
        if image.dtype.kind == "f" and image.min() >= 0 and image.max() <= 1:
            image = np.rint(255 * image).astype(np.uint8)
        if image.dtype != np.uint8:
            raise InputError(f"image {k} is {image.dtype}, but neither uint8 nor within 0 and 1")
        images.append(image.copy())  # a camera may reuse its memory
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
