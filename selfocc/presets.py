"""The presets: what each data set, task and machine changes in the settings of config.py."""

from dataclasses import replace

from selfocc import InputError
from selfocc.config import Config
from selfocc.settings import change, nearest

PRESETS: dict[str, tuple[str, Config]] = {}


def _preset(name: str, summary: str, base: Config, **sections: dict) -> Config:
    """Register a preset that differs from `base` in the fields named, section by section."""
    changes = {s: replace(getattr(base, s), **values) for s, values in sections.items()}
    config = replace(base, preset=name, **changes)
    PRESETS[name] = (summary, config)
    return config


_PUBLISHED = dict(white_256=True, pixels_over_size=True)

_kitti = _preset(
    "kitti",
    "SemanticKITTI occupancy as published (8 GPUs, 24 epochs)",
    Config(),
    data=dict(dataset="kitti", crop=(352, 1216), pad=(352, 1216)),
    loss=dict(sparsity_pitch=0.4),
    quirks=_PUBLISHED,
)

_preset(
    "kitti_novel_depth",
    "SemanticKITTI, depth of views ahead, as published",
    _kitti,
    data=dict(crop=(370, 1216), pad=(384, 1216), anchor_input=0.5, anchor_past=0.0),
    loss=dict(weight_hessian=0.01, compact_hessian=False, weight_sparsity=0.0),
    quirks=dict(pad_rate=(1.038, 1.0)),
)

_preset(
    "kitti_raw",
    "KITTI raw depth, stereo and video, as published",
    _kitti,
    data=dict(
        dataset="kitti_raw",
        crop=(370, 1216),
        scale=0.84,
        pad=(320, 1024),
        anchor_input=1.0,
        past=(1.0, 5.0),
        future=(1.0, 5.0),
        source=(1.0, 5.0),
        distance="straight",
        stereo_source=True,
    ),
    field=dict(colors=0),
    render=dict(rays=(44, 152)),
    loss=dict(weight_color=0.0, weight_hessian=0.0, weight_sparsity=0.0, weight_edge=0.01),
    optim=dict(lr=1e-4, schedule="step", steps=24 * 4976),
    quirks=dict(pad_rate=(0.8649, 0.8421)),
)

_nuscenes = _preset(
    "nuscenes",
    "nuScenes occupancy and semantics (Occ3D) as published (8 GPUs, 12 epochs)",
    Config(),
    data=dict(
        dataset="nuscenes",
        crop=(768, 1600),
        scale=0.5,
        pad=(384, 800),
        mean=(123.675, 116.28, 103.53),
        std=(58.395, 57.12, 57.375),
        anchor_past=0.5,
        past=(0.4, 30.0),
        future=(0.4, 30.0),
        source=(0.4, 30.0),
        distance="straight",
        neighbours="composite",
        label_map="openseed21",
    ),
    volume=dict(box=(-40.0, -40.0, -1.0, 40.0, 40.0, 5.4), nodes=(257, 257, 25), ground=0.0),
    field=dict(classes=21),
    render=dict(rays=(48, 100), eval_rays=(450, 800)),
    loss=dict(
        photometric="mvs_combined",
        weight_hessian=0.01,
        compact_hessian=False,
        weight_sparsity=0.0,
        weight_semantic=0.1,
    ),
    optim=dict(lr=1e-4, schedule="step", steps=12 * 3516),
    quirks=_PUBLISHED,
)

_preset(
    "nuscenes_bev",
    "the same with one bird's-eye plane, as published",
    _nuscenes,
    encoder=dict(kind="bev"),
    loss=dict(semantic="bce", weight_sparsity=0.001, sparsity_pitch=0.4),
    quirks=dict(transposed_bev_grid=True),
)

_nuscenes_novel = _preset(
    "nuscenes_novel_depth",
    "nuScenes, depth of views ahead, as published (24 epochs)",
    _nuscenes,
    data=dict(
        volume_frame="lidar",
        past=(0.4, 10.0),
        future=(0.4, 10.0),
        source=(0.4, 10.0),
        label_map="",
    ),
    volume=dict(box=(-51.2, -51.2, -4.0, 51.2, 51.2, 5.0), nodes=(257, 257, 31), ground=-1.84),
    field=dict(classes=0),
    loss=dict(weight_semantic=0.0),
    optim=dict(steps=24 * 3516),
)

_preset(
    "nuscenes_depth",
    "nuScenes depth as published (24 epochs)",
    _nuscenes_novel,
    data=dict(
        crop=(896, 1600),
        target_crop=(900, 1600),
        pad=(448, 800),
        anchor_input=1.0,
        past=(0.4, 6.0),
        future=(0.4, 6.0),
        source=(0.4, 6.0),
    ),
    field=dict(colors=0),
    loss=dict(weight_color=0.0, weight_hessian=0.0, weight_edge=0.01),
)

