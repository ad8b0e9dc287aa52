import dataclasses
import math

import torch

import kernels
from selfocc import presets
from selfocc.batch import Frames
from selfocc.bench import random_batch
from selfocc.config import EncoderConfig, FieldConfig, VolumeConfig
from selfocc.field import FieldDecoder, ground_sdf
from selfocc.lift import CHANNELS, GAIN, HARMONICS, FrustumLift, centres
from selfocc.model import SelfOcc
from tests.tiny import overrides

BOX = (-4.0, 0.0, -2.0, 4.0, 8.0, 2.0)
VOLUME = VolumeConfig(box=BOX, nodes=(9, 9, 5))
ENCODER = EncoderConfig(dim=4, lift=True)
SIZE = (32, 64)
STAGES = [8, 16, 32, 64]  # their channels
FIELD = FieldConfig(ground=-1.5)


def _camera(behind: bool = False):
    intrinsics = torch.tensor([[32.0, 0, 31.5], [0, 32, 15.5], [0, 0, 1]], dtype=torch.float64)
    pose = torch.eye(4, dtype=torch.float64)
    turn = -1.0 if behind else 1.0  # looking along -y instead of y
    pose[:3, :3] = torch.tensor([[turn, 0, 0], [0, 0, turn], [0, -1, 0]])
    return intrinsics, pose


def _lift(cameras, maps):
    """SDF of the nodes [1, 9, 9, 5] lifted from maps of it [N, bins, h, w], one a camera."""
    lift = FrustumLift(STAGES, ENCODER, VOLUME, FIELD)
    lift._truncated = lambda *_: maps[:, None]
    _say(lift)
    intrinsics, poses = (torch.stack(m)[None] for m in zip(*cameras, strict=True))
    sdfs, features, _ = lift([_said(len(cameras))], intrinsics, poses, SIZE)
    assert features.shape == (1, 9, 9, 5, CHANNELS)
    return sdfs[..., 0]


def _say(lift):
    """Make the first stage what the head says."""
    lift.head = torch.nn.Module()
    lift.head.forward = lambda stages, rays: stages[0]


def _said(cameras=1):
    return torch.zeros(cameras, 1 + CHANNELS * ENCODER.lift_bins, 32, 64)


def _maps(cameras=1):
    return torch.zeros(cameras, ENCODER.lift_bins, 32, 64)


def test_nodes_read_the_pixel_they_project_to():
    """An SDF that is the pixel's own column tells at every node where it was read."""
    sdf = _lift([_camera()], _maps() + torch.arange(64.0))
    assert sdf.shape == (1, 9, 9, 5)
    y, x, z = 4, 5, 2  # at (1, 4, 0): pixel 32 * 1 / 4 + 31.5
    torch.testing.assert_close(sdf[0, y, x, z], torch.tensor(39.5))


def test_nodes_read_the_depth_they_have():
    """An SDF that is the logarithm of its bin's depth is that of the node's depth."""
    near, far = 2.0, math.dist(BOX[:2], BOX[3:5])
    depths = torch.linspace(math.log(near), math.log(far), ENCODER.lift_bins)
    sdf = _lift([_camera()], _maps() + depths[:, None, None])
    for y in (3, 4, 6, 8):
        torch.testing.assert_close(sdf[0, y, 4, 2], torch.tensor(math.log(y)))
    torch.testing.assert_close(sdf[0, 1, 4, 2], torch.tensor(math.log(near)))  # the first bin


def test_unseen_nodes_read_nothing_and_cameras_are_averaged():
    maps = _maps(2) + torch.tensor([1.0, 3.0])[:, None, None, None]
    both = _lift([_camera(), _camera(behind=True)], maps)
    assert (both[0, 4, 4, 2] == 1).all()  # in front of the first camera only
    assert (both[0, 0] == 0).all()  # in the plane of both
    same = _lift([_camera(), _camera()], maps)
    assert (same[0, 4, 4, 2] == 2).all()


