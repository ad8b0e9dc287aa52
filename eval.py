"""Evaluate a checkpoint: tables, pictures, video.

python eval.py --ckpt runs/synthetic
python eval.py --ckpt FILE --dataset kitti --data DIR --task all --video
"""

import os

# waiting threads must not spin: data workers share the cores
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from selfocc import InputError, checkpoint, config, distributed, evaluation, files, pictures
from selfocc.commandline import Parser, add_data_options, folders, run
from selfocc.datasets import open_sequences
from selfocc.datasets.video import VideoDataset
from selfocc.model import SelfOcc

TASKS = ("occupancy", "depth", "novel_depth")
COLUMNS = {
    "iou": "IoU", "iou_above": "IoU>0.3m", "precision": "precision", "recall": "recall",
    "threshold": "threshold", "abs_rel": "AbsRel", "sq_rel": "SqRel", "rmse": "RMSE",
    "rmse_log": "RMSElog", "a1": "a1", "a2": "a2", "a3": "a3", "scale": "scale", "error": "SSIM+L1",
}  # fmt: skip


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--ckpt", type=Path, required=True, metavar="FILE", help="checkpoint or run folder"
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
        "--frames", type=int, metavar="N", help="evaluate N frames, evenly spread; default: all"
    )
    parser.add_argument(
        "--prior-frames",
        type=int,
        default=24,
        metavar="N",
        help="training frames for the baselines",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: `eval` beside the checkpoint"
    )
    parser.add_argument("--pictures", type=int, default=6, metavar="N", help="panels to write")
    parser.add_argument(
        "--video", action="store_true", help="write a video along the first sequence"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="change a setting"
    )
    return parser.parse_args(words)


def evaluate(arguments: argparse.Namespace) -> None:
    device = distributed.choose_device(arguments.device)
    saved = checkpoint.load(arguments.ckpt)
    named = {
        "data.dataset": arguments.dataset,
        "data.version": arguments.version,
        "data.train": arguments.train,
        "data.val": arguments.val,
        "data.label_map": arguments.label_map,
    }
    overrides = [f"{path}={value}" for path, value in named.items() if value is not None]
    settings = config.override(saved.config, overrides + arguments.set)
    untrained = replace(settings, backbone=replace(settings.backbone, weights="none"))
    model = SelfOcc(untrained).to(device).eval()
    checkpoint.restore(saved, model)
    folder = arguments.ckpt if arguments.ckpt.is_dir() else arguments.ckpt.parent
    out = files.make_folder(arguments.out or folder / "eval")

    where = folders(arguments)
    dataset, training = (
        VideoDataset(open_sequences(settings.data, split, where), settings.data, train=False)
        for split in ("val", "train")
    )
    for line in dict.fromkeys(line for s in dataset.sequences for line in s.missing):
        print(f"note: {line}")

    tasks = TASKS if "all" in arguments.task else arguments.task
    priors = evaluation.gather_priors(model, training, arguments.prior_frames)
    tables = evaluation.evaluate(model, dataset, device, tasks, priors, arguments.frames)
    if not tables:
        raise InputError(
            f"nothing to score: the data has no truth for --task {' '.join(tasks)} (see the notes)"
        )
    print(f"{settings.preset} at step {saved.step}, {settings.data.dataset}, {len(dataset)} frames")
    for name, table in tables.items():
        print(f"\n{format_table(name, table)}")
    summary = {"preset": settings.preset, "step": saved.step, "dataset": settings.data.dataset}
    summary |= tables
    files.write_file(out / "metrics.json", json.dumps(summary, indent=1).encode())

    count = min(arguments.pictures, len(dataset))
    for number in tqdm(range(count), desc="pictures"):
        index = number * len(dataset) // count
        panel = evaluation.panel(model, dataset, index, device)
        pictures.write_picture(out / f"frame_{index:04d}.png", panel)
    if arguments.video:
        frames = evaluation.fly_through(model, dataset, device)
        print(f"video: {pictures.write_video(out / 'video', tqdm(frames, desc='video'))}")
    print(f"\nwritten to {out}")


def format_table(name: str, table: evaluation.Table) -> str:
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
