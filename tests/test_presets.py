"""The published presets: their values against the paper's tables, and a training step of each."""

import math
from pathlib import Path

import pytest
import torch

from selfocc import checkpoint, presets, published
from selfocc.batch import Noise
from selfocc.bench import random_batch
from selfocc.geometry import fixed_pixels
from selfocc.losses import needs_samples, objective, photometric_scene
from selfocc.model import SelfOcc

# weights of: photometric, colour, eikonal, second differences, semantics, sparsity, edges
WEIGHTS = {
    "kitti": (1.0, 0.1, 0.1, 0.1, 0.0, 0.005, 0.0),
    "kitti_novel_depth": (1.0, 0.1, 0.1, 0.01, 0.0, 0.0, 0.0),
    "kitti_raw": (1.0, 0.0, 0.1, 0.0, 0.0, 0.0, 0.01),
    "nuscenes": (1.0, 0.1, 0.1, 0.01, 0.1, 0.0, 0.0),
    "nuscenes_bev": (1.0, 0.1, 0.1, 0.01, 0.1, 0.001, 0.0),
    "nuscenes_novel_depth": (1.0, 0.1, 0.1, 0.01, 0.0, 0.0, 0.0),
    "nuscenes_depth": (1.0, 0.0, 0.1, 0.0, 0.0, 0.0, 0.01),
}
# fractions of the cropped image over those of the padded input, x and y, as published
FOCAL_RATIOS = {
    "kitti": (1.0, 1.0),
    "kitti_novel_depth": (1.0, 0.96339),
    "kitti_raw": (0.99751, 0.97121),
    "nuscenes": (1.0, 1.0),
    "nuscenes_bev": (1.0, 1.0),
    "nuscenes_novel_depth": (1.0, 1.0),
    "nuscenes_depth": (1.0, 1.0),
}


@pytest.mark.parametrize("preset", published.PRESETS)
def test_losses_and_image_sizes(preset):
    settings = presets.build(preset)
    names = ("photometric", "color", "eikonal", "hessian", "semantic", "sparsity", "edge")
    assert tuple(getattr(settings.loss, f"weight_{name}") for name in names) == WEIGHTS[preset]
    assert settings.loss.compact_hessian == (preset in ("kitti", "kitti_raw"))
    data, quirks = settings.data, settings.quirks
    rate = quirks.pad_rate or tuple(p / c for p, c in zip(data.pad, data.crop, strict=True))
    x, y = FOCAL_RATIOS[preset]
    assert data.scale / rate[1] == pytest.approx(x, abs=6e-6)
    assert data.scale / rate[0] == pytest.approx(y, abs=6e-6)
    for crop, pad in zip(data.crop, data.pad, strict=True):
        assert math.ceil(int(crop * data.scale) / 32) * 32 == pad
    assert quirks.white_256 and quirks.pixels_over_size
    assert quirks.transposed_bev_grid == (preset == "nuscenes_bev")


SMALL = """
    volume.nodes=13,13,5 backbone.depth=18 backbone.width=8 backbone.weights=none encoder.dim=12
    encoder.layers=1 encoder.points_cross=2,3,3 encoder.points_self=2 field.hidden=8
    render.rays=4,6 render.samples=12 data.crop=64,96 data.pad=64,96 data.target_crop=none
    data.scale=1 quirks.pad_rate=none
"""


@pytest.mark.parametrize("preset", published.PRESETS)
def test_a_training_step(preset):
    """The losses of the preset are finite and reach all that is trained, in miniature."""
    torch.manual_seed(0)
    settings = presets.build(preset, SMALL.split())
    model = SelfOcc(settings).train()
    batch = random_batch(settings, seed=0).to(torch.device("cpu"))
    cameras, rays = settings.data.cameras, 24
    shape = (1, cameras, rays)
    pixels = fixed_pixels(settings.render.rays, (64, 96))
    noise = Noise(pixels, torch.rand(shape), torch.rand(*shape, 3), torch.rand(1, 3))
    scene = photometric_scene(batch, pixels, settings.quirks)
    assert not needs_samples(settings.loss)
    volume, view = model(batch, noise, scene)
    losses = objective(settings, batch, volume, view, scene, noise.shift)
    assert len(losses) == sum(w > 0 for w in WEIGHTS[preset]) + (WEIGHTS[preset][3] == 0)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert model.encoder.camera_embedding.shape[0] == cameras == (6 if "nuscenes" in preset else 1)


def test_street_reads_real_drives_as_it_would_learn_from_them():
    street = presets.build("street", ["render.samples=7"])
    read = presets.reading(street, "kitti_raw")
    assert read.data == presets.build("street_kitti_raw").data
    assert read.render.eval_rays == (44, 152) and read.render.samples == 7
    assert presets.reading(street, None) is street
    assert presets.reading(street, "nuscenes") is street
    plain = presets.build("synthetic")
    assert presets.reading(plain, "kitti") is plain


@pytest.mark.parametrize("name", ["street", "synthetic", "street_kitti", "street_kitti_raw"])
def test_weights_that_ship_fit(name):
    found = checkpoint.load(Path("street"))
    model = SelfOcc(presets.build(name))
    checkpoint.restore(found, model)
    assert torch.equal(model.lift.head.last.bias, found.model["lift.head.last.bias"])
