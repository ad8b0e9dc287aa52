"""The rendering Triton kernels against the float64 reference, which float64 inputs select.

Without a GPU they run in Triton's interpreter. Tolerances are a few times the error that was
measured there, which is written beside them; values are of order one unless said otherwise.
"""

import math
import random
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import render as rendering
from selfocc.geometry import ray_box

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="published sizes take hours in the interpreter")

# Measured 9.8e-5, up to 3.2e-4 on longer rays; the float32 reference errs as much at surfaces so
# sharp, where 1 - alpha + 1e-4 has lost its digits.
SHARP_SLOPE = 3e-4
BOX = (-2.0, -3.0, -1.0, 2.0, 5.0, 1.5)
HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # rounding of gradients in half precision


@pytest.fixture(autouse=True)
def triton():
    before = kernels.backend()
    kernels.backend("triton")
    yield
    kernels.backend(before)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def poisoned(x: torch.Tensor) -> torch.Tensor:
    """The same values with NaN around them."""
    view = x.new_full((x.numel() + 256,), math.nan)[128 : 128 + x.numel()].view(x.shape)
    return view.copy_(x)


def volume_of(batch, channels, nodes, layout="rows", seed=0, dtype=torch.float32):
    """A random volume with NaN around it: channels last in memory, first, or with gaps."""
    torch.manual_seed(seed)
    values = torch.randn(batch, *nodes, channels)
    if layout == "rows":
        return poisoned(values.to(DEVICE, dtype)).movedim(-1, 1)
    values = values.movedim(-1, 1)
    if layout == "planes":
        return poisoned(values.to(DEVICE, dtype))
    wide = torch.full((batch, channels + 2, *(2 * n for n in nodes)), math.nan)
    part = wide.to(DEVICE, dtype)[:, 1:-1, ::2, 1::2, ::2]
    return part.copy_(values)


def rays_of(batch, rays, seed=0, dtype=torch.float32):
    """Random rays through the box; the first of an item misses it."""
    torch.manual_seed(seed)
    origins = torch.rand(batch, rays, 3) * 2 - 1
    directions = F.normalize(torch.randn(batch, rays, 3), dim=-1)
    if rays > 1:
        origins[:, 0] = torch.tensor([50.0, 0.0, 0.0])
        directions[:, 0] = torch.tensor([0.0, 1.0, 0.0])
    lines = origins, directions, *ray_box(origins, directions, BOX)
    return [poisoned(x.to(DEVICE, dtype)) for x in lines]


def render(volume, lines, inv_s, **options):
    return kernels.render_rays(volume, *lines, inv_s, box=BOX, **options)


def results_of(volume, lines, sharpness, dtype, only=None, **options):
    """Every result, and gradients of a random sum of them, or of those named, as float64."""
    volume = volume.detach().to(dtype).requires_grad_()
    inv_s = torch.tensor(sharpness, device=DEVICE).requires_grad_()
    if dtype == torch.float64:
        lines, inv_s = [x.double() for x in lines], inv_s.detach().double().requires_grad_()
        if options.get("jitter") is not None:
            options["jitter"] = options["jitter"].double()
    out = render(volume, lines, inv_s, **options)
    results = {f.name: getattr(out, f.name) for f in fields(out)}
    results = {name: x for name, x in results.items() if x is not None}
    generator = torch.Generator().manual_seed(1)
    total = 0.0
    for name, x in results.items():
        factor = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        if x.requires_grad and (only is None or name in only):
            total = total + (x * factor).sum()
    if not torch.is_grad_enabled():
        return results
    grads = torch.autograd.grad(total, (volume, inv_s), allow_unused=True, materialize_grads=True)
    results |= dict(zip(("volume", "inv_s"), grads, strict=True))
    return {name: x.detach() for name, x in results.items()}


