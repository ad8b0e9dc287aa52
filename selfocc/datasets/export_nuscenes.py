"""Scenes of the embedded world in the layout of nuScenes with labels of Occ3D and OpenOccupancy.

    v1.0-trainval/*.json                              the official tables; no annotated boxes
    samples, sweeps/CHANNEL/LOG__CHANNEL__MICROSECONDS.png|pcd.bin
    gts/scene-XXXX/SAMPLE_TOKEN/labels.npz            semantics, mask_lidar, mask_camera
    nuScenes-Occupancy/scene_SCENE_TOKEN/occupancy/LIDAR_TOP_TOKEN.npy
    labels/samples, sweeps/CHANNEL/*.png              2-D classes, for --labels DIR/labels

Frames with voxels become key frames, those between them sweeps; frames after the last key frame are
left out, as nuScenes has none. Images are PNGs, which lose nothing. `semantics` is [x, y, z] with
the classes of Occ3D, 17 is free. `mask_camera` is what the world's labels know, so that scores
are those of the world itself; `mask_lidar` is what the LiDAR of the frame alone saw.
nuScenes-Occupancy says the same in smaller voxels of the LiDAR's frame, except that it has no mask:
what is not known is free there.
"""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from selfocc import InputError
from selfocc.datasets.nuscenes_tables import CHANNELS
from selfocc.datasets.nuscenes_voxels import OpenOccupancy
from selfocc.datasets.synthetic import SyntheticSequence
from selfocc.files import write_file
from selfocc.labels import OCC3D, TABLES
from selfocc.pictures import write_picture
from selfocc.street.occupancy import UNKNOWN, View, seen_cells
from selfocc.street.rigs import Rig
from selfocc.street.sensors import BEAMS, ELEVATIONS, REFLECTANCE

*CAMERAS, LIDAR = CHANNELS
PERIOD = 100_000  # microseconds between frames
START = 1_600_000_000_000_000  # microseconds, of the first frame of the first scene
EGO_TO_GLOBAL = np.array([600.0, 1600.0, 0.0])  # metres, where nuScenes' maps have their streets
# scenes of the official splits, whose names the exported ones take
NUMBERS = {
    "train": (1, 2, *range(4, 12), *range(19, 35)),
    "val": (3, *range(12, 19), 35, 36, 38, 39, *range(92, 100)),
}
FREE = 17
# class of Occ3D by the id of the embedded world; unknown counts as free, the mask leaves it out
OCC3D_CLASS = np.full(256, FREE, np.uint8)
OCC3D_CLASS[: len(TABLES["semantickitti20"])] = [
    OCC3D.index(name) or FREE for _, name, _ in TABLES["semantickitti20"]
]
# x right, y forward, z up of nuScenes' LiDAR -> x forward, y left, z up of the ego vehicle
LIDAR_TO_EGO = np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]])


def export_nuscenes(sequences: list[SyntheticSequence], folder: Path):
    """Write scenes of the rig `surround`, of split train and val, under names of official splits.

    Raises InputError for too many scenes or another split, or if it cannot write.
    """
    tables = {name: [] for name in (
        "attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map",
        "sample", "sample_annotation", "sample_data", "scene", "sensor", "visibility",
    )}  # fmt: skip
    for channel in CHANNELS:
        modality = "lidar" if channel == LIDAR else "camera"
        row = {"token": _token(channel), "channel": channel, "modality": modality}
        tables["sensor"].append(row)
    numbers = {split: iter(scenes) for split, scenes in NUMBERS.items()}
    names = [_name(sequence, numbers) for sequence in sequences]
    for number, (sequence, name) in enumerate(zip(sequences, names, strict=True)):
        _Scene(sequence, name, START + number * 1_000_000_000, folder, tables).write()
    for name, rows in tables.items():
        write_file(folder / "v1.0-trainval" / f"{name}.json", json.dumps(rows, indent=0).encode())


def _name(sequence, numbers):
    number = next(numbers.get(sequence.name.split("-")[1], iter(())), None)
    if number is None:
        raise InputError(
            f"{sequence.name}: nuScenes has splits train and val, of which up to "
            f"{len(NUMBERS['train'])} and {len(NUMBERS['val'])} scenes are written"
        )
    return f"scene-{number:04d}"


