"""What the benchmark runs: every public kernel at published sizes, and the bytes it must move.

A case is one function below, decorated; nothing else needs to know of a new one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import kernels
from kernels.bench.scenes import (
    SIZES,
    Draw,
    Size,
    cross_view_references,
    projections_of,
    rays_of,
    road,
    seen_queries,
)


@dataclass(frozen=True)
class Case:
    """One kernel on one kind of input."""

    kernel: str  # the public function
    variant: str
    size: str
    inputs: Callable[[Draw], dict[str, Tensor]]
    call: Callable[..., tuple[Tensor, ...]]  # takes the inputs by name
    wanted: tuple[str, ...]  # inputs that get a gradient
    moved: Callable[[dict[str, Tensor]], tuple[int, int]]  # bytes forward, backward
    timed: bool = True  # what differs from another case in its arithmetic alone is not

    @property
    def name(self) -> str:
        return f"{self.kernel}{' ' * bool(self.variant)}{self.variant}, {self.size}"

    @property
    def labels(self) -> dict[str, str]:
        return dict(kernel=self.kernel, variant=self.variant, size=self.size)


_MAKERS: list[Callable[[Size], Case]] = []


def cases(sizes: list[str], kernel: str | None = None) -> list[Case]:
    """The cases of the named sizes, of one public function or of all."""
    everything = [make(SIZES[size]) for make in _MAKERS for size in sizes]
    return [case for case in everything if kernel in (None, case.kernel)]


def _case(make: Callable[[Size], Case]) -> Callable[[Size], Case]:
    _MAKERS.append(make)
    return make


# -----------------------------------------------------------------------------------------------
# Bytes that must move, each once: forward, backward. e bytes an element; what scatters is added in
# float32 and therefore read and written at four bytes.


def deformable_bytes(
    maps: int, tokens: int, queries: int, heads: int, width: int, samples: int, e: int = 4
) -> tuple[int, int]:
    """samples: levels x points. Offsets and logits are 3 numbers a sample, read once a query."""
    values, outputs = maps * tokens * width, queries * width
    forward = e * heads * (values + 3 * queries * samples + outputs)
    backward = e * heads * (values + 6 * queries * samples + outputs) + 2 * 4 * heads * values
    return forward, backward


def rendering_bytes(
    nodes: int, features: int, rays: int, samples: int, kept: int, e: int = 4
) -> tuple[int, int]:
    """nodes of 1 + features channels; a ray is eight numbers; `kept` outputs a sample."""
    read = e * (nodes * (1 + features) + rays * (features + 8))
    return read + e * rays * samples * kept, read + 2 * 4 * nodes * (1 + features)


def composite_bytes(rays: int, samples: int, values: int, e: int = 4) -> tuple[int, int]:
    """Reads alpha and values, writes weights and sums; backward reads both, writes gradients."""
    inputs = rays * samples * (1 + values)
    outputs = rays * (samples + 1 + values)
    return e * (inputs + outputs), e * (2 * inputs + outputs)


def similarity_bytes(pixels: int, channels: int, e: int = 4) -> tuple[int, int]:
    return e * pixels * (2 * channels + 1), e * pixels * (3 * channels + 1)


def least_bytes(sources: int, identities: int, rays: int, e: int = 4) -> tuple[int, int]:
    """Colour, L1 and validity a source, colours of target and identities, one error; and back."""
    forward = rays * (sources * (4 * e + 1) + 3 * e * (1 + identities) + e)
    return forward, forward + rays * sources * 4 * e


def proposal_bytes(
    frames: int, pixels: int, rays: int, samples: int, e: int = 4
) -> tuple[int, int]:
    """frames: all source images; a proposal has a weight and a depth."""
    forward = e * (3 * frames * pixels + rays * samples * 2 + rays)
    return forward, forward + e * rays * samples


def node_bytes(nodes: int, e: int = 4) -> tuple[int, int]:
    """Reads the volume, or in backward reads it and writes its gradient."""
    return e * nodes, 2 * e * nodes


def decoding_bytes(planes: int, nodes: int, channels: int, e: int = 4) -> tuple[int, int]:
    """planes: features of them; nodes of so many channels. Backward reads both, and writes the
    gradient of the planes.
    """
    forward = e * planes + 4 * nodes * channels
    return forward, forward + 4 * planes


# -----------------------------------------------------------------------------------------------
# Planes to volume


@_case
def _decode(size: Size) -> Case:
    dim, hidden, channels = math.prod(size.heads), size.hidden, 4 + size.classes

    def inputs(draw: Draw) -> dict[str, Tensor]:
        hw, zh, wz = (draw.normal(1, *shape, dim) for shape in size.planes)
        network = [(hidden, dim), (hidden,), (channels, hidden), (channels,)]
        w1, b1, w2, b2 = (draw.normal(*shape) / math.sqrt(shape[-1]) for shape in network)
        return dict(hw=hw, zh=zh, wz=wz, w1=w1, b1=b1, w2=w2, b2=b2)

    def call(hw, zh, wz, **network: Tensor) -> tuple[Tensor, ...]:
        return (kernels.decode(hw, zh, wz, tuple(network.values())),)

    def moved(x: dict[str, Tensor]) -> tuple[int, int]:
        planes = sum(x[name].numel() for name in ("hw", "zh", "wz"))
        return decoding_bytes(planes, math.prod(size.nodes), channels, x["hw"].element_size())

    names = ("hw", "zh", "wz", "w1", "b1", "w2", "b2")
    return Case("decode", "", size.name, inputs, call, names, moved)


# -----------------------------------------------------------------------------------------------
# Deformable sampling


@_case
def _self_attention(size: Size) -> Case:
    (heads, width), points = size.heads, size.points_self
    tokens = sum(h * w for h, w in size.planes)
    counts = 1, tokens, tokens, heads, width, 3 * points

    def inputs(draw: Draw) -> dict[str, Tensor]:
        return dict(
            value=draw.normal(1, tokens, heads, width),
            reference_points=draw.put(cross_view_references(size)),
            offsets=4 * draw.normal(1, tokens, heads, 3, points, 2),
            logits=draw.normal(1, tokens, heads, 3 * points),
        )

    return Case(
        "deformable_sampling",
        "self-attention",
        size.name,
        inputs,
        lambda **x: (kernels.deformable_sampling(level_shapes=size.planes, **x),),
        ("value", "offsets", "logits"),
        lambda x: deformable_bytes(*counts, x["value"].element_size()),
    )


def _cross_attention(plane: int, name: str) -> Callable[[Size], Case]:
    def make(size: Size) -> Case:
        (heads, width), points = size.heads, size.points_cross[plane]
        maps, tokens = len(size.headings), sum(h * w for h, w in size.levels)
        queries = math.prod(size.planes[plane])

        def inputs(draw: Draw) -> dict[str, Tensor]:
            references, seen = seen_queries(size, plane)
            return dict(
                value=draw.normal(maps, tokens, heads, width),
                reference_points=draw.put(references),
                offsets=4 * draw.normal(1, queries, heads, 4, points, 2),
                logits=draw.normal(1, queries, heads, 4 * points),
                seen=draw.put(seen),
            )

        def moved(x: dict[str, Tensor]) -> tuple[int, int]:
            seen = int(seen_queries(size, plane)[1].any(1).sum())
            e = x["value"].element_size()
            return deformable_bytes(maps, tokens, seen, heads, width, 4 * points, e)

        return Case(
            "deformable_sampling",
            f"images to {name}",
            size.name,
            inputs,
            lambda **x: (kernels.deformable_sampling(level_shapes=size.levels, **x),),
            ("value", "offsets", "logits"),
            moved,
        )

    return make


for _plane, _name in enumerate(("hw", "zh", "wz")):
    _case(_cross_attention(_plane, _name))


# -----------------------------------------------------------------------------------------------
# Rendering


def _ray_inputs(size: Size, draw: Draw) -> dict[str, Tensor]:
    lines = {name: rays_of(size)[name] for name in ("origins", "directions", "near", "far")}
    return dict(
        volume=road(size, draw),
        inv_s=draw.put(torch.tensor(5.0)),
        jitter=draw.uniform(1, size.ray_count),
        **{name: draw.put(line) for name, line in lines.items()},
    )


def _render(variant: str, alpha: str, keep_samples: bool) -> Callable[[Size], Case]:
    def make(size: Size) -> Case:
        def call(**x: Tensor) -> tuple[Tensor, ...]:
            options = dict(box=size.box, samples=size.samples, classes=size.classes)
            out = kernels.render_rays(**x, **options, alpha=alpha, keep_samples=keep_samples)
            kept = (out.weights, out.mids, out.sdf, out.eikonal)
            results = (out.distance, out.opacity, out.color, out.semantics, *kept)
            return tuple(result for result in results if result is not None)

        def moved(x: dict[str, Tensor]) -> tuple[int, int]:
            kept = 4 if keep_samples else 0  # weights, mids, deltas, sdf
            shape = math.prod(size.nodes), 3 + size.classes, size.ray_count, size.samples
            return rendering_bytes(*shape, kept, x["volume"].element_size())

        inputs, wanted, timed = partial(_ray_inputs, size), ("volume", "inv_s"), alpha == "neus"
        return Case("render_rays", variant, size.name, inputs, call, wanted, moved, timed)

    return make


for _arguments in (
    ("", "neus", False),
    ("with samples", "neus", True),
    ("volsdf", "volsdf", False),
    ("density", "density", False),
):
    _case(_render(*_arguments))


@_case
def _composite(size: Size) -> Case:
    shape, values = (size.ray_count, size.samples), 3 + size.classes

    def inputs(draw: Draw) -> dict[str, Tensor]:
        return dict(alpha=0.1 * draw.uniform(*shape), values=draw.normal(*shape, values))

    return Case(
        "composite",
        "",
        size.name,
        inputs,
        lambda **x: kernels.composite(**x),
        ("alpha", "values"),
        lambda x: composite_bytes(*shape, values, x["alpha"].element_size()),
    )


@_case
def _node_losses(size: Size) -> Case:
    counts = (size.nodes[1], size.nodes[0], size.nodes[2])
    spacing = tuple((size.box[a + 3] - size.box[a]) / (counts[a] - 1) for a in range(3))

    return Case(
        "node_losses",
        "",
        size.name,
        lambda draw: dict(sdf=road(size, draw)[:, 0]),
        lambda sdf: kernels.node_losses(sdf, spacing, compact=size.name == "kitti"),
        ("sdf",),
        lambda x: node_bytes(x["sdf"].numel(), x["sdf"].element_size()),
    )


# -----------------------------------------------------------------------------------------------
# Photometric losses


@_case
def _similarity(size: Size) -> Case:
    shape = (len(size.headings), 3, *size.image)
    pixels = math.prod(shape) // 3
    return Case(
        "ssim_l1",
        "",
        size.name,
        lambda draw: dict(prediction=draw.uniform(*shape), target=draw.uniform(*shape)),
        lambda **x: (kernels.ssim_l1(**x),),
        ("prediction",),
        lambda x: similarity_bytes(pixels, 3, x["target"].element_size()),
    )


def _photometric_inputs(size: Size, draw: Draw) -> dict[str, Tensor]:
    cameras, rays = len(size.headings), size.rays[0] * size.rays[1]
    return dict(
        pixels=draw.put(rays_of(size)["pixels"]),
        target=draw.uniform(1, cameras, rays, 3),
        sources=draw.uniform(1, 2, cameras, 3, *size.image),
        projections=draw.put(projections_of(size)),
    )


@_case
def _least(size: Size) -> Case:
    cameras, rays = len(size.headings), size.rays[0] * size.rays[1]
    count = 1 if size.combine else 2
    shape = (1, count, cameras, rays)

    def inputs(draw: Draw) -> dict[str, Tensor]:
        return dict(
            color=draw.uniform(*shape, 3),
            l1=draw.uniform(*shape),
            target=draw.uniform(1, cameras, rays, 3),
            valid=draw.uniform(*shape) > 0.1,
            identity=draw.uniform(1, 2, cameras, rays, 3),
        )

    return Case(
        "least_photometric",
        "",
        size.name,
        inputs,
        lambda **x: (kernels.least_photometric(**x, rays=size.rays),),
        ("color", "l1"),
        lambda x: least_bytes(count, 2, size.ray_count, x["color"].element_size()),
    )


@_case
def _proposals(size: Size) -> Case:
    cameras, rays = len(size.headings), size.rays[0] * size.rays[1]
    counts = 2 * cameras, math.prod(size.image), size.ray_count, size.samples

    def inputs(draw: Draw) -> dict[str, Tensor]:
        seen = rays_of(size)
        steps = (torch.arange(size.samples) + 0.5) / size.samples
        near, far = (seen[name].view(1, cameras, rays, 1) for name in ("near", "far"))
        depths = (near + (far - near) * steps) / seen["stretch"][..., None]
        return dict(
            weights=draw.uniform(1, cameras, rays, size.samples) / size.samples,
            depths=draw.put(depths),
            **_photometric_inputs(size, draw),
        )

    return Case(
        "epipolar_photometric",
        "combined" if size.combine else "per source",
        size.name,
        inputs,
        lambda **x: kernels.epipolar_photometric(**x, combine=size.combine),
        ("weights",),
        lambda x: proposal_bytes(*counts, x["weights"].element_size()),
    )


@_case
def _rendered_proposals(size: Size) -> Case:
    def inputs(draw: Draw) -> dict[str, Tensor]:
        stretch = draw.put(rays_of(size)["stretch"].view(1, -1))
        return dict(stretch=stretch, **_ray_inputs(size, draw), **_photometric_inputs(size, draw))

    def call(**x: Tensor) -> tuple[Tensor, ...]:
        out, error, color, _ = kernels.render_photometric(
            **x, box=size.box, samples=size.samples, classes=size.classes, combine=size.combine
        )
        seen = (out.distance, out.opacity, out.color, out.semantics, out.eikonal, error, color)
        return tuple(result for result in seen if result is not None)

    def moved(x: dict[str, Tensor]) -> tuple[int, int]:
        nodes, e = math.prod(size.nodes), x["volume"].element_size()
        volume = rendering_bytes(nodes, 3 + size.classes, size.ray_count, size.samples, 0, e)
        frames = 2 * len(size.headings)
        images = e * (3 * frames * math.prod(size.image) + size.ray_count)
        return volume[0] + images, volume[1] + images

    return Case(
        "render_photometric",
        "combined" if size.combine else "per source",
        size.name,
        inputs,
        call,
        ("volume", "inv_s"),
        moved,
    )
