"""Devices and data parallelism: one process a GPU under torchrun, gloo where there is none."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from selfocc import InputError


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or a GPU where there is one (this process's own under torchrun).

    Raises InputError if it cannot be used here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device == torch.device("cuda"):
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used here: {reason}") from None
    return device


def allow_tf32(device: torch.device) -> None:
    """Let this process multiply in TF32 on a GPU and try which convolution is fastest there.

    Factors are then rounded to 11 bits, sums are not. Convolutions do that by PyTorch's default,
    so the network's features carry such errors anyway; what is published has to hold with them.
    Positions do not: see `geometry.exact_products`. On a CPU nothing changes.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def start(device: torch.device) -> tuple[int, int]:
    """Join the processes of torchrun; returns (rank, world size), (0, 1) without torchrun.

    A GPU is set to compute as fast as training wants.
    """
    allow_tf32(device)
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def first_to_fail() -> bool:
    """Whether no other process has called this before; always true without torchrun."""
    if "WORLD_SIZE" not in os.environ:
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
    if dist.is_initialized() and dist.get_rank() > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and dist.get_rank() == 0:
        dist.barrier()


def mean(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes, differentiable."""
    return _Mean.apply(value) if dist.is_initialized() else value


def gather_dicts(entries: dict) -> dict:
    """The entries of all processes' dictionaries, in every process."""
    if not dist.is_initialized():
        return entries
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, entries)
    return {key: value for part in parts for key, value in part.items()}


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


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Replace batch norm by its synchronised form, torch's own where it runs."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm
    return model
