"""Every stage beside the published one: all of it where the record is, a part of it everywhere."""

import pytest
import torch

from selfocc import config, presets, published
from selfocc.encoder import Encoder
from selfocc.field import shifted_grid_sdf
from selfocc.losses import objective, photometric_scene
from selfocc.model import SelfOcc
from tests import goldens, parity
from tests.parity_small import EVERY, IMAGES

FORWARD, GRADIENT = 2e-4, 1e-3  # of the largest value: the float32 noise that the record states


def check(errors: dict[str, float]):
    for stage, error in errors.items():
        limit = GRADIENT if stage.startswith("d / d") else FORWARD
        assert error < limit, f"{stage}: {error:.1e}"


@pytest.mark.parametrize("name", parity.CASES)
def test_every_stage(name):
    errors = parity.compare(parity.Record.load(name))
    assert len(errors) >= 35
    check(errors)


def small(name: str, model: torch.nn.Module, settings: config.Config) -> dict[str, torch.Tensor]:
    """The part of the record in tests/data; its weights go into the model."""
    kept = {key: torch.as_tensor(value) for key, value in goldens.load(f"{name}.npz").items()}
    names = published.published_names(settings)
    weights = {
        names[n]: published.swap_colors(t, settings) if "density_net.3." in n else t
        for key, t in kept.items()
        if (n := key.removeprefix("state.")) != key and names[n] is not None
    }
    expected = model.state_dict()
    weights = {n: t.reshape(expected[n].shape) for n, t in weights.items()}
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    return kept


def settings_of(preset: str, *overrides: str) -> config.Config:
    sizes = ("encoder.dim=48", "encoder.layers=1", "field.hidden=48", "backbone.depth=18")
    return presets.build(preset, [*sizes, "backbone.weights=none", *overrides])


def test_the_tpv_network_from_image_features_to_losses():
    settings = settings_of(
        "kitti",
        "volume.nodes=21,17,7",
        "encoder.points_cross=4,6,7",
        "encoder.points_self=5",
        "render.rays=6,20",
        "render.samples=64",
        "loss.sparsity_pitch=3.2",
    )
    model = SelfOcc(settings).eval()
    out = small("tpv_mono", model, settings)
    inputs = {n.removeprefix("input."): t for n, t in out.items() if n.startswith("input.")}
    inputs |= {name: inputs[name].float() / 256 for name in IMAGES}
    batch = parity.load_batch(inputs | {"input_imgs": torch.empty(1, 1, 3, 96, 320)})

    errors, seen = parity.Errors(), {}
    norms = model.encoder.layers[0].norms
    norms[0].register_forward_hook(lambda _m, given, _o: seen.update(self_attn=given[0]))
    norms[2].register_forward_hook(lambda _m, _g, output: seen.update(norm2=output))
    features = [out[f"fpn.{level}"][None] for level in range(4)]
    model.encoder(features, batch.intrinsics, batch.camera_to_volume, (96, 320), (96, 320))
    for name, ours in seen.items():
        errors.add(name, ours[:, ::EVERY], out[f"encoder.{name}"])

    shapes = model.encoder.plane_shapes
    planes = [
        out[f"representation.{i}"].unflatten(1, shape).requires_grad_()
        for i, shape in enumerate(shapes)
    ]
    volume = model.decoder(planes)
    volume.retain_grad()
    errors.add("volume", parity.swap_volume(volume), out["field_volume.density_color"])
    view = model.render(volume, batch.target, inputs["rays"], 64, keep_samples=True)
    errors.add("weights", view.weights, out["out.weights.0"])
    errors.add("depth", view.depth, out["out.ms_depths.0"])
    view.color = view.color.clamp(max=256 / 255)  # in evaluation mode the published one clamps
    errors.add("colour", view.color.flip(-1) * (255 / 256), out["out.ms_colors.0"])
    grid = tuple(out["out.uniform_sdf"].shape)
    shift = out["rand_like.0"].view(1, *grid, 3)
    uniform = shifted_grid_sdf(volume, settings.volume.box, grid, shift)
    errors.add("uniform SDF", uniform, out["out.uniform_sdf"])
    scene = photometric_scene(batch, view.pixels, settings.quirks)
    losses = objective(settings, batch, volume, view, scene, shift)
    losses["total"] = sum(losses.values())
    for theirs, ours in {**parity.LOSSES, "total": "total"}.items():
        if f"loss.{theirs}" in out:
            errors.add(f"loss {ours}", losses[ours], out[f"loss.{theirs}"])
    losses["total"].backward()
    errors.add("d / d volume", parity.swap_volume(volume.grad), out["grad.volume"])
    for i, plane in enumerate(planes):
        errors.add("d / d planes", plane.grad.flatten(1, 2)[:, ::EVERY], out[f"grad.{i}"])
    for k in (1, 3):
        for kind in ("weight", "bias"):
            grad = getattr(model.decoder.net[k], kind).grad
            grad = published.swap_colors(grad, settings) if k == 3 else grad
            theirs = out[f"grad.head.model.field.density_net.{k}.{kind}"]
            errors.add("d / d head parameters", grad, theirs)
    assert len(errors) == 16
    check(errors)


def test_the_bev_network_reads_the_transposed_grid():
    settings = settings_of(
        "nuscenes_bev",
        "volume.nodes=19,15,7",
        "encoder.points_self=4",
        "encoder.points_cross=5,0,0",
    )
    worst = {}
    for transposed in (True, False):
        encoder = Encoder(settings.encoder, settings.volume, 6, transposed=transposed)
        holder = torch.nn.Module()
        holder.encoder = encoder.eval()
        out = small("bev_surround", holder, settings)
        x, position = encoder.queries["hw"][None], encoder.positional_encoding()
        attention, reference = encoder.layers[0].self_attention, encoder.self_reference
        ours = x + attention(x + position, x, encoder.plane_shapes, reference)
        errors = parity.Errors()
        errors.add("self attention", ours[:, ::EVERY], out["encoder.self_attn"])
        worst[transposed] = errors["self attention"]
    assert worst[True] < FORWARD and worst[False] > 0.1
