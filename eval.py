"""Evaluate a checkpoint: tables, pictures, video.

    python eval.py --ckpt runs/synthetic
    python eval.py --ckpt FILE --dataset kitti --data DIR --task all --video
    python eval.py --ckpt published.pth --preset nuscenes --data DIR
    python eval.py --ckpt FILE --dataset kitti --data DIR --resume     # go on where it was stopped
    torchrun --nproc-per-node 8 eval.py --ckpt FILE --dataset kitti --data DIR

The output folder receives metrics.json (the tables), frames.R.jsonl (the scores of every frame),
panel pictures of some frames, and the video.
"""

import os

# waiting threads must not spin: data workers share the cores
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import contextlib
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from selfocc import (
    InputError,
    checkpoint,
    distributed,
    evaluation,
    files,
    labels,
    panels,
    pictures,
    protocols,
    runs,
)
from selfocc.commandline import Parser, add_data_options, count, folders, run
from selfocc.config import Config
from selfocc.datasets import Folders, open_sequences
from selfocc.datasets.video import VideoDataset
from selfocc.journal import Journal
from selfocc.model import SelfOcc
from selfocc.scores import Table
from selfocc.settings import change

TASKS = ("occupancy", "depth", "novel_depth")
COLUMNS = {  # key in metrics.json -> title
    "iou": "IoU", "iou_above": "IoU>0.3m", "precision": "precision", "recall": "recall",
    "threshold": "threshold", "abs_rel": "AbsRel", "sq_rel": "SqRel", "rmse": "RMSE",
    "rmse_log": "RMSElog", "a1": "a1", "a2": "a2", "a3": "a3", "scale": "scale", "error": "SSIM+L1",
}  # fmt: skip
EXPLAINED = """columns:
  IoU, precision, recall  of occupied voxels, over all frames, where the truth is known; in the
                          table `semantics` of a class; mIoU is the mean over the classes seen,
                          and as published classes that are never seen count 1
  IoU>0.3m                of voxels more than 0.3 m above the ground below them
  threshold               a voxel is occupied where the SDF (or prior) is at most this
  AbsRel .. a3            errors of z-depth in metres, averaged over points, frames and cameras;
                          a1 is the share of points off by a factor below 1.25, a2 1.25^2, a3 1.25^3
  scale                   depth was multiplied by it: median of the truth / of the prediction
  SSIM+L1                 difference of an image and its neighbours warped by the rendered depth
"""


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, epilog=f"{EXPLAINED}\n{protocols.__doc__}")
    parser.add_argument(
        "--ckpt", type=Path, required=True, metavar="FILE", help="checkpoint or run folder"
    )
    parser.add_argument(
        "--preset", metavar="NAME", help="of a published checkpoint; default: guessed, and said"
    )
    add_data_options(parser)
    parser.add_argument(
        "--task",
        nargs="+",
        default=["occupancy", "depth"],
        choices=[*TASKS, "all"],
        help="one or more; default: occupancy depth",
    )
    parser.add_argument(
        "--protocol",
        choices=protocols.PROTOCOLS,
        help="see below; default: published, and own for the embedded world",
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the frames that an earlier run has scored"
    )
    parser.add_argument(
        "--frames",
        type=partial(count, least=1),
        metavar="N",
        help="evaluate N frames, evenly spread; default: all",
    )
    parser.add_argument(
        "--prior-frames",
        type=count,
        default=100,
        metavar="N",
        help="training frames from which baselines learn; default: 100, where more know better",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: `eval` beside the checkpoint"
    )
    parser.add_argument("--pictures", type=count, default=6, metavar="N", help="panels to write")
    parser.add_argument(
        "--video",
        action="store_true",
        help="write a video along the first sequence: mp4 with `pip install imageio[pyav]`, or GIF",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="change a setting"
    )
    return parser.parse_args(words)


def choose_settings(arguments: argparse.Namespace, saved: Config) -> Config:
    named = {
        "data.dataset": arguments.dataset,
        "data.version": arguments.version,
        "data.train": arguments.train,
        "data.val": arguments.val,
        "data.label_map": arguments.label_map,
    }
    overrides = [f"{path}={value}" for path, value in named.items() if value is not None]
    settings = change(saved, overrides + arguments.set)
    labels.check_classes(settings)
    return settings


