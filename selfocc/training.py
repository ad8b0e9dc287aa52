"""What a training step has besides model and losses, for train.py and bench.py."""

import math

import torch

from selfocc.batch import Noise
from selfocc.config import Config, OptimConfig
from selfocc.model import SelfOcc


def make_optimizer(model: SelfOcc, optim: OptimConfig) -> torch.optim.AdamW:
    backbone = {id(p) for p in model.backbone.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in backbone], "base": optim.lr},
        {
            "params": [p for p in trained if id(p) in backbone],
            "base": optim.lr * optim.backbone_factor,
        },
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, weight_decay=optim.weight_decay, fused=True)


def draw_noise(settings: Config, cameras: int, forward: int, rank: int, world: int) -> Noise:
    """The random numbers of one forward pass: drawn for the global batch, this rank's share."""
    generator = torch.Generator().manual_seed(settings.optim.seed * 1_000_003 + forward)
    batch, rays = settings.optim.batch, math.prod(settings.render.rays)
    mine = slice(rank * batch, (rank + 1) * batch)
    pixels = torch.rand(4, generator=generator)
    numbers = torch.rand(world * batch, cameras, rays, 4, generator=generator)[mine]
    shift = torch.rand(world * batch, 3, generator=generator)[mine]
    return Noise(pixels, numbers[..., 0], numbers[..., 1:], shift)
