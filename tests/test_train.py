"""The two scripts from end to end, as a user runs them."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from selfocc import InputError, checkpoint
from tests.tiny import ROOT, TORCHRUN, environment, here, overrides, run


def weights(out):
    return load_file(out / checkpoint.FILE_NAME)


def metrics(out):
    return (out / "metrics.jsonl").read_text().splitlines()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_run_folder(finished):
    lines = [json.loads(line) for line in metrics(finished)]
    assert lines[-1]["step"] == 6 and 0 < lines[-1]["val_AbsRel_exact"] < 10
    assert {"photometric", "eikonal", "abs_rel", "lr"} <= lines[0].keys()
    assert (finished / "panel_000006.png").stat().st_size > 1000
    assert checkpoint.load(finished).step == 6


def test_eval_prints_tables_and_writes_them(finished, cache):
    done = run("eval.py", "--ckpt", finished, "--prior-frames", 2, "--pictures", 1, cache=cache)
    assert done.returncode == 0, done.stderr
    for word in ("IoU>0.3m", "AbsRel", "constant prior", "flat ground", "median prior", "identity"):
        assert word in done.stdout
    results = json.loads((finished / "eval" / "metrics.json").read_text())
    assert 0 <= results["occupancy"]["SelfOcc"]["iou"] <= 1
    assert (finished / "eval" / "frame_0000.png").exists()


def test_killed_run_resumes_to_the_same_weights(finished, cache, tmp_path):
    out = tmp_path / "killed"
    command = [sys.executable, "train.py", "--out", out]
    command += [word for override in overrides() for word in ("--set", override)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(cache), stderr=subprocess.DEVNULL)
    while not (out / checkpoint.FILE_NAME).exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    step = checkpoint.load(out).step
    assert step < 6, "the run was over before it could be killed"
    done = run("train.py", "--out", out, "--resume", cache=cache)
    assert done.returncode == 0, done.stderr
    assert same(weights(out), weights(finished))
    steps = [json.loads(line)["step"] for line in metrics(out)]
    assert steps == sorted(steps)


def test_fine_tuning_starts_from_a_checkpoint(finished, cache, tmp_path):
    still = {"optim.steps": 1, "optim.lr": 0.0, "optim.warmup": 0}
    still["backbone.weights"] = "absent.pth"  # not looked for, since the checkpoint has its own
    done = run("train.py", "--init", finished, "--out", tmp_path, cache=cache, **still)
    assert done.returncode == 0, done.stderr
    before, after = checkpoint.load(finished), checkpoint.load(tmp_path)
    assert (before.step, after.step) == (6, 1)
    learnt = [name for name in after.model if name.endswith(("weight", "bias"))]
    assert learnt and all(torch.equal(before.model[name], after.model[name]) for name in learnt)

    other = ("--out", tmp_path / "other")
    done = run("train.py", "--init", finished, *other, cache=cache, field__hidden=24)
    assert done.returncode == 2 and "the checkpoint is of another model" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "other").exists()


def test_weights_that_come_with_the_code(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "small.safetensors"
    assert checkpoint.main(["ship", str(finished), str(file)]) == 0
    assert file.stat().st_size < (finished / checkpoint.FILE_NAME).stat().st_size / 4
    whole, small = checkpoint.load(finished), checkpoint.load(Path("small"))
    assert (small.step, small.config, small.optimizer) == (6, whole.config, {})
    for name, tensor in whole.model.items():
        exact = tensor.ndim < 2  # norms, which half precision may not hold
        close = dict(rtol=0, atol=0) if exact else dict(rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(small.model[name], tensor, **close)
    (tmp_path / "small").mkdir()  # what is there goes first
    assert checkpoint.shipped(Path("small")) is None
    with pytest.raises(InputError, match="name another, or small, which the code brings"):
        checkpoint.load(Path("large"))


def test_interrupt_saves_and_says_so(cache, tmp_path):
    """Ctrl-C in a terminal reaches every process of the group: the loader's workers too."""
    out = tmp_path / "stopped"
    command = [sys.executable, "train.py", "--out", out]
    settings = overrides(optim__steps="100000", optim__save_every="100000", optim__workers="1")
    command += [word for override in settings for word in ("--set", override)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(cache),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume continues" in said and "Traceback" not in said
    assert checkpoint.load(out).step == int(re.search(r"saved step (\d+)", said)[1])


@pytest.mark.parametrize(("every", "kept"), [(2, 2), (100, None)])
def test_the_step_that_broke_is_named_and_its_weights_are_not_kept(
    every, kept, cache, tmp_path, monkeypatch, capsys
):
    """The norm is looked at when something is logged or kept, not at every step."""
    steps = []

    def broken_step(passes, optimizer, batches, step, rank, world):
        steps.append(step)
        next(batches)
        norm = torch.tensor(math.nan if step in (2, 5) else 1.0)
        with torch.no_grad():
            next(passes.model.parameters()).mul_(norm)
        return None, None, {"photometric": norm}, norm

    monkeypatch.setattr(train, "training_step", broken_step)
    changes = dict(optim__save_every=every, optim__picture_every=100, optim__steps=30)
    assert here(train, "--out", tmp_path / "run", cache=cache, **changes) == 2
    assert "step 2: the gradient is not finite" in capsys.readouterr().err
    assert steps == [*range(4 if kept else 10)]
    file = tmp_path / "run" / checkpoint.FILE_NAME
    assert file.exists() == bool(kept)
    if kept:
        assert checkpoint.load(file).step == kept
        assert all(x.isfinite().all() for x in weights(tmp_path / "run").values())


def test_two_processes_equal_one(cache, tmp_path):
    """Same global batch of two: one process with batch 2, and two with batch 1.

    Adam's first steps are lr * g / (|g| + 1e-8), so that rounding in a gradient of 1e-9 becomes
    a tenth of a step; with this lr a step is 20 times what is tolerated.
    """
    common = {
        "optim__steps": "2",
        "optim__warmup": "0",
        "optim__lr": "2e-4",
        "optim__sweep_steps": "1",
    }
    one = run("train.py", "--out", tmp_path / "one", cache=cache, optim__batch="2", **common)
    assert one.returncode == 0, one.stderr
    two = run(*TORCHRUN, "--out", tmp_path / "two", cache=cache, optim__batch="1", **common)
    assert two.returncode == 0, two.stderr
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert ours.keys() == theirs.keys()
    worst = max(float((ours[k].double() - theirs[k].double()).abs().max()) for k in ours)
    assert worst < 1e-5, worst
    gradients = [name for name in ours if name.endswith("exp_avg")]
    difference, size = (
        torch.stack([t.double().norm() for t in tensors]).norm()
        for tensors in ([ours[k] - theirs[k] for k in gradients], [ours[k] for k in gradients])
    )
    assert difference < 1e-5 * size
    ours, theirs = (json.loads(metrics(tmp_path / name)[0]) for name in ("one", "two"))
    for name in ("loss", "photometric", "color", "eikonal"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-5)
    assert two.stdout.count("training and") == 1  # only the first process talks
