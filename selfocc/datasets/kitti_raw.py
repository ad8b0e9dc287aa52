"""KITTI raw (Geiger et al. 2013) as sequences: the two eyes of a drive are two of them.

    DATE/calib_cam_to_cam.txt, calib_velo_to_cam.txt, calib_imu_to_velo.txt
    DATE/DATE_drive_NNNN_sync/image_02, image_03/data/0000000000.png   left, right eye; or .jpg
                             /velodyne_points/data/0000000000.bin      float32 x, y, z, reflectance
                             /oxts/data/0000000000.txt                 GPS and IMU
                             /poses*.txt                               instead of oxts, see below
    data_depth_annotated/{train,val}/DRIVE/proj_depth/groundtruth/image_02/0000000005.png
                             16 bits, metres * 256: the improved ground truth of KITTI depth

A pose file has a 3x4 matrix a line, line k for frame k, that takes rectified camera 0 to a world,
as in KITTI odometry; where the file's name contains `cam2` it takes camera 2. Files are looked for
in the folder of --poses (DATE/DRIVE.txt or DRIVE*.txt), then in the drive; without them poses come
from OXTS. Volume: x right, y forward, z up, at the velodyne. A camera's projection is
P_rect R_rect T_velo_to_cam with the fourth column of P_rect, so that camera i sits at -K^-1 p_4 of
rectified camera 0.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np

from selfocc import InputError, counted
from selfocc.datasets import reading
from selfocc.datasets.kitti import Eye
from selfocc.labels import PseudoLabels

EYES = {"l": "image_02", "r": "image_03"}
DIGITS = 10  # of a frame's number on disk
EARTH = 6378137.0  # metres, its radius as the KITTI devkit has it
DRIVE_NAME = re.compile(r"\d{4}_\d\d_\d\d_drive_\d{4}_(\w+)")
WHY_SYNC = "only those of _sync drives are rectified, as the calibration has it, and synchronised"


def kitti_raw_sequences(
    root: Path,
    split: str,
    chosen: str = "",
    split_folder: Path | None = None,
    pose_folder: Path | None = None,
    labels: PseudoLabels | None = None,
) -> list["KittiRawSequence"]:
    """The sequences of a split, `train` or `val`.

    With `split_folder`: the samples that `<chosen or split>_files.txt` names, a line `DATE/DRIVE
    frame l|r` each (Eigen et al., Zhou et al.); their neighbours may be any frame on disk. Without:
    `chosen` are drives or frames of them, `2011_09_26_drive_0052_sync:0-39,...`, both eyes; nothing
    chosen means four fifths of every drive for training and its end for validation. Validation
    without split files keeps to frames that have depth truth, if any have.

    Only `_sync` drives are read. `root` holds the DATE folders, or is one of them or a drive.
    Raises InputError.
    """
    root = _data_folder(Path(root))
    if split_folder is not None:
        listing = Path(split_folder) / f"{chosen or split}_files.txt"
        return _listed(root, listing, pose_folder, labels)
    usable, others = drives_on_disk(root)
    parts = [(name, None) for name in usable]
    if chosen:
        parts = [reading.parse_range(part) for part in chosen.split(",")]
    sequences, ranges = [], []
    for name, frames in parts:
        drive = Drive(root, name, pose_folder)
        if not chosen:
            numbers = drive.numbers["l"] or drive.numbers["r"]
            frames = reading.held_out(numbers, split)
            if not frames:
                continue
            ranges.append(f"{name}:{frames[0]}-{frames[-1]}")
        for eye in EYES:
            numbers = drive.choose(eye, frames)
            if numbers:
                sequence = KittiRawSequence(drive, eye, numbers, labels)
                judged = [f for f in range(sequence.frames) if sequence.judged(f)]
                sequence.inputs = judged if split == "val" and judged else None
                sequences.append(sequence)
    if not sequences:
        raise InputError(f"{root}: too few frames to split; name them with --train and --val")
    if not chosen:
        share = "the first four fifths" if split == "train" else "the last fifth"
        what = f"{share} of each of the {len(ranges)} drives on disk"
        what = ",".join(ranges) if len(ranges) < 4 else what
        notes = [f"no --split-dir: the {split} split is {what}"]
        if others:
            left_out = f"{counted(len(others), 'drive')} left out ({others[0]}, ..)"
            notes.append(f"{left_out}: {WHY_SYNC}")
        sequences[0].missing[:0] = notes
    return sequences


def _data_folder(root: Path) -> Path:
    for folder in reading.around(root, "2011_09_26, ..."):
        usable, others = drives_on_disk(folder)
        if usable:
            return folder
        if others:
            raise InputError(
                f"{folder}: the images of {others[0]} cannot be used: {WHY_SYNC}; download its "
                "`synced+rectified data`"
            )
    raise InputError(f"{root}: no KITTI raw data; 2011_09_26/2011_09_26_drive_0001_sync, ... "
                     "are expected there")  # fmt: skip


def _listed(
    root: Path, path: Path, pose_folder: Path | None, labels: PseudoLabels | None
) -> list["KittiRawSequence"]:
    """The samples of a split file, grouped into sequences."""
    samples: dict[tuple[str, str], set[int]] = {}
    for i, line in enumerate(reading.read_text(path).splitlines(), 1):
        match = re.fullmatch(r"(\w+)/(\w+)\s+(\d+)\s+([lr])", line.strip())
        if match:
            date, drive, frame, eye = match.groups()
            samples.setdefault((drive, eye), set()).add(int(frame))
        if line.strip() and (not match or not DRIVE_NAME.fullmatch(drive) or drive[:10] != date):
            raise InputError(
                f"{path}, line {i}: {line.strip()[:60]!r} is no "
                "'2011_09_26/2011_09_26_drive_0001_sync 12 l'; mend the file"
            )
    if not samples:
        raise InputError(f"{path}: names no frame; restore the file")
    drives = {
        name: Drive(root, name, pose_folder, path) for name in sorted({n for n, _ in samples})
    }
    sequences = []
    for (name, eye), wanted in sorted(samples.items()):
        numbers = drives[name].numbers[eye]
        absent = sorted(wanted - set(numbers))
        if absent:
            raise InputError(
                f"{path}: names {counted(len(absent), 'frame')} of {name}/{EYES[eye]} that "
                f"{'is' if len(absent) == 1 else 'are'} not on disk, {absent[0]:010d} first; "
                "download what is missing or take its lines out"
            )
        sequence = KittiRawSequence(drives[name], eye, numbers, labels)
        sequence.inputs = [f for f, number in enumerate(numbers) if number in wanted]
        sequences.append(sequence)
    return sequences


@lru_cache(8)
def drives_on_disk(root: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the drives on disk, sorted: those that can be used, and others (`_extract`)."""
    names = sorted(path.name for path in root.glob("*_*_*/*_drive_*") if path.is_dir())
    kinds = {name: match[1] for name in names if (match := DRIVE_NAME.fullmatch(name))}
    synchronised = tuple(name for name, kind in kinds.items() if kind == "sync")
    return synchronised, tuple(name for name in kinds if name not in synchronised)


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
        self.numbers = {
            eye: reading.numbered(self.images(eye), ".png", ".jpg", digits=DIGITS) for eye in EYES
        }
        if not any(self.numbers.values()):
            raise InputError(
                f"{self.folder}: neither image_02/data nor image_03/data has images; remove it, or "
                "name others with --train and --val"
            )
        self._read_calibration()
        self._find_poses(pose_folder)

    def images(self, eye: str) -> Path:
        return self.folder / EYES[eye] / "data"

    def _read_calibration(self) -> None:
        path = self.folder.parent / "calib_cam_to_cam.txt"
        sizes = {"R_rect_00": 9}
        for camera in EYES.values():
            sizes |= {f"P_rect_{camera[-2:]}": 12, f"S_rect_{camera[-2:]}": 2}
        self.lines = reading.read_calibration(path, sizes)
        rectify = np.eye(4)
        rectify[:3, :3] = self.lines["R_rect_00"].reshape(3, 3)
        reading.rigid(rectify[None, :3].reshape(1, 12), path, ["line R_rect_00"])
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

    def files(self, number: int) -> list[Path]:
        """Calibration, and where the pose of a frame is read."""
        names = ("cam_to_cam", "velo_to_cam", "imu_to_velo")
        pose = self.pose_file or self.folder / "oxts" / "data" / f"{number:010d}.txt"
        return [*(self.folder.parent / f"calib_{name}.txt" for name in names), pose]

    def choose(self, eye: str, frames: Iterable[int] | None) -> list[int]:
        """Those of the frame numbers `frames` (None: all) that the eye has; one must have each."""
        if frames is None:
            return self.numbers[eye]
        there = sorted(set().union(*self.numbers.values()))
        reading.check_chosen(self.folder, there, frames)
        return sorted(set(frames) & set(self.numbers[eye]))

    def camera(self, eye: str) -> tuple[np.ndarray, np.ndarray]:
        """intrinsics [3, 3] in pixels, and camera to rectified camera 0 [4, 4]."""
        projection = self.lines.projection(f"P_rect_{EYES[eye][-2:]}")
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
                f"{self.lines.path}: P_rect_03 is not P_rect_02 moved to the right; restore it"
            )
        return float(baseline)

    def poses(self, numbers: list[int]) -> np.ndarray:
        """Rectified camera 0 to a world, [frames, 4, 4]."""
        if self.pose_file is None:
            imu_to_world = oxts_poses(self._oxts(numbers))
            return imu_to_world @ np.linalg.inv(self.imu_to_cam0)
        poses = reading.read_poses(self.pose_file, numbers, self.name, DIGITS)
        if "cam2" in self.pose_file.name:
            poses = poses @ np.linalg.inv(self.camera("l")[1])
        return poses

    def _oxts(self, numbers: list[int]) -> np.ndarray:
        """Latitude, longitude, altitude, roll, pitch, yaw [frames, 6]; read once for both eyes."""
        for number in numbers:
            if number not in self._rows:
                path = self.folder / "oxts" / "data" / f"{number:010d}.txt"
                row = reading.parse(reading.read_text(path), 30, str(path))[:6]
                if abs(row[0]) >= 89 or abs(row[1]) > 180:
                    raise InputError(
                        f"{path}: latitude and longitude are impossible; restore the file"
                    )
                self._rows[number] = row
        return np.array([self._rows[number] for number in numbers])


