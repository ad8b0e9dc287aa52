"""What CUDA graphs are told, without a GPU: instead of a graph, the function runs again."""

import pytest
import torch

from selfocc import InputError, bench, graphs, presets
from selfocc.config import check_training
from selfocc.model import SelfOcc
from selfocc.training import Passes, make_optimizer, training_step
from tests.tiny import overrides


def trained(settings, batches, steps=7):
    torch.manual_seed(0)
    model = SelfOcc(settings).train()
    passes, optimizer = Passes(settings, model), make_optimizer(model, settings.optim)
    batches, losses = iter(batches), []
    for step in range(steps):
        _, view, found, norm = training_step(passes, optimizer, batches, step)
        losses.append({name: loss.item() for name, loss in found.items()} | {"norm": norm.item()})
        assert not view.depth.requires_grad
    return passes, losses, model.state_dict()


@pytest.mark.parametrize("preset", ["nuscenes", "synthetic"])
def test_a_step_as_a_graph_is_that_step(preset, monkeypatch):
    changes = overrides(optim__batch=1, optim__accumulate=1, optim__sweep_steps=0)
    changes += ["render.anneal_steps=2", "backbone.weights=none", "backbone.depth=18"]
    changes += ["encoder.layers=1", "encoder.dim=24"]
    plain = presets.build(preset, changes)
    settings = presets.build(preset, [*changes, "optim.graph=true"])
    batches = [bench.random_batch(settings, seed) for seed in range(7)]
    _, expected, weights = trained(plain, batches)
    captured = []

    def capture(function):
        """Makes gradients anew, as a graph does, of the memory that it was shown."""
        captured.append(function)
        model = passes_of(function).model

        def replay():
            model.zero_grad(set_to_none=True)
            return function()

        return replay

    def passes_of(function):
        return function.__closure__[0].cell_contents

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    passes, found, same = trained(settings, batches)
    assert len(captured) == 1 and passes.begun == 5  # two steps anneal, three warm up
    assert found == expected
    assert all(torch.equal(same[name], x) for name, x in weights.items())


def test_where_a_graph_cannot_be():
    settings = presets.build("synthetic", overrides(optim__graph="true", optim__accumulate=1))
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"optim\.graph=true needs a GPU"):
            trained(
                presets.build("synthetic", overrides(
                    optim__graph="true", optim__accumulate=1, optim__sweep_steps=0,
                    render__anneal_steps=1,
                )),
                [bench.random_batch(settings, 0)] * 2, steps=2,
            )  # fmt: skip
    with pytest.raises(InputError, match=r"optim\.graph needs optim\.accumulate=1"):
        check_training(presets.build("synthetic", ["optim.graph=true"]))
