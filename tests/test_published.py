"""Published checkpoints: names, sizes, values, what is refused, and parity through the import."""

import gzip
import json
import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch

import eval as eval_script
from selfocc import InputError, checkpoint, config, presets, published
from selfocc.model import SelfOcc
from selfocc.training import learning_rate
from tests import goldens
from tests.tiny import ROOT, SETTINGS

SMALL = [
    f"{name}={value}"
    for name, value in SETTINGS.items()
    if name.split(".")[0] in ("encoder", "field", "backbone")
] + ["backbone.weights=none", "volume.nodes=17,17,5"]  # fmt: skip


def small(preset="kitti", *overrides) -> tuple[config.Config, dict[str, torch.Tensor]]:
    """A configuration and random weights of ours, batch norm and colours included."""
    torch.manual_seed(0)
    settings = presets.build(preset, [*SMALL, *overrides])
    state = SelfOcc(settings).state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1) if "running_var" in name else tensor.normal_(std=0.3)
        else:
            tensor.fill_(7)
    return settings, state


@pytest.fixture
def file(tmp_path):
    """A published file of few parameters, made of `small`."""
    settings, state = small()
    published.export_published(tmp_path / "published.pth", settings, state, {})
    return tmp_path / "published.pth"


def content(path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def official_layouts() -> dict[str, list]:
    """Names and shapes of the published configurations, in their order."""
    path = goldens.path("official_keys.json.gz")
    return json.loads(gzip.decompress(path.read_bytes()))


@pytest.mark.parametrize("preset", published.PRESETS)
def test_names_and_shapes_are_the_published_ones(preset, capsys):
    theirs = {name: tuple(shape) for name, shape in official_layouts()[preset]}
    ours = published.published_shapes(presets.build(preset))
    assert list(ours.items()) == list(theirs.items())
    names = published.published_names(presets.build(preset))
    used = [name for name in names.values() if name is not None]
    assert len(set(used)) == len(used) == len(theirs) - 3


@pytest.mark.parametrize("preset", published.PRESETS)
def test_the_preset_is_guessed(preset, capsys):
    settings = presets.build(preset)
    state = {
        name: torch.zeros(()).expand(shape)
        for name, shape in published.published_shapes(settings).items()
    }
    state["head.model.field.aabb"] = torch.tensor(settings.volume.box).view(2, 3)
    found = published.choose("file", state)
    said = capsys.readouterr().out
    if preset == "kitti_novel_depth":  # the same layout as the occupancy configuration
        assert found.preset == "kitti" and "those of kitti_novel_depth too" in said
    else:
        assert found == settings and f"of preset {preset} (guessed" in said
    assert published.choose("file", state, preset) == settings


@pytest.mark.parametrize("preset", ["kitti", "kitti_raw", "nuscenes_bev"])
def test_round_trip_gives_back_every_bit(preset, tmp_path):
    settings, state = small(preset, "field.classes=2")
    published.export_published(tmp_path / "a.pth", settings, state, {})
    first = content(tmp_path / "a.pth")
    first["head.model.field_background"] = torch.tensor([0.3])  # no effect, and kept all the same
    state = {f"module.{name}": tensor for name, tensor in first.items()}
    torch.save(state, tmp_path / "b.pth")  # bare, and as saved from a parallel module
    nodes = [] if preset != "nuscenes_bev" else ["--set", "volume.nodes=17,17,5"]
    words = ["import", tmp_path / "b.pth", tmp_path / "c.safetensors", "--preset", preset, *nodes]
    words += ["--set", "encoder.heads=1"]
    checkpoint.convert([str(word) for word in words])
    checkpoint.convert(["export", str(tmp_path / "c.safetensors"), str(tmp_path / "d.pth")])
    again = content(tmp_path / "d.pth")
    assert list(again) == list(first)
    assert all(torch.equal(again[name], first[name]) for name in first)
    model = checkpoint.load(tmp_path / "c.safetensors")
    assert model.config.field.colors == settings.field.colors and model.config.field.classes == 2
    SelfOcc(model.config).load_state_dict(model.model)


def test_colours_keep_their_brightness_without_the_quirk(tmp_path):
    settings, state = small("kitti", "quirks.white_256=false")
    published.export_published(tmp_path / "a.pth", settings, state, {})
    found, again, _ = published.import_published(
        tmp_path / "a.pth", "kitti", ["encoder.heads=1", "backbone.weights=none"]
    )
    assert found.quirks.white_256
    x = torch.randn(5, 8)
    features = [
        torch.nn.functional.linear(x, s["decoder.net.3.weight"], s["decoder.net.3.bias"])[:, 1:4]
        for s in (state, again)
    ]
    ours, theirs = (torch.relu(published.SH0 * f + 0.5) for f in features)
    assert ours.std() > 0.1
    torch.testing.assert_close(theirs * (256 / 255), ours, rtol=1e-5, atol=1e-6)
    assert torch.equal(content(tmp_path / "a.pth")["lifter.tpv_hw"][0], state["encoder.queries.hw"])


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["encoder.lift=true"], "encoder.lift"),
        (["volume.nodes=257,257,33", "encoder.stride=2,2"], "encoder.stride"),
        (["render.margin_top=6"], "render.margin"),
        (["render.bend=0.5"], "render.bend"),
        (["render.alpha=volsdf"], "render.alpha=volsdf"),
        (["backbone.norm=group"], "backbone.norm=group"),
    ],
)
def test_what_they_cannot_compute_is_not_exported(overrides, reason, tmp_path):
    settings, state = small("kitti", *overrides)
    with pytest.raises(InputError, match=f"no {reason}"):
        published.export_published(tmp_path / "a.pth", settings, state, {})
    assert not (tmp_path / "a.pth").exists()


