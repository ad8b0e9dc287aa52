"""Prints as JSON what `kernels.bench` knows of the kernels compiled at published sizes.

Every kernel for every target, its other launches for the H200 alone.
"""

import json
import os

from kernels.bench import __main__ as bench
from kernels.bench import cases, compile


def main() -> None:
    launches = bench.different_launches(cases.cases(["kitti", "nuscenes"]))
    kernels = {launch.kernel: (label, launch) for label, launch in reversed(launches)}
    others = [
        (label, launch)
        for label, launch in launches
        if (label, launch) not in kernels.values()
        and ("bf16" not in label or "deformable" in label)  # autocast reaches no other kernel
    ]
    processes = os.cpu_count()
    rows = bench.compiled(list(kernels.values()), list(compile.TARGETS), processes)
    rows += bench.compiled(others, ["cuda 90"], processes)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
