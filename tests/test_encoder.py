"""The encoder against the published record, and what must hold for any batch of cameras."""

import pytest
import torch

from selfocc.config import Config, EncoderConfig, VolumeConfig
from selfocc.encoder import Encoder, fourier_features, project_points
from selfocc.geometry import image_projection
from selfocc.published import published_names
from tests import goldens

SIZE = (64, 96)
VOLUME = VolumeConfig(box=(-8.0, -8.0, -1.0, 8.0, 8.0, 3.0), nodes=(9, 11, 5))


def published_weights(state: dict, settings: Config) -> dict:
    """The encoder's state dict from the published names."""
    names = {
        theirs: ours.removeprefix("encoder.")
        for theirs, ours in published_names(settings).items()
        if ours and ours.startswith("encoder.")
    }
    weights = {ours: state[theirs] for theirs, ours in names.items()}
    return {name: w[0] if name.startswith("queries") else w for name, w in weights.items()}


@pytest.fixture(scope="module", params=["tpv_mono", "bev_surround"])
def record(request):
    """Encoder with published weights, its arguments, and the published outputs and gradients."""
    tpv = request.param == "tpv_mono"
    nodes = (21, 17, 7) if tpv else (19, 15, 7)
    inputs, outputs, gradients = (
        {
            k: torch.from_numpy(v)
            for k, v in goldens.load(f"{request.param}/{name}.npz").items()
            if v.dtype.kind in "fiub"
        }
        for name in ("inputs", "outputs_f32", "grads_f32")
    )
    box = tuple(inputs["aabb"].tolist())
    config = EncoderConfig(
        kind="tpv" if tpv else "bev", dim=48, heads=6, layers=2, points_self=5 if tpv else 4,
        points_cross=(4, 6, 7) if tpv else (5, 0, 0),
    )  # fmt: skip
    lidar_to_image = inputs["meta.lidar2img"]
    volume = VolumeConfig(box=box, nodes=nodes)
    encoder = Encoder(config, volume, len(lidar_to_image), transposed=True).eval()
    state = torch.load(goldens.path(f"{request.param}/state_dict.pth"), weights_only=True)
    settings = Config(encoder=config, volume=volume)
    encoder.load_state_dict(published_weights(state["state_dict"], settings))
    # the record has only the product of intrinsics and pose, in pixels before scaling
    scale = inputs["meta.scale_rate"].item()
    intrinsics = torch.diag(torch.tensor([scale, scale, 1.0], dtype=torch.float64))
    intrinsics = intrinsics.expand(1, len(lidar_to_image), 3, 3)
    valid = tuple((inputs["meta.img_shape"] * scale).int().tolist())
    image_size = tuple(inputs["input_imgs"].shape[3:])
    arguments = (intrinsics, torch.linalg.inv(lidar_to_image)[None], image_size, valid)
    return encoder, arguments, outputs, published_weights(gradients, settings) | gradients


def features(outputs) -> list[torch.Tensor]:
    return [outputs[f"fpn.{level}"][None].clone().requires_grad_() for level in range(4)]


def assert_near(ours, theirs, tolerance, name):
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error < tolerance, f"{name}: {error:.1e} of the largest value"


def planes_of(outputs, name, planes):
    return [
        outputs[f"{name}.{i}"] if len(planes) == 3 else outputs[name] for i in range(len(planes))
    ]


def test_published_positional_encoding(record):
    encoder, _, outputs, _ = record
    theirs = torch.cat(planes_of(outputs, "pos_enc", encoder.planes))
    # the published angles are float32, up to 3217
    assert_near(encoder.positional_encoding(), theirs, 1e-3, "pos_enc")


def test_published_point_sampling(record):
    encoder, (intrinsics, pose, image_size, valid_size), outputs, _ = record
    projection = image_projection(intrinsics, pose)
    for plane in encoder.planes:
        points, visible = project_points(
            getattr(encoder, f"pillars_{plane}"), projection, image_size, valid_size
        )
        name = f"point_sampling.{plane if len(encoder.planes) == 3 else 'bev'}"
        seen = outputs[f"{name}.mask"][:, 0]
        assert torch.equal(visible[0], seen)
        assert_near(points[0][seen], outputs[f"{name}.ref_cam"][:, 0][seen], 1e-5, plane)


