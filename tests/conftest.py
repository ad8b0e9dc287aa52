import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are imported

import pytest

from tests.tiny import run


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where the scripts under test keep rendered frames."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def finished(cache, tmp_path_factory):
    """The run folder of six steps with the tiny settings."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = run("train.py", "--out", out, cache=cache)
    assert done.returncode == 0, done.stderr
    return out
