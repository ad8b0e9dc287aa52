"""ResNet and FPN: published names and numbers, the frozen stem, and what is said about unusable
weight files.
"""

import json
import socket

import pytest
import torch

from selfocc import InputError
from selfocc.backbone import FPN, Backbone
from selfocc.config import BackboneConfig
from tests import goldens


def small(**changes) -> BackboneConfig:
    return BackboneConfig(
        **{"depth": 18, "width": 8, "weights": "none", "frozen_stem": False, **changes}
    )


def test_names_and_shapes_are_torchvisions():
    path = goldens.path("official_state_dict_keys.json")
    entries = json.loads(path.read_text())["config/kitti/kitti_occ.py"]["entries"]
    with torch.device("meta"):
        backbone = Backbone(BackboneConfig(depth=50, weights="none", frozen_stem=False))
        fpn = FPN(backbone.channels, 96)
    for module, prefix in ((backbone, "img_backbone."), (fpn, "img_neck.")):
        published = {
            key.removeprefix(prefix): shape for key, shape, *_ in entries if key.startswith(prefix)
        }
        assert {key: list(tensor.shape) for key, tensor in module.state_dict().items()} == published


@pytest.mark.parametrize("scene", ["tpv_mono", "bev_surround"])
def test_published_numbers(scene):
    folder = goldens.path(scene)
    weights = torch.load(folder / "state_dict.pth", weights_only=True)["state_dict"]
    inputs, outputs = (goldens.load(f"{scene}/{name}.npz") for name in ("inputs", "outputs_f32"))
    backbone = Backbone(BackboneConfig(depth=50, width=16, weights="none")).eval()
    fpn = FPN(backbone.channels, 48)
    for module, prefix in ((backbone, "img_backbone."), (fpn, "img_neck.")):
        module.load_state_dict(
            {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        )
    stages = backbone(torch.from_numpy(inputs["input_imgs"][0]))
    maps = fpn(stages)
    for level in range(4):
        for ours, name in ((stages[level], f"backbone.{level}"), (maps[level], f"fpn.{level}")):
            theirs = torch.from_numpy(outputs[name])
            error = (ours - theirs).abs().max() / theirs.abs().max()
            assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("depth, expansion", [(18, 1), (34, 1), (50, 4), (101, 4)])
def test_strides_and_channels(depth, expansion):
    backbone = Backbone(small(depth=depth))
    stages = backbone(torch.randn(2, 3, 64, 96))
    maps = FPN(backbone.channels, 12)(stages)
    assert backbone.channels == [8 * expansion << stage for stage in range(4)]
    sizes = [(64 // stride, 96 // stride) for stride in (4, 8, 16, 32)]
    assert [tuple(s.shape) for s in stages] == [
        (2, c, *size) for c, size in zip(backbone.channels, sizes, strict=True)
    ]
    assert [tuple(m.shape) for m in maps] == [(2, 12, *size) for size in sizes]


def test_pyramid_of_odd_sizes():
    backbone = Backbone(small())
    maps = FPN(backbone.channels, 4)(backbone(torch.randn(1, 3, 70, 90)))
    assert [tuple(m.shape[2:]) for m in maps] == [(18, 23), (9, 12), (5, 6), (3, 3)]


def test_frozen_stem_keeps_weights_and_statistics():
    backbone = Backbone(small(frozen_stem=True)).train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=1.0)
    backbone(torch.randn(2, 3, 32, 32))[-1].square().mean().backward()
    optimizer.step()
    after = backbone.state_dict()
    for key in before:
        if key.startswith(("conv1.", "bn1.")):
            assert torch.equal(before[key], after[key]), key
    assert not torch.equal(before["layer1.0.bn1.running_mean"], after["layer1.0.bn1.running_mean"])
    assert not torch.equal(before["layer1.0.bn2.weight"], after["layer1.0.bn2.weight"])


def test_weights_from_a_file_without_the_classifier(tmp_path):
    source = Backbone(small())
    path = tmp_path / "resnet.pth"
    torch.save(
        {**source.state_dict(), "fc.weight": torch.zeros(3, 64), "fc.bias": torch.zeros(3)}, path
    )
    loaded = Backbone(small(weights=str(path)))
    for key, tensor in source.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[key]), key


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "not a readable torch file"),
        (lambda path: path.write_text("<html>"), "not a readable torch file"),
        (lambda path: torch.save([1, 2], path), "not a state dict"),
        (
            lambda path: torch.save(Backbone(small(width=4)).state_dict(), path),
            r"conv1.weight is \[4, 3, 7, 7\]",
        ),
        (
            lambda path: torch.save(Backbone(small(depth=34)).state_dict(), path),
            r"layer1\.2.* has no place",
        ),
        (lambda path: torch.save({}, path), "no conv1.weight"),
    ],
    ids=["missing", "truncated", "html", "list", "width", "depth", "empty"],
)
def test_unusable_files_are_told_in_one_line(tmp_path, spoil, message):
    path = tmp_path / "resnet.pth"
    torch.save(Backbone(small()).state_dict(), path)
    spoil(path)
    with pytest.raises(InputError, match=message) as caught:
        Backbone(small(weights=str(path)))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_no_network_names_the_alternatives(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for proxy in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(InputError, match="--backbone-weights none") as caught:
        Backbone(BackboneConfig(depth=18, weights="imagenet"))
    assert "\n" not in str(caught.value)


def test_group_norm_treats_every_image_alone():
    torch.manual_seed(0)
    backbone = Backbone(small(norm="group"))
    images = torch.randn(2, 3, 32, 64)
    together = backbone(images)
    for level, alone in zip(together, backbone(images[:1]), strict=True):
        torch.testing.assert_close(level[:1], alone)
    assert not any("running" in name for name in backbone.state_dict())


def test_norm_that_cannot_be():
    with pytest.raises(InputError, match=r"--backbone-weights none"):
        Backbone(small(norm="group", weights="imagenet"))


def test_channels_lie_beside_each_other():
    backbone = Backbone(small()).eval()
    fpn, images = FPN(backbone.channels, 16), torch.randn(2, 3, 64, 96)
    stages = backbone(images)
    for stage in [*stages, *fpn(stages)]:
        assert stage.is_contiguous(memory_format=torch.channels_last)
    for weights in (backbone.layer2[0].conv2.weight, fpn.fpn_convs[0].conv.weight):
        assert weights.is_contiguous(memory_format=torch.channels_last)
