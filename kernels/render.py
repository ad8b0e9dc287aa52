"""Rendering a volume along rays: samples, alpha, compositing (paper section 3; Wang et al. 2021).

For sample i of a ray o + t e, whose interval starts at t_i and has the length delta_i:

    s, g, f = SDF, its gradient by node differences, features: trilinear at
              o + (t_i + read delta_i) e
    alpha_i = NeuS(s, e . g, delta_i), or another function of `ALPHAS`
    T_i     = prod_{j<i} (1 - alpha_j + 1e-4),  w_i = alpha_i T_i where T_i > stop_below
    out     = sum_i w_i value_i

`render_photometric` also compares every sample on its way with images: it is
`render_rays` followed by `epipolar_photometric`, whose proposals are the samples' middles t_i +
delta_i / 2, but no weight is written.

The reference is in `render_cpu`, the kernels in `render_triton`, their pieces in `ray` and in
`alpha`. SDF and gradient are first written for every node, four numbers in a row, so that a sample
reads eight rows of 16 bytes for them; features are read where the volume has them.

A warp walks one ray, one sample a lane, or where there are rays enough for every warp of the GPU,
one ray a lane, whose neighbours then read the same nodes. It ends where no light is left. Forward
leaves T at the first sample of every tile. Backward walks from the last tile to the first, computes
the samples again, and scatters gradients into rows like those read, which a last kernel folds into
the SDF's.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.alpha import ALPHAS, Knobs
from kernels.checks import at_least_float32, check
from kernels.composite import EPSILON
from kernels.dispatch import launch, triton, use_triton
from kernels.node_losses import node_table, node_table_adjoint
from kernels.proposals import epipolar_photometric, scene_of, shapes_of_views
from kernels.ray import LANES, Grid, Intervals, Rays, Strides
from kernels.render_cpu import Box, Options, node_spacing, render_reference
from kernels.render_triton import (
    Added,
    Field,
    Gradients,
    Results,
    render_backward,
    render_forward,
)

# A warp needs no barriers, and KITTI's 10,450 rays are three times the warps that 132 processors
# hold.
WARPS = 1
# Channels x samples at once, four numbers a lane: KITTI's four channels lie within one; of the 25
# of nuScenes four samples are taken at once. Twice as many take 30 % more registers.
FEATURES = 128
# Rays from which on each gets a lane: 4,096 warps, more than 132 processors hold. It saves what
# lanes exchange, and neighbours share cache lines.
MANY = 1 << 17
# Registers of the deterministic backward with images, of integers in rows that lie across lanes,
# and of floats in rows that do not; left alone, ptxas spills up to 40 bytes.
REGISTERS_SCENE, REGISTERS_FIXED, REGISTERS_FLOAT = 200, 136, 104


@dataclass
class Rendering:
    """What rays see. Distances are metres along the ray; what was not asked for is None."""

    distance: Tensor  # [B, R] expected distance, sum w t_mid / (sum w + 1e-10)
    opacity: Tensor  # [B, R] sum of the weights
    color: Tensor  # [B, R, colours] composited foreground, no background
    semantics: Tensor | None = None  # [B, R, classes] composited softmax
    weights: Tensor | None = None  # [B, R, S]
    mids: Tensor | None = None  # [B, R, S] distance of the interval middles, the depth proposals
    deltas: Tensor | None = None  # [B, R, S] interval lengths
    sdf: Tensor | None = None  # [B, R, S]
    eikonal: Tensor | None = None  # [B, R] sum over the samples of (|gradient| - 1)^2


# -----------------------------------------------------------------------------------------------
# Launches. rays: origins, directions, near, far, and jitter where there is one; scene: stretch,
# pixels, target, sources, projections, or nothing.


_SCHEMA = (
    "Tensor volume, Tensor inv_s, Tensor[] rays, Tensor[] scene, float[] box, int samples, "
    "float[] knobs, str alpha, int classes, bool backdrop, float stop_below, bool keep_samples, "
    "bool combine, bool published_pixels, float bend, float read"
)


def _results(volume: Tensor, rays: list[Tensor], scene: list[Tensor], options: Options) -> Results:
    """Not yet filled; those not asked for have no elements."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return volume.new_empty(shape, dtype=dtype)

    lines, views = rays[2].shape, (0,)
    if scene:
        batch, cameras, count, _ = scene[2].shape
        views = (batch, 1 if options.combine else scene[3].shape[1], cameras, count)
    summed = lines if scene or options.keep_samples else (0,)
    kept = (*lines, options.samples) if options.keep_samples else (0,)
    return Results(
        distance=new(*lines),
        opacity=new(*lines),
        sums=new(*lines, volume.shape[1] - 1),
        light=new(*lines, -(-options.samples // LANES)).zero_(),
        eikonal=new(*summed),
        weights=new(*kept),
        mids=new(*kept),
        deltas=new(*kept),
        sdf=new(*kept),
        l1=new(*views),
        color=new(*views, 3),
        valid=new(*views, dtype=torch.bool),
        total=new(*views),
    )


def _walk(
    volume: Tensor, inv_s: Tensor, rays: list[Tensor], scene: list[Tensor], options: Options
) -> tuple[tuple[int, int, int], dict[str, object]]:
    """A program a ray, and what both kernels are told."""
    batch, channels, *nodes = volume.shape
    height, width, depth = nodes
    item, c, y, x, z = volume.stride()
    spacing = node_spacing(options.box, nodes)
    cameras, count, views, sources = 1, rays[2].shape[1], None, 1
    if scene:
        _, cameras, count, _ = scene[2].shape
        views = scene_of(*scene[1:], options.published_pixels)
        sources = views.shape[0]
    wide = triton.next_power_of_2(channels)
    arguments = dict(
        # Triton 3.6 hands no tuple on that holds None: what is not looked at is any tensor
        rays=Rays(*(x.contiguous() for x in (*rays, rays[-1])[:5])),
        field=Field(volume, node_table(volume, spacing), inv_s, (*scene, inv_s)[0].contiguous()),
        scene=views,
        count=count,
        samples=options.samples,
        low=tuple(options.box[:3]),
        scale=tuple(1 / step for step in spacing),
        knobs=Knobs(*options.knobs),
        stop_below=options.stop_below,
        GRID=Grid(height, width, depth, channels - 1 - options.classes, options.classes, wide),
        VOLUME=Strides(item, y, x, z, c),
        TABLE=_strides(nodes, 4),
        ALPHA=ALPHAS[options.alpha].value,
        INTERVALS=Intervals(len(rays) == 5, options.bend, options.read),
        BACKDROP=options.backdrop,
        COMBINE=options.combine,
        SOURCES=triton.next_power_of_2(sources),
        BLOCK=LANES,
        FEW=min(LANES, max(1, FEATURES // wide)),
    )
    return (count, cameras, batch), arguments


def _strides(nodes: list[int], channels: int) -> Strides:
    """Of rows of channels, node by node."""
    height, width, depth = nodes
    row = depth * channels
    return Strides(height * width * row, width * row, row, channels, 1)


def _given(tensors) -> list[Tensor | None]:
    """What was not asked for has no elements, and a gradient without them."""
    return [None if x is None or x.numel() == 0 else x.contiguous() for x in tensors]


def _forward(
    volume: Tensor, inv_s: Tensor, rays: list[Tensor], scene: list[Tensor], options: Options
) -> Results:
    out = _results(volume, rays, scene, options)
    (count, *others), arguments = _walk(volume, inv_s, rays, scene, options)
    lanes = 1
    if not scene and rays[2].numel() >= MANY and arguments["GRID"].channels <= FEATURES // LANES:
        lanes = LANES
        arguments |= dict(BLOCK=1, FEW=1)
    launch(
        render_forward,
        (triton.cdiv(count, lanes), *others),
        **arguments,
        out=Results(*_given(out)),
        spent=options.stop_below / (1 + EPSILON) ** options.samples,
        RAYS=lanes,
        STEP=LANES,
        warps=WARPS,
    )
    return out


def _backward(
    grads: list[Tensor | None],
    saved: list[Tensor],
    volume: Tensor,
    inv_s: Tensor,
    rays: list[Tensor],
    scene: list[Tensor],
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Gradients of volume and inv_s, float32, given `Gradients`; saved: distance, opacity, light,
    l1, color, total.
    """
    distance, opacity, light, l1, color, total = saved
    always = dict(distance=distance, opacity=opacity) | (dict(l1=l1, color=color) if scene else {})
    grads = Gradients(*_given(grads))
    grads = grads._replace(
        **{k: torch.zeros_like(x) for k, x in always.items() if getattr(grads, k) is None}
    )
    programs, arguments = _walk(volume, inv_s, rays, scene, options)
    batch, channels, *nodes = volume.shape
    by_ray = torch.empty_like(saved[0])
    magnitudes = by_ray.new_empty(*by_ray.shape, 2)

    def walk(scatter: str, dtype: torch.dtype, units: Tensor) -> list[Tensor]:
        registers = REGISTERS_SCENE if scene and scatter != "float" else None
        if not scene and (arguments["FEW"] < LANES) == (scatter == "fixed"):
            registers = REGISTERS_FIXED if scatter == "fixed" else REGISTERS_FLOAT
        shapes = (batch, *nodes, channels), (batch, *nodes, 4)
        into = [volume.new_zeros(shape, dtype=dtype) for shape in shapes]
        launch(
            render_backward,
            programs,
            **arguments,
            grads=grads,
            out=Results(distance, opacity, light=light, l1=l1, color=color, total=total),
            into=Added(*into, by_ray, magnitudes, units),
            ADDED=_strides(nodes, channels),
            SLOPES=ALPHAS[options.alpha].slopes,
            SCATTER=scatter,
            warps=WARPS,
            registers=registers,
        )
        return into

    if torch.are_deterministic_algorithms_enabled():
        walk("measure", torch.float32, magnitudes)
        # no sum exceeds that of all magnitudes, hence none overflows; NaN makes everything NaN
        units = 2.0**61 / magnitudes.flatten(0, 1).double().sum(0).clamp_min(1e-50)
        by_volume, by_table = walk("fixed", torch.int64, units)
        by_volume, by_table = (by_volume / units[1]).float(), (by_table / units[0]).float()
    else:
        by_volume, by_table = walk("float", torch.float32, magnitudes)
    by_volume = by_volume.permute(0, 4, 1, 2, 3)
    node_table_adjoint(by_table, node_spacing(options.box, nodes), by_volume)
    return by_volume, by_ray.sum()


# -----------------------------------------------------------------------------------------------
# Operators


def _render(volume, inv_s, rays, scene, *options):
    return tuple(_forward(volume, inv_s, rays, scene, Options(*options)))


def _render_gradient(grads, saved, volume, inv_s, rays, scene, *options):
    return _backward(grads, saved, volume, inv_s, rays, scene, Options(*options))


_op = torch.library.custom_op(
    "selfocc::render",
    _render,
    mutates_args=(),
    schema=f"({_SCHEMA}) -> ({', '.join(['Tensor'] * len(Results._fields))})",
)
_gradient_op = torch.library.custom_op(
    "selfocc::render_gradient",
    _render_gradient,
    mutates_args=(),
    schema=f"(Tensor?[] grads, Tensor[] saved, {_SCHEMA}) -> (Tensor, Tensor)",
)


@_op.register_fake
def _(volume, inv_s, rays, scene, *options):
    return tuple(_results(volume, rays, scene, Options(*options)))


@_gradient_op.register_fake
def _(grads, saved, volume, *_):
    batch, channels, *nodes = volume.shape
    by_volume = volume.new_empty(batch, *nodes, channels, dtype=torch.float32)
    return by_volume.permute(0, 4, 1, 2, 3), by_volume.new_empty(())


def _setup(ctx, inputs, output):
    volume, inv_s, rays, scene, *ctx.options = inputs
    out, ctx.count = Results(*output), len(rays)
    ctx.mark_non_differentiable(out.light, out.mids, out.deltas, out.valid, out.total)
    ctx.set_materialize_grads(False)  # those of samples would be large
    saved = out.distance, out.opacity, out.light, out.l1, out.color, out.total
    ctx.save_for_backward(*saved, volume, inv_s, *rays, *scene)


def _autograd(ctx, *grads):
    *saved, volume, inv_s = ctx.saved_tensors[:8]
    read = ctx.saved_tensors[8:]
    rays, scene = [*read[: ctx.count]], [*read[ctx.count :]]
    grads = Results(*grads)
    grads = [getattr(grads, name) for name in Gradients._fields]
    by_volume, by_inv_s = _gradient_op(grads, saved, volume, inv_s, rays, scene, *ctx.options)
    constant = [None] * len(rays), [None] * len(scene), *[None] * len(ctx.options)
    return by_volume.to(volume.dtype), by_inv_s.to(inv_s.dtype), *constant


_op.register_autograd(_autograd, setup_context=_setup)


# -----------------------------------------------------------------------------------------------
# Public functions. Below, rays and scene are tensors by their names.


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
    alpha: str = "neus",
    classes: int = 0,
    backdrop: bool = False,
    bend: float = 0.0,
    read: float = 0.0,
    keep_samples: bool = False,
    stop_below: float = 0.0,
    **knobs: float,
) -> Rendering:
    """Composite a volume along rays (paper section 3; Wang et al. 2021, eq. 11).

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
        alpha: a name in `ALPHAS`.
        backdrop: the last interval is opaque: what nothing stops is seen at the far end.
        bend: intervals grow evenly from 1 - bend times their mean length to 1 + bend times.
        read: where in its interval the volume is read, 0 at its start, 1 at its end.
        keep_samples: also return weights, mids, deltas, sdf and the eikonal sums.
        stop_below: samples that less transmittance than this or just as much reaches weigh nothing,
            so that kernels may end there; 1e-4 changes a distance by no more than 1e-4 of the ray.
        knobs: what alphas take besides, the fields of `alpha.Knobs`, such as anneal=0.3.

    Raises ValueError naming the argument at fault.
    """
    rays = _named(origins=origins, directions=directions, near=near, far=far, jitter=jitter)
    options = _options(box, knobs, samples, alpha, classes, backdrop, bend, read)
    options = options._replace(stop_below=float(stop_below), keep_samples=keep_samples)
    if _checked(volume, inv_s, rays, {}, options):
        return _rendering(_op(volume, inv_s.reshape(()), [*rays.values()], [], *options), options)
    return _reference(volume, inv_s, rays, options)


def render_photometric(
    volume: Tensor,
    origins: Tensor,
    directions: Tensor,
    near: Tensor,
    far: Tensor,
    inv_s: Tensor,
    stretch: Tensor,
    pixels: Tensor,
    target: Tensor,
    sources: Tensor,
    projections: Tensor,
    *,
    box: Box,
    samples: int,
    jitter: Tensor | None = None,
    alpha: str = "neus",
    classes: int = 0,
    backdrop: bool = False,
    bend: float = 0.0,
    read: float = 0.0,
    combine: bool = False,
    published_pixels: bool = False,
    **knobs: float,
) -> tuple[Rendering, Tensor, Tensor, Tensor]:
    """`render_rays` and `epipolar_photometric` of its samples at once, of N cameras with R rays.

    Differentiable in volume and inv_s. Half precision is read as float32, and so are results.

    Args:
        volume, inv_s, box, samples, alpha, classes, backdrop, bend, read, knobs:
            as in `render_rays`.
        origins, directions, near, far, jitter: as there, of N R rays, camera by camera.
        stretch: [B, N R] metres along a ray for a metre of z-depth.
        pixels, target, sources, projections, combine, published_pixels: as in
            `epipolar_photometric`.

    Returns a `Rendering` with distance, opacity, color, semantics and eikonal, and what
    `epipolar_photometric` returns.
    Raises ValueError naming the argument at fault.
    """
    rays = _named(origins=origins, directions=directions, near=near, far=far, jitter=jitter)
    scene = dict(stretch=stretch, pixels=pixels, target=target)
    scene |= dict(sources=sources, projections=projections)
    options = _options(box, knobs, samples, alpha, classes, backdrop, bend, read)
    options = options._replace(combine=combine, published_pixels=published_pixels)
    if _checked(volume, inv_s, rays, scene, options):
        given = [*rays.values()], [*scene.values()]
        out = Results(*_op(volume, inv_s.reshape(()), *given, *options))
        return _rendering(out, options), out.l1, out.color, out.valid
    seen = _reference(volume, inv_s, rays, options._replace(keep_samples=True))
    proposals = seen.weights, seen.mids / at_least_float32(stretch)[..., None]
    compared = epipolar_photometric(
        *(x.unflatten(1, target.shape[1:3]) for x in proposals),
        pixels,
        target,
        sources,
        projections,
        combine=combine,
        published_pixels=published_pixels,
    )
    return replace(seen, weights=None, mids=None, deltas=None, sdf=None), *compared


def _named(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _options(box, knobs, samples, alpha, classes, backdrop, bend, read) -> Options:
    numbers = [float(x) for x in box], samples, [float(x) for x in Knobs(**knobs)]
    return Options(*numbers, alpha, classes, backdrop, bend=float(bend), read=float(read))


def _checked(
    volume: Tensor,
    inv_s: Tensor,
    rays: dict[str, Tensor],
    scene: dict[str, Tensor],
    options: Options,
) -> bool:
    """Raises ValueError naming the argument at fault; whether Triton renders these."""
    known, views = {}, {}
    if scene:
        stretch, *images = scene.values()
        known["L"] = math.prod(scene["target"].shape[1:3])  # all rays of an item
        views = shapes_of_views(*images) | dict(stretch=(stretch, "B L"))
    wide = ("origins", "directions")
    lines = {name: (x, "B L 3" if name in wide else "B L") for name, x in rays.items()}
    volumes = dict(volume=(volume, "B C H>=2 W>=2 Z>=2"), inv_s=(inv_s.reshape(-1), "1"))
    check(known, **volumes, **views, **lines)
    channels, *nodes = volume.shape[1:]
    classes, samples, alpha = options.classes, options.samples, options.alpha
    if not 0 <= classes < channels:
        raise ValueError(f"classes is {classes}, but the volume has {channels} channels")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if alpha not in ALPHAS:
        raise ValueError(f"alpha must be one of {', '.join(ALPHAS)}, got {alpha!r}")
    if not 0 <= options.stop_below < 1:
        raise ValueError(f"stop_below must be in [0, 1), got {options.stop_below}")
    for name in ("bend", "read"):
        if not 0 <= getattr(options, name) <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {getattr(options, name)}")
    # projections are read as float64 in any case
    read = [volume, inv_s, *rays.values(), *(x for n, x in scene.items() if n != "projections")]
    if not all(map(use_triton, read)):
        return False
    if max(channels, 4) * math.prod(nodes) >= 2**31:  # offsets are int32
        raise ValueError(f"volume has 2^31 numbers an item or more: {[*volume.shape]}")
    return True


def _rendering(out: Results, options: Options) -> Rendering:
    out = Results(*out)
    classes = options.classes
    color, semantics = out.sums.split([out.sums.shape[-1] - classes, classes], dim=-1)
    kept = dict(weights=out.weights, mids=out.mids, deltas=out.deltas, sdf=out.sdf)
    return Rendering(
        out.distance,
        out.opacity,
        color,
        semantics=semantics if classes else None,
        eikonal=out.eikonal if out.eikonal.ndim > 1 else None,
        **(kept if options.keep_samples else {}),
    )


def _reference(
    volume: Tensor, inv_s: Tensor, rays: dict[str, Tensor], options: Options
) -> Rendering:
    lines = [*rays.values()]
    return Rendering(
        **render_reference(at_least_float32(volume), inv_s.reshape(()), lines, options)
    )
