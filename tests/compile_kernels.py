"""Prints as JSON what `kernels.bench` knows of the kernels compiled at published sizes.

Every kernel for every target, its other launches for the H200 alone.
"""

import json
import os

import torch

from kernels.bench import cases, compile, measure


def without_jitter_and_with_one_source() -> list[tuple[str, compile.Launch]]:
    """What is None or one in a tuple is compiled otherwise."""
    labelled = []
    for case in cases.cases(["kitti"]):
        if case.kernel in ("render_rays", "render_photometric"):
            work = measure.Work(case, case.call, "meta", 0)
            work.inputs = {n: x for n, x in work.inputs.items() if n != "jitter"}
            for name in {"sources", "projections"} & work.inputs.keys():
                work.inputs[name] = work.inputs[name][:, :1]
            label = f"{case.name} without jitter, one source"
            labelled += [(label, launch) for launch in compile.launches_of(work.both)]
    return [(label, x) for label, x in labelled if "render" in x.kernel.__name__]


def main() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True  # as training has it
    launches = compile.different_launches(cases.cases(["kitti", "nuscenes"]))
    kernels = {launch.kernel: (label, launch) for label, launch in reversed(launches)}
    others = [
        (label, launch)
        for label, launch in launches
        if (label, launch) not in kernels.values()
        # autocast reaches no other kernel
        and ("bf16" not in label or label.startswith(("deformable", "decode")))
    ]
    torch.backends.cuda.matmul.allow_tf32 = False
    others += compile.different_launches(cases.cases(["kitti"], "decode"))
    others += without_jitter_and_with_one_source()
    processes = os.cpu_count()
    rows = compile.compiled(list(kernels.values()), list(compile.TARGETS), processes)
    rows += compile.compiled(others, ["cuda 90"], processes)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
