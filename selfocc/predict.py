"""Voxels, depth and pictures of the images of one camera, or of its video.

    python -m selfocc.predict --ckpt street drive/ --fov 81 --camera-height 1.65 --out seen --html
    python -m selfocc.predict --ckpt street drive.mp4 --intrinsics 721.5,721.5,609.6,172.9 \\
        --camera-height 1.65 --pitch 2 --every 5 --out seen

The camera looks straight ahead, level or pitched, and no lens distorts its images. For each frame
the output folder receives NAME.npz (`sdf`, [ny, nx, nz] over y, x, z in metres, its `box`, and the
`threshold` up to which a voxel is occupied) and the picture NAME.png. For a rig, or another pose,
use Python: `selfocc.load(...).predict` (selfocc/scene.py).
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from time import perf_counter

import imageio.v3 as iio
import numpy as np
from tqdm import tqdm

import selfocc
from selfocc import InputError, commandline, counted, distributed, files
from selfocc.datasets.reading import read_image
from selfocc.page import write_page

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff")
ON_PAGE = 200  # frames


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = commandline.Parser(description=__doc__)
    add, camera = parser.add_argument, parser.add_mutually_exclusive_group()
    said = "image files, folders of them (read by name), or one video"
    add("images", nargs="+", type=Path, metavar="IMAGES", help=said)
    said = "checkpoint or run folder, or a name in selfocc/weights"
    add("--ckpt", type=Path, required=True, metavar="FILE", help=said)
    said = "focal lengths and principal point, pixels of the images"
    camera.add_argument("--intrinsics", type=four_numbers, metavar="FX,FY,CX,CY", help=said)
    said = "horizontal field of view instead, of which they are made"
    camera.add_argument("--fov", type=float, metavar="DEG", help=said)
    said = "of the camera above the ground"
    add("--camera-height", type=float, required=True, metavar="METRES", help=said)
    add("--pitch", type=float, default=0.0, metavar="DEG", help="positive looks down; default: 0")
    some = partial(commandline.count, least=1)
    add("--every", type=some, default=1, metavar="N", help="one frame in N; default: all")
    add("--out", type=Path, required=True, metavar="DIR")
    said = f"also write page.html, in which the first {ON_PAGE} frames can be turned and looked at"
    add("--html", action="store_true", help=said)
    add("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    return parser.parse_args(words)


def four_numbers(text: str) -> tuple[float, ...]:
    fx, fy, cx, cy = map(float, text.split(","))
    return fx, fy, cx, cy


def predict(arguments: argparse.Namespace) -> None:
    if arguments.intrinsics is None and arguments.fov is None:
        raise InputError(
            "give the camera's --intrinsics fx,fy,cx,cy in pixels, or its horizontal --fov: "
            "fx = fy = width / (2 tan(fov / 2)), and cx, cy are the middle of the image"
        )
    found, out = listed(arguments.images), arguments.out
    if is_image(found[0]) and out.resolve() in {file.resolve().parent for file in found}:
        raise InputError(f"--out {out} holds the images and would overwrite them; name another")
    model = selfocc.load(arguments.ckpt, arguments.device)
    distributed.tune(next(model.model.parameters()).device)
    pose = model.level_camera(arguments.camera_height, arguments.pitch)
    total = -(-len(found) // arguments.every) if is_image(found[0]) else None
    bar = tqdm(read(found, arguments.every), "frames", total, unit="frame")
    shown, frames, spent, start = [], 0, Counter(), perf_counter()

    def lap(part: str) -> None:
        nonlocal start
        now = perf_counter()
        spent[part] += now - start
        start = now

    with files.owned(out):
        try:
            for name, image in bar:
                if frames == 1:
                    spent.clear()  # the first frame has made all ready
                lap("reading")
                scene = model.predict(image, intrinsics(arguments, *image.shape[:2]), pose)
                lap("network")
                scene.depth()
                lap("rendering")
                scene.save(out / f"{name}.npz")
                scene.save(out / f"{name}.png")
                if arguments.html and frames < ON_PAGE:
                    shown.append(scene.shown(name))
                frames += 1
                lap("drawing and writing")
        finally:  # also where an image is damaged, or of Ctrl-C
            bar.close()
            if shown:
                page, threshold = out / "page.html", scene.threshold
                write_page(page, shown, scene.box, threshold, out.name, scene.palette)
            if frames:
                timed = max(frames - 1, 1)
                each = ", ".join(f"{part} {1e3 * s / timed:.0f} ms" for part, s in spent.items())
                print(
                    f"{counted(frames, 'frame')} in {out}"
                    + (f", the first {len(shown)} also in page.html" if shown else "")
                    + f"; {timed / spent.total():.2f} a second: {each}"
                    + (" (the first is not counted)" if frames > 1 else "")
                )


def intrinsics(arguments: argparse.Namespace, height: int, width: int) -> np.ndarray:
    """[3, 3] of images of this size."""
    if arguments.intrinsics is None:
        focal = width / 2 * np.tan(np.pi / 2 - np.deg2rad(arguments.fov) / 2)
        fx, fy, cx, cy = focal, focal, (width - 1) / 2, (height - 1) / 2
    else:
        fx, fy, cx, cy = arguments.intrinsics
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])


def is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGES


def listed(paths: list[Path]) -> list[Path]:
    """Image files with those of folders, or one video. Raises InputError for anything else."""
    found = []
    for path in paths:
        inside = sorted(filter(is_image, path.iterdir())) if path.is_dir() else [path]
        if not inside or not inside[0].exists():
            raise InputError(f"{path}: {'holds no images' if path.is_dir() else 'no such file'}")
        found += inside
    others = [file for file in found if not is_image(file)]
    if others and len(found) > 1:
        raise InputError(f"{others[0]}: not {' '.join(IMAGES)}; a video is given alone")
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
    except Exception as error:  # whatever a plugin of imageio raises
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{found[0]}: frame {number + 1} cannot be read ({reason}); copy the file again, or "
            "`pip install imageio[pyav]`, which reads most videos"
        ) from error
    if number < 0:
        raise InputError(f"{found[0]}: a video without frames")


def main(words: list[str] | None = None) -> int:
    """The command line (or `words` instead of it); returns the exit code."""
    return commandline.run(lambda: predict(parse_arguments(words)))


if __name__ == "__main__":
    sys.exit(main())
