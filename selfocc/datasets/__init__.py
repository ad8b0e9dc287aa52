"""Data sets: one file each, all read through `video.VideoDataset`."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from selfocc import InputError
from selfocc.config import Config, DataConfig
from selfocc.datasets.kitti import TRAIN_SEQUENCES, VAL_SEQUENCES, kitti_sequences
from selfocc.datasets.kitti_files import parse_range
from selfocc.datasets.kitti_raw import kitti_raw_sequences
from selfocc.datasets.nuscenes import nuscenes_sequences
from selfocc.datasets.video import Sequence, VideoDataset
from selfocc.labels import pseudo_labels


@dataclass(frozen=True)
class Folders:
    """Where the files of a data set are; None for what it does not need."""

    data: Path | None = None  # the data set as it was downloaded
    labels: Path | None = None  # 2-D pseudo labels, laid out as the images are
    splits: Path | None = None  # KITTI raw: split files
    poses: Path | None = None  # KITTI raw: one pose file a drive


def open_dataset(config: Config, split: str, folders: Folders) -> VideoDataset:
    """The data set that a configuration names, split `train` or `val`, for training.

    Truth that cannot be read is told on stderr and left out, as training does not need it. Raises
    InputError for an unknown data set, a missing folder, or files that cannot be used.
    """
    sequences = open_sequences(config.data, split, folders)
    train = split == "train"
    return VideoDataset([_Lenient(s, train) for s in sequences], config.data, train)


class _Lenient:
    """A sequence whose damaged truth counts as not there; of `val` also the pseudo labels."""

    TRUTH = ("depth", "lidar", "voxels", "stereo_pair")

    def __init__(self, sequence: Sequence, train: bool):
        self._sequence, self._told = sequence, set()
        self._truth = self.TRUTH if train else (*self.TRUTH, "semantics")

    def __getattr__(self, name: str):
        if name.startswith("_"):  # not while it is unpickled
            raise AttributeError(name)
        value = getattr(self._sequence, name)
        return partial(self._read, value) if name in self._truth else value

    def _read(self, read, frame: int):
        try:
            return read(frame)
        except InputError as error:
            if str(error) not in self._told:
                self._told.add(str(error))
                tqdm.write(f"note: {error.line()} (training goes on without)", file=sys.stderr)
            return None


def open_sequences(config: DataConfig, split: str, folders: Folders) -> list[Sequence]:
    if config.dataset == "synthetic":
        # here, so that `python -m selfocc.datasets.synthetic` does not import itself twice
        from selfocc.datasets.synthetic import SyntheticConfig, prerender, synthetic_sequences

        world = SyntheticConfig(rig=config.rig, image_size=config.crop, frames=config.frames)
        scenes = config.scenes if split == "train" else config.scenes_val
        sequences = synthetic_sequences(world, split, scenes)
        prerender(sequences)
        return sequences
    if config.dataset == "kitti":
        if folders.data is None:
            raise InputError(
                "--dataset kitti needs --data DIR, the folder that holds `dataset/sequences`"
            )
        chosen = config.train if split == "train" else config.val
        if not chosen:
            chosen = ",".join(TRAIN_SEQUENCES if split == "train" else VAL_SEQUENCES)
        parts = [parse_range(part) for part in chosen.split(",")]
        labels = pseudo_labels(folders.labels, folders.data, config)
        return [
            sequence
            for name, frames in parts
            for sequence in kitti_sequences(folders.data, [name], frames, labels)
        ]
    if config.dataset == "kitti_raw":
        if folders.data is None:
            raise InputError("--dataset kitti_raw needs --data DIR, which holds 2011_09_26, ...")
        chosen = config.train if split == "train" else config.val
        labels = pseudo_labels(folders.labels, folders.data, config)
        return kitti_raw_sequences(
            folders.data, split, chosen, folders.splits, folders.poses, labels
        )
    if config.dataset == "nuscenes":
        if folders.data is None:
            raise InputError(
                "--dataset nuscenes needs --data DIR, which holds samples and v1.0-trainval, ..."
            )
        chosen = config.train if split == "train" else config.val
        labels = pseudo_labels(folders.labels, folders.data, config)
        return nuscenes_sequences(
            folders.data, config.version, split, chosen, config.volume_frame, labels, config.voxels
        )
    raise InputError(
        f"unknown data set {config.dataset!r}; known: synthetic, kitti, kitti_raw, nuscenes"
    )
