"""Seconds and bytes, on a GPU and on a CPU."""

import errno
import gc
import itertools
import os
import sys
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

import kernels

try:
    import resource
except ImportError:  # on Windows
    resource = None

# Bytes written before every run: no cache holds what the last run left, and while they are written
# (half a millisecond on an H200) Python gets ahead of the GPU.
_FLUSH = 1 << 31
_LONGEST = 10.0  # seconds of runs, after which the median is taken of fewer


def at_least_one(text: str) -> int:
    """The number of an option that counts something; raises ArgumentTypeError for others."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def check_output(path: Path) -> None:
    """Make the folder of a file that will be written. Raises OSError if it could not be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # which mkdir says of a file, as if that were well
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
    new = not path.exists()
    path.open("a").close()
    if new:
        path.unlink()


@contextmanager
def chosen_backend(name: str) -> Iterator[None]:
    """Inside, kernels are computed by the backend of this name."""
    before = kernels.backend()
    kernels.backend(name)
    try:
        yield
    finally:
        kernels.backend(before)


def gpu_seconds(runs: list[Callable], repeats: int) -> float:
    """Median over `repeats` runs that take turns, after one of each, by CUDA events."""
    for run in runs:
        run()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    runs[0]()
    torch.cuda.synchronize()
    repeats = max(3, min(repeats, int(_LONGEST / (time.perf_counter() - begun))))
    size = _FLUSH if torch.cuda.mem_get_info()[0] > 4 * _FLUSH else _FLUSH // 8
    junk = torch.empty(size, dtype=torch.uint8, device="cuda")
    events = []
    for run, _ in zip(itertools.cycle(runs), range(repeats), strict=False):
        junk.zero_()
        events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        events[-1][0].record()
        run()
        events[-1][1].record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in events) / 1e3


def copy_bandwidth(size: int = 1 << 30) -> float:
    """GB/s read and written by copying `size` bytes on the GPU: what no kernel exceeds by much."""
    a, b = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * size / gpu_seconds([lambda: b.copy_(a)], 20) / 1e9


def gpu_peak(run: Callable) -> int:
    """Bytes of GPU memory that a run needs above what is allocated before it."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cpu_seconds(runs: list[Callable], repeats: int) -> float:
    """Median over `repeats` runs that take turns, after one more."""
    seconds = []
    for run, _ in zip(itertools.cycle(runs), range(repeats + 1), strict=False):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return median(seconds[1:])


def reset_cpu_peak() -> int:
    """Bytes this process holds, from where its peak counts again where Linux allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return cpu_peak()


def cpu_peak() -> int:
    """The most bytes this process held, 0 where the system does not tell (Windows)."""
    try:
        return _status("VmHWM")
    except OSError:
        if resource is None:
            return 0
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(entry))
