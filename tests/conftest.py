import os
import subprocess
import sys
import tempfile

# shapes are small, and the other core compiles kernels
os.environ.setdefault("OMP_NUM_THREADS", "1")
# what is compared on a GPU is computed in float32, also after a command that allows TF32
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are imported

import pytest

from selfocc.datasets.export_nuscenes import export_nuscenes
from selfocc.datasets.synthetic import SyntheticConfig, synthetic_sequences
from tests.tiny import ROOT, run

_COMPILATION = pytest.StashKey[subprocess.Popen]()


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


@pytest.fixture(scope="session")
def ring(cache):
    """A scene seen by six cameras: frames 0 and 5 have voxels, and frame 6 comes after them."""
    config = SyntheticConfig(rig="surround", image_size=(24, 40), frames=7)
    return synthetic_sequences(config, "val", 1, cache=cache)[0]


@pytest.fixture(scope="session")
def ring_files(ring, tmp_path_factory):
    """The same as files of nuScenes, to be left as they are."""
    folder = tmp_path_factory.mktemp("nuscenes")
    export_nuscenes([ring], folder)
    return folder


def pytest_collection_modifyitems(items):
    """Tests that read the compiled kernels come last, so that nobody waits for the compiler."""
    items.sort(key=lambda item: "compilation" in item.fixturenames)


def pytest_collection_finish(session):
    """Compiling all kernels takes minutes, so it starts now, beside the tests that come before.

    Not in the interpreter, hence in a process of its own.
    """
    needed = any("compilation" in item.fixturenames for item in session.items)
    if not needed or session.config.option.collectonly:
        return
    folder = tempfile.TemporaryDirectory()
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.compile_kernels"],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": folder.name},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.nice(10),
    )
    session.config.stash[_COMPILATION] = process
    session.config.add_cleanup(folder.cleanup)
    session.config.add_cleanup(process.kill)


@pytest.fixture(scope="session")
def compilation(request):
    """The process that compiles the kernels."""
    return request.config.stash[_COMPILATION]
