"""Scenes of the embedded world in the layouts of KITTI odometry with SemanticKITTI, and KITTI raw.

`kitti.py` and `kitti_raw.py` document the layouts and read them. The world's camera becomes the
left eye of a stereo pair. In KITTI raw, camera 0, the rectification and the IMU are mounted a
little askew, so that a reader that leaves one of them out is found out.
"""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from selfocc.datasets.kitti import LEARNING_ID, UNKNOWN, voxels_hit
from selfocc.datasets.kitti_raw import EARTH, rotation
from selfocc.datasets.reading import VELO_TO_VOLUME
from selfocc.datasets.synthetic import SyntheticSequence
from selfocc.files import write_file
from selfocc.pictures import write_picture
from selfocc.street.occupancy import seen_cells
from selfocc.street.sensors import REFLECTANCE

BASELINE = 0.54  # metres between the two eyes
# The first raw label of each learning id: 1 -> 10 (car), 9 -> 40 (road), ...
RAW_LABEL = np.zeros(256, np.uint16)
for _raw, _learning in reversed(LEARNING_ID.items()):
    RAW_LABEL[_learning] = _raw

DATE = "2011_09_26"
ORIGIN = np.array([49.011, 8.423, 112.8])  # latitude, longitude in degrees, altitude of frame 0
CAM0_TO_CAM2 = np.array([0.06, -0.0003, 0.0027])  # metres, as in KITTI's calibration
RECTIFY = np.deg2rad([0.4, -0.6, 0.3])  # roll, pitch, yaw of R_rect_00
IMU_TO_VELO = np.deg2rad([0.9, 0.1, -0.05]), np.array([-0.81, 0.32, -0.8])


def _scan(sequence, frame):
    """What a .bin file holds: x, y, z of the velodyne, reflectance."""
    # the inverse of a rotation
    points = sequence.lidar(frame) @ VELO_TO_VOLUME[:3, :3].astype(np.float32)
    return (
        np.concatenate([points, np.full((len(points), 1), REFLECTANCE)], 1).astype("<f4").tobytes()
    )


def _text(table):
    """A line of text for every row."""
    # 17 digits give every float64 back exactly.
    return "".join(" ".join(f"{v:.16e}" for v in row) + "\n" for row in table).encode()


def _calibration(matrices):
    """A line `name: numbers` for every matrix."""
    return b"".join(f"{name}: ".encode() + _text(m.reshape(1, -1)) for name, m in matrices.items())


# KITTI odometry


def export_kitti(sequences: list[SyntheticSequence], folder: Path):
    """Write scenes of the rig `forward` as sequences 00, 01, ... under folder/dataset.

    Raises InputError if it cannot.
    """
    for number, sequence in enumerate(sequences):
        _write_sequence(sequence, folder / "dataset", f"{number:02d}")


def _write_sequence(sequence, dataset, number):
    folder = dataset / "sequences" / number
    poses = np.stack([sequence.cameras(f)[1][0] for f in range(sequence.frames)])
    poses = np.linalg.inv(poses[0]) @ poses
    write_file(dataset / "poses" / f"{number}.txt", _text(poses[:, :3].reshape(-1, 12)))
    write_file(folder / "times.txt", _text(np.arange(sequence.frames)[:, None] / 10))
    left = np.concatenate([sequence.rig.intrinsics[0], np.zeros((3, 1))], 1)
    right = left.copy()
    right[0, 3] = -BASELINE * left[0, 0]
    velo_to_camera = np.linalg.inv(sequence.rig.camera_to_volume[0]) @ VELO_TO_VOLUME
    matrices = {"P0": left, "P1": right, "P2": left, "P3": right, "Tr": velo_to_camera[:3]}
    write_file(folder / "calib.txt", _calibration(matrices))
    for frame in tqdm(range(sequence.frames), desc=f"sequence {number}"):
        stem = sequence.frame_id(frame)
        right, _, _ = sequence.render(frame, shift=BASELINE)
        write_picture(folder / "image_2" / f"{stem}.png", sequence.image(frame, 0))
        write_picture(folder / "image_3" / f"{stem}.png", right[0])
        write_file(folder / "velodyne" / f"{stem}.bin", _scan(sequence, frame))
        if frame in sequence.labelled:
            for suffix, content in _voxel_files(sequence, frame).items():
                write_file(folder / "voxels" / f"{stem}{suffix}", content)


def _voxel_files(sequence, frame):
    """The files of a labelled frame by suffix, over velodyne x, y, z (forward, left, up)."""

    def packed(mask):
        return np.packbits(mask[:, ::-1].reshape(-1)).tobytes()

    labels, box, edge = sequence.voxels(frame), sequence.rig.box, sequence.rig.voxel
    pose, view = sequence.true_volume_to_world(frame), sequence.view(frame)
    hit = voxels_hit(sequence.lidar(frame), edge, (box[1], box[0], box[2]), labels.shape)
    return {
        ".label": RAW_LABEL[labels][:, ::-1].astype("<u2").tobytes(),
        ".invalid": packed(labels == UNKNOWN),
        ".occluded": packed(~seen_cells(pose, box, edge, [view])),
        ".bin": packed(hit),
    }


