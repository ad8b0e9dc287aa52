"""Checkpoints: one safetensors file with weights, optimiser moments, configuration and step.

There is no random state to store: every random number of a training step is a function of
(seed, step), so that step k of a resumed run is step k of the uninterrupted one.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from selfocc import InputError
from selfocc.config import Config, from_dict, to_dict
from selfocc.files import replacing

FILE_NAME = "checkpoint.safetensors"
_FORMAT = "selfocc-1"


@dataclass
class Checkpoint:
    config: Config
    step: int  # optimiser steps taken
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]  # "<parameter name>/<exp_avg | exp_avg_sq | step>"


def save(path: Path, config: Config, step: int, model: nn.Module, optimizer: torch.optim.Optimizer):
    """Write a checkpoint; `path` is always a whole file, the old one if this fails.

    Raises InputError if it cannot be written (full disk, no permission).
    """
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{key}"] = value
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": _FORMAT, "step": str(step), "config": json.dumps(to_dict(config))}
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from None


def load(path: Path) -> Checkpoint:
    """Read a checkpoint file, or the one in a run folder.

    Raises InputError if there is none, or if it is truncated or not a SelfOcc checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise InputError(
            f"no checkpoint at {path}; train one with `python train.py`, or name another"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise InputError(f"{path} is a safetensors file, but not a SelfOcc checkpoint")
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable checkpoint (truncated?): {error}") from None
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = tensor
    return Checkpoint(from_dict(json.loads(metadata["config"])), int(metadata["step"]), **parts)


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
        optimizer.state[parameters[name]][moment] = value.to(parameters[name].device)
