"""The one check of arguments: what it accepts, and that it names what it does not."""

import pytest
import torch

import kernels
from kernels.checks import check


def test_letters_stand_for_one_number():
    a, b, c = torch.zeros(2, 3, 1, 5), torch.zeros(2, 1, 5, 3), torch.zeros(2, 3) > 0
    check(a=(a, "B K>=1 N R"), b=(b, "B N R 3"), c=(c, "B K", torch.bool), d=(None, "B"))
    check(dict(B=2), x=(torch.zeros(4, 2, 3), "... C h>=3"), y=(torch.zeros(4, 2, 3), "... C h"))


@pytest.mark.parametrize(
    ("shape", "pattern", "said"),
    [
        ((2, 0), "B K>=1", r"b must be \[2, K>=1\], got \[2, 0\]"),
        ((3, 2), "B K", r"b must be \[2, K\], got \[3, 2\]"),
        ((2,), "B 3", r"b must be \[2, 3\], got \[2\]"),
        ((4, 2, 1), "... K h>=2", r"b must be \[..., K, h>=2\], got \[4, 2, 1\]"),
    ],
)
def test_shapes_are_told(shape, pattern, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        check(a=(torch.zeros(2, 5), "B Q"), b=(torch.zeros(shape), pattern))


def test_kinds_and_devices_are_told():
    a = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"^b must be floating point, got torch\.int64$"):
        check(a=(a, "B C"), b=(a.long(), "B C"))
    with pytest.raises(ValueError, match=r"^b must be torch\.bool, got torch\.float32$"):
        check(a=(a, "B C"), b=(a, "B C", torch.bool))
    with pytest.raises(ValueError, match=r"^target is on meta, prediction on cpu$"):
        kernels.ssim_l1(torch.zeros(3, 4, 5), torch.zeros(3, 4, 5, device="meta"))
