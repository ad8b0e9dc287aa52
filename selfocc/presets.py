"""The presets: what each data set, task and machine changes in the settings of config.py.

A preset is written as after `--set`, and differs from another one, or from the defaults, in that.
"""

from dataclasses import replace

from selfocc import InputError
from selfocc.config import Config
from selfocc.settings import change, nearest

PRESETS: dict[str, tuple[str, Config]] = {}


def _preset(name: str, summary: str, base: str | None, changes: str) -> None:
    """Register the preset that changes this of another one."""
    config = change(PRESETS[base][1] if base else Config(), changes.split())
    PRESETS[name] = summary, replace(config, preset=name)


_preset("kitti", "SemanticKITTI occupancy as published (8 GPUs, 24 epochs)", None, """
    data.dataset=kitti data.crop=352,1216 data.pad=352,1216
    loss.sparsity_pitch=0.4
    quirks.white_256=true quirks.pixels_over_size=true
""")  # fmt: skip

_preset("kitti_novel_depth", "SemanticKITTI, depth of views ahead, as published", "kitti", """
    data.crop=370,1216 data.pad=384,1216 data.anchor_input=0.5 data.anchor_past=0
    loss.weight_hessian=0.01 loss.compact_hessian=false loss.weight_sparsity=0
    quirks.pad_rate=1.038,1
""")  # fmt: skip

# 24 epochs of 4976 steps
_preset("kitti_raw", "KITTI raw depth, stereo and video, as published", "kitti", """
    data.dataset=kitti_raw data.crop=370,1216 data.scale=0.84 data.pad=320,1024
    data.anchor_input=1 data.past=1,5 data.future=1,5 data.source=1,5 data.distance=straight
    data.stereo_source=true
    field.colors=0
    render.rays=44,152
    loss.weight_color=0 loss.weight_hessian=0 loss.weight_sparsity=0 loss.weight_edge=0.01
    optim.lr=1e-4 optim.schedule=step optim.steps=119424
    quirks.pad_rate=0.8649,0.8421
""")  # fmt: skip

# 12 epochs of 3516 steps
_preset("nuscenes", "nuScenes occupancy and semantics (Occ3D) as published (8 GPUs, 12 epochs)",
        None, """
    data.dataset=nuscenes data.crop=768,1600 data.scale=0.5 data.pad=384,800
    data.mean=123.675,116.28,103.53 data.std=58.395,57.12,57.375
    data.anchor_past=0.5 data.past=0.4,30 data.future=0.4,30 data.source=0.4,30
    data.distance=straight data.neighbours=composite data.label_map=openseed21
    volume.box=-40,-40,-1,40,40,5.4 volume.nodes=257,257,25 volume.ground=0
    field.classes=21
    render.rays=48,100 render.eval_rays=450,800
    loss.photometric=mvs_combined loss.weight_hessian=0.01 loss.compact_hessian=false
    loss.weight_sparsity=0 loss.weight_semantic=0.1
    optim.lr=1e-4 optim.schedule=step optim.steps=42192
    quirks.white_256=true quirks.pixels_over_size=true
""")  # fmt: skip

_preset("nuscenes_bev", "the same with one bird's-eye plane, as published", "nuscenes", """
    encoder.kind=bev
    loss.semantic=bce loss.weight_sparsity=0.001 loss.sparsity_pitch=0.4
    quirks.transposed_bev_grid=true
""")  # fmt: skip

_preset("nuscenes_novel_depth", "nuScenes, depth of views ahead, as published (24 epochs)",
        "nuscenes", """
    data.volume_frame=lidar data.past=0.4,10 data.future=0.4,10 data.source=0.4,10 data.label_map=
    volume.box=-51.2,-51.2,-4,51.2,51.2,5 volume.nodes=257,257,31 volume.ground=-1.84
    field.classes=0
    loss.weight_semantic=0
    optim.steps=84384
""")  # fmt: skip

_preset("nuscenes_depth", "nuScenes depth as published (24 epochs)", "nuscenes_novel_depth", """
    data.crop=896,1600 data.target_crop=900,1600 data.pad=448,800
    data.anchor_input=1 data.past=0.4,6 data.future=0.4,6 data.source=0.4,6
    field.colors=0
    loss.weight_color=0 loss.weight_hessian=0 loss.weight_edge=0.01
""")  # fmt: skip

