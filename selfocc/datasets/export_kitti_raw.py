"""Scenes of the embedded world in the layout of KITTI raw, which `datasets.kitti_raw` documents.

The world's camera becomes image_02; image_03 is rendered BASELINE metres to its right. Camera 0,
the rectification and the IMU are mounted a little askew, so that a reader that leaves one of them
out is found out.
"""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from selfocc import InputError
from selfocc.datasets.export_kitti import BASELINE, REFLECTANCE, matrix_rows, png
from selfocc.datasets.kitti_drive import EARTH
from selfocc.datasets.kitti_files import VELO_TO_VOLUME
from selfocc.datasets.synthetic import SyntheticSequence
from selfocc.files import write_file

DATE = "2011_09_26"
ORIGIN = np.array([49.011, 8.423, 112.8])  # latitude, longitude in degrees, altitude of frame 0
CAM0_TO_CAM2 = np.array([0.06, -0.0003, 0.0027])  # metres, as in KITTI's calibration
RECTIFY = np.deg2rad([0.4, -0.6, 0.3])  # roll, pitch, yaw of R_rect_00
IMU_TO_VELO = np.deg2rad([0.9, 0.1, -0.05]), np.array([-0.81, 0.32, -0.8])


def export_kitti_raw(sequences: list[SyntheticSequence], folder: Path, progress: bool = True):
    """Write drives 0001, 0002, ... under folder/DATE, with improved ground truth from the exact
    depth under folder/data_depth_annotated, and 2-D classes for --labels under folder/labels.

    Raises InputError if it cannot.
    """
    for number, sequence in enumerate(sequences, 1):
        if len(sequence.rig.intrinsics) != 1:
            raise InputError(f"{sequence.name}: KITTI has one camera; export the rig `forward`")
        if number == 1:
            _write_calibration(sequence, folder / DATE)
        _write_drive(sequence, folder, f"{DATE}_drive_{number:04d}_sync", progress)


def _write_drive(sequence, folder, drive, progress):
    split = "train" if "-train-" in sequence.name else "val"
    truth = folder / "data_depth_annotated" / split / drive / "proj_depth" / "groundtruth"
    drive = folder / DATE / drive
    oxts = _oxts(sequence)
    for frame in tqdm(range(sequence.frames), desc=drive.name, disable=not progress):
        name = f"{frame:010d}"
        eyes = {
            "image_02": (sequence.images(frame), sequence.depth(frame), sequence.semantics(frame)),
            "image_03": sequence.render(frame, shift=BASELINE),
        }
        for camera, maps in eyes.items():
            image, depth, classes = (m[0] for m in maps)
            place = drive.relative_to(folder) / camera / "data" / f"{name}.png"
            write_file(folder / place, png(image))
            write_file(folder / "labels" / place, png(classes))
            metres = np.where(depth < 255, np.rint(depth * 256), 0).astype(np.uint16)
            write_file(truth / camera / f"{name}.png", png(metres))
        scan = sequence.lidar(frame) @ VELO_TO_VOLUME[:3, :3].astype(np.float32)
        scan = np.concatenate([scan, np.full((len(scan), 1), REFLECTANCE)], 1).astype("<f4")
        write_file(drive / "velodyne_points" / "data" / f"{name}.bin", scan.tobytes())
        write_file(drive / "oxts" / "data" / f"{name}.txt", matrix_rows(oxts[frame : frame + 1]))


def _write_calibration(sequence, folder):
    intrinsics = sequence.rig.intrinsics[0]
    lines = {"R_rect_00": _rotation(RECTIFY)}
    for eye, shift in (("02", 0.0), ("03", -BASELINE)):
        offset = intrinsics @ (CAM0_TO_CAM2 + np.array([shift, 0, 0]))
        lines[f"P_rect_{eye}"] = np.concatenate([intrinsics, offset[:, None]], 1)
    write_file(folder / "calib_cam_to_cam.txt", _lines(lines))
    unrectified = _velo_to_cam0(sequence)
    unrectified[:3] = _rotation(RECTIFY).T @ unrectified[:3]
    write_file(folder / "calib_velo_to_cam.txt", _mounting(unrectified))
    write_file(folder / "calib_imu_to_velo.txt", _mounting(_imu_to_velo()))


def _velo_to_cam0(sequence):
    """The velodyne to rectified camera 0."""
    matrix = np.linalg.inv(sequence.rig.camera_to_volume[0]) @ VELO_TO_VOLUME
    matrix[:3, 3] -= CAM0_TO_CAM2
    return matrix


def _imu_to_velo():
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = _rotation(IMU_TO_VELO[0]), IMU_TO_VELO[1]
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


def _rotation(angles):
    """Rz(yaw) Ry(pitch) Rx(roll) of [roll, pitch, yaw] in radians."""
    (cr, cp, cy), (sr, sp, sy) = np.cos(angles), np.sin(angles)
    x = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    y = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    return z @ y @ x


def _mounting(matrix):
    return _lines({"R": matrix[:3, :3], "T": matrix[:3, 3]})


def _lines(entries):
    return b"".join(
        f"{name}: ".encode() + matrix_rows(values.reshape(1, -1))
        for name, values in entries.items()
    )
