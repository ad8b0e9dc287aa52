"""Models as files that compute what they do, in PyTorch's own operators."""

import json
import logging
import re
import zipfile
from importlib.util import find_spec

import pytest
import torch

import kernels
from kernels import naive
from selfocc import InputError, checkpoint, export, geometry, presets
from selfocc.config import from_dict
from selfocc.inference import Predictor
from selfocc.model import SelfOcc
from tests.tiny import overrides

ONNX = all(find_spec(name) for name in ("onnx", "onnxscript"))
needs_onnx = pytest.mark.skipif(not ONNX, reason="without packages onnx and onnxscript")
SMALL = dict(volume__voxel="8", volume__threshold="-0.3")
SMALL |= dict(backbone__depth="18", backbone__weights="none")
# lift; classes instead, of six cameras; the same of one plane
NAMES = "synthetic", "nuscenes", "nuscenes_bev"
MODELS = {name: presets.build(name, overrides(**SMALL)) for name in NAMES}


@pytest.fixture(autouse=True)
def unlogged():
    """Without the traces of what is traced, which pytest would write down."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def made(name: str) -> SelfOcc:
    """A model, none of whose parameters is zero."""
    torch.manual_seed(0)
    model = SelfOcc(MODELS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def written(name: str, kind: str, folder, capsys):
    """Predictor, path of the file and what the command has printed."""
    model, path = made(name), folder / f"model.{kind}"
    source = folder / "checkpoint.safetensors"
    checkpoint.write(source, checkpoint.Checkpoint(model.config, 0, model.state_dict()))
    words = ["--ckpt", str(folder), "--format", kind, "--out", str(path)]
    assert export.main(words) == 0, capsys.readouterr().err
    return Predictor(model), path, capsys.readouterr().out


def check(predict: Predictor, compute, metres: float) -> None:
    """A file against the model on frames that differ in one input each; at most so many metres."""
    config = predict.model.config
    first, second = (export.random_frame(config, seed) for seed in (7, 8))
    wide = second.intrinsics * torch.tensor([0.7, 0.7, 1.0]).double()[:, None]
    second = second._replace(intrinsics=wide)
    seen = [first] + [first._replace(**{key: getattr(second, key)}) for key in first._fields]
    before = None
    for frame in seen:
        sdf, classes = predict(*frame)
        with torch.no_grad():
            found = compute(*frame)
        assert len(found) == 1 + bool(config.field.classes)
        torch.testing.assert_close(found[0], sdf, rtol=0, atol=metres)
        assert sdf.std() > 0.01
        if before is not None:  # or what is compared would say nothing
            assert (sdf - before).abs().max() > 1e-3
        before = sdf if before is None else before
        if classes is not None:
            assert found[1].dtype == torch.int64 and (found[1] != classes).float().mean() < 1e-3
            assert 0 in classes and len(classes.unique()) > 2


def test_pt2(tmp_path, capsys, monkeypatch):
    geometry._constant.cache_clear()  # nothing that is only traced may be kept
    read, opened = export.opened, []
    monkeypatch.setattr(export, "opened", lambda *file: opened.append(read(*file)) or opened[0])
    predict, path, said = written("synthetic", "pt2", tmp_path, capsys)
    check(predict, opened[0], 1e-5)
    with zipfile.ZipFile(path) as parts:
        (name,) = (name for name in parts.namelist() if name.endswith("extra/config.json"))
        settings = json.loads(parts.read(name))
    assert from_dict(settings).volume == predict.model.config.volume
    error, noise = map(float, re.findall(r"([\d.e-]+) m of SDF \(at most", said))
    assert 0 <= error <= 4 * noise + 1e-6 < 1e-3 and "MB" in said


@pytest.mark.parametrize("name", ["nuscenes", "nuscenes_bev"])
def test_traced(name):
    """What `content` puts into both kinds of files."""
    predict = Predictor(made(name))
    frame = export.random_frame(MODELS[name], 0)
    predict(*frame)
    with torch.no_grad():
        program = torch.export.export(export.Exported(predict), tuple(frame))
    check(predict, program.module(), 1e-5)
    graphs = [m.graph for m in program.graph_module.modules() if hasattr(m, "graph")]
    called = {str(n.target) for g in graphs for n in g.nodes if n.op == "call_function"}
    assert "aten.grid_sampler.default" in called
    assert all(c.startswith(("aten.", "<built-in", "wrap_with_autocast")) for c in called), called


@needs_onnx
@pytest.mark.parametrize("name", NAMES)
def test_onnx(name, tmp_path, capsys):
    import onnx

    predict, path, said = written(name, "onnx", tmp_path, capsys)
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert [x.name for x in model.graph.input] == ["images", "intrinsics", "camera_to_volume"]
    names = ["sdf", "classes"] if predict.classes else ["sdf"]
    assert [x.name for x in model.graph.output] == names
    assert {(x.domain, x.version) for x in model.opset_import} == {("", 20)}
    assert {x.key for x in model.metadata_props} >= {"config.json"}
    compute = export.opened(path, "onnx")
    if compute is None:
        assert "not checked" in said
        pytest.skip("without package onnxruntime")
    # other last bits of a frame are up to 1.4e-4 m of the same model
    check(predict, compute, 1e-4)


@needs_onnx
def test_an_operator_that_onnx_lacks_is_named(monkeypatch):
    model = export.Exported(Predictor(made("nuscenes_bev")))
    decoder, decode = model.model.decoder, model.model.decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda planes: torch.special.i1e(decode(planes)))
    with torch.no_grad(), pytest.raises(InputError, match=r"no operator for [\w.]*i1e;"):
        export.content(model, export.random_frame(MODELS["nuscenes_bev"], 0), "onnx")


@pytest.mark.skipif(ONNX, reason="with packages onnx and onnxscript")
def test_packages_for_onnx_are_asked_for(tmp_path, capsys):
    model = made("nuscenes_bev")
    source = tmp_path / "weights.safetensors"
    checkpoint.write(source, checkpoint.Checkpoint(model.config, 0, model.state_dict()))
    words = ["--ckpt", str(source), "--format", "onnx", "--out", str(tmp_path / "x.onnx")]
    assert export.main(words) == 2 and not (tmp_path / "x.onnx").exists()
    assert capsys.readouterr().err.endswith("pip install onnx onnxscript\n")


def test_another_model_is_found_out():
    model, other = (export.Exported(Predictor(made("nuscenes"))) for _ in range(2))
    config = model.model.config
    with torch.no_grad():
        said = export.compared(model, other, config)
        assert "by 0.0e+00 m of SDF (at most 0.0e+00 m) and the class of 0.0e+00" in said
        other.model.encoder.queries["hw"] *= 1 + 1e-3
        with pytest.raises(InputError, match="wrong: it differs from the model by"):
            export.compared(model, other, config)
        with pytest.raises(InputError, match=r"by \S+ m of SDF \(at most nan m\)"):
            export.compared(model, lambda *x: [y * torch.nan for y in model(*x)], config)


def test_kernels_are_plain_whatever_the_backend(monkeypatch):
    class Sampled(torch.nn.Module):
        def forward(self, maps, place, seen):
            return kernels.sample_maps(maps, place, seen)

    given = torch.randn(1, 3, 4, 5, 6), torch.rand(1, 7, 3), torch.rand(1, 7) > 0.5
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    before = kernels.backend()
    kernels.backend("triton")
    try:
        program = torch.export.export(Sampled(), given)
    finally:
        kernels.backend(before)
    assert torch.equal(program.module()(*given), naive.sample_maps(*given))
