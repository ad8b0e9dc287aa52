"""Write a model to a file that runs without this code: images and cameras in, voxels out.

    python -m selfocc.export --ckpt street --format pt2     # torch.export.load(FILE).module()(...)
    python -m selfocc.export --ckpt runs/kitti --format onnx --out kitti.onnx

It takes what `inference.Input` says of one frame, of fixed sizes, and gives what is in `Voxels`, in
float32. Kernels are PyTorch's operators (dispatch.py). The settings are in it too, as JSON.

The file is then read again and compared with the model, on frames of noise with random cameras. It
may differ by four times what other last bits of a frame make of the model's own voxels; more ends
with exit code 2. Borders of what a camera sees, one voxel in 10,000, are left out of that.
"""

import io
import json
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from selfocc import InputError, checkpoint
from selfocc.bench import random_batch
from selfocc.commandline import Parser, add_set, run
from selfocc.config import Config, to_dict
from selfocc.files import write_file
from selfocc.inference import Input, Predictor, Voxels
from selfocc.model import SelfOcc
from selfocc.settings import change

OPSET = 20  # of ONNX; the first that samples volumes
NOISE = 4  # times the rounding errors are too much
Function = Callable[..., list[Tensor]]  # from a frame to SDF and, of a model with classes, those


class Exported(nn.Module):
    """A predictor as a `Function`."""

    def __init__(self, predict: Predictor):
        super().__init__()
        self.model, self.predict = predict.model, predict

    def forward(self, *frame: Tensor) -> list[Tensor]:
        return [x for x in self.predict.voxels(Input(*frame)) if x is not None]


def content(model: Exported, frame: Input, kind: str) -> bytes:
    """The file, for frames like this one.

    Raises InputError where ONNX has no operator for the model, or its packages are missing.
    """
    if kind == "onnx" and not all(map(find_spec, ("onnx", "onnxscript"))):
        raise InputError("--format onnx needs two more packages: pip install onnx onnxscript")
    outputs = len(model(*frame))  # what is made once (`geometry.constant`) is not made by tracing
    settings = json.dumps(to_dict(model.model.config))
    program = torch.export.export(model, tuple(frame))
    if kind == "pt2":
        program.example_inputs, file = None, io.BytesIO()
        torch.export.save(program, file, extra_files={"config.json": settings})
        return file.getvalue()
    names = dict(input_names=Input._fields, output_names=Voxels._fields[:outputs])
    try:
        written = torch.onnx.export(program, opset_version=OPSET, verbose=False, **names)
    except torch.onnx.errors.OnnxExporterError as error:
        if missing := re.search(
            r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(error)
        ):
            said = f"ONNX has no operator for {missing[1]}; use --format pt2"
            raise InputError(said) from None
        raise
    written.model.metadata_props["config.json"] = settings
    return written.model_proto.SerializeToString()


def opened(path: Path, kind: str) -> Function | None:
    """What the file computes; None for ONNX without onnxruntime."""
    if kind == "pt2":
        return torch.export.load(path).module()
    try:
        from onnxruntime import InferenceSession
    except ImportError:
        return None
    try:
        session = InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # whatever onnxruntime raises
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{path} is written, but onnxruntime cannot open it ({reason}); a newer one may"
        ) from None

    def compute(*frame: Tensor) -> list[Tensor]:
        given = {name: x.numpy() for name, x in zip(Input._fields, frame, strict=True)}
        return [torch.from_numpy(x) for x in session.run(None, given)]

    return compute


def compared(model: Function, file: Function, config: Config) -> str:
    """How far the file is from the model, and how long it takes; InputError if it is too far."""
    error, noise, seconds = torch.zeros(3), torch.zeros(3), []
    for seed in range(3):
        frame = random_frame(config, seed)
        moved = (x + x * 2**-23 * torch.randint(-1, 2, x.shape) for x in frame)
        voxels = model(*frame)
        start = time.perf_counter()
        found = file(*frame)
        seconds.append(time.perf_counter() - start)
        error = torch.maximum(error, apart(found, voxels))
        noise = torch.maximum(noise, apart(model(*moved), voxels))
    what = "{:.1e} m of SDF (at most {:.1e} m)"
    what += " and the class of {:.1e} of the voxels" if len(voxels) > 1 else ""
    said = f"it differs from the model by {what.format(*error)}, rounding by {what.format(*noise)}"
    if not (error <= NOISE * noise + torch.tensor([1e-6, torch.inf, 1e-4])).all():
        raise InputError(f"the file is written, but wrong: {said}")
    return f"{said}; {min(seconds):.3f} s a frame"


def apart(some: list[Tensor], others: list[Tensor]) -> Tensor:
    """[3]: metres between the SDFs, in all but one voxel of 10,000 and at most, and the share of
    voxels whose classes differ.
    """
    metres = (some[0] - others[0]).abs().where(some[0] != others[0], 0)  # they may be inf
    metres = metres.flatten().sort().values
    share = sum((a != b).float().mean() for a, b in zip(some[1:], others[1:], strict=True))
    return torch.tensor([metres[-1 - len(metres) // 10_000], metres[-1], share])


def random_frame(config: Config, seed: int) -> Input:
    """Noise, and the cameras of `bench.random_batch` moved by decimetres and turned by degrees."""
    batch, _ = random_batch(change(config, ["optim.batch=1"]), seed), torch.manual_seed(seed)
    motion = 0.1 * torch.randn_like(batch.camera_to_volume)
    motion[..., :3, :3] -= motion[..., :3, :3].mT.clone()
    motion[..., 3, :] = 0
    poses = batch.camera_to_volume @ torch.matrix_exp(motion)
    return Input(batch.images, batch.intrinsics, poses)


def export(words: list[str] | None) -> None:
    """The command line. Raises InputError as what it calls does."""
    parser = Parser(prog="python -m selfocc.export", description=__doc__)
    add, said = parser.add_argument, "checkpoint or run folder, or a name in selfocc/weights"
    add("--ckpt", type=Path, required=True, metavar="FILE", help=said)
    add("--format", choices=("pt2", "onnx"), required=True)
    add("--out", type=Path, metavar="FILE", help="default: named as the checkpoint, here")
    add("--preset", metavar="NAME", help="of a published checkpoint; default: guessed, and said")
    add_set(parser, "change any setting of config.py")
    given = parser.parse_args(words)
    saved = checkpoint.load(given.ckpt, given.preset, given.set)
    config = change(saved.config, [*given.set, "backbone.weights=none", "optim.bf16=false"])
    network, path = SelfOcc(config), given.out or Path(f"{given.ckpt.stem}.{given.format}")
    checkpoint.restore(saved, network)
    with torch.no_grad():
        model = Exported(Predictor(network))
        write_file(path, content(model, random_frame(config, 0), given.format))
        version = f"opset {OPSET}" if given.format == "onnx" else f"PyTorch {torch.__version__}"
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {version}", flush=True)
        file = opened(path, given.format)
        print(compared(model, file, config) if file else "not checked: pip install onnxruntime")


def main(words: list[str] | None = None) -> int:
    """The command line (or `words` instead of it); returns the exit code."""
    return run(lambda: export(words))


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # exporters' remarks ask nothing of the user
    warnings.simplefilter("ignore")
    sys.exit(main())
