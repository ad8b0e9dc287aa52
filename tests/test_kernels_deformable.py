"""Deformable sampling against its meaning, finite differences and the published record."""

import pytest
import torch

from kernels import naive
from kernels.deformable import deformable_sampling
from tests import goldens

SHAPES = [(5, 7), (3, 4), (2, 9)]
RECORDED = ("value", "spatial_shapes", "sampling_locations", "attention_weights", "output")


def problem(
    batch=2,
    queries=5,
    heads=3,
    points=4,
    dh=4,
    seen=None,
    dtype=torch.float64,
    shapes=SHAPES,
):
    generator = torch.Generator().manual_seed(7)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=dtype)

    levels = len(shapes)
    maps = batch if seen is None else seen[..., 0].numel()
    value = normal(maps, sum(h * w for h, w in shapes), heads, dh)
    count = (1, queries, levels) if seen is None else seen.shape
    reference = (
        torch.rand(*count, points, 2, generator=generator, dtype=dtype) * 1.6 - 0.3
    )  # some lie outside the maps
    offsets = normal(batch, queries, heads, levels, points, 2) * 2
    return (
        value,
        shapes,
        reference,
        offsets,
        normal(batch, queries, heads, levels * points) * 2,
        seen,
    )


SEEN = torch.tensor(  # three cameras; query 3 of the first item by all, 1 by none
    [
        [[1, 0, 0, 1, 0], [0, 0, 0, 1, 1], [0, 0, 0, 1, 0]],
        [[1, 0, 0, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]],
    ]
).bool()


@pytest.mark.parametrize("seen", [None, SEEN], ids=["self", "cameras"])
def test_values_and_gradients_are_those_of_the_meaning(seen):
    value, shapes, reference, offsets, logits, seen = problem(seen=seen)
    leaves = [t.requires_grad_() for t in (value, reference, offsets, logits)]
    ours = deformable_sampling(value, shapes, reference, offsets, logits, seen)
    theirs = naive.deformable_sampling(value, shapes, reference, offsets, logits, seen)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    upstream = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad(out, leaves, upstream) for out in (ours, theirs)]
    names = ("value", "reference_points", "offsets", "logits")
    for name, a, b in zip(names, *gradients, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(
    "batch, seen",
    [(1, None), (2, None), (1, SEEN[:1])],
    ids=["self", "shared references", "cameras"],
)
def test_gradcheck(batch, seen):
    value, shapes, reference, offsets, logits, seen = problem(
        batch, 5, 2, 2, 2, seen, shapes=SHAPES[:2]
    )
    leaves = [t.requires_grad_() for t in (value, reference, offsets, logits)]
    assert torch.autograd.gradcheck(
        lambda v, r, o, a: deformable_sampling(v, shapes, r, o, a, seen),
        leaves,
        eps=1e-7,
        atol=1e-6,
    )


def test_chunks_of_queries_change_nothing(monkeypatch):
    arguments = problem(seen=SEEN)
    leaves = [arguments[i].requires_grad_() for i in (0, 2, 3, 4)]  # all but shapes and seen
    whole = deformable_sampling(*arguments)
    gradients = torch.autograd.grad(whole.square().sum(), leaves)
    monkeypatch.setattr("kernels.deformable_cpu._CHUNK", 30)  # two or three pairs at a time
    parts = deformable_sampling(*arguments)
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-14)
    for a, b in zip(gradients, torch.autograd.grad(parts.square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_far_and_undefined_locations_read_zero():
    value, shapes, reference, offsets, logits, _ = problem()
    for far in (1e30, -1e30, float("inf"), 50.0, -50.0, float("nan")):
        offsets = torch.full_like(offsets, far).requires_grad_()
        out = deformable_sampling(value, shapes, reference, offsets, logits)
        assert torch.equal(out, torch.zeros_like(out))
        (gradient,) = torch.autograd.grad(out.sum(), offsets)
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_inputs_are_summed_in_float32(dtype):
    exact = problem(seen=SEEN)
    low = [t.to(dtype) if torch.is_tensor(t) and t.is_floating_point() else t for t in exact]
    leaves = [low[i].requires_grad_() for i in (0, 3, 4)]
    out = deformable_sampling(*low)
    assert out.dtype == dtype
    same = [t.detach().double() if torch.is_tensor(t) and t.is_floating_point() else t for t in low]
    torch.testing.assert_close(
        out.double(), deformable_sampling(*same), rtol=torch.finfo(dtype).eps, atol=1e-5
    )
    for leaf, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert (
            gradient.dtype == dtype and gradient.shape == leaf.shape and gradient.isfinite().all()
        )


@pytest.mark.parametrize(
    "batch, queries, seen", [(2, 0, None), (1, 3, torch.zeros(1, 2, 3, dtype=torch.bool))]
)
def test_empty(batch, queries, seen):
    value, shapes, reference, offsets, logits, seen = problem(batch, queries, seen=seen)
    leaves = [t.requires_grad_() for t in (value, reference, offsets, logits)]
    out = deformable_sampling(value, shapes, reference, offsets, logits, seen)
    assert out.shape == (batch, queries, 12)
    assert torch.equal(out, torch.zeros_like(out))
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(
    "name, spoil",
    [
        ("value", lambda t: t[:, 1:]),
        ("level_shapes", lambda shapes: shapes[1:]),
        ("reference_points", lambda t: t[1:]),
        ("offsets", lambda t: t[..., :1]),
        ("logits", lambda t: t[..., 1:]),
        ("seen", lambda t: t.int()),
        ("seen", lambda t: t[:, :, 1:]),
        ("seen", lambda t: t.repeat(1, 11, 1)),
    ],
)
def test_errors_name_the_argument(name, spoil):
    names = ("value", "level_shapes", "reference_points", "offsets", "logits", "seen")
    arguments = dict(zip(names, problem(seen=SEEN), strict=True))
    arguments[name] = spoil(arguments[name])
    with pytest.raises((ValueError, TypeError), match=f"^{name} "):
        deformable_sampling(**arguments)


@pytest.mark.parametrize("scene", ["tpv_mono", "bev_surround"])
def test_published_operator(scene):
    record = goldens.load(f"{scene}/outputs_f32.npz")
    for call in range(4 if scene == "tpv_mono" else 2):
        value, shapes, locations, weights, output = (
            torch.from_numpy(record[f"msda.call{call}.{key}"]) for key in RECORDED
        )
        # from reference points at zero, the locations are offsets; the logarithm undoes softmax
        offsets = locations * shapes.flip(1)[:, None]
        _, queries, _, levels, points, _ = offsets.shape
        out = deformable_sampling(
            value,
            shapes.tolist(),
            torch.zeros(1, queries, levels, points, 2),
            offsets,
            weights.log().flatten(3),
        )
        torch.testing.assert_close(out, output, rtol=0, atol=2e-5 * output.abs().max().item())
