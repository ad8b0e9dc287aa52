"""Multi-scale deformable sampling (Zhu et al. 2021, eq. 3; spec section 4).

    a          = softmax(logits over levels and points)
    (x, y)     = reference * (w_l, h_l) + offset - 1/2                  pixels of level l
    out[q, k]  = sum_{l, p} a[q, k, l, p] * bilinear(value_l[k], x, y)  zero outside the level, k the head

With pairs, a query is sampled once in every value map it is paired with, and its result is the mean over those pairs.

The computation walks over the heads, so that sampling locations and weights exist for one head at a time, and backward
computes them again. All levels of a head lie in one table of rows, an atlas with two zeros around every level: a location
clamped into that border reads zeros, hence neither the samples nor their derivatives need a mask. What remains are sums of
weighted table rows (`embedding_bag`), in backward the same sums over the transposed indices, found by a sort.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_BORDER = 2  # zeros around a level: a sample reads two pixels along each axis
_CHUNK = 1 << 22  # samples of one head at a time; bounds the temporaries to about 200 MB


class _Atlas:
    """Where each level lies in the table: M images of `rows` x `pitch` cells, the levels below each other."""

    def __init__(self, maps: int, level_shapes: list[tuple[int, int]]):
        self.maps, self.shapes = maps, level_shapes
        self.pitch = max(w for _, w in level_shapes) + _BORDER  # a row's right border is the next row's left border
        self.tops = [_BORDER]
        for h, _ in level_shapes:
            self.tops.append(self.tops[-1] + h + _BORDER)
        self.rows = self.tops[-1] + 1  # the last corner of a location clamped to the lower right may wrap into one more row
        self.cells = maps * self.rows * self.pitch
        self.index_dtype = torch.int32 if self.cells < 2**31 else torch.int64
        self.shifts = (0, 1, self.pitch, self.pitch + 1)  # cells from the upper left corner to (x+1, y), (x, y+1), both

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
        value = table.new_empty(self.maps, sum(h * w for h, w in self.shapes), heads, width, dtype=dtype)
        table = table.view(heads, self.maps, self.rows, self.pitch, width)
        for level, tokens in zip(self.levels(table), self.split(value), strict=True):
            tokens.copy_(level)
        return value

    def levels(self, table: Tensor) -> list[Tensor]:
        """Views [heads, M, h, w, dh] of the levels in a table [heads, M, rows, pitch, dh]."""
        return [
            table[:, :, top : top + h, _BORDER : _BORDER + w]
            for top, (h, w) in zip(self.tops, self.shapes, strict=False)
        ]

    def split(self, value: Tensor) -> list[Tensor]:
        """Views [heads, M, h, w, dh] of the levels in the tokens [M, V, heads, dh]."""
        parts = value.split([h * w for h, w in self.shapes], dim=1)
        return [
            part.unflatten(1, shape).permute(3, 0, 1, 2, 4) for part, shape in zip(parts, self.shapes, strict=True)
        ]


class _Sampler:
    """Everything forward and backward share: K rows (queries or pairs), each with L*P samples a head."""

    def __init__(self, value, level_shapes, reference_points, offsets, logits, pairs):
        batch, queries, self.heads, levels, points, _ = offsets.shape
        self.dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
        self.atlas = atlas = _Atlas(value.shape[0], level_shapes)
        self.offsets = offsets.flatten(0, 1)  # [B*Q, heads, L, P, 2]
        self.logits = logits.flatten(0, 1)  # [B*Q, heads, L*P]
        self.queries = batch * queries
        self.samples = levels * points
        device = value.device
        if pairs is None:
            self.query = None
            self.rows = self.queries
            image = torch.arange(batch, device=device).repeat_interleave(queries)
            reference = reference_points.expand(batch, -1, -1, -1, -1).flatten(0, 1)  # [K, L, P, 2]
        else:
            self.query = pairs[:, 1]
            self.rows = len(pairs)
            image = pairs[:, 0]
            reference = reference_points[:, None].expand(-1, levels, -1, -1)
            self.by_query = self.query.argsort()  # pairs of query i: by_query[first[i] : first[i + 1]]
            self.first = torch.searchsorted(
                self.query[self.by_query], torch.arange(self.queries + 1, device=device)
            )
        sizes = torch.tensor([(w, h) for h, w in level_shapes], dtype=self.dtype, device=device)
        pixel = reference.to(self.dtype) * sizes[:, None] - 0.5
        self.x, self.y = pixel[..., 0].contiguous(), pixel[..., 1].contiguous()  # [K, L, P]
        self.limits = sizes.mT.repeat_interleave(points, dim=1)  # [2, L*P] largest x, y
        tops = torch.tensor(atlas.tops[:levels], device=device)
        cell = (tops * atlas.pitch + _BORDER).repeat_interleave(points)
        self.level_cell = cell.to(atlas.index_dtype)  # [L*P] cell of a level's pixel (0, 0)
        self.image_cell = (image * (atlas.rows * atlas.pitch)).to(atlas.index_dtype)[:, None]  # [K, 1]

    def chunks(self) -> list[slice]:
        step = max(1, _CHUNK // self.samples)
        return [slice(start, start + step) for start in range(0, self.rows, step)]

    def pick(self, rows: slice, head: int, per_query: Tensor) -> Tensor:
        """[B*Q, heads, ...] -> [k, ...] of the rows."""
        of_head = per_query[:, head]
        return (of_head[rows] if self.query is None else of_head[self.query[rows]]).to(self.dtype)

    def reduce(self, per_row: Tensor, mode: str) -> Tensor:
        """Sum or mean over the pairs of each query: [K, n] -> [B*Q, n]."""
        if self.query is None:
            return per_row
        return F.embedding_bag(self.by_query, per_row, self.first, mode=mode, include_last_offset=True)

    def locate(self, rows: slice, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[k, L*P] each: cell of the upper left corner, fractions towards the right and below, softmaxed weight."""
        offsets = self.pick(rows, head, self.offsets)
        cells, fractions = [], []
        for axis, reference in enumerate((self.x, self.y)):
            position = (reference[rows] + offsets[..., axis]).flatten(1)
            # NaN must read the border like everything else outside: it may not point outside the table
            position = position.clamp_min_(-_BORDER).minimum(self.limits[axis]).nan_to_num_(nan=-_BORDER)
            corner = position.floor()
            cells.append(corner.to(self.atlas.index_dtype))
            fractions.append(position.sub_(corner))
        cell = cells[0].add_(cells[1], alpha=self.atlas.pitch).add_(self.level_cell).add_(self.image_cell[rows])
        return cell, *fractions, self.pick(rows, head, self.logits).softmax(dim=-1)


