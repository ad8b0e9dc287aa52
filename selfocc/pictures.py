"""Pictures without a plotting library: depth maps, occupancy views, captions, legends, video.

All images are uint8 [h, w, 3]. Colours are turbo's of numbers from 0 to 1, and a legend says what
these numbers mean.
"""

import functools
import io
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from imageio.config import known_plugins
from PIL import Image, ImageDraw, ImageFont  # pillow comes with imageio
from torch import Tensor
from tqdm import tqdm

from selfocc import InputError
from selfocc.files import write_file
from selfocc.geometry import Box
from selfocc.sight import cast

BACKGROUND = np.array([236, 240, 244], np.float32)
NOTHING = 24  # grey value where nothing is known
NEAREST = 3.0  # metres of z-depth that are red; colours go with inverse depth
WORST = 0.5  # relative error of depth that is red, and so is any above it
GAP = 4  # white pixels between pictures
FPS = 8  # frames of a video a second

# of a legend: label -> number that is coloured
DEPTH_TICKS = {"far": 0.0} | {f"{metres} m": NEAREST / metres for metres in (50, 20, 10, 6, 4)}
DEPTH_TICKS |= {f"<{NEAREST:g} m": 1.0}
ERROR_TICKS = {f"{100 * e:g} %": e / WORST for e in (0, 0.1, 0.2, 0.3, 0.4)}
ERROR_TICKS |= {f">{100 * WORST:g} %": 1.0}

PLUGINS = {"pyav": "av", "FFMPEG": "imageio_ffmpeg"}  # of imageio, for mp4 -> the module it needs


def turbo(values: np.ndarray) -> np.ndarray:
    """Turbo colours [..., 3] uint8 of values in [0, 1].

    The polynomial fit is by A. Mikhailov and R. Reid (Google, Apache-2.0).
    """
    x = np.clip(values, 0, 1)[..., None]
    powers = np.concatenate([x**k for k in range(6)], axis=-1)
    red = [0.13572138, 4.61539260, -42.66032258, 132.13108234, -152.94239396, 59.28637943]
    green = [0.09140261, 2.19418839, 4.84296658, -14.18503333, 4.27729857, 2.82956604]
    blue = [0.10667330, 12.64194608, -60.58204836, 110.36276771, -89.90310912, 27.34824973]
    return (np.clip(powers @ np.array([red, green, blue]).T, 0, 1) * 255).astype(np.uint8)


def depth_picture(depth: Tensor) -> np.ndarray:
    """Depth [h, w] in metres as colour (DEPTH_TICKS); 0 stands for none and is dark."""
    return _coloured(inverse_depth(depth.cpu().numpy()))


def inverse_depth(depth: np.ndarray) -> np.ndarray:
    """What is coloured of depth in metres: 1 at NEAREST or nearer, 0 where depth is 0 for none."""
    return np.where(depth > 0, NEAREST / np.maximum(depth, NEAREST), 0)


def error_picture(depth: Tensor, truth: Tensor) -> np.ndarray:
    """Relative depth error as colour (ERROR_TICKS); dark where truth is 0 for none.

    Single points of a scan are drawn wide enough to be seen.
    """
    depth, truth = depth.cpu().numpy(), truth.cpu().numpy()
    error = np.abs(depth - truth) / np.maximum(truth, 1e-3) / WORST
    return _coloured(spread(np.where(truth > 0, np.maximum(error, 1e-6), 0)))


def _coloured(values: np.ndarray) -> np.ndarray:
    picture = turbo(values)
    picture[values <= 0] = NOTHING
    return picture


