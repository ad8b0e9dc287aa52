"""The training step and what it draws: every random number is a function of (seed, step).

train.py and `python -m selfocc.bench` run `training_step`.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from selfocc import InputError, graphs
from selfocc.batch import Batch, Noise, View
from selfocc.config import Config, OptimConfig
from selfocc.geometry import cellular_pixels
from selfocc.losses import needs_samples, objective, photometric_scene
from selfocc.model import SelfOcc


@dataclass
class Keys:
    """For every forward pass from `start` on, the (index, seed) keys of this process's samples.

    Every pass takes the next samples of a shuffled data set; ranks share each global batch.
    """

    length: int  # of the data set
    optim: OptimConfig
    start: int
    rank: int
    world: int

    def __len__(self) -> int:
        return self.optim.steps * self.optim.accumulate - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batch, together = self.optim.batch, self.optim.batch * self.world
        for forward in range(self.start, self.optim.steps * self.optim.accumulate):
            first = forward * together + self.rank * batch
            yield [self._key(number) for number in range(first, first + batch)]

    def _key(self, number: int) -> tuple[int, int]:
        epoch, place = divmod(number, self.length)
        order = np.random.default_rng((self.optim.seed, epoch)).permutation(self.length)
        seed = np.random.SeedSequence((self.optim.seed, number)).generate_state(1)
        return int(order[place]), int(seed[0])


def draw_noise(settings: Config, batch: Batch, forward: int, rank: int, world: int) -> Noise:
    """What one forward pass draws: for the global batch, of which this is the rank's share."""
    generator = torch.Generator().manual_seed(settings.optim.seed * 1_000_003 + forward)
    render, count = settings.render, settings.optim.batch
    _, cameras, _, *size = batch.target.images.shape
    mine, rays = slice(rank * count, (rank + 1) * count), math.prod(render.rays)
    stride = torch.rand(4, generator=generator)
    numbers = torch.rand(world * count, cameras, rays, 4, generator=generator)[mine]
    shift = torch.rand(world * count, 3, generator=generator)[mine]
    pixels = cellular_pixels(render.rays, size, stride, render.spread)
    return Noise(pixels, numbers[..., 0], numbers[..., 1:], shift)


def make_optimizer(model: SelfOcc, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW; the backbone learns more slowly. A group's `base` is what its schedule starts from."""
    inside = {id(p) for p in model.backbone.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if (id(p) in inside) == slow], "base": base}
        for slow, base in ((False, optim.lr), (True, optim.lr * optim.backbone_factor))
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, weight_decay=optim.weight_decay, fused=True)


def learning_rate(optim: OptimConfig, base: float, step: int) -> float:
    """Linear warm-up, then cosine or one drop; the published schedule lags one step.

    The published drop (timm's) counts from the end of the warm-up and comes one step early.
    """
    step = min(max(step - 1, 0), optim.steps)
    if step < optim.warmup:
        return optim.warmup_lr + (base - optim.warmup_lr) * step / optim.warmup
    if optim.schedule == "step":
        return base * (0.1 if step - optim.warmup + 1 >= optim.drop_at * optim.steps else 1.0)
    return optim.min_lr + 0.5 * (base - optim.min_lr) * (1 + math.cos(math.pi * step / optim.steps))


class Passes:
    """Forward and backward pass of a batch.

    With `optim.graph` they are one CUDA graph, once all schedules but the learning rate's have
    ended. It reads each batch where it read the first, and leaves gradients and results where it
    left those of the first.
    model: SelfOcc, or that in DistributedDataParallel.
    """

    WARM_UP = 3  # steps, so that all is compiled and tried out before

    def __init__(self, settings: Config, model: nn.Module):
        self.settings, self.model = settings, model
        self.begun, self.held, self.replay = 0, None, None

    def __call__(
        self, batch: Batch, noise: Noise, step: int, mark: Callable[[str], None]
    ) -> tuple[View, dict[str, Tensor]]:
        """View and losses; gradients are added where no graph is replayed, which makes them anew.

        Raises InputError where a graph is asked for that cannot be.
        """
        settings = self.settings
        if not settings.optim.graph or step < settings.render.anneal_steps:
            return self._run(batch, noise, mark)
        if not torch.cuda.is_available() or hasattr(self.model, "module"):
            raise InputError("optim.graph=true needs a GPU and a single process")
        self.begun += 1
        if self.begun <= self.WARM_UP:
            return self._run(batch, noise, mark)
        unused = dict(depth=None, lidar=None, stereo=None, voxels=None)
        batch = dataclasses.replace(batch, **unused)
        if self.replay is None:
            self.held = batch.each(torch.clone), noise.each(torch.clone)
            self.model.zero_grad(set_to_none=True)
            self.replay = graphs.capture(lambda: self._run(*self.held))
        for held, given in zip(self.held, (batch, noise), strict=True):
            held.fill(given)
        return self.replay()

    def _run(
        self, batch: Batch, noise: Noise, mark: Callable[[str], None] = lambda stage: None
    ) -> tuple[View, dict[str, Tensor]]:
        settings = self.settings
        scene = photometric_scene(batch, noise.pixels, settings.quirks)
        compared = None if needs_samples(settings.loss) else scene
        volume, view = self.model(batch, noise, compared)
        mark("render")
        losses = objective(settings, batch, volume, view, scene, noise.shift)
        mark("losses")
        (sum(losses.values()) / settings.optim.accumulate).backward()
        mark("backward")
        # nothing may be left of how they were made when a graph is captured in the next step
        view = dataclasses.replace(view, compared=None).each(Tensor.detach)
        return view, {name: loss.detach() for name, loss in losses.items()}


def training_step(
    passes: Passes,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    step: int,
    rank: int = 0,
    world: int = 1,
    mark: Callable[[str], None] = lambda stage: None,
) -> tuple[Batch, View | None, dict[str, Tensor], Tensor]:
    """One step of the optimiser; returns the last batch, its view (of the first `sweep_steps` there
    is none) and losses, and the gradient's norm, which the caller has to find finite.

    `mark` is told the stage that has ended.
    """
    settings, model = passes.settings, passes.model
    optim, device = settings.optim, next(model.parameters()).device
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(optim, group["base"], step)
    getattr(model, "module", model).set_progress(step)
    if passes.replay is None:
        optimizer.zero_grad(set_to_none=True)
    last = (step + 1) * optim.accumulate - 1
    for forward in range(step * optim.accumulate, last + 1):
        alone = forward < last and hasattr(model, "no_sync")  # gradients are exchanged once
        with model.no_sync() if alone else contextlib.nullcontext():
            batch = next(batches).to(device)
            torch.manual_seed((optim.seed * 1_000_003 + forward) * world + rank)  # dropout
            if step < optim.sweep_steps:
                view, losses = None, {"sweep": model(batch)}
                (losses["sweep"] / optim.accumulate).backward()
                continue
            noise = draw_noise(settings, batch, forward, rank, world)
            noise = (noise if device.type == "cpu" else noise.pin_memory()).to(device)
            mark("data to device")
            view, losses = passes(batch, noise, step, mark)
    norm = nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
    optimizer.step()
    mark("optimiser")
    return batch, view, losses, norm
