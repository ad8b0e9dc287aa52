"""Pictures, and a page, of what a model makes of frames, beside the truth."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from selfocc import metrics, page, pictures, protocols
from selfocc.batch import collate
from selfocc.datasets.video import VideoDataset
from selfocc.evaluation import evenly
from selfocc.geometry import Box
from selfocc.labels import label_map, voxel_palette
from selfocc.model import SelfOcc
from selfocc.render import rendered_maps
from selfocc.scores import truth_maps

COLUMN = 320, 1280  # pixels of half a panel, at least to hold captions, at most to play as a video
FRAMES = 40  # of a page at most


class Look:
    """What a model makes of a frame: maps of its cameras, and voxels [ny, nx, nz] on the CPU.

    shape: of the voxels, where the frame has no labels to say so.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: SelfOcc,
        dataset: VideoDataset,
        index: int,
        device: torch.device,
        shape: tuple[int, int, int] | None = None,
    ):
        self.config, training = model.config, model.training
        model.eval()
        self.sequence, frame = dataset.locate(index)
        self.batch = batch = collate([dataset[index]]).to(device)
        volume, voxels, _ = model.see(batch)
        self.depth, self.color = rendered_maps(model, volume, batch.target)
        model.train(training)
        self.images = [pictures.rgb_picture(image) for image in batch.target.images[0]]
        self.width = int(np.clip(len(self.images[:3]) * self.images[0].shape[1], *COLUMN))

        rules, settings = protocols.choose(self.config, "own"), self.config.volume
        self.labels, self.box = None, rules.box or settings.box
        if batch.voxels is not None:
            self.labels = metrics.pool_voxels(batch.voxels[0].cpu(), settings.voxel)
            shape = tuple(self.labels.shape)
        sides, edge = [self.box[a + 3] - self.box[a] for a in (1, 0, 2)], 0.2 * settings.voxel
        shape = shape or tuple(round(side / edge) for side in sides)
        # from the voxels' frame, which is drawn, to the volume's; None if it is the same
        matrix = self.sequence.voxels_to_volume(frame)
        sdf, self.likeliest = protocols.read_voxels(
            voxels, self.config.field.classes, rules, settings.box, shape, matrix
        )
        self.sdf = sdf.cpu()
        self.ahead = batch.target.camera_to_volume[0, 0, :3, 2].cpu().numpy()
        if matrix is not None:
            self.ahead = matrix[:3, :3].T @ self.ahead

    def rig(self, maps: list[np.ndarray], size: int, smooth: bool) -> np.ndarray:
        """One picture of all cameras; as pictures.rig."""
        places = pictures.rig_rows(self.batch.target.camera_to_volume[0].cpu().numpy())
        names = list(self.sequence.camera_names)
        return pictures.rig(maps, places, names, self.width, size, smooth)


def panel(model: SelfOcc, dataset: VideoDataset, index: int, device: torch.device) -> np.ndarray:
    """A picture of one frame, all cameras: image, rendered colour, depth and its error, occupancy.

    Its size is that of all frames of a sequence; what a frame lacks stays white.
    """
    look = Look(model, dataset, index, device)
    batch, depth, size = look.batch, look.depth, pictures.text_size(2 * look.width)

    def cell(maps: list[np.ndarray], text: str, ticks: dict | None = None) -> np.ndarray:
        """Photographs have no ticks."""
        return pictures.caption(look.rig(maps, size, ticks is None), text, size, ticks)

    rows = [[cell(look.images, f"image {batch.name[0]}")]]
    if model.config.field.colors:
        rows[0].append(cell([pictures.rgb_picture(c) for c in look.color[0]], "rendered colour"))
    rendered = [pictures.depth_picture(z) for z in depth[0]]
    rows.append([cell(rendered, "rendered depth", pictures.DEPTH_TICKS)])
    for name, truth in list(truth_maps(batch).items())[:1]:
        errors = [pictures.error_picture(*pair) for pair in zip(depth[0], truth[0], strict=True)]
        text = f"relative error against {name}; dark: unknown"
        rows[1].append(cell(errors, text, pictures.ERROR_TICKS))
    rows += _occupancy_rows(look, size)
    return pictures.tile(rows, 2 * look.width + pictures.GAP)


