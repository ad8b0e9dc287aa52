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
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's, for matrices of a few columns

import argparse
import contextlib
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from selfocc import (
    InputError,
    checkpoint,
    commandline,
    distributed,
    evaluation,
    files,
    panels,
    pictures,
    presets,
    runs,
)
from selfocc.batch import collate
from selfocc.config import Config, Folders, check_training, listing
from selfocc.datasets import open_dataset, usual
from selfocc.datasets.loader import read_ahead
from selfocc.labels import check_classes, settle_classes
from selfocc.model import SelfOcc
from selfocc.settings import change
from selfocc.training import Keys, Passes, make_optimizer, training_step

LOG_EVERY = 10  # steps


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    listed = (f"  {name:20s} {summary}" for name, (summary, _) in presets.PRESETS.items())
    epilog = ["presets:", *listed, "", "settings, their defaults where the preset has none, and "
              "what they may be:", listing(Config())]  # fmt: skip
    parser = commandline.Parser(description=__doc__, epilog="\n".join(epilog))
    commandline.add_shared_options(parser)
    add = parser.add_argument
    add("--preset", metavar="NAME", help="default: the data set's name")
    add("--out", type=Path, metavar="DIR", help="run folder; default: runs/PRESET")
    said = "go on with the run in the run folder; its options need not be given again"
    add("--resume", action="store_true", help=said)
    said = (
        "fine-tune: start from the weights of this checkpoint or run folder (as --ckpt of eval.py)"
    )
    add("--init", type=Path, metavar="FILE", help=said)
    add("--backbone-weights", metavar="FILE", help="torchvision file, `imagenet` or `none`")
    add("--steps", type=int, help="optimiser steps; short for --set optim.steps=N")
    return parser.parse_args(words)


def choose_settings(arguments: argparse.Namespace, resumed: Config | None) -> Config:
    """The preset's settings, or those of the run that goes on, with what the arguments change.

    Raises InputError where a preset is named that is not the run's.
    """
    if resumed and arguments.preset not in (None, resumed.preset):
        raise InputError(
            f"the run is of preset {resumed.preset}, not {arguments.preset}; leave --preset out, "
            "or start another run with --out DIR"
        )
    named = {"backbone.weights": arguments.backbone_weights, "optim.steps": arguments.steps}
    overrides = commandline.overrides(arguments, named)
    if resumed:
        chosen = change(resumed, overrides)
    else:
        preset, more = usual(arguments.preset, arguments.dataset, arguments.data)
        chosen = presets.build(preset or "synthetic", [*more, *overrides])
    check_training(chosen)
    settings = settle_classes(chosen)
    check_classes(settings)
    return settings


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
    given = runs.completed(commandline.folders(arguments), before.folders if before else Folders())
    init = arguments.init and (checkpoint.shipped(arguments.init) or arguments.init.absolute())
    if saved and init not in (None, before.init):
        notes.append(f"--init {init} is not read: the run goes on from its checkpoint")
    if before and (saved or init is None):
        init = before.init
    record = runs.Run(settings, given, world, init)
    notes += record.changed(before) if before else []
    if given.labels and not settings.loss.weight_semantic:
        notes.append("--labels teach nothing while loss.weight_semantic is 0")
    return record, saved, notes


