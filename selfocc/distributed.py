"""Devices and data parallelism: one process a GPU under torchrun, gloo where there is none."""

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from selfocc import InputError

# what torchrun tells its processes; a scheduler may export some of these for reasons of its own
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MEETING = timedelta(minutes=5)  # within which all processes have to be there
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of glibc's mallopt
WORK = timedelta(minutes=30)  # for which others wait while the first renders, indexes or validates


def under_torchrun() -> bool:
    """Whether torchrun, or who sets all that it sets, started this process."""
    return all(os.environ.get(name) for name in _TORCHRUN)


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or a GPU where there is one (this process's own under torchrun).

    Raises InputError if it cannot be used here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    asked = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    refused = f"--device {name} cannot be used here"
    if name.partition(":")[0] == "mps":
        raise InputError(f"{refused}: cameras are float64, which MPS lacks; give --device cpu")
    if not asked:
        raise InputError(f"{refused}; it may be cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device(name)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        built = torch.version.cuda or torch.version.hip
        reason = "finds no GPU; is its driver there?" if built else "is built for CPUs only"
        raise InputError(f"{refused}: this PyTorch ({torch.__version__}) {reason}")
    number = asked[1]
    if number is None:
        number = _number("LOCAL_RANK") if under_torchrun() else 0
    if int(number) >= gpus:
        whose = "" if asked[1] else f", and process {number} of this machine needs its own"
        raise InputError(f"{refused}: the GPUs here are 0 to {gpus - 1}{whose}")
    device = torch.device("cuda", int(number))
    try:
        torch.empty(0, device=device)
    except RuntimeError as error:
        raise InputError(f"{refused}: {str(error).splitlines()[0]}") from None
    return device


def tune(device: torch.device) -> None:
    """Let this process compute as fast as the device can.

    On a GPU it tries which convolution is fastest. On a CPU memory is kept: glibc gives large
    temporaries back to the system, which clears every page again when the next one is made.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        return
    torch.set_flush_denormal(True)  # Adam's vanishing moments are slow otherwise
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # a C library without it, musl
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_TRIM_THRESHOLD, 2**31 - 1)
            mallopt(_MMAP_MAX, 0)


def allow_tf32(allowed: bool) -> None:
    """Let a GPU round the factors of matrix products and convolutions to TF32, of 11 bits, or not.

    Sums are float32 in any case, and positions exact: see `geometry.exact_products`.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def start(device: torch.device) -> tuple[int, int]:
    """Join the processes of torchrun; returns (rank, world size), (0, 1) without torchrun.

    The device is tuned. Raises InputError where torchrun's variables
    make no sense, or the processes do not meet.
    """
    tune(device)
    if not under_torchrun():
        if os.environ.get("WORLD_SIZE", "1") != "1":
            missing = ", ".join(name for name in _TORCHRUN if not os.environ.get(name))
            said = f"WORLD_SIZE is set but {missing} not, so this is no torchrun: one process"
            print(f"note: {said}", file=sys.stderr)
        return 0, 1
    rank, world, _ = (_number(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if rank >= world:
        raise InputError(
            f"RANK is {rank} and WORLD_SIZE {world}, so there is no such process; start with "
            "torchrun, or unset both"
        )
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=MEETING))
        store.set_timeout(WORK)
        backend = "nccl" if gpu else "gloo"
        dist.init_process_group(backend, timeout=WORK, store=store, rank=rank, world_size=world)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).splitlines()[0]
        raise InputError(
            f"process {rank} of {world} did not meet the others at {where} ({reason}); start all "
            f"with torchrun, on another port if this one is taken, or unset {_TORCHRUN[0]}"
        ) from None
    return rank, world


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise InputError(
            f"{name} is {text!r} in the environment, and no whole number; start with torchrun, "
            f"or unset {name}"
        )
    return int(text)


def joined() -> bool:
    """Whether this process has joined others."""
    return dist.is_available() and dist.is_initialized()  # some builds have no torch.distributed


def first_to_fail() -> bool:
    """Whether no other process has called this before; always true without torchrun."""
    # before `start` only torchrun itself keeps a store
    kept = joined() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not (under_torchrun() and kept):
        return True
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=10))
        return store.add("selfocc failures", 1) == 1
    except dist.DistError:
        return True


@contextlib.contextmanager
def chief_first() -> Iterator[None]:
    """The block runs in rank 0 before the others, which then find what it left on disk."""
    if joined() and dist.get_rank() > 0:
        dist.barrier()
    yield
    if joined() and dist.get_rank() == 0:
        dist.barrier()


def mean(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes, differentiable."""
    return _Mean.apply(value) if joined() else value


def in_any(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process, of several; a GPU has to be waited for then."""
    if not joined() or dist.get_world_size() == 1:
        return flag
    return mean(torch.tensor(float(flag), device=device)).item() > 0


def gather_dicts(entries: dict) -> dict:
    """The entries of all processes' dictionaries, in every process."""
    if not joined():
        return entries
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, entries)
    return {key: value for part in parts for key, value in part.items()}


def parallel(
    model: nn.Module, device: torch.device, batch_norm: bool, partly: bool = False
) -> nn.Module:
    """The model as one of several processes runs it, batch norm over all of them if asked for;
    `partly`: some steps do not use all of it.
    """
    if not joined() or dist.get_world_size() == 1:
        return model
    if batch_norm and device.type == "cuda":  # torch's own
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules() if batch_norm else ():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm
    return nn.parallel.DistributedDataParallel(
        model, gradient_as_bucket_view=True, find_unused_parameters=partly
    )


class _Mean(torch.autograd.Function):
    """Its gradient is the mean of the gradients, as each process's loss is a share of the whole."""

    @staticmethod
    def forward(_, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(_, gradient: Tensor) -> Tensor:
        return _Mean.forward(_, gradient.contiguous())


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over all processes. torch's own runs on GPUs only; this one also on gloo."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        average = mean(x.mean((0, 2, 3)))
        centred = x - average[:, None, None]
        variance = mean(centred.square().mean((0, 2, 3)))
        with torch.no_grad():
            count = x.numel() // x.shape[1] * dist.get_world_size()
            self.num_batches_tracked += 1
            self.running_mean.lerp_(average, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = (torch.rsqrt(variance + self.eps) * self.weight)[:, None, None]
        return centred * scale + self.bias[:, None, None]