def test_published_steps_of_a_layer(record):
    encoder, arguments, outputs, _ = record
    seen = {}

    def keep(name):
        return lambda _module, inputs, output: seen.__setitem__(name, (inputs[0], output))

    layer = encoder.layers[0]
    modules = {
        "self": layer.self_attention,
        "norm0": layer.norms[0],
        "norm1": layer.norms[1],
        "norm2": layer.norms[2],
    }
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    encoder(features(outputs), *arguments)
    for handle in handles:
        handle.remove()
    assert_near(seen["norm0"][0], outputs["encoder.layer0.self_attn"], 1e-4, "self attention")
    cross = torch.cat(planes_of(outputs, "encoder.layer0.cross_attn", encoder.planes), dim=1)
    assert_near(seen["norm1"][0], cross, 1e-4, "cross attention")
    assert_near(seen["norm2"][0], outputs["encoder.layer0.ffn"], 1e-4, "ffn")
    for k in range(3):
        assert_near(seen[f"norm{k}"][1], outputs[f"encoder.layer0.norm{k}"], 1e-4, f"norm{k}")


def test_published_planes_and_gradients(record):
    encoder, arguments, outputs, gradients = record
    images = features(outputs)
    planes = encoder(images, *arguments)
    for i, (ours, theirs) in enumerate(
        zip(planes, planes_of(outputs, "representation", encoder.planes), strict=True)
    ):
        assert_near(ours.flatten(1, 2), theirs, 2e-4, f"representation.{i}")
    encoder.zero_grad()
    upstream = [gradients[f"@representation.{i}"].view_as(p) for i, p in enumerate(planes)]
    torch.autograd.backward(planes, upstream)
    for level, image in enumerate(images):
        assert_near(image.grad, gradients[f"@ms_img_feats.{level}"], 1e-2, f"image level {level}")
    for name, parameter in encoder.named_parameters():
        assert_near(parameter.grad, gradients[name], 1e-2, name)


def rig(batch: int, cameras: int, seed: int = 3, dim: int = 12):
    """Random features and cameras near the middle of the volume that look outwards."""
    generator = torch.Generator().manual_seed(seed)
    images = [
        torch.randn(batch, cameras, dim, SIZE[0] // s, SIZE[1] // s, generator=generator)
        for s in (4, 8, 16, 32)
    ]
    intrinsics = torch.tensor([[60.0, 0, 47.5], [0, 60, 31.5], [0, 0, 1]], dtype=torch.float64)
    yaw = torch.rand(batch, cameras, generator=generator, dtype=torch.float64) * 6.28
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
    pose = torch.stack(  # columns: right, down, forward, position
        [
            yaw.sin(),
            zero,
            yaw.cos(),
            yaw.sin(),
            -yaw.cos(),
            zero,
            yaw.sin(),
            zero,
            zero,
            -one,
            zero,
            one,
            zero,
            zero,
            zero,
            one,
        ],
        dim=-1,
    ).unflatten(-1, (4, 4))
    return images, intrinsics.expand(batch, cameras, 3, 3), pose, SIZE, SIZE


def build(kind="tpv", cameras=2, transposed=False, **changes) -> Encoder:
    """An encoder whose attention weights are not at their start, where they ignore the queries."""
    torch.manual_seed(0)
    settings = {
        "dim": 12,
        "heads": 3,
        "layers": 2,
        "points_cross": (3, 4, 5),
        "points_self": 3,
        "dropout": 0.0,
    }
    encoder = Encoder(
        EncoderConfig(kind=kind, **(settings | changes)), VOLUME, cameras, transposed=transposed
    )
    for name, parameter in encoder.named_parameters():
        if name.endswith(("offsets.weight", "weights.weight", "bias")):
            torch.nn.init.normal_(parameter, std=0.3)
    return encoder


@pytest.mark.parametrize("kind", ["tpv", "bev"])
def test_a_batch_equals_its_items(kind):
    encoder = build(kind)
    images, intrinsics, pose, *sizes = rig(3, 2)
    together = encoder(images, intrinsics, pose, *sizes)
    shapes = [(9, 11), (5, 9), (11, 5)][: len(together)]
    assert [tuple(p.shape) for p in together] == [(3, *shape, 12) for shape in shapes]
    for i in range(3):
        alone = encoder(
            [level[i : i + 1] for level in images], intrinsics[i : i + 1], pose[i : i + 1], *sizes
        )
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i : i + 1], b, rtol=0, atol=2e-5)


def test_queries_no_camera_sees_get_only_the_bias():
    encoder = build(layers=1)
    layer = encoder.layers[0]
    images, intrinsics, pose, *sizes = rig(1, 2)
    seen = {}
    layer.cross["hw"].register_forward_hook(lambda _m, _i, output: seen.__setitem__("out", output))
    encoder(images, intrinsics, pose, *sizes)
    _, visible = project_points(encoder.pillars_hw, image_projection(intrinsics, pose), *sizes)
    hidden = ~visible[0].any(-1).any(0)
    assert 0 < hidden.sum() < 99
    bias = layer.cross["hw"].output.bias
    torch.testing.assert_close(
        seen["out"][0, hidden], bias.expand(int(hidden.sum()), -1), rtol=0, atol=0
    )
    assert (seen["out"][0, ~hidden] - bias).abs().amax(dim=1).min() > 1e-3


