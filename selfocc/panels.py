"""Pictures, and a page, of what a model makes of frames, beside the truth."""

from collections.abc import Iterator
from functools import partial
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
    """What a model makes of a frame: maps of its cameras, and voxels [ny, nx, nz] on the CPU."""

    @torch.no_grad()
    def __init__(self, model: SelfOcc, dataset: VideoDataset, index: int, device: torch.device):
        self.config, training = model.config, model.training
        model.eval()
        sequence, frame = dataset.locate(index)
        self.batch = batch = collate([dataset[index]]).to(device)
        volume, voxels, _ = model.see(batch)
        self.depth, self.color = rendered_maps(model, volume, batch.target)
        model.train(training)
        self.images = [pictures.rgb_picture(image) for image in batch.target.images[0]]
        self.width = int(np.clip(len(self.images[:3]) * self.images[0].shape[1], *COLUMN))
        rows = pictures.rig_rows(batch.target.camera_to_volume[0].cpu().numpy())
        names = list(sequence.camera_names)
        self.rig = partial(pictures.rig, rows=rows, names=names, width=self.width)
        rules, settings = protocols.choose(self.config, "own"), self.config.volume
        self.box, edge, self.truth = rules.box or settings.box, 0.2 * settings.voxel, None
        shape = tuple(round((self.box[a + 3] - self.box[a]) / edge) for a in (1, 0, 2))
        if batch.voxels is not None:
            labels = metrics.pool_voxels(batch.voxels[0].cpu(), settings.voxel)
            shape, self.known = tuple(labels.shape), labels != metrics.UNKNOWN
            self.truth = (labels > 0) & self.known
        elif sequence.labelled:  # all frames have the voxels of the labels
            other = sequence.voxels(min(sequence.labelled))
            shape = tuple(n // settings.voxel for n in other.shape)
        # from the voxels' frame, which is drawn, to the volume's; None if it is the same
        matrix = sequence.voxels_to_volume(frame)
        classes, box = self.config.field.classes, settings.box
        read = protocols.read_voxels(voxels, classes, rules, box, shape, matrix)
        self.sdf, self.classes = (None if grid is None else grid.cpu() for grid in read)
        self.ahead = batch.target.camera_to_volume[0, 0, :3, 2].cpu().numpy()
        if matrix is not None:
            self.ahead = matrix[:3, :3].T @ self.ahead

    def shown(self) -> page.Shown:
        """As a frame of a page."""
        data, classes = self.config.data, self.classes
        if classes is not None:
            known = label_map(data).voxel_classes(data.dataset)
            classes = np.array(known, np.uint8)[classes]
        rig, depth = partial(self.rig, size=pictures.text_size(self.width)), self.depth[0]
        views = {"image": rig(self.images, smooth=True)}
        title = f"rendered depth; red: {pictures.NEAREST:g} m or nearer"
        views[title] = rig([pictures.depth_picture(z) for z in depth])
        truth = None if self.truth is None else self.truth.numpy()
        return page.Shown(self.batch.name[0], self.sdf.numpy(), classes, views, truth)


def panel(model: SelfOcc, dataset: VideoDataset, index: int, device: torch.device) -> np.ndarray:
    """A picture of one frame, all cameras: image, rendered colour, depth and its error, occupancy.

    Its size is that of all frames of a sequence; what a frame lacks stays white.
    """
    look = Look(model, dataset, index, device)
    batch, depth, size = look.batch, look.depth, pictures.text_size(2 * look.width)

    def cell(maps: list[np.ndarray], text: str, ticks: dict | None = None) -> np.ndarray:
        """Photographs have no ticks."""
        return pictures.caption(look.rig(maps, size=size, smooth=ticks is None), text, size, ticks)

    rows = [[cell(look.images, f"image {batch.name[0]}")]]
    if model.config.field.colors:
        rows[0].append(cell([pictures.rgb_picture(c) for c in look.color[0]], "rendered colour"))
    rendered = [pictures.depth_picture(z) for z in depth[0]]
    rows.append([cell(rendered, "rendered depth", pictures.DEPTH_TICKS)])
    for name, truth in list(truth_maps(batch).items())[:1]:
        errors = [pictures.error_picture(*pair) for pair in zip(depth[0], truth[0], strict=True)]
        text = f"relative error against {name}; dark: unknown"
        rows[1].append(cell(errors, text, pictures.ERROR_TICKS))
    columns = [("predicted", look.sdf <= look.config.volume.threshold)]
    if look.truth is not None:
        columns = [("predicted, where known", columns[0][1] & look.known), ("truth", look.truth)]
    rows += occupancy_rows(columns, look.box, look.ahead, look.width, size)
    return pictures.tile(rows, 2 * look.width + pictures.GAP)


def occupancy_rows(
    columns: list[tuple[str, Tensor]], box: Box, ahead: np.ndarray, width: int, size: int
) -> list[list[np.ndarray]]:
    """Named voxels bool [ny, nx, nz] side by side, in all `width` pixels, from behind and above;
    the camera looks along `ahead` [3], and captions have this size."""
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
    frames = VideoDataset.every_frame(dataset.sequences[0], dataset.config)
    looks = (Look(model, frames, k, device) for k in tqdm(evenly(frames, FRAMES), desc="page"))
    first, config = next(looks), model.config
    shown = (look.shown() for look in chain([first], looks))
    title = f"{config.preset} on {dataset.sequences[0].name}"
    settings = first.box, config.volume.threshold, title, voxel_palette(config.data.dataset)
    page.write_page(path, shown, *settings, first.ahead)
    return path