class _Scene:
    """Rows and files of one scene."""

    def __init__(self, sequence, name, start, folder, tables):
        self.sequence, self.name, self.start = sequence, name, start
        self.folder, self.tables = folder, tables
        self.keys = sequence.labelled
        self.log = f"n000-{name}"

    def token(self, *what):
        return _token(self.name, *what)

    def row(self, table, *what, **columns):
        """Add a row whose token is that of `what`; returns the token."""
        token = self.token(*what)
        self.tables[table].append({"token": token, **columns})
        return token

    def write(self):
        samples = [self.token("sample", frame) for frame in self.keys]
        log = self.row(
            "log", "log", logfile=self.log, vehicle="n000", date_captured="2026-01-01",
            location="embedded-street",
        )  # fmt: skip
        scene = self.row(
            "scene", "scene", log_token=log, nbr_samples=len(samples),
            first_sample_token=samples[0], last_sample_token=samples[-1], name=self.name,
            description=self.sequence.name,
        )  # fmt: skip
        self._mount_sensors()
        around = ["", *samples, ""]
        for i, frame in enumerate(self.keys):
            self.row(
                "sample", "sample", frame, timestamp=self.start + frame * PERIOD, prev=around[i],
                next=around[i + 2], scene_token=scene,
            )  # fmt: skip
            self._write_labels(frame, samples[i])
        for frame in tqdm(range(self.keys[-1] + 1), desc=self.name):
            sample = samples[np.searchsorted(self.keys, frame)]
            images, classes = self.sequence.images(frame), self.sequence.semantics(frame)
            for camera, image, ids in zip(CAMERAS, images, classes, strict=True):
                place = self._add_data(frame, sample, camera, image.shape[:2])
                write_picture(self.folder / place, image)
                write_picture(self.folder / "labels" / place, ids)
            place = self._add_data(frame, sample, LIDAR, (0, 0))
            write_file(self.folder / place, self._scan(frame))

    def _mount_sensors(self):
        rig = self.sequence.rig
        lidar_to_ego = rig.volume_to_ego @ self.sequence.lidar_to_volume()
        lidar_to_ego[:3, :3] = LIDAR_TO_EGO
        to_ego = [*(rig.volume_to_ego @ rig.camera_to_volume), lidar_to_ego]
        intrinsics = [*rig.intrinsics.tolist(), []]
        for channel, matrix, numbers in zip(CHANNELS, to_ego, intrinsics, strict=True):
            self.row(
                "calibrated_sensor", "mounted", channel, sensor_token=_token(channel),
                translation=matrix[:3, 3].tolist(), rotation=quaternion(matrix[:3, :3]),
                camera_intrinsic=numbers,
            )  # fmt: skip

    def _add_data(self, frame, sample, channel, size) -> str:
        """The rows of a file; returns its place below the data folder."""
        key = frame in self.keys
        stamp = self.start + frame * PERIOD
        kind, suffix = ("pcd", "pcd.bin") if channel == LIDAR else ("png", "png")
        place = (
            f"{'samples' if key else 'sweeps'}/{channel}/{self.log}__{channel}__{stamp}.{suffix}"
        )
        pose = self.sequence.volume_to_world(frame) @ np.linalg.inv(self.sequence.rig.volume_to_ego)
        token = self.row(
            "ego_pose", channel, frame, timestamp=stamp, rotation=quaternion(pose[:3, :3]),
            translation=(pose[:3, 3] + EGO_TO_GLOBAL).tolist(),
        )  # fmt: skip
        self.row(
            "sample_data", channel, frame, sample_token=sample, ego_pose_token=token,
            calibrated_sensor_token=self.token("mounted", channel), timestamp=stamp,
            fileformat=kind, is_key_frame=key, height=size[0], width=size[1], filename=place,
            prev=self.token(channel, frame - 1) if frame else "",
            next=self.token(channel, frame + 1) if frame < self.keys[-1] else "",
        )  # fmt: skip
        return place

    def _scan(self, frame):
        """Float32 x, y, z, intensity, ring of every point, in the frame of the LiDAR."""
        rig, mounted = self.sequence.rig, self.sequence.lidar_to_volume()[:3, 3]
        points = self.sequence.lidar(frame) - mounted.astype(np.float32)
        points = points @ rig.volume_to_ego[:3, :3].T @ LIDAR_TO_EGO
        distance = np.linalg.norm(points, axis=1)
        elevation = np.arcsin(points[:, 2] / distance)
        share = (ELEVATIONS[0] - elevation) / (ELEVATIONS[0] - ELEVATIONS[-1])
        ring = np.rint(share * (BEAMS - 1))
        intensity = np.full(len(points), REFLECTANCE * 255)
        return np.concatenate([points, np.stack([intensity, ring], 1)], 1).astype("<f4").tobytes()

    def _write_labels(self, frame, sample):
        labels = self.sequence.voxels(frame)
        pose, rig = self.sequence.true_volume_to_world(frame), self.sequence.rig
        view = self.sequence.view(frame)
        alone = View(view.lidar_to_world, view.ranges, [])
        arrays = {
            "semantics": OCC3D_CLASS[labels],
            "mask_lidar": seen_cells(pose, rig.box, rig.voxel, [alone]).astype(np.uint8),
            "mask_camera": (labels != UNKNOWN).astype(np.uint8),
        }
        file = io.BytesIO()
        np.savez_compressed(file, **{k: a.transpose(1, 0, 2) for k, a in arrays.items()})
        write_file(self.folder / "gts" / self.name / sample / "labels.npz", file.getvalue())
        lidar_height = (rig.volume_to_ego @ self.sequence.lidar_to_volume())[2, 3]
        file = io.BytesIO()
        np.save(file, openoccupancy_rows(arrays["semantics"], rig, lidar_height))
        folder = self.folder / "nuScenes-Occupancy" / f"scene_{self.token('scene')}" / "occupancy"
        write_file(folder / f"{self.token(LIDAR, frame)}.npy", file.getvalue())


