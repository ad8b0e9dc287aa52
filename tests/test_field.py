"""Planes to volume, and the volume read at points and grids."""

import math

import pytest
import torch

from selfocc.config import EncoderConfig, FieldConfig, VolumeConfig
from selfocc.field import FieldDecoder, occupancy_grid, sample_sdf, shifted_grid_sdf
from tests import goldens

CASES = {
    "tpv_mono": ("tpv", (21, 17, 7), (-25.6, 0.0, -2.0, 25.6, 51.2, 4.4), 0),
    "bev_surround": ("bev", (19, 15, 7), (-40.0, -40.0, -1.0, 40.0, 40.0, 5.4), 21),
}


def recorded(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.as_tensor(value) for key, value in goldens.load(name).items()}


def golden_decoder(case: str):
    """The recorded outputs, the decoder with the recorded weights in float64, and its planes."""
    kind, nodes, box, classes = CASES[case]
    out = recorded(f"{case}/outputs_f32.npz")
    state = torch.load(goldens.path(f"{case}/state_dict.pth"), weights_only=True)["state_dict"]
    decoder = FieldDecoder(
        FieldConfig(hidden=48, classes=classes),
        EncoderConfig(kind=kind, dim=48),
        VolumeConfig(box=box, nodes=nodes),
    )
    prefix = "head.model.field.density_net."
    decoder.net.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    )
    height, width, depth = nodes
    if kind == "tpv":
        shapes = [(height, width), (depth, height), (width, depth)]
        planes = [out[f"representation.{p}"].unflatten(1, shape) for p, shape in enumerate(shapes)]
    else:
        planes = [out["representation"].unflatten(1, (height, width))]
    return out, decoder.double(), [p.double() for p in planes]


