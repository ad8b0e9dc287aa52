"""Published SelfOcc checkpoints: their names and values, and how ours become of them and back.

Every parameter of the published network has its counterpart here, with these exceptions:

- Colour: the published network renders BGR bytes / 256, ours RGB in [0, 1]. On import the rows of
  the last layer that make blue, green and red change places, which is exact. The factor 256/255
  stays outside the weights, in `QuirkConfig.white_256`: the rendered colour is multiplied by it, so
  that a round trip gives back every bit. Weights that were trained without that quirk are exported
  with the factor inside: since colour = relu(SH0 f + 0.5) is homogeneous, the feature f becomes
  (255 f - 0.5 / SH0) / 256.
- `field_background`, `field.aabb` and `device_indicator_param` compute nothing. They are kept, and
  written back; where there are none to write back, as the published code starts them. The volume's
  box is read off `field.aabb`.
- Shapes: plane queries have a leading 1, `variance` is [1].
"""

import functools
import math
import re
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from selfocc import InputError, config, presets
from selfocc.backbone import BLOCKS
from selfocc.config import Config
from selfocc.encoder import PLANES
from selfocc.files import read_torch, replacing
from selfocc.model import SelfOcc
from selfocc.settings import change

PRESETS = (
    "kitti", "kitti_novel_depth", "kitti_raw", "nuscenes", "nuscenes_bev", "nuscenes_novel_depth",
    "nuscenes_depth",
)  # fmt: skip
SH0 = 0.28209479177387814  # of the spherical harmonic that makes colour of a feature
LISTED = 20  # names in doubt that are listed one by one
_FIELD = "head.model.field.density_net."
_LAST = f"{_FIELD}3."
_AABB = "head.model.field.aabb"
_INERT = ("head.model.field_background", "head.model.device_indicator_param", _AABB)
# What is replaced in our names, one after the other, by kind; the plane of a BEV has no name.
_TPV = {
    r"^backbone\.": "img_backbone.",
    r"^fpn\.": "img_neck.",
    r"^encoder\.queries\.": "lifter.tpv_",
    r"\.level_embedding$": ".level_embeds",
    r"\.camera_embedding$": ".cams_embeds",
    r"\.position\.": ".positional_encoding.position_layer_",
    r"\.self_attention\.": ".attentions.0.",
    r"\.cross\.(..)\.": r".attentions.1.attn_\1.deformable_attention.",
    r"\.offsets\.": ".sampling_offsets.",
    r"\.weights\.": ".attention_weights.",
    r"\.value\.": ".value_proj.",
    r"(\.deformable_attention)?\.output\.": ".output_proj.",
    r"\.ffn\.0\.": ".ffns.0.layers.0.0.",
    r"\.ffn\.3\.": ".ffns.0.layers.1.",
    r"^decoder\.net\.": _FIELD,
    r"^variance$": "head.model.field.deviation_network.variance",
}
_BEV = {r"tpv_hw$": "bev", r"position_layer_hw": "position_layer", r"attn_hw\.": ""}
_RENAMED = {"tpv": _TPV, "bev": _TPV | _BEV}
_ORDER = (  # how names begin
    "img_backbone.", "img_neck.", "lifter.tpv_hw", "lifter.tpv_zh", "lifter.", "encoder.level",
    "encoder.cams", "encoder.position", "encoder.layers.", *_INERT, _FIELD, "head.",
)  # fmt: skip


def published_names(settings: Config) -> dict[str, str | None]:
    """Published name -> ours, in the published order; None for what computes nothing."""
    names: dict[str, str | None] = dict.fromkeys(_INERT)
    for ours in _shapes(settings):
        theirs = ours
        for pattern, published in _RENAMED[settings.encoder.kind].items():
            theirs = re.sub(pattern, published, theirs)
        names[theirs] = ours
    place = {name: next(i for i, s in enumerate(_ORDER) if name.startswith(s)) for name in names}
    return {name: names[name] for name in sorted(names, key=place.get)}


def published_shapes(settings: Config) -> dict[str, tuple[int, ...]]:
    """Published name -> shape, in the published order."""
    ours = _shapes(settings)
    fixed = dict(zip(_INERT, ((1,), (0,), (2, 3)), strict=True))
    shapes = {}
    for theirs, name in published_names(settings).items():
        leading = (1,) if theirs.startswith("lifter.") or name == "variance" else ()
        shapes[theirs] = fixed[theirs] if name is None else leading + ours[name]
    return shapes