def _corner_weights(fx: Tensor, fy: Tensor, attention: Tensor) -> list[Tensor]:
    """Bilinear weights of the corners, in the order of `_Atlas.shifts`, times the attention."""
    below = attention * fy
    above = attention - below
    right_above, right_below = above * fx, below * fx
    return [above - right_above, right_above, below - right_below, right_below]


class _DeformableSampling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, level_shapes, reference_points, offsets, logits, pairs):
        ctx.save_for_backward(value, reference_points, offsets, logits, pairs)
        ctx.level_shapes = level_shapes
        sampler = _Sampler(value, level_shapes, reference_points, offsets, logits, pairs)
        table = sampler.atlas.table(value, sampler.dtype)
        batch, queries, heads = offsets.shape[:3]
        out = value.new_empty(batch * queries, heads, value.shape[3])
        for head in range(heads):
            per_row = table.new_empty(sampler.rows, value.shape[3])
            for rows in sampler.chunks():
                cell, *geometry = sampler.locate(rows, head)
                per_row[rows] = sum(
                    F.embedding_bag(cell, table[head, shift:], per_sample_weights=weight, mode="sum")
                    for shift, weight in zip(sampler.atlas.shifts, _corner_weights(*geometry), strict=True)
                )
            out[:, head] = sampler.reduce(per_row, "mean")
        return out.view(batch, queries, heads * value.shape[3])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        value, reference_points, offsets, logits, pairs = ctx.saved_tensors
        sampler = _Sampler(value, ctx.level_shapes, reference_points, offsets, logits, pairs)
        table = sampler.atlas.table(value, sampler.dtype)
        grad_table = torch.zeros_like(table)
        grad_offsets, grad_logits = torch.empty_like(sampler.offsets), torch.empty_like(sampler.logits)
        grad_out = grad_out.reshape(sampler.queries, sampler.heads, value.shape[3])
        if pairs is not None:
            grad_out = grad_out / sampler.first.diff().clamp_min(1)[:, None, None]
        for head in range(sampler.heads):
            grad_x, grad_y, grad_logit = table.new_empty(3, sampler.rows, sampler.samples)
            for rows in sampler.chunks():
                cell, fx, fy, attention = sampler.locate(rows, head)
                grad = sampler.pick(rows, head, grad_out).contiguous()  # [k, dh]
                _scatter(grad_table[head], sampler.atlas.shifts, cell, _corner_weights(fx, fy, attention), grad)
                corners = _gather_dots(table[head], sampler.atlas.shifts, cell, grad)
                grad_attention, grad_x[rows], grad_y[rows] = _bilinear_derivatives(corners, fx, fy, attention)
                mean = (attention * grad_attention).sum(dim=-1, keepdim=True)
                grad_logit[rows] = attention * (grad_attention - mean)
            for axis, per_row in enumerate((grad_x, grad_y)):
                grad_offsets[:, head, ..., axis] = sampler.reduce(per_row, "sum").unflatten(1, offsets.shape[3:5])
            grad_logits[:, head] = sampler.reduce(grad_logit, "sum")
        grad_value = sampler.atlas.value(grad_table, value.dtype)
        return grad_value, None, None, grad_offsets.view_as(offsets), grad_logits.view_as(logits), None


