"""Train SelfOcc.

    python train.py                              # embedded street
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 train.py   # the same on two CPU cores
    python train.py --dataset kitti --data DIR   # SemanticKITTI as published
    python train.py --resume                     # go on where runs/synthetic stopped
    torchrun --nproc-per-node 8 train.py --dataset kitti --data DIR

The run folder receives checkpoint.safetensors, metrics.jsonl (one JSON a line), panel pictures, and
run.json, which says what the run was started with.
"""

import os

# waiting threads must not spin: data workers share the cores
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import contextlib
import json
import math
import signal
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from selfocc import (
    InputError,
    checkpoint,
    distributed,
    evaluation,
    files,
    panels,
    pictures,
    presets,
    runs,
)
from selfocc.batch import Noise, collate
from selfocc.commandline import Parser, Stopped, add_data_options, folders, run
from selfocc.config import Config, OptimConfig, check_training, listing
from selfocc.datasets import Folders, open_dataset
from selfocc.datasets.loader import read_ahead
from selfocc.geometry import cellular_pixels
from selfocc.labels import check_classes, settle_classes
from selfocc.losses import objective
from selfocc.model import SelfOcc
from selfocc.settings import change
from selfocc.training import draw_noise, make_optimizer


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    listed = (f"  {name:20s} {summary}" for name, (summary, _) in presets.PRESETS.items())
    epilog = ["presets:", *listed, "", "settings, their defaults where the preset has none, and "
              "what they may be:", listing(Config())]  # fmt: skip
    parser = Parser(description=__doc__, epilog="\n".join(epilog))
    add_data_options(parser)
    parser.add_argument("--preset", metavar="NAME", help="default: the data set's name")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder; default: runs/PRESET")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in the run folder; its options need not be given again",
    )
    parser.add_argument(
        "--init",
        type=Path,
        metavar="FILE",
        help="fine-tune: start from the weights of this checkpoint or run folder",
    )
    parser.add_argument(
        "--backbone-weights", metavar="FILE", help="torchvision file, `imagenet` or `none`"
    )
    parser.add_argument("--steps", type=int, help="optimiser steps; short for --set optim.steps=N")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="change any setting of config.py",
    )
    return parser.parse_args(words)


def choose_settings(arguments: argparse.Namespace, resumed: Config | None) -> Config:
    """The preset's settings, or those of the run that goes on, with what the arguments change.

    Raises InputError where a preset is named that is not the run's.
    """
    preset = arguments.preset or (None if resumed else arguments.dataset or "synthetic")
    if resumed and preset not in (None, resumed.preset):
        raise InputError(
            f"the run is of preset {resumed.preset}, not {preset}; leave --preset out, or start "
            "another run with --out DIR"
        )
    named = {
        "data.dataset": arguments.dataset,
        "data.version": arguments.version,
        "data.train": arguments.train,
        "data.val": arguments.val,
        "data.label_map": arguments.label_map,
        "backbone.weights": arguments.backbone_weights,
        "optim.steps": arguments.steps,
    }
    overrides = [f"{path}={value}" for path, value in named.items() if value is not None]
    overrides += arguments.set
    chosen = change(resumed, overrides) if resumed else presets.build(preset, overrides)
    check_training(chosen)
    settings = settle_classes(chosen)
    check_classes(settings)
    return settings


def learning_rate(optim: OptimConfig, base: float, step: int) -> float:
    """Linear warm-up, then cosine or one drop; the published schedule lags one step (spec 12).

    The published drop (timm's) counts from the end of the warm-up and comes one step early.
    """
    step = min(max(step - 1, 0), optim.steps)
    if step < optim.warmup:
        return optim.warmup_lr + (base - optim.warmup_lr) * step / optim.warmup
    if optim.schedule == "step":
        return base * (0.1 if step - optim.warmup + 1 >= optim.drop_at * optim.steps else 1.0)
    return optim.min_lr + 0.5 * (base - optim.min_lr) * (1 + math.cos(math.pi * step / optim.steps))


