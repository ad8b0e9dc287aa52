import colorsys
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from selfocc import InputError
from selfocc.batch import Sequence, collate
from selfocc.config import DataConfig
from selfocc.datasets.loader import _tensor_bytes, read_ahead
from selfocc.datasets.pixels import _shift_hsv, augment, resize
from selfocc.datasets.video import VideoDataset, project_points


class Drive(Sequence):
    """A car that drives straight ahead, one metre a frame; an image's grey is its frame number."""

    name = "drive"

    def __init__(self, frames=30, labelled=()):
        self.frames, self.labelled = frames, list(labelled)
        self.path = np.arange(frames, dtype=np.float64)
        self.positions = np.stack([np.zeros(frames), self.path, np.zeros(frames)], 1)
        self.read = []  # (frame, camera) of every image that was asked for

    def frame_id(self, frame):
        return f"{frame:06d}"

    def cameras(self, frame):
        intrinsics = np.array([[[50.0, 0, 32], [0, 50, 16], [0, 0, 1]]])
        return intrinsics, (self.volume_to_world(frame) @ _camera_to_volume())[None]

    def volume_to_world(self, frame):
        pose = np.eye(4)
        pose[1, 3] = frame
        return pose

    def image(self, frame, camera):
        self.read.append((frame, camera))
        return np.full((32, 64, 3), frame, np.uint8)

    def depth(self, frame):
        return np.full((1, 32, 64), 5 + frame, np.float32)

    def lidar(self, frame):
        return np.array([[0, 10.0, 0], [0, 20.0, 0], [0, -5.0, 0]], np.float32)

    def voxels(self, frame):
        return np.zeros((4, 4, 2), np.uint8) if frame in self.labelled else None


def _camera_to_volume():
    matrix = np.eye(4)
    matrix[:3, :3] = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]
    return matrix


CONFIG = DataConfig(crop=(32, 64), pad=(32, 64), augment=False, past=(0.4, 10), future=(0.4, 20))


def _frame(images):
    return images.flatten()[0].item()


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


def test_every_tensor_of_a_batch_is_pinned(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.double() + 1)
    batch = collate([VideoDataset([Drive()], CONFIG, train=False)[3]])
    pinned = batch.pin_memory()
    for name in ("images", "intrinsics", "camera_to_volume", "depth", "lidar"):
        assert torch.equal(getattr(pinned, name), getattr(batch, name).double() + 1), name
    for name in ("images", "intrinsics", "camera_to_volume"):
        for frames in ("target", "sources"):
            before, after = (getattr(getattr(b, frames), name) for b in (batch, pinned))
            assert torch.equal(after, before.double() + 1), (frames, name)


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


@pytest.mark.parametrize("hue", [-30, -18, -7, 0, 7, 18, 30])
@pytest.mark.parametrize("saturation", [0.0, 0.8, 1.0, 1.2])
def test_hue_and_saturation_are_those_of_hsv(hue, saturation):
    pixels = torch.rand(3, 500, generator=torch.Generator().manual_seed(0))
    pixels[:, :3] = torch.tensor([[0.5, 0, 1], [0.5, 0, 0], [0.5, 0, 1]])  # grey, black, two alike
    expected = []
    for rgb in pixels.double().T.tolist():
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        expected.append(colorsys.hsv_to_rgb((h + hue / 360) % 1, min(s * saturation, 1), v))
    pixels *= 255
    _shift_hsv(pixels, hue, saturation)
    assert torch.allclose(pixels.double().T, torch.tensor(expected).double() * 255, atol=1e-3)


def test_augmentation_changes_all_cameras_alike():
    images = (torch.rand(1, 3, 40, 50) * 255).expand(2, -1, -1, -1)
    changed = [images.clone() for _ in range(8)]
    for seed, ours in enumerate(changed):
        augment(ours, np.random.default_rng(seed))
        assert torch.equal(*ours)
    assert len({ours.sum().item() for ours in changed}) > 5


def test_resize_sizes():
    assert resize(torch.zeros(1, 3, 370, 1216).byte(), 0.84).shape[-2:] == (310, 1021)


