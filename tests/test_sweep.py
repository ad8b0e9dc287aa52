"""The plane sweep that teaches the lift, on surfaces of known depth."""

import torch
import torch.nn.functional as F

from selfocc import presets
from selfocc.batch import Batch, Frames, collate
from selfocc.losses import swept_depth_error
from selfocc.model import SelfOcc
from selfocc.sweep import SKY, Teacher, sweep
from selfocc.training import Passes, make_optimizer, training_step
from tests.tiny import overrides

SIZE = (48, 96)
FOCAL = 60.0


def _pose(forward=0.0, right=0.0):
    """Of a camera that looks along y, z up."""
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    pose[0, 3], pose[1, 3] = right, forward
    return pose


def _view(pose, depth):
    """A wall across the axis at y = depth with a random texture, seen from a pose."""
    torch.manual_seed(0)
    texture = F.interpolate(torch.rand(1, 3, 96, 192), scale_factor=2, mode="bilinear")
    v, u = torch.meshgrid(*(torch.arange(n) + 0.0 for n in SIZE), indexing="ij")
    away = depth - pose[1, 3].item()
    x = (u - 47.5) / FOCAL * away + pose[0, 3].item()
    y = (v - 23.5) / FOCAL * away
    grid = torch.stack([x, y], dim=-1)[None] / (2.2 * depth)
    return F.grid_sample(texture, grid, align_corners=False)[0]


def _batch(depth, target=None):
    """The wall from the origin, from a metre behind and a metre ahead of it to the right."""
    intrinsics = torch.tensor([[FOCAL, 0, 47.5], [0, FOCAL, 23.5], [0, 0, 1]]).double()
    own, poses = _pose(), [_pose(-1, -0.4), _pose(1, 0.4)]

    def frames(*of):
        images = torch.stack([_view(p, depth) for p in of])[:, None]
        return Frames(images, intrinsics.expand(len(of), 1, 3, 3), torch.stack(of)[:, None])

    target, sources = frames(target if target is not None else own), frames(*poses)
    sources = sources.each(lambda x: x[None])
    return Batch(["wall"], target.images, target.intrinsics, own[None, None], target, sources)


def test_depth_of_a_wall():
    for depth in (4.0, 8.0):
        batch = _batch(depth)
        found, sure = sweep(batch.target, batch.sources, 2.0, 60.0)
        assert found.shape == sure.shape == (1, 1, 24, 48)
        inner = (slice(None), slice(None), slice(4, -4), slice(8, -8))
        off = (found[inner] / depth).log().abs()
        assert off.median() < 0.03 and (off < 0.12).float().mean() > 0.95
        assert sure[inner].mean() > 0.8


def test_what_has_no_texture_weighs_nothing_or_is_the_sky():
    batch = _batch(8.0)
    for images in (batch.target.images, batch.sources.images):
        images[..., :10, :] = 0.5
        images[..., 28:, :] = 0.5
    depth, sure = sweep(batch.target, batch.sources, 2.0, 60.0)
    assert sure[..., 17:22, :].max() < 0.05 and sure[..., 8:11, 8:-8].mean() > 0.5
    assert (depth[..., :2, 8:-8] == 120).all() and (sure[..., :2, 8:-8] == SKY).all()
    batch.sources.camera_to_volume[..., 0, 3] += 1000.0  # none sees what the target does
    assert sweep(batch.target, batch.sources, 2.0, 60.0)[1].max() == 0


def test_a_frame_is_swept_once_and_read_at_pixels_of_the_network(monkeypatch):
    batch = _batch(8.0)
    # the network's image is the target's at half its resolution, with a border
    batch.intrinsics = batch.intrinsics.clone()
    batch.intrinsics[..., :2, :] *= 0.5
    teacher, pixels = Teacher(2.0, 60.0), torch.tensor([[20.0, 12.0], [30.0, 8.0], [60.0, 10.0]])
    depth, sure = teacher(batch, pixels)
    assert depth.shape == sure.shape == (1, 1, 3)
    assert ((depth[0, 0, :2] / 8).log().abs() < 0.05).all() and sure[0, 0, :2].min() > 0.5
    assert sure[0, 0, 2] == 0  # pixel 120 of the target, which has 96
    monkeypatch.setattr("selfocc.sweep.sweep", None)
    assert torch.equal(teacher(batch, pixels)[0], depth)
    other = _batch(8.0, target=_pose(0.5))
    assert teacher(other, pixels)[1].max() == 0
    said = torch.full((1, 1, 3), 5.0, requires_grad=True)
    swept_depth_error(said, *teacher(other, pixels)).backward()
    assert (said.grad == 0).all()
    swept_depth_error(said, depth, sure).backward()
    assert (said.grad[0, 0, :2] < 0).all() and said.grad[0, 0, 2] == 0


def test_on_a_gpu_a_batch_is_swept_at_once():
    still, moved = _batch(8.0), _batch(8.0, target=_pose(0.5))
    both = collate([batch.each(lambda x: x[0]) for batch in (still, moved, still)])
    teacher, pixels = Teacher(2.0, 60.0), torch.tensor([[20.0, 12.0], [30.0, 8.0], [95.0, 10.0]])
    depth, sure = teacher._read(both, pixels).unbind(0)
    assert torch.equal(sure[1], torch.zeros(1, 3)) and sure[0].max() > 0.5
    for item in (0, 2):
        expected = teacher(still, pixels)
        torch.testing.assert_close(depth[item], expected[0][0], rtol=1e-3, atol=0)  # kept in half
        torch.testing.assert_close(sure[item], expected[1][0], rtol=1e-3, atol=1e-3)


def test_error_of_depth():
    depth = torch.tensor([2.0, 4.0, 5.0])
    error = swept_depth_error(depth, torch.tensor([4.0, 4.0, 50.0]), torch.tensor([1.0, 1, 0]))
    torch.testing.assert_close(error, torch.tensor(2.0).log() / 3)


def test_first_steps_teach_the_lift_alone():
    settings = presets.build(
        "synthetic", overrides(optim__sweep_steps=2, optim__batch=1, optim__accumulate=1)
    )
    model = SelfOcc(settings).train()
    passes, optimizer = Passes(settings, model), make_optimizer(model, settings.optim)
    batch = _batch(8.0)
    shape = settings.data.pad
    batch.images = F.interpolate(batch.images[:, 0], shape)[:, None]
    before = {name: value.clone() for name, value in model.named_parameters()}
    for step in range(2):  # its last layer is zero at first
        out = training_step(passes, optimizer, iter([batch]), step)
    _, view, losses, norm = out
    assert view is None and list(losses) == ["sweep"] and norm > 0
    changed = {n.partition(".")[0] for n, p in model.named_parameters() if (p != before[n]).any()}
    assert changed == {"backbone", "lift"}
