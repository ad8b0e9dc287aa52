"""The photometric Triton kernels against the float64 reference, which float64 inputs select.

Without a GPU they run in Triton's interpreter. Tolerances are a few times the error that was
measured there, which is written beside them; all values are of order one.
"""

import importlib
import math
import random

import pytest
import torch

import kernels
from kernels.proposals import _epipolar_op
from tests.test_kernels_proposals import scene

SSIM = importlib.import_module("kernels.ssim")  # `kernels.ssim` is the function
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="published sizes take hours in the interpreter")

VALUE = dict(rtol=0, atol=2e-6)  # measured: 5.1e-7
SLOPE = dict(rtol=1e-5, atol=3e-6)  # measured: 1.2e-6 of values up to 5
# of gradients, by rounding; the interpreter truncates to bfloat16
HALF = {torch.bfloat16: 2**-7, torch.float16: 2**-11}


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    if DEVICE == "cpu":  # fewer programs; the interpreter takes as long for one of many lanes
        monkeypatch.setattr(SSIM, "PIXELS", 128)
    before = kernels.backend()
    kernels.backend("triton")
    yield
    kernels.backend(before)


def poisoned(x: torch.Tensor, strided: bool = False) -> torch.Tensor:
    """The same values with NaN around them, or also between them along the last two axes."""
    if strided:
        inner = x.new_full((*x.shape[:-2], x.shape[-2] * 2 + 3, x.shape[-1] * 3 + 2), math.nan)
        view = inner[..., 2 : 2 + 2 * x.shape[-2] : 2, 1 : 1 + 3 * x.shape[-1] : 3]
    else:
        view = x.new_full((x.numel() + 256,), math.nan)[128 : 128 + x.numel()].view(x.shape)
    return view.copy_(x)


def compare(function, tensors, wanted, value=VALUE, slope=SLOPE):
    """Results of `function(*tensors)` and gradients of `wanted` ones, against float64."""
    exact = [x.double().requires_grad_(i in wanted) for i, x in enumerate(tensors)]
    tensors = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(tensors)]
    outs = []
    for inputs in (tensors, exact):
        results = function(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        generator = torch.Generator().manual_seed(1)
        total = 0.0
        for result in results:
            if result.requires_grad:
                factor = torch.randn(result.shape, generator=generator, dtype=torch.float64)
                total = total + (result * factor.to(DEVICE)).sum()
        grads = torch.autograd.grad(total, [inputs[i] for i in wanted])
        outs.append((results, grads))
    (results, grads), (expected, exact_grads) = outs
    for a, e in zip(results, expected, strict=True):
        if e.dtype == torch.bool:
            assert a.equal(e)
        else:
            assert a.dtype == torch.float32
            torch.testing.assert_close(a.double(), e, equal_nan=True, **value)
    for i, a, e in zip(wanted, grads, exact_grads, strict=True):
        assert a.dtype == tensors[i].dtype
        extra = HALF.get(a.dtype, 0)
        limits = dict(rtol=max(slope["rtol"], extra), atol=slope["atol"])
        torch.testing.assert_close(a.double(), e, equal_nan=True, **limits)
    return results, grads


# -----------------------------------------------------------------------------------------------
# SSIM + L1


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((1, 1, 2, 2), "plain"),
        ((3, 2, 9), "strided"),
        ((1, 3, 7, 2), "rays"),
        ((2, 1, 1, 3, 13), "plain"),
        ((1, 2, 1, 6, 7), "strided"),
        ((1, 3, 5, 8), "rays"),
    ],
    ids=str,
)
def test_ssim_l1(shape, layout, monkeypatch):
    monkeypatch.setattr(SSIM, "PIXELS", 32)
    torch.manual_seed(sum(shape))
    x, y = torch.rand(shape, device=DEVICE), torch.rand(shape, device=DEVICE)
    if layout == "rays":  # channels last, as colours of rays on a grid
        x = poisoned(x.movedim(-3, -1).contiguous()).movedim(-1, -3)
    else:
        x = poisoned(x, layout == "strided")
    y = poisoned(y, layout == "strided")
    function = kernels.ssim if layout == "plain" else kernels.ssim_l1
    compare(function, [x, y], [0, 1])


def test_ssim_l1_of_smooth_and_equal_images_keeps_its_digits():
    row = torch.linspace(0.7, 0.701, 8, device=DEVICE)
    x = row.expand(1, 3, 4, 8).contiguous()
    y = (x + 1e-4 * torch.rand_like(x)).contiguous()
    # measured: 1.8e-7 and 6e-5 of a slope up to 11 (1 / C2); the formula with plain squares: 4e-2
    compare(kernels.ssim_l1, [x, y], [0, 1], slope=dict(rtol=1e-4, atol=2e-4))
    assert kernels.ssim_l1(x, x).abs().max() < 1e-6


