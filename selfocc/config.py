"""Every setting and its default.

`--preset NAME` picks a preset (presets.py), `--set section.field=value` changes any field.
"""

import dataclasses
from dataclasses import dataclass

from selfocc import InputError
from selfocc.overrides import change


@dataclass(frozen=True)
class DataConfig:
    dataset: str = "synthetic"  # synthetic | kitti | kitti_raw | nuscenes
    version: str = "v1.0-trainval"  # nuScenes only: which tables
    volume_frame: str = "ego"  # nuScenes only: the volume's frame, ego | lidar
    voxels: str = "occ3d"  # nuScenes only: whose labels to score against, occ3d | openoccupancy
    rig: str = "forward"  # synthetic only: forward (one camera) | surround (ring of six)
    scenes: int = 40  # synthetic only: training scenes
    scenes_val: int = 8  # synthetic only: validation and test scenes
    frames: int = 48  # synthetic only: frames a scene
    crop: tuple[int, int] = (96, 320)  # height, width kept of every image, from the top left
    target_crop: tuple[int, int] | None = None  # the same of images that supervise; None: `crop`
    scale: float = 1.0  # resize of the cropped image for the network
    pad: tuple[int, int] = (
        96,
        320,
    )  # height, width the network sees, zero padded at bottom and right
    target_scale: float = 1.0  # resize of the cropped images that supervise
    mean: tuple[float, float, float] = (124.16, 116.74, 103.94)  # RGB, 0..255
    std: tuple[float, float, float] = (58.624, 57.344, 57.6)
    augment: bool = True  # photometric augmentation of the network's images
    anchor_input: float = 0.333  # probability that the rendered frame is the input frame
    anchor_past: float = 0.2  # otherwise, probability of an earlier frame; else a later one
    past: tuple[float, float] = (0.4, 10.0)  # path length in metres to earlier anchors
    future: tuple[float, float] = (0.4, 40.0)  # path length in metres to later anchors
    source: tuple[float, float] = (
        0.4,
        40.0,
    )  # path length in metres from the anchor to its two source frames
    distance: str = "path"  # what lengths above mean: path driven, or straight line
    neighbours: str = "nearest"  # source frames: nearest | composite (drawn for each camera)
    one_sided: bool = False  # a frame with a neighbour on one side only: that is both its sources
    stereo_source: bool = False  # KITTI raw: the other eye often replaces a source frame
    label_map: str = ""  # meaning of 2-D pseudo labels: openseed21 | cityscapes19 | a JSON file
    train: str = (
        ""  # KITTI: sequences and frames, such as 00,01 or 06:0-39; empty is the official split
    )
    val: str = ""

    @property
    def cameras(self) -> int:
        """Cameras of a frame."""
        return 6 if self.dataset == "nuscenes" or self.rig == "surround" else 1


@dataclass(frozen=True)
class VolumeConfig:
    box: tuple[float, ...] = (-25.6, 0.0, -2.0, 25.6, 51.2, 4.4)  # x0 y0 z0 x1 y1 z1, metres
    nodes: tuple[int, int, int] = (257, 257, 33)  # H (y), W (x), Z
    voxel: int = 1  # ground-truth voxels are pooled by this factor before scoring
    crop_margins: bool = (
        True  # the published KITTI post-processing: nothing at the sides, far end and top
    )
    ground: float = -1.73  # height of a flat road, metres: the baseline that needs no image
    threshold: float = 0.0  # a voxel is occupied where its SDF is at most this, metres


@dataclass(frozen=True)
class BackboneConfig:
    depth: int = 50  # 18 | 34 | 50 | 101
    width: int = 64  # channels of the stem; 64 is the standard network
    # batch | local | group: over the images of all processes, of a process, or of one image; only
    # the first needs words between processes, and gives what a single process would
    norm: str = "batch"
    weights: str = "imagenet"  # none | imagenet | a torchvision file
    frozen_stem: bool = True  # conv1 and bn1 keep their weights


@dataclass(frozen=True)
class EncoderConfig:
    kind: str = "tpv"  # tpv | bev
    dim: int = 96  # channels of tokens and planes
    heads: int = 6
    layers: int = 4
    points_cross: tuple[int, int, int] = (
        8,
        48,
        48,
    )  # reference points of an hw, zh, wz query (bev uses the first)
    points_self: int = 12
    frequencies: int = 12  # of the positional encoding
    dropout: float = 0.1
    lift: bool = (
        False  # nodes also read what the pixels they project to say (see lift.py; tpv only)
    )
    lift_bins: int = 24  # depths at which a pixel describes its ray
    plane_scale: float = 1.0  # of the last LayerNorm at the start; small lets the lift speak first
    cameras: int | None = None  # camera embeddings; None: as many as the data set has cameras


@dataclass(frozen=True)
class FieldConfig:
    hidden: int = 96  # width of the MLP from planes to volume
    colors: int = 3
    classes: int = 0  # semantic classes, 0 for none
    ground: float | None = None  # height in metres of the road to start from; None: random start
    rise: float = 1.0  # metres to which the SDF of that start is limited


