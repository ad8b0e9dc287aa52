"""Rendering a volume along rays: samples, alpha, compositing (spec sections 6, 8 and 9).

For sample i of a ray o + t e, taken at the start t_i of its interval of length delta_i:

    s, g, f = SDF, its gradient by node differences, features: trilinear at o + t_i e
    alpha_i = NeuS(s, e . g, delta_i), or another function of `ALPHAS`
    T_i     = prod_{j<i} (1 - alpha_j + 1e-4),  w_i = alpha_i T_i where T_i > stop_below
    out     = sum_i w_i value_i

The reference is in `render_cpu`, the kernels in `render_triton`, their pieces in `ray` and in
`alpha`. SDF and gradient are first written for every node, four numbers in a row, so that a sample
reads eight rows of 16 bytes for them; features are read where the volume has them.

A warp walks one ray, one sample a lane, or where there are rays enough for every warp of the GPU,
one ray a lane, whose neighbours then read the same nodes. It ends where no light is left. Forward
leaves T at every 32nd sample. Backward walks from the last sample to the first, computes the others
again, and scatters gradients into rows like those read, which a last kernel folds into the SDF's.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.alpha import ALPHAS
from kernels.composite import EPSILON
from kernels.dispatch import launch, triton, use_triton
from kernels.node_losses import node_table, node_table_adjoint
from kernels.ray import BLOCK, LANES
from kernels.render_cpu import Box, node_spacing, render_reference
from kernels.render_triton import render_backward, render_forward

# A warp needs no barriers, and KITTI's 10,450 rays are three times the warps that 132 processors
# hold. Compiled for cuda 90, its loop takes 312 instructions for 32 samples forward (78 registers)
# and 551 backward (96); 16 of them load 16 bytes a lane and, backward, 16 add as many by atomics.
WARPS = 1
# Channels x samples at once, four numbers a lane: KITTI's four channels lie within one; of the 25
# of nuScenes four samples are taken at once, in 80 and 138 registers (256: 111, 204; 1024 spills).
FEATURES = 128
# Rays from which on each gets a lane: 4,096 warps, more than 132 processors hold. It saves what
# lanes exchange (260 instructions for 32 samples) and neighbours share cache lines. Never timed.
MANY = 1 << 17


@dataclass
class Rendering:
    """What rays see. Distances are metres along the ray; what was not asked for is None."""

    distance: Tensor  # [B, R] expected distance, sum w t_mid / (sum w + 1e-10)
    opacity: Tensor  # [B, R] sum of the weights
    color: Tensor  # [B, R, colours] composited foreground, no background
    semantics: Tensor | None = None  # [B, R, classes] composited softmax
    normal: Tensor | None = None  # [B, R, 3] unit
    weights: Tensor | None = None  # [B, R, S]
    mids: Tensor | None = None  # [B, R, S] distance of the interval middles, the depth proposals
    deltas: Tensor | None = None  # [B, R, S] interval lengths
    sdf: Tensor | None = None  # [B, R, S]
    eikonal: Tensor | None = None  # [B, R] sum over the samples of (|gradient| - 1)^2


# -----------------------------------------------------------------------------------------------
# Launches


def _common(volume: Tensor, box, samples: int, classes: int) -> tuple[tuple, dict[str, object]]:
    """What both kernels are told of the volume: places in the box, and constants."""
    _, channels, *nodes = volume.shape
    height, width, depth = nodes
    item, c, y, x, z = volume.stride()
    places = (*box[:3], *(1 / step for step in node_spacing(box, nodes)))
    constants = dict(
        HEIGHT=height,
        WIDTH=width,
        DEPTH=depth,
        ITEM=item,
        Y=y,
        X=x,
        Z=z,
        C=c,
        COLORS=channels - 1 - classes,
        CLASSES=classes,
        CHANNELS=triton.next_power_of_2(channels),
    )
    return places, constants


def _forward_triton(
    volume: Tensor,
    origins: Tensor,
    directions: Tensor,
    near: Tensor,
    far: Tensor,
    inv_s: Tensor,
    jitter: Tensor | None,
    box: list[float],
    samples: int,
    anneal: float,
    alpha: str,
    classes: int,
    backdrop: bool,
    stop_below: float,
    keep_samples: bool,
    normals: bool,
) -> tuple[Tensor, ...]:
    out = _empty_results(volume, near, samples, classes, keep_samples, normals)
    places, constants = _common(volume, box, samples, classes)
    alone = near.numel() >= MANY and constants["CHANNELS"] <= FEATURES // LANES
    rays, block = (LANES, 1) if alone else (LANES // BLOCK, BLOCK)
    launch(
        render_forward,
        (triton.cdiv(near.numel(), rays),),
        volume,
        node_table(volume, node_spacing(box, volume.shape[2:])),
        *(x.contiguous() for x in (origins, directions, near, far)),
        near if jitter is None else jitter.contiguous(),
        inv_s,
        *out,
        near.numel(),
        near.shape[1],
        samples,
        *places,
        anneal,
        stop_below,
        stop_below / (1 + EPSILON) ** samples,
        warps=WARPS,
        **constants,
        ALPHA=alpha,
        JITTER=jitter is not None,
        BACKDROP=backdrop,
        KEEP=keep_samples,
        NORMALS=normals,
        RAYS=rays,
        BLOCK=block,
        FEW=min(block, max(1, FEATURES // constants["CHANNELS"])),
        STEP=BLOCK,
    )
    return out


def _empty_results(
    volume: Tensor, near: Tensor, samples: int, classes: int, keep_samples: bool, normals: bool
) -> tuple[Tensor, ...]:
    """The fields of `Rendering` in their order, those not asked for without elements, and the
    light at every BLOCKth sample.
    """
    colors = volume.shape[1] - 1 - classes
    kept, points = (samples if keep_samples else 0), (3 if normals else 0)
    widths = (None, None, colors, classes, points, kept, kept, kept, kept)
    shapes = [near.shape if n is None else (*near.shape, n) for n in widths]
    shapes.append(near.shape if keep_samples else (0, 0))
    empty = [near.new_empty(shape, dtype=torch.float32) for shape in shapes]
    blocks = -(-samples // BLOCK)
    return *empty, near.new_zeros(*near.shape, blocks, dtype=torch.float32)


def _backward_triton(
    grads: list[Tensor | None],
    volume: Tensor,
    origins: Tensor,
    directions: Tensor,
    near: Tensor,
    far: Tensor,
    inv_s: Tensor,
    jitter: Tensor | None,
    distance: Tensor,
    opacity: Tensor,
    light: Tensor,
    box: list[float],
    samples: int,
    anneal: float,
    alpha: str,
    classes: int,
    backdrop: bool,
    stop_below: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of volume and inv_s, float32, given those of distance, opacity, color, semantics,
    normal, weights, sdf and eikonal.
    """
    # what was not asked for has no elements, and a gradient without them
    grads = [None if grad is None or grad.numel() == 0 else grad for grad in grads]
    spacing = node_spacing(box, volume.shape[2:])
    features = grads[2] is not None or grads[3] is not None
    widths = ((), (), (volume.shape[1] - 1 - classes,), (classes,))  # of what is always read
    by_distance, by_opacity, by_color, by_semantics = (
        near.new_zeros(*near.shape, *width) if grad is None else grad.contiguous()
        for grad, width in zip(grads, widths, strict=False)
    )
    by_normal, by_weights, by_sdf, by_eikonal = (
        near if grad is None else grad.contiguous() for grad in grads[4:]
    )
    grad_volume = torch.zeros_like(volume, dtype=torch.float32)
    table = node_table(volume, spacing)
    by_ray = torch.empty_like(distance)
    magnitudes = distance.new_empty(*distance.shape, 2)
    rays = [x.contiguous() for x in (origins, directions, near, far)]
    places, constants = _common(volume, box, samples, classes)
    if not features:
        constants |= dict(COLORS=0, CLASSES=0, CHANNELS=1)
    grad_item, grad_c, grad_y, grad_x, grad_z = grad_volume.stride()

    def walk(scatter: str, to_volume: Tensor, to_table: Tensor, scales: Tensor) -> None:
        launch(
            render_backward,
            (near.numel(),),
            by_distance,
            by_opacity,
            by_color,
            by_semantics,
            by_normal,
            by_weights,
            by_sdf,
            by_eikonal,
            volume,
            table,
            *rays,
            near if jitter is None else jitter.contiguous(),
            inv_s,
            distance,
            opacity,
            light,
            to_volume,
            to_table,
            by_ray,
            magnitudes,
            scales,
            near.shape[1],
            samples,
            *places,
            anneal,
            stop_below,
            warps=WARPS,
            **constants,
            GRAD_ITEM=grad_item,
            GRAD_Y=grad_y,
            GRAD_X=grad_x,
            GRAD_Z=grad_z,
            GRAD_C=grad_c,
            ALPHA=alpha,
            JITTER=jitter is not None,
            BACKDROP=backdrop,
            NORMALS=grads[4] is not None,
            HAS_WEIGHTS=grads[5] is not None,
            HAS_SDF=grads[6] is not None,
            HAS_EIKONAL=grads[7] is not None,
            SCATTER=scatter,
            BLOCK=BLOCK,
            FEW=min(BLOCK, max(1, FEATURES // constants["CHANNELS"])),
        )

    if torch.are_deterministic_algorithms_enabled():
        # no sum exceeds that of all magnitudes, hence none overflows; NaN makes everything NaN
        walk("measure", grad_volume, table, near)
        scales = 2.0**61 / magnitudes.flatten(0, 1).double().sum(0).clamp_min(1e-50)
        whole_volume = torch.zeros_like(grad_volume, dtype=torch.int64)
        whole_table = torch.zeros_like(table, dtype=torch.int64)
        walk("fixed", whole_volume, whole_table, scales)
        grad_table = (whole_table.double() / scales[0]).float()
        grad_volume.copy_(whole_volume.double() / scales[1])
    else:
        grad_table = torch.zeros_like(table)
        walk("float", grad_volume, grad_table, near)
    node_table_adjoint(grad_table, spacing, grad_volume)
    return grad_volume, by_ray.sum()


# -----------------------------------------------------------------------------------------------
# The operators


_Results = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]


@torch.library.custom_op("selfocc::render_rays", mutates_args=())
def _render_op(
    volume: Tensor,
    origins: Tensor,
    directions: Tensor,
    near: Tensor,
    far: Tensor,
    inv_s: Tensor,
    jitter: Tensor | None,
    box: list[float],
    samples: int,
    anneal: float,
    alpha: str,
    classes: int,
    backdrop: bool,
    stop_below: float,
    keep_samples: bool,
    normals: bool,
) -> _Results:
    rays = origins, directions, near, far, inv_s, jitter
    options = box, samples, anneal, alpha, classes, backdrop, stop_below
    return _forward_triton(volume, *rays, *options, keep_samples, normals)


@_render_op.register_fake
def _(volume, origins, directions, near, far, inv_s, jitter, box, samples, *options):
    classes, keep_samples, normals = options[2], *options[-2:]
    return _empty_results(volume, near, samples, classes, keep_samples, normals)


@torch.library.custom_op("selfocc::render_rays_gradient", mutates_args=())
def _gradient_op(
    grads: list[Tensor | None],
    volume: Tensor,
    origins: Tensor,
    directions: Tensor,
    near: Tensor,
    far: Tensor,
    inv_s: Tensor,
    jitter: Tensor | None,
    distance: Tensor,
    opacity: Tensor,
    light: Tensor,
    box: list[float],
    samples: int,
    anneal: float,
    alpha: str,
    classes: int,
    backdrop: bool,
    stop_below: float,
) -> tuple[Tensor, Tensor]:
    rays = origins, directions, near, far, inv_s, jitter
    options = box, samples, anneal, alpha, classes, backdrop, stop_below
    return _backward_triton(grads, volume, *rays, distance, opacity, light, *options)


@_gradient_op.register_fake
def _(grads, volume, *_):
    grad_volume = torch.empty_like(volume, dtype=torch.float32)
    return grad_volume, volume.new_empty((), dtype=torch.float32)


def _setup(ctx, inputs, output):
    *rays, ctx.box, ctx.samples, ctx.anneal, ctx.alpha, ctx.classes = inputs[:12]
    ctx.backdrop, ctx.stop_below, _, _ = inputs[12:]
    distance, opacity, *_, mids, deltas, _, _, light = output
    ctx.mark_non_differentiable(mids, deltas, light)
    ctx.set_materialize_grads(False)  # those of samples would be large
    ctx.save_for_backward(*rays, distance, opacity, light)


def _autograd(ctx, *grads):
    saved = ctx.saved_tensors
    distance, opacity, color, semantics, normal, weights, _, _, sdf, eikonal, _ = grads
    given = [distance, opacity, color, semantics, normal, weights, sdf, eikonal]
    options = ctx.box, ctx.samples, ctx.anneal, ctx.alpha, ctx.classes
    by_volume, by_inv_s = _gradient_op(given, *saved, *options, ctx.backdrop, ctx.stop_below)
    volume, inv_s = saved[0], saved[5]
    return by_volume.to(volume.dtype), *[None] * 4, by_inv_s.to(inv_s.dtype), *[None] * 10


_render_op.register_autograd(_autograd, setup_context=_setup)


# -----------------------------------------------------------------------------------------------


def render_rays(
    volume: Tensor,
    origins: Tensor,
    directions: Tensor,
    near: Tensor,
    far: Tensor,
    inv_s: Tensor,
    *,
    box: Box,
    samples: int,
    jitter: Tensor | None = None,
    anneal: float = 1.0,
    alpha: str = "neus",
    classes: int = 0,
    backdrop: bool = False,
    keep_samples: bool = False,
    normals: bool = False,
    stop_below: float = 0.0,
) -> Rendering:
    """Composite a volume along rays (spec sections 6, 8 and 9).

    Differentiable in volume and inv_s. Rays get no gradient: positions, interval lengths and their
    middles are constants. A volume in half precision is read as float32, and so are results.

    Args:
        volume: [B, 1 + colours + classes, H, W, Z] at the nodes of `box`, two or more an axis:
            SDF in metres, colour features, semantic logits. Of any strides; channels that are
            neighbours in memory are read fastest.
        origins, directions: [B, R, 3] in the volume frame, metres; directions are unit.
        near, far: [B, R] distances between which `samples` intervals lie.
        inv_s: 0-d, sharpness of the surface in 1/metre.
        box: x0, y0, z0, x1, y1, z1 in metres.
        jitter: [B, R] in [0, 1), moves all samples of a ray; None leaves the intervals equal. One
            number a ray, so a generator inside the kernel would save nothing.
        anneal: share of the full cosine in NeuS alpha, 0 to 1.
        alpha: a name in `ALPHAS`.
        backdrop: the last interval is opaque: what nothing stops is seen at the far end.
        keep_samples: also return weights, mids, deltas, sdf and the eikonal sums.
        normals: also return composited normals.
        stop_below: samples that less transmittance than this or just as much reaches weigh nothing,
            so that kernels may end there; 1e-4 changes a distance by no more than 1e-4 of the ray.

    Raises ValueError naming the argument at fault.
    """
    rays = near.shape
    if volume.ndim != 5 or min(volume.shape[2:]) < 2:
        raise ValueError(
            f"volume must be [B, C, H, W, Z], two nodes or more an axis, got {[*volume.shape]}"
        )
    if not 0 <= classes < volume.shape[1]:
        raise ValueError(f"classes is {classes}, but the volume has {volume.shape[1]} channels")
    if near.ndim != 2 or near.shape[0] != volume.shape[0]:
        raise ValueError(f"near must be [{volume.shape[0]}, R], got {[*rays]}")
    expected = {
        "origins": (origins, (*rays, 3)),
        "directions": (directions, (*rays, 3)),
        "far": (far, rays),
    }
    if jitter is not None:
        expected["jitter"] = (jitter, rays)
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {[*shape]}, got {[*tensor.shape]}")
    if inv_s.numel() != 1:
        raise ValueError(f"inv_s must hold one number, got {[*inv_s.shape]}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if alpha not in ALPHAS:
        raise ValueError(f"alpha must be one of {', '.join(ALPHAS)}, got {alpha!r}")
    if not 0 <= stop_below < 1:
        raise ValueError(f"stop_below must be in [0, 1), got {stop_below}")

    lines = origins, directions, near, far, inv_s.reshape(()), jitter
    if use_triton(volume):
        if max(volume.shape[1], 4) * math.prod(volume.shape[2:]) >= 2**31:  # offsets are int32
            raise ValueError(f"volume has 2^31 numbers an item or more: {[*volume.shape]}")
        common = [float(x) for x in box], samples, float(anneal), alpha, classes, backdrop
        out = _render_op(volume, *lines, *common, float(stop_below), keep_samples, normals)
        found = dict(zip(Rendering.__dataclass_fields__, out, strict=False))
        unasked = [] if classes else ["semantics"]
        unasked += [] if normals else ["normal"]
        unasked += [] if keep_samples else ["weights", "mids", "deltas", "sdf", "eikonal"]
        found |= dict.fromkeys(unasked)
    else:
        found = render_reference(
            volume.float() if volume.dtype in (torch.float16, torch.bfloat16) else volume,
            *lines,
            box=box,
            samples=samples,
            anneal=anneal,
            alpha=alpha,
            classes=classes,
            backdrop=backdrop,
            keep_samples=keep_samples,
            normals=normals,
            stop_below=stop_below,
        )
    if normals:
        found["normal"] = F.normalize(found["normal"], dim=-1)
    return Rendering(**found)
