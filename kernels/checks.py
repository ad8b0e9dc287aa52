"""Arguments of the public functions: checked once, by name, and read as float32 at least."""

import torch
from torch import Tensor


def check(
    known: dict[str, int] | None = None,
    /,
    **arguments: tuple[Tensor | None, str] | tuple[Tensor | None, str, torch.dtype],
) -> None:
    """Shape, kind of numbers and device of tensors, in this order; None is passed over.

        check(l1=(l1, "B K>=1 N R"), seen=(seen, "B K N R", torch.bool), target=(target, "B N R 3"))

    A letter is the same number wherever it stands, the one in `known` if it is there; "..." is any
    sizes in front. Numbers are floating point where no type is given. All tensors lie on the
    device of the first.
    Raises ValueError that starts with the name of the argument.
    """
    sizes, first = dict(known or {}), None
    for name, (tensor, shape, *dtype) in arguments.items():
        if tensor is None:
            continue
        words, found, wanted = shape.split(), [*tensor.shape], []
        front = len(found) - len(words) + 1
        if words[0] == "..." and front >= 0:
            found = [tuple(found[:front]), *found[front:]]
        fits = len(found) == len(words)
        for i, word in enumerate(words):
            letter, _, least = word.partition(">=")
            known = int(letter) if letter.isdecimal() else sizes.get(letter, word)
            wanted += known if isinstance(known, tuple) else [known]
            if fits:
                size = sizes.setdefault(letter, found[i])
                fits = found[i] == known if known is not word else not least or size >= int(least)
        if not fits:
            wanted = ", ".join(map(str, wanted))
            raise ValueError(f"{name} must be [{wanted}], got {[*tensor.shape]}")
        if tensor.dtype != dtype[0] if dtype else not tensor.is_floating_point():
            kind = dtype[0] if dtype else "floating point"
            raise ValueError(f"{name} must be {kind}, got {tensor.dtype}")
        first = first or (name, tensor.device)
        if tensor.device != first[1]:
            raise ValueError(f"{name} is on {tensor.device}, {first[0]} on {first[1]}")


def at_least_float32(x: Tensor) -> Tensor:
    """What plain PyTorch computes with: the precision of the kernels, or float64."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
