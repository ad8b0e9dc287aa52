"""What the scripts share: whatever goes wrong is told in one line, with an exit code."""

import argparse
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NoReturn, get_args

import torch

from selfocc import InputError, distributed
from selfocc.config import FOOTAGE, Config, Dataset, Folders
from selfocc.labels import TABLES
from selfocc.settings import entries


class Parser(argparse.ArgumentParser):
    """Keeps the layout of the description, and raises InputError for wrong options."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.register("type", Path, path)  # what `type=Path` does

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: --([\w-]+)", message)
        name = unknown and unknown[1].replace("-", "_")
        for setting, *_ in entries(Config()):
            if setting.partition(".")[2] == name:
                message += f": it is a setting, --set {setting}=VALUE"
        raise InputError(f"{message}; --help lists the options")


def count(text: str, least: int = 0) -> int:
    """Of frames or pictures on the command line."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
    return int(text)


def path(text: str) -> Path:
    """A path; `~`, which shells leave in quotes and after `--out=`, is the home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InputError(f"{text}: there is no such home folder; give the whole path") from None


def add_shared_options(parser: Parser) -> None:
    """The options of train.py and eval.py."""
    add_data_options(parser)
    said = "cpu, cuda or cuda:N; default: cuda where there is one"
    parser.add_argument("--device", help=said)


def add_data_options(parser: Parser) -> None:
    """What `folders` and `overrides` collect."""
    add = parser.add_argument
    said = "default: the preset's, or what the checkpoint was trained on"
    add("--dataset", choices=get_args(Dataset), help=said)
    add("--data", type=Path, metavar="DIR", help="folder of the data set")
    add("--version", metavar="NAME", help="nuScenes: which tables, such as v1.0-mini")
    said = "sequences and frames for training (and for the priors), such as 06:0-39"
    add("--train", metavar="SEQ[:A-B],..", help=said)
    add("--val", metavar="SEQ[:A-B],..", help="the same for validation")
    said = "KITTI raw: folder of train_files.txt, val_files.txt, ...; --train and --val NAME"
    add("--split-dir", type=Path, metavar="DIR", help=f"{said} choose NAME_files.txt in it")
    said = "KITTI raw: folder of DATE/DRIVE.txt pose files"
    add("--poses", type=Path, metavar="DIR", help=said)
    said = "2-D pseudo labels: 8-bit PNGs, named and laid out as the images below --data"
    add("--labels", type=Path, metavar="DIR", help=said)
    said = f"what their ids mean: {', '.join(TABLES)} or a JSON file (see selfocc/labels.py)"
    add("--label-map", metavar="MAP", help=said)
    said = "posed: metres that a unit of the poses is; or"
    add("--scale", dest="scale_metres", metavar="METRES", help=said)
    add("--camera-height", metavar="METRES", help="posed: of the camera above the ground; or")
    add(
        "--path-length", metavar="METRES", help="posed: of the whole way, as GPS or odometry has it"
    )
    add("--up", metavar="X,Y,Z", help="posed: what is up in the axes of the poses; default: found")
    add_set(parser, "change any setting of config.py")


def add_set(parser: argparse.ArgumentParser, said: str) -> None:
    """The option --set, which may be repeated."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help=said
    )


def folders(arguments: argparse.Namespace) -> Folders:
    return Folders(
        data=arguments.data,
        labels=arguments.labels,
        splits=arguments.split_dir,
        poses=arguments.poses,
    )


def overrides(arguments: argparse.Namespace, more: dict[str, object] | None = None) -> list[str]:
    """What the shared options change in the settings, as --set says it, which comes last.

    more: the same of a script's own options, None where they are not given.
    """
    named = ("dataset", "version", "train", "val", "label_map", *FOOTAGE)
    values = {f"data.{name}": getattr(arguments, name) for name in named} | (more or {})
    given = [f"{path}={value}" for path, value in values.items() if value is not None]
    if arguments.dataset not in (None, "posed"):  # a network that learnt from footage sees another
        given[:0] = [f"data.{name}=none" for name in FOOTAGE]
    return given + arguments.set


class Stopped(Exception):
    """The user asked to stop, and what was done so far is saved; the message says where."""


class StopRequest:
    """The first Ctrl-C (or SIGTERM) lets the running step finish and save; the second stops."""

    def __init__(self):
        self.requested = False
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._ask)

    def _ask(self, number, _):
        self.requested = True
        signal.signal(number, signal.default_int_handler)


def run(work: Callable[[], None]) -> int:
    """Do the work and return the exit code: 0, 2 for bad input, 130 when interrupted.

    Of several processes only the first to fail says why; the others lose their peer and follow.
    """
    _make_writable()
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except (Stopped, KeyboardInterrupt) as note:
        said = str(note) if isinstance(note, Stopped) else "interrupted"
        if said:
            print(said, file=sys.stderr)
        return 130
    except (InputError, MemoryError, OSError, RuntimeError) as error:
        reason = _reason(error)
        if distributed.first_to_fail():
            if reason is None:
                raise
            print(f"error: {reason}", file=sys.stderr)
        return 2
    return 0


def _reason(error: Exception) -> str | None:
    """What the user is told; None for a fault of the program."""
    said = str(error)
    if isinstance(error, InputError):
        return error.line()
    if isinstance(error, OSError):
        return ": ".join(str(x) for x in (error.filename, error.strerror or error) if x)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in said:
        reason = f" ({said.partition('. ')[0]})" if said else ""
        return (
            f"out of memory{reason}; what was saved is intact. Lower optim.batch (and raise "
            "optim.accumulate), render.rays or render.samples, or set optim.bf16=true"
        )
    if isinstance(error, BrokenProcessPool) or said.startswith("DataLoader worker (pid"):
        return (
            f"a process that reads or renders ahead was ended ({said.splitlines()[0]}); is memory "
            "short, or /dev/shm (docker run --shm-size)? --set optim.workers=0 needs the least"
        )
    return None


def _make_writable() -> None:
    """Make stdout and stderr take whatever is printed: they may be closed, or know ASCII only."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - it stays open
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