def damage(file, kind):
    """Make of a published file one that must be refused."""
    state = content(file)
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif kind == "damaged":
        whole = bytearray(file.read_bytes())
        whole[len(whole) // 2] ^= 1
        file.write_bytes(whole)
    elif kind == "empty file":
        file.write_bytes(b"")
    elif kind == "text":
        file.write_text("a web page")
    elif kind == "code":

        class Payload:
            def __reduce__(self):
                return os.system, ("touch /tmp/this-must-not-run",)

        torch.save({"state_dict": state, "extra": Payload()}, file)
    elif kind == "bare pickle":
        file.write_bytes(pickle.dumps({"state_dict": {}}))
    elif kind == "compressed":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", b"\0" * 50_000_000)
    elif kind == "claims":
        torch.save({"lifter.bev": torch.zeros(1).expand(1 << 40)}, file)
    else:
        torch.save(
            {
                "empty dict": {},
                "empty state": {"state_dict": {}},
                "no state": [1, 2],
                "other network": {"fc.weight": torch.ones(3)},
                "missing": {k: v for k, v in state.items() if k != "img_backbone.bn1.weight"},
                "unexpected": state | {"head.extra": torch.ones(2)},
                "another shape": state | {"encoder.layers.0.norms.1.bias": torch.ones(3)},
                "nan": state | {"encoder.level_embeds": torch.full((4, 8), torch.nan)},
                "no size": state | {"encoder.cams_embeds": torch.ones(0, 8)},
                "box": state | {"head.model.field.aabb": torch.ones(2)},
                "sparse": state | {"encoder.cams_embeds": torch.ones(1, 8).to_sparse()},
                "words": state | {"epoch": "three"},
            }[kind],
            file,
        )


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("truncated", "not a whole file"),
        ("damaged", "damaged"),
        ("empty file", "not a whole file"),
        ("text", "not a whole file"),
        ("code", "needs to run"),
        ("bare pickle", "not a whole file"),
        ("compressed", "compressed"),
        ("claims", "claims more numbers"),
        ("empty dict", "no state dict"),
        ("empty state", "no state dict"),
        ("no state", "no state dict"),
        ("other network", "no SelfOcc in it (such as fc.weight)"),
        ("missing", "1 names missing, 0 unexpected, 0 of another shape"),
        ("unexpected", "0 names missing, 1 unexpected, 0 of another shape"),
        ("another shape", "0 names missing, 0 unexpected, 1 of another shape"),
        ("nan", "encoder.level_embeds holds NaN"),
        ("no size", "of another shape"),
        ("box", "1 of another shape"),
        ("sparse", "'encoder.cams_embeds' is a Tensor, not a plain tensor"),
        ("words", "'epoch' is a str, not a plain tensor"),
    ],
)
def test_unusable_files_are_refused_in_a_line(kind, said, file, capsys):
    damage(file, kind)
    words = ["import", file, file.with_suffix(".out"), "--set", "encoder.heads=1"]
    assert checkpoint.main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and str(file) in lines[-1] and said in lines[-1]
    listed = {
        "missing": "missing: img_backbone.bn1.weight [8]",
        "unexpected": "unexpected: head.extra [2]",
        "another shape": "of another shape: encoder.layers.0.norms.1.bias is [3], preset kitti",
    }
    if kind in listed:
        assert len(lines) == 2 and lines[0].startswith(listed[kind])
    assert not any("Traceback" in line for line in lines)
    assert not file.with_suffix(".out").exists()