@functools.lru_cache(maxsize=16)
def _shapes(settings: Config) -> dict[str, tuple[int, ...]]:
    """Our names and shapes."""
    with torch.device("meta"):  # without memory
        state = SelfOcc(change(settings, ["backbone.weights=none"])).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


# Import


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict of a file of torch.save, memory mapped, without `module.` before its names.

    Raises InputError, before any of it is held in memory, if the file is damaged, larger than it
    says, or needs code to run.
    """
    _check_archive(path)
    content = read_torch(path, mmap=True)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state:
        raise InputError(f"{path} holds no state dict; name a published SelfOcc checkpoint")
    for name, tensor in state.items():
        dense = isinstance(tensor, Tensor) and tensor.layout is torch.strided
        if not isinstance(name, str) or not dense or tensor.is_quantized:
            raise InputError(
                f"{path}: {str(name)[:80]!r} is a {type(tensor).__name__}, not a plain tensor; "
                "name a published SelfOcc checkpoint"
            )
    held = sum(t.numel() * t.element_size() for t in state.values())
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.values()
    }
    if max(held, sum(storages.values())) > path.stat().st_size:
        raise InputError(f"{path} claims more numbers than it has bytes for; fetch it again")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _check_archive(path: Path) -> None:
    """Raise InputError unless the file is an archive as torch writes it, nothing packed."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
                raise InputError(f"{path} is compressed, which torch.save never does; not read")
            if sum(e.file_size for e in entries) > path.stat().st_size:
                raise InputError(f"{path} claims to hold more than its size; not read")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(
            f"{path} is not a whole file of torch.save, 1.6 or newer ({error}); fetch it again"
        ) from None
    if damaged is not None:
        raise InputError(f"{path} is damaged (in {damaged}); fetch it again")


def import_published(
    path: Path, preset: str | None = None, overrides: list[str] = ()
) -> tuple[Config, dict[str, Tensor], dict[str, Tensor]]:
    """A published checkpoint as our configuration, our state dict, and what computes nothing.

    Sizes are read off the file, all else is the preset's with `section.field=value` overrides. The
    preset is guessed, and printed, where none is named. Heads cannot be read off, nor a BEV that is
    not square: `encoder.heads` and `volume.nodes` tell them. The tensors are views of the file.

    Raises InputError if the file is damaged, runs code, or does not fit: then every name that is
    missing, unexpected or of another shape has been printed, a line each.
    """
    state = read_state(path)
    settings = choose(path, state, preset, overrides)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    names = published_names(settings)
    _check(path, shapes, published_shapes(settings), settings.preset)
    ours = _shapes(settings)
    model, inert = {}, {}
    for theirs, name in names.items():
        tensor = state[theirs]
        if name is None:
            inert[theirs] = tensor
            continue
        counter = theirs.endswith("num_batches_tracked")
        if tensor.is_floating_point() == counter:
            raise InputError(f"{path}: {theirs} is {tensor.dtype}; fetch the checkpoint again")
        if not counter and not torch.stack(tensor.aminmax()).isfinite().all():
            raise InputError(f"{path}: {theirs} holds NaN or infinity; use another checkpoint")
        if theirs.startswith(_LAST):
            tensor = swap_colors(tensor, settings)
        model[name] = tensor.to(torch.int64 if counter else torch.float32).reshape(ours[name])
    # its weights are these, and no others are to be fetched
    return change(settings, ["backbone.weights=none"]), model, inert