def spread(values: np.ndarray) -> np.ndarray:
    """Positive numbers [h, w], each also where there is 0 around it: a dot 1/400 of the width wide.

    The largest wins.
    """
    dot = max(values.shape[1] // 400, 1)
    grown = F.max_pool2d(torch.from_numpy(values)[None], dot, stride=1, padding=dot // 2)[0]
    return np.where(values > 0, values, grown.numpy()[: values.shape[0], : values.shape[1]])


def rgb_picture(image: Tensor) -> np.ndarray:
    """RGB [3, h, w] in [0, 1] as uint8 [h, w, 3]."""
    return (image.detach().permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def occupancy_picture(
    occupied: Tensor, box: Box, view: str, size: tuple[int, int] = (192, 320)
) -> np.ndarray:
    """Occupied voxels [ny, nx, nz] coloured by height (`height_ticks`), seen from `above` or from
    `behind`.

    Voxels are drawn as cubes, shaded by the face that a pixel's ray enters.
    """
    lo, hi = torch.tensor(box).view(2, 3)
    origins, directions = _viewing_rays(lo, hi, view, size)
    place, _ = cast(occupied.cpu(), box, origins, directions)
    ny, nx, nz = occupied.shape
    cell = torch.stack([place // nz % nx, place // (nz * nx), place % nz], dim=1)
    near = lo + (cell + (directions < 0)) * (hi - lo) / torch.tensor([nx, ny, nz])
    face = ((near - origins) / directions).argmax(1)  # the last that a ray enters
    color = turbo((cell[:, 2].numpy() + 0.5) / nz) * np.array([0.72, 0.86, 1.0])[face, None]
    picture = np.where(place.numpy()[:, None] >= 0, color, BACKGROUND)
    return picture.astype(np.uint8).reshape(*size, 3)


def facing_y(occupied: Tensor, box: Box, ahead: np.ndarray) -> tuple[Tensor, Box]:
    """Voxels [ny, nx, nz] and their box, turned by 90 degrees where `ahead` [3] is along x.

    The front, which is +y or +x in all data sets, is then +y, as `occupancy_picture` has it.
    """
    if abs(ahead[0]) <= abs(ahead[1]):
        return occupied, box
    x0, y0, z0, x1, y1, z1 = box
    return occupied.transpose(0, 1).flip(1), (-y1, x0, z0, -y0, x1, z1)


def height_ticks(box: Box) -> dict[str, float]:
    """Of a legend: metres of z in a box."""
    lo, hi = box[2], box[5]
    metres = (lo, *range(int(np.ceil(lo)), int(hi) + 1), hi)
    return {f"{z:g} m": (z - lo) / (hi - lo) for z in metres}


def _viewing_rays(
    lo: Tensor, hi: Tensor, view: str, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    rows, cols = size
    v, u = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(cols) + 0.5, indexing="ij")
    u, v = u.reshape(-1) / cols, v.reshape(-1) / rows
    if view == "above":
        extent = hi - lo
        scale = max(extent[0] / cols, extent[1] / rows)
        x = (lo[0] + hi[0]) / 2 + (u - 0.5) * cols * scale
        y = (lo[1] + hi[1]) / 2 - (v - 0.5) * rows * scale
        origins = torch.stack([x, y, torch.full_like(x, float(hi[2]) + 1)], dim=1)
        return origins, torch.tensor([1e-4, 1e-4, -1.0]).expand_as(origins)
    # from behind and above, looking along y at a point in the near half of the box
    eye = torch.stack(
        [(lo[0] + hi[0]) / 2, lo[1] - 0.22 * (hi[1] - lo[1]), hi[2] + 0.2 * (hi[1] - lo[1])]
    )
    look = torch.stack([eye[0], lo[1] + 0.42 * (hi[1] - lo[1]), lo[2]]) - eye
    forward = look / look.norm()
    right = torch.tensor([1.0, 0.0, 0.0])
    up = torch.linalg.cross(right, forward)
    directions = (
        forward + (u - 0.5)[:, None] * right * 1.1 + (0.5 - v)[:, None] * up * 1.1 * rows / cols
    )
    return eye.expand_as(directions), directions + 1e-6


def text_size(width: int) -> int:
    """Pixels of text that can be read when a picture of this width is seen as a whole."""
    return max(12, width // 80)


def caption(
    picture: np.ndarray, text: str, size: int, ticks: dict[str, float] | None = None
) -> np.ndarray:
    """The picture below a line of text, and above a legend if it has ticks; as wide as it was."""
    width = picture.shape[1]
    line = Image.new("RGB", (width, round(1.4 * size)), "white")
    _write(line, text, size, 2)
    parts = [np.asarray(line), picture]
    return np.concatenate(parts + ([legend(width, ticks, size)] if ticks else []))


def legend(width: int, ticks: dict[str, float], size: int) -> np.ndarray:
    """A bar of turbo's colours from 0 to 1, and below it those labels that find room.

    ticks: label -> number. White margins keep the bar off the picture above and the labels off
    those of the next legend.
    """
    margin, mark = min(size // 2, width // 4), max(size // 4, 3)
    numbers = np.linspace(0, 1, width - 2 * margin)
    bar = turbo(np.tile(numbers, (max(size // 2, 6), 1)))
    below = GAP + len(bar)
    image = Image.new("RGB", (width, below + mark + round(1.4 * size)), "white")
    image.paste(Image.fromarray(bar), (margin, GAP))
    draw, font = ImageDraw.Draw(image), _font(size)
    taken: list[tuple[int, int]] = []
    # both ends first
    for label, number in sorted(ticks.items(), key=lambda tick: min(tick[1], 1 - tick[1])):
        at, long = margin + round(number * (len(numbers) - 1)), _length(label, font)
        left = max(min(at - long // 2, width - margin - long), margin)
        if all(left > end + size // 3 or left + long + size // 3 < start for start, end in taken):
            taken.append((left, left + long))
            draw.line((at, below, at, below + mark - 1), fill="black")
            _write(image, label, size, left, below + mark)
    return np.asarray(image)


def _write(image: Image.Image, text: str, size: int, left: int, top: int = 0) -> None:
    """Text from a place on in a line 1.4 sizes high; smaller or shortened where it is too long."""
    text = " ".join(text.encode("ascii", "replace").decode().split())  # what every font has
    room = image.width - left
    smallest, whole, kept = max(8, round(0.6 * size)), text, len(text)
    font, drawn = _font(size), size
    while _length(text, font) > room and drawn > smallest:
        drawn -= 1
        font = _font(drawn)
    while _length(text, font) > room and kept:
        kept -= 1  # names differ at both ends
        text = whole[: (kept + 1) // 2] + ".." + whole[len(whole) - kept // 2 :]
    if _length(text, font) <= room:
        draw = ImageDraw.Draw(image)
        _, above, _, below = draw.textbbox((0, 0), "Ag", font)
        draw.text((left, top + (1.4 * size - above - below) // 2), text, "black", font)


@functools.cache
def _font(size: int):
    try:
        return ImageFont.load_default(size)
    except (ImportError, TypeError):  # pillow without FreeType has one size
        return ImageFont.load_default()


def _length(text: str, font) -> int:
    return int(np.ceil(font.getlength(text)))


def scaled(picture: np.ndarray, width: int, smooth: bool = False) -> np.ndarray:
    """The picture at another width; `smooth` averages where it shrinks, which suits photographs."""
    if picture.shape[1] == width:
        return picture
    height = max(round(picture.shape[0] * width / picture.shape[1]), 1)
    average = smooth and width < picture.shape[1]
    method = Image.Resampling.BOX if average else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(picture).resize((width, height), method))


def tile(rows: list[list[np.ndarray]], width: int = 0) -> np.ndarray:
    """Pictures in rows from the left, on white; at least `width` pixels wide."""
    width = max(width, *(sum(p.shape[1] + GAP for p in row) - GAP for row in rows))
    heights = [max(len(picture) for picture in row) for row in rows]
    whole = np.full((sum(heights) + GAP * (len(rows) - 1), width, 3), 255, np.uint8)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for picture in row:
            whole[top : top + len(picture), left : left + picture.shape[1]] = picture
            left += picture.shape[1] + GAP
        top += height + GAP
    return whole


def rig_rows(camera_to_volume: np.ndarray) -> list[list[int]]:
    """Cameras [N, 4, 4] in rows of up to three, from left to right: those that look ahead, as the
    first does, then those that look back. Up is z.
    """
    axes = camera_to_volume[:, :2, 2]
    ahead = axes @ axes[0]
    leftward = axes @ np.array([-axes[0, 1], axes[0, 0]])
    order = np.argsort(-leftward, kind="stable").tolist()
    sides = [k for k in order if ahead[k] >= 0], [k for k in order if not ahead[k] >= 0]
    return [side[i : i + 3] for side in sides for i in range(0, len(side), 3)]


def rig(
    pictures: list[np.ndarray],
    rows: list[list[int]],
    names: list[str],
    width: int,
    size: int,
    smooth: bool = False,
) -> np.ndarray:
    """One picture of all cameras, `width` pixels wide, each below its name if there are several.

    rows as `rig_rows` gives them; `smooth` as in `scaled`.
    """
    if len(pictures) == 1:
        return scaled(pictures[0], width, smooth)
    columns = max(len(row) for row in rows)
    each = (width - GAP * (columns - 1)) // columns
    cells = [[caption(scaled(pictures[k], each, smooth), names[k], size) for k in r] for r in rows]
    return tile(cells, width)


def write_picture(path: Path, picture: np.ndarray):
    """Write a PNG. Raises InputError if the disk is full or the folder not writable."""
    write_file(path, iio.imwrite("<bytes>", picture, extension=".png"))


def video_plugin() -> tuple[str | None, str | None]:
    """Which of imageio's plugins writes mp4 on this machine, found by trying; for `write_video`.

    If none does: None, and a line that tells the user why the video will be a GIF.
    """
    problems = []
    for plugin, module in PLUGINS.items():
        try:
            _ = known_plugins[plugin].plugin_class  # imports what it needs
            _mp4([np.zeros((64, 64, 3), np.uint8)] * 2, plugin)
            return plugin, None
        except Exception as error:  # whatever a foreign package raises
            if not (isinstance(error, ModuleNotFoundError) and error.name == module):
                problems.append(_reason(module, error))
    return None, "; ".join(problems) or (
        "without `pip install imageio[pyav]` (or imageio-ffmpeg) the video is a GIF"
    )


def _reason(module: str, error: Exception) -> str:
    lines = f"{type(error).__name__}: {error}".strip().splitlines()
    return f"{module} cannot write a video ({lines[0]}), so it is a GIF"


def write_video(path: Path, pictures: Collection[np.ndarray], plugin: str | None = None) -> Path:
    """Write an mp4 with a plugin of imageio (see `video_plugin`) or, without one, a GIF.

    Returns the file's path. Pictures are read one by one, and once more for a GIF, with a note,
    if the plugin fails. All are brought to the size of the first, made even, by white margins;
    larger ones are shrunk first. Raises InputError if the disk is full or the folder not writable.
    """
    if plugin:
        try:
            content = _mp4(_same_size(pictures), plugin)
        except InputError:
            raise
        except Exception as error:  # whatever a foreign package raises
            tqdm.write(f"note: {_reason(PLUGINS[plugin], error)}")
        else:
            write_file(path.with_suffix(".mp4"), content)
            return path.with_suffix(".mp4")
    write_file(path.with_suffix(".gif"), _gif(_same_size(pictures)))
    return path.with_suffix(".gif")


def _same_size(pictures: Collection[np.ndarray]) -> Iterator[np.ndarray]:
    size = None
    for picture in tqdm(pictures, desc="video"):
        image = Image.fromarray(picture)
        size = size or tuple(n + n % 2 for n in image.size)  # H.264 halves the resolution of hue
        image.thumbnail(size)
        frame = Image.new("RGB", size, "white")
        frame.paste(image)
        yield np.asarray(frame)


def _mp4(pictures: Iterable[np.ndarray], plugin: str) -> bytes:
    buffer = io.BytesIO()
    with iio.imopen(buffer, "w", plugin=plugin, extension=".mp4") as file:
        if plugin == "FFMPEG":  # stretches to multiples of 16 unless told not to
            file.write(pictures, is_batch=True, fps=FPS, macro_block_size=1)
        else:
            options = dict(codec="libx264", fps=FPS, out_pixel_format="yuv420p")
            for picture in pictures:
                file.write(picture, is_batch=False, **options)
    content = buffer.getvalue()
    # imageio-ffmpeg says nothing where its temporary file did not fit the disk
    at, kinds = 0, set()
    while at + 8 <= len(content) and (length := int.from_bytes(content[at : at + 4], "big")) >= 8:
        kinds.add(content[at + 4 : at + 8])
        at += length
    if at != len(content) or b"moov" not in kinds:
        raise OSError("the file is not whole")
    return content


def _gif(pictures: Iterator[np.ndarray]) -> bytes:
    images = map(Image.fromarray, pictures)
    buffer = io.BytesIO()
    next(images).save(
        buffer, "GIF", save_all=True, append_images=images, duration=1000 / FPS, loop=0
    )
    return buffer.getvalue()
