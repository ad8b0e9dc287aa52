"""The published numbers beside ours, stage by stage: python -m tests.parity

A checkpoint comes in by the import path, images and cameras as a `Batch`; what every stage computes
is compared with the record. An error is the largest difference over the largest value.
"""

import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels import naive
from selfocc import InputError, published
from selfocc.batch import Batch, Frames
from selfocc.commandline import run
from selfocc.config import Config
from selfocc.encoder import project_points
from selfocc.field import shifted_grid_sdf
from selfocc.geometry import image_projection, node_spacing
from selfocc.losses import objective, photometric_scene
from selfocc.model import SelfOcc
from tests import goldens

CASES = {
    "tpv_mono": ("kitti", "21,17,7", "6,20"),
    "bev_surround": ("nuscenes_bev", "19,15,7", "4,8"),
}
LOSSES = {
    "ReprojLossMonoMultiNew": "photometric",
    "ReprojLossMonoMultiNewCombine": "photometric",
    "RGBLossMS": "color",
    "EikonalLoss": "eikonal",
    "SecondGradLoss": "hessian",
    "SoftSparsityLoss": "sparsity",
    "SemLossMS": "semantic",
}


@dataclass
class Record:
    """What was recorded of the published implementation."""

    name: str
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]

    @classmethod
    def load(cls, name: str) -> "Record":
        parts = (goldens.load(f"{name}/{p}.npz") for p in ("inputs", "outputs_f32", "grads_f32"))
        return cls(name, *({k: torch.as_tensor(v) for k, v in part.items()} for part in parts))

    def planes(self, name: str, count: int) -> list[Tensor]:
        return [self.outputs[f"{name}.{i}" if count == 3 else name] for i in range(count)]


def load_model(record: Record) -> SelfOcc:
    """The model as the import path gives it, in evaluation mode."""
    preset, nodes, rays = CASES[record.name]
    height, width = record.inputs["meta.img_shape"].tolist()
    settings, state, _ = published.import_published(
        goldens.path(f"{record.name}/state_dict.pth"),
        preset,
        [
            f"volume.nodes={nodes}",
            f"render.rays={rays}",
            "render.samples=64",
            "loss.sparsity_pitch=3.2",
            f"data.crop={height},{width}",
            f"data.scale={record.inputs['meta.scale_rate'].item()}",
            "backbone.weights=none",
        ],
    )
    model = SelfOcc(settings)
    model.load_state_dict(state)
    return model.eval()


def load_batch(inputs: dict[str, Tensor]) -> Batch:
    """Images and cameras of the record; only products of intrinsics and poses were recorded."""

    def frames(images: Tensor, camera_to_volume: Tensor) -> Frames:
        eye = torch.eye(3, dtype=torch.float64).expand(*camera_to_volume.shape[:-2], 3, 3)
        return Frames(images.flip(-3) * (256 / 255), eye, camera_to_volume)  # from BGR / 256

    target = inputs["meta.temImg2lidar"][None]
    to_sources = torch.stack([inputs[f"meta.img2{t}Img"] for t in ("prev", "next")])[None]
    images = torch.stack([inputs[f"{t}_imgs"] for t in ("prev", "next")], dim=1)
    scale = inputs["meta.scale_rate"].item()
    scaled = torch.diag(torch.tensor([scale, scale, 1.0], dtype=torch.float64))
    lidar_to_image = inputs["meta.lidar2img"][None]
    semantics = inputs.get("meta.sem")
    return Batch(
        ["record"],
        inputs["input_imgs"],
        scaled.expand(*lidar_to_image.shape[:2], 3, 3),
        torch.linalg.inv(lidar_to_image),
        frames(inputs["curr_imgs"], target),
        frames(images, target[:, None] @ torch.linalg.inv(to_sources)),
        semantics=None if semantics is None else semantics[None],
    )


