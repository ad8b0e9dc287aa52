"""Every setting and its default.

`--preset NAME` picks a preset (presets.py), `--set section.field=value` changes any field.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Annotated, Literal

from selfocc import InputError
from selfocc.settings import (
    Count,
    Index,
    NonNegative,
    Positive,
    Range,
    Section,
    Share,
    describe,
    entries,
    kinds,
    text,
)

Dataset = Literal["synthetic", "kitti", "kitti_raw", "nuscenes", "posed"]
Size = tuple[Count, Count]  # height, width
Scale = Annotated[float, Range(0, 4, above=True)]
Several = Annotated[int, Range(2)]
Window = tuple[NonNegative, NonNegative]  # least and greatest distance, metres


@dataclass(frozen=True)
class DataConfig(Section, name="data"):
    dataset: Dataset = "synthetic"
    version: str = "v1.0-trainval"  # nuScenes only: which tables
    volume_frame: Literal["ego", "lidar"] = "ego"  # nuScenes only: the volume's frame
    # nuScenes only: whose labels to score against
    voxels: Literal["occ3d", "openoccupancy"] = "occ3d"
    # synthetic: one camera, or a ring of six; posed: a volume ahead of the cameras, or around them
    rig: Literal["forward", "surround"] = "forward"
    scenes: Count = 40  # synthetic only: training scenes
    scenes_val: Count = 8  # synthetic only: validation and test scenes
    frames: Count = 48  # synthetic only: frames a scene
    # synthetic only: how much streets differ in light, weather, scenery and cameras
    looks: Share = 0.0
    # posed only: the crop is of images that are resized to just cover it, around the horizon
    fit: Literal["corner", "horizon"] = "corner"
    scale_metres: Positive | None = None  # posed only: metres that a unit of the poses is
    path_length: Positive | None = None  # posed only: metres of the way of a whole folder
    camera_height: Positive | None = None  # posed only: metres of the camera above the ground
    up: tuple[float, float, float] | None = None  # posed only: what is up in the axes of the poses
    crop: Size = (96, 320)  # kept of every image, from the top left
    target_crop: Size | None = None  # the same of images that supervise; None: `crop`
    scale: Scale = 1.0  # resize of the cropped image for the network
    pad: Size = (96, 320)  # what the network sees, zero padded at bottom and right
    target_scale: Scale = 1.0  # resize of the cropped images that supervise
    mean: tuple[float, float, float] = (124.16, 116.74, 103.94)  # RGB, 0..255
    std: tuple[Positive, Positive, Positive] = (58.624, 57.344, 57.6)
    augment: bool = True  # photometric augmentation of the network's images
    anchor_input: Share = 0.333  # probability that the rendered frame is the input frame
    anchor_past: Share = 0.2  # otherwise, probability of an earlier frame; else a later one
    past: Window = (0.4, 10.0)  # path length to earlier anchors
    future: Window = (0.4, 40.0)  # path length to later anchors
    source: Window = (0.4, 40.0)  # path length from the anchor to its two source frames
    # what lengths above mean: path driven, or straight line
    distance: Literal["path", "straight"] = "path"
    # source frames: the nearest, or drawn for each camera
    neighbours: Literal["nearest", "composite"] = "nearest"
    one_sided: bool = False  # a frame with a neighbour on one side only: that is both its sources
    stereo_source: bool = False  # KITTI: the other eye often replaces a source frame
    label_map: str = ""  # meaning of 2-D pseudo labels: a table of labels.py, or a JSON file
    # KITTI: sequences and frames, such as 00,01 or 06:0-39; empty is the official split
    train: str = ""
    val: str = ""

    @property
    def cameras(self) -> int:
        """Cameras of a frame."""
        ring = self.dataset == "synthetic" and self.rig == "surround"
        return 6 if self.dataset == "nuscenes" or ring else 1


# what a folder of footage may have to be told, and no other data set
FOOTAGE = ("scale_metres", "camera_height", "path_length", "up")


@dataclass(frozen=True)
class Folders:
    """Where the files of a data set are; None for what it does not need."""

    data: Path | None = None  # the data set as it was downloaded
    labels: Path | None = None  # 2-D pseudo labels, laid out as the images are
    splits: Path | None = None  # KITTI raw: split files
    poses: Path | None = None  # KITTI raw: one pose file a drive


@dataclass(frozen=True)
class VolumeConfig(Section, name="volume"):
    # x0 y0 z0 x1 y1 z1, metres
    box: tuple[float, float, float, float, float, float] = (-25.6, 0.0, -2.0, 25.6, 51.2, 4.4)
    nodes: tuple[Several, Several, Several] = (257, 257, 33)  # H (y), W (x), Z
    voxel: Literal[1, 2, 4, 8] = 1  # ground-truth voxels are pooled by this factor before scoring
    # the published KITTI post-processing: nothing at the sides, far end and top
    crop_margins: bool = True
    ground: float = -1.73  # height of a flat road, metres: the baseline that needs no image
    threshold: float = 0.0  # a voxel is occupied where its SDF is at most this, metres


@dataclass(frozen=True)
class BackboneConfig(Section, name="backbone"):
    depth: Literal[18, 34, 50, 101] = 50
    width: Count = 64  # channels of the stem; 64 is the standard network
    # over the images of all processes, of a process, or of one image; only the first needs words
    # between processes, and gives what a single process would
    norm: Literal["batch", "local", "group"] = "batch"
    weights: str = "imagenet"  # none | imagenet | a torchvision file
    frozen_stem: bool = True  # conv1 and bn1 keep their weights


@dataclass(frozen=True)
class EncoderConfig(Section, name="encoder"):
    kind: Literal["tpv", "bev"] = "tpv"
    dim: Count = 96  # channels of tokens and planes
    heads: Count = 6
    layers: Count = 4
    # reference points of an hw, zh, wz query (bev uses the first)
    points_cross: tuple[Count, Index, Index] = (8, 48, 48)
    points_self: Count = 12
    # planes hold every n-th node along y and x; between these the field is linear
    stride: Size = (1, 1)
    frequencies: Count = 12  # of the positional encoding
    dropout: Share = 0.1
    lift: bool = False  # nodes also read what the pixels they project to say (see lift.py)
    lift_bins: Count = 24  # depths at which a pixel describes its ray
    plane_scale: float = 1.0  # of the last LayerNorm at the start; small lets the lift speak first
    cameras: Count | None = None  # camera embeddings; None: as many as the data set has cameras


def plane_volume(encoder: EncoderConfig, volume: VolumeConfig) -> VolumeConfig:
    """The volume with the nodes of the planes."""
    height, width, depth = volume.nodes
    thinned = ((n - 1) // s + 1 for n, s in zip((height, width), encoder.stride, strict=True))
    return dataclasses.replace(volume, nodes=(*thinned, depth))


@dataclass(frozen=True)
class FieldConfig(Section, name="field"):
    hidden: Count = 96  # width of the MLP from planes to volume
    colors: Literal[0, 3] = 3
    classes: Annotated[int, Range(0, 255)] = 0  # semantic classes, 0 for none
    ground: float | None = None  # height in metres of the road to start from; None: random start
    rise: Positive = 1.0  # metres to which the SDF of that start is limited


@dataclass(frozen=True)
class RenderConfig(Section, name="render"):
    rays: tuple[Several, Several] = (55, 190)  # rows, columns in training; SSIM compares neighbours
    # least stride of the grid of training rays: 0 is neighbouring pixels, 1 the whole image
    spread: Share = 0.0
    samples: Count = 256  # intervals a ray
    # intervals grow along a ray from 1 - bend times their mean length to 1 + bend times
    bend: Share = 0.0
    # where the field of an interval is read, whose depth is that of its middle: 0 is its start, as
    # published, 1 its end; with few samples, the start moves surfaces to before where they are seen
    read: Share = 0.0
    eval_rays: Size = (176, 608)
    eval_samples: Count = 256
    alpha: Literal["neus", "volsdf", "density"] = "neus"
    variance: float = 0.1  # start of the learnt sharpness: inv_s = exp(10 variance)
    # inv_s at the first and last step instead of learning it
    sharpen: tuple[Positive, Positive] | None = None
    anneal_steps: Count = 5000  # steps until the cosine in NeuS alpha is fully used
    # rays that hit nothing see the far end of the volume, instead of no depth
    backdrop: bool = False
    # metres that rays go on beyond the volume's sides (x), ends (y) and floor (z), where its border
    # goes on: a backdrop just behind a surface would do instead of the surface
    margin: tuple[NonNegative, NonNegative, NonNegative] = (0.0, 0.0, 0.0)
    margin_top: NonNegative = 0.0  # the same above the volume
    background: Literal["random", "black"] = "random"


@dataclass(frozen=True)
class LossConfig(Section, name="loss"):
    photometric: Literal["mvs", "mvs_combined", "reprojection"] = "mvs"
    automask: bool = True
    weight_photometric: NonNegative = 1.0
    weight_color: NonNegative = 0.1
    weight_eikonal: NonNegative = 0.1
    weight_hessian: NonNegative = 0.1
    compact_hessian: bool = True  # diagonal second differences over one node instead of two
    weight_sparsity: NonNegative = 0.005
    sparsity: Literal["soft", "smooth", "hard", "adaptive"] = "soft"
    # metres between the points it reads; None: the nodes'
    sparsity_pitch: Annotated[float, Range(0.01)] | None = None
    weight_edge: NonNegative = 0.0
    weight_sweep: NonNegative = 0.0  # of the lift's depth against a plane sweep (see sweep.py)
    weight_semantic: NonNegative = 0.0
    semantic: Literal["ce", "bce"] = "ce"


@dataclass(frozen=True)
class OptimConfig(Section, name="optim"):
    steps: Count = 69_504  # 24 epochs of KITTI, 2,896 steps each on eight GPUs
    batch: Count = 1  # of one process
    accumulate: Count = 1
    # first steps, of the loss against a plane sweep alone: nothing but backbone and lift learns
    sweep_steps: Index = 0
    lr: NonNegative = 1e-3
    backbone_factor: NonNegative = 0.1
    weight_decay: NonNegative = 0.01
    clip: Positive = 35.0  # gradient norm
    warmup: Index = 1000
    warmup_lr: NonNegative = 1e-6
    schedule: Literal["cosine", "step"] = "cosine"
    min_lr: NonNegative = 1e-6
    # step schedule: lr / 10 after this share of the steps and the warm-up
    drop_at: Share = 0.75
    # products and convolutions of float32 on a GPU round their factors to TF32; false: float32
    tf32: bool = True
    bf16: bool = False  # autocast backbone, encoder and decoder to bfloat16; the volume is float32
    # the passes of a step as one CUDA graph, from where the schedules of render.anneal_steps and
    # sweep_steps end; on one GPU, and without accumulation
    graph: bool = False
    seed: Annotated[int, Range(0, 2**31 - 1)] = 42
    workers: Index = 4
    validate_every: Count = 5000
    validate_frames: Count = 32
    picture_every: Count = 500
    save_every: Count = 1000


@dataclass(frozen=True)
class QuirkConfig(Section, name="quirks"):
    """Where the published code computes something else than the paper says.

    The published presets switch these on, since their checkpoints were trained with them; nobody
    else should. What published checkpoints need and does no harm is always done:

    - a plane's node i of n reads the other planes at i / n, not in the middle of its cell;
    - SDF and colour are those of an interval's start, its depth is that of its middle;
    - transmittance takes 1 - alpha + 1e-4, so that an empty ray of 256 samples ends with 1.026, and
      alpha adds 1e-5 to numerator and denominator;
    - 1e-6 is added to a ray's direction before it is divided by;
    - differences at the volume's border are halved.

    Depth is not clipped to the nearest and farthest sample of the whole batch, as there: it is a
    mean of its own ray's samples. The quirks of the evaluation scripts are in protocols.py.
    """

    transposed_bev_grid: bool = False  # BEV node (h, w) attends around (w, h)
    white_256: bool = False  # images that supervise are bytes / 256, white is 255/256
    pixels_over_size: bool = False  # the same images are read at u (W - 1) / W instead of u
    # height, width of the padded input over the cropped image before scaling, as the published
    # configuration rounds it; None: exact
    pad_rate: tuple[Positive, Positive] | None = None


@dataclass(frozen=True)
class Config:
    """All sections. Raises InputError where two settings contradict each other."""

    preset: str = "kitti"
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    volume: VolumeConfig = dataclasses.field(default_factory=VolumeConfig)
    backbone: BackboneConfig = dataclasses.field(default_factory=BackboneConfig)
    encoder: EncoderConfig = dataclasses.field(default_factory=EncoderConfig)
    field: FieldConfig = dataclasses.field(default_factory=FieldConfig)
    render: RenderConfig = dataclasses.field(default_factory=RenderConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    quirks: QuirkConfig = dataclasses.field(default_factory=QuirkConfig)

    def __post_init__(self):
        for contradiction in _contradictions(self):
            raise InputError(contradiction)


def _contradictions(config: Config) -> Iterator[str]:
    """What settings that are each allowed cannot be together."""
    data, volume, encoder = config.data, config.volume, config.encoder
    for name in ("past", "future", "source"):
        near, far = getattr(data, name)
        if near > far:
            yield f"data.{name} is {near:g},{far:g}; the first distance must not exceed the second"
    if data.up and not any(data.up):
        yield "data.up is 0,0,0, which is no direction"
    for name in FOOTAGE:
        if data.dataset != "posed" and getattr(data, name) is not None:
            yield f"data.{name} is of data set posed, and {data.dataset} knows it; leave it out"
    seen = tuple(int(n * data.scale) for n in data.crop)
    if any(n < 1 or n > p for n, p in zip(seen, data.pad, strict=True)):
        yield (
            f"data.pad is {_size(data.pad)}, but data.crop times data.scale makes images of "
            f"{_size(seen)} pixels, which it must hold; --set data.pad=H,W"
        )
    if any(low >= high for low, high in zip(volume.box[:3], volume.box[3:], strict=True)):
        yield "volume.box is x0,y0,z0,x1,y1,z1 in metres; each of the last three must be greater"
    if encoder.dim % encoder.heads:
        yield f"encoder.heads, {encoder.heads}, must divide encoder.dim, {encoder.dim}"
    if encoder.kind == "tpv" and 0 in encoder.points_cross:
        yield f"encoder.points_cross is {text(encoder.points_cross)}; tpv needs all three"
    for axis, nodes, stride in zip("yx", volume.nodes, encoder.stride, strict=False):
        if (nodes - 1) % stride or nodes <= stride:
            yield (
                f"encoder.stride along {axis}, {stride}, must divide the {nodes - 1} steps between "
                "volume.nodes"
            )
    if encoder.lift and encoder.kind == "bev":
        yield "encoder.lift needs encoder.kind=tpv"
    if (config.optim.sweep_steps or config.loss.weight_sweep) and not encoder.lift:
        yield "optim.sweep_steps and loss.weight_sweep need encoder.lift=true"


def check_training(config: Config) -> None:
    """Raises InputError for what can be evaluated, but not trained."""
    for contradiction in _training_contradictions(config):
        raise InputError(contradiction)


def _training_contradictions(config: Config) -> Iterator[str]:
    data, volume, loss = config.data, config.volume, config.loss
    rendered = tuple(int(n * data.target_scale) for n in data.target_crop or data.crop)
    if any(n < rays for n, rays in zip(rendered, config.render.rays, strict=True)):
        yield (
            f"render.rays is {_size(config.render.rays)}, more than the {_size(rendered)} pixels "
            "of the images that supervise (data.target_crop or data.crop, times data.target_scale)"
        )
    if data.stereo_source and data.dataset not in ("kitti", "kitti_raw"):
        yield f"data.stereo_source needs stereo pairs, and data set {data.dataset} has none"
    if config.optim.graph and config.optim.accumulate > 1:
        yield "optim.graph needs optim.accumulate=1"
    if loss.weight_color and not config.field.colors:
        yield "loss.weight_color needs field.colors=3; set it to 0 otherwise"
    if not any(getattr(loss, f.name) for f in dataclasses.fields(loss) if "weight" in f.name):
        yield "all weights of losses are 0, so that nothing would be learnt"
    pitch, sides = loss.sparsity_pitch, (volume.box[a + 3] - volume.box[a] for a in range(3))
    if loss.weight_sparsity and pitch is not None and pitch > min(sides):
        yield f"loss.sparsity_pitch, {pitch:g} m, is more than a side of volume.box"
    smallest = prod(ceil(n / 32) for n in data.pad)  # pixels of the last stage of the backbone
    images = config.optim.batch * data.cameras
    if config.backbone.norm != "group" and smallest * images == 1:
        yield "batch norm needs more than one pixel: data.pad above 32, or backbone.norm=group"


def _size(size: tuple[int, int]) -> str:
    return "x".join(map(str, size))


def to_dict(config: Config) -> dict:
    """Plain nested dictionaries, for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: dict) -> Config:
    """The inverse of `to_dict`, also after a trip through JSON.

    Raises InputError for fields this version lacks.
    """
    sections = {}
    for section in dataclasses.fields(Config):
        if section.type is str:
            continue
        given = values.get(section.name, {})
        unknown = given.keys() - kinds(section.type).keys()
        if unknown:
            raise InputError(
                f"the saved configuration has {section.name}.{min(unknown)}, which this version "
                "does not know"
            )
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        sections[section.name] = section.type(**given)
    return Config(preset=values.get("preset", "kitti"), **sections)


def differences(before: Config, now: Config) -> list[tuple[str, object, object]]:
    """Every setting that differs: its name, what it was and what it is."""
    pairs = zip(entries(before), entries(now), strict=True)
    return [(name, then, value) for (name, then, _), (_, value, _) in pairs if value != then]


def listing(config: Config) -> str:
    """A line for every setting: its name, its value, and what it may be."""
    lines = (f"  {n:24s} {text(value):24s} {describe(kind)}" for n, value, kind in entries(config))
    return "\n".join(lines)
