"""What the nodes of a volume are: the features of three planes through a small network.

    x    = hw[h, w] + zh[z, h] + wz[w, z] + mix lifted[h, w, z]
    node = W2 softplus(W1 softplus(x) + b1) + b2

The Triton kernels keep nothing of a node but what it is. A program has BLOCK_W by BLOCK_Z nodes and
takes them through some rows h, one after the other, on tensor cores. Backward computes the hidden
features again. On its way a program sums what its nodes give to the planes and to the network, in
its registers where it can, and leaves the sums beside those of other programs, to be added up
afterwards: gradients are the same bit for bit in every run.

The one for CPUs goes through the rows h one after the other, so that features of a row stay in the
cache; gradients of planes are summed on the way.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from kernels.checks import at_least_float32, check
from kernels.dispatch import autocast_type, launch, plainly_exported, tl, triton, use_triton

SLAB = 1 << 23  # features decoded at once; where there are more, backward computes them again


class Tile(NamedTuple):
    """Nodes of a program along w and z, features multiplied at once, and warps."""

    w: int
    z: int
    chunk: int  # 96 features are no power of two
    warps: int


# Chosen from the binaries for sm_80 to sm_120: with fewer warps or larger chunks they spill. None
# of it has been timed yet.
FORWARD = Tile(8, 8, 32, 4)
BACKWARD = Tile(8, 8, 16, 8)
NETWORK = Tile(8, 4, 16, 4)
PROGRAMS = 264  # at least, where there are rows enough: two for each processor of an H100


# -----------------------------------------------------------------------------------------------
# The activation. This is the place to try another one, that rises everywhere.


def activation(x: Tensor) -> Tensor:
    return F.softplus(x)


# gradient by x, given that by activation(x), and x
activation_backward = partial(torch.ops.aten.softplus_backward, beta=1, threshold=20)


@triton.jit
def activated(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def activated_slope(y):
    """Derivative of `activated` where its value is y."""
    return 1.0 - tl.exp(-y)


# -----------------------------------------------------------------------------------------------
# Triton


class Layout(NamedTuple):
    """Constants of a launch. `wide` channels are at least C, `lifts` at least L."""

    dim: int  # D
    hidden: int  # E
    channels: int  # C
    row: int  # numbers from node to node in the volume
    lifted: int  # L, 0 where nothing is lifted
    wide: int
    lifts: int
    block_w: int
    block_z: int
    chunk: int
    precision: str  # of products: bf16, or an `input_precision` of Triton
    last: str  # the same for W2, which makes metres


@triton.jit
def _dot(a, b, start, S: tl.constexpr):
    """start + a @ b."""
    if S.precision == "bf16":
        out = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), start)
    else:
        out = tl.dot(a, b, start, input_precision=S.precision)
    return out


@triton.jit
def _dot_last(a, b, start, S: tl.constexpr):
    """The same with W2."""
    return tl.dot(a, b, start, input_precision=S.last)


@triton.jit
def _load(entries, rows, columns, there, ROW: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows that are there, ROW numbers apart, and columns of a matrix; 0 beyond."""
    mask = there[:, None] & (columns < COLUMNS)[None, :]
    return tl.load(entries + rows[:, None] * ROW + columns[None, :], mask, other=0.0).to(tl.float32)


@triton.jit
def _store(entries, rows, columns, there, ROW: tl.constexpr, COLUMNS: tl.constexpr, numbers):
    mask = there[:, None] & (columns < COLUMNS)[None, :]
    tl.store(entries + rows[:, None] * ROW + columns[None, :], numbers, mask)