def compare(volume, lines, sharpness=3.0, value=5e-6, slope=1e-4, **options):
    """Errors are relative to the largest entry of a result, or to one.

    Measured: 2.6e-6 of opacity, 2.5e-6 of weights, 1.1e-6 of distance and normal, less of the
    others; gradients of volume 2.0e-5, of inv_s 5.2e-5.
    """
    dtype = volume.dtype
    results = results_of(volume, lines, sharpness, dtype, **options)
    expected = results_of(volume, lines, sharpness, torch.float64, **options)
    assert results.keys() == expected.keys()
    for name, exact in expected.items():
        limit = slope if name in ("volume", "inv_s") else value
        limit = max(limit, HALF.get(results[name].dtype, 0))
        assert results[name].shape == exact.shape, name
        assert results[name].dtype == (dtype if name == "volume" else torch.float32)
        if exact.numel():
            scale = max(1.0, exact.abs().max().item())
            error = (results[name].double() - exact).abs().max().item() / scale
            assert error < limit, (name, error)
    return results


def cases():
    draw = random.Random(0)
    named = {
        "smallest": dict(rays=1, nodes=(2, 2, 2), channels=1, classes=0, samples=1),
        "one-sample": dict(rays=3, nodes=(3, 2, 4), channels=6, classes=3, samples=1),
        "a-block": dict(rays=2, nodes=(5, 4, 3), channels=4, classes=0, samples=32),
        "a-block-and-one": dict(rays=2, nodes=(5, 4, 3), channels=5, classes=4, samples=33),
        "nuscenes-channels": dict(rays=2, nodes=(3, 4, 3), channels=25, classes=21, samples=9),
        "many-channels": dict(rays=2, nodes=(3, 4, 3), channels=40, classes=35, samples=5),
    }
    for i in range(4):
        channels = draw.randint(1, 9)
        named[f"drawn-{i}"] = dict(
            rays=draw.randint(2, 5),
            nodes=tuple(draw.randint(2, 6) for _ in range(3)),
            channels=channels,
            classes=draw.randint(0, channels - 1),
            samples=draw.randint(2, 40),
        )
    return [pytest.param(case, id=name) for name, case in named.items()]


