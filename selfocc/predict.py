"""Voxels, depth and pictures of the images of one camera, or of its video.

    python -m selfocc.predict --ckpt street drive/ --fov 81 --camera-height 1.65 --out seen --html

The camera looks straight ahead, level or pitched, and no lens distorts its images. For each frame
the output folder receives NAME.npz (`sdf`, [ny, nx, nz] over y, x, z in metres, its `box`, and the
`threshold` up to which a voxel is occupied) and the picture NAME.png. For a rig, or another pose,
use Python: `selfocc.load(...).predict` (selfocc/scene.py).
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from time import perf_counter

import imageio.v3 as iio
import numpy as np
from tqdm import tqdm

import selfocc
from selfocc import InputError, commandline, counted, distributed, files, pictures
from selfocc.datasets.captures import SUFFIXES, images_in
from selfocc.datasets.reading import read_image
from selfocc.page import Shown, write_page

ON_PAGE = 200  # frames


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = commandline.Parser(description=__doc__)
    either = parser.add_mutually_exclusive_group().add_argument
    add, some = parser.add_argument, partial(commandline.count, least=1)
    add("images", nargs="+", type=Path, metavar="IMAGES", help="files, folders, or one video")
    said = "checkpoint or run folder, or a name in selfocc/weights"
    add("--ckpt", type=Path, required=True, metavar="FILE", help=said)
    either("--intrinsics", type=four_numbers, metavar="FX,FY,CX,CY", help="pixels of the images")
    either("--fov", type=float, metavar="DEG", help="or their horizontal field of view")
    add("--camera-height", type=float, required=True, metavar="METRES", help="above the ground")
    add("--pitch", type=float, default=0.0, metavar="DEG", help="positive looks down; default: 0")
    add("--every", type=some, default=1, metavar="N", help="one frame in N; default: all")
    add("--out", type=Path, required=True, metavar="DIR")
    said = f"also page.html, in which the first {ON_PAGE} frames can be turned and looked at"
    add("--html", action="store_true", help=said)
    add("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    chosen = parser.parse_args(words)
    if chosen.intrinsics is None and chosen.fov is None:
        raise InputError(
            "give --intrinsics FX,FY,CX,CY in pixels of the images (FX = width / (2 tan(fov / 2)), "
            "CX about width / 2), or --fov DEG, their horizontal field of view"
        )
    return chosen


def four_numbers(text: str) -> tuple[float, ...]:
    fx, fy, cx, cy = map(float, text.split(","))
    return fx, fy, cx, cy


def predict(arguments: argparse.Namespace) -> None:
    found, out = listed(arguments.images), arguments.out
    if out.resolve() in {file.resolve().parent for file in found if is_image(file)}:
        raise InputError(f"--out {out} holds the images and would overwrite them; name another")
    model = selfocc.load(arguments.ckpt, arguments.device)
    distributed.tune(next(model.model.parameters()).device)
    pose = model.level_camera(arguments.camera_height, arguments.pitch)
    total = -(-len(found) // arguments.every) if is_image(found[0]) else None
    shown, network, ends = [], [], [perf_counter()]
    with files.owned(out), tqdm(read(found, arguments.every), "frames", total) as bar:
        try:
            for name, image in bar:
                start = perf_counter()
                scene = model.predict(image, intrinsics(arguments, *image.shape[:2]), pose)
                network.append(perf_counter() - start)
                scene.save(out / f"{name}.npz")
                pictures.write_picture(out / f"{name}.png", scene.panel(name))
                if arguments.html and len(shown) < ON_PAGE:
                    shown.append(Shown(name, scene.sdf, scene.semantics, scene.views))
                ends.append(perf_counter())
        finally:  # also where an image is damaged, or of Ctrl-C
            if shown:
                about = scene.box, scene.threshold, out.name, scene.palette
                write_page(out / "page.html", shown, *about)
    paged = f", the first {len(shown)} also in page.html" if shown else ""
    whole, alone = (1 / np.median(seconds) for seconds in (np.diff(ends), network))
    print(
        f"{counted(len(network), 'frame')} in {out}{paged}; {whole:.2f} a second, the network "
        f"alone {alone:.2f} (medians)"
    )


def intrinsics(arguments: argparse.Namespace, height: int, width: int) -> np.ndarray:
    """[3, 3] of images of this size."""
    focal = width / 2 * np.tan(np.pi / 2 - np.deg2rad(arguments.fov or 0) / 2)
    centred = focal, focal, (width - 1) / 2, (height - 1) / 2
    fx, fy, cx, cy = arguments.intrinsics or centred
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])


def is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES


def listed(paths: list[Path]) -> list[Path]:
    """Image files with those of folders, or one video. Raises InputError for anything else."""
    found = [f for path in paths for f in (images_in(path) if path.is_dir() else [path])]
    absent = [file for file in found if not file.is_file()]
    if absent or not found:
        raise InputError(f"{absent[0]}: no such file" if absent else f"{paths[0]}: holds no images")
    others = [file for file in found if not is_image(file)]
    if others and len(found) > 1:
        raise InputError(f"{others[0]}: not {' '.join(SUFFIXES)}; a video is given alone")
    if len({file.stem for file in found}) < len(found):
        raise InputError("some images have the same name; give one folder at a time")
    return found


def read(found: list[Path], every: int) -> Iterator[tuple[str, np.ndarray]]:
    """Names and images uint8 [h, w, 3] of what is `listed`, one in `every`. Raises InputError."""
    if is_image(found[0]):
        yield from ((file.stem, read_image(file)) for file in found[::every])
        return
    number = -1
    try:
        for number, image in enumerate(iio.imiter(found[0])):
            if number % every == 0:
                yield f"{number:06d}", image[..., :3]
        if number < 0:
            raise ValueError("it has no frames")
    except Exception as error:  # whatever a plugin of imageio raises
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{found[0]}: frame {number + 1} cannot be read ({reason}); copy the file again, or "
            "`pip install imageio[pyav]`, which reads most videos"
        ) from error


def main(words: list[str] | None = None) -> int:
    """The command line (or `words` instead of it); returns the exit code."""
    return commandline.run(lambda: predict(parse_arguments(words)))


if __name__ == "__main__":
    sys.exit(main())
