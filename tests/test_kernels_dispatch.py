import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

import kernels
from kernels import dispatch
from tests.tiny import ROOT


@pytest.fixture(autouse=True)
def restored():
    before = kernels.backend()
    yield
    kernels.backend(before)


def test_backend_is_chosen_by_name():
    assert kernels.backend("torch") == kernels.backend() == "torch"
    assert not dispatch.use_triton(torch.zeros(1))
    with pytest.raises(ValueError, match="auto, torch, triton"):
        kernels.backend("cuda")
    assert kernels.backend() == "torch"


def test_automatic_choice_follows_the_device():
    kernels.backend("auto")
    assert not dispatch.use_triton(torch.zeros(1))


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        kernels.backend("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.backend("triton") == "triton"
    assert dispatch.use_triton(torch.zeros(1))
    assert not dispatch.use_triton(torch.zeros(1, dtype=torch.float64))


def test_recorded_launches_carry_types_and_constants_and_do_not_run():
    @dispatch.triton.jit
    def fill(out, value, count, BLOCK: dispatch.tl.constexpr):
        pass

    out = torch.empty(100, device="meta", dtype=torch.bfloat16)
    with dispatch.record() as launches:
        dispatch.launch(fill, (4,), out=out, value=0.5, count=2**40, warps=2, BLOCK=32)
        dispatch.launch(fill, (0,), out=out, value=0.5, count=100, BLOCK=32)  # nothing to do
    (one,) = launches
    assert one.signature == {"out": "*bf16", "value": "fp32", "count": "i64", "BLOCK": "constexpr"}
    assert one.constants == {("BLOCK",): 32} and one.warps == 2 and one.grid == (4,)


class Image(NamedTuple):
    pixels: torch.Tensor | None
    strides: tuple[int, ...]
    scale: float = 1.0


@pytest.mark.skipif(not hasattr(dispatch.triton, "compile"), reason="Triton is not installed")
def test_what_lies_in_tuples_is_recorded_as_triton_takes_it():
    @dispatch.triton.jit
    def fill(image, other, count):
        pass

    pixels = torch.empty(100, device="meta")
    with dispatch.record() as launches:
        images = dict(image=Image(pixels, (32, 1, 7)), other=Image(None, ()))
        dispatch.launch(fill, (4,), **images, count=1)
    (one,) = launches
    types = Image("*fp32", ("i32", "constexpr", "i32"), "fp32"), Image("constexpr", (), "fp32")
    assert tuple(one.signature.values()) == (*types, "constexpr")
    assert one.constants == {("image", 1, 1): 1, ("other", 0): None, ("count",): 1}
    assert one.aligned == (("image", 0), ("image", 1, 0))


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_an_impossible_choice_in_the_shell_is_told_in_a_line(name):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"SELFOCC_KERNELS": name, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", "import kernels"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: SELFOCC_KERNELS: ")
    assert done.stderr.count("\n") == 1