@triton.jit
def _begin(planes, counts, S: tl.constexpr):
    """Of a program: the planes, and what is lifted, of its item; its place: item, slab of rows,
    block along w and along z; its first row and that after its last; its nodes [M]: w, z, and which
    there are.
    """
    height, width, depth, rows = counts
    across, up = tl.cdiv(width, S.block_w), tl.cdiv(depth, S.block_z)
    program = tl.program_id(0)
    block_z, program = program % up, program // up
    block_w, program = program % across, program // across
    slab = program % tl.cdiv(height, rows)
    item = (program // tl.cdiv(height, rows)).to(tl.int64)
    hw = planes[0] + item * (height * width * S.dim)
    zh = planes[1] + item * (depth * height * S.dim)
    wz = planes[2] + item * (width * depth * S.dim)
    lifted = planes[3] + item * (height * width * depth * S.lifted)
    node = tl.arange(0, S.block_w * S.block_z)
    w, z = block_w * S.block_w + node // S.block_z, block_z * S.block_z + node % S.block_z
    last = tl.minimum((slab + 1) * rows, height)
    planes, place = (hw, zh, wz, lifted, planes[4]), (item, slab, block_w, block_z)
    return planes, place, slab * rows, last, w, z, (w < width) & (z < depth)


@triton.jit
def _lift(planes, node, there, S: tl.constexpr):
    """What is lifted [M, lifts] to nodes of an item."""
    return _load(planes[3], node, tl.arange(0, S.lifts), there, S.lifted, S.lifted)


@triton.jit
def _mix(planes, features, S: tl.constexpr):
    """[chunk, lifts]"""
    return _load(planes[4], features, tl.arange(0, S.lifts), features < S.dim, S.lifted, S.lifted)


@triton.jit
def _features(planes, h, w, z, there, counts, features, S: tl.constexpr):
    """activated(x) [M, chunk] at nodes of row h."""
    height, width, depth, _rows = counts
    x = _load(planes[0], h * width + w, features, there, S.dim, S.dim)
    x += _load(planes[1], z * height + h, features, there, S.dim, S.dim)
    there &= h < height  # always so; without h, Triton would keep all this in registers
    wz = _load(planes[2], w * depth + z, features, there, S.dim, S.dim)
    # added by a reduction, before which Triton ends what it would compute anew for every product
    x = tl.sum(tl.join(x, wz), axis=2)
    if S.lifted > 0:
        lift = _lift(planes, (h * width + w) * depth + z, there, S)
        x = _dot(lift, tl.trans(_mix(planes, features, S)), x, S)
    return activated(x)


@triton.jit
def _first(network, hidden, features, S: tl.constexpr):
    """W1 [chunk, chunk] from features to hidden ones."""
    return _load(network[0], hidden, features, hidden < S.hidden, S.dim, S.dim)


@triton.jit
def _last(network, hidden, S: tl.constexpr):
    """W2 [wide, chunk] from hidden features."""
    channels = tl.arange(0, S.wide)
    return _load(network[2], channels, hidden, channels < S.channels, S.hidden, S.hidden)


@triton.jit
def _hide(firsts, network, hidden, S: tl.constexpr):
    """activated(y) [M, chunk] of all `firsts`, which are activated(x)."""
    CHUNKS: tl.constexpr = (S.dim + S.chunk - 1) // S.chunk
    bias = tl.load(network[1] + hidden, hidden < S.hidden, other=0.0).to(tl.float32)
    y = tl.full([S.block_w * S.block_z, S.chunk], 0.0, tl.float32) + bias[None, :]
    for k in tl.static_range(CHUNKS):
        features = k * S.chunk + tl.arange(0, S.chunk)
        y = _dot(firsts[k], tl.trans(_first(network, hidden, features, S)), y, S)
    return activated(y)


@triton.jit
def _by_hidden(by_node, second, network, hidden, S: tl.constexpr):
    """Gradient of y [M, chunk] where activated(y) is `second`."""
    by_second = tl.full([S.block_w * S.block_z, S.chunk], 0.0, tl.float32)
    return _dot_last(by_node, _last(network, hidden, S), by_second, S) * activated_slope(second)


@triton.jit
def decode_forward(planes, network, out, counts, S: tl.constexpr):
    """out [B, H, W, Z, row], of which the channels behind C become zero.

    planes: hw, zh, wz, lifted, mix; network: W1, b1, W2, b2; counts: H, W, Z, rows of a program.
    """
    CHUNKS_D: tl.constexpr = (S.dim + S.chunk - 1) // S.chunk
    CHUNKS_E: tl.constexpr = (S.hidden + S.chunk - 1) // S.chunk
    height, width, depth, _rows = counts
    planes, place, first, last, w, z, there = _begin(planes, counts, S)
    channels = tl.arange(0, S.wide)
    bias = tl.load(network[3] + channels, channels < S.channels, other=0.0).to(tl.float32)
    out += place[0] * (height * width * depth * S.row)
    for h in tl.range(first, last, num_stages=1):
        firsts = ()
        for k in tl.static_range(CHUNKS_D):
            features = k * S.chunk + tl.arange(0, S.chunk)
            firsts += (_features(planes, h, w, z, there, counts, features, S),)
        node = tl.full([S.block_w * S.block_z, S.wide], 0.0, tl.float32) + bias[None, :]
        for j in tl.range(0, CHUNKS_E, num_stages=1):
            hidden = j * S.chunk + tl.arange(0, S.chunk)
            second = _hide(firsts, network, hidden, S)
            node = _dot_last(second, tl.trans(_last(network, hidden, S)), node, S)
        _store(out, (h * width + w) * depth + z, channels, there, S.row, S.row, node)


@triton.jit
def _sums(sums, place, height, width, depth, rows, S: tl.constexpr):
    """Where a program's sums for hw, zh, wz and what is lifted begin: see `decode_backward`."""
    item, slab, block_w, block_z = place
    blocks = tl.cdiv(height, rows) * tl.cdiv(width, S.block_w) * tl.cdiv(depth, S.block_z)
    items = tl.num_programs(0) // blocks
    hw = sums[0] + (block_z * items + item) * (height * width * S.dim)
    zh = sums[1] + (block_w * items + item) * (depth * height * S.dim)
    wz = sums[2] + (slab * items + item) * (width * depth * S.dim)
    return hw, zh, wz, sums[3] + item * (height * width * depth * S.lifted)


@triton.jit
def decode_backward(planes, network, grad, sums, counts, S: tl.constexpr):
    """What the nodes of a program give to the planes, each sum at a place of its own.

    grad: of out without its padding; sums: of hw [blocks of z, B, H, W, D], zh [blocks of w, B, Z,
    H, D], wz [slabs, B, W, Z, D], lifted [B, H, W, Z, L], and mix [programs, D, L].
    """
    CHUNKS_D: tl.constexpr = (S.dim + S.chunk - 1) // S.chunk
    CHUNKS_E: tl.constexpr = (S.hidden + S.chunk - 1) // S.chunk
    NODES: tl.constexpr = S.block_w * S.block_z
    height, width, depth, rows = counts
    planes, place, first, last, w, z, there = _begin(planes, counts, S)
    by_hw, by_zh, by_wz, by_lifted = _sums(sums, place, height, width, depth, rows, S)
    grad += place[0] * (height * width * depth * S.channels)
    ws = place[2] * S.block_w + tl.arange(0, S.block_w)
    zs = place[3] * S.block_z + tl.arange(0, S.block_z)
    channels, lifts = tl.arange(0, S.wide), tl.arange(0, S.lifts)
    of_wz, of_mix = (), ()
    for _k in tl.static_range(CHUNKS_D):
        of_wz += (tl.full([NODES, S.chunk], 0.0, tl.float32),)
        of_mix += (tl.full([S.chunk, S.lifts], 0.0, tl.float32),)
    for h in tl.range(first, last, num_stages=1):
        node = (h * width + w) * depth + z
        by_node = _load(grad, node, channels, there, S.channels, S.channels)
        firsts, by_firsts = (), ()
        for k in tl.static_range(CHUNKS_D):
            features = k * S.chunk + tl.arange(0, S.chunk)
            firsts += (_features(planes, h, w, z, there, counts, features, S),)
            by_firsts += (tl.full([NODES, S.chunk], 0.0, tl.float32),)
        for j in tl.range(0, CHUNKS_E, num_stages=1):
            hidden = j * S.chunk + tl.arange(0, S.chunk)
            by_y = _by_hidden(by_node, _hide(firsts, network, hidden, S), network, hidden, S)
            before, by_firsts = by_firsts, ()
            for k in tl.static_range(CHUNKS_D):
                features = k * S.chunk + tl.arange(0, S.chunk)
                by_firsts += (_dot(by_y, _first(network, hidden, features, S), before[k], S),)
        old_wz, old_mix, of_wz, of_mix = of_wz, of_mix, (), ()
        by_lift = tl.full([NODES, S.lifts], 0.0, tl.float32)
        for k in tl.static_range(CHUNKS_D):
            features = k * S.chunk + tl.arange(0, S.chunk)
            by_x = by_firsts[k] * activated_slope(firsts[k])
            of_wz += (old_wz[k] + by_x,)
            if S.lifted > 0:
                by_lift = _dot(by_x, _mix(planes, features, S), by_lift, S)
                of_mix += (_dot(tl.trans(by_x), _lift(planes, node, there, S), old_mix[k], S),)
            else:
                of_mix += (old_mix[k],)
            by_x = tl.reshape(by_x, [S.block_w, S.block_z, S.chunk])
            of_hw, of_zh = tl.sum(by_x, axis=1), tl.sum(by_x, axis=0)
            _store(by_hw, h * width + ws, features, ws < width, S.dim, S.dim, of_hw)
            _store(by_zh, zs * height + h, features, zs < depth, S.dim, S.dim, of_zh)
        if S.lifted > 0:
            _store(by_lifted, node, lifts, there, S.lifted, S.lifted, by_lift)
    by_mix = sums[4] + tl.program_id(0).to(tl.int64) * (S.dim * S.lifted)
    for k in tl.static_range(CHUNKS_D):
        features = k * S.chunk + tl.arange(0, S.chunk)
        _store(by_wz, w * depth + z, features, there, S.dim, S.dim, of_wz[k])
        if S.lifted > 0:
            _store(by_mix, features, lifts, features < S.dim, S.lifted, S.lifted, of_mix[k])


@triton.jit
def decode_backward_network(planes, network, grad, sums, counts, S: tl.constexpr):
    """What the nodes of a program give to `chunk` hidden features, each sum at a place of its own.

    sums: of W1, b1, W2 and b2, each [programs, ...]; the last axis of the grid walks over chunks.
    """
    CHUNKS_D: tl.constexpr = (S.dim + S.chunk - 1) // S.chunk
    height, width, depth, _rows = counts
    planes, place, first, last, w, z, there = _begin(planes, counts, S)
    grad += place[0] * (height * width * depth * S.channels)
    channels, hidden = tl.arange(0, S.wide), tl.program_id(1) * S.chunk + tl.arange(0, S.chunk)
    of_w1, of_w2 = (), tl.full([S.wide, S.chunk], 0.0, tl.float32)
    of_b1, of_b2 = tl.full([S.chunk], 0.0, tl.float32), tl.full([S.wide], 0.0, tl.float32)
    for _k in tl.static_range(CHUNKS_D):
        of_w1 += (tl.full([S.chunk, S.chunk], 0.0, tl.float32),)
    for h in tl.range(first, last, num_stages=1):
        node = (h * width + w) * depth + z
        by_node = _load(grad, node, channels, there, S.channels, S.channels)
        firsts = ()
        for k in tl.static_range(CHUNKS_D):
            features = k * S.chunk + tl.arange(0, S.chunk)
            firsts += (_features(planes, h, w, z, there, counts, features, S),)
        second = _hide(firsts, network, hidden, S)
        by_y = _by_hidden(by_node, second, network, hidden, S)
        of_b1, of_b2 = of_b1 + tl.sum(by_y, axis=0), of_b2 + tl.sum(by_node, axis=0)
        of_w2 = _dot_last(tl.trans(by_node), second, of_w2, S)
        old_w1, of_w1 = of_w1, ()
        for k in tl.static_range(CHUNKS_D):
            of_w1 += (_dot(tl.trans(by_y), firsts[k], old_w1[k], S),)
    program = tl.program_id(0).to(tl.int64)
    by_w1 = sums[0] + program * (S.hidden * S.dim)
    by_w2 = sums[2] + program * (S.channels * S.hidden)
    for k in tl.static_range(CHUNKS_D):
        features = k * S.chunk + tl.arange(0, S.chunk)
        _store(by_w1, hidden, features, hidden < S.hidden, S.dim, S.dim, of_w1[k])
    tl.store(sums[1] + program * S.hidden + hidden, of_b1, hidden < S.hidden)
    _store(by_w2, channels, hidden, channels < S.channels, S.hidden, S.hidden, of_w2)
    mask = (channels < S.channels) & (tl.program_id(1) == 0)
    tl.store(sums[3] + program * S.channels + channels, of_b2, mask)


def _problem(
    tile: Tile, planes: list[Tensor], network: list[Tensor], precision: str
) -> dict[str, object]:
    """What all launches share."""
    hw, zh, _, *lift = planes
    batch, height, width, dim = hw.shape
    depth = zh.shape[1]
    hidden, channels = network[0].shape[0], network[2].shape[0]
    lifted = lift[0].shape[-1] if lift else 0
    blocks = batch * triton.cdiv(width, tile.w) * triton.cdiv(depth, tile.z)
    rows = max(1, height // triton.cdiv(PROGRAMS, max(1, blocks)))
    slabs = triton.cdiv(height, rows)
    layout = Layout(
        dim=dim,
        hidden=hidden,
        channels=channels,
        row=_row(channels),
        lifted=lifted,
        wide=max(16, triton.next_power_of_2(_row(channels))),
        lifts=max(16, triton.next_power_of_2(lifted)),
        block_w=tile.w,
        block_z=tile.z,
        chunk=tile.chunk,
        precision=precision,
        last=_exactness() if precision == "bf16" else precision,
    )
    return dict(
        grid=(blocks * slabs,),
        # Triton 3.6 hands no tuple on that holds None: what is not looked at is any tensor
        planes=tuple(x.contiguous() for x in (planes if lift else [*planes, hw, hw])),
        network=tuple(x.contiguous() for x in network),
        counts=(height, width, depth, rows),
        S=layout,
        warps=tile.warps,
    )


def _exactness() -> str:
    """How Triton multiplies float32 as PyTorch does."""
    if torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def _row(channels: int) -> int:
    """Numbers from node to node: rows of four and more are read as vectors of four."""
    return channels if channels < 4 else -(-channels // 4) * 4


def _volume(hw: Tensor, zh: Tensor, channels: int) -> Tensor:
    shape = *hw.shape[:3], zh.shape[1]
    return hw.new_empty(*shape, _row(channels), dtype=torch.float32)[..., :channels]


@torch.library.custom_op("selfocc::decode", mutates_args=())
def _decode_op(planes: list[Tensor], network: list[Tensor], precision: str) -> Tensor:
    out = _volume(*planes[:2], len(network[3]))
    launch(decode_forward, out=out, **_problem(FORWARD, planes, network, precision))
    return out


@_decode_op.register_fake
def _(planes, network, precision):
    return _volume(*planes[:2], len(network[3]))


@torch.library.custom_op("selfocc::decode_gradient", mutates_args=())
def _decode_gradient_op(
    grad: Tensor, planes: list[Tensor], network: list[Tensor], precision: str
) -> list[Tensor]:
    new, grad = partial(grad.new_empty, dtype=torch.float32), grad.contiguous()
    told = _problem(BACKWARD, planes, network, precision)
    height, width, depth, rows = told["counts"]
    parts = [triton.cdiv(depth, BACKWARD.z), triton.cdiv(width, BACKWARD.w)]
    parts += [triton.cdiv(height, rows), 1, *told["grid"]]
    sums = [new(part, *x.shape) for part, x in zip(parts, planes, strict=False)]
    launch(decode_backward, grad=grad, sums=tuple(sums + [grad] * (5 - len(sums))), **told)
    told = _problem(NETWORK, planes, network, precision)
    by_network = [new(*told["grid"], *x.shape) for x in network]
    told["grid"] += (triton.cdiv(len(network[1]), NETWORK.chunk),)
    launch(decode_backward_network, grad=grad, sums=tuple(by_network), **told)
    return [
        x.sum(0).to(y.dtype) for x, y in zip((*sums, *by_network), (*planes, *network), strict=True)
    ]


@_decode_gradient_op.register_fake
def _(grad, planes, network, precision):
    return [x.new_empty(x.shape) for x in (*planes, *network)]


def _decode_setup(ctx, inputs, output):
    planes, network, ctx.precision = inputs
    ctx.save_for_backward(*planes, *network)


def _decode_autograd(ctx, grad):
    planes, network = ctx.saved_tensors[:-4], ctx.saved_tensors[-4:]
    found = _decode_gradient_op(grad, [*planes], [*network], ctx.precision)
    return found[:-4], found[-4:], None


_decode_op.register_autograd(_decode_autograd, setup_context=_decode_setup)


# -----------------------------------------------------------------------------------------------
# For CPUs


class _Rows(torch.autograd.Function):
    """What `naive.decode` says, row by row."""

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
                first = activation(x)
                y = torch.addmm(b1, first, w1.T)
                second = activation(y)
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
                by_y = activation_backward(by_node @ w2, y)
                by_w1.addmm_(by_y.T, first)
                by_b1 += by_y.sum(0)
                by_x = activation_backward(by_y @ w1, x)
                if lifted is not None:
                    by_mix.addmm_(by_x.T, lifted[item, row].flatten(0, 1))
                    torch.mm(by_x, mix, out=by_lifted[item, row].flatten(0, 1))
                by_x = by_x.view_as(wz[item])
                by_wz[item] += by_x
                torch.sum(by_x, 1, out=by_hw[item, row])
                torch.sum(by_x, 0, out=by_hz[item, row])
        return by_hw, by_hz, by_wz, by_lifted, by_mix, by_w1, by_b1, by_w2, by_b2


# -----------------------------------------------------------------------------------------------


@plainly_exported
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
    [B, H, W, Z, L] is added to the features. Sums are in float32.

    Triton gives float32, in rows that are padded to a multiple of four channels. It multiplies in
    TF32 where `torch.backends.cuda.matmul.allow_tf32`, else in three products of TF32, Triton's way
    to nearly float32 (on AMD's in float32); under autocast to bfloat16 all but W2 in that, since an
    SDF of 10 m would be rounded to 6 cm. Elsewhere autocast is of no effect, and large volumes are
    decoded in slabs along H, which backward computes again.
    Raises ValueError naming the argument at fault.
    """
    w1, b1, w2, b2 = network
    check(
        hw=(hw, "B H W D"), zh=(zh, "B Z H D"), wz=(wz, "B W Z D"), w1=(w1, "E D"), b1=(b1, "E"),
        w2=(w2, "C E"), b2=(b2, "C"), lifted=(lifted, "B H W Z L"), mix=(mix, "D L"),
    )  # fmt: skip
    if (lifted is None) != (mix is None):
        raise ValueError("mix must be given with lifted, and only then")
    batch, height, width, dim = hw.shape
    if use_triton(hw):
        planes = [hw, zh, wz] if lifted is None else [hw, zh, wz, lifted, mix]
        half = torch.bfloat16 in (autocast_type(hw), w1.dtype)
        return _decode_op(planes, [*network], "bf16" if half else _exactness())

    def run(*tensors: Tensor | None) -> Tensor:
        with torch.autocast(hw.device.type, enabled=False):
            return _Rows.apply(*(None if x is None else at_least_float32(x) for x in tensors))

    slabs = math.ceil(batch * height * width * zh.shape[1] * dim / SLAB)
    if slabs > 1 and torch.is_grad_enabled():
        # nothing in it is random, and the state of a GPU's generator is slow to fetch
        run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
    step, hz, parts = math.ceil(height / max(1, slabs)), zh.transpose(1, 2), []
    for first in range(0, height, step):
        rows = slice(first, first + step)
        here = None if lifted is None else lifted[:, rows]
        parts.append(run(hw[:, rows], hz[:, rows], wz, here, mix, *network))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
