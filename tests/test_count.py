"""What a training step asks of a GPU, counted on tensors without memory."""

import json
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from kernels import dispatch
from selfocc import bench, count, presets
from tests.tiny import overrides

SMALL = overrides(optim__batch="2", backbone__depth="18", backbone__weights="none")


def counted(work) -> count.Count:
    operators = count._Operators()
    with count._counted(operators), dispatch.record():
        work(torch.empty(4, 3, device="meta"))
    return operators.count


@pytest.mark.parametrize(
    ("work", "wait"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: bool(x.sum() > 0), "_local_scalar_dense"),
        (lambda x: x.tolist(), "_to_copy"),
        (lambda x: x[x > 0], "index"),
        (lambda x: (x > 0).nonzero(), "nonzero"),
        (lambda x: x.masked_fill_(x > 0, 0.0), None),
        (lambda x: x.__setitem__(x > 0, 0.0), None),
        (lambda x: x.__setitem__(x > 0, x.new_ones(12)), "index_put_"),
        (lambda x: x[:, [0, 2]], "a list as index"),
        (lambda x: x.new_tensor([1.0, 2.0]), "new_tensor of numbers"),
        (lambda x: torch.tensor([1.0], device=x.device), "tensor of numbers"),
        (lambda x: torch.ones(3).to(x), "_to_copy"),
        (lambda x: x.copy_(torch.ones(3)), "copy_"),
        (lambda x: x[torch.tensor([1])], "index"),
        (lambda x: torch.linalg.inv_ex(x[:3]), "linalg_inv_ex"),
        (lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True), None),
        (lambda x: torch.ones(3).to(x.device, non_blocking=True), "_to_copy"),
        (lambda x: torch.where(x > 0, x, 1.0) * 2 + x.new_zeros(3), None),
        (lambda x: torch.linalg.vector_norm(x), None),
    ],
)
def test_what_waits(work, wait):
    found = counted(work).waits
    assert [name for _, name in found] == ([wait] if wait else [])
    assert all(place.startswith("tests/test_count.py:") for place, _ in found)


def test_what_counts_as_an_operation():
    found = counted(lambda x: (x.T.reshape(-1).view(2, 6)[0] + torch.empty_like(x[0, 0])).relu_())
    assert found.operations == Counter(clone=1, add=1, relu_=1) and found.host == 3


def test_autocast_is_that_of_cuda():
    kinds = []

    def work(x):
        weight = torch.empty(5, 3, device=x.device, requires_grad=True)
        with torch.autocast("meta", torch.bfloat16):
            y = F.linear(F.linear(x, weight)[:, :3], weight)
            kinds.extend(
                [y.dtype, F.layer_norm(y, (5,)).dtype, F.softplus(y).dtype, (x @ x.T).dtype]
            )
            with torch.autocast("meta", enabled=False):
                kinds.append((x @ x.T).dtype)

    casts = counted(work).operations["_to_copy"]
    half, full = torch.bfloat16, torch.float32
    assert kinds == [half, full, full, half, full]
    assert casts == 2 + 2 + 2  # x and, once, the weight; y twice; x and its transpose


def test_what_is_saved_for_backward():
    x = torch.empty(10, 4, device="meta", requires_grad=True)
    found, layer = count.Count(), torch.nn.Linear(4, 4, device="meta")
    with count._saved(layer, found):
        layer(x).exp().view(-1).sin()
    # x for the weight's gradient, and the result of exp, which the sine needs as well
    assert found.saved == 4 * (10 * 4 + 10 * 4)


@pytest.mark.parametrize("preset", ["kitti", "nuscenes", "nuscenes_bev", "synthetic"])
@pytest.mark.parametrize("bf16", ["false", "true"])
def test_a_training_step_does_not_wait(preset, bf16):
    settings = presets.build(preset, [*SMALL, f"optim.bf16={bf16}", "optim.accumulate=2"])
    found = count.count_step(settings, [bench.random_batch(settings, seed) for seed in range(2)])
    assert not found.waits
    assert found.launches["render_forward"] == found.launches["render_backward"] == 2
    assert found.saved > 0 and found.operations["_fused_adamw_"] == 2


def test_as_a_command(tmp_path, capsys):
    words = ["--count", "--preset", "synthetic", "--out", str(tmp_path / "count.json")]
    assert bench.main([*words, *(word for change in SMALL for word in ("--set", change))]) == 0
    (row,) = json.loads((tmp_path / "count.json").read_text())["runs"]
    said = capsys.readouterr().out
    assert f"{row['operations']:,} host operations, {row['launches']} of them Triton's" in said
    assert row["saved_bytes"] > 0 and len(row["waits"]) == said.count("  waits ")