# Only the input's own frame can be swept. VolSDF learns faster: NeuS has no gradient where nothing
# is seen from its front. A truncated SDF is free space only if it is sharp (render.sharpen), and
# second differences would undo it. An interval is read at its end: with so few samples its start
# leaves surfaces too near. Nodes half a metre apart: of those a metre apart even the exact SDF
# renders soft depth. Planes of every fourth, as what is narrow comes from the lift.
_preset("synthetic", "embedded street: ten minutes on two CPU cores", None, """
    data.scenes_val=4 data.anchor_input=1 data.future=0.4,25 data.source=0.8,10
    volume.nodes=97,97,17 volume.voxel=2 volume.crop_margins=false volume.threshold=0.15
    backbone.depth=18 backbone.width=32 backbone.norm=local backbone.weights=none
    backbone.frozen_stem=false
    encoder.dim=32 encoder.heads=2 encoder.layers=1 encoder.points_cross=2,4,4
    encoder.points_self=2 encoder.dropout=0 encoder.lift=true encoder.plane_scale=0.1
    encoder.stride=4,4
    field.hidden=32 field.ground=-1.73
    render.rays=16,54 render.spread=0.6 render.samples=64 render.eval_rays=48,160
    render.eval_samples=96 render.bend=0.85 render.read=1 render.alpha=volsdf
    render.sharpen=20,20 render.backdrop=true render.margin=0,25.6,1.6 render.margin_top=6
    loss.automask=false loss.weight_eikonal=0.001 loss.weight_hessian=0.004
    loss.weight_sparsity=0.0005 loss.sparsity_pitch=0.8 loss.weight_sweep=1
    optim.steps=365 optim.sweep_steps=250 optim.batch=3 optim.accumulate=2 optim.lr=2.2e-3
    optim.backbone_factor=1 optim.warmup=50 optim.workers=1 optim.clip=5 optim.validate_every=100000
    optim.validate_frames=8 optim.picture_every=200 optim.save_every=200
""")  # fmt: skip

_preset("street", "embedded streets of many kinds, for hours on two CPU cores", "synthetic", """
    data.looks=1 data.scenes=200 data.scenes_val=8
    optim.steps=16000 optim.sweep_steps=8000 optim.accumulate=1 optim.lr=1.8e-3 optim.warmup=100
    optim.validate_every=1000 optim.picture_every=500 optim.save_every=100
""")  # fmt: skip

_preset("synthetic_surround", "embedded street seen by six cameras", "synthetic", """
    data.rig=surround data.scenes=16 data.scenes_val=4 data.anchor_input=0.5 data.crop=96,160
    data.pad=96,160
    volume.box=-40,-40,-1,40,40,5.4 volume.nodes=81,81,17 volume.voxel=1 volume.ground=0
    volume.threshold=0.15
    encoder.stride=1,1
    field.ground=0
    render.rays=16,26 render.samples=48 render.bend=0 render.read=0 render.sharpen=5,12
    render.eval_rays=48,80 render.margin=0,0,0 render.margin_top=0
    loss.weight_hessian=0.01 loss.weight_sparsity=0.005 loss.sparsity_pitch=none loss.weight_sweep=0
    optim.steps=1750 optim.sweep_steps=0 optim.batch=2 optim.accumulate=1 optim.lr=1.5e-3
""")  # fmt: skip

# What moves along with the camera looks infinitely far away, unless it is masked.
_preset("street_kitti",
        "KITTI at a quarter of its resolution, single drives; to go on from street (--init)",
        "street", """
    data.dataset=kitti data.crop=352,1216 data.scale=0.25 data.pad=96,320 data.target_scale=0.25
    data.source=0.5,10
    render.eval_rays=44,152
    loss.automask=true loss.weight_sparsity=0 loss.weight_edge=0.02
    optim.steps=100 optim.sweep_steps=60 optim.lr=2e-4 optim.warmup=10
""")  # fmt: skip

_preset("street_kitti_raw", "the same for KITTI raw", "street_kitti", """
    data.dataset=kitti_raw
""")  # fmt: skip

_preset("posed", "your own footage, ahead of a camera; to go on from street (--init)",
        "street_kitti", """
    data.dataset=posed data.crop=96,320 data.scale=1 data.target_scale=1 data.fit=horizon
    render.eval_rays=48,160
""")  # fmt: skip

_preset("posed_surround", "your own footage, around the cameras of a rig", "synthetic_surround", """
    data.dataset=posed data.fit=horizon data.anchor_input=1 data.source=0.4,30
    loss.automask=true
""")  # fmt: skip

_preset("nuscenes_small", "nuScenes at an eighth of its resolution, for single scenes and CPUs",
        "synthetic_surround", """
    data.dataset=nuscenes data.crop=768,1600 data.scale=0.125 data.pad=96,224
    data.target_scale=0.125 data.anchor_input=1 data.source=0.4,30 data.distance=straight
    data.neighbours=composite data.one_sided=true
    loss.photometric=mvs_combined loss.automask=true
""")  # fmt: skip

# how a network of preset street reads real drives
REAL = {"kitti": "street_kitti", "kitti_raw": "street_kitti_raw", "posed": "posed"}


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


def reading(config: Config, dataset: str | None) -> Config:
    """The configuration of a network that is to see another data set: one of preset street reads
    images, and renders depth, as the presets do with which it would learn from those.
    """
    if config.preset != "street" or dataset not in REAL:
        return config
    real = PRESETS[REAL[dataset]][1]
    render = replace(config.render, eval_rays=real.render.eval_rays)
    return replace(config, data=real.data, render=render)