class Keys:
    """For every forward pass from `start` on, the (index, seed) keys of this process's samples.

    Every pass takes the next samples of a shuffled data set; ranks share each global batch.
    """

    def __init__(self, length: int, optim: OptimConfig, start: int, rank: int, world: int):
        self.length, self.optim, self.start = length, optim, start
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return self.optim.steps * self.optim.accumulate - self.start

    def __iter__(self):
        batch, together = self.optim.batch, self.optim.batch * self.world
        for forward in range(self.start, self.optim.steps * self.optim.accumulate):
            first = forward * together + self.rank * batch
            yield [self._key(number) for number in range(first, first + batch)]

    def _key(self, number: int) -> tuple[int, int]:
        epoch, place = divmod(number, self.length)
        order = np.random.default_rng((self.optim.seed, epoch)).permutation(self.length)
        seed = np.random.SeedSequence((self.optim.seed, number)).generate_state(1)
        return int(order[place]), int(seed[0])


def train(arguments: argparse.Namespace) -> None:
    device = distributed.choose_device(arguments.device)
    rank, world = distributed.start(device)
    out = arguments.out or Path("runs") / (arguments.preset or arguments.dataset or "synthetic")
    with files.owned(out) if rank == 0 else contextlib.nullcontext():
        fit(*plan(arguments, out, world), out, device, rank)


def plan(
    arguments: argparse.Namespace, out: Path, world: int
) -> tuple[runs.Run, checkpoint.Checkpoint | None, list[str]]:
    """What is to be trained, the checkpoint from which it goes on, and notes for the user.

    Raises InputError where the folder `out` holds a run that the arguments do not go on with.
    """
    file, before, saved, notes = out / checkpoint.FILE_NAME, None, None, []
    if arguments.resume:
        before = runs.read(out)
        if file.exists() or before is None:  # a run without a checkpoint yet begins anew
            saved = checkpoint.load(file)
            before = before or runs.Run(saved.config, Folders(), world)
    elif file.exists():
        raise InputError(
            f"{out} already holds a run; --resume continues it, --out DIR starts another"
        )
    settings = choose_settings(arguments, saved.config if saved else before and before.settings)
    given = runs.completed(folders(arguments), before.folders if before else Folders())
    init = arguments.init and arguments.init.absolute()
    if saved and init not in (None, before.init):
        notes.append(f"--init {init} is not read: the run goes on from its checkpoint")
    if before and (saved or init is None):
        init = before.init
    record = runs.Run(settings, given, world, init)
    notes += record.changed(before) if before else []
    if given.labels and not settings.loss.weight_semantic:
        notes.append("--labels teach nothing while loss.weight_semantic is 0")
    return record, saved, notes


