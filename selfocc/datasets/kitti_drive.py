"""What the two eyes of a drive of KITTI raw share: calibration and poses; see `kitti_raw.py`."""

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np

from selfocc import InputError, counted
from selfocc.datasets import kitti_files as files

EYES = {"l": "image_02", "r": "image_03"}
DIGITS = 10  # of a frame's number on disk
EARTH = 6378137.0  # metres, its radius as the KITTI devkit has it
DRIVE_NAME = re.compile(r"\d{4}_\d\d_\d\d_drive_\d{4}_(\w+)")
WHY_SYNC = "only those of _sync drives are rectified, as the calibration has it, and synchronised"


@lru_cache(8)
def drives_on_disk(root: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the drives on disk, sorted: those that can be used, and others (`_extract`)."""
    names = sorted(path.name for path in root.glob("*_*_*/*_drive_*") if path.is_dir())
    kinds = {name: match[1] for name in names if (match := DRIVE_NAME.fullmatch(name))}
    synchronised = tuple(name for name, kind in kinds.items() if kind == "sync")
    return synchronised, tuple(name for name in kinds if name not in synchronised)


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
        usable, others = drives_on_disk(root)
        if name in others:
            raise InputError(
                f"{named_by or root}: the images of {name} cannot be used: {WHY_SYNC}; take "
                f"{name.rpartition('_')[0]}_sync"
            )
        if not self.folder.is_dir():
            who = f"{named_by}: names" if named_by else f"{root}: there is no"
            raise InputError(
                f"{who} drive {name}, which is not among the {len(usable)} on disk; download it, "
                "or leave it out"
            )
        self.missing: list[str] = []
        self._rows: dict[int, np.ndarray] = {}
        self.numbers = {eye: image_numbers(self.folder / at / "data") for eye, at in EYES.items()}
        if not any(self.numbers.values()):
            raise InputError(f"{self.folder}: neither image_02/data nor image_03/data has images")
        self._read_calibration()
        self._find_poses(pose_folder)

    def _read_calibration(self) -> None:
        self.calibration = path = self.folder.parent / "calib_cam_to_cam.txt"
        sizes = {"R_rect_00": 9}
        for camera in EYES.values():
            sizes |= {f"P_rect_{camera[-2:]}": 12, f"S_rect_{camera[-2:]}": 2}
        self._lines = files.read_calibration(path, sizes)
        rectify = np.eye(4)
        rectify[:3, :3] = _line(self._lines, "R_rect_00", path).reshape(3, 3)
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
        """Those of the frame numbers `frames` (None: all) that the eye has; one must have each."""
        if frames is None:
            return self.numbers[eye]
        there = sorted(set().union(*self.numbers.values()))
        absent = sorted(set(frames) - set(there))
        if absent or not frames:
            what = f"no frame {absent[0]}" if absent else f"{frames} chooses nothing"
            raise InputError(f"{self.folder}: {what}; it holds {there[0]} to {there[-1]}")
        return sorted(set(frames) & set(self.numbers[eye]))

    def camera(self, eye: str) -> tuple[np.ndarray, np.ndarray]:
        """intrinsics [3, 3] in pixels, and camera to rectified camera 0 [4, 4]."""
        key = f"P_rect_{EYES[eye][-2:]}"
        line = _line(self._lines, key, self.calibration)
        projection = files.read_projection(self.calibration, key, line)
        intrinsics = projection[:, :3]
        camera_to_cam0 = np.eye(4)
        camera_to_cam0[:3, 3] = -np.linalg.solve(intrinsics, projection[:, 3])
        return intrinsics, camera_to_cam0

    def baseline(self) -> float:
        """Metres between the eyes; InputError where they are no rectified pair."""
        (left, left_to_cam0), (right, right_to_cam0) = (self.camera(eye) for eye in EYES)
        baseline = right_to_cam0[0, 3] - left_to_cam0[0, 3]
        if baseline <= 0 or not np.allclose(left, right):
            raise InputError(
                f"{self.calibration}: P_rect_03 is not P_rect_02 moved to the right; restore it"
            )
        return float(baseline)

    def check_size(self, eye: str, size: tuple[int, ...]) -> None:
        """Refuse images of another size [h, w] than the calibration is for."""
        line = self._lines.get(f"S_rect_{EYES[eye][-2:]}")
        made_for = None if line is None else tuple(line[::-1].astype(int).tolist())
        files.check_camera(self.calibration, self.camera(eye)[0], size, made_for)

    def poses(self, numbers: list[int]) -> np.ndarray:
        """Rectified camera 0 to a world, [frames, 4, 4]."""
        if self.pose_file is None:
            imu_to_world = oxts_poses(self._oxts(numbers))
            return imu_to_world @ np.linalg.inv(self.imu_to_cam0)
        table = files.read_table(self.pose_file, 12)
        if len(table) <= numbers[-1]:
            raise InputError(
                f"{self.pose_file}: {counted(len(table), 'line')}, but {self.name} goes on to "
                f"frame {numbers[-1]:010d}; restore the file or choose fewer frames"
            )
        poses = files.rigid(table, self.pose_file)[numbers]
        if "cam2" in self.pose_file.name:
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