def _mounting(path: Path) -> np.ndarray:
    """[4, 4] from the lines R and T of a calibration file."""
    lines = reading.read_calibration(path, {"R": 9, "T": 3})
    parts = lines["R"].reshape(3, 3), lines["T"][:, None]
    return reading.rigid(np.concatenate(parts, 1).reshape(1, 12), path, ["lines R and T"])[0]


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
    poses[:, :3, :3] = rotation(roll, pitch, yaw)
    poses[:, :3, 3] = np.stack([x, y, altitude], 1)
    poses[:, :3, 3] -= poses[0, :3, 3].copy()
    return poses


def rotation(roll, pitch, yaw) -> np.ndarray:
    """[..., 3, 3] from angles [...] in radians: Rz(yaw) Ry(pitch) Rx(roll)."""
    turns = []
    for axis, angle in enumerate((roll, pitch, yaw)):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = np.zeros((*np.shape(angle), 3, 3))
        turn[..., axis, axis] = 1
        turn[..., i, i] = turn[..., j, j] = np.cos(angle)
        turn[..., j, i], turn[..., i, j] = np.sin(angle), -np.sin(angle)
        turns.append(turn)
    x, y, z = turns
    return z @ y @ x


class KittiRawSequence(Eye):
    """One eye of a drive, `l` or `r`."""

    digits = DIGITS

    def __init__(
        self, drive: Drive, eye: str, numbers: list[int], labels: PseudoLabels | None = None
    ):
        self.drive, self.folder = drive, drive.images(eye)
        super().__init__(f"{drive.name}/{eye}", tuple(EYES), eye, numbers, labels)
        self.other = "r" if eye == "l" else "l"
        self.intrinsics, camera_to_cam0 = drive.camera(eye)
        cam0_to_world = drive.poses(numbers)
        self._poses = cam0_to_world @ camera_to_cam0
        self._volume_to_world = (
            cam0_to_world @ drive.velo_to_cam0 @ np.linalg.inv(reading.VELO_TO_VOLUME)
        )
        self.positions = self._poses[:, :3, 3]
        self.path = reading.path_length(self.positions)
        self._truth = _depth_folder(drive.root, drive.name, EYES[eye])
        made_for = drive.lines.get(f"S_rect_{EYES[eye][-2:]}")
        made_for = None if made_for is None else tuple(made_for[::-1].astype(int).tolist())
        reading.check_rectified(drive.lines.path, self.intrinsics, self._size, made_for)
        self.missing = [*drive.missing, *self._survey()]

    def _survey(self) -> list[str]:
        """What is not there, and what its absence costs."""
        missing, other = [], EYES[self.other]
        alone = set(self.numbers) - set(self.drive.numbers[self.other])
        if len(alone) == self.frames:
            missing.append(f"no {other}: no stereo source, no stereo depth")
        elif alone:
            missing.append(f"{other} lacks {counted(len(alone), 'frame')}: no stereo there")
        if not any(self.judged(frame) for frame in range(self.frames)):
            missing.append("no velodyne_points nor data_depth_annotated: depth is not judged by it")
        elif self._truth is None:
            missing.append("no data_depth_annotated: depth is judged against raw Velodyne scans")
        missing.append("no voxels in KITTI raw: occupancy is not scored")
        return missing

    def judged(self, frame: int) -> bool:
        """Whether there is a scan or improved ground truth of a frame."""
        truth = self._truth and (self._truth / f"{self.frame_id(frame)}.png").exists()
        return bool(truth) or self.scan_path(frame).exists()

    def files(self, frame: int) -> list[Path]:
        truth = [] if self._truth is None else [self._truth / f"{self.frame_id(frame)}.png"]
        return [*super().files(frame), *self.drive.files(self.numbers[frame]), *truth]

    def has_other_eye(self, frame: int) -> bool:
        return self.image_path(self.other, frame).exists()

    def other_eye(self, frame: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self.drive.baseline()
        intrinsics, other_to_cam0 = self.drive.camera(self.other)
        cam0_to_here = np.linalg.inv(self.drive.camera(self.eye)[1])
        pose = self._poses[frame] @ cam0_to_here @ other_to_cam0
        return intrinsics[None].copy(), pose[None], self._image(self.other, frame)[None]

    def depth(self, frame: int) -> np.ndarray | None:
        """The improved ground truth."""
        path = self._truth and self._truth / f"{self.frame_id(frame)}.png"
        if path is None or not path.exists():
            return None
        depth = reading.read_depth(path)
        self.check_size(path, depth)
        return depth[None]

    def baseline(self) -> float:
        return self.drive.baseline()

    def image_path(self, eye: str, frame: int) -> Path:
        stem = self.drive.images(eye) / self.frame_id(frame)
        jpeg = stem.with_suffix(".jpg")
        return jpeg if jpeg.exists() else stem.with_suffix(".png")

    def scan_path(self, frame: int) -> Path:
        return self.drive.folder / "velodyne_points" / "data" / f"{self.frame_id(frame)}.bin"


def _depth_folder(root: Path, drive: str, camera: str) -> Path | None:
    """Where the improved ground truth of a drive is; None where it is not."""
    places = (root / "data_depth_annotated", root, root.parent / "data_depth_annotated")
    for place in places:
        for split in ("train", "val"):
            folder = place / split / drive / "proj_depth" / "groundtruth" / camera
            if folder.is_dir():
                return folder
    return None
