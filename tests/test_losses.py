"""Losses against the numbers recorded from the published implementation, in float64."""

import pytest
import torch

import kernels
from selfocc import InputError, losses, presets
from selfocc.batch import Batch, Frames, View
from tests.test_field import recorded

TIGHT = dict(rtol=1e-10, atol=1e-12)


def golden(name: str) -> dict[str, torch.Tensor]:
    values = recorded(name)
    return {
        k: v.double() if k.startswith("in.") and v.dtype == torch.float32 else v
        for k, v in values.items()
    }


def check(values, prefix, result, **inputs):
    """The value and its gradients with respect to `inputs`, named as recorded."""
    torch.testing.assert_close(result.double(), values[f"{prefix}value"].double(), **TIGHT)
    grads = torch.autograd.grad(result, list(inputs.values()))
    for name, grad in zip(inputs, grads, strict=True):
        torch.testing.assert_close(grad, values[f"{prefix}grad_{name}"].view_as(grad), **TIGHT)


@pytest.mark.parametrize(
    "variant", ["default", "no_ssim", "no_automask", "no_ssim_no_automask", "deltas"]
)
@pytest.mark.parametrize("combine", [False, True])
def test_photometric(variant, combine):
    name = "ReprojLossMonoMultiNew" + ("Combine" if combine else "")
    g = golden(f"losses/{name}_1cam.npz")
    samples, rays = int(g["in.S"]), tuple(g["in.ray_resize"].tolist())
    flat = g["in.weights"].clone().requires_grad_()
    weights, depths = flat.view(1, 1, -1, samples), g["in.ts"].view(1, 1, -1, samples)
    if variant == "deltas":
        deltas = g["in.deltas"].view_as(weights)
        weights = torch.where(
            deltas < torch.finfo(deltas.dtype).eps, 0.0, weights / deltas.clamp_min(1e-12)
        )
    sources = torch.stack([g["in.prev_imgs"], g["in.next_imgs"]], dim=1)
    projections = torch.stack([g["in.img2prevImg"], g["in.img2nextImg"]])[None]
    pixels = g["in.ms_rays"]
    target = losses.ray_colors(g["in.curr_imgs"], pixels, published_pixels=True)
    automask = "no_automask" not in variant
    if "no_ssim" in variant:
        l1, _, valid = kernels.epipolar_photometric(
            weights,
            depths,
            pixels,
            target,
            sources,
            projections,
            combine=combine,
            published_pixels=True,
        )
        error = torch.where(valid, l1, losses.UNSEEN) if automask or not combine else l1
        if automask:
            still = losses.ray_colors(sources, pixels, published_pixels=True)
            error = torch.cat([error, (still - target[:, None]).abs().mean(-1)], dim=1)
        error = error.min(dim=1).values
    else:
        shown = dict(combine=combine, published_pixels=True)
        scene = (pixels, target, sources, projections)
        compared = kernels.epipolar_photometric(weights, depths, *scene, **shown)
        error = losses.photometric_error(
            compared, *scene[:3], rays=rays, automask=automask, **shown
        )
    torch.testing.assert_close(error[0], g[f"f64.{variant}.per_ray"], **TIGHT)
    result = error.mean()
    torch.testing.assert_close(result, g[f"f64.{variant}.value"], **TIGHT)
    (grad,) = torch.autograd.grad(result, flat)
    expected = g[f"f64.{variant}.grad_weights"]
    heavy = (g["in.weights"].view(-1, samples).sum(-1) > 1e-6).repeat_interleave(samples)[None]
    torch.testing.assert_close(grad[heavy], expected[heavy], **TIGHT)
    # rays without weight: gradients of 1 / eps, compared relatively
    torch.testing.assert_close(grad[~heavy], expected[~heavy], rtol=1e-6, atol=1e-12)


