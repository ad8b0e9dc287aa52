"""Deformable sampling in plain PyTorch, as fast as CPUs allow.

The computation walks over the heads, so that sampling locations and weights exist for one head at a
time, and backward computes them again. All levels of a head lie in one table of rows, an atlas with
two zeros around every level: a location clamped into that border reads zeros, hence neither the
samples nor their derivatives need a mask. What remains are sums of weighted table rows
(`embedding_bag`), in backward the same sums over the transposed indices, found by a sort.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_BORDER = 2  # zeros around a level: a sample reads two pixels along each axis
_CHUNK = 1 << 19  # samples of a head at a time: temporaries of 2 MB stay in the cache


class _Atlas:
    """Where the levels lie in the table: below each other in M images of `rows` x `pitch` cells."""

    def __init__(self, maps: int, level_shapes: list[tuple[int, int]]):
        self.maps, self.shapes = maps, level_shapes
        # the border on the right of a row is the one on the left of the next row
        self.pitch = max(w for _, w in level_shapes) + _BORDER
        self.tops, bottom = [], _BORDER
        for h, _ in level_shapes:
            self.tops.append(bottom)
            bottom += h + _BORDER
        # the corners of a location clamped to the lower right wrap into one more row
        self.rows = bottom + 1
        self.cells = maps * self.rows * self.pitch
        # cells from the upper left corner of a sample to itself, (x+1, y), (x, y+1), (x+1, y+1)
        self.shifts = (0, 1, self.pitch, self.pitch + 1)

    def table(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """[M, V, heads, dh] -> [heads, cells, dh]."""
        heads, width = value.shape[2:]
        table = value.new_zeros(heads, self.maps, self.rows, self.pitch, width, dtype=dtype)
        for level, tokens in zip(self.levels(table), self.split(value), strict=True):
            level.copy_(tokens)
        return table.view(heads, self.cells, width)

    def value(self, table: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `table`."""
        heads, _, width = table.shape
        tokens = sum(h * w for h, w in self.shapes)
        value = table.new_empty(self.maps, tokens, heads, width, dtype=dtype)
        table = table.view(heads, self.maps, self.rows, self.pitch, width)
        for level, tokens in zip(self.levels(table), self.split(value), strict=True):
            tokens.copy_(level)
        return value

    def levels(self, table: Tensor) -> list[Tensor]:
        """Views [heads, M, h, w, dh] of the levels in a table [heads, M, rows, pitch, dh]."""
        return [
            table[:, :, top : top + h, _BORDER : _BORDER + w]
            for top, (h, w) in zip(self.tops, self.shapes, strict=True)
        ]

    def split(self, value: Tensor) -> list[Tensor]:
        """Views [heads, M, h, w, dh] of the levels in the tokens [M, V, heads, dh]."""
        parts = value.split([h * w for h, w in self.shapes], dim=1)
        return [
            part.unflatten(1, shape).permute(3, 0, 1, 2, 4)
            for part, shape in zip(parts, self.shapes, strict=True)
        ]


