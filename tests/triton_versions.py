"""The kernel tests with other versions of Triton (and PyTorch) than the pinned ones; not for CI.

    python -m tests.triton_versions 3.6.0/2.11.0 3.7.1 3.9.0

Each TRITON or TRITON/TORCH gets a virtual environment, which stays in --folder and is used again,
and a line: what pytest counted, in Triton's interpreter and compiled ahead of time. The exit code
is 1 if any failed.
"""

import argparse
import re
import subprocess
import sys
import venv
from pathlib import Path

from tests.tiny import ROOT


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="+", metavar="TRITON[/TORCH]")
    parser.add_argument("--folder", type=Path, default=ROOT / ".versions", metavar="DIR")
    arguments = parser.parse_args()
    right = True
    for version in arguments.versions:
        triton, _, torch = version.partition("/")
        python = environment(arguments.folder / version.replace("/", "-torch"), triton, torch)
        command = [python, "-m", "pytest", "tests", "-k", "kernels", "-p", "no:cacheprovider"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        (arguments.folder / f"{python.parent.parent.name}.log").write_text(
            done.stdout + done.stderr
        )
        right &= done.returncode == 0
        said = done.stdout.strip().splitlines()[-1] if done.returncode in (0, 1) else "ended early"
        ask = (
            "import torch, triton; print(f'triton {triton.__version__}, torch {torch.__version__}')"
        )
        print(f"{output(python, '-c', ask)}: {said}, exit code {done.returncode}", flush=True)
    return int(not right)


def environment(folder: Path, triton: str, torch: str) -> Path:
    """The Python of a virtual environment with these versions, made where it is missing."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        needed = (ROOT / "requirements.txt").read_text()
        needed = [line.partition(";")[0] for line in needed.splitlines() if "triton" not in line]
        if torch:
            needed = [re.sub(r"^torch==.*", f"torch=={torch}", line) for line in needed]
        if tuple(map(int, triton.split(".")[:2])) < (3, 7):
            needed.append("numpy<2.4")  # whose interpreter newer ones break
        output(python, "-m", "pip", "install", "--quiet", *needed)
        output(python, "-m", "pip", "install", "--quiet", "--no-deps", f"triton=={triton}")
    return python


def output(*command) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
