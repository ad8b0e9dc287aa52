"""The benchmark's arithmetic, and every kernel compiled for GPUs that are not there."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import dispatch
from kernels.bench import __main__ as bench
from kernels.bench import cases, clock, compile, measure, scenes
from kernels.bench.compile import TARGETS
from kernels.dispatch import triton
from selfocc import bench as steps
from selfocc import presets
from selfocc.model import SelfOcc
from tests.tiny import ROOT, overrides

ON_LINUX = pytest.mark.skipif(not hasattr(triton, "compile"), reason="Triton is not installed")


def kernel_names() -> set[str]:
    """Functions under @triton.jit that are launched."""
    jitted, launched = {}, set()
    for file in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                if "triton.jit" in [ast.unparse(d) for d in node.decorator_list]:
                    jitted[node.name] = f"{file.stem}.{node.name}"
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "launch":
                launched.add(ast.unparse(node.args[0]))
    return {jitted[name] for name in launched}


@pytest.fixture(scope="module")
def compiled(compilation) -> list[dict]:
    """At published sizes every kernel for every target, its other launches for the H200 alone."""
    out, errors = compilation.communicate()
    assert compilation.returncode == 0, errors
    return json.loads(out)


@ON_LINUX
def test_every_kernel_compiles_for_every_target(compiled):
    everywhere = {row["kernel"] for row in compiled if list(row["targets"]) == list(TARGETS)}
    assert everywhere == kernel_names()
    failed = {
        (row["kernel"], row["case"], target): report["failed"]
        for row in compiled
        for target, report in row["targets"].items()
        if "failed" in report
    }
    assert not failed


@ON_LINUX
def test_no_spills_from_ampere_on(compiled):
    spilled = {
        (row["kernel"], row["case"], target): report["spills"]
        for row in compiled
        for target, report in row["targets"].items()
        if target.startswith("cuda")
        and target != "cuda 75"
        and report["spills"]
        # three products for one are for checks and --set optim.tf32=false
        and "precision='tf32x3'" not in row["constants"].get("S", "")
    }
    assert not spilled


@ON_LINUX
@pytest.mark.parametrize(
    ("kernel", "loads"),
    [
        # eight corners of the table's rows, and eight of the four channels
        ("render_triton.render_forward", 16),
        ("render_triton.render_backward", 16),
        ("deformable_triton.deformable_forward", 13),
        ("deformable_triton.deformable_backward", 12),
        ("decode.decode_forward", 12),
    ],
)
def test_lanes_read_16_bytes_at_once(compiled, kernel, loads):
    float32 = [
        row["targets"]["cuda 90"]["wide_loads"]
        for row in compiled
        if row["kernel"] == kernel and row["case"].endswith("kitti")
    ]
    assert float32 and min(float32) >= loads


@ON_LINUX
def test_the_decoder_multiplies_on_tensor_cores(compiled):
    """And its tiles fit the shared memory of the GPUs."""
    rows = [row for row in compiled if row["kernel"].startswith("decode.")]
    limits = {"cuda 75": 64, "cuda 80": 163, "cuda 90": 227, "cuda 100": 227}  # KB a program
    said = " ".join(row["constants"]["S"] for row in rows)
    assert all(f"precision='{name}'" in said for name in ("tf32", "tf32x3", "bf16"))
    for row in rows:
        for target, report in row["targets"].items():
            assert report["products"] > 0 or target in ("cuda 75", "hip gfx1100"), (row, target)
            limit = limits.get(target, 99 if target.startswith("cuda") else 64)
            assert report["shared"] <= limit << 10, (row, target)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        # 8 bytes an element and its heads; 40 values, 63 numbers of samples, 28 outputs
        (lambda: cases.deformable_bytes(1, 10, 7, 2, 4, 3), (1048, 1552 + 640)),
        (lambda: cases.deformable_bytes(3, 10, 7, 2, 4, 3, e=2), (844, 1096 + 1920)),
        (lambda: cases.rendering_bytes(100, 3, 5, 8, 2), (1820 + 320, 1820 + 3200)),
        (lambda: cases.composite_bytes(5, 8, 3), (880, 1520)),
        (lambda: cases.similarity_bytes(10, 3), (280, 400)),
        (lambda: cases.least_bytes(2, 1, 10), (10 * (34 + 24 + 4), 620 + 320)),
        (lambda: cases.proposal_bytes(2, 100, 5, 8), (2740, 2900)),
        (lambda: cases.node_bytes(100), (400, 800)),
        (lambda: cases.decoding_bytes(50, 100, 5, e=2), (100 + 2000, 2100 + 200)),
    ],
    ids=[
        "deformable",
        "bf16_deformable",
        "render",
        "composite",
        "ssim",
        "least",
        "proposals",
        "nodes",
        "decode",
    ],
)
def test_bytes_that_must_move(count, expected):
    assert count() == expected


def test_published_sizes():
    named = {case.name: case for case in cases.cases(["kitti", "nuscenes"])}
    attention = named["deformable_sampling self-attention, kitti"]
    inputs = attention.inputs(scenes.Draw("meta"))
    assert inputs["offsets"].shape == (1, 83_011, 6, 3, 12, 2)
    assert attention.moved(inputs)[0] == 4 * 6 * 83_011 * (16 + 3 * 36 + 16)
    rays = named["render_rays, nuscenes"].inputs(scenes.Draw("meta"))
    assert rays["volume"].shape == (1, 25, 257, 257, 25) and rays["near"].shape == (1, 28_800)
    seen = named["deformable_sampling images to hw, kitti"].inputs(scenes.Draw("meta"))
    share = scenes.seen_queries(scenes.SIZES["kitti"], 0)[1].float().mean()
    assert 0.5 < share < 0.8  # what a 80 degree camera sees of the square
    assert seen["seen"].shape == (1, 1, 66_049)


def test_geometry_of_the_cases():
    size = scenes.SIZES["nuscenes"]
    rays = scenes.rays_of(size)
    torch.testing.assert_close(rays["directions"].norm(dim=-1), torch.ones(1, size.ray_count))
    assert (rays["far"] > rays["near"]).all()
    front, back = rays["directions"][0].view(6, -1, 3).mean(1)[[0, 3]]
    assert front[0] > 0.5 and back[0] < -0.5
    references, seen = scenes.seen_queries(size, 0)
    inside = ((references > 0) & (references < 1)).all(-1).any(-1)
    assert seen.shape == (1, 6, 257 * 257) and inside[seen].all()


def test_tables_and_json_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "times.json"
    words = ["--kernel", "node_losses", "--sizes", "small", "--targets", "cuda 90"]
    words += ["--threads", "1", "--out", str(out)]
    assert bench.main(words) == 0
    report = json.loads(out.read_text())
    said = capsys.readouterr().out
    if not torch.cuda.is_available():
        assert said.startswith("No GPU here")
    (checked,) = report["correctness"]
    assert checked["right"] and checked["triton"] < 1e-4
    assert report["times"][0]["both_ms"] > 0 and "node_losses, small" in said


@pytest.mark.parametrize("words", [["--kernel", "node_losses"], ["--compile-only"]])
def test_it_runs_as_a_command(words, tmp_path):
    """Spawned processes import what they run, which they cannot from `__main__`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "kernels.bench",
        "--sizes",
        "small",
        "--threads",
        "1",
        "--json",
    ]
    command += ["--kernel", "node_losses", "--targets", "cuda 90", "--threads", "1", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    if "--compile-only" in words or not torch.cuda.is_available():
        assert len(report["compiled"]) >= 2
    assert "--compile-only" in words or report["times"][0]["both_ms"] > 0


def test_on_a_gpu_triton_is_timed_first_and_the_file_is_whole_after_every_line(
    tmp_path, monkeypatch
):
    out, seconds, seen = tmp_path / "times.json", iter(range(0, 1000, 20)), []

    def timed(case, call, repeats):
        seen.append(json.loads(out.read_text())["times"] if seen else [])
        return dict(forward_ms=1.0, both_ms=2.0, forward_bytes=8, both_bytes=8) | dict(
            forward_peak_bytes=8, both_peak_bytes=8
        )

    stubs = dict(copy_bandwidth=lambda: 1.0, warm_up=lambda *_: None, correctness=lambda *_: [])
    for name, stub in stubs.items():
        monkeypatch.setattr(bench, name, stub)
    monkeypatch.setattr(measure, "_gpu_measure", timed)
    monkeypatch.setattr(measure, "_deformops", lambda size: id)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(bench.time, "monotonic", lambda: next(seconds))
    words = ["--kernel", "deformable_sampling", "--sizes", "small", "--minutes", "3"]
    assert bench.main([*words, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["times"]
    names = ["triton"] * 4 + ["deformops"] + ["reference"] * 4  # no time is left for torch.compile
    assert [row["implementation"] for row in rows] == names
    assert [len(before) for before in seen] == list(range(len(rows)))


def test_the_volume_is_laid_out_as_in_training():
    settings = presets.build("synthetic", overrides(optim__batch="1"))
    model = SelfOcc(settings)
    volume = model.see(steps.random_batch(settings, 0)).volume
    named = {case.name: case for case in cases.cases(["small"])}
    for name in ("render_rays, small", "render_photometric combined, small"):
        assert named[name].inputs(scenes.Draw("cpu"))["volume"].stride(1) == volume.stride(1) == 1


@pytest.mark.parametrize("preset", ["synthetic", "nuscenes_small"])
def test_batches_are_laid_out_as_in_training(preset):
    settings = presets.build(preset, overrides(optim__batch="2"))
    batch = steps.random_batch(settings, 0)
    tensors = [batch.images, batch.intrinsics, batch.camera_to_volume]
    tensors += [*vars(batch.target).values(), *vars(batch.sources).values()]
    tensors += [] if batch.semantics is None else [batch.semantics]
    assert all(x.is_contiguous() and x.is_pinned() == torch.cuda.is_available() for x in tensors)
    assert batch.sources.images.shape[:3] == (2, 2, settings.data.cameras)
    assert not batch.images[0].equal(batch.images[1])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sizes", "kitty"], "--sizes: 'kitty' is not one of kitti, nuscenes, small"),
        (["--threads", "0"], "argument --threads: '0' is not a whole number of 1 or more"),
        (["--repeats", "-1"], "argument --repeats: '-1' is not a whole number of 1 or more"),
        (["--out", "file/times.json"], "cannot write file/times.json: Not a directory; --out"),
    ],
)
def test_options_are_checked(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(SystemExit) as exit:
        bench.main(words)
    errors = capsys.readouterr().err
    assert exit.value.code == 2 and errors.startswith(f"error: {said}") and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--repeats", "0"], "argument --repeats: '0' is no whole number from 1 on"),
        (["--backends", "cuda"], "--backends cuda: backend must be one of auto, torch, triton"),
        (["--out", "file/times.json"], "cannot write file/times.json: Not a directory; --out"),
        (["--preset", "kitty"], "unknown preset 'kitty'"),
    ],
)
def test_options_of_whole_steps_are_checked_before_the_work(
    words, said, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert steps.main(words) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {said}") and errors.count("\n") == 1


def test_output_that_cannot_be_written(tmp_path):
    clock.check_output(tmp_path / "a" / "new.json")
    assert (tmp_path / "a").is_dir() and not (tmp_path / "a" / "new.json").exists()
    (tmp_path / "old").write_text("kept")
    clock.check_output(tmp_path / "old")
    assert (tmp_path / "old").read_text() == "kept"
    for path in (tmp_path / "a", tmp_path / "old" / "new.json"):
        with pytest.raises(OSError):
            clock.check_output(path)


@ON_LINUX
@pytest.mark.parametrize("variable", ["TRITON_CACHE_DIR", "TRITON_HOME"])
def test_an_unwritable_cache_of_triton_is_told_before_the_work(
    variable, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").touch()
    for name in ("TRITON_INTERPRET", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "file"))
    with pytest.raises(SystemExit) as exit:
        bench.main(["--compile-only", "--kernel", "composite", "--sizes", "small"])
    errors = capsys.readouterr().err
    assert exit.value.code == 2 and errors.count("\n") == 1
    assert errors.startswith(f"error: cannot write {tmp_path / 'file'}")
    assert errors.endswith("TRITON_CACHE_DIR names another cache\n")


@ON_LINUX
def test_what_does_not_compile_is_told_with_an_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def fails(launch, target):
        raise RuntimeError("ptxas is missing\nmore") if "90" in target else AssertionError

    monkeypatch.setattr(compile, "compile_ahead", fails)
    words = ["--compile-only", "--kernel", "composite", "--sizes", "small", "--threads", "1"]
    assert bench.main([*words, "--targets", "cuda 90,cuda 80"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line[line.index("composite_forward") :] for line in lines] == [
        "composite_forward of composite, small for cuda 90 did not compile, nor did 3 others: "
        "RuntimeError: ptxas is missing",
        "composite_forward of composite, small for cuda 80 did not compile, nor did 3 others: "
        "AssertionError: ",
    ]


def test_training_steps_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "steps.json"
    words = ["--preset", "synthetic", "--repeats", "1", "--backends", "torch", "--out", str(out)]
    for change in overrides():
        words += ["--set", change]
    assert steps.main(words) == 0
    depth, row = json.loads(out.read_text())["runs"]
    assert list(row["stages_ms"]) == [
        "data to device",
        "backbone, FPN",
        "encoder",
        "lift",
        "decoder",
        "render",
        "losses",
        "backward",
        "optimiser",
    ]
    assert depth["depth_rays"] == 32 * 64 and row["peak_bytes"] > 0
    assert "million rays/s" in capsys.readouterr().out


def test_plain_pytorch_is_timed_last_and_the_file_is_whole_after_every_line(tmp_path, monkeypatch):
    out, seconds, seen = tmp_path / "steps.json", iter(range(0, 1000, 20)), []

    def timed(settings, device, repeats):
        seen.append((dispatch.backend(), json.loads(out.read_text())["runs"] if seen else []))
        return {}

    for name in ("time_depth", "time_steps"):
        monkeypatch.setattr(steps, name, timed)
    for name in ("depth_line", "step_table"):
        monkeypatch.setattr(steps, name, lambda row: "")
    monkeypatch.setattr(steps.time, "monotonic", lambda: next(seconds))
    words = ["--preset", "kitti", "--preset", "nuscenes", "--backends", "torch,triton"]
    assert steps.main([*words, "--minutes", "2", "--out", str(out)]) == 0
    # the seventh line ends after 140 s
    assert [backend for backend, _ in seen] == ["triton"] * 4 + ["torch"] * 3
    assert [len(before) for _, before in seen] == list(range(7))
