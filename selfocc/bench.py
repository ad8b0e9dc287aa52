"""How long training steps, depth rendering and inference take, by backend of the kernels.

    python -m selfocc.bench                                  # on a GPU the published presets
    python -m selfocc.bench --preset kitti --backends triton --repeats 50 --out steps.json
    python -m selfocc.bench --minutes 5 --out steps.json     # Triton first, plain PyTorch after it
    python -m selfocc.bench --inference                      # images to voxels, frames a second
    python -m selfocc.bench --count --preset kitti           # no GPU needed: see selfocc/count.py

Images and cameras are random, of the preset's size, and no data set is needed; a step is that of
train.py with accumulate = 1 (a GPU multiplies in TF32; --set optim.tf32=false: in float32).
Depth rendering is of whole images, 256 samples a ray. Inference is of one frame after the other
(selfocc/inference.py), from page-locked memory on a GPU, and there in float32 and in bfloat16, as a
CUDA graph or not, and compiled.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import cycle, product
from pathlib import Path
from statistics import median

import torch

from kernels.bench.clock import (
    check_output,
    chosen_backend,
    cpu_peak,
    cpu_seconds,
    gpu_peak,
    gpu_seconds,
    reset_cpu_peak,
)
from selfocc import InputError, distributed, files, presets
from selfocc.batch import Batch, Frames
from selfocc.commandline import Parser, add_set, count, run
from selfocc.config import Config
from selfocc.count import count_step
from selfocc.geometry import fixed_pixels, node_positions
from selfocc.inference import Predictor
from selfocc.model import SelfOcc
from selfocc.render import SPENT
from selfocc.settings import change
from selfocc.training import Passes, make_optimizer, training_step

SAMPLES = 256  # of a ray, when depth is rendered
# module whose end ends a stage -> stage
STAGES = {"fpn": "backbone, FPN", "encoder": "encoder", "lift": "lift", "decoder": "decoder"}
# with what numbers it starts costs no time
FIXED = ["backbone.weights=none", "optim.accumulate=1", "optim.sweep_steps=0"]


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m selfocc.bench", description=__doc__)
    add, some = parser.add_argument, partial(count, least=1)
    said = "may be repeated; default: kitti and nuscenes (and street for inference) on a GPU"
    add("--preset", action="append", metavar="NAME", help=said)
    said = "of triton and torch; default: both where Triton runs"
    add("--backends", type=lambda text: text.split(","), metavar="NAME,..", help=said)
    add("--repeats", type=some, help="steps; default: 20 on a GPU, 3 elsewhere")
    add("--minutes", type=some, help="after which nothing more is begun; default: no limit")
    add("--threads", type=some, help="CPU threads of PyTorch; default: its own")
    said = "instead of times: operations, waits and saved bytes of a training step on a GPU"
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--count", action="store_true", help=said)
    said = "instead: frames a second and memory of what makes voxels of images"
    instead("--inference", action="store_true", help=said)
    add_set(parser, "as for train.py")
    add("--out", type=Path, metavar="FILE", help="also write JSON here, after every line")
    return parser.parse_args(words)


def bench(arguments: argparse.Namespace) -> None:
    gpu = torch.cuda.is_available()
    end = time.monotonic() + 60 * (arguments.minutes or math.inf)
    device = torch.device("cuda" if gpu else "cpu")
    distributed.tune(device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    chosen = arguments.preset or ["kitti", "nuscenes"] + ["street"] * arguments.inference
    if not (arguments.preset or gpu or arguments.count):
        chosen = ["street" if arguments.inference else "synthetic"]
        small = f"the small preset `{chosen[0]}`; --preset kitti is the published size."
        print(f"No GPU here, so {small}")
    backends = arguments.backends or (["triton", "torch"] if gpu else ["torch"])
    repeats = arguments.repeats or (20 if gpu else 3)
    settings = [presets.build(preset, [*arguments.set, *FIXED]) for preset in chosen]
    for backend in backends:
        try:
            with chosen_backend(backend):
                pass
        except (ValueError, RuntimeError) as error:
            raise InputError(f"--backends {backend}: {error}") from None
    if arguments.out:
        try:
            check_output(arguments.out)
        except OSError as error:
            reason = f"cannot write {arguments.out}: {error.strerror}"
            raise InputError(f"{reason}; --out FILE names another") from None
    where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}")
    report = {"device": where, "torch": torch.__version__, "runs": []}
    if arguments.count:
        rows = counts(settings)
    elif arguments.inference:
        rows = inferences(settings, backends, device, repeats)
    else:
        rows = times(settings, backends, device, repeats)
    for row, line in rows:
        print(line, flush=True)
        report["runs"].append(row)
        if arguments.out:
            files.write_file(arguments.out, (json.dumps(report, indent=1) + "\n").encode())
        if time.monotonic() > end:
            print(f"{arguments.minutes} minutes are over")
            break


def times(
    settings: list[Config], backends: list[str], device: torch.device, repeats: int
) -> Iterator[tuple[dict, str]]:
    """What is measured, line by line; plain PyTorch, the slowest, comes last."""
    for backend in sorted(backends, key="torch".__eq__):
        for config in settings:
            # depth first: a CPU process keeps what training has freed, and would hide what it needs
            for measure, line in ((time_depth, depth_line), (time_steps, step_table)):
                distributed.allow_tf32(config.optim.tf32)
                with chosen_backend(backend):
                    row = {"preset": config.preset, "backend": backend}
                    row |= measure(config, device, repeats)
                yield row, line(row)


def inferences(
    settings: list[Config], backends: list[str], device: torch.device, repeats: int
) -> Iterator[tuple[dict, str]]:
    """The same of images to voxels, one frame after the other."""
    ways = [dict(graph=False)]
    if device.type == "cuda":
        settings = [change(c, [f"optim.bf16={x}"]) for c in settings for x in ("false", "true")]
        ways = [dict(graph=True), dict(graph=True, compiled=True), *ways]
    for backend in sorted(backends, key="torch".__eq__):
        for config, way in product(settings, ways):
            row = {"preset": config.preset, "backend": backend, "bf16": config.optim.bf16, **way}
            distributed.allow_tf32(config.optim.tf32)
            try:
                with chosen_backend(backend):
                    row |= time_inference(config, device, repeats, **way)
            except Exception as error:  # whatever one way fails of, the others are of interest
                row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            yield row, inference_line(row)


def counts(settings: list[Config]) -> Iterator[tuple[dict, str]]:
    """The same of what is counted."""
    for config in settings:
        found = count_step(config, [random_batch(config, seed) for seed in range(2)])
        row = {"preset": config.preset, "bf16": config.optim.bf16, "operations": found.host}
        row |= {"launches": found.launches.total(), "saved_bytes": found.saved}
        row["waits"] = [[*what, times] for what, times in sorted(found.waits.items())]
        numbers = "bfloat16" if config.optim.bf16 else "float32"
        lines = [
            f"{config.preset}, {numbers}: a training step is {found.host:,} "
            f"host operations, {row['launches']} of them Triton's, "
            f"{found.waits.total()} waits, {found.saved / 1e9:.3f} GB saved for backward"
        ]
        lines += [f"  waits {times} x {name:26s} {place}" for place, name, times in row["waits"]]
        yield row, "\n".join(lines)


def step_table(row: dict) -> str:
    total = sum(row["stages_ms"].values())
    lines = [f"\n{row['preset']}, kernels by {row['backend']}: a training step"]
    for stage, milliseconds in row["stages_ms"].items():
        lines.append(f"  {stage:18s}{milliseconds:11.2f} ms {100 * milliseconds / total:5.1f} %")
    lines.append(
        f"  {'together':18s}{row['step_ms']:11.2f} ms, peak {row['peak_bytes'] / 1e9:.2f} GB"
    )
    return "\n".join(lines)


def depth_line(row: dict) -> str:
    return (
        f"\n{row['preset']}, kernels by {row['backend']}: {row['depth_rays']:,} rays of {SAMPLES} "
        f"samples: {row['depth_ms']:.2f} ms, {row['rays_per_second'] / 1e6:.3f} million rays/s, "
        f"+{row['depth_peak_bytes'] / 1e9:.2f} GB"
    )


def inference_line(row: dict) -> str:
    numbers = "bfloat16" if row["bf16"] else "float32"
    how = ["CUDA graph"] * row["graph"] + ["compiled"] * row.get("compiled", False)
    line = ", ".join([f"{row['preset']}, kernels by {row['backend']}", numbers, *how])
    if "failed" in row:
        return f"{line}: {row['failed']}"
    return (
        f"{line}: {row['frame_ms']:.2f} ms, {1e3 / row['frame_ms']:.2f} frames/s, "
        f"peak {row['peak_bytes'] / 1e9:.2f} GB"
    )


class Stopwatch:
    """Time between marks: on a GPU between events in its queue, so that nothing has to wait."""

    def __init__(self, device: torch.device):
        self.gpu = device.type == "cuda"
        self.marks: list[tuple[str, object]] = []

    def mark(self, name: str) -> None:
        """Ends the stage of this name."""
        if self.gpu:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self.marks.append((name, moment))

    def stages(self) -> dict[str, float]:
        """Milliseconds of every stage since the first mark; starts again."""
        if self.gpu:
            torch.cuda.synchronize()
        out = {}
        for (_, start), (name, end) in zip(self.marks, self.marks[1:], strict=False):
            passed = start.elapsed_time(end) if self.gpu else 1e3 * (end - start)
            out[name] = out.get(name, 0.0) + passed
        self.marks.clear()
        return out


def time_steps(settings: Config, device: torch.device, repeats: int) -> dict:
    """Median milliseconds of the stages of a training step and of the whole, and peak memory.

    Peak memory is all of the process on a CPU, all that PyTorch allocates on a GPU.
    """
    torch.manual_seed(settings.optim.seed)
    model = SelfOcc(settings).to(device).train()
    passes, optimizer = Passes(settings, model), make_optimizer(model, settings.optim)
    batches = cycle([random_batch(settings, seed) for seed in range(3)])
    watch = Stopwatch(device)
    for name, stage in STAGES.items():
        module = getattr(model, name)
        if module is not None:
            module.register_forward_hook(lambda *_, stage=stage: watch.mark(stage))

    rounds = []
    for step in range(repeats + 2):
        if step == 1:  # from the second step on: the optimiser has its state
            reset_cpu_peak()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
        watch.mark("start")
        training_step(passes, optimizer, batches, step, mark=watch.mark)
        rounds.append(watch.stages())
    rounds = rounds[2:]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else cpu_peak()
    return {
        "stages_ms": {name: median(r[name] for r in rounds) for name in rounds[0]},
        "step_ms": median(sum(r.values()) for r in rounds),
        "peak_bytes": peak,
    }


def time_depth(settings: Config, device: torch.device, repeats: int) -> dict:
    """Rays a second when whole images are rendered from a given volume, and the memory added."""
    settings = change(settings, ["optim.batch=1"])
    model = SelfOcc(settings).to(device).eval()
    batch = random_batch(settings, 0).to(device)
    size = tuple(batch.target.images.shape[-2:])
    pixels = fixed_pixels(size, size, device)
    # a road: some rays end soon, others nowhere
    height = node_positions(settings.volume.box, settings.volume.nodes, device)[..., 2]
    channels = 1 + settings.field.colors + settings.field.classes
    volume = torch.randn(1, *settings.volume.nodes, channels, device=device)
    volume = volume.permute(0, 4, 1, 2, 3)  # the decoder's layout
    volume = volume[:, : channels - settings.field.classes]  # as `render_grid` reads it
    volume[:, 0] = (height - settings.volume.box[2] - 0.3).clamp(-0.5, 0.5)

    @torch.no_grad()
    def render():
        model.render(volume, batch.target, pixels, SAMPLES, stop_below=SPENT)

    if device.type == "cuda":
        seconds, peak = gpu_seconds([render], repeats), gpu_peak(render)
    else:
        before = reset_cpu_peak()
        seconds, peak = cpu_seconds([render], 1), cpu_peak()
        peak -= before
    rays = batch.target.images.shape[1] * math.prod(size)
    return {
        "depth_rays": rays,
        "depth_ms": 1e3 * seconds,
        "rays_per_second": rays / seconds,
        "depth_peak_bytes": peak,
    }


def time_inference(
    settings: Config, device: torch.device, repeats: int, graph: bool, compiled: bool = False
) -> dict:
    """Milliseconds from images and cameras in host memory to voxels, and peak memory.

    Peak memory is all of the process on a CPU, all that PyTorch allocates on a GPU.
    """
    settings = change(settings, ["optim.batch=1"])
    predict = Predictor(SelfOcc(settings).to(device), compiled=compiled, graph=graph)
    frames = [random_batch(settings, seed) for seed in range(3)]
    frames = [(b.images, b.intrinsics, b.camera_to_volume) for b in frames]
    runs = [partial(predict, *frame) for frame in frames]
    reset_cpu_peak()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        seconds, peak = gpu_seconds(runs, repeats), torch.cuda.max_memory_allocated()
    else:
        seconds, peak = cpu_seconds(runs, repeats), cpu_peak()
    return {"frame_ms": 1e3 * seconds, "peak_bytes": peak}


def random_batch(settings: Config, seed: int) -> Batch:
    """Noise for images, cameras on a car: all looking ahead, or in a ring; sources 1 m away.

    Laid out as the loader of train.py does, for a GPU in page-locked memory.
    """
    generator = torch.Generator().manual_seed(seed)
    data, box, cameras = settings.data, settings.volume.box, settings.data.cameras
    angle = torch.arange(cameras).double() * (2 * math.pi / cameras) + math.pi / 2
    ahead = torch.stack([angle.cos(), angle.sin(), 0 * angle], -1)
    right = torch.stack([angle.sin(), -angle.cos(), 0 * angle], -1)
    down = torch.tensor([0.0, 0.0, -1.0]).double().expand(cameras, 3)
    place = torch.tensor([(box[0] + box[3]) / 2, max(box[1], 0.0) + 0.3, box[2] + 2.0]).double()

    def frames(size: tuple[int, int], *metres: float) -> Frames:
        """A frame for every number of metres ahead."""
        shape = (settings.optim.batch, len(metres), cameras)
        pose = torch.eye(4).double().repeat(*shape, 1, 1)
        pose[..., :3, :3] = torch.stack([right, down, ahead], -1)
        pose[..., :3, 3] = place + torch.tensor(metres).double()[:, None, None] * ahead[0]
        focal = (0.8 if cameras > 1 else 0.6) * size[1]
        matrix = torch.tensor([[focal, 0, size[1] / 2], [0, focal, size[0] / 2], [0, 0, 1]])
        images = torch.rand(*shape, 3, *size, generator=generator)
        return Frames(images, matrix.double().repeat(*shape, 1, 1), pose)

    size = tuple(int(n * data.target_scale) for n in data.target_crop or data.crop)
    seen, target, sources = frames(data.pad, 0.0), frames(size, 0.0), frames(size, -1.0, 1.0)
    classes = settings.field.classes
    batch = Batch(
        name=[""] * settings.optim.batch,
        images=seen.images[:, 0] * 4 - 2,
        intrinsics=seen.intrinsics[:, 0],
        camera_to_volume=seen.camera_to_volume[:, 0],
        target=Frames(target.images[:, 0], target.intrinsics[:, 0], target.camera_to_volume[:, 0]),
        sources=sources,
        semantics=(target.images[:, 0, :, 0] * classes).byte() if classes else None,
    )
    if data.target_scale == 1:
        for frames in (batch.target, batch.sources):
            frames.images = (frames.images * 255).byte()
    return batch.pin_memory() if torch.cuda.is_available() else batch


def main(words: list[str] | None = None) -> int:
    """The command line (or `words` instead of it); returns the exit code."""
    return run(lambda: bench(parse_arguments(words)))


if __name__ == "__main__":
    sys.exit(main())
