import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from selfocc import distributed, encoder, geometry, protocols
from tests.goldens import load

BOX = (-25.6, 0.0, -2.0, 25.6, 51.2, 4.4)


def test_nodes_stand_at_both_ends():
    nodes = geometry.node_positions(BOX, (5, 9, 3))
    assert nodes.shape == (5, 9, 3, 3)
    assert nodes[0, 0, 0].tolist() == pytest.approx(BOX[:3])
    assert nodes[-1, -1, -1].tolist() == pytest.approx(BOX[3:])
    assert nodes[1, 0, 0, 1] - nodes[0, 0, 0, 1] == pytest.approx(12.8)
    assert geometry.node_spacing(BOX, (5, 9, 3)) == pytest.approx((6.4, 12.8, 3.2))


@pytest.mark.parametrize(
    "case, rays, size",
    [
        ("kitti", (55, 190), (352, 1216)),
        ("nus", (48, 100), (768, 1600)),
        ("raw", (44, 152), (370, 1216)),
    ],
)
def test_cellular_pixels_equal_the_published_ones(case, rays, size):
    golden = load("extra/mapping_and_rays.npz")
    uniform = torch.from_numpy(golden[f"rays_cellular.{case}.u"])
    pixels = geometry.cellular_pixels(rays, size, uniform)
    # float32 pixels up to 1600
    np.testing.assert_allclose(pixels.numpy(), golden[f"rays_cellular.{case}"], atol=2e-4)


def test_spread_is_the_least_share_of_the_image_that_rays_cover():
    for share, covered in ((0.0, 4.0), (0.5, 12.0), (1.0, 20.0)):
        pixels = geometry.cellular_pixels((4, 5), (20, 25), torch.zeros(4), spread=share)
        step = pixels.unflatten(0, (4, 5)).diff(dim=0)[..., 1]
        assert torch.allclose(step, torch.tensor(covered / 4))
    widest = geometry.cellular_pixels((4, 5), (20, 25), torch.ones(4), spread=0.5)
    assert widest.max(0).values.tolist() == [20.0, 15.0]


def test_fixed_pixels_start_at_zero():
    pixels = geometry.fixed_pixels((2, 4), (100, 200))
    assert pixels.tolist() == [[50.0 * u, 50.0 * v] for v in range(2) for u in range(4)]


def test_projection_is_the_inverse_of_rays():
    torch.manual_seed(0)
    intrinsics = torch.tensor([[700.0, 0, 600], [0, 710, 180], [0, 0, 1]], dtype=torch.float64)
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    pose[:3, 3] = torch.randn(3)
    pixels = torch.tensor([[0.0, 0], [600, 180], [1215, 351]])
    origins, directions, stretch = geometry.pixel_rays(pixels, intrinsics, pose)
    assert torch.allclose(directions.norm(dim=1), torch.ones(3))
    depth = torch.tensor([3.0, 7.0, 40.0])
    points = origins + directions * (depth * stretch)[:, None]
    homogeneous = torch.cat([points, torch.ones(3, 1)], 1).double()
    image = homogeneous @ geometry.image_projection(intrinsics, pose).T
    assert torch.allclose(image[:, 2], depth.double(), atol=1e-4)
    assert torch.allclose(image[:, :2] / image[:, 2:3], pixels.double(), atol=1e-2)


def test_image_to_image_takes_points_along():
    other = torch.eye(4, dtype=torch.float64)
    other[2, 3] = 2.0  # two metres ahead
    intrinsics = torch.diag(torch.tensor([100.0, 100, 1], dtype=torch.float64))
    matrix = geometry.image_to_image(intrinsics, torch.eye(4).double(), intrinsics, other)
    moved = matrix @ torch.tensor([10.0 * 5, 20.0 * 5, 5, 1], dtype=torch.float64)
    assert moved[2] == 3 and (moved[:2] / 3).tolist() == pytest.approx([50 / 3, 100 / 3])


def test_ray_box_equals_the_published_one():
    golden = {k: torch.from_numpy(v) for k, v in load("extra/aabb.npz").items()}
    box = tuple(golden["aabb"].flatten().tolist())
    near, far = geometry.ray_box(golden["origins"], golden["directions"], box)
    torch.testing.assert_close(near, golden["nears"])
    torch.testing.assert_close(far, golden["fars"])


def test_ray_that_misses_the_box_has_almost_no_length():
    direction = torch.tensor([0.6, 0.0, 0.8])
    near, far = geometry.ray_box(torch.tensor([0.0, -5, 10]), direction, BOX)
    assert far - near < 1e-5
    near, far = geometry.ray_box(torch.tensor([0.0, 5, 0]), direction, BOX)
    assert near == 0 and far.item() == pytest.approx(5.5, rel=1e-4)


def test_positions_are_exact_where_tf32_is_allowed(monkeypatch):
    settings = torch.backends.cuda.matmul
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    before, seen = settings.allow_tf32, []
    points, matrix = torch.randn(5, 3), torch.randn(2, 4, 4)
    try:
        distributed.tune(torch.device("cpu"))
        assert settings.allow_tf32 == before
        assert distributed.start(torch.device("cuda")) == (0, 1)
        assert settings.allow_tf32 == before and torch.backends.cudnn.benchmark
        distributed.allow_tf32(True)
        assert settings.allow_tf32 and torch.backends.cudnn.allow_tf32
        with Products(lambda: seen.append(settings.allow_tf32)):
            moved = geometry.move_points(points, matrix)
            encoder.project_points(points, matrix[None], (8, 8), (8, 8))
            protocols._read_centres(torch.randn(1, 1, 3, 3, 3), BOX, BOX, (2, 2, 2), matrix[0])
        assert len(seen) == 3 and not any(seen) and settings.allow_tf32
        distributed.allow_tf32(False)
        assert not settings.allow_tf32 and not torch.backends.cudnn.allow_tf32
    finally:
        settings.allow_tf32, torch.backends.cudnn.allow_tf32 = before, True
    expected = torch.einsum("nij,mj->nmi", matrix[:, :3, :3], points) + matrix[:, None, :3, 3]
    torch.testing.assert_close(moved, expected)


class Products(TorchFunctionMode):
    """Tells of every matrix product inside."""

    def __init__(self, tell):
        self.tell = tell

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function in (torch.Tensor.matmul, torch.Tensor.__matmul__):
            self.tell()
        return function(*arguments, **(options or {}))
