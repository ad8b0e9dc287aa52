"""What the nodes of a volume are: the features of three planes through a small network.

    x    = hw[h, w] + zh[z, h] + wz[w, z] + mix lifted[h, w, z]
    node = W2 softplus(W1 softplus(x) + b1) + b2

The plain version holds five temporaries as large as the features of all nodes. The one for CPUs
goes through the rows h one after the other, so that those of a row stay in the cache; gradients of
planes are summed on the way.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from kernels.checks import check

SLAB = 1 << 23  # features decoded at once; where there are more, backward computes them again
_softplus_slope = partial(torch.ops.aten.softplus_backward, beta=1, threshold=20)


def _plain(hw, hz, wz, lifted, mix, w1, b1, w2, b2) -> Tensor:
    x = hw[:, :, :, None] + hz[:, :, None] + wz[:, None]
    if lifted is not None:
        x = x + F.linear(lifted, mix)
    return F.linear(F.softplus(F.linear(F.softplus(x), w1, b1)), w2, b2)


class _Rows(torch.autograd.Function):
    """`_plain`, row by row."""

    @staticmethod
    def forward(ctx, hw, hz, wz, lifted, mix, w1, b1, w2, b2):
        ctx.save_for_backward(hw, hz, wz, lifted, mix, w1, w2)
        ctx.hidden = []
        batch, height, width, _ = hw.shape
        out = hw.new_empty(batch, height, width, hz.shape[2], len(b2))
        for item in range(batch):
            for row in range(height):
                x = hz[item, row] + wz[item]
                x = x.add_(hw[item, row, :, None]).flatten(0, 1)
                if lifted is not None:
                    x.addmm_(lifted[item, row].flatten(0, 1), mix.T)
                first = F.softplus(x)
                y = torch.addmm(b1, first, w1.T)
                second = F.softplus(y)
                torch.addmm(b2, second, w2.T, out=out[item, row].flatten(0, 1))
                ctx.hidden.append((x, first, y, second))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hw, hz, wz, lifted, mix, w1, w2 = ctx.saved_tensors
        by_hw, by_hz, by_wz = torch.empty_like(hw), torch.empty_like(hz), torch.zeros_like(wz)
        by_lifted = None if lifted is None else torch.empty_like(lifted)
        by_mix = None if lifted is None else torch.zeros_like(mix)
        by_w1, by_w2 = torch.zeros_like(w1), torch.zeros_like(w2)
        by_b1, by_b2 = w1.new_zeros(len(w1)), grad.sum((0, 1, 2, 3))
        grad, hidden = grad.contiguous(), iter(ctx.hidden)
        for item in range(len(hw)):
            for row in range(hw.shape[1]):
                (x, first, y, second), by_node = next(hidden), grad[item, row].flatten(0, 1)
                by_w2.addmm_(by_node.T, second)
                by_y = _softplus_slope(by_node @ w2, y)
                by_w1.addmm_(by_y.T, first)
                by_b1 += by_y.sum(0)
                by_x = _softplus_slope(by_y @ w1, x)
                if lifted is not None:
                    by_mix.addmm_(by_x.T, lifted[item, row].flatten(0, 1))
                    torch.mm(by_x, mix, out=by_lifted[item, row].flatten(0, 1))
                by_x = by_x.view_as(wz[item])
                by_wz[item] += by_x
                torch.sum(by_x, 1, out=by_hw[item, row])
                torch.sum(by_x, 0, out=by_hz[item, row])
        return by_hw, by_hz, by_wz, by_lifted, by_mix, by_w1, by_b1, by_w2, by_b2


def decode(
    hw: Tensor,
    zh: Tensor,
    wz: Tensor,
    network: tuple[Tensor, Tensor, Tensor, Tensor],
    lifted: Tensor | None = None,
    mix: Tensor | None = None,
) -> Tensor:
    """Nodes [B, H, W, Z, C] of the planes hw [B, H, W, D], zh [B, Z, H, D] and wz [B, W, Z, D].

    network: W1 [E, D], b1 [E], W2 [C, E], b2 [C]. What `mix` [D, L] makes of lifted
    [B, H, W, Z, L] is added to the features. Large volumes are decoded in slabs along H, which
    backward computes again.
    Raises ValueError naming the argument at fault.
    """
    w1, b1, w2, b2 = network
    check(
        hw=(hw, "B H W D"), zh=(zh, "B Z H D"), wz=(wz, "B W Z D"), w1=(w1, "E D"), b1=(b1, "E"),
        w2=(w2, "C E"), b2=(b2, "C"), lifted=(lifted, "B H W Z L"), mix=(mix, "D L"),
    )  # fmt: skip
    if (lifted is None) != (mix is None):
        raise ValueError("mix must be given with lifted, and only then")
    run = _plain if hw.is_cuda else _Rows.apply
    batch, height, width, dim = hw.shape
    slabs = math.ceil(batch * height * width * zh.shape[1] * dim / SLAB)
    if slabs > 1 and torch.is_grad_enabled():
        # nothing in it is random, and the state of a GPU's generator is slow to fetch
        run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
    step, hz, parts = math.ceil(height / max(1, slabs)), zh.transpose(1, 2), []
    for first in range(0, height, step):
        rows = slice(first, first + step)
        here = None if lifted is None else lifted[:, rows]
        parts.append(run(hw[:, rows], hz[:, rows], wz, here, mix, w1, b1, w2, b2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