def _bilinear_derivatives(corners: list[Tensor], fx, fy, attention) -> tuple[Tensor, Tensor, Tensor]:
    """From the dot products of the gradient with the four corners: derivatives by attention weight, x and y."""
    above, above_right, below, below_right = corners
    slope_above, slope_below = above_right - above, below_right - below
    above, below = above + slope_above * fx, below + slope_below * fx
    by_y = below - above
    by_x = slope_above + (slope_below - slope_above) * fy
    return above + by_y * fy, attention * by_x, attention * by_y


def _scatter(table: Tensor, shifts, cell: Tensor, weights: list[Tensor], grad: Tensor) -> None:
    """table[cell + shift] += weight * grad, in place: a sum over the samples of each cell, once these are sorted by cell."""
    count, order = cell.flatten().sort()
    first = torch.searchsorted(
        count, torch.arange(len(table) + 1, device=cell.device, dtype=cell.dtype), out_int32=cell.dtype == torch.int32
    )
    row = order.to(cell.dtype).div_(cell.shape[1], rounding_mode="floor")
    for shift, weight in zip(shifts, weights, strict=True):
        weight = weight.flatten()[order]
        sums = F.embedding_bag(row, grad, first, per_sample_weights=weight, mode="sum", include_last_offset=True)
        table[shift:] += sums[: len(table) - shift]


