"""The photometric functions against their meaning; the recorded numbers are in test_losses."""

import math

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import naive, proposals


def scene(
    batch=2, cameras=2, count=2, rays=9, samples=6, size=(8, 11), dtype=torch.float64, seed=0
):
    """Arguments of `epipolar_photometric`; some proposals are outside the sources and some behind
    them.
    """
    torch.manual_seed(seed)
    height, width = size
    weights = torch.rand(batch, cameras, rays, samples, dtype=dtype)
    depths = 0.3 + 5 * torch.rand(batch, cameras, rays, samples, dtype=dtype).sort(-1).values
    pixels = torch.rand(rays, 2, dtype=dtype) * torch.tensor([width - 1.0, height - 1.0])
    target = torch.rand(batch, cameras, rays, 3, dtype=dtype)
    sources = torch.rand(batch, count, cameras, 3, *size, dtype=dtype)
    intrinsics = torch.eye(4, dtype=torch.float64)
    intrinsics[0, 0] = intrinsics[1, 1] = width * 0.6
    intrinsics[0, 2], intrinsics[1, 2] = width / 2, height / 2
    moves = torch.eye(4, dtype=torch.float64).repeat(batch, count, cameras, 1, 1)
    moves[..., :3, 3] = torch.randn(batch, count, cameras, 3, dtype=torch.float64)
    projections = intrinsics @ moves @ intrinsics.inverse()
    return weights, depths, pixels, target, sources, projections


