"""Voxel labels of the scenes of nuScenes: those of Occ3D, or of nuScenes-Occupancy (OpenOccupancy).

Labels are uint8 [ny, nx, nz] over (y, x, z): 0 free, 1..16 the classes of `labels.OCC3D`, 255
unknown. A scene's folder is listed once: 34,000 questions to a network disk take long.
"""

from pathlib import Path

import numpy as np

from selfocc import InputError

CLASSES, UNKNOWN = 16, 255


class Occ3D:
    """gts/scene-XXXX/SAMPLE_TOKEN/labels.npz: semantics, mask_camera [200, 200, 16] over (x, y, z).

    80 x 80 x 6.4 m of the ego frame.
    """

    title, frame = "gts (Occ3D)", "ego"
    grid, free = (200, 200, 16), 17

    def __init__(self, root: Path, scene: str, tokens: dict[int, str]):
        """scene: its name; tokens: those of the samples, by frame."""
        folder = root / "gts" / scene
        there = names_in(folder)
        self.files = {f: folder / t / "labels.npz" for f, t in tokens.items() if t in there}

    def labels(self, frame: int) -> np.ndarray:
        """[200, 200, 16]; "others" (0) counts as free too, as published. Raises InputError."""
        labels = self._read(frame, "semantics")
        if labels.max() > self.free:
            raise InputError(f"{self.files[frame]}: class {labels.max()} is beyond {self.free}")
        return np.ascontiguousarray(np.where(labels == self.free, 0, labels).astype(np.uint8))

    def mask(self, frame: int) -> np.ndarray:
        """bool [200, 200, 16] over (y, x, z): what the cameras see. Raises InputError."""
        return np.ascontiguousarray(self._read(frame, "mask_camera") == 1)

    def _read(self, frame, name):
        path = self.files[frame]
        try:
            with np.load(path, allow_pickle=False) as arrays:
                array = arrays[name]
        except Exception as error:  # zip and numpy raise whatever the damage makes them raise
            raise InputError(f"{path}: damaged, or no {name} in it; copy it again") from error
        if array.shape != self.grid:
            raise InputError(f"{path}: {name} is {array.shape}, not {self.grid}; copy it again")
        return array.transpose(1, 0, 2)


class OpenOccupancy:
    """nuScenes-Occupancy/scene_SCENE_TOKEN/occupancy/LIDAR_TOP_TOKEN.npy: a row a voxel.

    Rows are z, y, x, class, or z, y, x, three of velocity, class; voxels without a row are free,
    those of class 0 noise. Voxels of 0.2 m in the frame of LIDAR_TOP.
    """

    title, frame = "nuScenes-Occupancy", "lidar"
    grid, box = (512, 512, 40), (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0)

    def __init__(self, root: Path, scene: str, tokens: dict[int, str]):
        """scene: its token; tokens: those of the sample_data of LIDAR_TOP, by frame."""
        folder = root / "nuScenes-Occupancy" / f"scene_{scene}" / "occupancy"
        files, there = {f: folder / f"{t}.npy" for f, t in tokens.items()}, names_in(folder)
        self.files = {frame: file for frame, file in files.items() if file.name in there}

    def labels(self, frame: int) -> np.ndarray:
        """[512, 512, 40]; noise is unknown. Raises InputError."""
        path = self.files[frame]
        try:
            rows = np.load(path, allow_pickle=False)
        except Exception as error:  # numpy raises whatever the damage makes it raise
            raise InputError(f"{path}: damaged; copy it again") from error
        if rows.ndim != 2 or rows.shape[1] not in (4, 7) or rows.dtype.kind not in "iuf":
            raise InputError(
                f"{path}: {rows.dtype} {rows.shape} instead of rows z, y, x, class; copy it again"
            )
        values = rows[:, [1, 2, 0, -1]]
        # a comparison with NaN is false
        if not ((values >= 0) & (values < (*self.grid, CLASSES + 1)) & (values % 1 == 0)).all():
            raise InputError(
                f"{path}: rows beyond {self.grid[2]}, {self.grid[0]}, {self.grid[1]} voxels (z, y, "
                f"x) or class {CLASSES}, or no whole numbers; copy it again"
            )
        *place, ids = values.astype(np.int64).T
        labels = np.zeros(self.grid, np.uint8)
        labels[tuple(place)] = np.where(ids == 0, UNKNOWN, ids)
        return labels

    def mask(self, frame: int) -> None:
        """All voxels are scored."""


def names_in(folder: Path) -> set[str]:
    """The names in a folder that may be absent."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