def test_a_depth_is_a_truncated_sdf():
    """A wall at 5 m, as pixels say it: with the ground, the SDF of that wall around it, and of
    nothing but the ground far behind, for voxels already a metre behind.
    """
    lift = FrustumLift(STAGES, ENCODER, VOLUME, FIELD)
    _say(lift)
    intrinsics, pose = (matrix[None, None] for matrix in _camera())
    rays, climb = lift._rays((32, 64), intrinsics, pose, SIZE)
    scale = GAIN / math.log(lift.farthest / lift.nearest)
    said = _said()
    wall = math.log(5 / lift.nearest) / math.log(lift.farthest / lift.nearest)
    said[:, 0] = (wall - rays[:, 3].clamp(0, 1.15)) / scale
    depth = lift.depth([said], intrinsics, pose, SIZE)
    torch.testing.assert_close(depth, torch.full_like(depth, 5.0))
    lift.eval()
    sdfs = lift([said], intrinsics, pose, SIZE)[0][0, :, 4, 2]  # at x = 0, z = 0, y = 0 .. 8
    sdf, voxels = (sdfs + ground_sdf(torch.tensor(0.0), FIELD)).mT
    torch.testing.assert_close(sdf[3:7], torch.tensor([1.0, 1, 0, -1]), atol=0.12, rtol=0)
    torch.testing.assert_close(voxels[:6], sdf[:6])
    assert abs(sdf[5]) < 0.01 and sdf[7] < -0.8 and voxels[7] > 0.85
    far = dataclasses.replace(VOLUME, box=(-4.0, 0.0, -2.0, 4.0, 16.0, 2.0))
    lift = FrustumLift(STAGES, ENCODER, far, FIELD)
    width = 1.0  # of the bins around 5 m
    five = torch.full((1, 32, 64), math.log(5 / 2) / math.log(lift.farthest / 2))
    rays, voxels = lift._truncated(five, climb, torch.zeros(1))[0]
    bins = lift._metres(torch.linspace(0, 1, lift.bins))
    assert (rays[bins > 5 + 4 * width] == 0).all() and rays.abs().max() > 0.5
    assert (voxels[bins > 5 + width] == 0).all() and voxels.abs().max() > 0.5


def test_lift_starts_as_the_road():
    torch.manual_seed(0)
    lift = FrustumLift(STAGES, ENCODER, VOLUME, FIELD)
    intrinsics, pose = _camera()
    stages = [torch.randn(1, c, 8 >> k, 16 >> k) for k, c in enumerate(STAGES)]
    cameras = intrinsics[None, None], pose[None, None]
    assert lift(stages, *cameras, SIZE)[1].std() > 0
    depth, pixels = lift.depth(stages, *cameras, SIZE), centres((8, 16), SIZE, None)
    slope = (pixels[-1, 1] - 15.5) / 32  # metres down for a metre ahead
    torch.testing.assert_close(depth[0, 0, -1, -1], 1.73 / slope)


def test_pixels_know_where_they_look():
    lift = FrustumLift(STAGES, ENCODER, dataclasses.replace(VOLUME, ground=-1.5), FIELD)
    intrinsics, pose = _camera()
    rays, climb = lift._rays((32, 64), intrinsics[None, None], pose[None, None], SIZE)
    assert rays.shape == (1, 4 + 2 * len(HARMONICS), 32, 64) and rays.isfinite().all()
    v, u = 27, 40  # 8.5 columns right of the centre and 11.5 rows below it
    ahead = torch.tensor([8.5 / 32, 1.0, -11.5 / 32])
    torch.testing.assert_close(rays[0, :3, v, u], ahead / ahead.norm())
    torch.testing.assert_close(climb[0, v, u], ahead[2])
    road, farthest = 1.5 / (11.5 / 32), math.dist(BOX[:2], BOX[3:5])
    share = math.log(road / 2) / math.log(farthest / 2)
    torch.testing.assert_close(rays[0, 3, v, u], torch.tensor(share))
    torch.testing.assert_close(rays[0, 4, v, u], torch.tensor(math.sin(math.pi * share)))
    torch.testing.assert_close(rays[0, -1, v, u], torch.tensor(math.cos(8 * math.pi * share)))
    assert (rays[0, 3, :16] == 1.25).all()  # above the horizon, no road
    coarse, _ = lift._rays((8, 16), intrinsics[None, None], pose[None, None], SIZE)
    mean = rays[0, :3].unflatten(1, (8, 4)).unflatten(3, (16, 4)).mean((2, 4))
    torch.testing.assert_close(coarse[0, :3], mean, rtol=0, atol=2e-3)  # the same place