def test_ssim_l1_at_its_clamp_has_no_slope():
    x = torch.zeros(1, 1, 4, 4, device=DEVICE)
    x[..., ::2, ::2], x[..., 1::2, 1::2] = 1.0, 1.0
    compare(kernels.ssim, [x, 1 - x], [0, 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ssim_l1_reads_half_precision(dtype):
    torch.manual_seed(0)
    x, y = (torch.rand(1, 2, 5, 6, device=DEVICE).to(dtype) for _ in range(2))
    compare(kernels.ssim_l1, [x, y], [0, 1])


def test_ssim_l1_of_an_expanded_target_and_of_nothing():
    torch.manual_seed(0)
    x = torch.rand(2, 2, 1, 2, 4, 5, device=DEVICE)
    y = torch.rand(2, 1, 1, 2, 4, 5, device=DEVICE)
    compare(lambda x, y: kernels.ssim_l1(x, y.expand_as(x)), [x, y], [0, 1])
    empty = torch.rand(0, 3, 4, 5, device=DEVICE, requires_grad=True)
    result = kernels.ssim_l1(empty, empty.detach())
    assert result.shape == (0, 4, 5) and torch.autograd.grad(result.sum(), empty)[0].numel() == 0


def test_a_nan_reaches_only_the_windows_around_it():
    x, y = (torch.rand(2, 2, 9, 20, device=DEVICE) for _ in range(2))
    clean = kernels.ssim_l1(x, y)
    x[1, 1, 4, 13] = math.nan
    dirty = kernels.ssim_l1(x, y)
    near = torch.zeros(2, 9, 20, dtype=torch.bool, device=DEVICE)
    near[1, 3:6, 12:15] = True
    assert dirty[near].isnan().all() and dirty[~near].equal(clean[~near])


# -----------------------------------------------------------------------------------------------
# Least error


def seen_rays(batch, count, cameras, rays, identities, dtype=torch.float32, seed=0):
    """Arguments of `least_photometric`; images come channels first, as they are sampled."""
    torch.manual_seed(seed)
    total = rays[0] * rays[1]
    color = torch.rand(batch, count, cameras, total, 3)
    l1 = 0.3 * torch.rand(batch, count, cameras, total)
    target = torch.rand(batch, cameras, 3, total)
    identity = torch.rand(batch, identities, cameras, 3, total)
    # some stand still, so that each kind wins somewhere
    mixed = torch.rand(batch, identities, cameras, 1, total) < 0.5
    identity = torch.where(mixed, target[:, None] + 0.1 * identity, identity)
    valid = torch.rand(batch, count, cameras, total) < 0.7
    tensors = [color, l1, target, identity]
    color, l1, target, identity = (poisoned(x.to(DEVICE, dtype)) for x in tensors)
    return color, l1, target.transpose(-1, -2), identity.transpose(-1, -2), valid.to(DEVICE)


@pytest.mark.parametrize("masked", [False, True], ids=["all seen", "some unseen"])
@pytest.mark.parametrize(
    ("batch", "count", "cameras", "rays", "identities"),
    [
        (1, 1, 1, (2, 2), 1),
        (2, 2, 1, (3, 5), 1),
        (1, 3, 1, (4, 11), 0),
        (1, 1, 2, (9, 2), 2),
    ],
)
def test_least_photometric(batch, count, cameras, rays, identities, masked):
    color, l1, target, identity, valid = seen_rays(batch, count, cameras, rays, identities)
    valid = valid if masked else None
    if identities:
        function = lambda c, e, t, i: kernels.least_photometric(  # noqa: E731
            c, e, t, rays, valid=valid, identity=i
        )
        compare(function, [color, l1, target, identity], [0, 1])
    else:
        function = lambda c, e, t: kernels.least_photometric(c, e, t, rays, valid=valid)  # noqa: E731
        compare(function, [color, l1, target], [0, 1], value=dict(rtol=1e-6, atol=2e-6))


def test_least_photometric_where_nobody_sees():
    color, l1, target, _, valid = seen_rays(1, 2, 1, (3, 4), 1)
    color.requires_grad_(), l1.requires_grad_()
    options = dict(valid=valid & False, unseen=7.0)
    result = kernels.least_photometric(color, l1, target, (3, 4), **options)
    assert result.eq(7).all()
    assert all(g.eq(0).all() for g in torch.autograd.grad(result.sum(), (color, l1)))


def test_least_photometric_keeps_a_nan_near_its_ray():
    color, l1, target, identity, valid = seen_rays(1, 2, 2, (5, 20), 1)
    options = dict(valid=valid | True, identity=identity)
    clean = kernels.least_photometric(color, l1, target, (5, 20), **options)
    l1[0, 1, 1, 33] = math.nan
    dirty = kernels.least_photometric(color, l1, target, (5, 20), **options)
    assert dirty[0, 1, 33].isnan() and dirty.isnan().sum() == 1
    assert dirty[~dirty.isnan()].equal(clean[~dirty.isnan()])
    l1[0, 1, 1, 33] = 0.0
    color[0, 0, 1, 47, 1] = math.nan  # row 2, column 7
    dirty = kernels.least_photometric(color, l1, target, (5, 20), **options)
    near = torch.zeros(1, 2, 5, 20, dtype=torch.bool, device=DEVICE)
    near[0, 1, 1:4, 6:9] = True
    assert dirty.isnan().equal(near.flatten(-2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_least_photometric_reads_half_precision(dtype):
    color, l1, target, identity, valid = seen_rays(1, 2, 1, (4, 5), 2, dtype)
    function = lambda c, e, t, i: kernels.least_photometric(  # noqa: E731
        c, e, t, (4, 5), valid=valid, identity=i
    )
    compare(function, [color, l1, target, identity], [0, 1])


# -----------------------------------------------------------------------------------------------
# Proposals


def epipolar(combine, published_pixels=False):
    def function(*tensors):
        return kernels.epipolar_photometric(
            *tensors, combine=combine, published_pixels=published_pixels
        )

    return function


def on_device(tensors, dtype=None):
    """Poisoned copies; the projections stay in float64, as cameras give them."""
    tensors = list(tensors)
    *rest, projections = tensors
    return [poisoned(x.to(DEVICE, dtype)) for x in rest] + [projections.to(DEVICE)]


def scene_sizes():
    draw = random.Random(1)
    sizes = [
        dict(count=1, rays=1, samples=1, size=(2, 2), cameras=1, batch=1),
        dict(count=2, rays=2, samples=32, size=(2, 7), cameras=1),
        dict(count=3, rays=2, samples=33, size=(9, 5), batch=1),
    ]
    for _ in range(4):
        sizes.append(
            dict(
                batch=draw.randint(1, 2),
                cameras=draw.randint(1, 2),
                count=draw.randint(1, 5),
                rays=draw.randint(1, 3),
                samples=draw.randint(2, 90),
                size=(draw.randint(2, 12), draw.randint(2, 30)),
            )
        )
    return sizes


@pytest.mark.parametrize("published_pixels", [False, True], ids=["", "published"])
@pytest.mark.parametrize("combine", [False, True], ids=["per source", "combined"])
@pytest.mark.parametrize("sizes", scene_sizes(), ids=lambda s: "-".join(map(str, s.values())))
def test_epipolar(sizes, combine, published_pixels):
    tensors = on_device(scene(**sizes, dtype=torch.float32, seed=sizes["rays"]))
    if sizes["samples"] == 1:  # out_s - out vanishes: what is left is rounding over a small weight
        tensors[0] += 0.5
    compare(epipolar(combine, published_pixels), tensors, [0])


@pytest.mark.parametrize("combine", [False, True], ids=["per source", "combined"])
def test_epipolar_takes_images_of_any_strides(combine):
    weights, depths, pixels, target, sources, projections = on_device(
        scene(batch=1, rays=2, samples=40, dtype=torch.float32)
    )
    target = poisoned(target.transpose(-1, -2).contiguous()).transpose(-1, -2)
    weights, depths = poisoned(weights, True), poisoned(depths, True)
    channels_last = poisoned(sources.movedim(3, -1).contiguous()).movedim(-1, 3)
    for images in (poisoned(sources, True), channels_last, sources[:, ::2]):
        matrices = projections[:, : images.shape[1]]
        compare(epipolar(combine), [weights, depths, pixels, target, images, matrices], [0])


@pytest.mark.parametrize("combine", [False, True], ids=["per source", "combined"])
def test_epipolar_at_borders_of_cells_and_images(combine):
    """All coordinates are sums of powers of two, so that nothing rounds: x = u / 2 + 1 / t."""
    width, height = 8, 6
    u = [-2.0, -1.0, 0.0, 3.0, 7.0, 13.0, 14.0, 15.0, 16.0]
    pixels = torch.tensor([[x, y] for x in u for y in (-1.0, 4.0, 9.0, 11.0, 12.0)])
    depths = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0, -1.0]).expand(1, 1, len(pixels), 6)
    projection = torch.tensor(
        [[0.5, 0, 0, 1.0], [0, 0.5, 0, 0.5], [0, 0, 1.0, 0], [0, 0, 0, 1.0]]
    ).double()
    back = projection.clone()
    back[:3, 3] = torch.tensor([-1.0, 0.5, 0.0])
    torch.manual_seed(0)
    tensors = on_device(
        [
            torch.rand(1, 1, len(pixels), 6) + 0.1,
            depths,
            pixels,
            torch.rand(1, 1, len(pixels), 3),
            torch.rand(1, 2, 1, 3, height, width),
            torch.stack([projection, back])[None, :, None],
        ]
    )
    (_, _, valid), _ = compare(epipolar(combine), tensors, [0])
    assert valid.any() and not valid.all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_epipolar_reads_half_precision(dtype):
    weights, depths, pixels, target, sources, projections = on_device(
        scene(dtype=torch.float32, samples=10, rays=2)
    )
    half = [x.to(dtype) for x in (weights + 0.1, depths, target, sources)]
    tensors = [half[0], half[1], pixels, half[2], half[3], projections]
    compare(epipolar(False), tensors, [0])


@pytest.mark.parametrize("combine", [False, True], ids=["per source", "combined"])
def test_epipolar_of_rays_without_weight_or_view(combine):
    """The reference in float32 too: the least sum of weights is the eps of the type."""
    tensors = on_device(scene(batch=1, rays=4, dtype=torch.float32))
    weights, projections = tensors[0], tensors[-1]
    weights[0, 0, 3] = 0.0
    weights[0, 0, 2] = 1e-9
    projections[0, :, 1, 2, 3] = -100.0  # behind all sources of this camera
    weights.requires_grad_()
    outs = []
    for name in ("triton", "torch"):
        kernels.backend(name)
        l1, color, valid = epipolar(combine)(*tensors)
        outs.append((l1, color, valid, *torch.autograd.grad(l1.sum() + color.sum(), weights)))
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=3e-6)  # measured: 1.2e-7 and 4.2e-7
    l1, _, valid, grad = outs[0]
    assert grad[0, 0, 2:].abs().max() > 1e6  # published, of order 1 / eps
    assert grad[0, 1].eq(0).all() and not valid[0, :, 1].any() and l1[0, :, 1].eq(0).all()


@pytest.mark.parametrize("combine", [False, True], ids=["per source", "combined"])
@pytest.mark.parametrize("where", ["weights", "depths", "target"])
def test_a_nan_stays_in_its_ray(where, combine):
    tensors = on_device(scene(batch=1, rays=3, samples=4, dtype=torch.float32))
    place = ["weights", "depths", None, "target"].index(where)
    tensors[0].requires_grad_()

    def call():
        l1, color, valid = epipolar(combine)(*tensors)
        (grad,) = torch.autograd.grad(l1.sum() + color.sum(), tensors[0])
        return l1, color, valid, grad

    clean = call()
    with torch.no_grad():
        tensors[place][0, 1, 2] = math.nan
    dirty = call()
    for a, b in zip(clean, dirty, strict=True):
        ray = 2 if a.ndim == 4 and a is clean[3] else 3
        keep = torch.ones(a.shape, dtype=torch.bool, device=DEVICE)
        keep.movedim((0, ray - 1, ray), (0, 1, 2))[0, 1, 2] = False
        assert a[keep].equal(b[keep])
    if where == "depths":
        assert not dirty[2][0, :, 1, 2].any()
    else:
        assert dirty[0][0, :, 1, 2].isnan().any()


@pytest.mark.parametrize("empty", [dict(rays=0), dict(samples=0), dict(batch=0)], ids=str)
def test_epipolar_of_nothing(empty):
    tensors = on_device(scene(dtype=torch.float32, **empty))
    tensors[0].requires_grad_()
    l1, color, valid = epipolar(False)(*tensors)
    assert not valid.any() and l1.eq(0).all() and color.eq(0).all()
    assert torch.autograd.grad(l1.sum(), tensors[0])[0].shape == tensors[0].shape


# -----------------------------------------------------------------------------------------------
# What holds for all


def calls():
    """Name, operator, its arguments, and the public call with what it takes."""
    x, y = torch.rand(1, 3, 4, 5, device=DEVICE), torch.rand(1, 3, 4, 5, device=DEVICE)
    color, l1, target, identity, valid = seen_rays(1, 2, 1, (3, 4), 2)
    proposals = [
        x.detach().clone()
        for x in on_device(scene(batch=1, cameras=1, rays=2, samples=4, dtype=torch.float32))
    ]
    grid = dict(valid=valid, identity=identity)
    return {
        "ssim_l1": (SSIM._ssim_l1_op, (x, y, 0.85, 0.15), kernels.ssim_l1, [x, y], {}, 2),
        "least_photometric": (
            None,  # made of PyTorch's and of that of ssim_l1
            (),
            lambda c, e, t, **o: kernels.least_photometric(c, e, t, (3, 4), **o),
            [color, l1, target],
            grid,
            2,
        ),
        "epipolar_photometric": (
            _epipolar_op,
            (proposals[0], proposals[1:], True, False),
            kernels.epipolar_photometric,
            proposals,
            {},
            1,
        ),
    }


NAMES = ["ssim_l1", "least_photometric", "epipolar_photometric"]


@pytest.mark.parametrize("name", ["ssim_l1", "epipolar_photometric"])
def test_opcheck(name):
    operator, arguments, *_, wanted = calls()[name]
    arguments = [x.detach().requires_grad_() if i < wanted else x for i, x in enumerate(arguments)]
    torch.library.opcheck(operator, tuple(arguments))


@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_a_graph_break(name):
    _, _, function, tensors, options, wanted = calls()[name]
    leaves = [x.detach().requires_grad_(i < wanted) for i, x in enumerate(tensors)]

    def step(*tensors):
        result = function(*tensors, **options)
        return sum(r.sum() for r in (result if isinstance(result, tuple) else (result,))[:2])

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(*leaves), leaves[:wanted]) for f in (step, compiled)]
    for a, b in zip(*grads, strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("name", NAMES)
def test_saves_only_inputs_and_results_of_rays(name):
    _, _, function, tensors, options, wanted = calls()[name]
    leaves = [x.detach().requires_grad_(i < wanted) for i, x in enumerate(tensors)]
    given = {x.untyped_storage().data_ptr() for x in (*leaves, *options.values())}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        results = function(*leaves, **options)
    largest = max(r.numel() for r in (results if isinstance(results, tuple) else (results,)))
    own = [x for x in saved if x.untyped_storage().data_ptr() not in given]
    assert saved and all(x.numel() <= largest for x in own)


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_algorithms_change_nothing_and_all_is_written(name):
    """That mode also fills new tensors with NaN."""
    _, _, function, tensors, options, wanted = calls()[name]
    leaves = [x.detach().requires_grad_(i < wanted) for i, x in enumerate(tensors)]

    def step():
        result = function(*leaves, **options)
        result = result if isinstance(result, tuple) else (result,)
        return *result, *torch.autograd.grad(sum(r.sum() for r in result[:2]), leaves[:wanted])

    expected = step()
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(10 if DEVICE == "cuda" else 1):
            assert all(a.equal(b) for a, b in zip(step(), expected, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_leaves_them_in_float32(name):
    _, _, function, tensors, options, _ = calls()[name]
    with torch.autocast(DEVICE, torch.bfloat16):
        result = function(*tensors, **options)
    assert (result[0] if isinstance(result, tuple) else result).dtype == torch.float32


@on_gpu
@pytest.mark.parametrize("combine", [False, True], ids=["per source", "combined"])
def test_published_sizes(combine):
    sizes = dict(batch=1, count=2, samples=256)
    sizes |= dict(cameras=6, size=(768, 1600)) if combine else dict(cameras=1, size=(352, 1216))
    rays = (48, 100) if combine else (55, 190)
    tensors = on_device(scene(**sizes, rays=rays[0] * rays[1], dtype=torch.float32))
    # float32 pixels of order 1000 carry 1e-4, which noise images turn into as much of colour
    loose = dict(rtol=1e-4, atol=1e-3)
    (l1, color, valid), _ = compare(epipolar(combine), tensors, [0], value=loose, slope=loose)
    function = lambda c, e, t: kernels.least_photometric(c, e, t, rays, valid=valid)  # noqa: E731
    compare(function, [color, l1, tensors[3]], [0, 1], value=dict(rtol=1e-5, atol=1e-5))
    compare(kernels.ssim_l1, [tensors[4], tensors[4].flip(-1)], [0, 1])
