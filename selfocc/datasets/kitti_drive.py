"""What the two eyes of a drive of KITTI raw share: calibration and poses; see `kitti_raw.py`."""

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np

from selfocc import InputError
from selfocc.datasets import kitti_files as files

EYES = {"l": "image_02", "r": "image_03"}
DIGITS = 10  # of a frame's number on disk
EARTH = 6378137.0  # metres, its radius as the KITTI devkit has it
DRIVE_NAME = re.compile(r"\d{4}_\d\d_\d\d_drive_\d{4}_\w+")


@lru_cache(8)
def drives_on_disk(root: Path) -> tuple[str, ...]:
    """Names of the drives on disk, sorted."""
    found = (path.name for path in root.glob("*_*_*/*_drive_*") if path.is_dir())
    return tuple(sorted(name for name in found if DRIVE_NAME.fullmatch(name)))


def image_numbers(folder: Path) -> list[int]:
    """Sorted numbers of the images in a folder that may be absent."""
    return sorted(
        {n for suffix in (".png", ".jpg") for n in files.numbered(folder, suffix, DIGITS)}
    )


class Drive:
    """What the two eyes of a drive share: calibration and poses. Raises InputError."""

    def __init__(
        self, root: Path, name: str, pose_folder: Path | None = None, named_by: Path | None = None
    ):
        self.name, self.root = name, root
        self.folder = root / name[:10] / name
        if not self.folder.is_dir():
            who = f"{named_by}: names" if named_by else f"{root}: there is no"
            raise InputError(
                f"{who} drive {name}, which is not among the {len(drives_on_disk(root))} on disk; "
                "download it, or leave it out"
            )
        self.missing: list[str] = []
        self._rows: dict[int, np.ndarray] = {}
        self.numbers = {eye: image_numbers(self.folder / at / "data") for eye, at in EYES.items()}
        if not any(self.numbers.values()):
            raise InputError(f"{self.folder}: neither image_02/data nor image_03/data has images")
        self._read_calibration()
        self._find_poses(pose_folder)

    def _read_calibration(self) -> None:
        path = self.folder.parent / "calib_cam_to_cam.txt"
        lines = files.read_calibration(path, {"R_rect_00": 9, "P_rect_02": 12, "P_rect_03": 12})
        self.projection = {}
        for eye, camera in EYES.items():
            key = f"P_rect_{camera[-2:]}"
            if self.numbers[eye]:
                self.projection[eye] = files.read_projection(path, key, _line(lines, key, path))
        rectify = np.eye(4)
        rectify[:3, :3] = _line(lines, "R_rect_00", path).reshape(3, 3)
        files.rigid(rectify[None, :3].reshape(1, 12), path, "line R_rect_00")
        self.velo_to_cam0 = rectify @ _mounting(self.folder.parent / "calib_velo_to_cam.txt")

    def _find_poses(self, pose_folder: Path | None) -> None:
        """The file of poses, or None where OXTS has to do."""
        candidates = sorted(self.folder.glob("poses*.txt"))
        if pose_folder is not None:
            if not Path(pose_folder).is_dir():
                raise InputError(f"--poses {pose_folder}: no such folder")
            given = [Path(pose_folder) / self.name[:10], Path(pose_folder)]
            candidates = [p for at in given for p in sorted(at.glob(f"{self.name}*.txt"))]
            if not candidates:
                raise InputError(
                    f"--poses {pose_folder}: neither {self.name[:10]}/{self.name}.txt nor "
                    f"{self.name}.txt is there; add it, or leave --poses out to use OXTS"
                )
        self.pose_file = candidates[0] if candidates else None
        if self.pose_file is None:
            if not (self.folder / "oxts" / "data").is_dir():
                raise InputError(
                    f"{self.folder}: no poses: neither poses*.txt nor oxts/data is there; download "
                    "one or give --poses DIR"
                )
            imu_to_velo = _mounting(self.folder.parent / "calib_imu_to_velo.txt")
            self.imu_to_cam0 = self.velo_to_cam0 @ imu_to_velo
            self.missing.append("no pose file: poses are taken from OXTS, good to some centimetres")

    def choose(self, eye: str, frames: Iterable[int] | None) -> list[int]:
        """Those of the frame numbers `frames` (None: all), which must be on disk."""
        numbers = self.numbers[eye]
        if frames is None:
            return numbers
        absent = sorted(set(frames) - set(numbers))
        if absent or not frames:
            what = f"no frame {absent[0]}" if absent else f"{frames} chooses nothing"
            raise InputError(
                f"{self.folder / EYES[eye]}: {what}; it holds {numbers[0]} to {numbers[-1]}"
            )
        return sorted(frames)

    def camera(self, eye: str) -> tuple[np.ndarray, np.ndarray]:
        """intrinsics [3, 3] in pixels, and camera to rectified camera 0 [4, 4]."""
        projection = self.projection[eye]
        intrinsics = projection[:, :3]
        camera_to_cam0 = np.eye(4)
        camera_to_cam0[:3, 3] = -np.linalg.solve(intrinsics, projection[:, 3])
        return intrinsics, camera_to_cam0

    def poses(self, numbers: list[int]) -> np.ndarray:
        """Rectified camera 0 to a world, [frames, 4, 4]."""
        if self.pose_file is None:
            imu_to_world = oxts_poses(self._oxts(numbers))
            return imu_to_world @ np.linalg.inv(self.imu_to_cam0)
        table = files.read_table(self.pose_file, 12)
        if len(table) <= numbers[-1]:
            raise InputError(
                f"{self.pose_file}: {len(table)} lines, but {self.name} goes on to frame "
                f"{numbers[-1]:010d}; restore the file or choose fewer frames"
            )
        poses = files.rigid(table, self.pose_file)[numbers]
        if "cam2" in self.pose_file.name:
            if "l" not in self.projection:
                raise InputError(
                    f"{self.pose_file}: poses of camera 2 need image_02 and its calibration"
                )
            poses = poses @ np.linalg.inv(self.camera("l")[1])
        return poses

    def _oxts(self, numbers: list[int]) -> np.ndarray:
        """Latitude, longitude, altitude, roll, pitch, yaw [frames, 6]; read once for both eyes."""
        for number in numbers:
            if number not in self._rows:
                path = self.folder / "oxts" / "data" / f"{number:010d}.txt"
                row = files.parse(files.read_text(path), 30, str(path))[:6]
                if abs(row[0]) >= 89 or abs(row[1]) > 180:
                    raise InputError(
                        f"{path}: latitude and longitude are impossible; restore the file"
                    )
                self._rows[number] = row
        return np.array([self._rows[number] for number in numbers])


