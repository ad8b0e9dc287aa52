"""Pictures of what a model makes of a frame, beside the truth."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from selfocc import metrics, pictures, protocols
from selfocc.batch import Batch, collate
from selfocc.datasets.video import VideoDataset
from selfocc.model import SelfOcc
from selfocc.render import rendered_maps
from selfocc.scores import truth_maps

COLUMN = 320, 1280  # pixels of half a panel, at least to hold captions, at most to play as a video


@torch.no_grad()
def panel(model: SelfOcc, dataset: VideoDataset, index: int, device: torch.device) -> np.ndarray:
    """A picture of one frame, all cameras: image, rendered colour, depth and its error, occupancy.

    Its size is that of all frames of a sequence; what a frame lacks stays white.
    """
    training = model.training
    model.eval()
    batch = collate([dataset[index]]).to(device)
    volume, voxels, _ = model.see(batch)
    depth, color = rendered_maps(model, volume, batch.target)
    images = batch.target.images[0]
    width = int(np.clip(len(images[:3]) * images.shape[-1], *COLUMN))
    size = pictures.text_size(2 * width)
    sequence, frame = dataset.locate(index)
    names = list(sequence.camera_names)
    places = pictures.rig_rows(batch.target.camera_to_volume[0].cpu().numpy())

    def cell(maps: list[np.ndarray], text: str, ticks: dict | None = None) -> np.ndarray:
        """Photographs have no ticks."""
        whole = pictures.rig(maps, places, names, width, size, smooth=ticks is None)
        return pictures.caption(whole, text, size, ticks)

    rows = [[cell([pictures.rgb_picture(i) for i in images], f"image {batch.name[0]}")]]
    if model.config.field.colors:
        rows[0].append(cell([pictures.rgb_picture(c) for c in color[0]], "rendered colour"))
    rendered = [pictures.depth_picture(z) for z in depth[0]]
    rows.append([cell(rendered, "rendered depth", pictures.DEPTH_TICKS)])
    for name, truth in list(truth_maps(batch).items())[:1]:
        errors = [pictures.error_picture(*pair) for pair in zip(depth[0], truth[0], strict=True)]
        text = f"relative error against {name}; dark: unknown"
        rows[1].append(cell(errors, text, pictures.ERROR_TICKS))
    rows += _occupancy_rows(model, voxels, batch, sequence.voxels_to_volume(frame), width, size)
    model.train(training)
    return pictures.tile(rows, 2 * width + pictures.GAP)


def _occupancy_rows(
    model: SelfOcc, voxels: Tensor, batch: Batch, matrix: np.ndarray | None, width: int, size: int
) -> list[list[np.ndarray]]:
    """`matrix`: from the voxels' frame, which is drawn, to the volume's; None if it is the same."""
    settings = model.config.volume
    rules = protocols.choose(model.config, "own")
    box = rules.box or settings.box
    edge, labels = 0.2 * settings.voxel, None
    shape = tuple(round((box[a + 3] - box[a]) / edge) for a in (1, 0, 2))
    if batch.voxels is not None:
        labels = metrics.pool_voxels(batch.voxels[0].cpu(), settings.voxel)
        shape = tuple(labels.shape)
    sdf, _ = protocols.read_voxels(voxels, 0, rules, settings.box, shape, matrix)
    occupied = sdf.cpu() <= settings.threshold
    columns = [("predicted", occupied)]
    if labels is not None:
        known = labels != metrics.UNKNOWN
        columns[0] = ("predicted, where known", occupied & known)
        columns.append(("truth", (labels > 0) & known))
    ahead = batch.target.camera_to_volume[0, 0, :3, 2].cpu().numpy()
    if matrix is not None:
        ahead = matrix[:3, :3].T @ ahead
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
