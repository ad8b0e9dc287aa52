"""Trilinear reading of the rows of a table, and of maps at the points that are seen.

A sample is a weighted sum of eight rows, `embedding_bag`, several times as fast on a CPU as
`grid_sample`. Its transpose, needed backward, is the same over the samples sorted by cell.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.checks import at_least_float32, check
from kernels.dispatch import plainly_exported

LANES = 8  # rows of as many columns, or a multiple, are summed faster


def cells(places, nodes: tuple[int, int, int], item: Tensor) -> tuple[Tensor, Tensor]:
    """Row of the lowest corner of samples' cells, int32 [M], and places in them [3, M], 0 to 1.

    places: of the samples along the three axes in nodes, [M] each, which is overwritten; what lies
    beyond the nodes is at their border. item [M] int32: the first row of each sample's table.
    """
    fraction, cell = None, item
    for k, (place, n, stride) in enumerate(zip(places, nodes, _strides(nodes), strict=True)):
        # no reading beside the table for an invalid place
        place = place.nan_to_num_(0.0).clamp_(0, n - 1)
        index = place.int().clamp_(max=n - 2)
        if fraction is None:
            fraction = place.new_empty(3, *place.shape)
        torch.sub(place, index, out=fraction[k])
        cell = cell + index * stride
    return cell.flatten(), fraction.flatten(1)


class Trilinear(torch.autograd.Function):
    """Rows [M, K] of a table [nodes, K] in cells [M] at fractions [3, M], as `cells` gives them."""

    @staticmethod
    def forward(ctx, table, cell, fraction, nodes):
        ctx.save_for_backward(cell, fraction)
        ctx.nodes, ctx.rows = nodes, len(table)
        weights = table.new_empty(cell.shape[0], 8)
        for k, weight in enumerate(_corner_weights(fraction)):
            weights[:, k] = weight
        corners = torch.tensor(_corner_offsets(nodes), dtype=torch.int32, device=table.device)
        rows = cell[:, None] + corners
        return F.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cell, fraction = ctx.saved_tensors
        columns = grad.shape[1]
        grad = F.pad(grad, (0, -columns % LANES))
        cell, order = cell.sort()
        starts = torch.zeros(ctx.rows + 1, dtype=torch.int32, device=cell.device)
        torch.cumsum(cell.bincount(minlength=ctx.rows), 0, dtype=torch.int32, out=starts[1:])
        order, fraction = order.int(), fraction.index_select(1, order)
        options, result = dict(mode="sum", include_last_offset=True), None
        each = torch.arange(len(order) + 1, dtype=torch.int32, device=cell.device)
        grad = F.embedding_bag(order, grad, each, **options)  # in their order
        corners = zip(_corner_offsets(ctx.nodes), _corner_weights(fraction), strict=True)
        for offset, weight in corners:  # sums over the samples of a cell, for one of its corners
            part = F.embedding_bag(each[:-1], grad, starts, per_sample_weights=weight, **options)
            if result is None:  # the lowest corner has offset 0
                result = part
            else:
                result[offset:] += part[: ctx.rows - offset]
        return result[:, :columns], None, None, None


def _strides(nodes) -> tuple[int, int, int]:
    return nodes[1] * nodes[2], nodes[2], 1


def _corner_offsets(nodes) -> list[int]:
    """Rows from a cell's lowest node to its eight corners; the last axis changes fastest."""
    first, second, third = _strides(nodes)
    return [a + b + c for a in (0, first) for b in (0, second) for c in (0, third)]


def _corner_weights(fraction: Tensor):
    """Trilinear weights [M] of the eight corners, one after the other."""
    first, second, third = fraction
    for side in (1 - first, first):
        right = side * second
        for edge in (side - right, right):
            above = edge * third
            yield edge - above
            yield above


@plainly_exported
def sample_maps(maps: Tensor, place: Tensor, seen: Tensor) -> Tensor:
    """Values [M, P, C] of maps [M, C, X, Y, Z] at points, trilinear; zero where not `seen` [M, P].

    place [M, P, 3], without gradients: along X, Y, Z from edge to edge as -1 to 1, so that the
    first of n cells is centred at 1 / n - 1; beyond the centres of the outer ones is the border.
    Half precision is read as float32. Raises ValueError naming the argument at fault.
    """
    check(maps=(maps, "M C X>=2 Y>=2 Z>=2"), place=(place, "M P 3"), seen=(seen, "M P", torch.bool))
    maps, nodes = at_least_float32(maps), tuple(maps.shape[2:])
    if maps.is_cuda:
        grid = place.flip(-1)[:, None, None].to(maps)  # the fastest axis comes first
        values = F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
        return values[:, :, 0, 0].mT * seen[..., None]
    table = maps.permute(0, 2, 3, 4, 1).flatten(0, 3)
    index = seen.flatten().nonzero()[:, 0]
    item = (index // seen.shape[1]).int() * nodes[0] * nodes[1] * nodes[2]
    size = maps.new_tensor(nodes)
    place = place.flatten(0, 1)[index].to(maps).add_(1).mul_(size / 2).sub_(0.5)
    values = Trilinear.apply(table, *cells(place.T.contiguous(), nodes, item), nodes)
    out = values.new_zeros(seen.numel(), maps.shape[1])
    return out.index_copy(0, index, values).unflatten(0, seen.shape)