def test_reprojection_prefers_the_true_depth_and_its_gradient_is_right():
    torch.manual_seed(0)
    rays, size = (4, 6), (24, 36)
    image = torch.rand(1, 1, 3, 3, 4, dtype=torch.float64)
    image = torch.nn.functional.interpolate(image[0], size, mode="bicubic")[None].clamp(0, 1)
    intrinsics = torch.tensor(
        [[30.0, 0, 18, 0], [0, 30, 12, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    ).double()
    move = torch.eye(4, dtype=torch.float64)
    move[0, 3] = 0.5
    projection = intrinsics @ move @ intrinsics.inverse()
    v, u = torch.meshgrid(4 + torch.arange(4.0) * 4, 2 + torch.arange(6.0) * 4, indexing="ij")
    pixels = torch.stack([u, v], -1).reshape(-1, 2).double()
    depth = torch.full((1, 1, 24), 5.0, dtype=torch.float64, requires_grad=True)
    shifted = pixels + pixels.new_tensor([30 * 0.5 / 5.0, 0])
    target = kernels.sample_image(image[:, 0], shifted[None])[:, None]

    def error(d):
        return losses.reprojection_error(
            d,
            pixels,
            target,
            image[:, None],
            projection[None, None, None],
            rays=rays,
            automask=False,
        )

    assert error(depth).max() < 1e-9
    assert error(depth + 2).mean() > 1e-3
    step = torch.rand_like(depth)
    away = (depth.detach() + 1 + step).requires_grad_()
    assert torch.autograd.gradcheck(lambda d: error(d).mean(), away, atol=1e-6)


@pytest.mark.parametrize("form", ["mvs", "reprojection"])
def test_photometric_of_a_batch_is_that_of_its_samples(form):
    torch.manual_seed(1)
    batch, cameras, rays, samples = 2, 3, (3, 4), 5
    pixels = torch.rand(12, 2) * torch.tensor([31.0, 15.0])
    sources = torch.rand(batch, 2, cameras, 3, 16, 32)
    target = torch.rand(batch, cameras, 12, 3)
    projections = torch.eye(4).repeat(batch, 2, cameras, 1, 1) + 0.02 * torch.randn(
        batch, 2, cameras, 4, 4
    )
    weights, depths = (
        torch.rand(batch, cameras, 12, samples),
        1 + 9 * torch.rand(batch, cameras, 12, samples),
    )

    def error(weights, depths, *scene):
        if form == "mvs":
            compared = kernels.epipolar_photometric(weights, depths, pixels, *scene)
            return losses.photometric_error(compared, pixels, *scene[:2], rays=rays)
        return losses.reprojection_error(depths[..., 0], pixels, *scene, rays=rays)

    def single_error(b, n):
        b, n = slice(b, b + 1), slice(n, n + 1)
        seen = weights[b, n], depths[b, n], target[b, n], sources[b, :, n], projections[b, :, n]
        return error(*seen)[0, 0]

    whole = error(weights, depths, target, sources, projections)
    single = torch.stack(
        [torch.stack([single_error(b, n) for n in range(cameras)]) for b in range(batch)]
    )
    torch.testing.assert_close(whole, single)


def test_color():
    g = golden("losses/RGBLossMS.npz")
    color = g["in.ms_colors"].requires_grad_()
    target = losses.ray_colors(g["in.gt_imgs"], g["in.ms_rays"], published_pixels=True)
    result = losses.color_loss(color, target, tuple(g["in.ray_resize"].tolist()))
    check(g, "f64.ssim.", result, ms_colors=color)


def test_ssim():
    g = golden("losses/SSIM.npz")
    x = g["in.x"].requires_grad_()
    result = kernels.ssim(x, g["in.y"])
    torch.testing.assert_close(result, g["f64.map"], **TIGHT)
    (grad,) = torch.autograd.grad(result.mean(), x)
    torch.testing.assert_close(grad, g["f64.grad_x_of_mean"], **TIGHT)


@pytest.mark.parametrize("far", [False, True])
def test_edge(far):
    g = golden("losses/EdgeLoss3DMS.npz")
    depth = g["in.ms_depths"].requires_grad_()
    seen, inputs = depth, {"ms_depths": depth}
    if far:
        opacity = inputs["ms_accs"] = g["in.ms_accs"].requires_grad_()
        seen = depth * opacity + g["in.max_depths"] * (1 - opacity)
    target = losses.ray_colors(g["in.curr_imgs"], g["in.ms_rays"], published_pixels=True)
    result = losses.edge_loss(seen, target, tuple(g["in.ray_resize"].tolist()))
    check(g, "f64.use_inf_mask." if far else "f64.default.", result, **inputs)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("SoftSparsityLoss", losses.soft_sparsity),
        ("SparsityLoss_scale1", losses.smooth_sparsity),
        ("SparsityLoss_scale0.1", lambda sdf: losses.smooth_sparsity(sdf, 0.1)),
        ("HardSparsityLoss_default", losses.hard_sparsity),
    ],
)
def test_sparsity(name, function):
    g = golden("losses/SparsityLosses.npz")
    sdf = g["in.density"].requires_grad_()
    check(g, f"f64.{name}.", function(sdf), density=sdf)


@pytest.mark.parametrize("slack", [4.0, 1.0])
def test_adaptive_sparsity(slack):
    g = golden("losses/AdaptiveSparsityLoss.npz")
    sdf = g["in.sdfs"].requires_grad_()
    depth = g["in.ms_depths"][0].requires_grad_()
    split = (3, depth.shape[-1], -1)
    result = losses.adaptive_sparsity(sdf.view(split), g["in.ts"].view(split), depth, slack)
    check(g, f"f64.slack{slack}.", result, sdfs=sdf)
    assert torch.autograd.grad(
        losses.adaptive_sparsity(sdf.view(split), g["in.ts"].view(split), depth),
        depth,
        allow_unused=True,
    ) == (None,)


def test_adaptive_sparsity_of_nothing_is_zero():
    sdf = torch.randn(2, 3, 4, requires_grad=True)
    loss = losses.adaptive_sparsity(sdf, torch.ones(2, 3, 4), torch.ones(2, 3))
    assert loss == 0 and torch.autograd.grad(loss, sdf)[0].eq(0).all()


