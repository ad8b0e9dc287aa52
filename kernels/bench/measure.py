"""What the kernels give and how long they take: one case after the other.

Not in `__main__`: processes that are spawned import what they run.
"""

import itertools
import logging
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor

import kernels
from kernels.bench.cases import Case, cases
from kernels.bench.clock import (
    chosen_backend,
    cpu_peak,
    cpu_seconds,
    gpu_peak,
    gpu_seconds,
    reset_cpu_peak,
)
from kernels.bench.scenes import SIZES, Draw

SETS = 3  # of inputs that take turns, so that caches tell no lies
# by backend, in this order: what takes longest is last
IMPLEMENTATIONS = dict(triton="triton", deformops="torch", reference="torch")
IMPLEMENTATIONS |= {"torch.compile": "torch"}


class Work:
    """One case on one set of inputs."""

    def __init__(self, case: Case, call: Callable, device: str, seed: int):
        self.case, self.call = case, call
        self.inputs = case.inputs(Draw(device, seed))
        self.gradients = None  # of the outputs, drawn by the first run

    def forward(self) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return self.call(**self.inputs)

    def both(self) -> tuple[Tensor, ...]:
        leaves = {name: self.inputs[name].detach().requires_grad_() for name in self.case.wanted}
        outputs = [x for x in self.call(**(self.inputs | leaves)) if x.requires_grad]
        if self.gradients is None:
            self.gradients = [torch.randn_like(x) for x in outputs]
        return torch.autograd.grad(
            outputs, list(leaves.values()), self.gradients, allow_unused=True
        )


def _named(name: str, size: str) -> Case:
    """A case in another process: its functions cannot be sent there."""
    return next(case for case in cases([size]) if case.name == name)


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:80]}"


# -----------------------------------------------------------------------------------------------
# Correctness


def correctness(chosen: list[Case], device: str, say: Callable) -> Iterator[dict]:
    """Distance of Triton and of the float32 reference to the float64 reference, case by case.

    Distances are Euclidean over that of the truth, the worst of all outputs and gradients. Triton
    is right if it is at most ten times as far as the reference, or 1e-5.
    """
    say(f"\n{'distance to the float64 reference':46s} {'triton':>10s} {'reference':>10s}")
    for case in chosen:
        row = case.labels
        try:
            row |= _distances(case, device)
            said = f"{row['triton']:10.1e} {row['reference']:10.1e}" + "  WRONG" * (
                not row["right"]
            )
        except torch.OutOfMemoryError as error:
            say(f"{case.name:46s} {_short(error)}")
            continue
        except Exception as error:  # whatever one fails of, the others are of interest
            said = _short(error)
            row |= {"failed": said, "right": False}
        say(f"{case.name:46s} {said}")
        yield row


def _distances(case: Case, device: str) -> dict:
    work = Work(case, case.call, device, seed=1)
    with chosen_backend("triton"):
        ours = (*work.both(), *work.forward())
    with chosen_backend("torch"):
        plain = (*work.both(), *work.forward())
        work.inputs = {
            name: x.double() if x.is_floating_point() else x for name, x in work.inputs.items()
        }
        work.gradients = [gradient.double() for gradient in work.gradients]
        truth = (*work.both(), *work.forward())
    row = {"triton": _distance(ours, truth), "reference": _distance(plain, truth)}
    return row | {"right": row["triton"] <= max(10 * row["reference"], 1e-5)}


def _distance(results: tuple[Tensor | None, ...], truth: tuple[Tensor | None, ...]) -> float:
    pairs = [(x.double(), y.double()) for x, y in zip(results, truth, strict=True) if y is not None]
    return max(float((x - y).norm() / y.norm().clamp_min(1e-30)) for x, y in pairs)


# -----------------------------------------------------------------------------------------------
# Times on a GPU