class Errors(dict[str, float]):
    """Worst error of each stage."""

    def add(self, stage: str, ours: Tensor, theirs: Tensor):
        ours, theirs = ours.detach().double().flatten(), theirs.double().flatten()
        assert ours.shape == theirs.shape, stage
        error = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()
        self[stage] = max(self.get(stage, 0.0), error)


def compare(record: Record) -> Errors:
    """The worst error of every stage, forward and backward."""
    model, batch, errors = load_model(record), load_batch(record.inputs), Errors()
    out = record.outputs
    seen = _watch(model)
    features: list[Tensor] = []
    model.fpn.register_forward_hook(lambda _m, _i, maps: features.extend(_keep(maps)))
    volume = model.see(batch).volume
    volume.retain_grad()
    planes = _keep(seen["planes"])
    count = len(planes)

    for level in range(4):
        errors.add("backbone", seen["stages"][level], out[f"backbone.{level}"])
        errors.add("FPN", features[level], out[f"fpn.{level}"])
    encoding = torch.cat(record.planes("pos_enc", count))
    errors.add("positional encoding", model.encoder.positional_encoding(), encoding)
    steps = {
        "self attention": "norm0.in",
        "first norm": "norm0.out",
        "image attention": "norm1.in",
        "second norm": "norm1.out",
        "MLP": "norm2.in",
        "third norm": "norm2.out",
    }
    recorded = {
        "norm0.in": out["encoder.layer0.self_attn"],
        "norm1.in": torch.cat(record.planes("encoder.layer0.cross_attn", count), dim=1),
        "norm2.in": out["encoder.layer0.ffn"],
        **{f"norm{k}.out": out[f"encoder.layer0.norm{k}"] for k in range(3)},
    }
    for stage, name in steps.items():
        errors.add(stage, seen[name], recorded[name])
    projection = image_projection(batch.intrinsics, batch.camera_to_volume)
    size = tuple(batch.images.shape[-2:])
    for plane in model.encoder.planes:
        points = getattr(model.encoder, f"pillars_{plane}")
        fractions, visible = project_points(points, projection, size, size)
        name = f"point_sampling.{plane if count == 3 else 'bev'}"
        errors.add("visibility", visible, out[f"{name}.mask"])
        theirs = out[f"{name}.ref_cam"][:, 0]
        errors.add("projection", fractions[visible], theirs[visible[0]])
    for ours, theirs in zip(planes, record.planes("representation", count), strict=True):
        errors.add("planes", ours, theirs)
    errors.add("volume", swap_volume(volume), out["field_volume.density_color"])
    _compare_differences(model.config, volume, record, errors)

    view = model.render(volume, batch.target, record.inputs["rays"], 64, keep_samples=True)
    view.weights.retain_grad()
    cameras = range(view.depth.shape[1])
    for name, ours in (("ts", view.proposals), ("sample_sdf", view.sdf), ("weights", view.weights)):
        theirs = torch.cat([out[f"out.{name}.{n}"] for n in cameras])
        stage = {"ts": "samples", "sample_sdf": "SDF at samples"}.get(name, name)
        errors.add(stage, ours, theirs)
    errors.add("depth", view.depth, out["out.ms_depths.0"])
    errors.add("opacity", view.opacity, out["out.ms_accs.0"])
    white = 255 / 256
    shown = (white * view.color).clamp(0, 1)  # in evaluation mode the published one clamps
    errors.add("colour", shown.flip(-1), out["out.ms_colors.0"])
    view = replace(view, color=shown / white)
    if view.semantics is not None:
        errors.add("semantics", view.semantics, out["out.sem.0"])

    shape = out["out.uniform_sdf"].shape
    shift = out["rand_like.0"].view(1, *shape, 3)
    uniform = shifted_grid_sdf(volume, model.config.volume.box, tuple(shape), shift)
    errors.add("uniform SDF", uniform, out["out.uniform_sdf"])
    scene = photometric_scene(batch, view.pixels, model.config.quirks)
    losses = objective(model.config, batch, volume, view, scene, shift)
    for theirs, ours in LOSSES.items():
        if f"loss.{theirs}" in out:
            errors.add(f"loss: {ours}", losses[ours], out[f"loss.{theirs}"])
    total = sum(losses.values())
    errors.add("loss: total", total, out["loss.total"])
    total.backward()
    _compare_gradients(model, volume, planes, features, view, record, errors)
    return errors


