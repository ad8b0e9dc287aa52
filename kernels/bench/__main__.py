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
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

from kernels.bench.cases import cases
from kernels.bench.clock import at_least_one, check_output, copy_bandwidth
from kernels.bench.compile import TARGETS, compile_table, compiled, complaints, different_launches
from kernels.bench.measure import correctness, cpu_times, gpu_times, warm_up
from kernels.bench.scenes import SIZES
from kernels.dispatch import interpreting, triton


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
        torch.backends.cuda.matmul.allow_tf32 = True  # as training has it
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


if __name__ == "__main__":
    sys.exit(main())