def choose(
    path: Path, state: dict[str, Tensor], preset: str | None = None, overrides: list[str] = ()
) -> Config:
    """The configuration of a published state dict: the preset named, or else guessed and printed.

    Sizes are those of the state dict, and a line is printed for each that is not the preset's.
    Raises InputError if it is none of SelfOcc's, or has other planes than the preset named.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    kinds = [k for k, n in (("tpv", "lifter.tpv_hw"), ("bev", "lifter.bev")) if n in shapes]
    if len(kinds) != 1 or "encoder.cams_embeds" not in shapes:
        raise InputError(
            f"{path} has no SelfOcc in it (such as {min(shapes)}); name a published checkpoint"
        )
    bases = {name: presets.build(name, overrides) for name in ([preset] if preset else PRESETS)}
    if preset and bases[preset].encoder.kind != kinds[0]:
        raise InputError(
            f"{path} has the planes of a {kinds[0]} network, --preset {preset} is "
            f"{bases[preset].encoder.kind}; name another or none"
        )
    found, changes = {}, {}
    for name, base in bases.items():
        if base.encoder.kind == kinds[0]:
            try:
                found[name] = _sizes(path, state, shapes, base)
            except (KeyError, IndexError, ValueError, ZeroDivisionError):
                found[name] = base  # what is missing is listed later
            changes[name] = config.differences(base, found[name])
    best = min(changes, key=lambda name: len(changes[name]))
    if preset is None:
        alike = [n for n in changes if len(changes[n]) == len(changes[best]) and n != best]
        how = "the nearest, with other sizes" if changes[best] else "guessed by names and shapes"
        also = f", which are those of {', '.join(alike)} too" if alike else ""
        said = f"{path} is a published checkpoint of preset {best} ({how}{also})"
        print(f"{said}; --preset says another")
    for name, before, now in changes[best]:
        print(f"{path}: {name} is {now} in the file, {before} in preset {best}")
    return found[best]


def _sizes(path, state, shapes, base: Config) -> Config:
    """The preset with the sizes that names and shapes show."""
    encoder = base.encoder
    tpv = encoder.kind == "tpv"
    planes = PLANES[encoder.kind]
    cameras, dim = shapes["encoder.cams_embeds"]
    levels, _ = shapes["encoder.level_embeds"]
    hidden, _ = shapes[f"{_FIELD}1.weight"]
    rows, _ = shapes[f"{_LAST}weight"]
    if tpv:
        hw, zh, wz = (shapes[f"lifter.tpv_{plane}"][1] for plane in planes)
        products = (hw * zh, wz), (hw * wz, zh), (zh * wz, hw)
        nodes, channels = tuple(math.isqrt(ab // c) for ab, c in products), rows
    else:
        nodes, channels = _bev_nodes(path, shapes["lifter.bev"][1], rows, base)
    colors, classes = base.field.colors, base.field.classes
    if 1 + colors + classes != channels:
        colors, classes = (3, channels - 4) if channels > 3 else (0, channels - 1)

    def points(attention: str, levels: int) -> int:
        count, odd = divmod(
            shapes[f"encoder.layers.0.attentions.{attention}.attention_weights.bias"][0],
            encoder.heads * levels,
        )
        if odd or dim % encoder.heads:
            raise InputError(
                f"{path}: {encoder.heads} heads do not divide what attention has; its number "
                "cannot be read off, so give --set encoder.heads=N"
            )
        return count

    cross = [f"1.{f'attn_{plane}.' if tpv else ''}deformable_attention" for plane in planes]
    points_cross = tuple(points(attention, levels) for attention in cross)
    position = f"encoder.positional_encoding.position_layer{'_hw' if tpv else ''}.weight"
    width, *_ = shapes["img_backbone.conv1.weight"]
    if min(cameras, dim, levels, hidden, channels, width, *nodes) < 1:
        raise ValueError("sizes must be positive")  # and are refused with what does not fit
    layers = {int(m[1]) for n in shapes if (m := re.match(r"encoder\.layers\.(\d+)\.", n))}
    encoder = replace(
        encoder,
        dim=dim,
        layers=len(layers),
        points_cross=points_cross + encoder.points_cross[len(points_cross) :],
        points_self=points("0", len(planes)),
        frequencies=shapes[position][1] // 4,
        cameras=None if cameras == base.data.cameras else cameras,
    )
    depth = _depth(shapes, base.backbone.depth)
    return replace(
        base,
        encoder=encoder,
        backbone=replace(base.backbone, depth=depth, width=width),
        field=replace(base.field, hidden=hidden, colors=colors, classes=classes),
        volume=replace(base.volume, nodes=nodes, box=_box(state, base.volume.box)),
    )


def _bev_nodes(path, tokens: int, rows: int, base: Config) -> tuple[tuple[int, int, int], int]:
    """Nodes and channels of a BEV: only H W and Z C can be read off, the preset knows the rest."""
    height, width, depth = base.volume.nodes
    channels = 1 + base.field.colors + base.field.classes
    if height * width != tokens:
        height = width = math.isqrt(tokens)
    if rows % depth == 0:
        channels = rows // depth
    elif rows % channels == 0:
        depth = rows // channels
    if height * width != tokens or depth * channels != rows:
        raise InputError(
            f"{path} has {tokens} BEV nodes, neither square nor the preset's; give --set "
            "volume.nodes=H,W,Z"
        )
    return (height, width, depth), channels


def _depth(shapes, usual: int) -> int:
    """Which ResNet it is, from its blocks."""
    blocks = tuple(
        len({n.split(".")[2] for n in shapes if n.startswith(f"img_backbone.layer{stage}.")})
        for stage in (1, 2, 3, 4)
    )
    narrow = "img_backbone.layer1.0.conv3.weight" not in shapes
    known = (depth for depth, b in BLOCKS.items() if b == blocks and (depth < 50) == narrow)
    return next(known, usual)


def _box(state, usual: tuple[float, ...]) -> tuple[float, ...]:
    """The volume's box of a state dict, in the decimals that its float32 numbers stand for."""
    found = state[_AABB].flatten()
    if (
        len(found) != 6
        or not (found[:3] < found[3:]).all()
        or torch.equal(found, torch.tensor(usual).float())
    ):
        return usual
    return tuple(float(str(number)) for number in found.float().numpy())


