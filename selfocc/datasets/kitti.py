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
from selfocc.datasets import reading
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
    for folder in (as_named(root) / "dataset", *reading.around(root, "`dataset`")):
        if (folder / "sequences").is_dir():
            return folder
    raise InputError(f"{root}: no KITTI odometry data; dataset/sequences is expected there")


class Eye(Sequence):
    """One camera of a rectified pair: what KITTI's odometry and its raw data have in common.

    numbers: of the frames, on disk; eyes: names of the left and the right camera, of which `eye` is
    this one. A data set sets folder (above the images), intrinsics [3, 3], _poses [frames, 4, 4] of
    the camera in the world, and _volume_to_world [frames, 4, 4], and knows image_path(eye, frame),
    scan_path(frame) and baseline(), metres between the eyes, or None where they are no pair. Raises
    InputError on whatever is malformed.
    """

    digits = 6  # of a frame's number on disk

    def __init__(self, name: str, eyes, eye: str, numbers: list[int], labels: PseudoLabels | None):
        self.name, self.eyes, self.eye, self._labels = name, eyes, eye, labels
        self.numbers, self.frames = numbers, len(numbers)
        self._size = reading.read_image(self.image_path(eye, 0)).shape

    def frame_id(self, frame: int) -> str:
        """The frame's name on disk, "000040"."""
        return f"{self.numbers[frame]:0{self.digits}d}"

    def files(self, frame: int) -> list[Path]:
        own = self.image_path(self.eye, frame)
        labels = [] if self._labels is None else [self._labels.file(own)]
        return [*(self.image_path(e, frame) for e in self.eyes), self.scan_path(frame), *labels]

    def cameras(self, frame: int) -> tuple[np.ndarray, np.ndarray]:
        return self.intrinsics[None].copy(), self._poses[frame][None].copy()

    def volume_to_world(self, frame: int) -> np.ndarray:
        return self._volume_to_world[frame]

    def image(self, frame: int, camera: int) -> np.ndarray:
        return self._image(self.eye, frame)

    def _image(self, eye: str, frame: int) -> np.ndarray:
        path = self.image_path(eye, frame)
        image = reading.read_image(path)
        self.check_size(path, image)
        return image

    def check_size(self, path: Path, image: np.ndarray) -> None:
        """Refuse an image or a map of another size than the first image's."""
        if image.shape[:2] != self._size[:2]:
            got, want = ("x".join(map(str, shape[:2])) for shape in (image.shape, self._size))
            first = self.image_path(self.eye, 0).relative_to(self.folder)
            raise InputError(
                f"{path}: {got} pixels, but {first} has {want}; a sequence needs one size"
            )

    def semantics(self, frame: int) -> np.ndarray | None:
        """Pseudo labels; None without --labels."""
        if self._labels is None:
            return None
        return self._labels.read(self.image_path(self.eye, frame), self._size[:2])[None]

    def lidar(self, frame: int) -> np.ndarray | None:
        path = self.scan_path(frame)
        if not path.exists():
            return None
        return reading.read_points(path, 4) @ reading.VELO_TO_VOLUME[:3, :3].T.astype(np.float32)

    def stereo_pair(self, frame: int) -> tuple[np.ndarray, np.ndarray, float, float] | None:
        """None for the right eye, and where the right image is not on disk."""
        right = self.image_path(self.eyes[1], frame)
        if self.eye == self.eyes[1] or not right.exists() or self.baseline() is None:
            return None
        left, right = (self._image(eye, frame) for eye in self.eyes)
        return left, right, float(self.intrinsics[0, 0]), self.baseline()