def swap_volume(volume: Tensor) -> Tensor:
    """A volume [B, C, H, W, Z] with blue, green and red where ours has red, green and blue."""
    return volume[:, [0, 3, 2, 1, *range(4, volume.shape[1])]]


def _keep(tensors: list[Tensor]) -> list[Tensor]:
    for tensor in tensors:
        tensor.retain_grad()
    return tensors


def _watch(model: SelfOcc) -> dict:
    """Filled with what the model's stages give, when it runs."""
    seen = {}

    def keep(name, module):
        def hook(_module, inputs, output):
            seen.setdefault(f"{name}.in", inputs[0])
            seen.setdefault(f"{name}.out", output)

        module.register_forward_hook(hook)

    for k, norm in enumerate(model.encoder.layers[0].norms):
        keep(f"norm{k}", norm)
    model.backbone.register_forward_hook(lambda _m, _i, output: seen.setdefault("stages", output))
    model.encoder.register_forward_hook(lambda _m, _i, output: seen.setdefault("planes", output))
    return seen


def _compare_differences(settings: Config, volume: Tensor, record: Record, errors: Errors):
    out, spacing = record.outputs, node_spacing(settings.volume.box, settings.volume.nodes)
    gradient = naive.node_gradients(volume[:, 0], spacing)
    errors.add("finite differences", gradient, out["field_volume.gradients"])
    second = naive.node_second_differences(volume[:, 0], spacing, settings.loss.compact_hessian)
    errors.add("second differences", second, out["field_volume.gradients2"])


def _compare_gradients(model, volume, planes, features, view, record: Record, errors: Errors):
    theirs = record.gradients
    grad = view.weights.grad.flatten(2)
    for n in range(grad.shape[1]):
        # the first rays of a camera weigh nothing: gradients of 1 / eps, see the record's README
        first = 3 * view.weights.shape[-1]
        errors.add("d / d weights", grad[0, n, first:], theirs[f"@weights.{n}"][first:])
    errors.add("d / d volume", swap_volume(volume.grad), theirs["@density_color"])
    for i, plane in enumerate(planes):
        name = f"@representation.{i}"
        errors.add("d / d planes", plane.grad, theirs[name])
    for level, image in enumerate(features):
        errors.add("d / d image features", image.grad, theirs[f"@ms_img_feats.{level}"])
    parameters = dict(model.named_parameters())
    names = published.published_names(model.config)
    for name, gradient in theirs.items():
        if name.startswith("@"):
            continue
        ours = parameters.pop(names[name]).grad
        if name.startswith("head.model.field.density_net.3."):
            ours = published.swap_colors(ours, model.config)
        errors.add(f"d / d {name.partition('.')[0]} parameters", ours, gradient)
    trained = [name for name, p in parameters.items() if p.requires_grad]
    assert not trained, f"no record of {trained[0]}"


def table(results: dict[str, Errors]) -> str:
    stages = list(dict.fromkeys(stage for errors in results.values() for stage in errors))
    lines = ["stage".ljust(34) + "".join(name.rjust(14) for name in results)]
    for stage in stages:
        cells = (f"{e[stage]:.1e}" if stage in e else "" for e in results.values())
        lines.append(stage.ljust(34) + "".join(cell.rjust(14) for cell in cells))
    return "\n".join(lines)


def main() -> None:
    if not goldens.FOLDER.exists():
        raise InputError(f"no recorded numbers of the published implementation at {goldens.FOLDER}")
    print(table({name: compare(Record.load(name)) for name in CASES}))


if __name__ == "__main__":
    sys.exit(run(main))
