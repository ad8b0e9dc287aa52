"""What shows at a glance whether poses, calibration, scans and images fit; for check.py."""

import numpy as np
from PIL import Image, ImageDraw

from selfocc import pictures
from selfocc.batch import Sequence
from selfocc.datasets.epipolar import FARTHEST, NEAREST, find_matches, moved, project
from selfocc.datasets.video import scan_maps

SHOWN = 16  # corners that are drawn
WIDTH = 640  # pixels that images are drawn wide at least
REACH, GRID, STEP = 30, 5, 0.25  # metres that the grid on the ground reaches, of it, of a line


def overlay(sequence: Sequence, frame: int) -> list[np.ndarray] | None:
    """Images [N] of [h, w, 3] with LiDAR points or depth in colour, as DEPTH_TICKS; or None."""
    points, depth = sequence.lidar(frame), sequence.depth(frame)
    if points is None and depth is None:
        return None
    images = sequence.images(frame)
    if points is not None:
        sizes = [image.shape[:2] for image in images]
        depth = scan_maps(sequence, frame, points, sequence.cameras(frame)[0], sizes)
    shown = [pictures.spread(pictures.inverse_depth(z)) for z in depth]
    return [
        np.where(near[..., None] > 0, pictures.turbo(near), image)
        for near, image in zip(shown, images, strict=True)
    ]


def draw_ground(sequence: Sequence, frame: int, ground: float) -> list[np.ndarray]:
    """Images [N] of [h, w, 3] with a grid on the ground, at z = `ground` of the volume, and the
    way that the rig takes along it, in red.

    They show whether scale, height and what is up are right.
    """
    intrinsics, poses = sequence.cameras(frame)
    volume_to_world = sequence.volume_to_world(frame)
    ends, along = np.arange(-REACH, REACH + 1, GRID), np.arange(-REACH, REACH, STEP)
    lines = [np.stack(np.broadcast_arrays(x, along), 1) for x in ends]
    lines += [line[:, ::-1] for line in lines]
    way = poses[0, :3, 3] + sequence.positions[frame:] - sequence.positions[frame]
    way = moved(way, np.linalg.inv(volume_to_world))[:, :2]
    drawings = []
    for image, k, pose in zip(sequence.images(frame), intrinsics, poses, strict=True):
        drawn, scale = _enlarged(image)
        draw = ImageDraw.Draw(drawn)
        for line, color in [*((line, "deepskyblue") for line in lines), (way, "red")]:
            places = moved(np.c_[line, np.full(len(line), ground)], volume_to_world)
            pixels = scale * (project(places, k, pose) + 0.5)
            for ends in np.concatenate([pixels[:-1], pixels[1:]], 1):
                if np.isfinite(ends).all():
                    draw.line(ends.tolist(), color, 1 + 2 * (color == "red"))
        drawings.append(np.asarray(drawn))
    return drawings


def _enlarged(image: np.ndarray) -> tuple[Image.Image, int]:
    """By a whole number, to be WIDTH wide at least; and that number."""
    scale = max(1, -(-WIDTH // image.shape[1]))
    return Image.fromarray(pictures.scaled(image, scale * image.shape[1])), scale


def side_by_side(
    maps: list[np.ndarray], sequence: Sequence, frame: int, what: str, ticks: dict | None = None
) -> np.ndarray:
    """What was drawn on the images of a frame as one picture with names and a legend."""
    camera_to_volume = np.linalg.inv(sequence.volume_to_world(frame)) @ sequence.cameras(frame)[1]
    rows = pictures.rig_rows(camera_to_volume)
    columns = max(len(row) for row in rows)
    width = columns * (max(p.shape[1] for p in maps) + pictures.GAP) - pictures.GAP
    size, names = pictures.text_size(width), list(sequence.camera_names)
    whole = pictures.rig(maps, rows, names, width, size)
    text = f"{what} of {sequence.name} {sequence.frame_id(frame)}"
    return pictures.caption(whole, text, size, ticks)


def draw_matches(sequence: Sequence, frame: int, other: int) -> np.ndarray | None:
    """Corners of the first camera's image and, below it, their epipolar lines in another frame and
    where they are found; None without corners."""
    matches = find_matches(sequence, frame, other)[0]
    if not len(matches.corners):
        return None
    images, (scale, _) = zip(
        *(_enlarged(sequence.image(f, 0)) for f in (frame, other)), strict=True
    )
    here, there = map(ImageDraw.Draw, images)
    size = pictures.text_size(images[0].width)
    corners, lines, places = (scale * (pixels.numpy() + 0.5) for pixels in matches[:3])

    def dot(draw, place):
        draw.ellipse([*(place - size / 3), *(place + size / 3)], fill=color, outline="white")

    shown = np.unique(np.linspace(0, len(corners) - 1, SHOWN).round().astype(int))
    for p, share in zip(shown, np.linspace(0.1, 0.95, len(shown)), strict=True):
        color = tuple(pictures.turbo(share).tolist())
        dot(here, corners[p])
        there.line(lines[p][~np.isnan(lines[p, :, 0])].ravel().tolist(), color, max(2, size // 8))
        if matches.found[p]:
            dot(there, places[p])
    said = (
        f"corners of {sequence.name} {sequence.frame_id(frame)}",
        f"in {sequence.frame_id(other)}: where poses put each, {NEAREST:g} to {FARTHEST:g} m away "
        "(line), and what looks like it (dot)",
    )
    captioned = zip(map(np.asarray, images), said, strict=True)
    return pictures.tile([[pictures.caption(image, text, size)] for image, text in captioned])