class _Sampler:
    """What forward and backward share: K rows (queries or pairs) of S = L * P samples a head."""

    def __init__(self, value, level_shapes, reference_points, offsets, logits, pairs):
        self.batch, queries, self.heads, levels, points, _ = offsets.shape
        batch, device = self.batch, value.device
        self.dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
        self.queries, self.samples = batch * queries, levels * points
        self.offsets = offsets.reshape(self.queries, self.heads, self.samples, 2)
        self.logits = logits.flatten(0, 1)  # [B*Q, heads, S]
        if pairs is None:
            self.query = None
            image = torch.arange(batch, device=device).repeat_interleave(queries)
            reference = reference_points.expand(batch, -1, -1, -1, -1).flatten(0, 1)  # [K, L, P, 2]
        else:
            image, self.query = pairs.unbind(1)
            reference = reference_points[:, None]  # [K, 1, P, 2]
            # the pairs of query i are by_query[first[i] : first[i + 1]]
            ordered, self.by_query = self.query.sort()
            self.first = torch.searchsorted(ordered, torch.arange(self.queries + 1, device=device))
        self.rows = len(image)
        self.atlas = atlas = _Atlas(value.shape[0], level_shapes)
        index = torch.int32 if max(atlas.cells, self.rows * self.samples) < 2**31 else torch.int64
        sizes = torch.tensor([(w, h) for h, w in level_shapes], dtype=self.dtype, device=device)
        pixel = reference.to(self.dtype) * sizes[:, None] - 0.5
        self.reference = pixel.reshape(self.rows, self.samples, 2)
        self.limits = sizes.repeat_interleave(points, dim=0)  # [S, 2] largest x, y
        corners = torch.tensor(atlas.tops, device=device) * atlas.pitch + _BORDER
        self.level_cell = corners.repeat_interleave(points).to(index)  # [S] of pixel (0, 0)
        self.image_cell = (image * (atlas.rows * atlas.pitch)).to(index)[:, None]  # [K, 1]
        self.starts = torch.arange(self.rows + 1, device=device, dtype=index) * self.samples

    def chunks(self) -> list[slice]:
        step = max(1, _CHUNK // max(1, self.samples))
        return [slice(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]

    def pick(self, rows: slice, head: int, per_query: Tensor) -> Tensor:
        """[B*Q, heads, ...] -> [k, ...] of the rows."""
        of_head = per_query[:, head]
        return (of_head[rows] if self.query is None else of_head[self.query[rows]]).to(self.dtype)

    def reduce(self, per_row: Tensor, mode: str) -> Tensor:
        """Sum or mean over the pairs of each query: [K, n] -> [B*Q, n]."""
        if self.query is None:
            return per_row
        return F.embedding_bag(
            self.by_query, per_row, self.first, mode=mode, include_last_offset=True
        )

    def sum_references(self, per_row: Tensor, reference_points: Tensor) -> Tensor:
        """Derivatives by pixels [K, S, 2] -> by the reference points they were computed from."""
        grad = (per_row * self.limits).unflatten(1, (-1, reference_points.shape[-2]))
        if self.query is not None:
            return grad.sum(1).to(reference_points.dtype)  # over the levels
        grad = grad.view(self.batch, *reference_points.shape[1:])
        return grad.sum_to_size(reference_points.shape).to(reference_points.dtype)

    def locate(self, rows: slice, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[k, S] each: cell of the upper left corner, fractions to the right and below, weight."""
        position = self.pick(rows, head, self.offsets) + self.reference[rows]
        position = torch.minimum(position.clamp_min_(-_BORDER), self.limits)
        position.nan_to_num_(nan=-_BORDER)  # NaN too reads the border, never outside the table
        corner = position.floor()
        fx, fy = position.sub_(corner).unbind(-1)
        x, y = corner.to(self.starts.dtype).unbind(-1)
        cell = torch.add(x, y, alpha=self.atlas.pitch)
        cell.add_(self.level_cell).add_(self.image_cell[rows])
        attention = _softmax(self.pick(rows, head, self.logits))
        return cell, fx.contiguous(), fy.contiguous(), attention


def _softmax(logits: Tensor) -> Tensor:
    """Over the last axis; torch.softmax is five times slower for rows shorter than a CPU vector."""
    exponentials = (logits - logits.amax(dim=-1, keepdim=True)).exp_()
    return exponentials.div_(exponentials.sum(dim=-1, keepdim=True))


def _corner_weights(fx: Tensor, fy: Tensor, attention: Tensor) -> tuple[Tensor, ...]:
    """Bilinear weights of the corners, in the order of `_Atlas.shifts`, times the attention."""
    below = attention * fy
    above = attention - below
    above_right, below_right = above * fx, below * fx
    return above.sub_(above_right), above_right, below.sub_(below_right), below_right


def _bilinear_derivatives(
    corners: list[Tensor], fx: Tensor, fy: Tensor, attention: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives by attention, x and y from the gradient's dot products with the corners."""
    above, above_right, below, below_right = corners
    slope_above, slope_below = above_right - above, below_right - below
    above, below = above + slope_above * fx, below + slope_below * fx
    by_y = below - above
    by_x = slope_above + (slope_below - slope_above) * fy
    return above + by_y * fy, attention * by_x, attention * by_y


class Sampling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, level_shapes, reference_points, offsets, logits, pairs):
        ctx.save_for_backward(value, reference_points, offsets, logits, pairs)
        ctx.level_shapes = level_shapes
        sampler = _Sampler(value, level_shapes, reference_points, offsets, logits, pairs)
        table = sampler.atlas.table(value, sampler.dtype)
        batch, queries, heads = offsets.shape[:3]
        width = value.shape[3]
        out = value.new_empty(batch * queries, heads, width)
        for head in range(heads):
            per_row = table.new_empty(sampler.rows, width)
            for rows in sampler.chunks():
                cell, *geometry = sampler.locate(rows, head)
                starts = sampler.starts[: len(cell) + 1]
                corners = zip(sampler.atlas.shifts, _corner_weights(*geometry), strict=True)
                per_row[rows] = sum(
                    _sum_rows(table[head, shift:], cell, weight, starts)
                    for shift, weight in corners
                )
            out[:, head] = sampler.reduce(per_row, "mean")
        return out.view(batch, queries, heads * width)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        value, reference_points, offsets, logits, pairs = ctx.saved_tensors
        sampler = _Sampler(value, ctx.level_shapes, reference_points, offsets, logits, pairs)
        table = sampler.atlas.table(value, sampler.dtype)
        shifts, samples = sampler.atlas.shifts, sampler.samples
        grad_table = torch.zeros_like(table)
        grad_offsets = torch.empty_like(sampler.offsets)
        grad_logits = torch.empty_like(sampler.logits)
        grad_out = grad_out.reshape(sampler.queries, sampler.heads, value.shape[3])
        if pairs is not None:
            grad_out = grad_out / sampler.first.diff().clamp_min(1)[:, None, None]
        cells = sampler.starts.new_empty(sampler.rows, samples)
        weights = table.new_empty(4, sampler.rows, samples)
        grad_offset = table.new_empty(sampler.rows, samples, 2)
        grad_logit = table.new_empty(sampler.rows, samples)
        grad_reference = torch.zeros_like(grad_offset) if ctx.needs_input_grad[2] else None
        for head in range(sampler.heads):
            grad = sampler.pick(slice(None), head, grad_out).contiguous()  # [K, dh]
            for rows in sampler.chunks():
                cell, fx, fy, attention = sampler.locate(rows, head)
                cells[rows] = cell
                for corner, weight in zip(weights, _corner_weights(fx, fy, attention), strict=True):
                    corner[rows] = weight
                starts = sampler.starts[: len(cell) + 1]
                dots = _gather_dots(table[head], shifts, cell, grad[rows], starts)
                by_attention, by_x, by_y = _bilinear_derivatives(dots, fx, fy, attention)
                grad_offset[rows, :, 0], grad_offset[rows, :, 1] = by_x, by_y
                mean = torch.linalg.vecdot(attention, by_attention)[:, None]
                grad_logit[rows] = by_attention.sub_(mean).mul_(attention)
            if grad_reference is not None:
                grad_reference += grad_offset
            by_offset = sampler.reduce(grad_offset.flatten(1), "sum")
            grad_offsets[:, head] = by_offset.view(sampler.queries, samples, 2)
            grad_logits[:, head] = sampler.reduce(grad_logit, "sum")
            _scatter_rows(grad_table[head], shifts, cells, weights, grad)
        grad_value = sampler.atlas.value(grad_table, value.dtype)
        grad_offsets, grad_logits = grad_offsets.view_as(offsets), grad_logits.view_as(logits)
        if grad_reference is not None:
            grad_reference = sampler.sum_references(grad_reference, reference_points)
        return grad_value, None, grad_reference, grad_offsets, grad_logits, None


def _sum_rows(table: Tensor, rows: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    """out[i] = sum of weights[j] * table[rows[j]] for j in [starts[i], starts[i + 1])."""
    return F.embedding_bag(
        rows.flatten(),
        table,
        starts,
        per_sample_weights=weights.flatten(),
        mode="sum",
        include_last_offset=True,
    )


def _scatter_rows(
    table: Tensor, shifts: tuple[int, ...], cells: Tensor, weights: Tensor, grad: Tensor
) -> None:
    """table[cells + shift] += weight * grad, in place, as sums over the samples sorted by cell."""
    keys = cells.flatten()
    if len(table) <= 2**15:
        keys = keys.short()  # half the passes of a radix sort
    ordered, order = keys.sort()
    counts = torch.bincount(ordered, minlength=len(table))
    starts = F.pad(counts.cumsum(0), (1, 0)).to(cells.dtype)
    row = order.to(cells.dtype).div_(max(1, cells.shape[1]), rounding_mode="floor")
    for shift, weight in zip(shifts, weights, strict=True):
        sums = _sum_rows(grad, row, weight.flatten()[order], starts)
        table[shift:] += sums[: len(table) - shift]


def _gather_dots(
    table: Tensor, shifts: tuple[int, ...], cells: Tensor, grad: Tensor, starts: Tensor
) -> list[Tensor]:
    """[k, S] for each shift: dot products of grad[i] with table[cells[i] + shift].

    A sampled dense-dense product: the cells are the pattern of a sparse matrix.
    """
    rows, samples = cells.shape
    zeros = grad.new_zeros(rows * samples)
    dots = []
    for shift in shifts:
        corner = table[shift:]
        with warnings.catch_warnings():
            # the second by torch 2.11 alone, of what `check_invariants` says explicitly
            warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)")
            product = torch.sparse_csr_tensor(
                starts, cells.flatten(), zeros.clone(), (rows, len(corner)), check_invariants=False
            )
        torch.sparse.sampled_addmm(product, grad, corner.mT, beta=0.0, out=product)
        dots.append(product.values().view(rows, samples))
    return dots
