"""Scenes of the embedded world in the layout of KITTI odometry and SemanticKITTI on disk.

`datasets.kitti` documents the layout and reads it.
"""

from pathlib import Path

import imageio.v3 as iio
import numpy as np
from tqdm import tqdm

from selfocc import InputError
from selfocc.datasets.kitti import LEARNING_ID, UNKNOWN
from selfocc.datasets.kitti_files import VELO_TO_VOLUME
from selfocc.datasets.synthetic import SyntheticSequence
from selfocc.files import write_file
from selfocc.street.occupancy import seen_cells

BASELINE = 0.54  # metres between the two eyes
REFLECTANCE = 0.25  # of every LiDAR return; the world does not model it
# The first raw label of each learning id: 1 -> 10 (car), 9 -> 40 (road), ...
RAW_LABEL = np.zeros(256, np.uint16)
for _raw, _learning in reversed(LEARNING_ID.items()):
    RAW_LABEL[_learning] = _raw


def export_kitti(sequences: list[SyntheticSequence], folder: Path, progress: bool = True):
    """Write sequences 00, 01, ... under folder/dataset. Raises InputError if it cannot."""
    for number, sequence in enumerate(sequences):
        if len(sequence.rig.intrinsics) != 1:
            raise InputError(f"{sequence.name}: KITTI has one camera; export the rig `forward`")
        _export_sequence(sequence, folder / "dataset", f"{number:02d}", progress)


def _export_sequence(sequence, dataset, number, progress):
    folder = dataset / "sequences" / number
    poses = np.stack([sequence.cameras(f)[1][0] for f in range(sequence.frames)])
    poses = np.linalg.inv(poses[0]) @ poses
    write_file(dataset / "poses" / f"{number}.txt", matrix_rows(poses[:, :3].reshape(-1, 12)))
    write_file(folder / "times.txt", matrix_rows(np.arange(sequence.frames)[:, None] / 10))
    write_file(folder / "calib.txt", _calibration(sequence))
    frames = tqdm(range(sequence.frames), desc=f"sequence {number}", disable=not progress)
    for frame in frames:
        stem = sequence.frame_id(frame)
        left, right = sequence.images(frame)[0], sequence.render(frame, shift=BASELINE)[0][0]
        write_file(folder / "image_2" / f"{stem}.png", png(left))
        write_file(folder / "image_3" / f"{stem}.png", png(right))
        scan = sequence.lidar(frame) @ VELO_TO_VOLUME[:3, :3].astype(
            np.float32
        )  # inverse of a rotation
        scan = np.concatenate([scan, np.full((len(scan), 1), REFLECTANCE)], 1).astype("<f4")
        write_file(folder / "velodyne" / f"{stem}.bin", scan.tobytes())
        if frame in sequence.labelled:
            for suffix, content in _voxel_files(sequence, frame, scan[:, :3]).items():
                write_file(folder / "voxels" / f"{stem}{suffix}", content)


def _voxel_files(sequence, frame, scan):
    """The files of a labelled frame by suffix, over velodyne x, y, z (forward, left, up)."""

    def packed(mask):
        return np.packbits(mask[:, ::-1].reshape(-1)).tobytes()

    labels = sequence.voxels(frame)
    edge, (ny, nx, nz) = sequence.rig.voxel, labels.shape
    low = np.array([sequence.rig.box[1], sequence.rig.box[0], sequence.rig.box[2]])
    cell = np.floor((scan * [1, -1, 1] - low) / edge).astype(int)  # (y, x, z) of the volume
    cell = cell[((cell >= 0) & (cell < [ny, nx, nz])).all(1)]
    hit = np.zeros(labels.shape, bool)
    hit[tuple(cell.T)] = True
    pose, box = sequence.true_volume_to_world(frame), sequence.rig.box
    occluded = ~seen_cells(pose, box, edge, [sequence.view(frame)])
    return {
        ".label": RAW_LABEL[labels][:, ::-1].astype("<u2").tobytes(),
        ".invalid": packed(labels == UNKNOWN),
        ".occluded": packed(occluded),
        ".bin": packed(hit),
    }


def _calibration(sequence):
    left = np.concatenate([sequence.rig.intrinsics[0], np.zeros((3, 1))], 1)
    right = left.copy()
    right[0, 3] = -BASELINE * left[0, 0]
    velo_to_camera = np.linalg.inv(sequence.rig.camera_to_volume[0]) @ VELO_TO_VOLUME
    lines = {"P0": left, "P1": right, "P2": left, "P3": right, "Tr": velo_to_camera[:3]}
    return b"".join(
        f"{name}: ".encode() + matrix_rows(m.reshape(1, -1)) for name, m in lines.items()
    )


def matrix_rows(table: np.ndarray) -> bytes:
    """A line of text for every row."""
    # 17 digits give every float64 back exactly.
    return "".join(" ".join(f"{v:.16e}" for v in row) + "\n" for row in table).encode()


def png(image: np.ndarray) -> bytes:
    return iio.imwrite("<bytes>", image, extension=".png")
