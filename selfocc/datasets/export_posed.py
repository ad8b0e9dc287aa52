"""Any sequence as footage for --dataset posed: nerfstudio, COLMAP (text, binary), or as of KITTI.

SEQUENCE/images[/CAMERA]/000000.png
        /depth[/CAMERA]/000000.npy     nerfstudio alone: float32, in the units of the poses
        /rig.json                      where the first camera is in the volume
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from selfocc import InputError
from selfocc.batch import Sequence
from selfocc.datasets.captures import CAMERAS, IMAGES, MODELS, OPENGL, POINTS
from selfocc.datasets.export_nuscenes import quaternion
from selfocc.datasets.lens import Lens
from selfocc.datasets.video import scan_maps
from selfocc.files import write_file
from selfocc.pictures import write_picture

KINDS = ("nerfstudio", "colmap", "colmap-text", "kitti")
# what is exported of the embedded world as if seen through such a lens
LENSES = {
    "brown": ((-0.22, 0.05, 0.0, 0.0), (1.5e-3, -1e-3)),
    "fisheye": ((-0.03, 0.004, -0.002, 0.0), (0.0, 0.0)),
}
POINTS_A_SHOT = 200  # of COLMAP's sparse points
WIDER, FINER = 1.8, 2  # the pinhole image of which a distorted one is made


def export_posed(
    sequences: list[Sequence],
    folder: Path,
    kind: str = "nerfstudio",
    lens: str = "pinhole",
    world: np.ndarray | None = None,
) -> None:
    """Write each sequence to a folder of its name.

    lens: of LENSES, for the embedded world; world [4, 4]: a similarity that is applied to the
    poses, without a rig.json that would undo it. Raises InputError if it cannot.
    """
    for sequence in sequences:
        at, names = folder / sequence.name.replace("/", "_"), list(sequence.camera_names)
        if kind == "kitti" and len(names) > 1:
            raise InputError("a folder as of KITTI has one camera; choose another format")
        shots = list(tqdm(_shots(sequence, at, lens, world), sequence.name, sequence.frames))
        if world is None:
            mount = np.linalg.inv(sequence.volume_to_world(0)) @ sequence.cameras(0)[1][0]
            cameras = {name: {} for name in names}
            cameras[names[0]]["camera_to_volume"] = mount.tolist()
            frames = [{n: s[0] for n, s in zip(names, frame, strict=True)} for frame in shots]
            write_file(at / "rig.json", json.dumps({"cameras": cameras, "frames": frames}).encode())
        flat = [shot for frame in shots for shot in frame]
        {"nerfstudio": _nerfstudio, "kitti": _kitti}.get(kind, _colmap)(at, flat, kind)


def _shots(sequence: Sequence, folder: Path, lens: str, world) -> Iterator[list[tuple]]:
    """Of every frame and camera: name of the image, lens, pose [4, 4], depth [h, w] or None."""
    scale = 1.0 if world is None else np.linalg.det(world[:3, :3]) ** (1 / 3)
    for frame in range(sequence.frames):
        intrinsics, poses = sequence.cameras(frame)
        images, depths, points = (
            read(frame) for read in (sequence.images, sequence.depth, sequence.lidar)
        )
        if depths is None and points is not None:
            depths = scan_maps(sequence, frame, points, intrinsics, [i.shape[:2] for i in images])
        lenses = [
            Lens(image.shape[:2], *k[[0, 1, 0, 1], [0, 1, 2, 2]].tolist())
            for image, k in zip(images, intrinsics, strict=True)
        ]
        if lens != "pinhole":
            images, depths, lenses = _distorted(sequence, frame, lens, lenses)
        shots = []
        for n, (image, pose) in enumerate(zip(images, poses, strict=True)):
            place = f"{list(sequence.camera_names)[n]}/{frame:06d}.png"
            place = place if len(images) > 1 else f"{frame:06d}.png"
            write_picture(folder / "images" / place, image)
            if world is not None:
                pose = world @ pose
                pose[:3, :3] /= scale
            depth = None if depths is None else np.float32(scale) * depths[n]
            shots.append((f"images/{place}", lenses[n], pose, depth))
        yield shots


def _distorted(sequence, frame: int, kind: str, lenses: list[Lens]):
    """Images and depth of the embedded world through lenses of these sizes and focal lengths.

    By Newton's method each pixel finds its ray, which reads a wider and finer pinhole image.
    """
    (height, width), (radial, tangential) = lenses[0].size, LENSES[kind]
    lenses = [replace(lens, kind=kind, radial=radial, tangential=tangential) for lens in lenses]
    fine = FINER * WIDER
    size = round(height * fine), round(width * fine)
    intrinsics = sequence.rig.intrinsics.copy()
    intrinsics[:, [0, 1], [0, 1]] *= FINER
    intrinsics[:, :2, 2] = np.array(size[::-1]) / 2 - 0.5
    wide = sequence.render(frame, intrinsics=intrinsics, size=size)[:2]
    images, depths = [], []
    for lens, image, depth, k in zip(lenses, *wide, intrinsics, strict=True):
        x, y = rays(lens)
        u, v = x * k[0, 0] + k[0, 2], y * k[1, 1] + k[1, 2]
        depths.append(depth[np.rint(v).astype(int), np.rint(u).astype(int)])
        # pixel 0 of the smoothed image is at 0.5
        grid = np.stack([2 * u / (size[1] - 1) - 1, 2 * v / (size[0] - 1) - 1], -1)
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        grid = torch.from_numpy(grid.astype(np.float32))[None]
        pixels = F.grid_sample(F.avg_pool2d(pixels, FINER, 1), grid, align_corners=False)
        images.append(pixels[0].permute(1, 2, 0).round().byte().numpy())
    return images, depths, lenses


def rays(lens: Lens) -> tuple[np.ndarray, np.ndarray]:
    """x, y [h, w] of the rays (x, y, 1) that the pixels of a lens see."""
    v, u = np.mgrid[: lens.size[0], : lens.size[1]].astype(np.float64)
    x, y = (u - lens.cx) / lens.fx, (v - lens.cy) / lens.fy
    step = 1e-6
    for _ in range(30):
        (a, b), (ax, bx), (ay, by) = (
            lens.project(x + dx, y + dy) for dx, dy in ((0, 0), (step, 0), (0, step))
        )
        ax, bx, ay, by = ((p - q) / step for p, q in ((ax, a), (bx, b), (ay, a), (by, b)))
        det = ax * by - ay * bx
        x, y = x - ((a - u) * by - (b - v) * ay) / det, y - ((b - v) * ax - (a - u) * bx) / det
    return x, y


def _nerfstudio(folder: Path, shots: list[tuple], _: str) -> None:
    frames = []
    for name, lens, pose, depth in shots:
        model = {"pinhole": "PINHOLE", "brown": "OPENCV", "fisheye": "OPENCV_FISHEYE"}[lens.kind]
        frame = dict(
            file_path=name, camera_model=model, transform_matrix=(pose @ OPENGL).tolist(),
            fl_x=lens.fx, fl_y=lens.fy, cx=lens.cx + 0.5, cy=lens.cy + 0.5,
            w=lens.size[1], h=lens.size[0],
        )  # fmt: skip
        if lens.kind != "pinhole":
            numbers = (*lens.radial, *lens.tangential)
            frame |= dict(zip(("k1", "k2", "k3", "k4", "p1", "p2"), numbers, strict=True))
        if depth is not None:
            path = Path(name.replace("images", "depth", 1)).with_suffix(".npy")
            frame["depth_file_path"] = path.as_posix()
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            np.save(folder / path, depth)
        frames.append(frame)
    whole = {"depth_unit_scale_factor": 1.0, "frames": frames}
    write_file(folder / "transforms.json", json.dumps(whole).encode())


def _colmap(folder: Path, shots: list[tuple], kind: str) -> None:
    """With sparse points where the depth is known."""
    lenses = {lens: number for number, lens in enumerate(dict.fromkeys(s[1] for s in shots), 1)}
    cameras, images, points = [], [], []
    for lens, number in lenses.items():
        model = {"pinhole": 1, "brown": 4, "fisheye": 5}[lens.kind]
        values = dict(zip(("k1", "k2", "k3", "k4"), lens.radial, strict=True))
        values |= dict(zip(("p1", "p2"), lens.tangential, strict=True))
        values |= dict(fx=lens.fx, fy=lens.fy, cx=lens.cx + 0.5, cy=lens.cy + 0.5)
        numbers = [values[name] for name in MODELS[model][1].split()]
        cameras.append((number, model, lens.size[1], lens.size[0], numbers))
    for number, (name, lens, pose, depth) in enumerate(shots, 1):
        back = np.linalg.inv(pose)
        matches = []
        if depth is not None:
            rng = np.random.default_rng(number)
            v, u = np.nonzero(depth > 0)
            chosen = rng.permutation(len(u))[:POINTS_A_SHOT]
            rays = np.stack([u, v, np.ones_like(u)], 1)[chosen] @ np.linalg.inv(lens.intrinsics).T
            places = rays * depth[v, u][chosen, None] @ pose[:3, :3].T + pose[:3, 3]
            for k, place in zip(chosen, places, strict=True):
                matches.append((u[k] + 0.5, v[k] + 0.5, len(points) + 1))
                points.append((place, number, len(matches) - 1))
        numbers = [*quaternion(back[:3, :3]), *back[:3, 3]]
        images.append((number, numbers, lenses[lens], name.removeprefix("images/"), matches))
    write = _colmap_text if kind == "colmap-text" else _colmap_binary
    for table, content in zip(
        (CAMERAS, IMAGES, POINTS), write(cameras, images, points), strict=True
    ):
        suffix = ".txt" if kind == "colmap-text" else ".bin"
        write_file(folder / "sparse" / "0" / f"{table}{suffix}", content)


def _colmap_text(cameras, images, points) -> Iterator[bytes]:
    def lines(rows) -> bytes:
        return "".join(f"{row}\n" for row in rows).encode()

    def words(values) -> str:
        return " ".join(repr(float(v)) for v in values)

    yield lines(f"{n} {MODELS[m][0]} {w} {h} {words(v)}" for n, m, w, h, v in cameras)
    yield lines(
        f"{n} {words(pose)} {camera} {name}\n" + " ".join(f"{u} {v} {p}" for u, v, p in matches)
        for n, pose, camera, name, matches in images
    )
    yield lines(f"{n} {words(x)} 0 0 0 0 {i} {k}" for n, (x, i, k) in enumerate(points, 1))


def _colmap_binary(cameras, images, points) -> Iterator[bytes]:
    def table(rows) -> bytes:
        return struct.pack("<Q", len(rows)) + b"".join(rows)

    yield table([struct.pack(f"<iiQQ{len(v)}d", n, m, w, h, *v) for n, m, w, h, v in cameras])
    yield table([
        struct.pack("<I7dI", n, *pose, camera) + name.encode() + b"\0"
        + struct.pack("<Q", len(matches)) + b"".join(struct.pack("<ddq", *m) for m in matches)
        for n, pose, camera, name, matches in images
    ])  # fmt: skip
    yield table([
        struct.pack("<Q3d3BdQii", n, *x, 0, 0, 0, 0.0, 1, i, k)
        for n, (x, i, k) in enumerate(points, 1)
    ])  # fmt: skip


def _kitti(folder: Path, shots: list[tuple], _: str) -> None:
    if len({lens for _, lens, _, _ in shots}) > 1 or shots[0][1].kind != "pinhole":
        raise InputError("a folder as of KITTI has one pinhole camera; choose another format")
    lens = shots[0][1]

    def line(values) -> str:
        return " ".join(repr(float(v)) for v in values) + "\n"

    poses = "".join(line(pose[:3].ravel()) for _, _, pose, _ in shots)
    write_file(folder / "poses.txt", poses.encode())
    write_file(folder / "intrinsics.txt", line((lens.fx, lens.fy, lens.cx, lens.cy)).encode())
