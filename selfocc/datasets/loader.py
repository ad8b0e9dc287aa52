"""Samples read ahead by worker processes, which hand tensors over in shared memory."""

import dataclasses
import itertools
import os
import signal
import sys
from multiprocessing.queues import Queue
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from selfocc import InputError

PREFETCH = 2  # batches that a worker makes ahead
SHARED = Path("/dev/shm")  # where Linux keeps shared memory; containers often have 64 MB of it


def read_ahead(dataset: Dataset, workers: int, world: int = 1, beside: int = 0, **options):
    """A DataLoader with `workers` processes, 0 for none, in each of `world` processes.

    beside: samples that another loader makes at the same time for each batch of this one. Raises
    InputError where shared memory cannot hold what is read ahead.
    """
    if workers:
        options |= {"worker_init_fn": _start_worker, "prefetch_factor": PREFETCH}
    loader = DataLoader(dataset, num_workers=workers, **options)
    if workers and SHARED.is_dir():
        _check_shared_memory(loader, world, beside)
    return loader


def _check_shared_memory(loader: DataLoader, world: int, beside: int) -> None:
    keys = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    for first in itertools.islice(keys, 1):
        keys = first if isinstance(first, list) else [first]
        sample = _tensor_bytes(loader.dataset[keys[0]])
        # one more is used by the main process, and one it has just received
        batches = PREFETCH * loader.num_workers + 2
        needed = batches * (len(keys) + beside) * sample
        together = needed * min(world, int(os.environ.get("LOCAL_WORLD_SIZE", world)))
        disk = os.statvfs(SHARED)
        free, size = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
        if needed > free or together > size:
            raise InputError(
                f"{SHARED} has {free / 1e6:.0f} of {size / 1e6:.0f} MB free, and "
                f"{loader.num_workers} workers that read ahead need {together / 1e6:.0f} MB; give "
                "the container more (docker run --shm-size=8g), or --set optim.workers=0"
            )


def _tensor_bytes(item) -> int:
    if isinstance(item, Tensor):
        return item.numel() * item.element_size()
    if dataclasses.is_dataclass(item):
        return sum(_tensor_bytes(getattr(item, field.name)) for field in dataclasses.fields(item))
    return 0


def _start_worker(_: int):
    """Ctrl-C is for the main process, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # otherwise what cannot be handed over is dropped, and the main process waits for it for ever
    Queue._on_queue_feeder_error = staticmethod(_end_worker)


def _end_worker(error: Exception, _):
    print(f"a worker that reads ahead ends: {error}", file=sys.stderr, flush=True)
    os._exit(1)
