"""The two scripts from end to end, as a user runs them."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from selfocc import checkpoint
from tests.tiny import ROOT, environment, overrides, run


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory):
    """A run of six steps."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = run("train.py", "--out", out, cache=cache)
    assert done.returncode == 0, done.stderr
    return out


def weights(out):
    return load_file(out / checkpoint.FILE_NAME)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_run_folder(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
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
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_interrupt_saves_and_says_so(cache, tmp_path):
    out = tmp_path / "stopped"
    command = [sys.executable, "train.py", "--out", out]
    settings = overrides(optim__steps="100000", optim__save_every="100000")
    command += [word for override in settings for word in ("--set", override)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(cache), stderr=subprocess.PIPE, text=True
    )
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume continues" in said and "Traceback" not in said
    assert checkpoint.load(out).step == int(re.search(r"saved step (\d+)", said)[1])


def test_two_processes_equal_one(cache, tmp_path):
    """Same global batch of two: one process with batch 2, and two with batch 1."""
    one = run("train.py", "--out", tmp_path / "one", cache=cache, optim__batch="2", optim__steps="2")
    assert one.returncode == 0, one.stderr
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py"]
    command += ["--out", tmp_path / "two"]
    command += [w for o in overrides(optim__batch="1", optim__steps="2") for w in ("--set", o)]
    two = run(*command, cache=cache)
    assert two.returncode == 0, two.stderr
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert ours.keys() == theirs.keys()
    worst = max(float((ours[k].double() - theirs[k].double()).abs().max()) for k in ours)
    assert worst < 1e-5, worst


@pytest.mark.parametrize(
    "command, said",
    [
        (("train.py", "--dataset", "kitti"), "needs --data DIR"),
        (("train.py", "--dataset", "kitti", "--data", "nowhere"), "nowhere"),
        (("train.py", "--preset", "sinthetic"), "did you mean 'synthetic'"),
        (("train.py", "--set", "optim.step=3"), "did you mean 'steps'"),
        (("train.py", "--unknown"), "unrecognized arguments: --unknown"),
        (("train.py", "--device", "cuda"), "--device cuda"),
        (("train.py", "--backbone-weights", "nowhere.pth"), "nowhere.pth"),
        (("train.py", "--resume"), "no checkpoint"),
        (("eval.py", "--ckpt", "nowhere"), "no checkpoint"),
        (("eval.py", "--ckpt", "README.md"), "not a readable checkpoint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_command_line(command, said, cache, tmp_path):
    if "--device" in command and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    if command[0] == "train.py":
        command = (*command, "--out", tmp_path / "run")
    done = run(*command, cache=cache)
    assert done.returncode == 2
    assert said in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_run_folder_is_not_overwritten(finished, cache):
    before = (finished / checkpoint.FILE_NAME).read_bytes()
    done = run("train.py", "--out", finished, cache=cache)
    assert done.returncode == 2 and "already holds a run" in done.stderr
    assert (finished / checkpoint.FILE_NAME).read_bytes() == before


def test_checkpoint_of_another_model(finished, cache, tmp_path):
    out = tmp_path / "other"
    out.mkdir()
    (out / checkpoint.FILE_NAME).write_bytes((finished / checkpoint.FILE_NAME).read_bytes())
    done = run("train.py", "--out", out, "--resume", cache=cache, encoder__dim="16")
    assert done.returncode == 2 and "another model" in done.stderr
    assert same(weights(out), weights(finished))


def test_truncated_checkpoint(finished, cache, tmp_path):
    short = tmp_path / checkpoint.FILE_NAME
    short.write_bytes((finished / checkpoint.FILE_NAME).read_bytes()[:-1000])
    done = run("eval.py", "--ckpt", short, cache=cache)
    assert done.returncode == 2 and "truncated" in done.stderr
