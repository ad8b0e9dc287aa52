"""How fast the kernels are, what memory they take, and how far that is from what must move.

    python -m kernels.bench                                   # all that this machine can tell
    python -m kernels.bench --minutes 10 --out times.json     # Triton first, others after it
    python -m kernels.bench --kernel render_rays --sizes kitti
    python -m kernels.bench --compile-only                    # registers, shared memory, spills
    TRITON_INTERPRET=1 python -m kernels.bench --sizes small  # Triton against the reference, no GPU

With a GPU: every kernel against the float64 reference, then its times, and after those of all cases
those of deformops where it is installed, of the plain PyTorch reference and of torch.compile of
that. Without one: the compile table for GPUs that are not there, and the reference's times on the
CPU.
"""

import argparse
import itertools
import json
import logging
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

import kernels
from kernels.bench.cases import Case, cases
from kernels.bench.clock import (
    at_least_one,
    check_output,
    chosen_backend,
    copy_bandwidth,
    cpu_peak,
    cpu_seconds,
    gpu_peak,
    gpu_seconds,
    reset_cpu_peak,
)
from kernels.bench.compile import TARGETS, compile_all, launches_of
from kernels.bench.scenes import SIZES, Draw
from kernels.dispatch import Launch, interpreting, triton

SETS = 3  # of inputs that take turns, so that caches tell no lies
# by backend, in this order: what takes longest is last
IMPLEMENTATIONS = dict(triton="triton", deformops="torch", reference="torch")
IMPLEMENTATIONS |= {"torch.compile": "torch"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = list(dict.fromkeys(case.kernel for case in cases(["small"])))
    add, listed = parser.add_argument, dict(type=lambda text: text.split(","), metavar="NAME,..")
    add("--kernel", choices=names, metavar="NAME", help=f"one of {', '.join(names)}")
    sizes = ["kitti", "nuscenes"]
    add("--sizes", **listed, default=sizes, help=f"of {', '.join(SIZES)}; default: kitti,nuscenes")
    text = "runs of which the median is taken; default: 30 on a GPU, 1 on a CPU"
    add("--repeats", type=at_least_one, help=text)
    text = "CPU threads of PyTorch, and processes that compile; default: all cores"
    add("--threads", type=at_least_one, default=os.cpu_count(), help=text)
    text = "after which nothing more is begun; default: no limit"
    add("--minutes", type=at_least_one, help=text)
    add("--compile-only", action="store_true", help="only compile for every target")
    text = f"to compile for, of {', '.join(TARGETS)}; default: all"
    add("--targets", **listed, default=list(TARGETS), help=text)
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--out", type=Path, metavar="FILE", help="also write the JSON here, after every line")
    arguments = parser.parse_args(words)
    for option, known in (("sizes", SIZES), ("targets", TARGETS)):
        for name in getattr(arguments, option):
            if name not in known:
                parser.error(f"--{option}: {name!r} is not one of {', '.join(known)}")
    compiles = hasattr(triton, "compile") and not interpreting()
    if arguments.compile_only and not compiles:
        parser.error("--compile-only needs Triton, and TRITON_INTERPRET unset")
    try:  # before the work, not after it
        path, advice = arguments.out, "--out FILE names another"
        if path:
            check_output(path)
        if compiles:
            path, advice = triton.knobs.cache.dir, "TRITON_CACHE_DIR names another cache"
            check_output(Path(path, "kernel"))
    except OSError as error:
        parser.error(f"cannot write {path}: {error.strerror}; {advice}")
    return arguments


def main(words: list[str] | None = None) -> int:
    """The command line (or `words` instead of it); returns 1 if a kernel is wrong or fails."""
    arguments = parse_arguments(words)
    say = (lambda _: None) if arguments.json else partial(print, flush=True)
    torch.set_num_threads(arguments.threads)
    chosen = cases(arguments.sizes, arguments.kernel)
    gpu = torch.cuda.is_available()
    report = {"torch": torch.__version__, "triton": getattr(triton, "__version__", None)}
    report["device"] = torch.cuda.get_device_name() if gpu else "cpu"
    wrong = False
    end = time.monotonic() + 60 * (arguments.minutes or math.inf)

    def write() -> None:
        if arguments.out:
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")

    def keep(name: str, rows: Iterator[dict]) -> list[dict]:
        kept = report.setdefault(name, [])
        for row in rows:
            kept.append(row)
            write()
            if time.monotonic() > end:
                say(f"{name}: {arguments.minutes} minutes are over")
                break
        return kept

    if not arguments.compile_only:
        say(_about(report, arguments.threads))
        if gpu:
            warm_up(chosen, arguments.threads)
        if gpu or interpreting():
            rows = keep("correctness", correctness(chosen, "cuda" if gpu else "cpu", say))
            wrong = not all(row["right"] for row in rows)
    if arguments.compile_only or (not (gpu or interpreting()) and hasattr(triton, "compile")):
        launches = different_launches(chosen)
        report["compiled"] = compiled(launches, arguments.targets, arguments.threads)
        say(compile_table(report["compiled"], arguments.targets))
        for line in complaints(report["compiled"]):
            wrong = True
            print(line, file=sys.stderr)
    if not arguments.compile_only and time.monotonic() < end:
        timed = [case for case in chosen if case.timed]
        repeats = arguments.repeats or (30 if gpu else 1)
        if gpu:
            report["copy_gb_per_s"] = copy_bandwidth()
            rows = keep("times", gpu_times(timed, repeats, report["copy_gb_per_s"], say))
            wrong |= any("failed" in row for row in rows if row["implementation"] == "triton")
        else:
            keep("times", cpu_times(timed, repeats, arguments.threads, say))
    write()
    if arguments.json:
        print(json.dumps(report, indent=1))
    return int(wrong)


def _about(report: dict, threads: int) -> str:
    versions = f"torch {report['torch']}, triton {report['triton'] or 'not installed'}"
    if report["device"] != "cpu":
        return f"{report['device']}, {versions}"
    where = "in the interpreter" if interpreting() else "nowhere here (TRITON_INTERPRET=1 does)"
    return (
        f"No GPU here: Triton kernels run {where}; times are those of the PyTorch reference, CPU "
        f"threads: {threads}; {versions}"
    )


# -----------------------------------------------------------------------------------------------
# Work


class _Work:
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
    work = _Work(case, case.call, device, seed=1)
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
        work = _Work(case, case.call, "cuda", 0)
        work.both(), work.forward()


def gpu_times(chosen: list[Case], repeats: int, copy: float, say: Callable) -> Iterator[dict]:
    """One implementation after the other of every case. Memory is what a run adds to its inputs."""
    torch._dynamo.config.suppress_errors = True  # what torch.compile cannot do is left as it is
    torch._logging.set_logs(all=logging.CRITICAL)
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
    works = [_Work(case, call, "cuda", seed) for seed in range(SETS)]
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
    works = [_Work(case, case.call, "cpu", seed) for seed in range(min(SETS, repeats + 1))]
    before = reset_cpu_peak()
    seconds = cpu_seconds([getattr(work, run_name) for work in works], repeats)
    peak = cpu_peak()
    return seconds, peak, max(0, peak - before)


# -----------------------------------------------------------------------------------------------
# Compiled for GPUs that are not there


def different_launches(chosen: list[Case]) -> list[tuple[str, Launch]]:
    """What the cases launch in float32 and bfloat16, deterministic or not, and who does first."""
    found = {}
    for case in chosen:
        for label, launch in _recorded(case):
            key = (launch.kernel, str(launch.signature), str(launch.constants), launch.aligned)
            found.setdefault(key, (label, launch))
    return list(found.values())


def compiled(labelled: list[tuple[str, Launch]], targets: list[str], processes: int) -> list[dict]:
    """What the compiler says of launches, for JSON."""
    reports = compile_all([launch for _, launch in labelled], targets, processes)
    return [
        {
            "kernel": _kernel_name(launch),
            "case": label,
            "constants": {".".join(map(str, p)): str(x) for p, x in launch.constants.items()},
            "warps": launch.warps,
            "grid": launch.grid,
            "targets": {
                target: {"failed": said} if isinstance(said, str) else asdict(said)
                for target, said in report.items()
            },
        }
        for (label, launch), report in zip(labelled, reports, strict=True)
    ]


def _kernel_name(launch: Launch) -> str:
    return f"{launch.kernel.__module__.removeprefix('kernels.')}.{launch.kernel.__name__}"


def _recorded(case: Case) -> Iterator[tuple[str, Launch]]:
    """Launches of forward and backward, each with what is particular about it."""
    for dtype, deterministic in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        work = _Work(case, case.call, "meta", 0)
        work.inputs = case.inputs(Draw("meta", dtype=dtype))
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(deterministic)
        try:
            launches = launches_of(work.both)
        finally:
            torch.use_deterministic_algorithms(before)
        label = case.name + " bf16" * (dtype == torch.bfloat16) + " deterministic" * deterministic
        yield from ((label, launch) for launch in launches)


def compile_table(rows: list[dict], targets: list[str]) -> str:
    """A line a launch: registers a thread, /bytes of shared memory, !bytes a thread spilled."""
    lines = ["", "registers/shared bytes!spilled bytes"]
    lines.append(f"{'kernel':40s}{'of':58s}{'warps':>6s}" + "".join(f"{t:>12s}" for t in targets))
    for row in rows:
        cells = [_cell(row["targets"][target]) for target in targets]
        cells = "".join(f"{cell:>12s}" for cell in cells)
        lines.append(f"{row['kernel']:40s}{row['case']:58s}{row['warps']:6d}{cells}")
    return "\n".join(lines)


def complaints(rows: list[dict]) -> list[str]:
    """A line for every reason why something did not compile, with the first place and a count."""
    places: dict[str, list[str]] = {}
    for row in rows:
        for target, report in row["targets"].items():
            if "failed" in report:
                place = f"{row['kernel']} of {row['case']} for {target}"
                places.setdefault(report["failed"], []).append(place)
    return [
        f"error: {first} did not compile{f', nor did {len(more)} others' if more else ''}: {reason}"
        for reason, (first, *more) in places.items()
    ]


def _cell(report: dict) -> str:
    if "failed" in report:
        return "failed"
    shared = f"/{report['shared']}" if report["shared"] else ""
    return f"{report['registers']}{shared}" + (f"!{report['spills']}" if report["spills"] else "")


if __name__ == "__main__":
    sys.exit(main())
