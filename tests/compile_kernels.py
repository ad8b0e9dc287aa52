"""Prints as JSON what `kernels.bench` knows of the kernels compiled at published sizes.

Every kernel for every target, its other launches for the H200 alone.
"""

import json
import os

from kernels import ahead, bench, cases


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
    rows = bench.compiled(list(kernels.values()), list(ahead.TARGETS), processes)
    rows += bench.compiled(others, ["cuda 90"], processes)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