@pytest.mark.parametrize("case", cases())
def test_render(case):
    """Everything at once; the alphas, layouts and options take turns."""
    seed = sum(case["nodes"]) + case["samples"]
    batch, layout = 1 + seed % 2, ["rows", "planes", "gaps"][seed % 3]
    volume = volume_of(batch, case["channels"], case["nodes"], layout, seed)
    lines = rays_of(batch, case["rays"], seed)
    compare(
        volume,
        lines,
        samples=case["samples"],
        classes=case["classes"],
        alpha=["neus", "volsdf", "density"][seed // 2 % 3],
        jitter=poisoned(torch.rand(batch, case["rays"]).to(DEVICE)) if seed % 5 else None,
        anneal=[1.0, 0.3][seed // 3 % 2],
        backdrop=seed % 4 == 0,
        bend=[0.0, 0.7][seed % 2],
        read=[0.0, 0.4, 1.0][seed % 3],
        keep_samples=True,
    )


@pytest.mark.parametrize("sharpness", [0.5, 40.0])
@pytest.mark.parametrize("alpha", list(kernels.ALPHAS))
def test_alphas(alpha, sharpness):
    volume, lines = volume_of(1, 1, (5, 4, 3)), rays_of(1, 4)
    jitter = torch.rand(1, 4).to(DEVICE)
    compare(
        volume,
        lines,
        sharpness,
        samples=20,
        alpha=alpha,
        anneal=0.6,
        jitter=jitter,
        keep_samples=True,
        slope=SHARP_SLOPE,
        value=2e-5,
    )


def test_nothing_asked_for_is_nothing_returned():
    out = render(
        volume_of(1, 4, (3, 3, 3)), rays_of(1, 2), torch.tensor(3.0, device=DEVICE), samples=4
    )
    assert out.semantics is out.weights is out.mids is out.eikonal is None
    assert out.deltas is out.sdf is None and out.color.shape == (1, 2, 3)


@pytest.mark.parametrize(
    "names",
    [["weights"], ["sdf"], ["eikonal"], ["distance"], ["semantics"], ["opacity", "color"]],
    ids="-".join,
)
def test_a_loss_on_some_results_only(names):
    options = dict(samples=10, classes=2, keep_samples=True, only=names)
    compare(volume_of(1, 5, (4, 3, 3)), rays_of(1, 3), **options)


@pytest.mark.parametrize(
    ("stop", "alone"),
    [(0.05, False), (0.4, False), (0.0, True), (0.05, True)],
    ids=["warp-0.05", "warp-0.4", "lane-0", "lane-0.05"],
)
def test_rays_end_where_light_does(stop, alone, monkeypatch):
    """A ray a warp or a ray a lane, some lanes of the last program without one."""
    volume, lines = volume_of(2, 4, (5, 4, 3)), rays_of(2, 18 if alone else 4)
    volume[:, 0] -= 0.3
    options = dict(samples=40, stop_below=stop)
    monkeypatch.setattr(rendering, "MANY", 0 if alone else 1 << 17)
    if alone:  # backward is the same for both
        with torch.no_grad():
            results = compare(volume, lines, 20.0, value=2e-5, **options)
    else:
        results = compare(volume, lines, 20.0, value=2e-5, slope=SHARP_SLOPE, **options)
    kernels.backend("torch")
    whole = results_of(volume, lines, 20.0, torch.float32, samples=40)
    assert (results["opacity"] - whole["opacity"]).abs().max() <= max(stop, 1e-6) + 1e-6


def test_light_that_is_spent_is_not_waited_for():
    """What lies behind opaque nodes is not even read."""
    volume, lines = volume_of(1, 4, (6, 6, 6)), rays_of(1, 2)
    volume[:, 0] = torch.linspace(1, -4, 6, device=DEVICE)[:, None, None]  # along y
    lines[0][:] = torch.tensor([0.1, -2.9, 0.2])
    lines[1][:] = torch.tensor([0.0, 1.0, 0.0])
    lines[2][:], lines[3][:] = 0.1, 7.8
    clean = results_of(volume, lines, 100.0, torch.float32, samples=200)
    volume[:, 1:, -1] = math.nan
    dirty = results_of(volume, lines, 100.0, torch.float32, samples=200)
    assert dirty["color"].equal(clean["color"])


def test_samples_on_nodes_and_borders():
    """Along the grid's own lines, from border to border, on nodes and on cell boundaries."""
    volume = volume_of(1, 4, (9, 5, 6))
    origins = torch.tensor([[-2.0, -3.0, -1.0], [2.0, -3.0, 1.5], [-2.0, 0.0, 0.5], [0.0, 5.0, -1]])
    directions = torch.tensor([[0.0, 1, 0], [0.0, 1, 0], [1.0, 0, 0], [0.0, -1, 0]])
    near, far = torch.zeros(1, 4), torch.tensor([[8.0, 8.0, 4.0, 8.0]])
    lines = [x.to(DEVICE) for x in (origins[None], directions[None], near, far)]
    compare(volume, lines, samples=16, keep_samples=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_read(dtype):
    volume, lines = volume_of(1, 6, (4, 3, 3), dtype=dtype), rays_of(1, 3)
    compare(volume, lines, samples=9, classes=2, keep_samples=True)


def test_a_nan_ray_stays_alone(monkeypatch):
    volume, lines = volume_of(2, 4, (4, 3, 3)), rays_of(2, 9)
    options = dict(samples=6, keep_samples=True)
    for many in (1 << 17, 0):
        monkeypatch.setattr(rendering, "MANY", many)
        clean = render(volume, lines, torch.tensor(3.0, device=DEVICE), **options)
        broken = [x.clone() for x in lines]
        for x in broken:
            x[1, 7] = math.nan
        dirty = render(volume, broken, torch.tensor(3.0, device=DEVICE), **options)
        assert dirty.distance[1, 7].isnan()
        for name in ("distance", "opacity", "color", "weights", "eikonal"):
            a, b = getattr(dirty, name).clone(), getattr(clean, name)
            a[1, 7] = b[1, 7]
            assert a.equal(b), name


def test_nothing_to_render():
    volume = volume_of(2, 6, (3, 3, 3)).requires_grad_()
    lines = [x[:, :0] for x in rays_of(2, 3)]
    inv_s = torch.tensor(3.0, device=DEVICE, requires_grad=True)
    out = render(volume, lines, inv_s, samples=8, classes=2, keep_samples=True)
    assert out.color.shape == (2, 0, 3) and out.weights.shape == (2, 0, 8)
    assert out.semantics.shape == (2, 0, 2)
    grads = torch.autograd.grad(out.color.sum() + out.weights.sum(), (volume, inv_s))
    assert all(g.eq(0).all() for g in grads)


def test_rays_of_other_strides():
    volume, lines = volume_of(1, 4, (4, 3, 3)), rays_of(1, 6)
    options = dict(samples=5, keep_samples=True)
    strided = [x[:, ::2] for x in lines]
    a = results_of(volume, strided, 3.0, torch.float32, **options)
    b = results_of(volume, [x.contiguous() for x in strided], 3.0, torch.float32, **options)
    assert all(a[name].equal(b[name]) for name in a if name not in ("volume", "inv_s"))


def test_deterministic_gradients(deterministic):
    volume, lines = volume_of(2, 6, (4, 3, 3)), rays_of(2, 5)
    options = dict(samples=9, classes=2, keep_samples=True)
    first = compare(volume, lines, **options)
    for _ in range(10 if DEVICE == "cuda" else 1):
        again = results_of(volume, lines, 3.0, torch.float32, **options)
        assert all(first[name].equal(again[name]) for name in first)


def test_deterministic_gradients_do_not_depend_on_the_order_of_rays(deterministic):
    volume, lines = volume_of(1, 6, (4, 3, 3)), rays_of(1, 5)
    grads = []
    for order in (torch.arange(5), torch.tensor([3, 1, 4, 0, 2])):
        leaf = volume.detach().requires_grad_()
        inv_s = torch.tensor(3.0, device=DEVICE)
        out = render(leaf, [x[:, order] for x in lines], inv_s, samples=6, classes=2)
        # a sum of magnitudes sets the scale, and is added in the order of the rays
        grads.append(torch.autograd.grad(out.color.sum() + out.distance.sum(), leaf)[0])
    torch.testing.assert_close(*grads, rtol=2e-7, atol=1e-9)


def test_a_nan_is_not_hidden_by_integers(deterministic):
    volume, lines = volume_of(1, 4, (4, 3, 3)), rays_of(1, 3)
    lines[3][0, 1] = math.nan
    assert results_of(volume, lines, 3.0, torch.float32, samples=6)["volume"].isnan().any()


def test_operator():
    volume, lines = volume_of(1, 6, (3, 3, 2)).requires_grad_(), rays_of(1, 3)
    inv_s = torch.tensor(3.0, device=DEVICE, requires_grad=True)
    jitter = torch.rand(1, 3).to(DEVICE)
    options = list(BOX), 5, [0.5], "neus", 2, False, 0.0, True, False, False, 0.5, 0.5
    torch.library.opcheck(rendering._op, (volume, inv_s, [*lines, jitter], [], *options))


def test_no_graph_break():
    volume, lines = volume_of(1, 6, (3, 3, 2)), rays_of(1, 3)

    def loss(volume, inv_s):
        out = render(volume, lines, inv_s, samples=6, classes=2, keep_samples=True)
        parts = out.distance, out.semantics, out.weights * out.mids, out.eikonal
        return sum(x.sum() for x in parts)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (loss, compiled):
        leaves = volume.detach().requires_grad_(), torch.tensor(3.0).to(DEVICE).requires_grad_()
        grads.append(torch.autograd.grad(function(*leaves), leaves))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_backward_keeps_nothing_a_sample():
    volume, lines = volume_of(1, 6, (3, 3, 2)).requires_grad_(), rays_of(1, 8)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()), lambda x: x):
        inv_s = torch.tensor(3.0, device=DEVICE)
        render(volume, lines, inv_s, samples=96, classes=2, keep_samples=True)
    assert max(sizes) <= volume.numel() and sum(sizes) < 8 * 96


# -----------------------------------------------------------------------------------------------
# Compositing of given opacities


def composite_both(alpha, values, value=5e-7, slope=1e-6):
    """Errors are relative to the largest entry or to one; measured: 1.3e-7, gradients 2.1e-7."""
    outs = []
    for dtype in (alpha.dtype, torch.float64):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (alpha, values)]
        results = kernels.composite(*leaves)
        generator = torch.Generator().manual_seed(1)
        total = 0.0
        for x in results:
            factor = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            total = total + (x * factor.to(x)).sum()
        outs.append((*results, *torch.autograd.grad(total, leaves)))
    for i, (a, b) in enumerate(zip(*outs, strict=True)):
        limit = value if i < 3 else max(slope, HALF.get(alpha.dtype, 0))
        assert a.shape == b.shape
        if b.numel():
            error = (a.double() - b).abs().max() / max(1.0, b.abs().max().item())
            assert error < limit, (i, error)


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (3, 32, 3), (2, 3, 33, 24), (5, 70, 1), (7, 0), (2, 9, 0), (0, 8, 3), (3, 5, 40)],
    ids=str,
)
def test_composite(shape):
    torch.manual_seed(0)
    *rows, width = shape if len(shape) > 2 else (shape[0], 4, 0)
    alpha = poisoned(torch.rand(*rows, device=DEVICE) ** 2)
    composite_both(alpha, poisoned(torch.randn(*rows, width, device=DEVICE)))