@pytest.mark.parametrize("size", [(24, 32), (24, 33), (25, 32)])
def test_half_the_size_is_bilinear(size):
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    half = [n // 2 for n in size]
    expected = F.interpolate(images.float(), half, mode="bilinear", align_corners=False)
    assert torch.equal(resize(images, 0.5), expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_are_not_resized_travel_as_bytes(workers):
    data = VideoDataset([Drive()], dataclasses.replace(CONFIG, scale=0.5, pad=(20, 40)), train=True)
    keys = [[(9, 0), (12, 1)]]
    batch = next(iter(read_ahead(data, workers, batch_sampler=keys, collate_fn=collate)))
    moved = batch.to(torch.device("cpu"))
    for frames, sent in ((moved.target, batch.target), (moved.sources, batch.sources)):
        assert sent.images.dtype == torch.uint8 and sent.images.is_contiguous()
        assert frames.images.dtype == torch.float32
        assert torch.equal(frames.images, sent.images.float() / 255)
    assert torch.equal(moved.to(torch.device("cpu")).target.images, moved.target.images)
    assert _tensor_bytes(batch.target.images) == 2 * 3 * 32 * 64
    # the network's are floats, smaller here and padded with zeros
    assert batch.images.shape == (2, 1, 3, 20, 40) and batch.images[..., 16:, :].eq(0).all()
    small = VideoDataset([Drive()], dataclasses.replace(CONFIG, target_scale=0.5), train=True)
    assert torch.equal(small[9, 0].target.images * 255, data[9, 0].target.images[..., ::2, ::2])


class Ring(Drive):
    """Three cameras."""

    def cameras(self, frame):
        intrinsics, camera_to_world = super().cameras(frame)
        return intrinsics.repeat(3, 0), camera_to_world.repeat(3, 0)


def test_composite_sources_are_drawn_for_each_camera():
    drive = Ring()
    drive.path = drive.path / 4  # four frames a metre, but images and cameras stay as they were
    config = dataclasses.replace(
        CONFIG, neighbours="composite", anchor_input=1.0, past=(0.2, 10), source=(0.2, 3)
    )
    data = VideoDataset([drive], config, train=True)
    steps = []
    for seed in range(150):
        sample = data[(9, seed)]
        frame = int(sample.name[0].split("/")[1])
        for side, sign in enumerate((-1, 1)):
            sources = sample.sources.images[side][:, 0, 0, 0].numpy().astype(int) - frame
            # each camera stands where the frame of its own image says
            assert np.array_equal(sample.sources.camera_to_volume[side, :, 1, 3], sources)
            steps.append(sign * sources)
    steps = np.array(steps).astype(int)
    assert steps.min() == 1 and steps.max() <= 12
    assert (steps[:, 0] != steps[:, 1]).mean() > 0.4
    metres = np.arange(1, 13) / 4
    expected = np.exp(-((metres - 0.5) ** 2) / (2 * 0.5**2))
    shares = np.bincount(steps.ravel(), minlength=13)[1:] / steps.size
    assert np.abs(shares - expected / expected.sum()).max() < 0.05


def test_an_image_is_read_once_for_all_that_show_it():
    drive = Ring()
    config = dataclasses.replace(CONFIG, neighbours="composite", anchor_input=1.0)
    VideoDataset([drive], config, train=True)[(9, 0)]
    assert len(drive.read) == len(set(drive.read)) >= 6


def test_straight_distance_ends_at_the_first_frame_beyond():
    drive = Drive()
    # out for 15 m and back: frame 29 - f is beside frame f
    drive.positions[:, 1] = np.minimum(np.arange(30), 29 - np.arange(30))
    config = dataclasses.replace(CONFIG, distance="straight", source=(2.5, 6), future=(0.4, 5))
    data = VideoDataset([drive], config, train=True)
    before, after = data._either_side(drive, 5, (2.5, 4))
    assert before.tolist() == [2, 1] and after.tolist() == [8, 9]
    assert [side[0] for side in data._either_side(drive, 14, (2.5, 6))] == [11, 18]


def test_one_sided_frames():
    config = dataclasses.replace(CONFIG, one_sided=True, anchor_input=1.0)
    data = VideoDataset([Drive(frames=2)], config, train=True)
    for index, other in ((0, 1), (1, 0)):
        sample = data[(index, 0)]
        assert _frame(sample.target.images) == index
        assert [_frame(images) for images in sample.sources.images] == [other, other]


class Stereo(Drive):
    """Images of the other eye are 100 brighter; frames from 20 on have none."""

    def has_other_eye(self, frame):
        return frame < 20

    def other_eye(self, frame):
        intrinsics, camera_to_world = self.cameras(frame)
        camera_to_world[:, 0, 3] += 0.5
        return intrinsics, camera_to_world, self.image(frame, 0)[None] + 100


def test_the_other_eye_replaces_a_source():
    config = dataclasses.replace(CONFIG, stereo_source=True, anchor_input=1.0)
    data = VideoDataset([Stereo()], config, train=True)
    # also the first frame; but nothing is after the last, which has no other eye
    assert [frame for _, frame in data.index] == list(range(29))
    seen = [data[(9, seed)].sources for seed in range(300)]
    kinds = [tuple(_frame(images) >= 100 for images in sources.images) for sources in seen]
    shares = [kinds.count(kind) / 300 for kind in ((False, False), (True, False), (False, True))]
    assert np.abs(np.array(shares) - 1 / 3).max() < 0.08
    for sources, kind in zip(seen, kinds, strict=True):
        assert np.array_equal(sources.camera_to_volume[:, 0, 0, 3] == 0.5, kind)
    first = [data[(0, seed)] for seed in range(20)]
    assert all(_frame(sample.sources.images[0]) == 100 for sample in first)


def slow(kind, frames, step):
    drive = kind(frames=frames)
    drive.path, drive.positions = drive.path * step, drive.positions * step
    return drive


@pytest.mark.parametrize("drive, changes, remedies", [
    # the preset kitti_raw with the left eye alone
    (slow(Drive, 8, 0.2), {"source": (1, 5), "stereo_source": True, "anchor_input": 1.0},
     "one_sided=true would use 6, --set data.source=0.4,5 would use 4"),
    (Drive(3), {"anchor_input": 0.0}, "one_sided=true would use 3, "
     "--set data.anchor_input=0.5 would use 1"),
    (slow(Stereo, 3, 1), {"source": (2, 5)},
     "one_sided=true would use 2, --set data.stereo_source=true would use 2, "
     "--set data.source=0.5,5 would use 1"),
    (slow(Drive, 8, 50), {}, "data.source=0.4,100 would use 6"),
    (slow(Drive, 8, 0.01), {}, "drive, has 8 frames on 0.1 m; choose more"),
    (Drive(1), {}, "drive, has 1 frame on 0.0 m; choose more"),
])  # fmt: skip
def test_what_can_never_be_drawn_is_refused_with_what_would_help(drive, changes, remedies):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(InputError) as refusal:
        VideoDataset([drive], config, train=True)
    assert refusal.value.line().startswith("no usable frame in drive: they, or the frames to")
    assert remedies in refusal.value.line()


@pytest.mark.parametrize("changes", [
    {}, {"anchor_input": 0.0}, {"anchor_input": 0.0, "anchor_past": 0.0}, {"one_sided": True},
    {"stereo_source": True}, {"anchor_input": 0.0, "anchor_past": 1.0, "stereo_source": True},
    {"source": (6, 8), "anchor_input": 0.0},
])  # fmt: skip
def test_every_index_can_be_drawn(changes, monkeypatch):
    """Frames left out are told, and every other is some seed's own."""
    monkeypatch.setattr(VideoDataset, "_sample", lambda self, sequence, frame, *_: frame)
    config = dataclasses.replace(CONFIG, **changes)
    data = VideoDataset([Stereo(14), slow(Stereo, 30, 0.01)], config, train=True)
    for index, (s, frame) in enumerate(data.index):
        assert s == 0 and any(data[index, seed] == frame for seed in range(60)), frame
    (note,) = data.notes
    count = len(data)
    assert note.startswith(f"{44 - count} of 44 frames of drive, .. are left out")


def test_notes_are_those_of_sequences_where_nothing_is_left_out():
    drive = Drive()
    drive.missing, drive.inputs = ["no voxels"], [4, 5]
    assert VideoDataset([drive, drive], CONFIG, train=True).notes == ["no voxels"]
    drive.inputs = [0, 4]
    notes = VideoDataset([drive], CONFIG, train=True).notes
    assert notes == ["no voxels", "1 of 2 frames of drive are left out: they, or the frames to "
                     "render for them, have no frame 0.4 to 40 m before and after them; "
                     "--set data.one_sided=true would use 1"]  # fmt: skip
    assert VideoDataset([drive], CONFIG, train=False).notes == ["no voxels"]


def test_drawing_ends(monkeypatch):
    data = VideoDataset([Drive()], CONFIG, train=True)
    monkeypatch.setattr(data, "_draw_sources", lambda *_: None)
    with pytest.raises(InputError, match=r"data\.anchor_input, 0\.333, is too small"):
        data[(0, 0)]


def test_all_frames_of_a_sequence_that_stands_still():
    data = VideoDataset.every_frame(slow(Drive, 4, 0), CONFIG)
    assert len(data) == 4 and data[3].name == ["drive/000003"]


class Sizes(Drive):
    """Two cameras that see the same ramps, one with twice the columns and 1.5 times the rows."""

    def cameras(self, frame):
        intrinsics, camera_to_world = super().cameras(frame)
        large = intrinsics[0].copy()
        large[0, [0, 2]] = 100, 64.5
        large[1, [1, 2]] = 75, 24.25
        return np.stack([intrinsics[0], large]), camera_to_world.repeat(2, 0)

    def _map(self, camera):
        """The slopes x / z and y / z of every pixel's ray."""
        rows, cols = ((32, 64), (48, 128))[camera]
        k = self.cameras(0)[0][camera]
        v, u = np.mgrid[:rows, :cols]
        return (u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1]

    def image(self, frame, camera):
        across, down = self._map(camera)
        colours = [across * 100 + 120, down * 100 + 120, np.full_like(across, frame)]
        return np.stack(colours, -1).round().astype(np.uint8)

    def depth(self, frame):
        return [(self._map(camera)[0] + 2).astype(np.float32) for camera in (0, 1)]

    def semantics(self, frame):
        return [(self._map(camera)[1] > 0).astype(np.uint8) for camera in (0, 1)]


def test_cameras_of_a_rig_may_differ_in_size():
    drive = Sizes()
    sample = VideoDataset([drive], CONFIG, train=False)[4]
    assert sample.images.shape == (2, 3, 32, 64) == sample.target.images.shape
    assert torch.equal(sample.intrinsics, sample.target.intrinsics)
    small, large = sample.target.images.float() / 255
    assert torch.allclose(sample.intrinsics[1], sample.intrinsics[0], atol=1e-9)
    assert (large - small).abs()[:, 1:-1, 1:-1].max() < 1.01 / 255  # rounded to bytes
    assert (sample.depth[1] - sample.depth[0]).abs().max() < 0.011  # half a pixel of the larger
    assert torch.equal(sample.semantics[0], sample.semantics[1])
    assert torch.equal(sample.lidar[0], sample.lidar[1]) and sample.lidar[0].count_nonzero() == 1
    composite = dataclasses.replace(CONFIG, neighbours="composite", crop=(24, 48), pad=(24, 48))
    sources = VideoDataset([drive], composite, train=True)[(4, 0)].sources
    assert sources.images.shape == (2, 2, 3, 24, 48)
    with pytest.raises(InputError, match="has 32x64 pixels, smaller than the crop 48x64"):
        VideoDataset([drive], dataclasses.replace(CONFIG, crop=(48, 64)), train=False)[0]


def test_supervision_may_be_cropped_differently():
    config = dataclasses.replace(CONFIG, crop=(24, 64), pad=(24, 64), target_crop=(32, 60))
    sample = VideoDataset([Drive()], config, train=False)[0]
    assert sample.images.shape == (1, 3, 24, 64)
    assert sample.target.images.shape == (1, 3, 32, 60) == sample.sources.images[0].shape
    assert sample.depth.shape == sample.lidar.shape == (1, 32, 60)
