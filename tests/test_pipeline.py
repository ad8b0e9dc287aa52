"""Images and intrinsics as the published pipeline prepares them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from selfocc.config import DataConfig
from selfocc.datasets.video import VideoDataset

GOLDENS = Path(__file__).parent / "data" / "data_pipeline.npz"
NUSCENES = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}
# resize and normalisation of the recorded pipelines; images are smaller than the published
CASES = {"kitti": {}, "nuscenes": {"scale": 0.5, **NUSCENES}, "kitti_raw": {"scale": 0.84}}


class Still:
    """One frame with the images given [N, h, w, 3], seen by cameras of focal length 100."""

    name, frames, inputs, labelled, missing = "still", 1, [0], [], []
    path, positions = np.zeros(1), np.zeros((1, 3))

    def __init__(self, images):
        self.shown = images

    def frame_id(self, frame):
        return "0"

    def cameras(self, frame):
        intrinsics = np.array([[100.0, 0, 60], [0, 100, 30], [0, 0, 1]])
        return np.stack([intrinsics] * len(self.shown)), np.stack([np.eye(4)] * len(self.shown))

    def volume_to_world(self, frame):
        return np.eye(4)

    def image(self, frame, camera):
        return self.shown[camera]

    def nothing(self, frame):
        return None

    depth = lidar = semantics = voxels = stereo_pair = nothing


@pytest.mark.parametrize("name", CASES)
def test_images_and_intrinsics_as_published(name):
    with np.load(GOLDENS) as goldens:
        bgr, expected = goldens[f"{name}.raw_bgr_uint8"], goldens[f"{name}.input_imgs"]
    config = DataConfig(crop=bgr.shape[1:3], pad=expected.shape[2:], augment=False, **CASES[name])
    sample = VideoDataset([Still(bgr[..., ::-1])], config, train=False)[0]
    # cv2 resizes in float32 too, with another order of the sums
    torch.testing.assert_close(sample.images, torch.from_numpy(expected), rtol=0, atol=1e-5)
    rgb = torch.from_numpy(bgr[..., ::-1].copy()).permute(0, 3, 1, 2)
    shown = sample.to(torch.device("cpu")).target.images
    assert torch.equal(shown, rgb / 255)  # published: BGR / 256
    scale = config.scale
    expected = torch.tensor([[100 * scale, 0, 60 * scale], [0, 100 * scale, 30 * scale], [0, 0, 1]])
    assert torch.allclose(sample.intrinsics[0], expected.double())
    assert torch.equal(sample.target.intrinsics[0, 0, 2], torch.tensor(60.0).double())


@pytest.mark.parametrize(
    ("crop", "pad", "scale", "published"),
    [
        ((370, 1216), (384, 1216), 1.0, (0.96339, 1.0)),
        ((370, 1216), (320, 1024), 0.84, (0.97121, 0.99751)),
        ((768, 1600), (384, 800), 0.5, (1.0, 1.0)),
        ((896, 1600), (448, 800), 0.5, (1.0, 1.0)),
    ],
)
def test_scaled_intrinsics_mean_what_the_published_focal_ratios_say(crop, pad, scale, published):
    """`scale / pad_scale_rate` (y, x) turns shares of the crop into shares of the padded input.

    The published rates are rounded to four digits: a sixteenth of a pixel at most.
    """
    for size, padded, ratio in zip(crop, pad, published, strict=True):
        assert abs(size * scale - ratio * padded) < 1 / 16
