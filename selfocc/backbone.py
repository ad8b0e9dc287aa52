"""Image features: ResNet (He et al. 2016) and a feature pyramid (Lin et al. 2017).

Parameters of the ResNet carry torchvision's names, those of the pyramid mmsegmentation's, so that
published weights fit.
"""

import math
from collections import OrderedDict
from pathlib import Path
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfocc import InputError
from selfocc.config import BackboneConfig
from selfocc.files import read_torch

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
_IMAGENET = {
    18: "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    34: "https://download.pytorch.org/models/resnet34-b627a593.pth",
    50: "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    101: "https://download.pytorch.org/models/resnet101-63fe2227.pth",
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolution and a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.downsample = _shortcut(inputs, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(x), inplace=True)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _normalise_groups(module: nn.Module) -> None:
    """Put group norm (eight groups) where batch norm is."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            channels = child.num_features
            setattr(module, name, nn.GroupNorm(math.gcd(8, channels), channels))
        else:
            _normalise_groups(child)


class Backbone(nn.Module):
    """ResNet without its classifier: images [n, 3, h, w] -> maps at strides 4, 8, 16 and 32.

    Their channels are `channels`.

    With `frozen_stem`, conv1 and bn1 keep their weights and bn1 its statistics, also in training;
    that makes sense only for weights that were learnt, which is for the caller to see to.

    Raises InputError if the weights cannot be found, read or do not fit.
    """

    def __init__(self, config: BackboneConfig):
        super().__init__()
        block = BasicBlock if config.depth < 50 else Bottleneck
        width = config.width
        self.frozen_stem = config.frozen_stem
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inputs, self.channels = width, []
        for stage, count in enumerate(BLOCKS[config.depth]):
            blocks = []
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(block(inputs, width << stage, stride))
                inputs = (width << stage) * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            self.channels.append(inputs)
        if config.norm == "group":
            if config.weights != "none":
                raise InputError(
                    "backbone.norm=group has no learnt weights; set backbone.norm=batch with them, "
                    "or --backbone-weights none"
                )
            _normalise_groups(self)
        self._init_weights()
        # the layout that tensor cores and CPUs want; all that follows keeps it
        self.to(memory_format=torch.channels_last)
        if config.weights == "imagenet":
            self._load(_download(config.depth), f"ImageNet weights of ResNet-{config.depth}")
        elif config.weights != "none":
            self._load(_read(config.weights), config.weights)
        if self.frozen_stem:
            self.conv1.requires_grad_(False)
            self.bn1.requires_grad_(False).eval()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock):  # a block starts as its shortcut
                nn.init.zeros_(module.bn2.weight)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def _load(self, weights: dict, source: str) -> None:
        own = self.state_dict()
        weights = {k: v for k, v in weights.items() if not k.startswith("fc.")}
        for key, tensor in weights.items():
            if key in own and own[key].shape != tensor.shape:
                raise InputError(
                    f"{source}: {key} is {list(tensor.shape)}, the backbone has "
                    f"{list(own[key].shape)}; check backbone.depth and backbone.width"
                )
        missing, unknown = self.load_state_dict(weights, strict=False)
        for key in missing:
            if not key.endswith("num_batches_tracked"):  # which torch had not before 0.4.1
                raise InputError(f"{source}: no {key} for this backbone; check backbone.depth")
        for key in unknown:
            raise InputError(f"{source}: {key} has no place in this backbone; check backbone.depth")

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        if self.frozen_stem:
            self.bn1.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        images = images.contiguous(memory_format=torch.channels_last)
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        x = F.max_pool2d(x, 3, 2, 1)
        stages = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            stages.append(x)
        return stages


def _download(depth: int) -> dict:
    url = _IMAGENET[depth]
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, check_hash=True
        )
    except (URLError, OSError, RuntimeError) as error:
        raise InputError(
            f"cannot fetch {url} ({error}); fetch it elsewhere and use --backbone-weights FILE, "
            "or start from random weights with --backbone-weights none"
        ) from None


def _read(path: str) -> dict:
    if not Path(path).is_file():
        raise InputError(
            f"{path}: no such file; "
            "--backbone-weights takes none, imagenet or a torchvision ResNet file"
        )
    weights = read_torch(Path(path))
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise InputError(
            f"{path}: not a state dict; --backbone-weights takes a torchvision ResNet file"
        )
    return weights


def _conv(inputs: int, outputs: int, size: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)
    return nn.Sequential(OrderedDict(conv=conv))  # published under the name `conv`


class FPN(nn.Module):
    """Feature pyramid: stages [n, c_l, h_l, w_l] -> as many maps [n, dim, h_l, w_l]."""

    def __init__(self, channels: list[int], dim: int):
        super().__init__()
        self.lateral_convs = nn.ModuleList(_conv(c, dim, 1) for c in channels)
        self.fpn_convs = nn.ModuleList(_conv(dim, dim, 3) for _ in channels)
        self.to(memory_format=torch.channels_last)

    def forward(self, stages: list[Tensor]) -> list[Tensor]:
        maps = [conv(stage) for conv, stage in zip(self.lateral_convs, stages, strict=True)]
        for level in range(len(maps) - 1, 0, -1):
            size = maps[level - 1].shape[2:]
            coarse = F.interpolate(maps[level], size=size, mode="nearest")
            maps[level - 1] = maps[level - 1] + coarse
        return [conv(m) for conv, m in zip(self.fpn_convs, maps, strict=True)]