@pytest.mark.parametrize("case", CASES)
def test_volume_is_the_published_one(case):
    out, decoder, planes = golden_decoder(case)
    volume = decoder(planes).float()
    torch.testing.assert_close(volume, out["field_volume.density_color"], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("grid", ["occ", "occ2"])
def test_occupancy_grid_is_the_published_one(case, grid):
    out, _, _ = golden_decoder(case)
    _, _, box, classes = CASES[case]
    extent = tuple(out["occ2.aabb"].tolist()) if grid == "occ2" else None
    volume, shape = out["field_volume.density_color"], tuple(out[f"{grid}.sdf"].shape)
    read = dict(box=box, shape=shape, published=True, extent=extent)
    sdf = occupancy_grid(volume, **read)
    torch.testing.assert_close(sdf[0], out[f"{grid}.sdf"], rtol=1e-4, atol=1e-4)
    if classes:
        logits = [occupancy_grid(v[:, None], **read) for v in volume.unbind(1)[-classes:]]
        labels = torch.cat(logits).argmax(0)
        assert (labels == out[f"{grid}.sem"]).float().mean() > 0.999
    points = out[f"{grid}.xyz"][None]
    torch.testing.assert_close(sample_sdf(volume, box, points), sdf, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_sparsity_grid_is_the_published_one(case):
    out, _, _ = golden_decoder(case)
    _, _, box, _ = CASES[case]
    shape = out["out.uniform_sdf"].shape
    points = out["occ.xyz"] + 3.2 * out["rand_like.0"].view(*shape, 3)
    sdf = sample_sdf(out["field_volume.density_color"], box, points[None])[0]
    torch.testing.assert_close(sdf, out["out.uniform_sdf"], rtol=1e-3, atol=1e-3)


def decoder_for(kind="tpv", ground=None, nodes=(6, 5, 4), classes=2):
    torch.manual_seed(0)
    return FieldDecoder(
        FieldConfig(hidden=8, classes=classes, ground=ground),
        EncoderConfig(kind=kind, dim=8),
        VolumeConfig(box=(-1, 0, -2, 1, 4, 4), nodes=nodes),
    )


def planes_for(kind, nodes=(6, 5, 4), batch=2):
    height, width, depth = nodes
    shapes = (
        [(height, width), (depth, height), (width, depth)] if kind == "tpv" else [(height, width)]
    )
    return [torch.randn(batch, *shape, 8, requires_grad=True) for shape in shapes]


def test_planes_of_every_second_node_are_linear_between():
    settings = VolumeConfig(box=(-1, 0, -2, 1, 4, 4), nodes=(7, 5, 4))
    decoder = FieldDecoder(FieldConfig(hidden=8), EncoderConfig(dim=8, stride=(2, 2)), settings)
    planes = planes_for("tpv", (4, 3, 4))
    sdf = torch.randn(2, 7, 5, 4)
    volume = decoder(planes, (sdf, torch.zeros(2, 4, 3, 4, 2)), torch.zeros(8, 2))
    volume[:, 0] -= sdf
    coarse = decoder_of(decoder)(planes)
    torch.testing.assert_close(volume[:, :, ::2, ::2], coarse, rtol=1e-5, atol=1e-5)
    between = (coarse[:, :, 1:] + coarse[:, :, :-1]) / 2
    torch.testing.assert_close(volume[:, :, 1::2, ::2], between, rtol=1e-5, atol=1e-5)


def decoder_of(fine):
    """The decoder of the planes' own nodes, with the same weights."""
    settings = VolumeConfig(box=(-1, 0, -2, 1, 4, 4), nodes=(4, 3, 4))
    decoder = FieldDecoder(FieldConfig(hidden=8), EncoderConfig(dim=8), settings)
    decoder.load_state_dict(fine.state_dict())
    return decoder


@pytest.mark.parametrize("kind", ["tpv", "bev"])
def test_ground_is_the_start_and_can_be_left(kind):
    decoder, planes = decoder_for(kind, ground=-1.73), planes_for(kind)
    volume = decoder(planes)
    z = torch.linspace(-2, 4, 4)
    torch.testing.assert_close(volume[:, 0], torch.tanh(z + 1.73).expand(2, 6, 5, 4))
    assert volume[:, 1].std() > 0
    volume[:, 0].square().sum().backward()
    assert decoder.net[3].weight.grad[0].abs().sum() > 0


def test_samples_of_a_batch_are_independent():
    decoder, planes = decoder_for(), planes_for("tpv")
    whole = decoder(planes)
    for b in range(2):
        torch.testing.assert_close(decoder([p[b : b + 1] for p in planes]), whole[b : b + 1])


def test_sampling_is_linear_inside_and_constant_outside():
    box = (-1.0, 0.0, -2.0, 1.0, 4.0, 4.0)
    z, y, x = torch.linspace(-2, 4, 5), torch.linspace(0, 4, 9), torch.linspace(-1, 1, 3)
    sdf = (2 * x[None, :, None] - y[:, None, None] + 0.5 * z[None, None]).expand(1, 1, 9, 3, 5)
    volume = torch.cat([sdf, sdf + 1])
    points = torch.rand(1, 50, 3) * torch.tensor([2.0, 4.0, 6.0]) + torch.tensor(box[:3])
    expected = 2 * points[..., 0] - points[..., 1] + 0.5 * points[..., 2]
    torch.testing.assert_close(
        sample_sdf(volume[:, None, 0], box, points), torch.cat([expected, expected + 1])
    )
    outside = sample_sdf(volume[:1], box, torch.tensor([[[5.0, 2.0, 9.0]]]))
    assert math.isclose(outside.item(), 2 * 1 - 2 + 0.5 * 4, rel_tol=1e-5)
    each = points.repeat(2, 1, 1)
    torch.testing.assert_close(sample_sdf(volume, box, each), torch.cat([expected, expected + 1]))

    centres = occupancy_grid(volume, box, (4, 2, 6))
    y, x, z = torch.arange(4) + 0.5, torch.arange(2) - 0.5, torch.arange(6) - 1.5
    expected = 2 * x[None, :, None] - y[:, None, None] + 0.5 * z[None, None]
    torch.testing.assert_close(centres[0], expected)
    moved = shifted_grid_sdf(
        volume, box, (4, 2, 6), torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.0, 0.0]])
    )
    assert math.isclose(moved[0, 0, 0, 0].item(), 2 * -1 - 0.5 + 0.5 * -2, rel_tol=1e-5)
    torch.testing.assert_close(moved[1], occupancy_grid(volume, box, (4, 2, 6), published=True)[1])
