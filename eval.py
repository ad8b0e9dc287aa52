"""Evaluate a checkpoint: tables, pictures, video, a page to turn voxels in a browser.

    python eval.py --ckpt runs/synthetic
    python eval.py --ckpt FILE --dataset kitti --data DIR --task all --video
    python eval.py --ckpt published.pth --preset nuscenes --data DIR
    python eval.py --ckpt FILE --dataset kitti --data DIR --resume     # go on where it was stopped
    torchrun --nproc-per-node 8 eval.py --ckpt FILE --dataset kitti --data DIR

The table `occupancy where the camera sees` is the fair one for a single image. Its row `exact
depth` (or `LiDAR depth`) is the true depth of that image put into voxels: more it cannot show.

The output folder receives metrics.json (the tables), frames.R.jsonl (the scores of every frame),
panel pictures of some frames, the video, and the page (--html).
"""

import os

# waiting threads must not spin: data workers share the cores
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's, for matrices of a few columns

import argparse
import contextlib
import json
import sys
from dataclasses import replace
from functools import partial
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
    labels,
    panels,
    pictures,
    presets,
    protocols,
    runs,
)
from selfocc.config import Config, Folders
from selfocc.datasets import open_sequences
from selfocc.datasets.video import VideoDataset
from selfocc.journal import Journal
from selfocc.model import SelfOcc
from selfocc.scores import Table
from selfocc.settings import change

TASKS = ("occupancy", "depth", "novel_depth")
OF_A_STREET = 5  # frames at least that priors take of an embedded one; more need not be rendered
COLUMNS = {  # key in metrics.json -> title
    "iou": "IoU", "iou_above": "IoU>0.3m", "precision": "precision", "recall": "recall",
    "threshold": "threshold", "abs_rel": "AbsRel", "sq_rel": "SqRel", "rmse": "RMSE",
    "rmse_log": "RMSElog", "a1": "a1", "a2": "a2", "a3": "a3", "scale": "scale", "error": "SSIM+L1",
    "iou_12.8": "IoU@12.8", "iou_25.6": "IoU@25.6", "iou_51.2": "IoU@51.2",
    "iou_above_12.8": "high@12.8", "iou_above_25.6": "high@25.6", "iou_above_51.2": "high@51.2",
    "ray": "RayIoU", "ray_1": "RayIoU@1", "ray_2": "RayIoU@2", "ray_4": "RayIoU@4",
}  # fmt: skip
EXPLAINED = """columns:
  IoU, precision, recall  of occupied voxels, over all frames, where the truth is known; in the
                          table `semantics` of a class; mIoU is the mean over the classes seen,
                          and as published classes that are never seen count 1
  IoU>0.3m                of voxels more than 0.3 m above the ground below them
  threshold               a voxel is occupied where the SDF (or prior) is at most this
  IoU@R, high@R           of voxels up to R m ahead and aside that the input image sees (without a
                          mask in the data, as selfocc/sight.py says), all or more than 0.3 m above
                          the ground; best thresholds are those of each column
  RayIoU@T                of rays of a LiDAR (selfocc/sight.py): right are those that leave the
                          first occupied voxel less than T m from where they do in the truth; RayIoU
                          is the mean over T, and its rows by class ask for the class as well
  AbsRel .. a3            errors of z-depth in metres, averaged over points, frames and cameras;
                          a1 is the share of points off by a factor below 1.25, a2 1.25^2, a3 1.25^3
  scale                   depth was multiplied by it: median of the truth / of the prediction
  SSIM+L1                 difference of an image and its neighbours warped by the rendered depth
"""


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    epilog = f"{EXPLAINED}\n{protocols.__doc__}"
    parser = commandline.Parser(description=__doc__, epilog=epilog)
    add, some = parser.add_argument, partial(commandline.count, least=1)
    said = "checkpoint or run folder, or a name in selfocc/weights"
    add("--ckpt", type=Path, required=True, metavar="FILE", help=said)
    said = "of a published checkpoint; default: guessed, and said"
    add("--preset", metavar="NAME", help=said)
    commandline.add_shared_options(parser)
    said, usual = "one or more; default: occupancy depth", ["occupancy", "depth"]
    add("--task", nargs="+", default=usual, choices=[*TASKS, "all"], help=said)
    said = "see below; default: published, and own for the embedded world"
    add("--protocol", choices=protocols.PROTOCOLS, help=said)
    said = "keep the frames that an earlier run has scored"
    add("--resume", action="store_true", help=said)
    said = "evaluate N frames, evenly spread; default: all"
    add("--frames", type=some, metavar="N", help=said)
    said = "training frames from which baselines learn; default: 100, where more know better"
    add("--prior-frames", type=commandline.count, default=100, metavar="N", help=said)
    add("--out", type=Path, metavar="DIR", help="default: `eval` in the run folder")
    add("--pictures", type=commandline.count, default=6, metavar="N", help="panels to write")
    said = "write a video along the first sequence: mp4 with `pip install imageio[pyav]`, or GIF"
    add("--video", action="store_true", help=said)
    add("--html", action="store_true", help="write page.html: voxels of the first sequence to turn")
    return parser.parse_args(words)