# KITTI raw


def export_kitti_raw(sequences: list[SyntheticSequence], folder: Path):
    """Write scenes of the rig `forward` as drives 0001, 0002, ... under folder/DATE, with improved
    ground truth from the exact depth under folder/data_depth_annotated, and 2-D classes for
    --labels under folder/labels. All have the calibration of the first (`rigs` 0).

    Raises InputError if it cannot.
    """
    for sequence in sequences[:1]:
        _write_calibration(sequence, folder / DATE)
    for number, sequence in enumerate(sequences, 1):
        _write_drive(sequence, folder, f"{DATE}_drive_{number:04d}_sync")


def _write_drive(sequence, folder, drive):
    split = "train" if "-train-" in sequence.name else "val"
    truth = folder / "data_depth_annotated" / split / drive / "proj_depth" / "groundtruth"
    drive = folder / DATE / drive
    oxts = _oxts(sequence)
    for frame in tqdm(range(sequence.frames), desc=drive.name):
        name = f"{frame:010d}"
        eyes = {
            "image_02": (sequence.images(frame), sequence.depth(frame), sequence.semantics(frame)),
            "image_03": sequence.render(frame, shift=BASELINE),
        }
        for camera, maps in eyes.items():
            image, depth, classes = (m[0] for m in maps)
            place = drive.relative_to(folder) / camera / "data" / f"{name}.png"
            write_picture(folder / place, image)
            write_picture(folder / "labels" / place, classes)
            metres = np.where(depth < 255, np.rint(depth * 256), 0).astype(np.uint16)
            write_picture(truth / camera / f"{name}.png", metres)
        write_file(drive / "velodyne_points" / "data" / f"{name}.bin", _scan(sequence, frame))
        write_file(drive / "oxts" / "data" / f"{name}.txt", _text(oxts[frame : frame + 1]))


def _write_calibration(sequence, folder):
    intrinsics = sequence.rig.intrinsics[0]
    matrices = {"R_rect_00": rotation(*RECTIFY)}
    for eye, shift in (("02", 0.0), ("03", -BASELINE)):
        offset = intrinsics @ (CAM0_TO_CAM2 + np.array([shift, 0, 0]))
        matrices[f"P_rect_{eye}"] = np.concatenate([intrinsics, offset[:, None]], 1)
    write_file(folder / "calib_cam_to_cam.txt", _calibration(matrices))
    velo_to_cam0 = np.linalg.inv(sequence.rig.camera_to_volume[0]) @ VELO_TO_VOLUME
    velo_to_cam0[:3, 3] -= CAM0_TO_CAM2
    velo_to_cam0[:3] = rotation(*RECTIFY).T @ velo_to_cam0[:3]  # unrectified
    for name, matrix in (("velo_to_cam", velo_to_cam0), ("imu_to_velo", _imu_to_velo())):
        mounting = {"R": matrix[:3, :3], "T": matrix[:3, 3]}
        write_file(folder / f"calib_{name}.txt", _calibration(mounting))


def _imu_to_velo():
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation(*IMU_TO_VELO[0]), IMU_TO_VELO[1]
    return matrix


def _oxts(sequence):
    """The 30 numbers of OXTS for every frame; what is no pose is 0."""
    imu_to_volume = VELO_TO_VOLUME @ _imu_to_velo()
    poses = np.stack([sequence.volume_to_world(f) @ imu_to_volume for f in range(sequence.frames)])
    offset = poses[:, :3, 3] - poses[0, :3, 3]
    rows = np.zeros((len(poses), 30))
    # the inverse of the Mercator projection at the latitude of the first frame
    scale = EARTH * np.cos(np.deg2rad(ORIGIN[0]))
    north = np.log(np.tan(np.deg2rad(90 + ORIGIN[0]) / 2)) + offset[:, 1] / scale
    rows[:, 0] = 2 * np.rad2deg(np.arctan(np.exp(north))) - 90
    rows[:, 1] = ORIGIN[1] + np.rad2deg(offset[:, 0] / scale)
    rows[:, 2] = ORIGIN[2] + offset[:, 2]
    turn = poses[:, :3, :3]
    rows[:, 3] = np.arctan2(turn[:, 2, 1], turn[:, 2, 2])
    rows[:, 4] = -np.arcsin(turn[:, 2, 0])
    rows[:, 5] = np.arctan2(turn[:, 1, 0], turn[:, 0, 0])
    return rows