def test_what_is_around_a_pixel_and_its_ray_reach_the_head():
    torch.manual_seed(0)
    lift = FrustumLift(STAGES, ENCODER, VOLUME, FIELD)
    stages = [torch.randn(1, c, 8 >> k, 16 >> k, requires_grad=True) for k, c in enumerate(STAGES)]
    rays = torch.randn(1, 4 + 2 * len(HARMONICS), 8, 16, requires_grad=True)
    out = lift.head(stages, rays)
    assert out.shape == (1, 1 + CHANNELS * ENCODER.lift_bins, 8, 16)
    out[0, -1, 0, 0].backward()
    assert all(stage.grad.abs().sum() > 0 for stage in stages)
    assert stages[0].grad[..., 4:, :].abs().sum() == 0  # far away, it sees coarse stages only
    assert rays.grad[..., 0, 0].abs().min() > 0


def test_decoder_adds_lifted_features():
    torch.manual_seed(0)
    decoder = FieldDecoder(FieldConfig(hidden=8), ENCODER, VOLUME)
    planes = [torch.randn(2, 9, 9, 4), torch.randn(2, 5, 9, 4), torch.randn(2, 9, 5, 4)]
    sdf, lifted, mix = torch.randn(2, 9, 9, 5), torch.randn(2, 9, 9, 5, 3), torch.randn(4, 3)
    hw, zh, wz = planes
    total = hw[:, :, :, None] + zh.transpose(1, 2)[:, :, None] + wz[:, None] + lifted @ mix.T
    expected = decoder.net(total).permute(0, 4, 1, 2, 3).clone()
    expected[:, 0] += sdf
    torch.testing.assert_close(decoder(planes, (sdf, lifted), mix), expected, rtol=1e-5, atol=1e-5)


def test_features_are_lifted_at_the_nodes_of_the_planes():
    torch.manual_seed(0)
    fine = FrustumLift(STAGES, dataclasses.replace(ENCODER, stride=(2, 2)), VOLUME, FIELD)
    whole = FrustumLift(STAGES, ENCODER, VOLUME, FIELD)
    for lift in (fine, whole):
        _say(lift)
    frustum = torch.randn(1, 1 + CHANNELS * ENCODER.lift_bins, 32, 64)
    cameras = [matrix[None, None] for matrix in _camera()]
    sdf, features, _ = fine([frustum], *cameras, SIZE)
    expected_sdf, expected, _ = whole([frustum], *cameras, SIZE)
    torch.testing.assert_close(sdf, expected_sdf)
    torch.testing.assert_close(features, expected[:, ::2, ::2])
    planes = [torch.zeros(1, *shape, ENCODER.dim) for shape in ((5, 5), (5, 5), (5, 5))]
    hw, zh, _ = fine.beside(planes)
    for dim, linear in enumerate(fine.position):  # y, x, z of the middle node
        here = linear(getattr(fine, f"features_{dim}"))[2]
        planes[0] = planes[0] + here
    torch.testing.assert_close(hw[0, 2, 2] + zh[0, 2, 2], planes[0][0, 2, 2] + fine.mix.bias)


def test_voxels_are_read_from_the_thinner_of_two_sdfs():
    settings = presets.build("synthetic", overrides())
    model, batch = SelfOcc(settings), random_batch(settings, 0)
    with torch.no_grad():
        volume, voxels, _ = model.see(batch)
        assert voxels is volume  # which training does not need
        model.eval()
        volume, voxels, _ = model.see(batch)
    assert torch.equal(voxels[:, 1:], volume[:, 1:])
    added = voxels[:, 0] - volume[:, 0]
    assert added.max() > 0.3 and added.min() > -1e-6  # free behind what it sees