_synthetic = _preset(
    "synthetic",
    "embedded street: ten minutes on two CPU cores",
    Config(),
    # frames ahead as targets (anchor_input=0.5) cost depth and, in ten minutes, occupancy too
    data=dict(scenes_val=4, anchor_input=1.0, future=(0.4, 25.0), source=(0.8, 10.0)),
    volume=dict(nodes=(49, 49, 25), voxel=2, crop_margins=False, threshold=0.15),
    backbone=dict(depth=18, width=32, norm="local", weights="none", frozen_stem=False),
    encoder=dict(
        dim=32,
        heads=2,
        layers=1,
        points_cross=(2, 4, 4),
        points_self=2,
        dropout=0.0,
        lift=True,
        plane_scale=0.1,
    ),
    field=dict(hidden=32, ground=-1.73),
    render=dict(
        rays=(16, 54),
        spread=0.6,
        samples=64,
        eval_rays=(48, 160),
        eval_samples=96,
        alpha="volsdf",  # learns faster: NeuS has no gradient where nothing is seen from its front
        sharpen=(5.0, 12.0),
        backdrop=True,
        margin=(0.0, 25.6, 1.6),
    ),
    loss=dict(automask=False, weight_eikonal=0.001, weight_hessian=0.07),
    optim=dict(
        steps=420,
        batch=3,
        accumulate=2,  # more steps with fewer images fill what no camera sees with matter
        lr=2.2e-3,
        backbone_factor=1.0,
        warmup=50,
        workers=1,
        clip=5.0,
        validate_every=100_000,
        validate_frames=8,
        picture_every=200,
        save_every=200,
    ),
)

_depth = _preset(
    "synthetic_depth",
    "the same, tuned for depth: rougher surfaces",
    _synthetic,
    loss=dict(weight_hessian=0.01),
    optim=dict(steps=470),
)

_preset(
    "synthetic_surround",
    "embedded street seen by six cameras",
    _synthetic,
    data=dict(
        rig="surround", scenes=16, scenes_val=4, anchor_input=0.5, crop=(96, 160), pad=(96, 160)
    ),
    volume=dict(box=(-40.0, -40.0, -1.0, 40.0, 40.0, 5.4), nodes=(81, 81, 17), voxel=1, ground=0.0),
    field=dict(ground=0.0),
    render=dict(rays=(16, 26), samples=48, eval_rays=(48, 80), margin=(0.0, 0.0, 0.0)),
    loss=dict(weight_hessian=0.01),
    optim=dict(steps=1750, batch=2, accumulate=1, lr=1.5e-3),
)

_kitti_small = _preset(
    "kitti_small",
    "KITTI at a quarter of its resolution; to go on from runs/synthetic (--init)",
    _depth,
    data=dict(
        dataset="kitti",
        crop=(352, 1216),
        scale=0.25,
        pad=(96, 320),
        target_scale=0.25,
    ),
    render=dict(sharpen=(12.0, 12.0), eval_rays=(44, 152)),
    loss=dict(weight_sparsity=0.0, weight_edge=0.02),
    optim=dict(steps=1000, batch=2, accumulate=1, lr=1e-3),
)

_preset(
    "kitti_raw_small",
    "KITTI raw, slow drives in traffic; to go on from runs/synthetic (--init)",
    _kitti_small,
    data=dict(dataset="kitti_raw", source=(0.5, 3.0), distance="straight"),
    # The lanes beside the car, as far ahead as a metre of motion gives a pixel of parallax. What
    # moves along with the car looks infinitely far away: masked, and ended by the volume's sides.
    volume=dict(box=(-5.2, 0.0, -2.0, 5.2, 25.6, 4.4)),
    render=dict(samples=48, margin=(0.0, 0.0, 0.0)),
    loss=dict(automask=True),
    optim=dict(steps=400, lr=5e-4),
)

_preset(
    "nuscenes_small",
    "nuScenes at an eighth of its resolution, for single scenes and CPUs",
    PRESETS["synthetic_surround"][1],
    data=dict(
        dataset="nuscenes",
        crop=(768, 1600),
        scale=0.125,
        pad=(96, 224),
        target_scale=0.125,
        anchor_input=1.0,
        source=(0.4, 30.0),
        distance="straight",
        neighbours="composite",
        one_sided=True,
    ),
    loss=dict(photometric="mvs_combined", automask=True),
)


def build(preset: str, overrides: list[str] = ()) -> Config:
    """The preset's configuration with `section.field=value` overrides applied.

    Raises InputError for an unknown preset, section or field (naming the nearest), or for a value
    of the wrong type.
    """
    if preset not in PRESETS:
        raise InputError(
            f"unknown preset {preset!r}{nearest(preset, PRESETS)}; presets: {', '.join(PRESETS)}"
        )
    return change(PRESETS[preset][1], overrides)