def _check(path, found, expected, preset: str) -> None:
    """Print what does not fit, a line a name, and raise InputError if there is any."""
    missing = [f"missing: {n} {list(shape)}" for n, shape in expected.items() if n not in found]
    unexpected = [f"unexpected: {n} {list(s)}" for n, s in found.items() if n not in expected]
    other = [
        f"of another shape: {n} is {list(found[n])}, preset {preset} has {list(shape)}"
        for n, shape in expected.items()
        if found.get(n, shape) != shape
    ]
    lines = missing + unexpected + other
    if lines:
        more = [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
        print("\n".join(lines[:LISTED] + more), file=sys.stderr)
        raise InputError(
            f"{path} does not fit preset {preset}: {len(missing)} names missing, "
            f"{len(unexpected)} unexpected, {len(other)} of another shape; name the right one with "
            "--preset"
        )


def swap_colors(last: Tensor, settings: Config) -> Tensor:
    """Weight or bias of the last layer with the rows of red and blue exchanged."""
    if settings.field.colors != 3:
        return last
    rows = torch.arange(len(last)).view(-1, 1 + settings.field.colors + settings.field.classes)
    order = [0, 3, 2, 1, *range(4, rows.shape[1])]
    return last[rows[:, order].flatten()]


# Export


def export_published(
    path: Path, settings: Config, model: dict[str, Tensor], inert: dict[str, Tensor]
) -> None:
    """Write a state dict of ours as a published checkpoint, the inverse of `import_published`.

    Raises InputError where the published network cannot compute what ours does.
    """
    quirks = settings.quirks
    ours_alone = {
        "encoder.lift": settings.encoder.lift,
        "encoder.stride": settings.encoder.stride != (1, 1),
        "render.margin": any((*settings.render.margin, settings.render.margin_top)),
        "render.bend": settings.render.bend > 0,
        "render.read": settings.render.read > 0,
        "backbone.norm=group": settings.backbone.norm == "group",
        "field.ground": settings.field.ground is not None,
        f"render.alpha={settings.render.alpha}": settings.render.alpha != "neus",
        "render.sharpen": settings.render.sharpen is not None,
        "render.backdrop": settings.render.backdrop,
        "a BEV without quirks.transposed_bev_grid": (
            settings.encoder.kind == "bev" and not quirks.transposed_bev_grid
        ),
    }
    reasons = [name for name, used in ours_alone.items() if used]
    if reasons:
        raise InputError(
            f"the published network has no {reasons[0]}, with which preset {settings.preset} was "
            "trained; only checkpoints of the published presets can be exported"
        )
    box = torch.tensor(settings.volume.box).view(2, 3)
    inert = dict(zip(_INERT, (torch.ones(1), torch.empty(0), box), strict=True)) | inert
    names, state = published_names(settings), {}
    for theirs, shape in published_shapes(settings).items():
        name = names[theirs]
        tensor = inert[theirs] if name is None else model[name]
        if theirs.startswith(_LAST):
            if not quirks.white_256:
                tensor = _divide_colors(tensor, settings)
            tensor = swap_colors(tensor, settings)
        state[theirs] = tensor.reshape(shape)
    with replacing(path) as temporary:
        try:
            torch.save({"state_dict": state}, temporary)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(str(error).partition("\n")[0]) from None


def _divide_colors(last: Tensor, settings: Config) -> Tensor:
    """The last layer for colours 255/256 times as bright."""
    out = last.double().unflatten(0, (-1, 1 + settings.field.colors + settings.field.classes))
    colors = out[:, 1 : 1 + settings.field.colors]
    colors *= 255
    if last.ndim == 1:
        colors -= 0.5 / SH0
    colors /= 256
    return out.flatten(0, 1).to(last.dtype)
