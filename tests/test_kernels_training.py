"""Whole training steps by either backend: the kernels together, in the model that uses them."""

import importlib
from pathlib import Path

import pytest
import torch

import kernels
from kernels import dispatch
from selfocc import presets
from selfocc.batch import collate
from selfocc.datasets import Folders, open_dataset
from selfocc.model import SelfOcc
from selfocc.training import Keys, Passes, make_optimizer, training_step
from tests import tiny

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS = 2


@pytest.fixture
def backend():
    before = kernels.backend()
    yield kernels.backend
    kernels.backend(before)


def _steps(settings, samples) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Losses of every step, and the parameters' gradients of the first."""
    torch.manual_seed(0)
    model = SelfOcc(settings).to(DEVICE).train()
    passes, optimizer = Passes(settings, model), make_optimizer(model, settings.optim)
    history = []
    batches = iter([collate([sample]) for sample in samples])
    for step in range(len(samples)):
        _, _, losses, _ = training_step(passes, optimizer, batches, step)
        history.append({name: loss.item() for name, loss in losses.items()})
        if step == 0:  # later ones start from weights that Adam has driven apart
            named = model.named_parameters()
            gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
    return history, gradients


def test_training_steps_agree_between_backends(backend, cache: Path, monkeypatch):
    if DEVICE.type == "cpu" and not dispatch.interpreting():
        pytest.skip("Triton needs a GPU or TRITON_INTERPRET=1")
    monkeypatch.setenv("SELFOCC_CACHE", str(cache))
    if DEVICE.type == "cpu":  # the interpreter takes as long for a program of few nodes as of many
        monkeypatch.setattr(importlib.import_module("kernels.decode"), "PROGRAMS", 4)
    changes = tiny.overrides(optim__batch="1", optim__accumulate="1", volume__nodes="9,9,5")
    settings = presets.build("synthetic", changes)
    training = open_dataset(settings, "train", Folders())
    keys = Keys(len(training), settings.optim, 0, 0, 1)
    samples = [training[key] for (key,), _ in zip(keys, range(STEPS), strict=False)]
    backend("torch")
    expected_losses, expected = _steps(settings, samples)
    backend("triton")
    losses, gradients = _steps(settings, samples)
    assert gradients.keys() == expected.keys()
    for now, before in zip(losses, expected_losses, strict=True):
        assert now == pytest.approx(before, rel=1e-4)
    largest = max(g.abs().max() for g in expected.values())
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).abs().max()
        assert error <= 1e-3 * max(expected[name].abs().max(), 1e-3 * largest), name