def test_ground_start_is_a_limited_plane():
    field = FieldConfig(hidden=8, ground=-1.0, rise=0.5)
    decoder = FieldDecoder(field, ENCODER, VOLUME)
    planes = [torch.randn(1, 9, 9, 4), torch.randn(1, 5, 9, 4), torch.randn(1, 9, 5, 4)]
    sdf = decoder(planes)[0, 0]
    assert (sdf[..., 1] == 0).all()  # z = -1
    assert (sdf[..., 0] < 0).all() and (sdf[..., 2:] > 0).all()
    assert sdf.abs().max() <= 0.5
    free = FieldDecoder(dataclasses.replace(field, rise=1e3), ENCODER, VOLUME)(planes)[0, 0]
    torch.testing.assert_close(free[0, 0], torch.tensor([-1.0, 0, 1, 2, 3]), atol=1e-4, rtol=0)


def test_backdrop_stops_what_nothing_else_stops():
    empty = torch.full((1, 4, 5, 5, 5), 50.0)
    rays = dict(
        origins=torch.tensor([[[0.0, 0, 0]]]),
        directions=torch.tensor([[[0.0, 1, 0]]]),
        near=torch.zeros(1, 1),
        far=torch.full((1, 1), 8.0),
        inv_s=torch.tensor(10.0),
        box=BOX,
        samples=16,
        keep_samples=True,
    )
    through = kernels.render_rays(empty, **rays)
    stopped = kernels.render_rays(empty, **rays, backdrop=True)
    assert through.opacity < 0.01
    assert abs(stopped.opacity - 1) < 0.01
    assert abs(stopped.distance - stopped.mids[..., -1]) < 0.01


def test_rays_go_on_beyond_the_volume():
    settings = presets.build(
        "synthetic", overrides(render__margin="4.4,20,1.5", render__margin_top=3, render__bend=0)
    )
    model = SelfOcc(settings).eval()
    volume = torch.full((1, 4, *settings.volume.nodes), 50.0)
    intrinsics = torch.tensor([[32.0, 0, 31.5], [0, 32, 15.5], [0, 0, 1]], dtype=torch.float64)
    pose = torch.eye(4, dtype=torch.float64)  # at the velodyne, looking ahead
    pose[:3, :3] = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    frames = Frames(torch.zeros(1, 1, 3, 32, 64), intrinsics[None, None], pose[None, None])
    down = torch.tensor([[31.5, 31.5]])  # half a metre down for every metre ahead
    ahead, aside = torch.tensor([[31.5, 15.5]]), torch.tensor([[63.5, 15.5]])
    up = torch.tensor([[31.5, -0.5]])
    ends = (down, (2.0 + 1.5) / 0.5), (ahead, 51.2 + 20), (aside, 25.6 + 4.4), (up, (4.4 + 3) / 0.5)
    for pixels, depth in ends:
        seen = model.render(volume, frames, pixels, 400)  # empty: where the backdrop hangs
        assert abs(seen.depth.item() - depth) < 0.1
    volume[..., :1] = -1.0  # what lies at the floor lies below it too
    assert abs(model.render(volume, frames, down, 400).depth.item() - 2.0 / 0.5) < 0.6


def test_where_the_field_of_an_interval_is_read():
    """A wall is seen half an interval behind where it is read, on average over the jitter."""
    wall = 20.0
    intrinsics = torch.tensor([[32.0, 0, 31.5], [0, 32, 15.5], [0, 0, 1]], dtype=torch.float64)
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    frames = Frames(torch.zeros(1, 1, 3, 32, 64), intrinsics[None, None], pose[None, None])
    ahead, jitter = torch.tensor([[31.5, 15.5]]).expand(64, 2), (torch.arange(64) + 0.5) / 64
    for read, behind in ((0.0, 1.0), (0.5, 0.5), (1.0, 0.0)):
        settings = presets.build(
            "synthetic", overrides(render__read=read, render__margin="0,0,0", render__bend=0)
        )
        model = SelfOcc(settings).eval()
        model.inv_s.fill_(1e3)
        y = torch.linspace(0, 51.2, settings.volume.nodes[0])
        volume = torch.zeros(1, 4, *settings.volume.nodes)
        volume[:, 0] = (wall - y)[:, None, None]
        depth = model.render(volume, frames, ahead, 32, jitter[None, None]).depth
        assert abs(depth.mean() - (wall + behind * 51.2 / 32)) < 0.1
