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
from OXTS. Volume (spec section 1): p_vol = A p_velo, x right, y forward, z up, at the velodyne. A
camera's projection is P_rect R_rect T_velo_to_cam with the fourth column of P_rect, so that
camera i sits at -K^-1 p_4 of rectified camera 0.
"""

import re
from pathlib import Path

import numpy as np

from selfocc import InputError, counted
from selfocc.batch import Sequence
from selfocc.datasets import kitti_files as files
from selfocc.datasets.kitti_drive import (
    DIGITS,
    DRIVE_NAME,
    EYES,
    WHY_SYNC,
    Drive,
    drives_on_disk,
    image_numbers,
)
from selfocc.files import as_named
from selfocc.labels import PseudoLabels

OTHER = {"l": "r", "r": "l"}
HELD_OUT = 0.2  # of every drive, its end, where nobody says what is for validation


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
        return _listed(
            root, Path(split_folder) / f"{chosen or split}_files.txt", pose_folder, labels
        )
    if chosen:
        parts = [files.parse_range(part) for part in chosen.split(",")]
    else:
        usable, others = drives_on_disk(root)
        parts = [(drive, _default_frames(root, drive, split)) for drive in usable]
        parts = [(drive, frames) for drive, frames in parts if frames]
    if not parts:
        raise InputError(f"{root}: too few frames to split; name them with --train and --val")
    sequences = []
    for name, frames in parts:
        drive = Drive(root, name, pose_folder)
        for eye in EYES:
            numbers = drive.choose(eye, frames)
            if numbers:
                sequence = KittiRawSequence(drive, eye, numbers, labels)
                judged = [f for f in range(sequence.frames) if sequence.judged(f)]
                sequence.inputs = judged if split == "val" and judged else None
                sequences.append(sequence)
    if not chosen:
        ranges = ",".join(f"{name}:{frames[0]}-{frames[-1]}" for name, frames in parts)
        share = "the first four fifths" if split == "train" else "the last fifth"
        what = ranges if len(parts) < 4 else f"{share} of each of the {len(parts)} drives on disk"
        sequences[0].missing.insert(0, f"no --split-dir: the {split} split is {what}")
        if others:
            sequences[0].missing.insert(
                1, f"{counted(len(others), 'drive')} left out ({others[0]}, ..): {WHY_SYNC}"
            )
    return sequences


def _data_folder(root: Path) -> Path:
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; name the one that holds KITTI's 2011_09_26, ...")
    for place in (as_named(root), root.resolve()):  # a link may lead into a data set
        for folder in (place, place.parent, place.parent.parent):
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


def _default_frames(root: Path, drive: str, split: str) -> list[int]:
    folders = [root / drive[:10] / drive / camera / "data" for camera in EYES.values()]
    numbers = image_numbers(folders[0]) or image_numbers(folders[1])
    if not numbers:
        raise InputError(
            f"{folders[0]}: no images; remove the drive or name the others with --train and --val"
        )
    held = int(len(numbers) * (1 - HELD_OUT))
    return numbers[:held] if split == "train" else numbers[held:]


def _listed(
    root: Path, path: Path, pose_folder: Path | None, labels: PseudoLabels | None
) -> list["KittiRawSequence"]:
    """The samples of a split file, grouped into sequences."""
    samples: dict[tuple[str, str], set[int]] = {}
    for i, line in enumerate(files.read_text(path).splitlines(), 1):
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
    sequences = []
    opened = {
        name: Drive(root, name, pose_folder, path) for name in sorted({n for n, _ in samples})
    }
    for (name, eye), wanted in sorted(samples.items()):
        numbers = opened[name].numbers[eye]
        absent = sorted(wanted - set(numbers))
        if absent:
            raise InputError(
                f"{path}: names {counted(len(absent), 'frame')} of {name}/{EYES[eye]} that "
                f"{'is' if len(absent) == 1 else 'are'} not on disk, {absent[0]:010d} first; "
                "download what is missing or take its lines out"
            )
        sequence = KittiRawSequence(opened[name], eye, numbers, labels)
        sequence.inputs = [f for f, number in enumerate(numbers) if number in wanted]
        sequences.append(sequence)
    return sequences


class KittiRawSequence(Sequence):
    """One eye of a drive, `l` or `r`.

    `numbers` are the frames' numbers on disk. Raises InputError on whatever is malformed.
    """

    def __init__(
        self, drive: Drive, eye: str, numbers: list[int], labels: PseudoLabels | None = None
    ):
        self.drive, self.eye, self.numbers, self._labels = drive, eye, numbers, labels
        self.name = f"{drive.name}/{eye}"
        self.frames = len(numbers)
        self.intrinsics, camera_to_cam0 = drive.camera(eye)
        cam0_to_world = drive.poses(numbers)
        self._poses = cam0_to_world @ camera_to_cam0
        self._volume_to_world = (
            cam0_to_world @ drive.velo_to_cam0 @ np.linalg.inv(files.VELO_TO_VOLUME)
        )
        self.positions = self._poses[:, :3, 3]
        steps = np.linalg.norm(np.diff(self.positions, axis=0), axis=1)
        self.path = np.concatenate([[0.0], np.cumsum(steps)])
        self._truth = _depth_folder(drive.root, drive.name, EYES[eye])
        self._size = files.read_image(self._image_path(eye, 0)).shape
        drive.check_size(eye, self._size)
        self.missing = [*drive.missing, *self._survey()]

    def _survey(self) -> list[str]:
        """What is not there, and what its absence costs."""
        missing = []
        other = OTHER[self.eye]
        alone = set(self.numbers) - set(self.drive.numbers[other])
        if len(alone) == self.frames:
            missing.append(f"no {EYES[other]}: no stereo source, no stereo depth")
        elif alone:
            missing.append(f"{EYES[other]} lacks {counted(len(alone), 'frame')}: no stereo there")
        if not any(self.judged(frame) for frame in range(self.frames)):
            missing.append("no velodyne_points nor data_depth_annotated: depth is not judged by it")
        elif self._truth is None:
            missing.append("no data_depth_annotated: depth is judged against raw Velodyne scans")
        missing.append("no voxels in KITTI raw: occupancy is not scored")
        return missing

    def judged(self, frame: int) -> bool:
        """Whether there is a scan or improved ground truth of a frame."""
        truth = self._truth and (self._truth / f"{self.frame_id(frame)}.png").exists()
        return bool(truth) or self._scan(frame).exists()

    def frame_id(self, frame: int) -> str:
        """The frame's name on disk, "0000000040"."""
        return f"{self.numbers[frame]:0{DIGITS}d}"

    def files(self, frame: int) -> list[Path]:
        images = [self._image_path(eye, frame) for eye in EYES]
        truth = [] if self._truth is None else [self._truth / f"{self.frame_id(frame)}.png"]
        own = self._image_path(self.eye, frame)
        labels = [] if self._labels is None else [self._labels.file(own)]
        return [*self.drive.files(self.numbers[frame]), *images, self._scan(frame), *truth, *labels]

    def cameras(self, frame: int) -> tuple[np.ndarray, np.ndarray]:
        return self.intrinsics[None].copy(), self._poses[frame][None]

    def volume_to_world(self, frame: int) -> np.ndarray:
        return self._volume_to_world[frame]

    def image(self, frame: int, camera: int) -> np.ndarray:
        return self._image(self.eye, frame)

    def has_other_eye(self, frame: int) -> bool:
        return self._image_path(OTHER[self.eye], frame).exists()

    def other_eye(self, frame: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        other = OTHER[self.eye]
        self.drive.baseline()
        intrinsics, other_to_cam0 = self.drive.camera(other)
        cam0_to_here = np.linalg.inv(self.drive.camera(self.eye)[1])
        pose = self._poses[frame] @ cam0_to_here @ other_to_cam0
        return intrinsics[None].copy(), pose[None], self._image(other, frame)[None]

    def depth(self, frame: int) -> np.ndarray | None:
        """The improved ground truth."""
        if self._truth is None:
            return None
        path = self._truth / f"{self.frame_id(frame)}.png"
        if not path.exists():
            return None
        depth = files.read_depth(path)
        files.check_size(path, depth, self._size, f"{self.name}'s image")
        return depth[None]

    def semantics(self, frame: int) -> np.ndarray | None:
        """Pseudo labels; None without --labels."""
        if self._labels is None:
            return None
        return self._labels.read([self._image_path(self.eye, frame)], self._size[:2])

    def lidar(self, frame: int) -> np.ndarray | None:
        return files.read_scan(self._scan(frame))

    def stereo_pair(self, frame: int) -> tuple[np.ndarray, np.ndarray, float, float] | None:
        """None for the right eye, and where the right image is not on disk."""
        if self.eye == "r" or not self._image_path("r", frame).exists():
            return None
        left, right = (self._image(eye, frame) for eye in EYES)
        return left, right, float(self.intrinsics[0, 0]), self.drive.baseline()

    def _scan(self, frame: int) -> Path:
        return self.drive.folder / "velodyne_points" / "data" / f"{self.frame_id(frame)}.bin"

    def _image_path(self, eye: str, frame: int) -> Path:
        stem = self.drive.folder / EYES[eye] / "data" / self.frame_id(frame)
        jpeg = stem.with_suffix(".jpg")
        return jpeg if jpeg.exists() else stem.with_suffix(".png")

    def _image(self, eye: str, frame: int) -> np.ndarray:
        path = self._image_path(eye, frame)
        image = files.read_image(path)
        files.check_size(path, image, self._size, self._image_path(self.eye, 0).name)
        return image


def _depth_folder(root: Path, drive: str, camera: str) -> Path | None:
    """Where the improved ground truth of a drive is; None where it is not."""
    places = (root / "data_depth_annotated", root, root.parent / "data_depth_annotated")
    for place in places:
        for split in ("train", "val"):
            folder = place / split / drive / "proj_depth" / "groundtruth" / camera
            if folder.is_dir():
                return folder
    return None
