"""What the scripts share: whatever goes wrong is told in one line, with an exit code."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from selfocc import InputError, distributed
from selfocc.datasets import Folders
from selfocc.labels import TABLES


class Parser(argparse.ArgumentParser):
    """Keeps the layout of the description, and raises InputError for wrong options."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists the options")


def count(text: str) -> int:
    """Of frames or pictures on the command line."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def add_data_options(parser: Parser) -> None:
    """The options that say which data are read, for `folders` to collect."""
    parser.add_argument(
        "--dataset",
        choices=["synthetic", "kitti", "kitti_raw", "nuscenes"],
        help="default: the preset's, or what the checkpoint was trained on",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the data set")
    parser.add_argument(
        "--version", metavar="NAME", help="nuScenes: which tables, such as v1.0-mini"
    )
    parser.add_argument(
        "--train",
        metavar="SEQ[:A-B],..",
        help="sequences and frames for training (and for the priors), such as 06:0-39",
    )
    parser.add_argument("--val", metavar="SEQ[:A-B],..", help="the same for validation")
    parser.add_argument(
        "--split-dir",
        type=Path,
        metavar="DIR",
        help="KITTI raw: folder of train_files.txt, val_files.txt, ...; --train and --val NAME "
        "choose NAME_files.txt in it",
    )
    parser.add_argument(
        "--poses", type=Path, metavar="DIR", help="KITTI raw: folder of DATE/DRIVE.txt pose files"
    )
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="DIR",
        help="2-D pseudo labels: 8-bit PNGs, named and laid out as the images below --data",
    )
    parser.add_argument(
        "--label-map",
        metavar="MAP",
        help=f"what their ids mean: {', '.join(TABLES)} or a JSON file (see selfocc/labels.py)",
    )


def folders(arguments: argparse.Namespace) -> Folders:
    return Folders(
        data=arguments.data,
        labels=arguments.labels,
        splits=arguments.split_dir,
        poses=arguments.poses,
    )


class Stopped(Exception):
    """The user asked to stop, and what was done so far is saved; the message says where."""


def run(work: Callable[[], None]) -> int:
    """Do the work and return the exit code: 0, 2 for bad input, 130 when interrupted.

    Of several processes only the first to fail says why; the others lose their peer and follow.
    """
    try:
        work()
    except InputError as error:
        if distributed.first_to_fail():
            print(f"error: {error.line()}", file=sys.stderr)
        return 2
    except Stopped as note:
        if str(note):
            print(note, file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except RuntimeError:
        if distributed.first_to_fail():
            raise
        return 2
    return 0
