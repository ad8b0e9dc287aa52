"""A model and a world so small that a training run takes seconds."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py")
SETTINGS = {
    "data.crop": "32,64",
    "data.pad": "32,64",
    "data.scenes": "1",
    "data.scenes_val": "1",
    "data.frames": "12",
    "volume.nodes": "17,17,5",
    "backbone.width": "8",
    "backbone.norm": "batch",  # whose statistics the processes must share
    "encoder.dim": "8",
    "encoder.heads": "1",
    "encoder.layers": "1",
    "encoder.points_cross": "2,2,2",
    "field.hidden": "8",
    "render.rays": "6,12",
    "render.samples": "16",
    "render.eval_rays": "8,16",
    "render.eval_samples": "16",
    "optim.steps": "6",
    "optim.sweep_steps": "0",
    "optim.workers": "0",
    "optim.validate_frames": "1",
    "optim.save_every": "2",
    "optim.picture_every": "6",
}


def overrides(**changes) -> list[str]:
    """`section.field=value` strings; keywords replace entries, with `__` for the dot."""
    settings = SETTINGS | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"{name}={value}" for name, value in settings.items()]


def run(*command, cache: Path, limit: int | None = None, **changes) -> subprocess.CompletedProcess:
    """Run `python command...` in the repository with the tiny settings, on one thread.

    Files longer than `limit` bytes cannot be written then, as if the disk were full.
    """
    arguments = [str(word) for word in command]
    if "train.py" in arguments:
        arguments += [word for override in overrides(**changes) for word in ("--set", override)]
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment(cache),
        capture_output=True,
        text=True,
        preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))),
    )


def here(script, *words, cache: Path, **changes) -> int:
    """Run a script's `main` in this process, which has imported all it needs; the exit code."""
    words = [str(word) for word in words]
    if script.__name__ == "train":
        words += [word for override in overrides(**changes) for word in ("--set", override)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELFOCC_CACHE", str(cache))
        code = script.main(words)
    torch.set_flush_denormal(False)  # as training sets it
    return code


def environment(cache: Path) -> dict[str, str]:
    return os.environ | {"SELFOCC_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
