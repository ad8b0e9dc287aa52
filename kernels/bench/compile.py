"""Kernels compiled for GPUs that are not there, and what the compiler says about them."""

import itertools
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.bench.cases import Case
from kernels.bench.measure import Work
from kernels.bench.scenes import Draw
from kernels.dispatch import Launch, record, triton

TARGETS = {
    **{f"cuda {arch}": ("cuda", arch, 32) for arch in (75, 80, 86, 89, 90, 100, 120)},
    **{f"hip {arch}": ("hip", arch, 64) for arch in ("gfx90a", "gfx942")},
    "hip gfx1100": ("hip", "gfx1100", 32),
}


@dataclass(frozen=True)
class Report:
    """What one kernel needs on one GPU."""

    registers: int  # a thread
    spills: int  # bytes a thread in local memory (cuda: stack, hip: scratch)
    shared: int  # bytes a program
    wide_loads: int  # of 16 bytes a lane, in the code
    products: int  # of matrices, on tensor cores, in the code


def launches_of(call: Callable[[], object]) -> list[Launch]:
    """What public functions, and backward through them, launch for tensors on device "meta"."""
    with record() as launches, _OwnCode():
        call()
    return launches


class _OwnCode(TorchDispatchMode):
    """Runs the code of our operators where PyTorch would only ask them for shapes."""

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        own = OPDEFS.get(operator._schema.name)
        function = operator if own is None else own._init_fn
        return function(*arguments, **(options or {}))


def compile_ahead(launch: Launch, target: str) -> Report:
    """Compile one recorded launch for a GPU named in `TARGETS`; no GPU is needed.

    Pointers are taken to be multiples of 16 bytes, as those of whole tensors are.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    index = {name: i for i, name in enumerate(launch.signature)}
    places = {(index[name], *rest): value for (name, *rest), value in launch.constants.items()}
    if target.startswith("hip"):  # what decode.py says there
        places = {path: _without_tf32(value) for path, value in places.items()}
    aligned = {(index[name], *rest): [["tt.divisibility", 16]] for name, *rest in launch.aligned}
    source = ASTSource(launch.kernel, launch.signature, constexprs=places, attrs=aligned)
    options = {"num_warps": launch.warps}
    if launch.registers and target.startswith("cuda"):
        options["maxnreg"] = launch.registers
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    shared = compiled.metadata.shared
    if target.startswith("cuda"):
        code, resources = compiled.asm["ptx"], _cuda_resources(compiled.asm["cubin"])
        wide, products = r"ld\.global\S*\.v4\.b32", r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)"
    else:
        code, resources = compiled.asm["amdgcn"], _hip_resources(compiled.asm["amdgcn"])
        wide, products = r"(?:global|buffer)_load_(?:dwordx4|b128)", r"\bv_(?:mfma|wmma)"
    return Report(*resources, shared, *(len(re.findall(x, code)) for x in (wide, products)))


def _without_tf32(constants):
    entries = constants._asdict().items() if hasattr(constants, "_asdict") else ()
    exact = {name: "ieee" for name, value in entries if str(value).startswith("tf32")}
    return constants._replace(**exact) if exact else constants


_to_compile: list[Launch] = []  # kernels cannot be pickled: forked processes find them here


def compile_all(launches: list[Launch], targets: list[str], processes: int) -> list[dict]:
    """For every launch: target -> `Report`, or the first line of what the compiler complained."""
    _to_compile[:] = launches
    tasks = list(itertools.product(range(len(launches)), targets))
    if processes > 1:
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(processes, mp_context=fork) as pool:
            reports = list(pool.map(_try_to_compile, tasks))
    else:
        reports = [_try_to_compile(task) for task in tasks]
    pieces = (reports[i : i + len(targets)] for i in range(0, len(reports), len(targets)))
    return [dict(zip(targets, piece, strict=True)) for piece in pieces]


def _try_to_compile(task: tuple[int, str]) -> Report | str:
    number, target = task
    try:
        return compile_ahead(_to_compile[number], target)
    except Exception as error:  # of whatever kind: the other kernels are of interest all the same
        reason, _, _ = str(error).strip().partition("\n")
        return f"{type(error).__name__}: {reason}"


def _cuda_resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", said)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local


def _hip_resources(assembly: str) -> tuple[int, int]:
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
    scratch = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)[1])
    return registers, scratch


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
        work = Work(case, case.call, "meta", 0)
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