def evaluate(arguments: argparse.Namespace) -> None:
    device = distributed.choose_device(arguments.device)
    rank, world = distributed.start(device)
    saved = checkpoint.load(arguments.ckpt, arguments.preset, arguments.set)
    read = presets.reading(saved.config, arguments.dataset)
    settings = change(read, commandline.overrides(arguments))
    labels.check_classes(settings)
    folder = arguments.ckpt if arguments.ckpt.is_dir() else arguments.ckpt.parent
    if checkpoint.shipped(arguments.ckpt):
        folder = Path("runs") / arguments.ckpt
    trained = runs.read(folder)
    same = trained and trained.settings.data.dataset == settings.data.dataset
    given = commandline.folders(arguments)
    where = runs.completed(given, trained.folders if same else Folders())
    out = arguments.out or folder / "eval"
    with files.owned(out) if rank == 0 else contextlib.nullcontext():
        score(arguments, saved, settings, where, out, device, rank, world)


def score(
    arguments: argparse.Namespace,
    saved: checkpoint.Checkpoint,
    settings: Config,
    where: Folders,
    out: Path,
    device: torch.device,
    rank: int,
    world: int,
) -> None:
    """This process's share of the frames; the first process prints and draws what all found."""
    chief = rank == 0
    distributed.allow_tf32(settings.optim.tf32)
    plugin = None
    if chief and arguments.video:
        plugin, why_not = pictures.video_plugin()
        if why_not:
            print(f"note: {why_not}")
    model = SelfOcc(change(settings, ["backbone.weights=none"])).to(device).eval()
    checkpoint.restore(saved, model)
    with distributed.chief_first():  # it fills the cache of the synthetic data
        needed = max(1, min(settings.data.scenes, arguments.prior_frames // OF_A_STREET))
        read = {"val": settings.data, "train": replace(settings.data, scenes=needed)}
        dataset, training = (
            VideoDataset(open_sequences(data, split, where), data, train=False)
            for split, data in read.items()
        )
    if chief:
        taken = [f"{where.data}, as in training"] if where.data and not arguments.data else []
        for line in [*taken, *dataset.notes]:
            print(f"note: {line}")

    tasks = TASKS if "all" in arguments.task else tuple(arguments.task)
    damaged = [line for s in dataset.sequences for line in s.damaged]
    if damaged and "occupancy" in tasks:
        raise InputError(f"{damaged[0]}, or score without --task occupancy")
    rules = protocols.choose(settings, arguments.protocol)
    frames, prior_frames = arguments.frames, arguments.prior_frames
    what = evaluation.identity(model, dataset, training, tasks, rules, frames, prior_frames, rank)
    journal = Journal(out, what, rank, arguments.resume)
    priors = evaluation.gather_priors(model, training, prior_frames, rules, rank, world)
    tables = evaluation.evaluate(
        model, dataset, device, tasks, priors, frames, rules, journal, rank, world, progress=chief
    )
    if not tables:
        raise InputError(
            f"nothing to score: the data has no truth for --task {' '.join(tasks)} (see the notes)"
        )
    if not chief:
        return
    summary = {
        "preset": settings.preset,
        "step": saved.step,
        "dataset": settings.data.dataset,
        "protocol": rules.protocol,
        "frames": len(evaluation.evenly(dataset, frames)),
        "prior_frames": min(prior_frames, len(training)),
    }
    print(
        f"{settings.preset} at step {saved.step}, {settings.data.dataset}, {summary['frames']} of "
        f"{len(dataset)} frames, protocol: {rules.protocol}; priors from "
        f"{summary['prior_frames']} of {len(training)} training frames"
    )
    for name, table in tables.items():
        print(f"\n{format_table(f'{name} ({rules.protocol})', table)}")
    files.write_file(out / "metrics.json", json.dumps(summary | tables, indent=1).encode())

    shown = min(arguments.pictures, len(dataset))
    for number in tqdm(range(shown), desc="pictures"):
        index = number * len(dataset) // shown
        panel = panels.panel(model, dataset, index, device)
        pictures.write_picture(out / f"frame_{index:04d}.png", panel)
    if arguments.video:
        flight = panels.FlyThrough(model, dataset, device)
        print(f"video: {pictures.write_video(out / 'video', flight, plugin=plugin)}")
    if arguments.html:
        print(f"page: {panels.write_page(out / 'page.html', model, dataset, device)}")
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
    return commandline.run(lambda: evaluate(parse_arguments(words)))


if __name__ == "__main__":
    sys.exit(main())
