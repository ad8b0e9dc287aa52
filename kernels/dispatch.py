"""Which implementation runs, and one door through which every Triton kernel is launched.

The door can also only write down what would be launched, so that kernels are compiled for GPUs that
are not there with exactly the types and constants of a real call.
"""

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # there are no wheels outside Linux: the reference remains
    triton = SimpleNamespace(jit=lambda function: function)
    tl = SimpleNamespace(constexpr=object)

BACKENDS = ("auto", "torch", "triton")
_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "u1",
}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: what a compiler needs to know of it. A path is the name of an
    argument, or that and an index for what lies in a tuple, and another for a tuple in a tuple.
    """

    kernel: object  # the function under @triton.jit
    grid: tuple[int, ...]
    signature: dict[
        str, object
    ]  # argument name -> "*fp32", "i32", ..., "constexpr", tuples thereof
    constants: dict[tuple, object]  # by path
    warps: int
    registers: int | None = None  # at most, a thread
    aligned: tuple[tuple, ...] = ()  # paths of multiples of 16, on which loads rely


_AUTOCAST = {"cpu", "cuda"}  # devices that have it
_chosen = "auto"
_recorded: list[Launch] | None = None


def backend(name: str | None = None) -> str:
    """Choose how kernels are computed, or only ask; returns the choice.

    "auto" takes Triton for tensors on a GPU and plain PyTorch elsewhere; "torch" and "triton" force
    one. Raises ValueError for an unknown name and RuntimeError where Triton cannot run: without a
    GPU it needs TRITON_INTERPRET=1 in the environment before Python starts.
    """
    global _chosen
    if name is None:
        return _chosen
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "triton" and not (interpreting() or torch.cuda.is_available()):
        raise RuntimeError(
            "Triton needs a GPU; TRITON_INTERPRET=1 runs its kernels on the CPU, slowly"
        )
    if name == "triton" and not hasattr(triton, "compile"):
        raise RuntimeError("Triton is not installed; pip install -r requirements.txt")
    _chosen = name
    return name


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def use_triton(tensor: Tensor) -> bool:
    """Whether this call runs in Triton. float64 never does: it is for checking the mathematics. Nor
    does what is exported.
    """
    if tensor.dtype == torch.float64 or torch.compiler.is_exporting():
        return False
    if _recorded is not None and tensor.is_meta:
        return True
    if _chosen == "torch":
        return False
    if _chosen == "triton":
        if not (tensor.is_cuda or interpreting()):
            raise RuntimeError(
                f"the backend is triton, but the tensors are on {tensor.device}; move them to a "
                'GPU, set TRITON_INTERPRET=1, or choose backend("auto")'
            )
        return True
    return tensor.is_cuda and hasattr(triton, "compile")


def plainly_exported(function: Callable) -> Callable:
    """While `torch.export` traces, the function of the same name in `naive.py`, plain PyTorch."""

    @functools.wraps(function)
    def choose(*arguments, **options):
        if torch.compiler.is_exporting():
            naive = importlib.import_module("kernels.naive")  # which imports from the others
            return getattr(naive, function.__name__)(*arguments, **options)
        return function(*arguments, **options)

    return choose


def autocast_type(tensor: Tensor) -> torch.dtype | None:
    """What autocast takes for products on the tensor's device; None where it is off."""
    kind = tensor.device.type
    on = kind in _AUTOCAST and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def launch(
    kernel,
    grid: tuple[int, ...],
    *,
    warps: int = 4,
    registers: int | None = None,
    **arguments,
) -> None:
    """Run kernel[grid](**arguments) on the device of the first tensor; under `record` nothing runs.
    A grid without programs is not launched.

    registers: most that a thread may have on NVIDIA's GPUs, for kernels whose own choice spills.
    """
    if 0 in grid:
        return
    if _recorded is not None:
        types, constants, aligned = {}, {}, []
        for name in kernel.arg_names:
            if kernel.fn.__annotations__.get(name) is tl.constexpr:
                types[name], constants[name,] = "constexpr", arguments[name]
            else:
                types[name] = _type(arguments[name], (name,), constants, aligned)
        _recorded.append(Launch(kernel, grid, types, constants, warps, registers, tuple(aligned)))
        return
    first = next(x for x in _flat(arguments.values()) if isinstance(x, Tensor))
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        limit = {"maxnreg": registers} if registers and not torch.version.hip else {}
        kernel[grid](**arguments, num_warps=warps, **limit)


def _flat(arguments) -> Iterator:
    for x in arguments:
        yield from _flat(x) if isinstance(x, tuple) else (x,)


def _type(argument, path: tuple, constants: dict[tuple, object], aligned: list[tuple]):
    """The type of an argument that lies at a path, as Triton takes it at a launch: what is one is a
    constant, and what is a multiple of 16 is known to be.
    """
    if isinstance(argument, tuple):
        types = [_type(x, (*path, i), constants, aligned) for i, x in enumerate(argument)]
        return type(argument)(*types) if hasattr(argument, "_fields") else tuple(types)
    if argument is None or (type(argument) is int and argument == 1):
        constants[path] = argument
        return "constexpr"
    if isinstance(argument, Tensor):
        aligned.append(path)
        return "*" + _TYPES[argument.dtype]
    if isinstance(argument, int):
        if type(argument) is int and argument % 16 == 0:
            aligned.append(path)
        return "i32" if abs(argument) < 2**31 else "i64"
    return "fp32"


@contextlib.contextmanager
def record():
    """Launches inside the block are put into the list that it gives, and do not run.

    with record() as launches:
        forward_triton(*tensors_on_meta)
    """
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


try:
    backend(os.environ.get("SELFOCC_KERNELS", "auto"))
except (ValueError, RuntimeError) as error:  # typed in a shell: a line is enough there
    print(f"error: SELFOCC_KERNELS: {error}", file=sys.stderr)
    sys.exit(2)