class KittiSequence(Eye):
    """One drive seen by the left camera, colour where there is one, else grey.

    Calibration and poses are read and checked here; images, scans and voxels when asked for.
    """

    def __init__(
        self,
        dataset: Path,
        name: str,
        frames: range | None = None,
        labels: PseudoLabels | None = None,
    ):
        self.folder = dataset / "sequences" / name
        if not self.folder.is_dir():
            present = sorted(p.name for p in (dataset / "sequences").iterdir() if p.is_dir())
            raise InputError(
                f"{dataset / 'sequences'}: no sequence {name}; it holds {', '.join(present)}"
            )
        colour = bool(reading.numbered(self.folder / "image_2", ".png"))
        left, right = ("image_2", "image_3") if colour else ("image_0", "image_1")
        there = reading.numbered(self.folder / left, ".png")
        if not there:
            raise InputError(f"{self.folder}: no image_2/000000.png nor image_0/000000.png, ...")
        if frames is not None:
            reading.check_chosen(self.folder / left, there, frames)
        numbers = there if frames is None else sorted(frames)
        super().__init__(name, (left, right), left, numbers, labels)
        whole = name in VAL_SEQUENCES and len(there) == FULL_VAL_FRAMES
        self._skipped = VAL_SKIPPED if whole else frozenset()

        self.missing: list[str] = []
        volume_to_cam0, left_to_cam0 = self._read_calibration()
        path = dataset / "poses" / f"{name}.txt"
        cam0_to_world = reading.read_poses(path, numbers, f"{name}/{left}")
        self._poses = cam0_to_world @ left_to_cam0
        self._volume_to_world = cam0_to_world @ volume_to_cam0
        self.positions = cam0_to_world[:, :3, 3]
        self.path = reading.path_length(self.positions[:, [0, 2]])  # in plan, as published
        reading.check_rectified(self.folder / "calib.txt", self.intrinsics, self._size)
        self._survey()

    def _read_calibration(self) -> tuple[np.ndarray, np.ndarray]:
        """Volume and left camera to rectified camera 0, [4, 4]."""
        path = self.folder / "calib.txt"
        self._lines = reading.read_calibration(
            path, dict.fromkeys(("P0", "P1", "P2", "P3", "Tr"), 12)
        )
        projection = self._projection(self.eye)
        self.intrinsics, left_to_cam0 = projection[:, :3], np.eye(4)
        left_to_cam0[0, 3] = -projection[0, 3] / projection[0, 0]
        velo_to_cam0 = NOMINAL_VELO_TO_CAM0
        if "Tr" in self._lines:
            velo_to_cam0 = reading.rigid(self._lines["Tr"][None], path, ["line Tr"])[0]
        else:
            self.missing.append("no Tr in calib.txt: nominal mounting of the velodyne assumed")
        return velo_to_cam0 @ np.linalg.inv(reading.VELO_TO_VOLUME), left_to_cam0

    def _projection(self, camera: str) -> np.ndarray:
        return self._lines.projection(f"P{camera[-1]}")

    def _survey(self) -> None:
        """What is there beside images and what its absence costs; training needs none of it."""
        if self.eye == "image_0":
            self.missing.append("no image_2: grey images stand in for colour")
        self._baseline = self._find_right()
        if not self._chosen("velodyne", ".bin"):
            judge = "judged against stereo" if self._baseline is not None else "not scored"
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
        return set(self.numbers) & set(reading.numbered(self.folder / folder, suffix))

    def _find_right(self) -> float | None:
        """Metres to the right eye; None where it cannot be used."""
        left, right = self.eyes
        there = self._chosen(right, ".png")
        if not there:
            self.missing.append(f"no {right}: no stereo depth to judge against")
            return None
        try:
            here, other = self._projection(left), self._projection(right)
            if here[0, 3] <= other[0, 3] or not np.allclose(here[:, :3], other[:, :3]):
                raise InputError(
                    f"{self._lines.path}: P{right[-1]} is not P{left[-1]} moved to the right; "
                    "restore the file"
                )
            self._image(right, self.numbers.index(min(there)))
        except InputError as error:
            self.missing.append(f"no stereo depth to judge against: {error}")
            return None
        return float(here[0, 3] - other[0, 3]) / float(here[0, 0])

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
            reading.check_bytes(path, path.stat().st_size, size)
        return paths

    def baseline(self) -> float | None:
        return self._baseline

    def image_path(self, eye: str, frame: int) -> Path:
        return self.folder / eye / f"{self.frame_id(frame)}.png"

    def scan_path(self, frame: int) -> Path:
        return self.folder / "velodyne" / f"{self.frame_id(frame)}.bin"

    def files(self, frame: int) -> list[Path]:
        poses = self.folder.parents[1] / "poses" / f"{self.name}.txt"
        stem = self.folder / "voxels" / self.frame_id(frame)
        voxels = (stem.with_suffix(suffix) for suffix in (".label", ".invalid"))
        return [*super().files(frame), self.folder / "calib.txt", poses, *voxels]

    def voxels(self, frame: int) -> np.ndarray | None:
        """SemanticKITTI labels, uint8 [256, 256, 32] over (y, x, z); None without whole files.

        0 free, 1..19 learning ids, 255 unknown.
        """
        if self.numbers[frame] not in self._voxels:
            return None
        label, invalid = self._voxels[self.numbers[frame]]
        labels = _LEARNING_LUT[reading.read_exactly(label, "<u2", int(np.prod(GRID)))]
        labels = labels.reshape(GRID)[:, ::-1].copy()
        labels[_read_bits(invalid)] = UNKNOWN
        return labels

    def voxel_scan(self, frame: int) -> tuple[np.ndarray, np.ndarray] | None:
        """According to voxels/*.bin, and to the scan itself; None where one is not there."""
        path, points = self.folder / "voxels" / f"{self.frame_id(frame)}.bin", self.lidar(frame)
        if points is None or not path.exists():
            return None
        return _read_bits(path), voxels_hit(points, VOXEL, CORNER, GRID)


def voxels_hit(points: np.ndarray, edge: float, corner, grid: tuple[int, ...]) -> np.ndarray:
    """bool [ny, nx, nz]: where points [M, 3] (x, y, z) lie; the grid's corner is y, x, z metres."""
    cells = np.floor((points[:, [1, 0, 2]] - np.array(corner)) / edge).astype(int)
    hit = np.zeros(grid, bool)
    hit[tuple(cells[((cells >= 0) & (cells < grid)).all(1)].T)] = True
    return hit


def _read_bits(path: Path) -> np.ndarray:
    """bool [256, 256, 32] over (y, x, z), a bit a voxel on disk."""
    bits = np.unpackbits(reading.read_exactly(path, "u1", int(np.prod(GRID)) // 8))
    # stored over (x, y, z) of the velodyne: x is our y, and our x runs against its y
    return bits.reshape(GRID)[:, ::-1].astype(bool)
