"""Checkpoints: one safetensors file with weights, optimiser moments, configuration and step.

    python -m selfocc.checkpoint import published.pth out.safetensors [--preset NAME]
    python -m selfocc.checkpoint export ours.safetensors published.pth
    python -m selfocc.checkpoint ship runs/NAME selfocc/weights/NAME.safetensors

There is no random state to store: every random number of a training step is a function of
(seed, step), so that step k of a resumed run is step k of the uninterrupted one.
"""

import json
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from selfocc import InputError, published
from selfocc.commandline import Parser, add_set, run
from selfocc.config import Config, from_dict, to_dict
from selfocc.files import replacing

FILE_NAME = "checkpoint.safetensors"
_FORMAT = "selfocc-1"
_PARTS = ("model", "optimizer", "inert")
WEIGHTS = Path(__file__).with_name("weights")  # small trained networks, each with its card


@dataclass
class Checkpoint:
    config: Config
    step: int  # optimiser steps taken
    model: dict[str, Tensor]
    # "<parameter name>/<exp_avg | exp_avg_sq | step>"
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    # what the published network has and does not use, by its names
    inert: dict[str, Tensor] = field(default_factory=dict)


def save(path: Path, config: Config, step: int, model: nn.Module, optimizer: torch.optim.Optimizer):
    """Write a checkpoint; `path` is always a whole file, the old one if this fails.

    Raises InputError if it cannot be written (full disk, no permission).
    """
    moments = {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    write(path, Checkpoint(config, step, model.state_dict(), moments))


def write(path: Path, checkpoint: Checkpoint):
    """Write a checkpoint as `save` does."""
    tensors = {
        f"{part}/{name}": tensor.detach().contiguous()
        for part in _PARTS
        for name, tensor in getattr(checkpoint, part).items()
    }
    metadata = {
        "format": _FORMAT,
        "step": str(checkpoint.step),
        "config": json.dumps(to_dict(checkpoint.config)),
    }
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(str(error)) from None


def shipped(path: Path) -> Path | None:
    """The weights of this name that come with the package; None for any other path."""
    file = WEIGHTS / f"{path}.safetensors"
    return file if len(path.parts) == 1 and not path.exists() and file.is_file() else None


def load(path: Path, preset: str | None = None, overrides: list[str] = ()) -> Checkpoint:
    """Read a checkpoint file, the one in a run folder, one that is `shipped`, or a published one.

    Half precision is read as float32.

    `preset` and overrides say what a published file is, as in `published.import_published`.
    Raises InputError if there is none, or if it is truncated or not a SelfOcc checkpoint.
    """
    path = shipped(Path(path)) or Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        known = [file.stem for file in WEIGHTS.glob("*.safetensors")]
        ours = f", or {' or '.join(sorted(known))}, which the code brings" if known else ""
        raise InputError(
            f"no checkpoint at {path}; train one with `python train.py`, or name another{ours}"
        )
    if path.suffix in (".pth", ".pt", ".ckpt") or zipfile.is_zipfile(path):
        config, model, inert = published.import_published(path, preset, overrides)
        return Checkpoint(config, 0, model, inert=inert)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise InputError(f"{path} is a safetensors file, but not a SelfOcc checkpoint")
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            tensors = {n: x.float() if x.dtype == torch.float16 else x for n, x in tensors.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable checkpoint (truncated?): {error}") from None
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = tensor
    config = from_dict(json.loads(metadata["config"]))
    if preset not in (None, config.preset):
        raise InputError(f"{path} is of preset {config.preset}, not {preset}; leave --preset out")
    return Checkpoint(config, int(metadata["step"]), **parts)


def restore(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
):
    """Load weights, and the optimiser's moments where one is given.

    Raises InputError naming the first parameter that is missing, unexpected or of another shape.
    """
    expected = model.state_dict()
    for name in sorted(expected.keys() | checkpoint.model.keys()):
        ours, theirs = expected.get(name), checkpoint.model.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            shapes = ["absent" if t is None else str(tuple(t.shape)) for t in (ours, theirs)]
            raise InputError(
                f"the checkpoint is of another model: {name} is {shapes[1]} there and {shapes[0]} "
                f"here, in preset {checkpoint.config.preset!r} with the options given"
            )
    model.load_state_dict(checkpoint.model)
    if optimizer is None:
        return
    parameters = dict(model.named_parameters())
    for key, value in checkpoint.optimizer.items():
        name, _, moment = key.rpartition("/")
        parameter = parameters[name]
        if value.shape == parameter.shape:  # laid out in memory as the parameter is
            value = torch.empty_like(parameter, requires_grad=False).copy_(value)
        optimizer.state[parameter][moment] = value.to(parameter.device)


def convert(words: list[str] | None) -> None:
    """The command line: to and from published checkpoints. Raises InputError as they do."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("import", "a published checkpoint as one of ours"),
        ("export", "one of ours as the published scripts read it"),
        ("ship", "the weights of one of ours alone, matrices in half precision"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("source", type=Path)
        command.add_argument("out", type=Path)
        if name == "import":
            command.add_argument("--preset", metavar="NAME", help="default: guessed, and said")
            add_set(command, "what cannot be read off the file, such as encoder.heads")
    arguments = parser.parse_args(words)
    if arguments.command == "import":
        found = published.import_published(arguments.source, arguments.preset, arguments.set)
        config, model, inert = found
        write(arguments.out, Checkpoint(config, 0, model, inert=inert))
    elif arguments.command == "ship":
        saved = load(arguments.source)
        # norms stay: a variance may be beyond half precision
        halved = {n: x.half() if x.ndim > 1 else x for n, x in saved.model.items()}
        write(arguments.out, Checkpoint(saved.config, saved.step, halved))
    else:
        saved = load(arguments.source)
        published.export_published(arguments.out, saved.config, saved.model, saved.inert)
    print(f"written to {arguments.out}")


def main(words: list[str] | None = None) -> int:
    """The command line (or `words` instead of it); returns the exit code."""
    return run(lambda: convert(words))


if __name__ == "__main__":
    sys.exit(main())
