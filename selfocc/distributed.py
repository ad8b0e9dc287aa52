"""Devices and data parallelism with torch's own tools: one process a GPU under torchrun, gloo where there is none."""

import os

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_functional
from torch import Tensor, nn

from selfocc import InputError


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or a GPU where there is one (this process's own under torchrun).

    Raises InputError if it cannot be used here.
    """
    if name is None:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used here: {reason}") from None
    return device


def start(device: torch.device) -> tuple[int, int]:
    """Join the process group that torchrun prepared; returns (rank, world size), (0, 1) without torchrun."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes. torch's own runs on GPUs only; this one also on gloo."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        count = x.numel() // x.shape[1]
        moments = torch.cat([x.sum((0, 2, 3)), (x * x).sum((0, 2, 3))])
        total = count * dist.get_world_size()
        mean, square = (dist_functional.all_reduce(moments) / total).chunk(2)
        variance = square - mean * mean
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * total / (total - 1), self.momentum)
        scale = (torch.rsqrt(variance + self.eps) * self.weight)[:, None, None]
        return (x - mean[:, None, None]) * scale + self.bias[:, None, None]


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Replace batch norm by its synchronised form, torch's own where it runs."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm
    return model
