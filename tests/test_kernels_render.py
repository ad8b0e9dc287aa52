"""Rendering against its meaning, against the published numbers, and its gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import alpha as alphas
from kernels import naive, render_cpu
from selfocc.geometry import node_spacing, pixel_rays, ray_box
from tests import goldens
from tests.test_field import CASES, golden_decoder, recorded

BOX = (-2.0, -3.0, -1.0, 2.0, 5.0, 1.5)


def scene(batch=2, rays=7, nodes=(5, 4, 3), channels=4, dtype=torch.float64, seed=0):
    """A random volume and rays through its box, some of which miss it."""
    torch.manual_seed(seed)
    volume = torch.randn(batch, channels, *nodes, dtype=dtype)
    origins = torch.rand(batch, rays, 3, dtype=dtype) * 2 - 1
    directions = F.normalize(torch.randn(batch, rays, 3, dtype=dtype), dim=-1)
    origins[:, 0] = torch.tensor([50.0, 0.0, 0.0])
    directions[:, 0] = torch.tensor([0.0, 1.0, 0.0])
    near, far = ray_box(origins, directions, BOX)
    return volume, origins, directions, near, far


@pytest.mark.parametrize("alpha", ["neus", "volsdf", "density"])
@pytest.mark.parametrize(
    ("channels", "classes", "anneal", "jittered"),
    [(1, 0, 1.0, True), (4, 0, 0.3, False), (9, 5, 0.7, True)],
)
def test_values_and_gradients_are_those_of_the_formulas(alpha, channels, classes, anneal, jittered):
    volume, *rays = scene(channels=channels)
    volume.requires_grad_()
    inv_s = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    jitter = torch.rand(rays[2].shape, dtype=torch.float64) if jittered else None
    options = dict(box=BOX, samples=11, jitter=jitter, anneal=anneal, alpha=alpha, classes=classes)
    options |= dict(bend=0.6, read=0.7) if classes else {}
    out = kernels.render_rays(volume, *rays, inv_s, **options, keep_samples=True)
    expected = naive.render(volume, *rays, inv_s, **options)
    loss = other = 0.0
    for name, value in expected.items():
        torch.testing.assert_close(getattr(out, name), value, rtol=1e-9, atol=1e-10, msg=name)
        weight = torch.randn_like(value)
        loss, other = loss + (getattr(out, name) * weight).sum(), other + (value * weight).sum()
    assert (out.semantics is None) == (classes == 0)
    grads = torch.autograd.grad(loss, (volume, inv_s), allow_unused=True)
    others = torch.autograd.grad(other, (volume, inv_s), allow_unused=True)
    for grad, want in zip(grads, others, strict=True):
        if want is None:
            assert grad is None
        else:
            torch.testing.assert_close(grad, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("alpha", ["neus", "volsdf", "density"])
def test_gradcheck(alpha):
    volume, *rays = scene(batch=1, rays=3, nodes=(3, 3, 2))
    inv_s = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def render(volume, inv_s):
        out = kernels.render_rays(
            volume, *rays, inv_s, box=BOX, samples=4, anneal=0.5, alpha=alpha, keep_samples=True
        )
        return out.distance, out.color, out.opacity, out.weights, out.eikonal

    volume = (volume + 2).requires_grad_()  # features away from the kink of relu
    assert torch.autograd.gradcheck(render, (volume, inv_s))


@pytest.mark.parametrize("jittered", [False, True])
def test_intervals_grow_along_a_ray(jittered):
    volume, *rays = scene(batch=1, rays=3)
    rays[2], rays[3] = torch.full_like(rays[2], 2.0), torch.full_like(rays[3], 12.0)
    jitter = torch.rand(1, 3, dtype=torch.float64) if jittered else None
    options = dict(box=BOX, samples=40, jitter=jitter, keep_samples=True)
    inv_s = torch.tensor(2.0, dtype=torch.float64)
    out = kernels.render_rays(volume, *rays, inv_s, **options, bend=0.8)
    even = kernels.render_rays(volume, *rays, inv_s, **options)
    if not jittered:
        torch.testing.assert_close(out.deltas.sum(-1), rays[3] - rays[2])
    inner = slice(1, -1)  # where jitter does not change lengths
    share = (even.mids[..., inner] - 2) / 10
    torch.testing.assert_close(out.deltas[..., inner], 0.25 * (0.2 + 1.6 * share))


def test_composite():
    torch.manual_seed(0)
    alpha = torch.rand(2, 3, 6, dtype=torch.float64)
    alpha[0, 0, 2], alpha[1, 1, 0], alpha[0, 1] = 1.0, 1.0, 0.0
    values = torch.randn(2, 3, 6, 4, dtype=torch.float64, requires_grad=True)
    weights, left, sums = kernels.composite(alpha, values)
    torch.testing.assert_close((weights, left, sums), naive.composite(alpha, values))
    assert torch.autograd.gradcheck(
        kernels.composite, (alpha.requires_grad_(), values), atol=1e-4, eps=1e-8
    )


def test_composite_of_opaque_samples_keeps_its_gradient_in_float32():
    alpha = torch.tensor([[0.3, 1.0, 0.5, 1.0, 0.2]])
    weight = torch.tensor([1.0, -2.0, 3.0, 4.0, 5.0])
    grads = []
    for dtype in (torch.float32, torch.float64):
        a = alpha.to(dtype).requires_grad_()
        weights, left, _ = kernels.composite(a, torch.zeros(1, 5, 1, dtype=dtype))
        grads.append(torch.autograd.grad((weights * weight).sum() + left.sum(), a)[0].double())
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-8)


def test_chunks_change_nothing(monkeypatch):
    volume, *rays = scene(rays=9, channels=7)
    volume.requires_grad_()
    inv_s = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    jitter = torch.rand(2, 9, dtype=torch.float64)

    def render():
        out = kernels.render_rays(
            volume, *rays, inv_s, box=BOX, samples=6, jitter=jitter, classes=3, keep_samples=True
        )
        return [
            out.distance,
            out.opacity,
            out.color,
            out.semantics,
            out.weights,
            out.eikonal,
            out.sdf,
            out.mids,
        ]

    whole = render()
    grads = torch.autograd.grad(sum(x.sum() for x in whole), (volume, inv_s))
    monkeypatch.setattr(render_cpu, "CHUNK", 25)
    parts = render()
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(
        grads, torch.autograd.grad(sum(x.sum() for x in parts), (volume, inv_s)), strict=True
    ):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        for a, b in zip(whole, render(), strict=True):
            torch.testing.assert_close(a, b)


def test_a_batch_is_its_samples():
    volume, *rays = scene(dtype=torch.float32)
    whole = kernels.render_rays(volume, *rays, torch.tensor(3.0), box=BOX, samples=8)
    for b in range(2):
        one = kernels.render_rays(
            volume[b : b + 1], *(r[b : b + 1] for r in rays), torch.tensor(3.0), box=BOX, samples=8
        )
        torch.testing.assert_close(one.color[0], whole.color[b])
        torch.testing.assert_close(one.distance[0], whole.distance[b])


def test_rays_that_miss_and_invalid_rays_stay_alone():
    volume, origins, directions, near, far = scene(dtype=torch.float32)
    clean = kernels.render_rays(
        volume, origins, directions, near, far, torch.tensor(3.0), box=BOX, samples=8
    )
    assert clean.color.isfinite().all() and clean.distance.isfinite().all()
    assert (far - near)[:, 0].max() < 1e-5
    origins = origins.clone()
    origins[1, 3] = math.nan
    near, far = ray_box(origins, directions, BOX)
    dirty = kernels.render_rays(
        volume, origins, directions, near, far, torch.tensor(3.0), box=BOX, samples=8
    )
    keep = torch.ones_like(near, dtype=torch.bool)
    keep[1, 3] = False
    torch.testing.assert_close(dirty.color[keep], clean.color[keep])
    assert dirty.distance[1, 3].isnan()


def test_no_rays():
    volume, *rays = scene()
    out = kernels.render_rays(
        volume, *(r[:, :0] for r in rays), torch.tensor(3.0), box=BOX, samples=8, keep_samples=True
    )
    assert out.color.shape == (2, 0, 3) and out.weights.shape == (2, 0, 8)


def test_bad_input_names_the_argument():
    volume, *rays = scene()
    inv_s = torch.tensor(3.0)
    with pytest.raises(ValueError, match="directions"):
        kernels.render_rays(volume, rays[0], rays[1][:, 1:], *rays[2:], inv_s, box=BOX, samples=8)
    with pytest.raises(ValueError, match="alpha"):
        kernels.render_rays(volume, *rays, inv_s, box=BOX, samples=8, alpha="nerf")
    with pytest.raises(ValueError, match="classes"):
        kernels.render_rays(volume, *rays, inv_s, box=BOX, samples=8, classes=4)
    with pytest.raises(ValueError, match=r"bend must be in \[0, 1\]"):
        kernels.render_rays(volume, *rays, inv_s, box=BOX, samples=8, bend=1.5)
    with pytest.raises(ValueError, match="volume"):
        kernels.render_rays(volume[..., :1], *rays, inv_s, box=BOX, samples=8)


@pytest.mark.parametrize("compact", [False, True])
def test_node_losses(compact):
    torch.manual_seed(0)
    sdf = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    spacing = (0.5, 0.2, 0.8)
    eikonal, hessian = kernels.node_losses(sdf, spacing, compact)
    expected = naive.node_losses(sdf, spacing, compact)
    torch.testing.assert_close((eikonal, hessian), expected)
    weights = torch.tensor([0.3, 2.0], dtype=torch.float64)
    (grad,) = torch.autograd.grad(weights[0] * eikonal + weights[1] * hessian, sdf)
    (want,) = torch.autograd.grad(weights[0] * expected[0] + weights[1] * expected[1], sdf)
    torch.testing.assert_close(grad, want)


def test_node_losses_of_a_flat_field_have_a_gradient():
    sdf = torch.zeros(1, 3, 3, 3, requires_grad=True)
    eikonal, hessian = kernels.node_losses(sdf, (1.0, 1.0, 1.0), True)
    assert eikonal == 27 and hessian == 0
    assert torch.autograd.grad(eikonal + hessian, sdf)[0].isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_node_differences_are_the_published_ones(case):
    out, _, _ = golden_decoder(case)
    _, nodes, box, _ = CASES[case]
    sdf, spacing = out["field_volume.density_color"][:, 0], node_spacing(box, nodes)
    torch.testing.assert_close(
        naive.node_gradients(sdf, spacing), out["field_volume.gradients"], rtol=1e-4, atol=1e-5
    )
    second = naive.node_second_differences(sdf, spacing, compact=case == "tpv_mono")
    torch.testing.assert_close(second, out["field_volume.gradients2"], rtol=1e-4, atol=1e-5)


def inv_s_of(case):
    state = torch.load(goldens.path(f"{case}/state_dict.pth"), weights_only=True)["state_dict"]
    return torch.exp(10 * state["head.model.field.deviation_network.variance"].double())


@pytest.mark.parametrize("case", CASES)
def test_alpha_and_compositing_are_the_published_ones_in_float64(case):
    g = recorded(f"extra/head_train_{case}_f64.npz")
    starts, ends, sdf = (g[name][..., 0] for name in ("starts", "ends", "field.sdf"))
    gradients = g["field.gradient"][: sdf.numel()].view(*sdf.shape, 3)
    cosine = (gradients * g["out.direction"][:, None]).sum(-1)
    alpha = alphas.neus_alpha(
        sdf, cosine, ends - starts, inv_s_of(case), alphas.Knobs(float(g["cos_anneal_ratio"]))
    )
    torch.testing.assert_close(alpha, g["field.alpha"][..., 0], rtol=0, atol=1e-13)
    weights, left, color = kernels.composite(alpha, g["field.rgb"])
    opacity = weights.sum(-1, keepdim=True)
    color = color + g["rand.bkgd.0"] * (1 - opacity)
    cameras = g["out.ms_depths.0"].shape[1]
    expected = torch.cat([g[f"out.weights.{n}"] for n in range(cameras)]).view_as(weights)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(color, g["out.ms_colors.0"].view_as(color), rtol=0, atol=1e-12)
    torch.testing.assert_close(left, g["bg_transmittance"][:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_training_render_is_the_published_one(case):
    g = recorded(f"extra/head_train_{case}_f64.npz")
    _, decoder, planes = golden_decoder(case)
    _, _, box, classes = CASES[case]
    cameras, rays = g["out.ms_depths.0"].shape[1:]
    origins, directions = g["out.origin"][None], g["out.direction"][None]
    near, far = ray_box(origins, directions, box)
    out = kernels.render_rays(
        decoder(planes),
        origins,
        directions,
        near,
        far,
        inv_s_of(case),
        box=box,
        samples=64,
        jitter=g["rand.t_jitter.0"].view(1, -1),
        anneal=float(g["cos_anneal_ratio"]),
        classes=classes,
        keep_samples=True,
    )
    tight = dict(rtol=1e-12, atol=1e-12)
    planes_noise = dict(rtol=1e-3, atol=2e-4)  # the planes are recorded in float32 only
    stretch = g["out.direction_norm"].view(1, -1)

    def samples(name):
        return torch.stack([g[f"out.{name}.{n}"] for n in range(cameras)]).view(
            1, cameras * rays, -1
        )

    torch.testing.assert_close(out.mids / stretch[..., None], samples("ts"), **tight)
    torch.testing.assert_close(out.deltas / stretch[..., None], samples("deltas"), **tight)
    torch.testing.assert_close(out.sdf, samples("sample_sdf"), **planes_noise)
    torch.testing.assert_close(out.weights, samples("weights"), **planes_noise)
    depth = (out.distance / stretch).view(1, cameras, rays)
    torch.testing.assert_close(depth, g["out.ms_depths.0"], **planes_noise)
    torch.testing.assert_close(
        out.opacity.view(1, cameras, rays), g["out.ms_accs.0"], **planes_noise
    )
    color = out.color + g["rand.bkgd.0"] * (1 - out.opacity[..., None])
    torch.testing.assert_close(
        color.view(1, cameras, rays, 3), g["out.ms_colors.0"], **planes_noise
    )
    if classes:
        semantics = out.semantics.view(1, cameras, rays, -1)
        torch.testing.assert_close(semantics, g["out.sem.0"], **planes_noise)
    gradients = g["out.eik_grad"][: cameras * rays * 64].view(1, cameras * rays, 64, 3)
    eikonal = (gradients.norm(dim=-1) - 1).square().sum(-1)
    torch.testing.assert_close(out.eikonal, eikonal, **planes_noise)


@pytest.mark.parametrize("case", CASES)
def test_evaluation_render_is_the_published_one(case):
    g = recorded(f"extra/head_render_{case}_f64.npz")
    _, decoder, planes = golden_decoder(case)
    _, _, box, classes = CASES[case]
    to_volume = recorded(f"{case}/inputs.npz")["meta.temImg2lidar"]
    identity = torch.eye(3, dtype=torch.float64).expand(len(to_volume), 3, 3)
    origins, directions, stretch = (
        x.flatten(0, 1)[None].double() for x in pixel_rays(g["ms_rays"], identity, to_volume)
    )
    near, far = ray_box(origins, directions, box)
    with torch.no_grad():
        out = kernels.render_rays(
            decoder(planes),
            origins,
            directions,
            near,
            far,
            inv_s_of(case),
            box=box,
            samples=64,
            anneal=0.2468,  # the published system keeps the value of the last training step
            classes=classes,
        )
    shape = g["ms_depths.0"].shape
    loose = dict(rtol=1e-3, atol=5e-4)  # planes and rays are float32
    torch.testing.assert_close((out.distance / stretch).view(shape), g["ms_depths.0"], **loose)
    torch.testing.assert_close(out.opacity.view(shape), g["ms_accs.0"], **loose)
    torch.testing.assert_close(out.color.clamp(0, 1).view(*shape, 3), g["ms_colors.0"], **loose)
    if classes:
        torch.testing.assert_close(out.semantics.view(*shape, -1), g["sem.0"], **loose)


@pytest.mark.parametrize("case", CASES)
def test_float32_render_is_the_published_one(case):
    out32, _, _ = golden_decoder(case)
    box, classes = CASES[case][2], CASES[case][3]
    origins, directions = out32["out.origin"][None], out32["out.direction"][None]
    near, far = ray_box(origins, directions, box)
    out = kernels.render_rays(
        out32["field_volume.density_color"],
        origins,
        directions,
        near,
        far,
        inv_s_of(case).float(),
        box=box,
        samples=64,
        classes=classes,
        keep_samples=True,
    )
    loose = dict(rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(out.weights[0, ..., None], out32["render.weights"], **loose)
    torch.testing.assert_close(out.sdf[0, ..., None], out32["field.sdf"], **loose)
    torch.testing.assert_close(out.color[0].clamp(0, 1), out32["render.rgb"], **loose)
    torch.testing.assert_close(out.opacity[0, :, None], out32["render.accumulation"], **loose)
