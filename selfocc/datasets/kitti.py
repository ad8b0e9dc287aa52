"""KITTI odometry with SemanticKITTI voxels (Geiger et al. 2012, Behley et al. 2019) as sequences.

    dataset/poses/XX.txt                    cam0 -> world, one 3x4 matrix a line
    dataset/sequences/XX/calib.txt          P0..P3 (rectified projections), Tr (velodyne -> cam0)
                        /image_2, image_3   colour stereo;  image_0, image_1: grey stereo
                        /velodyne           float32 x, y, z, remission
                        /voxels             .label (uint16), .invalid (bits) and .bin (bits, what
                                            the scan hits), 256x256x32 of 0.2 m

World: cam0 of the first frame (x right, y down, z forward). Volume: x right, y forward, z up, with
its origin at the velodyne. Only calibration, poses and the left images are needed; `missing` tells
what else is absent or cannot be used, and what that costs.
"""

from pathlib import Path

import numpy as np

from selfocc import InputError, counted
from selfocc.batch import Sequence
from selfocc.datasets.reading import (
    VELO_TO_VOLUME,
    check_bytes,
    check_camera,
    check_size,
    numbered,
    path_length,
    read_calibration,
    read_exactly,
    read_image,
    read_projection,
    read_scan,
    read_table,
    rigid,
)
from selfocc.files import as_named
from selfocc.labels import PseudoLabels

TRAIN_SEQUENCES = ("00", "01", "02", "03", "04", "05", "06", "07", "09", "10")
VAL_SEQUENCES = ("08",)

# the published evaluation leaves these labelled frames of the complete sequence 08 out
VAL_SKIPPED = frozenset((0, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 75))
FULL_VAL_FRAMES = 4071

GRID = (256, 256, 32)
VOXEL, CORNER = 0.2, (0.0, -25.6, -2.0)  # metres; where the voxels begin along y, x, z
UNKNOWN = 255
# SemanticKITTI label -> learning id; labels that are not named here are unknown
LEARNING_ID = {
    0: 0, 10: 1, 11: 2, 13: 5, 15: 3, 16: 5, 18: 4, 20: 5, 30: 6, 31: 7, 32: 8, 40: 9, 44: 10,
    48: 11, 49: 12, 50: 13, 51: 14, 60: 9, 70: 15, 71: 16, 72: 17, 80: 18, 81: 19, 252: 1, 253: 7,
    254: 6, 255: 8, 256: 5, 257: 5, 258: 4, 259: 5,
}  # fmt: skip
_LEARNING_LUT = np.full(1 << 16, UNKNOWN, np.uint8)
_LEARNING_LUT[list(LEARNING_ID)] = list(LEARNING_ID.values())

# the camera sits 0.27 m ahead of the velodyne and 0.08 m below it
NOMINAL_VELO_TO_CAM0 = np.array(
    [[0, -1, 0, 0], [0, 0, -1, -0.08], [1, 0, 0, -0.27], [0, 0, 0, 1]], np.float64
)


def kitti_sequences(
    root: Path,
    sequences: list[str],
    frames: range | None = None,
    labels: PseudoLabels | None = None,
) -> list["KittiSequence"]:
    """Open sequences by name ("06"), each restricted to the frame numbers `frames`.

    `root` is `dataset`, the folder that holds it, or one inside it. Raises InputError.
    """
    dataset = _dataset_folder(Path(root))
    return [KittiSequence(dataset, name, frames, labels) for name in sequences]


def _dataset_folder(root: Path) -> Path:
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; name the one that holds KITTI's `dataset`")
    for place in (as_named(root), root.resolve()):  # a link may lead into a data set
        for folder in (place / "dataset", place, place.parent, place.parent.parent):
            if (folder / "sequences").is_dir():
                return folder
    raise InputError(f"{root}: no KITTI odometry data; dataset/sequences is expected there")


