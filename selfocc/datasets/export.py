"""The command line of `python -m selfocc.datasets.synthetic`: the embedded world as files."""

from functools import partial

from selfocc import InputError
from selfocc.commandline import Parser, count, path, run
from selfocc.datasets.export_kitti import export_kitti
from selfocc.datasets.export_kitti_raw import export_kitti_raw
from selfocc.datasets.export_nuscenes import export_nuscenes
from selfocc.datasets.synthetic import SPLITS, SyntheticConfig, synthetic_sequences
from selfocc.files import owned

# format: writer, rig, height and width of images
FORMATS = {
    "kitti": (export_kitti, "forward", (96, 320)),
    "kitti_raw": (export_kitti_raw, "forward", (96, 320)),
    "nuscenes": (export_nuscenes, "surround", (96, 160)),
}


def main(arguments: list[str] | None = None) -> int:
    """Write what the arguments ask for; returns the exit code."""
    return run(lambda: _main(arguments))


def _main(arguments):
    parser = Parser(
        prog="python -m selfocc.datasets.synthetic",
        description="Writes scenes of the embedded world to disk as another data set.",
    )
    parser.add_argument("--export", nargs=2, metavar=("FORMAT", "DIR"), required=True,
                        help=f"{', '.join(FORMATS)}, and the folder to write to")  # fmt: skip
    some = partial(count, least=1)
    parser.add_argument("--scenes", type=some, default=2, help="of each split; default: 2")
    parser.add_argument(
        "--frames", type=some, default=SyntheticConfig.frames, help="a scene; default: %(default)s"
    )
    parser.add_argument(
        "--seed", type=count, default=0, help="number of the first scene; default: 0"
    )
    parser.add_argument(
        "--split", nargs="+", choices=SPLITS, default=["train"], help="one or more; default: train"
    )
    parser.add_argument("--size", type=some, nargs=2, metavar=("HEIGHT", "WIDTH"),
                        help="of the images; default: as the small presets have them")  # fmt: skip
    chosen = parser.parse_args(arguments)
    form, folder = chosen.export
    if form not in FORMATS:
        raise InputError(f"--export {form}: unknown format; known: {', '.join(FORMATS)}")
    export, rig, size = FORMATS[form]
    config = SyntheticConfig(rig=rig, image_size=tuple(chosen.size or size), frames=chosen.frames)
    sequences = [
        sequence
        for split in dict.fromkeys(chosen.split)
        for sequence in synthetic_sequences(config, split, chosen.scenes, chosen.seed)
    ]
    with owned(path(folder)) as owner:
        export(sequences, owner)