def warm_up(chosen: list[Case], threads: int) -> None:
    """Compiles the Triton kernels in several processes, whose cache is then found by this one."""
    room = torch.cuda.mem_get_info()[0] >> 32  # 4 GB each
    processes = min(threads, room, 10, len(chosen) // 2)
    if processes > 1:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
            for case in chosen:
                pool.submit(_launch, case.name, case.size)


def _launch(name: str, size: str) -> None:
    case = _named(name, size)
    with chosen_backend("triton"):
        work = Work(case, case.call, "cuda", 0)
        work.both(), work.forward()


def gpu_times(chosen: list[Case], repeats: int, copy: float, say: Callable) -> Iterator[dict]:
    """One implementation after the other of every case. Memory is what a run adds to its inputs."""
    torch._dynamo.config.suppress_errors = True  # what torch.compile cannot do is left as it is
    torch._logging.set_logs(all=logging.CRITICAL)
    torch.backends.cuda.matmul.allow_tf32 = True  # as training has it
    say(
        f"\ncopy bandwidth {copy:.0f} GB/s; % is the share of it that the bytes that must move "
        f"take; x is time over Triton's\n{'':60s}{'forward':>31s}{'forward + backward':>37s}\n"
        f"{'':60s}" + 2 * f"{'ms':>9s}{'GB/s':>7s}{'%':>5s}{'MB':>8s}{'x':>7s} "
    )
    triton_rows = {}
    for (name, backend), case in itertools.product(IMPLEMENTATIONS.items(), chosen):
        call = _implementation(name, case)
        if call is None:
            continue
        row = case.labels | {"implementation": name}
        try:
            with chosen_backend(backend):
                row |= _gpu_measure(case, call, repeats)
        except Exception as error:  # whatever one fails of, the others are of interest
            row["failed"] = _short(error)
        torch._dynamo.reset()
        say(_gpu_line(case, row, triton_rows.setdefault(case.name, row), copy))
        yield row


def _implementation(name: str, case: Case) -> Callable | None:
    if name == "deformops":
        return _deformops(SIZES[case.size]) if case.variant == "self-attention" else None
    return torch.compile(case.call) if name == "torch.compile" else case.call


def _deformops(size) -> Callable | None:
    """deformops' fastest path: it takes sampling locations, so making them counts; raw logits."""
    try:
        from deformops.registry import msda
    except ImportError:
        return None
    shapes = torch.tensor(size.planes, device="cuda")
    areas = shapes.prod(1)
    starts = areas.cumsum(0) - areas
    extent = shapes.flip(1)[:, None].float()  # w, h

    def call(value: Tensor, reference_points: Tensor, offsets: Tensor, logits: Tensor):
        locations = reference_points[:, :, None] + offsets / extent
        return (msda(value, shapes, starts, locations, logits, method="softmax"),)

    return call


def _gpu_measure(case: Case, call: Callable, repeats: int) -> dict:
    works = [Work(case, call, "cuda", seed) for seed in range(SETS)]
    forward, backward = case.moved(works[0].inputs)
    row = {"forward_bytes": forward, "both_bytes": forward + backward}
    for name in ("forward", "both"):
        runs = [getattr(work, name) for work in works]
        row[f"{name}_ms"] = 1e3 * gpu_seconds(runs, repeats)
        row[f"{name}_peak_bytes"] = gpu_peak(runs[0])
    return row


def _gpu_line(case: Case, row: dict, first: dict, copy: float) -> str:
    line = f"{case.name:46s}{row['implementation']:14s}"
    if "failed" in row:
        return line + row["failed"]
    for name in ("forward", "both"):
        milliseconds = row[f"{name}_ms"]
        rate = row[f"{name}_bytes"] / milliseconds / 1e6
        ratio = milliseconds / first.get(f"{name}_ms", float("nan"))
        megabytes = row[f"{name}_peak_bytes"] / 1e6
        line += (
            f"{milliseconds:9.3f}{rate:7.0f}{100 * rate / copy:5.0f}{megabytes:8.0f}{ratio:7.1f} "
        )
    return line


# -----------------------------------------------------------------------------------------------
# Times on a CPU


def cpu_times(chosen: list[Case], repeats: int, threads: int, say: Callable) -> Iterator[dict]:
    """The reference, one case after the other, each in its own process: peaks do not mix.

    Peak memory is that of the whole process, and in brackets what the run added to its inputs.
    """
    say(f"\n{'reference on the CPU':46s} {'forward':>25s} {'forward + backward':>25s}")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for case in chosen:
            row = case.labels | {"implementation": "reference", "threads": threads}
            line = f"{case.name:46s}"
            for name in ("forward", "both"):
                task = pool.submit(_cpu_measure, case.name, case.size, name, repeats, threads)
                seconds, peak, added = task.result()
                row |= {f"{name}_ms": 1e3 * seconds, f"{name}_peak_bytes": added}
                row[f"{name}_process_bytes"] = peak
                line += f" {seconds:9.3f} s {peak / 1e9:4.1f} ({added / 1e9:3.1f}) GB"
            say(line)
            yield row


def _cpu_measure(
    case_name: str, size: str, run_name: str, repeats: int, threads: int
) -> tuple[float, int, int]:
    """Median seconds after a first run, peak bytes of this process, and those above its inputs."""
    torch.set_num_threads(threads)
    case = _named(case_name, size)
    kernels.backend("torch")
    works = [Work(case, case.call, "cpu", seed) for seed in range(min(SETS, repeats + 1))]
    before = reset_cpu_peak()
    seconds = cpu_seconds([getattr(work, run_name) for work in works], repeats)
    peak = cpu_peak()
    return seconds, peak, max(0, peak - before)