def build(
    record: runs.Run, saved: checkpoint.Checkpoint | None, device: torch.device
) -> tuple[SelfOcc, torch.optim.Optimizer]:
    """Model and optimiser as `saved`, or as `record` says that a run begins."""
    settings = record.settings
    initial = saved or (checkpoint.load(record.init) if record.init else None)
    torch.manual_seed(settings.optim.seed)
    # weights that are replaced anyway need not be fetched
    model = SelfOcc(change(settings, ["backbone.weights=none"] if initial else []))
    model = model.to(device).train()
    optimizer = make_optimizer(model, settings.optim)
    if initial:
        checkpoint.restore(initial, model, optimizer if saved else None)
    return model, optimizer


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
    distributed.allow_tf32(settings.optim.tf32)
    optim, start = settings.optim, saved.step if saved else 0
    with distributed.chief_first():  # it fills the cache of the synthetic data
        training = open_dataset(settings, "train", record.folders)
        validation = open_dataset(settings, "val", record.folders)
    model, optimizer = build(record, saved, device)
    parallel = distributed.parallel(
        model, device, settings.backbone.norm == "batch", partly=start < optim.sweep_steps
    )
    loader = read_ahead(
        training,
        optim.workers,
        world,
        beside=1,  # validation reads ahead too, a sample at a time
        batch_sampler=Keys(len(training), optim, start * optim.accumulate, rank, world),
        collate_fn=collate,
        pin_memory=device.type == "cuda",
    )
    if chief:
        record.write(out)
        log = runs.Log(out, start)
        for line in dict.fromkeys([*notes, *training.notes, *validation.notes]):
            tqdm.write(f"note: {line}")
        parameters = sum(p.numel() for p in model.parameters())
        tqdm.write(
            f"{settings.preset}: {len(training)} training and {len(validation)} validation frames, "
            f"{parameters / 1e6:.1f} M parameters, {device}, steps {start} to {optim.steps}, "
            f"run folder {out}"
        )
        if start >= optim.steps:
            tqdm.write(f"step {start} was the last; --steps N with a larger N goes on")
    if start >= optim.steps:
        return

    stop, batches, passes = commandline.StopRequest(), iter(loader), Passes(settings, parallel)
    steps = range(start, optim.steps)
    bar = tqdm(steps, initial=start, total=optim.steps, disable=not chief, dynamic_ncols=True)
    broken = torch.full((), math.inf, device=device)  # the first step whose gradient is not finite
    for step in bar:
        batch, view, losses, norm = training_step(passes, optimizer, batches, step, rank, world)
        broken = torch.where(norm.isfinite() | broken.isfinite(), broken, step)
        done, last = step + 1, step + 1 == optim.steps
        logs, draws, saves, validates = (
            done % every == 0 or last
            for every in (LOG_EVERY, optim.picture_every, optim.save_every, optim.validate_every)
        )
        # between these steps nobody asks a GPU, which would have to finish before it answers
        asks = logs or world == 1 or device.type == "cpu"
        stopping = asks and distributed.in_any(stop.requested, device)
        if (logs or draws or saves or validates or stopping) and math.isfinite(broken):
            raise InputError(
                f"step {int(broken)}: the gradient is not finite, so training cannot go on; the "
                f"last checkpoint in {out} is intact. Lower optim.lr or optim.clip, and look at "
                "the data"
            )
        if logs:
            means = distributed.mean(torch.stack([*losses.values()]).detach()).tolist()
            if chief:
                scalars = dict(zip(losses, means, strict=True))
                error = None if view is None else evaluation.ray_depth_error(batch, view)
                lr = optimizer.param_groups[0]["lr"]
                log.write(step=done, loss=sum(means), **scalars, abs_rel=error, lr=lr)
                shown = "" if error is None else f", AbsRel {error:.3f}"
                bar.set_postfix_str(f"loss {sum(means):.3f}{shown}")
        if chief and draws:
            index = (done // optim.picture_every) % len(validation)
            picture = panels.panel(model, validation, index, device)
            pictures.write_picture(out / f"panel_{done:06d}.png", picture)
        if chief and (saves or stopping):
            checkpoint.save(out / checkpoint.FILE_NAME, settings, done, model, optimizer)
        if chief and validates:
            scores = evaluation.validate(model, validation, optim.validate_frames, device)
            log.write(step=done, **{f"val_{name}": value for name, value in scores.items()})
            line = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
            tqdm.write(f"step {done}: {line}")
        if stopping:
            bar.close()
            where = f"stopped; saved step {done} in {out / checkpoint.FILE_NAME}"
            raise commandline.Stopped(f"{where}, --resume continues" if chief else "")
    if chief:
        tqdm.write(f"trained; evaluate with: python eval.py --ckpt {out}")


def main(words: list[str] | None = None) -> int:
    """The command line (or `words` instead of it); returns the exit code."""
    return commandline.run(lambda: train(parse_arguments(words)))


if __name__ == "__main__":
    sys.exit(main())
