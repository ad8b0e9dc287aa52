"""Pictures of what a model makes of a frame, beside the truth."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from selfocc import metrics, pictures
from selfocc.datasets.video import Batch, VideoDataset, collate
from selfocc.field import occupancy_grid
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
    rows += _occupancy_rows(model, volume, batch)
    model.train(training)
    return pictures.tile(rows)


def _occupancy_rows(model: SelfOcc, volume: Tensor, batch: Batch) -> list[list]:
    settings = model.config.volume
    shape, labels = _labels(model, batch)
    occupied = occupancy_grid(volume, settings.box, shape).cpu() <= settings.threshold
    columns = [("predicted", occupied[0])]
    if labels is not None:
        known = labels[0] != 255
        columns[0] = ("predicted, where known", occupied[0] & known)
        columns.append(("truth", (labels[0] > 0) & known))
    return [
        [
            pictures.caption(
                pictures.occupancy_picture(grid, settings.box, view), f"{name}, from {view}"
            )
            for name, grid in columns
        ]
        for view in ("behind", "above")
    ]


def _labels(model: SelfOcc, batch: Batch) -> tuple[tuple[int, int, int], Tensor | None]:
    """Shape [ny, nx, nz] of the voxels to show, and the labels [B, ...] of these if known."""
    if batch.voxels is not None:
        labels = torch.stack(
            [metrics.pool_voxels(v, model.config.volume.voxel) for v in batch.voxels.cpu()]
        )
        return tuple(labels.shape[1:]), labels
    box = model.config.volume.box
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