@dataclass(frozen=True)
class RenderConfig:
    rays: tuple[int, int] = (55, 190)  # rows, columns of training rays
    # least stride of the grid of training rays: 0 is neighbouring pixels, 1 the whole image
    spread: float = 0.0
    samples: int = 256  # intervals a ray
    eval_rays: tuple[int, int] = (176, 608)
    eval_samples: int = 256
    alpha: str = "neus"  # neus | volsdf | density
    variance: float = 0.1  # start of the learnt sharpness: inv_s = exp(10 variance)
    sharpen: tuple[float, float] | None = (
        None  # inv_s at the first and last step instead of learning it
    )
    anneal_steps: int = 5000  # steps until the cosine in NeuS alpha is fully used
    backdrop: bool = (
        False  # rays that hit nothing see the far end of the volume, instead of no depth
    )
    # metres that rays go on beyond the volume's sides (x), ends (y) and floor (z), where its border
    # goes on: a backdrop just behind a surface would do instead of the surface
    margin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    background: str = "random"  # random | black


@dataclass(frozen=True)
class LossConfig:
    photometric: str = "mvs"  # mvs | mvs_combined | reprojection
    automask: bool = True
    weight_photometric: float = 1.0
    weight_color: float = 0.1
    weight_eikonal: float = 0.1
    weight_hessian: float = 0.1
    compact_hessian: bool = True  # diagonal second differences over one node instead of two
    weight_sparsity: float = 0.005
    sparsity: str = "soft"  # soft | smooth | hard | adaptive
    sparsity_pitch: float | None = None  # metres between the points it reads; None: the nodes'
    weight_edge: float = 0.0
    weight_semantic: float = 0.0
    semantic: str = "ce"  # ce | bce


@dataclass(frozen=True)
class OptimConfig:
    steps: int = 69_504  # 24 epochs of KITTI, 2,896 steps each on eight GPUs
    batch: int = 1  # of one process
    accumulate: int = 1
    lr: float = 1e-3
    backbone_factor: float = 0.1
    weight_decay: float = 0.01
    clip: float = 35.0  # gradient norm
    warmup: int = 1000
    warmup_lr: float = 1e-6
    schedule: str = "cosine"  # cosine | step
    min_lr: float = 1e-6
    drop_at: float = 0.75  # step schedule: lr / 10 after this share of the steps and the warm-up
    bf16: bool = False  # autocast backbone and encoder to bfloat16
    seed: int = 42
    workers: int = 4
    validate_every: int = 5000
    validate_frames: int = 32
    picture_every: int = 500
    save_every: int = 1000


@dataclass(frozen=True)
class QuirkConfig:
    """Where the published code computes something else than it says (spec section 13).

    The published presets switch these on, since their checkpoints were trained with them; nobody
    else should. What published checkpoints need and does no harm is always done: plane nodes at i/n
    (13.2), SDF and colour at interval starts (13.4), the epsilons of compositing and of rays (13.5
    to 13.7), halved differences at the volume's border (13.9). The clip of depth to the batch's
    nearest and farthest sample (13.8) is left out: a ray's depth is a mean of its own samples, so
    it never bites. The quirks of the evaluation scripts are in protocols.py.
    """

    transposed_bev_grid: bool = False  # 13.1: BEV node (h, w) attends around (w, h)
    white_256: bool = False  # 13.13: images that supervise are bytes / 256, white is 255/256
    pixels_over_size: bool = False  # 13.12: the same images are read at u (W - 1) / W instead of u
    # height, width of the padded input over the cropped image before scaling, as the published
    # configuration rounds it; None: exact
    pad_rate: tuple[float, float] | None = None


@dataclass(frozen=True)
class Config:
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


def override(config: Config, overrides: list[str]) -> Config:
    """The configuration with `section.field=value` changes.

    Raises InputError for an unknown section or field (naming the nearest), or for a value of the
    wrong type.
    """
    for text in overrides:
        config = change(config, text)
    return config


def to_dict(config: Config) -> dict:
    """Plain nested dictionaries, for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: dict) -> Config:
    """The inverse of `to_dict`, also after a trip through JSON.

    Raises InputError for fields this version lacks.
    """
    encoder, quirks = dict(values.get("encoder", {})), dict(values.get("quirks", {}))
    if "transposed_bev_grid" in encoder:  # where it was before quirks had a section of their own
        quirks["transposed_bev_grid"] = encoder.pop("transposed_bev_grid")
    values = values | {"encoder": encoder, "quirks": quirks}
    sections = {}
    for entry in dataclasses.fields(Config):
        if entry.name == "preset":
            continue
        kind = entry.default_factory
        given = values.get(entry.name, {})
        unknown = set(given) - {f.name for f in dataclasses.fields(kind)}
        if unknown:
            raise InputError(
                f"the saved configuration has {entry.name}.{sorted(unknown)[0]}, which this "
                "version does not know"
            )
        sections[entry.name] = kind(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        )
    return Config(preset=values.get("preset", "kitti"), **sections)
