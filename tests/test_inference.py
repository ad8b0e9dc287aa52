"""Images to voxels in one call, as evaluation has them."""

import json

import pytest
import torch

from kernels import dispatch
from selfocc import InputError, bench, count, presets, protocols
from selfocc.batch import Frames
from selfocc.inference import Predictor
from selfocc.labels import label_map
from selfocc.model import SelfOcc
from selfocc.render import render_grid
from tests.tiny import overrides

SMALL = ["volume.nodes=17,17,5", "data.crop=64,96", "data.pad=64,96", "data.scale=1"]
SMALL += ["backbone.depth=18", "backbone.width=8", "backbone.weights=none", "encoder.dim=12"]
SMALL += ["encoder.layers=1", "encoder.points_cross=2,3,3", "field.hidden=8", "optim.batch=1"]


def made(preset, *changes):
    torch.manual_seed(0)
    settings = presets.build(preset, [*SMALL, *changes])
    batch = bench.random_batch(settings, 0).to(torch.device("cpu"))  # which makes floats of bytes
    return SelfOcc(settings).eval(), batch


@pytest.mark.parametrize("protocol", ["own", "published"])
@pytest.mark.parametrize("preset", ["kitti", "nuscenes", "street"])
def test_voxels_are_those_of_the_evaluation(preset, protocol):
    model, batch = made(preset)
    rules, settings = protocols.choose(model.config, protocol), model.config
    predict = Predictor(model, rules)
    with torch.no_grad():
        volume = model.see(batch).voxels
        expected, likeliest = protocols.read_voxels(
            volume, settings.field.classes, rules, settings.volume.box, predict.shape
        )
    for _ in range(2):
        sdf, classes = predict(batch.images, batch.intrinsics, batch.camera_to_volume)
        assert torch.equal(sdf, expected) and sdf.is_inference()
    if preset != "nuscenes":
        assert classes is None
        return
    table = torch.tensor(label_map(settings.data).voxel_classes("nuscenes"))
    free = expected > settings.volume.threshold
    assert torch.equal(classes, torch.where(free, 0, table[likeliest])) and classes.any()


def test_training_goes_on_after_inference():
    """What is made once in inference mode serves autograd as well."""
    model, batch = made("street", "optim.sweep_steps=0")
    Predictor(model)(batch.images, batch.intrinsics, batch.camera_to_volume)
    volume, _, depth = model.train().see(batch)
    (volume.sum() + model.swept_error(batch, depth)).backward()
    assert model.backbone.conv1.weight.grad.isfinite().all()


def test_half_precision_gives_a_volume_in_float32():
    model, batch = made("nuscenes", "optim.bf16=true")
    exact, _ = made("nuscenes")
    with torch.no_grad():
        found, expected = model.see(batch).volume, exact.see(batch).volume
    assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float())
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()
    sdf, _ = Predictor(model)(batch.images, batch.intrinsics, batch.camera_to_volume)
    assert sdf.dtype == torch.float32


@pytest.mark.parametrize("preset", ["kitti", "nuscenes", "nuscenes_bev", "street"])
def test_nothing_waits_that_a_graph_could_not_hold(preset):
    model, batch = made(preset, "optim.bf16=true")
    predict, operators = Predictor(model.to("meta"), graph=False), count._Operators()
    with count._counted(operators) as functions, dispatch.record():
        given = [x.pin_memory() for x in (batch.images, batch.intrinsics, batch.camera_to_volume)]
        predict(*given)
        functions.count = operators.count = count.Count()
        sdf, _ = predict(*given)
    assert sdf.is_meta and not operators.count.waits


def test_a_graph_needs_a_gpu():
    model, _ = made("street")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="a CUDA graph needs a GPU"):
            Predictor(model, graph=True)


def test_depth_and_colour_without_classes_are_the_same():
    model, batch = made("nuscenes", "render.eval_samples=24")
    with torch.no_grad():
        volume = model.see(batch).volume
        assert volume.shape[1] == 25
        size, rays = tuple(batch.target.images.shape[-2:]), (6, 8)
        depth, color = render_grid(model, volume, batch.target, size, rays)
        pixels = bench.fixed_pixels(rays, size)
        frames = Frames(*vars(batch.target).values())
        whole = model.render(volume, frames, pixels, 24, stop_below=bench.SPENT)
    assert whole.semantics.shape[-1] == 21
    torch.testing.assert_close(depth.flatten(2), whole.depth, rtol=1e-6, atol=0)
    torch.testing.assert_close(color.flatten(2, 3), whole.color, rtol=1e-6, atol=1e-7)


def test_as_a_command(tmp_path, capsys):
    words = ["--inference", "--repeats", "1", "--out", str(tmp_path / "frames.json")]
    words += ["--preset", "synthetic", "--backends", "torch"]
    assert bench.main([*words, *(word for c in overrides() for word in ("--set", c))]) == 0
    row = json.loads((tmp_path / "frames.json").read_text())["runs"][-1]
    assert row["frame_ms"] > 0 and row["peak_bytes"] > 0 and not row["graph"]
    assert "frames/s" in capsys.readouterr().out
