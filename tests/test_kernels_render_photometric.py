"""Rendering and photometric error in one walk, against `render_rays` and `epipolar_photometric`.

Triton is compared with the float64 reference; without a GPU it runs in Triton's interpreter.
Tolerances are a few times the error measured there, which is written beside them.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels.ray import LANES
from kernels.render import _op
from tests.test_kernels_photometric_triton import DEVICE, on_gpu, poisoned
from tests.test_kernels_proposals import scene

BOX = (-2.0, -2.0, -1.0, 2.0, 2.0, 2.0)
TRITON = (torch.float32, "triton")


@pytest.fixture(autouse=True)
def triton():
    before = kernels.backend()
    kernels.backend("triton")
    yield
    kernels.backend(before)


def case(
    batch=1,
    cameras=2,
    rays=2,
    count=2,
    samples=40,
    classes=2,
    features=5,
    nodes=(5, 6, 4),
    size=(8, 11),
    jitter=True,
    seed=0,
    **options,
):
    """Tensors and options of `render_photometric`; some rays leave the box, some miss it."""
    _, _, *views = scene(batch, cameras, count, rays, 1, size, torch.float32, seed)
    torch.manual_seed(seed)
    lines = batch, cameras * rays
    volume = torch.randn(batch, 1 + features, *nodes)
    volume[:, 0] *= 0.5
    near = 0.3 * torch.rand(lines)
    tensors = dict(
        volume=poisoned(volume.movedim(1, -1).contiguous()).movedim(-1, 1),
        origins=poisoned(torch.rand(*lines, 3) * 3 - 1.5),
        directions=poisoned(F.normalize(torch.randn(*lines, 3), dim=-1)),
        near=poisoned(near),
        far=poisoned(near + 1 + 4 * torch.rand(lines)),
        inv_s=torch.tensor(3.0),
        stretch=poisoned(1 + 0.2 * torch.rand(lines)),
    )
    tensors |= dict(zip(("pixels", "target", "sources", "projections"), views, strict=True))
    if jitter:
        tensors["jitter"] = poisoned(torch.rand(lines))
    tensors = {name: x.to(DEVICE) for name, x in tensors.items()}
    return tensors, dict(box=BOX, samples=samples, classes=classes, **options)


def results(tensors, options):
    """What can have a gradient, by name, and validity."""
    seen, l1, color, valid = kernels.render_photometric(**tensors, **options)
    out = dict(distance=seen.distance, opacity=seen.opacity, eikonal=seen.eikonal)
    out |= dict(colors=seen.color, semantics=seen.semantics, l1=l1, color=color)
    return {name: x for name, x in out.items() if x is not None}, valid


def with_gradients(tensors, options, only=None):
    leaves = {name: tensors[name].detach().requires_grad_() for name in ("volume", "inv_s")}
    out, valid = results(tensors | leaves, options)
    generator = torch.Generator().manual_seed(1)
    total = 0.0
    for name, value in out.items():
        factor = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(DEVICE)
        if only in (None, name):
            total = total + (value * factor).sum()
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    grads = {
        f"d {n}": torch.zeros_like(x) if g is None else g
        for (n, x), g in zip(leaves.items(), grads, strict=True)
    }
    return out | grads, valid


def compare(tensors, options, only=None):
    """Against float64; where float32 itself is bad, because 1 - alpha + 1e-4 divides or a weight
    seen is small, the reference in float32 says how bad.
    """
    found, valid = with_gradients(tensors, options, only)
    kernels.backend("torch")
    single, _ = with_gradients(tensors, options, only)
    kernels.backend("triton")
    exact = {name: x.double() for name, x in tensors.items()}
    expected, expected_valid = with_gradients(exact, options, only)
    assert valid.equal(expected_valid) and found.keys() == expected.keys()
    for name, value in expected.items():
        if value.numel():
            off = [(x[name].double() - value).abs().amax().item() for x in (found, single)]
            # measured: 8e-7 of the largest, or 4.4 times the reference's error
            limit = 3e-6 * max(1.0, value.abs().amax().item())
            assert off[0] <= max(limit, 8 * off[1]), (name, off)


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(combine=True, classes=0, features=3, jitter=False, count=3),
        dict(batch=2, cameras=1, samples=70, classes=4, features=8, backdrop=True, anneal=0.3),
        dict(published_pixels=True, classes=0, features=0, samples=1, count=1),
        dict(alpha="volsdf", classes=3, features=3, samples=LANES, bend=0.7, read=1),
        dict(alpha="density", combine=True, samples=LANES + 1, rays=1),
        dict(features=24, classes=21, cameras=1, samples=33, seed=1),
        dict(features=3, classes=0, cameras=1, samples=20, nodes=(2, 3, 2), alpha="density"),
    ],
    ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()) or "default",
)
def test_values_and_gradients(settings):
    compare(*case(**settings))


def test_planar_volume_and_half_precision():
    tensors, options = case(rays=1)
    planar = dict(tensors, volume=tensors["volume"].contiguous())
    compare(planar, options)
    compare(dict(planar, volume=planar["volume"].bfloat16()), options)


@pytest.mark.parametrize("only", ["distance", "l1", "eikonal"])
def test_gradient_of_one_result(only):
    compare(*case(rays=1, cameras=1), only)


def test_is_rendering_followed_by_the_loss_over_proposals():
    tensors, options = case()
    found, valid = results(tensors, options)
    march = ("volume", "origins", "directions", "near", "far", "inv_s", "jitter")
    seen = kernels.render_rays(
        **{name: tensors[name] for name in march}, **options, keep_samples=True
    )
    proposals = seen.weights, seen.mids / tensors["stretch"][..., None]
    l1, color, expected = kernels.epipolar_photometric(
        *(x.unflatten(1, (2, 2)) for x in proposals),
        *(tensors[name] for name in ("pixels", "target", "sources", "projections")),
    )
    assert valid.equal(expected)
    pairs = [(found["distance"], seen.distance), (found["l1"], l1), (found["color"], color)]
    pairs += [(found["colors"], seen.color), (found["semantics"], seen.semantics)]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=5e-6)  # measured: 4.8e-7


def test_rays_that_miss_the_box_or_are_seen_by_nobody():
    tensors, options = case()
    tensors["far"] = tensors["near"] + 1e-6
    tensors["projections"] = tensors["projections"].clone()
    tensors["projections"][:, :, 1, 2, 3] = -100.0
    found, valid = with_gradients(tensors, options)
    assert not valid[:, :, 1].any() and found["l1"][:, :, 1].eq(0).all()
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("where", ["near", "target", "stretch"])
def test_a_nan_stays_in_its_ray(where):
    tensors, options = case()
    clean, _ = results(tensors, options)
    tensors[where] = tensors[where].clone()
    tensors[where].view(1, 4, -1)[0, 2] = math.nan  # ray 0 of camera 1
    dirty, _ = results(tensors, options)
    for name in clean:
        views = name in ("l1", "color")
        keep = torch.ones(clean[name].shape, dtype=torch.bool, device=DEVICE)
        keep[(slice(None), slice(None), 1, 0) if views else (slice(None), 2)] = False
        assert clean[name][keep].equal(dirty[name][keep])
    assert where != "near" or dirty["distance"][0, 2].isnan()


def test_deterministic_gradients():
    tensors, options = case(rays=3, cameras=1)
    expected, _ = with_gradients(tensors, options)
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (
            with_gradients(tensors, options)[0] for _ in range(10 if DEVICE == "cuda" else 2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    for name in first:
        assert all(first[name].equal(other[name]) for other in others)
        torch.testing.assert_close(first[name], expected[name], rtol=1e-5, atol=1e-5)


def test_no_rays():
    tensors, options = case(rays=0)
    found, valid = with_gradients(tensors, options)
    assert valid.shape == (1, 2, 2, 0) and found["d volume"].eq(0).all()


def test_saves_nothing_of_samples():
    tensors, options = case(rays=8, cameras=1, nodes=(2, 2, 2), features=3, classes=0, count=1)
    tensors["volume"].requires_grad_()
    given = {x.untyped_storage().data_ptr() for x in tensors.values()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        kernels.render_photometric(**tensors, **options)
    own = [x for x in saved if x.untyped_storage().data_ptr() not in given]
    assert saved and all(x.numel() <= 8 * 3 for x in own)  # of 8 rays with 40 samples


def arguments(tensors, options):
    rays = [tensors[n] for n in ("origins", "directions", "near", "far", "jitter")]
    scene = [tensors[n] for n in ("stretch", "pixels", "target", "sources", "projections")]
    flags = [1.0], "neus", options["classes"], False, 0.0, False, False, False, 0.5, 0.5
    volume, inv_s = (tensors[n].detach().requires_grad_() for n in ("volume", "inv_s"))
    return volume, inv_s, rays, scene, [*BOX], options["samples"], *flags


def test_opcheck():
    tensors, options = case(rays=1, samples=3, features=3, classes=0)
    torch.library.opcheck(_op, arguments(tensors, options))


def test_compiles_without_a_graph_break():
    tensors, options = case(rays=1, samples=5)
    leaves = [tensors[name].detach().requires_grad_() for name in ("volume", "inv_s")]

    def step(volume, inv_s):
        out, _ = results(tensors | dict(volume=volume, inv_s=inv_s), options)
        return sum(x.sum() for x in out.values())

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        *(torch.autograd.grad(f(*leaves), leaves) for f in (step, compiled)), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "name", ["volume", "near", "far", "origins", "jitter", "stretch", "inv_s", "target", "sources"]
)
def test_bad_input_names_the_argument(name):
    tensors, options = case(samples=2)
    tensors[name] = torch.zeros(3, 3, device=DEVICE)
    with pytest.raises(ValueError, match=name):
        kernels.render_photometric(**tensors, **options)
    tensors, options = case()
    for bad in (dict(samples=0), dict(alpha="none"), dict(classes=9)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            kernels.render_photometric(**tensors, **dict(options, **bad))


@pytest.mark.parametrize("name", ["inv_s", "far", "jitter", "sources"])
def test_tensors_of_another_device_or_kind_are_named(name):
    tensors, options = case(samples=2)
    for bad in (tensors[name].to("meta"), tensors[name].int()):
        with pytest.raises(ValueError, match=f"^{name} "):
            kernels.render_photometric(**dict(tensors, **{name: bad}), **options)


@on_gpu
@pytest.mark.parametrize("size", ["kitti", "nuscenes"])
def test_published_sizes(size):
    settings = dict(
        kitti=dict(cameras=1, rays=10450, features=3, classes=0, nodes=(257, 257, 33)),
        nuscenes=dict(cameras=6, rays=4800, features=24, classes=21, nodes=(257, 257, 25)),
    )[size]
    picture = dict(kitti=(352, 1216), nuscenes=(768, 1600))[size]
    tensors, options = case(samples=256, size=picture, combine=size == "nuscenes", **settings)
    # soft enough that no ray is seen with a weight near the epsilon that bounds what is divided by
    tensors["inv_s"] = torch.tensor(0.1, device=DEVICE)
    found, _ = with_gradients(tensors, options)
    exact, _ = with_gradients({name: x.double() for name, x in tensors.items()}, options)
    for name, value in exact.items():
        # float32 pixels of order 1000 carry 1e-4, which noise images turn into as much of colour
        limit = 1e-3 * max(1.0, value.abs().max().item())
        torch.testing.assert_close(found[name].double(), value, rtol=1e-3, atol=limit)