def _line(lines: dict[str, np.ndarray], key: str, path: Path) -> np.ndarray:
    if key not in lines:
        raise InputError(f"{path}: line {key} is missing; restore it")
    return lines[key]


def _mounting(path: Path) -> np.ndarray:
    """[4, 4] from the lines R and T of a calibration file."""
    lines = files.read_calibration(path, {"R": 9, "T": 3})
    parts = _line(lines, "R", path).reshape(3, 3), _line(lines, "T", path)[:, None]
    return files.rigid(np.concatenate(parts, 1).reshape(1, 12), path, "lines R and T")[0]


def oxts_poses(rows: np.ndarray) -> np.ndarray:
    """IMU to world [frames, 4, 4] from latitude, longitude (degrees), altitude, roll, pitch, yaw.

    Mercator projection at the latitude of the first row, x east, y north, z up, metres, as in the
    KITTI devkit; the first IMU position is the origin.
    """
    latitude, longitude, altitude, roll, pitch, yaw = rows.T
    scale = np.cos(np.deg2rad(latitude[0])) * EARTH
    x = scale * np.deg2rad(longitude)
    y = scale * np.log(np.tan(np.deg2rad(90 + latitude) / 2))
    poses = np.tile(np.eye(4), (len(rows), 1, 1))
    poses[:, :3, :3] = _turn(2, yaw) @ _turn(1, pitch) @ _turn(0, roll)
    poses[:, :3, 3] = np.stack([x, y, altitude], 1)
    poses[:, :3, 3] -= poses[0, :3, 3].copy()
    return poses


def _turn(axis: int, angle: np.ndarray) -> np.ndarray:
    """Rotations [n, 3, 3] about an axis, radians."""
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrices = np.tile(np.eye(3), (len(angle), 1, 1))
    matrices[:, i, i] = matrices[:, j, j] = np.cos(angle)
    matrices[:, j, i] = np.sin(angle)
    matrices[:, i, j] = -np.sin(angle)
    return matrices