def fit(
    record: runs.Run,
    saved: checkpoint.Checkpoint | None,
    notes: list[str],
    out: Path,
    device: torch.device,
    rank: int,
) -> None:
    """Train from `saved`, or from the start, to the end, and keep everything in the folder `out`.

    `notes` are told at the start, with what the data lack.
    """
    settings, world, chief = record.settings, record.processes, rank == 0
    optim, render = settings.optim, settings.render
    file = out / checkpoint.FILE_NAME
    initial = saved or (checkpoint.load(record.init) if record.init else None)

    with distributed.chief_first():  # it fills the cache of the synthetic data
        training = open_dataset(settings, "train", record.folders)
        validation = open_dataset(settings, "val", record.folders)
    torch.set_flush_denormal(True)  # Adam's vanishing moments are slow on CPUs otherwise
    torch.manual_seed(optim.seed)
    # weights that are replaced anyway need not be fetched
    backbone = replace(settings.backbone, weights="none") if initial else settings.backbone
    model = SelfOcc(replace(settings, backbone=backbone)).to(device)
    optimizer = make_optimizer(model, optim)
    if initial:
        checkpoint.restore(initial, model, optimizer if saved else None)
    start = saved.step if saved else 0
    parallel = model
    if world > 1:
        if settings.backbone.norm == "batch":
            distributed.synchronise_batch_norm(model, device)
        parallel = torch.nn.parallel.DistributedDataParallel(model)
    keys = Keys(len(training), optim, start * optim.accumulate, rank, world)
    loader = read_ahead(
        training,
        optim.workers,
        world,
        beside=1,  # validation reads ahead too, a sample at a time
        batch_sampler=keys,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
    )
    if chief:
        record.write(out)
        log = Log(out / "metrics.jsonl", start)
        notes += training.notes + validation.notes
        for line in dict.fromkeys(notes):
            tqdm.write(f"note: {line}")
        parameters = sum(p.numel() for p in model.parameters())
        tqdm.write(
            f"{settings.preset}: {len(training)} training and {len(validation)} validation frames, "
            f"{parameters / 1e6:.1f} M parameters, {device}, steps {start} to {optim.steps}, "
            f"run folder {out}"
        )
    if start >= optim.steps:
        if chief:
            tqdm.write(f"step {start} was the last; --steps N with a larger N goes on")
        return

    stop = StopRequest()
    model.train()
    batches = iter(loader)
    steps = range(start, optim.steps)
    bar = tqdm(steps, initial=start, total=optim.steps, disable=not chief, dynamic_ncols=True)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, group["base"], step)
        model.set_progress(step)
        optimizer.zero_grad(set_to_none=True)
        for part in range(optim.accumulate):
            batch = next(batches).to(device)
            forward = step * optim.accumulate + part
            torch.manual_seed((optim.seed * 1_000_003 + forward) * world + rank)  # dropout
            noise = draw_noise(settings, batch.target.images.shape[1], forward, rank, world)
            size = batch.target.images.shape[-2:]
            pixels = cellular_pixels(render.rays, size, noise.pixels, render.spread).to(device)
            noise = Noise(*(getattr(noise, f.name).to(device) for f in fields(noise)))
            volume, view = parallel(batch, pixels, noise)
            losses = objective(settings, batch, volume, view, noise.shift)
            (sum(losses.values()) / optim.accumulate).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        if not torch.isfinite(norm):
            raise InputError(
                f"step {step}: the gradient is not finite, so training cannot go on; the last "
                f"checkpoint in {out} is intact. Lower optim.lr or optim.clip, and look at the data"
            )
        optimizer.step()

        done = step + 1
        last = done == optim.steps
        stopping = distributed.mean(torch.tensor(float(stop.requested), device=device)) > 0
        if done % 10 == 0 or last:
            names = list(losses)
            means = distributed.mean(torch.stack([losses[name].detach() for name in names]))
            scalars = dict(zip(names, means.tolist(), strict=True))
        if chief:
            if done % 10 == 0 or last:
                error = evaluation.ray_depth_error(batch, view)
                total, lr = sum(scalars.values()), optimizer.param_groups[0]["lr"]
                log.write(step=done, loss=total, **scalars, abs_rel=error, lr=lr)
                shown = "" if error is None else f", AbsRel {error:.3f}"
                bar.set_postfix_str(f"loss {total:.3f}{shown}")
            if done % optim.picture_every == 0 or last:
                index = (done // optim.picture_every) % len(validation)
                picture = panels.panel(model, validation, index, device)
                pictures.write_picture(out / f"panel_{done:06d}.png", picture)
            if done % optim.save_every == 0 or last or stopping:
                checkpoint.save(file, settings, done, model, optimizer)
            if done % optim.validate_every == 0 or last:
                scores = evaluation.validate(model, validation, optim.validate_frames, device)
                log.write(step=done, **{f"val_{name}": value for name, value in scores.items()})
                line = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
                tqdm.write(f"step {done}: {line}")
        if stopping:
            bar.close()
            said = f"stopped; saved step {done} in {file}, --resume continues" if chief else ""
            raise Stopped(said)
    if chief:
        tqdm.write(f"trained; evaluate with: python eval.py --ckpt {out}")


class StopRequest:
    """The first Ctrl-C (or SIGTERM) lets the running step finish and save; the second stops."""

    def __init__(self):
        self.requested = False
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._ask)

    def _ask(self, number, _):
        self.requested = True
        signal.signal(number, signal.default_int_handler)


class Log:
    """metrics.jsonl, appended; on resume the lines of steps that will be repeated are dropped."""

    def __init__(self, path: Path, start: int):
        self.path = path
        self.begun = time.time()
        lines = path.read_text().splitlines() if start and path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start]
        files.write_file(path, "".join(line + "\n" for line in kept).encode())

    def write(self, **values):
        values["seconds"] = round(time.time() - self.begun, 1)
        values = {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from None


def main(words: list[str] | None = None) -> int:
    """The command line (or `words` instead of it); returns the exit code."""
    return run(lambda: train(parse_arguments(words)))


if __name__ == "__main__":
    sys.exit(main())