def test_evaluation_of_a_published_file(file, cache, monkeypatch, capsys):
    monkeypatch.setenv("SELFOCC_CACHE", str(cache))
    sizes = "data.crop=32,64 data.pad=32,64 data.scenes=1 data.scenes_val=1 data.frames=12"
    sizes += " encoder.heads=1 render.eval_rays=8,16 render.eval_samples=16"
    options = [word for setting in sizes.split() for word in ("--set", setting)]
    options += ["--set", "optim.workers=0", "--dataset", "synthetic", "--task", "depth"]
    options += ["--prior-frames", "2", "--pictures", "1", "--frames", "2"]
    assert eval_script.main(["--ckpt", str(file), "--preset", "kitti_raw", *options]) == 0
    said = capsys.readouterr().out
    assert "volume.nodes is (17, 17, 5) in the file" in said and "AbsRel" in said
    assert eval_script.main(["--ckpt", str(file), "--preset", "kiti"]) == 2
    assert "did you mean 'kitti'" in capsys.readouterr().err


IMPORT = """
import sys
from pathlib import Path
from selfocc import checkpoint

def memory(name):
    return int(Path("/proc/self/status").read_text().partition(name + ":")[2].split()[0]) * 1024

before = memory("VmRSS")
code = checkpoint.main(sys.argv[1:])
print(memory("VmHWM") - before)
sys.exit(code)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_a_file_of_full_size_is_held_in_memory_once(tmp_path):
    """35.8 M parameters; 1.6 times the file was measured on top of what torch and Triton take."""
    state = {
        name: torch.zeros(shape, dtype=torch.int64 if name.endswith("tracked") else None)
        for name, shape in published.published_shapes(presets.build("kitti")).items()
    }
    assert sum(t.numel() for t in state.values() if t.is_floating_point()) > 35_000_000
    torch.save({"state_dict": state}, tmp_path / "full.pth")
    size = (tmp_path / "full.pth").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, "import", tmp_path / "full.pth", tmp_path / "a.safetensors"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.safetensors").stat().st_size > 0.99 * size
    assert int(done.stdout.splitlines()[-1]) < 2 * size
    for name in ("a.safetensors", "full.pth"):
        (tmp_path / name).unlink()


@pytest.mark.parametrize(("preset", "recorded"), [("kitti", "kitti_occ"), ("nuscenes", None)])
def test_learning_rates_are_the_published_ones(preset, recorded):
    table = json.loads(goldens.path("extra/lr_schedule.json").read_text())
    optim = presets.build(preset).optim
    part = table[recorded or "nuscenes_occ"]
    for row in part["table"]:
        after = row["after_step_update"]
        step = 0 if isinstance(after, str) else after + 1  # the step that uses it
        for base, name in ((optim.lr, "lr_rest"), (optim.lr * 0.1, "lr_img_backbone")):
            assert learning_rate(optim, base, step) == pytest.approx(row[name], rel=1e-9), after
    groups = {group["name"]: group["lr_initial"] for group in part["param_groups"]}
    assert groups["img_backbone.0.weight"] == optim.lr * optim.backbone_factor
    assert all(group["weight_decay"] == optim.weight_decay for group in part["param_groups"])
