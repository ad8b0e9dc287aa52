import dataclasses

import torch

import kernels
from selfocc.config import EncoderConfig, FieldConfig, VolumeConfig
from selfocc.field import FieldDecoder
from selfocc.lift import PixelLift

BOX = (-4.0, 0.0, -2.0, 4.0, 8.0, 2.0)
VOLUME = VolumeConfig(box=BOX, nodes=(9, 9, 5))
ENCODER = EncoderConfig(dim=4, lift=True)
SIZE = (32, 64)


def _camera(behind: bool = False):
    intrinsics = torch.tensor([[32.0, 0, 31.5], [0, 32, 15.5], [0, 0, 1]], dtype=torch.float64)
    pose = torch.eye(4, dtype=torch.float64)
    turn = -1.0 if behind else 1.0  # looking along -y instead of y
    pose[:3, :3] = torch.tensor([[turn, 0, 0], [0, 0, turn], [0, -1, 0]])
    return intrinsics, pose


def _lift(cameras, features):
    lift = PixelLift(ENCODER, VOLUME)
    for linear in lift.position:
        torch.nn.init.zeros_(linear.weight)
    intrinsics, poses = (torch.stack(m)[None] for m in zip(*cameras, strict=True))
    return lift(features, intrinsics, poses, SIZE)


def test_nodes_read_the_pixel_they_project_to():
    """A feature that is the pixel's own column tells at every node where it was read."""
    columns = torch.arange(64.0).expand(1, 1, 4, 32, 64)
    lifted = _lift([_camera()], columns)
    assert lifted.shape == (1, 9, 9, 5, 4)
    y, x, z = 4, 5, 2  # at (1, 4, 0): pixel 32 * 1 / 4 + 31.5
    torch.testing.assert_close(lifted[0, y, x, z], torch.full((4,), 39.5))


def test_unseen_nodes_read_nothing_and_cameras_are_averaged():
    features = torch.ones(1, 2, 4, 32, 64)
    features[:, 1] = 3.0
    both = _lift([_camera(), _camera(behind=True)], features)
    assert (both[0, 4, 4, 2] == 1).all()  # in front of the first camera only
    assert (both[0, 0] == 0).all()  # in the plane of both
    same = _lift([_camera(), _camera()], features)
    assert (same[0, 4, 4, 2] == 2).all()


def test_decoder_adds_lifted_features():
    torch.manual_seed(0)
    decoder = FieldDecoder(FieldConfig(hidden=8), ENCODER, VOLUME)
    planes = [torch.randn(2, 9, 9, 4), torch.randn(2, 5, 9, 4), torch.randn(2, 9, 5, 4)]
    lifted = torch.randn(2, 9, 9, 5, 4)
    hw, zh, wz = planes
    total = hw[:, :, :, None] + zh.transpose(1, 2)[:, :, None] + wz[:, None] + lifted
    expected = decoder.net(total).permute(0, 4, 1, 2, 3)
    torch.testing.assert_close(decoder(planes, lifted), expected)


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