def _gather_dots(table: Tensor, shifts, cell: Tensor, grad: Tensor) -> list[Tensor]:
    """[k, L*P] for each corner: dot product of grad[k] with table[cell + shift].

    A sampled dense-dense product: the cells are the pattern of a sparse matrix whose rows are the queries.
    """
    rows, samples = cell.shape
    starts = torch.arange(0, cell.numel() + 1, samples, device=cell.device, dtype=cell.dtype)
    zeros = grad.new_zeros(cell.numel())
    dots = []
    for shift in shifts:
        corner = table[shift:]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
            pattern = torch.sparse_csr_tensor(
                starts, cell.flatten(), zeros, size=(rows, len(corner)), check_invariants=False
            )
        dots.append(torch.sparse.sampled_addmm(pattern, grad, corner.t(), beta=0.0).values().view(rows, samples))
    return dots


def deformable_sampling(
    value: Tensor,
    level_shapes: list[tuple[int, int]],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    pairs: Tensor | None = None,
) -> Tensor:
    """Attention-weighted bilinear samples of multi-level feature maps; returns [B, Q, heads * dh] of value's dtype.

    Args:
        value: [M, V, heads, dh] tokens of M stacks of maps, levels one after another, row-major. M is B without pairs.
        level_shapes: (h, w) of every level; V is the sum of their areas.
        reference_points: (x, y) as fractions of the map, 0 and 1 at its outer edges. Without pairs [1 or B, Q, L, P, 2],
            with pairs [K, P, 2], shared by the levels. They receive no gradient.
        offsets: [B, Q, heads, L, P, 2] in pixels of the level.
        logits: [B, Q, heads, L * P] before the softmax over levels and points.
        pairs: int64 [K, 2] (row of value, flat query b * Q + q), sorted by the first column. A query's result is the mean
            over its pairs, zero without any; queries without pairs cost nothing.

    Sums are in float32, or float64 for float64 values. Raises TypeError and ValueError that name the argument.
    """
    _check(value, level_shapes, reference_points, offsets, logits, pairs)
    shapes = [(int(h), int(w)) for h, w in level_shapes]
    return _DeformableSampling.apply(value, shapes, reference_points.detach(), offsets, logits, pairs)


def _check(value, level_shapes, reference_points, offsets, logits, pairs) -> None:
    if value.ndim != 4:
        raise ValueError(f"value must be [M, V, heads, dh], got {list(value.shape)}")
    if offsets.ndim != 6 or offsets.shape[2] != value.shape[2] or offsets.shape[5] != 2:
        raise ValueError(f"offsets must be [B, Q, {value.shape[2]} heads, L, P, 2], got {list(offsets.shape)}")
    batch, queries, heads, levels, points, _ = offsets.shape
    if len(level_shapes) != levels:
        raise ValueError(f"level_shapes has {len(level_shapes)} levels, offsets {levels}")
    tokens = sum(h * w for h, w in level_shapes)
    if value.shape[1] != tokens:
        raise ValueError(f"value has {value.shape[1]} tokens, level_shapes {list(level_shapes)} make {tokens}")
    if logits.shape != (batch, queries, heads, levels * points):
        raise ValueError(f"logits must be {[batch, queries, heads, levels * points]}, got {list(logits.shape)}")
    for name, tensor in (("value", value), ("offsets", offsets), ("logits", logits)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    tensors = {"reference_points": reference_points, "offsets": offsets, "logits": logits}
    if pairs is None:
        expected = [[n, queries, levels, points, 2] for n in (1, batch)]
        if value.shape[0] != batch:
            raise ValueError(f"value has {value.shape[0]} maps for a batch of {batch}; pairs say which map a query reads")
    else:
        tensors["pairs"] = pairs
        if pairs.dtype != torch.int64 or pairs.ndim != 2 or pairs.shape[1] != 2:
            raise TypeError(f"pairs must be int64 [K, 2], got {pairs.dtype} {list(pairs.shape)}")
        expected = [[len(pairs), points, 2]]
    if list(reference_points.shape) not in expected:
        raise ValueError(f"reference_points must be {expected[-1]}, got {list(reference_points.shape)}")
    for name, tensor in tensors.items():
        if tensor.device != value.device:
            raise ValueError(f"{name} is on {tensor.device}, value on {value.device}")
