"""Decoding planes and reading maps, against what they mean."""

import importlib

import pytest
import torch

import kernels
from kernels import naive


def planes_and_network(lifted, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = [(2, 4, 3, 5), (2, 6, 4, 5), (2, 3, 6, 5), (7, 5), (7,), (3, 7), (3,)]
    shapes += [(2, 4, 3, 6, 2), (5, 2)] if lifted else []
    drawn = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [tensor.to(dtype).requires_grad_() for tensor in drawn]


def decoded(by, tensors):
    hw, zh, wz, *network = tensors[:7]
    return by.decode(hw, zh, wz, tuple(network), *tensors[7:])


@pytest.mark.parametrize("slab", [1 << 23, 100], ids=["whole", "slabs"])
@pytest.mark.parametrize("lifted", [False, True])
def test_decode(lifted, slab, monkeypatch):
    monkeypatch.setattr(importlib.import_module("kernels.decode"), "SLAB", slab)
    exact, tensors = planes_and_network(lifted), planes_and_network(lifted, torch.float32)
    found, expected = decoded(kernels, tensors), decoded(naive, exact)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(found)
    grads = torch.autograd.grad((found * weight).sum(), tensors)
    for grad, right in zip(
        grads, torch.autograd.grad((expected * weight).sum(), exact), strict=True
    ):
        torch.testing.assert_close(grad.double(), right, rtol=1e-5, atol=2e-5)
    with torch.no_grad():
        torch.testing.assert_close(decoded(kernels, tensors), found)


def test_autocast_is_of_no_effect_on_a_cpu():
    tensors = planes_and_network(True, torch.float32)
    expected = decoded(kernels, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found = decoded(kernels, [tensors[0].bfloat16().float(), *tensors[1:]])
        assert decoded(kernels, tensors).equal(expected)
        assert decoded(kernels, [tensors[0].bfloat16(), *tensors[1:]]).equal(found)
    assert expected.dtype == torch.float32


@pytest.mark.parametrize("lifted", [False, True])
def test_decode_gradcheck(lifted):
    assert torch.autograd.gradcheck(
        lambda *x: decoded(kernels, list(x)), planes_and_network(lifted)
    )


def test_decode_names_what_does_not_fit():
    tensors = planes_and_network(True)
    tensors[8] = torch.randn(4, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^mix must be \[5, 2\], got \[4, 2\]"):
        decoded(kernels, tensors)
    with pytest.raises(ValueError, match=r"^mix must be given with lifted"):
        decoded(kernels, tensors[:8])


def maps_and_places(dtype):
    torch.manual_seed(1)
    maps = torch.randn(2, 3, 4, 2, 5, dtype=dtype, requires_grad=True)
    place = 2.4 * torch.rand(2, 40, 3, dtype=dtype) - 1.2  # some beyond the edges
    place[0, 0] = torch.tensor([1.0, -1.0, 0.25])
    return maps, place, torch.rand(2, 40) < 0.7


def test_sample_maps():
    maps, place, seen = maps_and_places(torch.float32)
    found = kernels.sample_maps(maps, place, seen)
    expected = naive.sample_maps(maps.double(), place.double(), seen)
    assert (found[~seen] == 0).all() and found[seen].abs().min() > 0
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(found)
    grads = [torch.autograd.grad((x * weight).sum(), maps)[0] for x in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_sample_maps_gradcheck():
    maps, place, seen = maps_and_places(torch.float64)
    assert torch.autograd.gradcheck(lambda m: kernels.sample_maps(m, place, seen), maps)
    assert kernels.sample_maps(maps, place, torch.zeros_like(seen)).abs().sum() == 0


def test_invalid_places_read_nothing_beside_the_table():
    maps, place, seen = maps_and_places(torch.float32)
    place[:, 1::2] = torch.nan
    seen[:] = True
    values = kernels.sample_maps(maps, place, seen)
    assert values.isfinite().all()
