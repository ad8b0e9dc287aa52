"""The decoder's kernels against its meaning in float64; without a GPU in Triton's interpreter."""

import importlib
import math

import pytest
import torch

import kernels
from kernels import naive

decoder = importlib.import_module("kernels.decode")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = dict(rtol=2e-6, atol=4e-6)  # measured: 1e-6 of values up to 20


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    if DEVICE == "cpu":  # the interpreter takes as long for a program of few nodes as of many
        monkeypatch.setattr(decoder, "PROGRAMS", 4)
    before = kernels.backend()
    kernels.backend("triton")
    yield
    kernels.backend(before)
    torch.backends.cuda.matmul.allow_tf32 = False


def problem(batch=1, nodes=(3, 5, 4), dim=8, hidden=8, channels=4, lifted=0, dtype=torch.float32):
    """hw, zh, wz, W1, b1, W2, b2 and, where something is lifted, that and the mix; NaN behind."""
    generator = torch.Generator().manual_seed(0)
    height, width, depth = nodes
    shapes = [(batch, height, width, dim), (batch, depth, height, dim), (batch, width, depth, dim)]
    shapes += [(hidden, dim), (hidden,), (channels, hidden), (channels,)]
    shapes += [(batch, *nodes, lifted), (dim, lifted)] if lifted else []
    tensors = []
    for shape in shapes:
        room = torch.full((math.prod(shape) + 4096,), math.nan, dtype=dtype, device=DEVICE)
        view = room[: math.prod(shape)].view(shape)
        tensors.append(view.copy_(torch.randn(shape, generator=generator)).requires_grad_())
    return tensors


def decoded(by, tensors):
    hw, zh, wz, *network = tensors[:7]
    return by.decode(hw, zh, wz, tuple(network), *tensors[7:])


def with_gradients(by, tensors):
    out = decoded(by, tensors)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator).to(out)
    return [out, *torch.autograd.grad(out, tensors, upstream)]


CASES = {
    "one tile": {},
    "several tiles and items": dict(batch=2, nodes=(3, 17, 9), dim=16, hidden=16),
    "chunks of features": dict(nodes=(2, 5, 4), dim=40, hidden=33, channels=5),
    "published": dict(nodes=(1, 5, 9), dim=96, hidden=96, channels=25),
    "one channel": dict(channels=1),
    "lifted": dict(batch=2, nodes=(2, 9, 4), dim=33, lifted=8),
    "much lifted": dict(lifted=17),
    "one node": dict(nodes=(1, 1, 1)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_the_meaning(case):
    tensors = problem(**case)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    for ours, right in zip(
        with_gradients(kernels, tensors), with_gradients(naive, exact), strict=True
    ):
        scale = right.abs().max()
        torch.testing.assert_close(ours.double() / scale, right / scale, **CLOSE)


def test_every_run_gives_the_same_bits_and_other_tiles_the_same_numbers(monkeypatch):
    tensors = problem(nodes=(5, 9, 5))
    first, second = (with_gradients(kernels, tensors) for _ in range(2))
    assert all(map(torch.equal, first, second))
    monkeypatch.setattr(decoder, "PROGRAMS", 1000)
    monkeypatch.setattr(decoder, "BACKWARD", decoder.Tile(4, 16, 16, 4))
    for a, b in zip(first, with_gradients(kernels, tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("channels", "row"), [(1, 1), (4, 4), (5, 8), (25, 28)])
def test_rows_of_channels_are_padded_with_zeros(channels, row):
    out = decoded(kernels, problem(channels=channels))
    assert out.dtype == torch.float32 and out.stride()[-2:] == (row, 1)
    whole = out.as_strided((*out.shape[:-1], row), out.stride())
    assert not whole[..., channels:].any()


def test_bfloat16_planes_and_parameters():
    tensors = problem(dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    results = with_gradients(kernels, tensors)
    assert [x.dtype for x in results] == [torch.float32] + [torch.bfloat16] * 7
    if DEVICE == "cuda":  # the interpreter cannot compute with it
        for ours, right in zip(results, with_gradients(naive, exact), strict=True):
            assert (ours.double() - right).norm() < 0.02 * right.norm()


def test_autocast_chooses_what_is_multiplied(monkeypatch):
    chosen = []
    monkeypatch.setattr(decoder, "_decode_op", lambda *x: chosen.append(x[2]))
    tensors = problem()
    decoded(kernels, tensors)
    with torch.autocast(DEVICE, torch.bfloat16):
        decoded(kernels, tensors)
    torch.backends.cuda.matmul.allow_tf32 = True
    decoded(kernels, tensors)
    exact, rounded = ("ieee", "ieee") if torch.version.hip else ("tf32x3", "tf32")
    assert chosen == [exact, "bf16", rounded]


@pytest.mark.parametrize("lifted", [0, 2])
def test_operators_are_registered_soundly(lifted):
    tensors = problem(lifted=lifted)
    planes, network = tensors[:3] + tensors[7:], tensors[3:7]
    torch.library.opcheck(decoder._decode_op, (planes, network, "tf32x3"))
    planes, network = ([x.detach() for x in tensors] for tensors in (planes, network))
    grad = torch.ones_like(decoder._decode_op(planes, network, "tf32x3"))
    torch.library.opcheck(
        decoder._decode_gradient_op,
        (grad, planes, network, "tf32x3"),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiles_without_graph_break():
    tensors = problem()

    def run(*tensors):
        return decoded(kernels, tensors)

    results = []
    for function in (torch.compile(run, fullgraph=True, backend="aot_eager"), run):
        out = function(*tensors)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", [dict(batch=0), dict(nodes=(0, 2, 2)), dict(nodes=(2, 2, 0))])
def test_empty(case):
    out, *gradients = with_gradients(kernels, problem(**case))
    assert out.numel() == 0 and all(not x.any() for x in gradients)


def test_nothing_of_a_node_is_kept():
    tensors = problem(nodes=(3, 9, 8))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        decoded(kernels, tensors)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in tensors}