class KittiSequence(Sequence):
    """One drive seen by the left camera, colour where there is one, else grey.

    Calibration and poses are read and checked here; images, scans and voxels when asked for. Raises
    InputError on whatever is malformed.
    """

    def __init__(
        self,
        dataset: Path,
        name: str,
        frames: range | None = None,
        labels: PseudoLabels | None = None,
    ):
        self.name = name
        self._labels = labels
        self.folder = dataset / "sequences" / name
        if not self.folder.is_dir():
            present = sorted(p.name for p in (dataset / "sequences").iterdir() if p.is_dir())
            raise InputError(
                f"{dataset / 'sequences'}: no sequence {name}; it holds {', '.join(present)}"
            )
        self.missing: list[str] = []
        colour = bool(numbered(self.folder / "image_2", ".png"))
        self.left, self.right = ("image_2", "image_3") if colour else ("image_0", "image_1")
        self.numbers = self._choose_frames(frames)
        self.frames = len(self.numbers)

        self._read_calibration()
        path = dataset / "poses" / f"{name}.txt"
        self._poses = rigid(self._read_poses(path), path)[self.numbers]
        self.positions = self._poses[:, :3, 3]
        self.path = path_length(self.positions[:, [0, 2]])  # in plan, as published

        self._size = read_image(self.folder / self.left / f"{self.frame_id(0)}.png").shape
        check_camera(self.folder / "calib.txt", self.intrinsics, self._size)
        self._survey()

    def _choose_frames(self, chosen: range | None) -> list[int]:
        folder = self.folder / self.left
        numbers = numbered(folder, ".png")
        if not numbers:
            raise InputError(f"{self.folder}: no image_2/000000.png nor image_0/000000.png, ...")
        self._skipped = frozenset()
        if self.name in VAL_SEQUENCES and len(numbers) == FULL_VAL_FRAMES:
            self._skipped = VAL_SKIPPED
        if chosen is None:
            return numbers
        absent = sorted(set(chosen) - set(numbers))
        if absent or not chosen:
            what = f"no frame {absent[0]}" if absent else f"{chosen} chooses nothing"
            raise InputError(f"{folder}: {what}; it holds {numbers[0]} to {numbers[-1]}")
        return sorted(chosen)

    def _read_poses(self, path: Path) -> np.ndarray:
        """A line for every frame on disk, [lines, 12]."""
        table = read_table(path, 12)
        if len(table) <= self.numbers[-1]:
            raise InputError(
                f"{path}: {counted(len(table), 'line')}, but {self.folder.name}/{self.left} goes "
                f"on to frame {self.numbers[-1]:06d}; restore the file or choose fewer frames"
            )
        return table

    def _read_calibration(self) -> None:
        path = self.folder / "calib.txt"
        names = ("P0", "P1", "P2", "P3", "Tr")
        self._calibration = read_calibration(path, dict.fromkeys(names, 12))
        projection = self._projection(self.left)
        self.intrinsics = projection[:, :3]
        self._left_to_cam0 = _to_cam0(projection)
        if "Tr" in self._calibration:
            velo_to_cam0 = rigid(self._calibration["Tr"][None], path, "line Tr")[0]
        else:
            velo_to_cam0 = NOMINAL_VELO_TO_CAM0
            self.missing.append("no Tr in calib.txt: nominal mounting of the velodyne assumed")
        self._volume_to_cam0 = velo_to_cam0 @ np.linalg.inv(VELO_TO_VOLUME)

    def _projection(self, camera: str) -> np.ndarray:
        """The 3x4 projection matrix of image_i, checked."""
        path, key = self.folder / "calib.txt", f"P{camera[-1]}"
        if key not in self._calibration:
            raise InputError(f"{path}: line {key} is missing, which {camera} needs; restore it")
        return read_projection(path, key, self._calibration[key])

    def _survey(self) -> None:
        """What is there beside images and what its absence costs; training needs none of it."""
        if self.left == "image_0":
            self.missing.append("no image_2: grey images stand in for colour")
        self._right = self._open_right()
        if not self._chosen("velodyne", ".bin"):
            judge = "judged against stereo" if self._right is not None else "not scored"
            self.missing.append(f"no velodyne: depth is {judge}")
        labels = self._chosen("voxels", ".label") | self._chosen("voxels", ".invalid")
        self._voxels = {}  # number -> .label, .invalid
        self.damaged: list[str] = []  # what is wrong with the others
        for number in sorted(labels):
            try:
                self._voxels[number] = self._voxel_files(number)
            except InputError as error:
                self.damaged.append(str(error))
        if self.damaged:
            self.missing.append(
                f"{len(self.damaged)} of {counted(len(labels), 'labelled frame')} not scored for "
                f"occupancy: {self.damaged[0]}"
            )
        elif not labels:
            self.missing.append("no voxels: occupancy is not scored")
        scored = self._voxels.keys() - self._skipped
        self.labelled = [f for f, number in enumerate(self.numbers) if number in scored]
        self.skipped = [f for f, number in enumerate(self.numbers) if number in self._skipped]

    def _chosen(self, folder: str, suffix: str) -> set[int]:
        """Numbers of those chosen frames that have such a file."""
        return set(self.numbers) & set(numbered(self.folder / folder, suffix))

    def _open_right(self) -> np.ndarray | None:
        """The projection [3, 4] of the right eye; None where it cannot be used."""
        there = self._chosen(self.right, ".png")
        if not there:
            self.missing.append(f"no {self.right}: no stereo depth to judge against")
            return None
        try:
            left, right = self._projection(self.left), self._projection(self.right)
            if left[0, 3] <= right[0, 3] or not np.allclose(left[:, :3], right[:, :3]):
                raise InputError(
                    f"{self.folder / 'calib.txt'}: P{self.right[-1]} is not P{self.left[-1]} moved "
                    "to the right; restore the file"
                )
            self._image(self.right, self.numbers.index(min(there)))
        except InputError as error:
            self.missing.append(f"no stereo depth to judge against: {error}")
            return None
        return right

    def _voxel_files(self, number: int) -> tuple[Path, Path]:
        """The .label and the .invalid file of a frame; InputError unless both are whole."""
        stem, cells = self.folder / "voxels" / f"{number:06d}", int(np.prod(GRID))
        paths = stem.with_suffix(".label"), stem.with_suffix(".invalid")
        for path, other, size in zip(paths, paths[::-1], (2 * cells, cells // 8), strict=True):
            if not path.exists():
                raise InputError(
                    f"{path} is missing, without which {other.name} says too little; restore it or "
                    "remove the other"
                )
            check_bytes(path, path.stat().st_size, size)
        return paths

    def frame_id(self, frame: int) -> str:
        """The frame's name on disk, "000040"."""
        return f"{self.numbers[frame]:06d}"

    def files(self, frame: int) -> list[Path]:
        name, folder = self.frame_id(frame), self.folder
        image, right = (self._image_path(camera, frame) for camera in (self.left, self.right))
        labels = [] if self._labels is None else [self._labels.file(image)]
        poses = folder.parents[1] / "poses" / f"{folder.name}.txt"
        scan = folder / "velodyne" / f"{name}.bin"
        voxels = (folder / "voxels" / f"{name}{suffix}" for suffix in (".label", ".invalid"))
        return [folder / "calib.txt", poses, image, right, scan, *voxels, *labels]

    def cameras(self, frame: int) -> tuple[np.ndarray, np.ndarray]:
        return self.intrinsics[None].copy(), (self._poses[frame] @ self._left_to_cam0)[None]

    def volume_to_world(self, frame: int) -> np.ndarray:
        return self._poses[frame] @ self._volume_to_cam0

    def image(self, frame: int, camera: int) -> np.ndarray:
        return self._image(self.left, frame)

    def semantics(self, frame: int) -> np.ndarray | None:
        """Pseudo labels; None without --labels."""
        if self._labels is None:
            return None
        return self._labels.read([self._image_path(self.left, frame)], self._size[:2])

    def lidar(self, frame: int) -> np.ndarray | None:
        return read_scan(self.folder / "velodyne" / f"{self.frame_id(frame)}.bin")

    def voxels(self, frame: int) -> np.ndarray | None:
        """SemanticKITTI labels, uint8 [256, 256, 32] over (y, x, z); None without whole files.

        0 free, 1..19 learning ids, 255 unknown.
        """
        if self.numbers[frame] not in self._voxels:
            return None
        label, invalid = self._voxels[self.numbers[frame]]
        labels = _LEARNING_LUT[read_exactly(label, "<u2", int(np.prod(GRID)))]
        labels = labels.reshape(GRID)[:, ::-1].copy()
        labels[_read_bits(invalid)] = UNKNOWN
        return labels

    def voxel_scan(self, frame: int) -> tuple[np.ndarray, np.ndarray] | None:
        """According to voxels/*.bin, and to the scan itself; None where one is not there."""
        path, points = self.folder / "voxels" / f"{self.frame_id(frame)}.bin", self.lidar(frame)
        if points is None or not path.exists():
            return None
        cells = np.floor((points[:, [1, 0, 2]] - np.array(CORNER)) / VOXEL).astype(int)
        cells = cells[((cells >= 0) & (cells < GRID)).all(1)]
        hit = np.zeros(GRID, bool)
        hit[tuple(cells.T)] = True
        return _read_bits(path), hit

    def stereo_pair(self, frame: int) -> tuple[np.ndarray, np.ndarray, float, float] | None:
        if self._right is None or not self._image_path(self.right, frame).exists():
            return None
        focal = float(self.intrinsics[0, 0])
        baseline = float(self._projection(self.left)[0, 3] - self._right[0, 3]) / focal
        left, right = (self._image(camera, frame) for camera in (self.left, self.right))
        return left, right, focal, baseline

    def _image_path(self, camera: str, frame: int) -> Path:
        return self.folder / camera / f"{self.frame_id(frame)}.png"

    def _image(self, camera: str, frame: int) -> np.ndarray:
        path = self._image_path(camera, frame)
        image = read_image(path)
        check_size(path, image, self._size, f"{self.left}/{self.frame_id(0)}.png")
        return image


def _to_cam0(projection: np.ndarray) -> np.ndarray:
    """A rectified camera [3, 4] to camera 0, [4, 4]."""
    matrix = np.eye(4)
    matrix[0, 3] = -projection[0, 3] / projection[0, 0]
    return matrix


def _read_bits(path: Path) -> np.ndarray:
    """bool [256, 256, 32] over (y, x, z), a bit a voxel on disk."""
    bits = np.unpackbits(read_exactly(path, "u1", int(np.prod(GRID)) // 8))
    # stored over (x, y, z) of the velodyne: x is our y, and our x runs against its y
    return bits.reshape(GRID)[:, ::-1].astype(bool)