@pytest.mark.parametrize("published_pixels", [False, True])
@pytest.mark.parametrize("combine", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_values_and_gradients_are_those_of_the_formulas(combine, published_pixels, seed):
    weights, *rest = scene(seed=seed, count=1 + seed % 3, samples=1 + seed)
    weights.requires_grad_()
    options = dict(combine=combine, published_pixels=published_pixels)
    result = kernels.epipolar_photometric(weights, *rest, **options)
    expected = naive.epipolar_photometric(weights, *rest, **options)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert result[2].any()
    factors = [torch.randn_like(x) for x in expected[:2]]
    grads = [
        torch.autograd.grad(
            sum((x * f).sum() for x, f in zip(out[:2], factors, strict=True)), weights
        )[0]
        for out in (result, expected)
    ]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("combine", [False, True])
def test_render_photometric(combine):
    _, _, pixels, target, sources, projections = scene(rays=3, count=1 + combine)
    volume = torch.randn(2, 6, 4, 5, 3, dtype=torch.float64)
    lines = dict(near=torch.rand(2, 6).double(), far=2 + torch.rand(2, 6).double())
    lines |= dict(origins=torch.rand(2, 6, 3).double(), stretch=1 + torch.rand(2, 6).double())
    lines |= dict(directions=F.normalize(torch.randn(2, 6, 3).double(), dim=-1))
    views = dict(pixels=pixels, target=target, sources=sources, projections=projections)
    options = dict(box=(-1, -2, -1, 2, 2, 1), samples=7, jitter=torch.rand(2, 6).double())
    options |= dict(classes=2, backdrop=combine, combine=combine, published_pixels=combine)
    arguments = dict(volume=volume, inv_s=torch.tensor(3.0).double(), **lines, **views, **options)
    seen, *found = kernels.render_photometric(**arguments)
    expected, *others = naive.render_photometric(**arguments)
    for name in ("distance", "opacity", "color", "semantics", "eikonal"):
        torch.testing.assert_close(getattr(seen, name), expected[name], msg=name)
    for a, b in zip(found, others, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    weights, *rest = scene(batch=1, cameras=1, rays=3, samples=4)
    function = lambda w: kernels.epipolar_photometric(w, *rest)[:2]  # noqa: E731
    assert torch.autograd.gradcheck(function, (weights + 0.1).requires_grad_())


@pytest.mark.parametrize("combine", [False, True])
def test_chunks_change_nothing(combine, monkeypatch):
    arguments = scene()
    whole = kernels.epipolar_photometric(*arguments, combine=combine)
    monkeypatch.setattr(proposals, "CHUNK", 100)
    for a, b in zip(whole, kernels.epipolar_photometric(*arguments, combine=combine), strict=True):
        torch.testing.assert_close(a, b)


def test_a_batch_is_its_samples():
    weights, depths, pixels, target, sources, projections = scene(dtype=torch.float32)
    whole = kernels.epipolar_photometric(weights, depths, pixels, target, sources, projections)
    for b in range(2):
        one = slice(b, b + 1)
        single = kernels.epipolar_photometric(
            weights[one], depths[one], pixels, target[one], sources[one], projections[one]
        )
        for a, s in zip(whole, single, strict=True):
            torch.testing.assert_close(a[one], s)


def test_rays_that_no_source_sees_are_marked():
    weights, depths, pixels, target, sources, projections = scene()
    projections = projections.clone()
    projections[0, 1, :, 2, 3] = -100.0
    l1, color, valid = kernels.epipolar_photometric(
        weights, depths, pixels, target, sources, projections
    )
    assert not valid[0, 1].any() and valid[0, 0].any()
    assert l1[0, 1].eq(0).all() and color[0, 1].eq(0).all()
    _, _, either = kernels.epipolar_photometric(
        weights, depths, pixels, target, sources, projections, combine=True
    )
    torch.testing.assert_close(either, valid.any(1, keepdim=True))


def test_an_invalid_ray_stays_alone():
    weights, depths, *rest = scene()
    clean = kernels.epipolar_photometric(weights, depths, *rest)
    depths = depths.clone()
    depths[0, 0, 2] = math.nan
    dirty = kernels.epipolar_photometric(weights, depths, *rest)
    keep = torch.ones(2, 2, 2, 9, dtype=torch.bool)
    keep[0, :, 0, 2] = False
    for a, b in zip(clean, dirty, strict=True):
        torch.testing.assert_close(a[keep], b[keep])
    assert not dirty[2][~keep].any()


def test_no_rays():
    l1, color, valid = kernels.epipolar_photometric(*scene(rays=0))
    assert l1.shape == valid.shape == (2, 2, 2, 0) and color.shape == (2, 2, 2, 0, 3)


def test_bad_input_names_the_argument():
    arguments = list(scene())
    for place, name in (
        (1, "depths"),
        (2, "pixels"),
        (3, "target"),
        (4, "sources"),
        (5, "projections"),
    ):
        bad = list(arguments)
        bad[place] = bad[place][1:]
        with pytest.raises(ValueError, match=name):
            kernels.epipolar_photometric(*bad)


def test_pixels_are_read_where_they_are():
    image = torch.arange(12.0, dtype=torch.float64).view(1, 1, 3, 4)
    pixels = torch.tensor([[[0.0, 0.0], [3.0, 2.0], [1.5, 1.0], [9.0, 9.0]]], dtype=torch.float64)
    torch.testing.assert_close(
        kernels.sample_image(image, pixels)[0, :, 0], image.new_tensor([0.0, 11.0, 5.5, 11.0])
    )
    published = kernels.sample_image(image, pixels, published_pixels=True)[0, :, 0]
    u, v = pixels[0, :3, 0] * 3 / 4, pixels[0, :3, 1] * 2 / 3
    torch.testing.assert_close(published[:3], u + 4 * v)
    assert torch.autograd.gradcheck(
        lambda p: kernels.sample_image(image, p), (pixels[:, 2:3] + 0.1).requires_grad_()
    )


def test_ssim_l1():
    torch.manual_seed(0)
    x, y = (
        torch.rand(2, 4, 3, 5, 6, dtype=torch.float64),
        torch.rand(2, 4, 3, 5, 6, dtype=torch.float64),
    )
    assert kernels.ssim_l1(x, x).abs().max() < 1e-12
    torch.testing.assert_close(kernels.ssim(x, y), naive.ssim(x, y))
    torch.testing.assert_close(kernels.ssim_l1(x, y), naive.ssim_l1(x, y))
    torch.testing.assert_close(kernels.ssim_l1(x, y)[1, 2], kernels.ssim_l1(x[1, 2], y[1, 2]))
    assert torch.autograd.gradcheck(kernels.ssim_l1, (x[0, 0].requires_grad_(), y[0, 0]))


def test_least_photometric():
    torch.manual_seed(0)
    rays = (3, 4)
    color, target = torch.rand(2, 2, 1, 12, 3).double(), torch.rand(2, 1, 12, 3).double()
    l1, identity = torch.rand(2, 2, 1, 12).double(), torch.rand(2, 3, 1, 12, 3).double()
    valid = torch.rand(2, 2, 1, 12) < 0.6

    options = dict(valid=valid, identity=identity, unseen=9.0)
    for given in (options, {}):
        for count in (1, 2):  # sources
            seen = {k: x[:, :count] if k == "valid" else x for k, x in given.items()}
            arguments = color[:, :count], l1[:, :count], target, rays
            found = kernels.least_photometric(*arguments, **seen)
            torch.testing.assert_close(found, naive.least_photometric(*arguments, **seen))
    assert torch.autograd.gradcheck(
        lambda c, e: kernels.least_photometric(
            c, e, target, rays, valid=valid, identity=identity
        ).clamp(max=10),
        (color.requires_grad_(), l1.requires_grad_()),
    )


@pytest.mark.parametrize("name", ["color", "l1", "target", "rays", "valid", "identity"])
def test_least_photometric_names_bad_input(name):
    good = dict(color=torch.rand(1, 2, 1, 12, 3), l1=torch.rand(1, 2, 1, 12), rays=(3, 4))
    good |= dict(target=torch.rand(1, 1, 12, 3), valid=torch.rand(1, 2, 1, 12) > 0)
    good |= dict(identity=torch.rand(1, 2, 1, 12, 3))
    bad = (1, 12) if name == "rays" else good[name][..., :0]
    with pytest.raises(ValueError, match=name):
        kernels.least_photometric(**dict(good, **{name: bad}))


def test_ssim_names_bad_input():
    x = torch.rand(2, 3, 4, 5)
    with pytest.raises(ValueError, match="target"):
        kernels.ssim_l1(x, x[:1])
    with pytest.raises(ValueError, match="x must be"):
        kernels.ssim(x[..., :1], x[..., :1])
