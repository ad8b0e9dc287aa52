"""Pictures of what a model makes of a frame, beside the truth."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from selfocc import metrics, pictures, protocols
from selfocc.datasets.video import Batch, VideoDataset, collate, voxels_to_volume
from selfocc.geometry import Box
from selfocc.model import SelfOcc
from selfocc.render import rendered_maps
from selfocc.scores import truth_maps


@torch.no_grad()
def panel(model: SelfOcc, dataset: VideoDataset, index: int, device: torch.device):
    """A picture of one frame: image, rendered colour, depth and its error, occupancy."""
    training = model.training
    model.eval()
    batch = collate([dataset[index]]).to(device)
    volume = model.volume(batch)
    depth, color = rendered_maps(model, volume, batch.target)
    image = pictures.rgb_picture(batch.target.images[0, 0])
    shown = [pictures.caption(image, f"image {batch.name[0]}")]
    if model.config.field.colors:
        shown.append(pictures.caption(pictures.rgb_picture(color[0, 0]), "rendered colour"))
    rows = [shown, [pictures.caption(pictures.depth_picture(depth[0, 0]), "rendered depth")]]
    for name, truth in truth_maps(batch).items():
        error = pictures.error_picture(depth[0, 0], truth[0, 0])
        rows[1].append(pictures.caption(error, f"relative error against {name}, red is 50 %"))
        break
    matrix = voxels_to_volume(*dataset.locate(index))
    rows += _occupancy_rows(model, volume, batch, matrix)
    model.train(training)
    return pictures.tile(rows)


def _occupancy_rows(
    model: SelfOcc, volume: Tensor, batch: Batch, matrix: Tensor | None
) -> list[list]:
    """`matrix`: from the voxels' frame, which is drawn, to the volume's; None if it is the same."""
    settings = model.config.volume
    rules = protocols.choose(model.config, "own")
    box = rules.box or settings.box
    shape, labels = _labels(model, batch, box)
    sdf, _ = protocols.read_voxels(volume, 0, rules, settings.box, shape, matrix)
    occupied = sdf.cpu() <= settings.threshold
    columns = [("predicted", occupied)]
    if labels is not None:
        known = labels != 255
        columns[0] = ("predicted, where known", occupied & known)
        columns.append(("truth", (labels > 0) & known))
    return [
        [
            pictures.caption(pictures.occupancy_picture(grid, box, view), f"{name}, from {view}")
            for name, grid in columns
        ]
        for view in ("behind", "above")
    ]


def _labels(model: SelfOcc, batch: Batch, box: Box) -> tuple[tuple[int, int, int], Tensor | None]:
    """Shape (ny, nx, nz) of the voxels to show, and their labels if known."""
    if batch.voxels is not None:
        labels = metrics.pool_voxels(batch.voxels[0].cpu(), model.config.volume.voxel)
        return tuple(labels.shape), labels
    edge = 0.2 * model.config.volume.voxel
    return tuple(round((box[a + 3] - box[a]) / edge) for a in (1, 0, 2)), None


def fly_through(
    model: SelfOcc, dataset: VideoDataset, device: torch.device
) -> Iterator[np.ndarray]:
    """Panels of every frame of the first sequence, in order, for a video."""
    sequence = dataset.sequences[0]
    along = VideoDataset.every_frame(sequence, dataset.config)
    for index in range(len(along)):
        yield panel(model, along, index, device)