def test_padding_is_not_seen():
    points = torch.tensor([[[0.0, 0.0, 2.0], [0.9, 0.0, 2.0], [-0.9, 0.0, 2.0], [0.0, 0.0, -2.0]]])
    projection = torch.eye(4, dtype=torch.float64)
    projection[:3, :3] = torch.tensor([[40.0, 0, 40], [0, 40, 30], [0, 0, 1]], dtype=torch.float64)
    fractions, visible = project_points(points, projection[None, None], (64, 100), (60, 50))
    assert visible.tolist() == [
        [[[True, False, True, False]]]
    ]  # the second is at u = 58, in the padding
    torch.testing.assert_close(fractions[0, 0, 0, :3, 0], torch.tensor([0.4, 0.58, 0.22]))
    torch.testing.assert_close(fractions[0, 0, 0, :3, 1], torch.full((3,), 30 / 64))


def test_fourier_features():
    features = fourier_features(3, 2)  # coordinates 0, 1/2, 1; angles a pi/2 and a pi
    root = 0.5**0.5
    expected = torch.tensor([[0, 1, 0, 1], [root, root, 1, 0], [1, 0, 0, -1.0]])
    torch.testing.assert_close(features, expected, atol=1e-7, rtol=0)


def test_bev_reads_its_own_cell_unless_transposed():
    nodes = torch.stack(
        torch.meshgrid((torch.arange(9) + 0.5) / 9, (torch.arange(11) + 0.5) / 11, indexing="ij"),
        -1,
    )
    torch.testing.assert_close(
        build("bev").self_reference[0, :, 0, 0], nodes.flip(-1).flatten(0, 1)
    )
    transposed = build("bev", transposed=True).self_reference[0, :, 0, 0].view(9, 11, 2)
    torch.testing.assert_close(transposed[2, 5], torch.tensor([2 / 8, 5 / 10]))


def test_initial_offsets():
    torch.manual_seed(0)
    encoder = Encoder(
        EncoderConfig(dim=12, heads=4, layers=1, points_cross=(2, 2, 2), points_self=3), VOLUME, 1
    )
    layer = encoder.layers[0]
    directions = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    attention = layer.self_attention
    spread = attention.offsets.bias.view(4, 3, 3, 2)
    for point in range(3):
        torch.testing.assert_close(spread[:, 1, point], directions * (point + 1), atol=1e-6, rtol=0)
    fixed = layer.cross["zh"].offsets.bias.view(4, 4, 2, 2)
    torch.testing.assert_close(fixed[:, 2, 1], directions, atol=1e-6, rtol=0)
    assert (
        not attention.offsets.weight.any()
        and not attention.weights.weight.any()
        and not attention.weights.bias.any()
    )
    assert not attention.value.bias.any() and not attention.output.bias.any()


def test_gradients_reach_every_parameter_and_are_right():
    encoder = build(layers=1).double()
    images, *cameras = rig(1, 2)
    images = [level.double().requires_grad_() for level in images]
    torch.manual_seed(1)
    weights = [torch.randn_like(p) for p in encoder(images, *cameras)]

    def loss():
        return sum((w * p).sum() for w, p in zip(weights, encoder(images, *cameras), strict=True))

    loss().backward()
    for name, tensor in [
        *encoder.named_parameters(),
        *((f"image {i}", level) for i, level in enumerate(images)),
    ]:
        direction = torch.randn_like(tensor)
        slope = (tensor.grad * direction).sum()
        assert slope != 0, name
        with torch.no_grad():
            step = 1e-7
            tensor += step * direction
            above = loss()
            tensor -= 2 * step * direction
            below = loss()
            tensor += step * direction
        torch.testing.assert_close(
            (above - below) / (2 * step), slope, rtol=1e-4, atol=1e-4, msg=name
        )


def test_autocast_keeps_the_projection_exact():
    encoder = build()
    images, intrinsics, pose, *sizes = rig(2, 2)
    exact = encoder(images, intrinsics, pose, *sizes)
    projection = image_projection(intrinsics, pose)
    fractions, visible = project_points(encoder.pillars_hw, projection, *sizes)
    with torch.autocast("cpu", torch.bfloat16):
        low = encoder(images, intrinsics, pose, *sizes)
        same_fractions, same_visible = project_points(encoder.pillars_hw, projection, *sizes)
    assert torch.equal(fractions, same_fractions) and torch.equal(visible, same_visible)
    for a, b in zip(exact, low, strict=True):
        assert (a - b).abs().mean() < 0.05 * a.abs().mean()


def test_checkpoints_hold_parameters_only():
    encoder = build()
    assert encoder.state_dict().keys() == dict(encoder.named_parameters()).keys()