def test_composite_of_opaque_and_of_empty_samples():
    alpha = torch.tensor([[0.3, 1.0, 0.5, 1.0, 0.2], [0.0] * 5, [1.0] * 5], device=DEVICE)
    # measured: 4e-8 of slopes up to 1e4, where the published epsilon is all that divides
    composite_both(alpha, torch.randn(3, 5, 2, device=DEVICE), slope=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_composite_reads_half_precision(dtype):
    torch.manual_seed(0)
    alpha, values = torch.rand(2, 9, device=DEVICE), torch.randn(2, 9, 5, device=DEVICE)
    composite_both(alpha.to(dtype), values.to(dtype))


def test_composite_of_other_strides_and_nan():
    torch.manual_seed(0)
    alpha, values = torch.rand(9, 4, device=DEVICE).mT, torch.randn(4, 3, 9, device=DEVICE).mT
    composite_both(alpha, values)
    clean = kernels.composite(alpha, values)
    values[1, 4] = math.nan
    dirty = kernels.composite(alpha, values)
    assert dirty[2][1].isnan().all() and dirty[2][[0, 2, 3]].equal(clean[2][[0, 2, 3]])


def test_composite_operator_and_graph():
    alpha, values = torch.rand(3, 5, device=DEVICE), torch.randn(3, 5, 2, device=DEVICE)
    leaves = alpha.requires_grad_(), values.requires_grad_()
    torch.library.opcheck(torch.ops.selfocc.composite.default, leaves)
    compiled = torch.compile(kernels.composite, fullgraph=True, backend="aot_eager")
    for a, b in zip(kernels.composite(*leaves), compiled(*leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_composite_names_what_is_wrong():
    with pytest.raises(ValueError, match="values"):
        kernels.composite(torch.rand(3, 4), torch.rand(3, 5, 2))
    with pytest.raises(ValueError, match="alpha"):
        kernels.composite(torch.rand(3, 0), torch.rand(3, 0, 2))


# -----------------------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("name", ["kitti", "nuscenes"])
def test_published_sizes(name):
    from kernels.bench import cases

    size = cases.SIZES[name]
    case = next(c for c in cases.cases([name], "render_rays") if c.variant == "with samples")
    inputs = case.inputs(cases.Draw(DEVICE))
    step = max(1, size.ray_count // 500)  # the float64 reference takes its time
    for key in ("origins", "directions", "near", "far", "jitter"):
        inputs[key] = inputs[key][:, ::step].contiguous()
    both = []
    for dtype in (torch.float32, torch.float64):
        leaves = {key: x.detach().to(dtype) for key, x in inputs.items()}
        wanted = [leaves[key].requires_grad_() for key in case.wanted]
        results = case.call(**leaves)
        total = sum(x.sum() for x in results if x.requires_grad)
        both.append((*results, *torch.autograd.grad(total, wanted)))
    for a, b in zip(*both, strict=True):
        scale = max(1.0, b.abs().max().item())
        assert (a.double() - b).abs().max() / scale < 1e-3  # positions: 1e-5 m of 50 m


@on_gpu
def test_deterministic_gradients_at_published_size(deterministic):
    from kernels.bench import cases

    case = next(c for c in cases.cases(["kitti"], "render_rays") if c.variant == "with samples")
    inputs = case.inputs(cases.Draw(DEVICE))
    wanted = [inputs[key].requires_grad_() for key in case.wanted]
    runs = []
    for _ in range(10):
        total = sum(x.sum() for x in case.call(**inputs) if x.requires_grad)
        runs.append(torch.autograd.grad(total, wanted))
    assert all(a.equal(b) for run in runs for a, b in zip(run, runs[0], strict=True))
