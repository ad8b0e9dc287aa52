import dataclasses

import numpy as np
import pytest
import torch

from selfocc import InputError
from selfocc.config import DataConfig
from selfocc.datasets.video import (
    VideoDataset,
    collate,
    photometric_augmentation,
    project_points,
    resize,
)


class Drive:
    """A car that drives straight ahead, one metre a frame; an image's grey is its frame number."""

    name, missing, inputs = "drive", [], None

    def __init__(self, frames=30, labelled=()):
        self.frames, self.labelled = frames, list(labelled)
        self.path = np.arange(frames, dtype=np.float64)

    def frame_id(self, frame):
        return f"{frame:06d}"

    def cameras(self, frame):
        intrinsics = np.array([[[50.0, 0, 32], [0, 50, 16], [0, 0, 1]]])
        return intrinsics, (self.volume_to_world(frame) @ _camera_to_volume())[None]

    def volume_to_world(self, frame):
        pose = np.eye(4)
        pose[1, 3] = frame
        return pose

    def images(self, frame):
        return np.full((1, 32, 64, 3), frame, np.uint8)

    def depth(self, frame):
        return np.full((1, 32, 64), 5 + frame, np.float32)

    def lidar(self, frame):
        return np.array([[0, 10.0, 0], [0, 20.0, 0], [0, -5.0, 0]], np.float32)

    def semantics(self, frame):
        return None

    def voxels(self, frame):
        return np.zeros((4, 4, 2), np.uint8) if frame in self.labelled else None

    def stereo_pair(self, frame):
        return None


def _camera_to_volume():
    matrix = np.eye(4)
    matrix[:3, :3] = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]
    return matrix


CONFIG = DataConfig(crop=(32, 64), pad=(32, 64), augment=False, past=(0.4, 10), future=(0.4, 20))


def _frame(images):
    return (images.flatten()[0] * 255).round().int().item()


def _anchors(config, draws=400):
    data = VideoDataset([Drive()], config, train=True)
    offsets = []
    for seed in range(draws):
        sample = data[(9, seed)]
        start = int(sample.name[0].split("/")[1])
        anchor = _frame(sample.target.images)
        assert _frame(sample.sources.images[0]) == anchor - 1
        assert _frame(sample.sources.images[1]) == anchor + 1
        # the anchor's camera stands where its frame says, seen from the input frame
        assert sample.target.camera_to_volume[0, 1, 3] == anchor - start
        offsets.append(anchor - start)
    return np.array(offsets)


def test_anchor_windows_and_probabilities():
    offsets = _anchors(CONFIG)
    assert (
        offsets.min() >= -10 and offsets.max() == 18
    )  # frame 29 has no successor, so 28 is the last anchor
    share = (offsets == 0).mean()
    assert abs(share - 0.333) < 0.08
    assert abs((offsets < 0).mean() / (offsets != 0).mean() - 0.2) < 0.08
    assert (_anchors(dataclasses.replace(CONFIG, anchor_input=1.0), 50) == 0).all()


def test_sources_keep_their_distance():
    data = VideoDataset([Drive()], dataclasses.replace(CONFIG, source=(2.5, 40)), train=False)
    sample = data[0]
    frame = _frame(sample.target.images)
    assert [_frame(sample.sources.images[k]) for k in (0, 1)] == [frame - 3, frame + 3]


def test_seed_decides_everything():
    config = dataclasses.replace(CONFIG, augment=True)
    data = VideoDataset([Drive()], config, train=True)
    first, again, other = data[(5, 7)], data[(5, 7)], data[(5, 8)]
    assert torch.equal(first.images, again.images) and first.name == again.name
    assert not torch.equal(first.images, other.images)


def test_evaluation_uses_labelled_frames_and_falls_back_to_itself():
    data = VideoDataset([Drive(labelled=[0, 10])], CONFIG, train=False)
    assert len(data) == 2
    first = data[0]
    assert first.voxels.shape == (4, 4, 2)
    assert _frame(first.sources.images[0]) == 0  # nothing before the first frame
    assert len(VideoDataset([Drive()], CONFIG, train=False)) == 28


def test_future_frames_are_spaced():
    data = VideoDataset([Drive(labelled=[3])], CONFIG, train=False)
    found = [
        (distance, _frame(sample.target.images)) for distance, sample in data.future(0, 10, 1.5)
    ]
    assert found == [(2.0, 5), (4.0, 7), (6.0, 9), (8.0, 11), (10.0, 13)]


def test_lidar_map_keeps_the_nearest_point():
    points = np.array([[0, 10.0, 0], [0, 20.0, 0], [0, -5.0, 0], [1, 10.0, -1]], np.float32)
    to_camera = np.linalg.inv(_camera_to_volume())
    intrinsics = np.array([[50.0, 0, 32], [0, 50, 16], [0, 0, 1]])
    depth = project_points(points, to_camera, intrinsics, (32, 64))
    assert depth[16, 32] == 10 and depth[21, 37] == 10 and np.count_nonzero(depth) == 2


def test_collate_drops_truth_that_one_sample_lacks():
    data = VideoDataset([Drive(labelled=[4, 9])], CONFIG, train=False)
    samples = [data[0], data[1]]
    assert collate(samples).voxels.shape == (2, 4, 4, 2)
    samples[1].voxels = None
    batch = collate(samples)
    assert batch.voxels is None and batch.depth.shape == (2, 1, 32, 64)
    assert batch.sources.images.shape == (2, 2, 1, 3, 32, 64)
    assert batch.name == ["drive/000004", "drive/000009"]


def test_scaled_targets_keep_their_rays():
    config = dataclasses.replace(CONFIG, target_scale=0.5, scale=0.5, pad=(32, 32))
    sample = VideoDataset([Drive()], config, train=False)[0]
    assert sample.images.shape == (1, 3, 32, 32) and sample.target.images.shape == (1, 3, 16, 32)
    assert sample.depth.shape == (1, 16, 32)
    full = torch.tensor([[50.0, 0, 32], [0, 50, 16], [0, 0, 1]], dtype=torch.float64)
    # the centre of the first 2x2 block of pixels is the first small pixel
    ray = torch.linalg.inv(full) @ torch.tensor([0.5, 0.5, 1], dtype=torch.float64)
    small = torch.linalg.inv(sample.target.intrinsics[0]) @ torch.tensor(
        [0.0, 0, 1], dtype=torch.float64
    )
    assert torch.allclose(ray, small)


def test_crop_larger_than_the_image():
    data = VideoDataset([Drive()], dataclasses.replace(CONFIG, crop=(64, 64)), train=False)
    with pytest.raises(InputError, match="smaller than the crop"):
        data[0]


def test_no_usable_frame():
    with pytest.raises(InputError, match="no usable frame"):
        VideoDataset([Drive(frames=2)], CONFIG, train=True)


def test_augmentation_hue_and_identity():
    images = torch.rand(2, 3, 4, 5) * 255
    from selfocc.datasets.video import _shift_hsv

    assert torch.allclose(_shift_hsv(images, 0.0, 1.0), images, atol=1e-3)
    assert torch.allclose(_shift_hsv(images, 120.0, 1.0), images.roll(1, 1), atol=1e-2)
    grey = _shift_hsv(images, 0.0, 0.0)
    assert torch.allclose(grey, images.amax(1, keepdim=True).expand_as(images), atol=1e-3)
    changed = [photometric_augmentation(images, np.random.default_rng(seed)) for seed in range(8)]
    assert any(not torch.equal(image, images) for image in changed)


def test_resize_sizes():
    assert resize(torch.zeros(1, 3, 370, 1216), 0.84).shape[-2:] == (310, 1021)
