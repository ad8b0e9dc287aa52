"""Write scenes of the embedded world to disk as another data set, with exact truth.

python -m selfocc.datasets.export kitti DIR --scenes 2 --frames 30
"""

import sys
from functools import partial
from pathlib import Path

from selfocc import InputError
from selfocc.commandline import Parser, count, run
from selfocc.datasets.export_kitti import export_kitti, export_kitti_raw
from selfocc.datasets.export_nuscenes import export_nuscenes
from selfocc.datasets.export_posed import KINDS, LENSES, export_posed
from selfocc.datasets.synthetic import SPLITS, SyntheticConfig, synthetic_sequences
from selfocc.files import owned

# format: writer, rig, height and width of images
FORMATS = {
    "kitti": (export_kitti, "forward", (96, 320)),
    "kitti_raw": (export_kitti_raw, "forward", (96, 320)),
    "nuscenes": (export_nuscenes, "surround", (96, 160)),
    "posed": (export_posed, "forward", (96, 320)),
}


def main(words: list[str] | None = None) -> int:
    """The command line (or `words` instead of it); returns the exit code."""
    return run(lambda: _main(words))


def _main(words):
    parser = Parser(prog="python -m selfocc.datasets.export", description=__doc__)
    add, some = parser.add_argument, partial(count, least=1)
    add("format", choices=FORMATS)
    add("folder", type=Path, metavar="DIR", help="to write to")
    add("--scenes", type=some, default=2, help="of each split; default: 2")
    add("--frames", type=some, default=SyntheticConfig.frames, help="a scene; default: %(default)s")
    add("--seed", type=count, default=0, help="number of the first scene; default: 0")
    add("--split", nargs="+", choices=SPLITS, default=["train"], help="one or more; default: train")
    said = "of the images; default: as the small presets have them"
    add("--size", type=some, nargs=2, metavar=("HEIGHT", "WIDTH"), help=said)
    add("--kind", choices=KINDS, help="posed: whose files; default: nerfstudio")
    add("--lens", choices=("pinhole", *LENSES), help="posed: of the cameras; default: pinhole")
    chosen = parser.parse_args(words)
    export, rig, size = FORMATS[chosen.format]
    options = {name: getattr(chosen, name) for name in ("kind", "lens")}
    options = {name: value for name, value in options.items() if value is not None}
    if options and chosen.format != "posed":
        raise InputError(f"--{min(options)} is of format posed; leave it out")
    # KITTI raw has one calibration for all drives of a day; footage is as with data.looks=1
    config = SyntheticConfig(
        rig=rig, image_size=tuple(chosen.size or size), frames=chosen.frames,
        rigs=float(chosen.format == "posed"),
    )  # fmt: skip
    sequences = [
        sequence
        for split in dict.fromkeys(chosen.split)
        for sequence in synthetic_sequences(config, split, chosen.scenes, chosen.seed)
    ]
    with owned(chosen.folder) as owner:
        export(sequences, owner, **options)


if __name__ == "__main__":
    sys.exit(main())