def _occupancy_rows(look: Look, size: int) -> list[list[np.ndarray]]:
    occupied = look.sdf <= look.config.volume.threshold
    columns = [("predicted", occupied)]
    if look.labels is not None:
        known = look.labels != metrics.UNKNOWN
        columns[0] = ("predicted, where known", occupied & known)
        columns.append(("truth", (look.labels > 0) & known))
    return occupancy_rows(columns, look.box, look.ahead, look.width, size)


def occupancy_rows(
    columns: list[tuple[str, Tensor]], box: Box, ahead: np.ndarray, width: int, size: int
) -> list[list[np.ndarray]]:
    """Named voxels bool [ny, nx, nz] side by side, `width` pixels each: from behind, from above.

    ahead: [3] where the camera looks to; size: of captions.
    """
    drawn = -(-width // -(-width // COLUMN[0]))  # a whole number of pixels each
    rows = []
    for view, ticks in (("behind", None), ("above", pictures.height_ticks(box))):
        cells = []
        for name, grid in columns:
            turned = pictures.facing_y(grid, box, ahead)
            picture = pictures.occupancy_picture(*turned, view, (round(0.6 * drawn), drawn))
            picture = pictures.scaled(picture, width)
            cells.append(pictures.caption(picture, f"{name}, from {view}", size, ticks))
        rows.append(cells)
    return rows


class FlyThrough:
    """Panels of every frame of the first sequence, in order, rendered whenever they are read."""

    def __init__(self, model: SelfOcc, dataset: VideoDataset, device: torch.device):
        self.model, self.device = model, device
        self.frames = VideoDataset.every_frame(dataset.sequences[0], dataset.config)

    def __len__(self) -> int:
        return len(self.frames)

    def __iter__(self) -> Iterator[np.ndarray]:
        for index in range(len(self)):
            yield panel(self.model, self.frames, index, self.device)


def write_page(path: Path, model: SelfOcc, dataset: VideoDataset, device: torch.device) -> Path:
    """Write the page (page.py) of frames of the first sequence, evenly spread, labelled or not."""
    sequence, config = dataset.sequences[0], model.config
    frames, shape = VideoDataset.every_frame(sequence, dataset.config), None
    for frame in list(sequence.labelled)[:1]:  # all have the voxels of the labels
        shape = tuple(n // config.volume.voxel for n in sequence.voxels(frame).shape)
    chosen = tqdm(evenly(frames, FRAMES), desc="page")
    looks = (Look(model, frames, index, device, shape) for index in chosen)
    first = next(looks)
    page.write_page(
        path,
        map(_shown, chain([first], looks)),
        first.box,
        config.volume.threshold,
        f"{config.preset} on {sequence.name}",
        voxel_palette(config.data.dataset),
        first.ahead,
    )
    return path


def _shown(look: Look) -> page.Shown:
    data, size, classes, truth = look.config.data, pictures.text_size(look.width), None, None
    if look.likeliest is not None:
        known = np.array(label_map(data).voxel_classes(data.dataset), np.uint8)
        classes = known[look.likeliest.cpu()]
    if look.labels is not None:
        truth = ((look.labels > 0) & (look.labels != metrics.UNKNOWN)).numpy()
    depth = look.rig([pictures.depth_picture(z) for z in look.depth[0]], size, False)
    maps = {
        "image": look.rig(look.images, size, True),
        f"rendered depth; red: {pictures.NEAREST:g} m or nearer": depth,
    }
    return page.Shown(look.batch.name[0], look.sdf.numpy(), classes, maps, truth)