def evaluate(arguments: argparse.Namespace) -> None:
    device = distributed.choose_device(arguments.device)
    rank, world = distributed.start(device)
    chief = rank == 0
    saved = checkpoint.load(arguments.ckpt, arguments.preset, arguments.set)
    settings = choose_settings(arguments, saved.config)
    tasks = TASKS if "all" in arguments.task else tuple(arguments.task)
    folder = arguments.ckpt if arguments.ckpt.is_dir() else arguments.ckpt.parent
    trained = runs.read(folder)
    same = trained and trained.settings.data.dataset == settings.data.dataset
    where = runs.completed(folders(arguments), trained.folders if same else Folders())
    out = arguments.out or folder / "eval"
    with files.owned(out) if chief else contextlib.nullcontext():
        if chief and arguments.video:
            plugin, why_not = pictures.video_plugin()
            if why_not:
                print(f"note: {why_not}")
        untrained = replace(settings, backbone=replace(settings.backbone, weights="none"))
        model = SelfOcc(untrained).to(device).eval()
        checkpoint.restore(saved, model)
        with distributed.chief_first():  # it fills the cache of the synthetic data
            dataset, training = (
                VideoDataset(
                    open_sequences(settings.data, split, where), settings.data, train=False
                )
                for split in ("val", "train")
            )
        if chief:
            taken = [f"{where.data}, as in training"] if where.data and not arguments.data else []
            for line in [*taken, *dataset.notes]:
                print(f"note: {line}")

        damaged = [line for s in dataset.sequences for line in s.damaged]
        if damaged and "occupancy" in tasks:
            raise InputError(f"{damaged[0]}, or score without --task occupancy")
        rules = protocols.choose(settings, arguments.protocol)
        frames = arguments.frames, arguments.prior_frames
        what = evaluation.identity(model, dataset, training, tasks, rules, *frames, rank)
        journal = Journal(out, what, rank, arguments.resume)
        priors = evaluation.gather_priors(
            model, training, arguments.prior_frames, rules, rank, world
        )
        tables = evaluation.evaluate(
            model,
            dataset,
            device,
            tasks,
            priors,
            arguments.frames,
            rules,
            journal,
            rank,
            world,
            progress=chief,
        )
        if not tables:
            raise InputError(
                f"nothing to score: the data has no truth for --task {' '.join(tasks)} (see the "
                "notes)"
            )
        if not chief:
            return
        prior_frames = min(arguments.prior_frames, len(training))
        print(
            f"{settings.preset} at step {saved.step}, {settings.data.dataset}, {len(dataset)} "
            f"frames, protocol: {rules.protocol}; priors from {prior_frames} of {len(training)} "
            "training frames"
        )
        for name, table in tables.items():
            print(f"\n{format_table(f'{name} ({rules.protocol})', table)}")
        summary = {
            "preset": settings.preset,
            "step": saved.step,
            "dataset": settings.data.dataset,
            "protocol": rules.protocol,
            "prior_frames": prior_frames,
        }
        files.write_file(out / "metrics.json", json.dumps(summary | tables, indent=1).encode())

        shown = min(arguments.pictures, len(dataset))
        for number in tqdm(range(shown), desc="pictures"):
            index = number * len(dataset) // shown
            panel = panels.panel(model, dataset, index, device)
            pictures.write_picture(out / f"frame_{index:04d}.png", panel)
        if arguments.video:
            frames = panels.FlyThrough(model, dataset, device)
            print(f"video: {pictures.write_video(out / 'video', frames, plugin=plugin)}")
        print(f"\nwritten to {out}")


def format_table(name: str, table: Table) -> str:
    columns = [key for key in COLUMNS if any(key in row for row in table.values())]
    width = max(len(name), *(len(method) for method in table)) + 2
    lines = [name.ljust(width) + "".join(COLUMNS[c].rjust(10) for c in columns)]
    for method, row in table.items():
        cells = (f"{row[c]:.3f}".rjust(10) if c in row else " " * 10 for c in columns)
        lines.append(method.ljust(width) + "".join(cells))
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    """The command line (or `words` instead of it); returns the exit code."""
    return run(lambda: evaluate(parse_arguments(words)))


if __name__ == "__main__":
    sys.exit(main())
