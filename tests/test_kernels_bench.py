"""The benchmark's arithmetic, and every kernel compiled for GPUs that are not there."""

import ast
import json

import pytest
import torch

from kernels import bench, cases, scenes
from kernels.ahead import TARGETS
from kernels.dispatch import triton
from selfocc import bench as steps
from tests.tiny import ROOT, overrides

ON_LINUX = pytest.mark.skipif(not hasattr(triton, "compile"), reason="Triton is not installed")


def kernel_names() -> set[str]:
    """Functions under @triton.jit that are launched: those that ask which program they are."""
    names = set()
    for file in (ROOT / "kernels").glob("*.py"):
        text = file.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and "program_id" in ast.get_source_segment(
                text, node
            ):
                decorators = [ast.unparse(d) for d in node.decorator_list]
                names |= {f"{file.stem}.{node.name}"} if "triton.jit" in decorators else set()
    return names


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
        if target.startswith("cuda") and target != "cuda 75" and report["spills"]
    }
    assert not spilled


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
    assert 0.5 < len(seen["pairs"]) / 66_049 < 0.8  # what a 80 degree camera sees of the square


def test_geometry_of_the_cases():
    size = scenes.SIZES["nuscenes"]
    rays = scenes.rays_of(size)
    torch.testing.assert_close(rays["directions"].norm(dim=-1), torch.ones(1, size.ray_count))
    assert (rays["far"] > rays["near"]).all()
    front, back = rays["directions"][0].view(6, -1, 3).mean(1)[[0, 3]]
    assert front[0] > 0.5 and back[0] < -0.5
    pairs, references = scenes.visible_pairs(size, 0)
    assert (pairs[:, 0].diff() >= 0).all() and pairs[:, 1].max() < 257 * 257
    assert ((references > 0) & (references < 1)).all(-1).any(-1).all()


def test_tables_and_json_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "times.json"
    words = ["--kernel", "composite", "--sizes", "small", "--targets", "cuda 90"]
    words += ["--threads", "1", "--out", str(out)]
    assert bench.main(words) == 0
    report = json.loads(out.read_text())
    said = capsys.readouterr().out
    if not torch.cuda.is_available():
        assert said.startswith("No GPU here")
    (checked,) = report["correctness"]
    assert checked["right"] and checked["triton"] < 1e-4
    assert report["times"][0]["both_ms"] > 0 and "composite, small" in said


def test_options_are_checked(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--sizes", "kitty"])
    assert "'kitty' is not one of kitti, nuscenes, small" in capsys.readouterr().err


def test_training_steps_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "steps.json"
    words = ["--preset", "synthetic", "--repeats", "1", "--backends", "torch", "--out", str(out)]
    for change in overrides():
        words += ["--set", change]
    assert steps.main(words) == 0
    (row,) = json.loads(out.read_text())["runs"]
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
    assert row["depth_rays"] == 32 * 64 and row["peak_bytes"] > 0
    assert "million rays/s" in capsys.readouterr().out