@pytest.mark.parametrize(
    ("name", "function"), [("SemCELossMS", losses.semantic_ce), ("SemLossMS", losses.semantic_bce)]
)
def test_semantics(name, function):
    g = golden("losses/SemLosses.npz")
    probabilities = g["in.sem"].requires_grad_()
    labels = losses.ray_labels(g["in.sem_gt"], g["in.ms_rays"])[None]
    check(g, f"f64.{name}.", function(probabilities, labels), sem=probabilities)


def test_smooth_sparsity_far_from_surfaces_has_a_gradient():
    sdf = torch.tensor([100.0, -100.0, 0.5], requires_grad=True)
    (grad,) = torch.autograd.grad(losses.smooth_sparsity(sdf, 0.1), sdf)
    assert grad.isfinite().all() and grad[2] < 0


def step(overrides=(), semantics=True):
    """`objective` of random images, volume and rendering: two samples, three cameras."""
    torch.manual_seed(0)
    small = "volume.nodes=6,5,4 encoder.stride=1,1 render.rays=3,4 render.samples=6 field.classes=5"
    settings = presets.build("synthetic", [*small.split(), *overrides])
    batch, cameras, rays, samples = 2, 3, 12, 6
    intrinsics = torch.tensor([[20.0, 0, 10], [0, 20, 6], [0, 0, 1]]).double()
    pose = torch.eye(4, dtype=torch.float64)[[0, 2, 1, 3]].repeat(batch, 3, cameras, 1, 1)
    pose[:, 1, :, 1, 3], pose[:, 2, :, 1, 3] = 0.3, -0.3

    def frames(times):
        shape = (*pose[:, times].shape[:-2],)
        images = torch.rand(*shape, 3, 12, 20)
        return Frames(images, intrinsics.expand(*shape, 3, 3), pose[:, times])

    target, labels = frames(0), torch.randint(0, 5, (batch, cameras, 12, 20))
    data = Batch(
        ["a", "b"],
        target.images,
        target.intrinsics,
        target.camera_to_volume,
        target,
        frames(slice(1, 3)),
        semantics=labels if semantics else None,
    )
    shape = (batch, cameras, rays)
    leaf = dict(
        depth=1 + torch.rand(shape),
        color=torch.rand(*shape, 3),
        semantics=torch.rand(*shape, 5).softmax(-1),
        weights=torch.rand(*shape, samples),
        sdf=torch.randn(*shape, samples),
        eikonal=torch.rand(shape),
        swept=torch.rand(()),
        volume=torch.randn(batch, 9, 6, 5, 4),
    )
    leaf = {name: value.requires_grad_() for name, value in leaf.items()}
    volume = leaf.pop("volume")
    pixels = torch.rand(rays, 2) * torch.tensor([19.0, 11.0])
    proposals = 1 + 20 * torch.rand(*shape, samples).sort(-1).values
    view = View(pixels=pixels, opacity=torch.ones(shape), proposals=proposals, **leaf)
    scene = losses.photometric_scene(data, pixels, settings.quirks)
    result = losses.objective(settings, data, volume, view, scene, torch.rand(batch, 3))
    return result, dict(leaf, volume=volume)


@pytest.mark.parametrize(
    ("overrides", "reached"),
    [
        (["loss.weight_eikonal=0", "loss.weight_hessian=0"], {"weights", "color", "volume"}),
        (["loss.photometric=mvs_combined"], {"weights", "color", "eikonal", "volume"}),
        (["loss.photometric=reprojection"], {"depth", "color", "eikonal", "volume"}),
        (["loss.sparsity=smooth", "loss.weight_color=0"], {"weights", "eikonal", "volume"}),
        (["loss.sparsity=adaptive"], {"weights", "color", "eikonal", "sdf", "volume"}),
        (["loss.weight_edge=1"], {"weights", "color", "eikonal", "depth", "volume"}),
        (["loss.weight_semantic=1"], {"weights", "color", "eikonal", "semantics", "volume"}),
        (
            ["loss.weight_semantic=1", "loss.semantic=bce"],
            {"weights", "color", "eikonal", "semantics", "volume"},
        ),
    ],
)
def test_objective_reaches_what_its_losses_are_about(overrides, reached):
    result, leaves = step(["loss.automask=false", *overrides])
    total = sum(result.values())
    assert total.isfinite() and total.ndim == 0
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found = {n for n, g in zip(leaves, grads, strict=True) if g is not None and g.any()}
    assert found == reached | {"swept"}
    assert all(g.isfinite().all() for g in grads if g is not None)


def test_objective_pools_the_eikonal_over_samples_and_nodes():
    result, leaves = step(["loss.weight_eikonal=2", "loss.weight_hessian=0"])
    spacing = losses.node_spacing(presets.build("synthetic").volume.box, (6, 5, 4))
    nodes, _ = kernels.node_losses(leaves["volume"][:, 0], spacing, True)
    expected = 2 * (nodes + leaves["eikonal"].sum()) / (2 * 6 * 5 * 4 + 2 * 3 * 12 * 6)
    torch.testing.assert_close(result["eikonal"], expected)


def test_semantic_loss_without_labels_says_so():
    with pytest.raises(InputError, match="weight_semantic"):
        step(["loss.weight_semantic=1"], semantics=False)