def openoccupancy_rows(semantics: np.ndarray, rig: Rig, lidar_height: float) -> np.ndarray:
    """The occupied voxels of nuScenes-Occupancy: z, y, x and class, int16 [M, 4].

    A voxel is what is at its centre in semantics [ny, nx, nz], classes of Occ3D over (y, x, z) of
    the box of `rig`; beyond that it is free. lidar_height: metres above the ego frame.
    """
    ny, nx, nz = OpenOccupancy.grid
    lo, hi = np.array(OpenOccupancy.box).reshape(2, 3)
    x, y, z = (
        low + (np.arange(n) + 0.5) * (high - low) / n
        for low, high, n in zip(lo, hi, (nx, ny, nz), strict=True)
    )
    in_ego = ((1, -x), (0, y), (2, z + lidar_height))  # axis of the ego frame, place along it
    cells = [np.floor((metres - rig.box[a]) / rig.voxel).astype(int) for a, metres in in_ego]
    padded = np.pad(semantics, 1, constant_values=FREE)
    cells = [np.clip(c + 1, 0, n - 1) for c, n in zip(cells, padded.shape, strict=True)]
    voxels = padded[np.ix_(*cells)].transpose(2, 1, 0)
    places = np.argwhere(voxels != FREE)
    return np.column_stack([places, voxels[tuple(places.T)]]).astype(np.int16)


def _token(*what):
    return hashlib.md5("/".join(map(str, what)).encode()).hexdigest()


def quaternion(rotation: np.ndarray) -> list[float]:
    """w, x, y, z of a rotation [3, 3], by Bar-Itzhack's eigenvector."""
    r = rotation
    k = np.array([
        [r[0, 0] - r[1, 1] - r[2, 2], 0, 0, 0],
        [r[0, 1] + r[1, 0], r[1, 1] - r[0, 0] - r[2, 2], 0, 0],
        [r[0, 2] + r[2, 0], r[1, 2] + r[2, 1], r[2, 2] - r[0, 0] - r[1, 1], 0],
        [r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1], np.trace(r)],
    ])  # fmt: skip
    x, y, z, w = np.linalg.eigh(k)[1][:, -1]  # reads the lower triangle
    return [float(v * (-1 if w < 0 else 1)) for v in (w, x, y, z)]
