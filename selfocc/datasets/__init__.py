"""Data sets: one file each, all read through `video.VideoDataset`."""

import sys
from dataclasses import fields
from functools import partial

from tqdm import tqdm

from selfocc import InputError
from selfocc.batch import Sequence
from selfocc.config import Config, DataConfig
from selfocc.datasets.kitti import TRAIN_SEQUENCES, VAL_SEQUENCES, kitti_sequences
from selfocc.datasets.kitti_files import parse_range
from selfocc.datasets.kitti_raw import kitti_raw_sequences
from selfocc.datasets.nuscenes import nuscenes_sequences
from selfocc.datasets.video import VideoDataset
from selfocc.files import Folders
from selfocc.labels import pseudo_labels

# what is read of each data set, and what --data names
READ = {
    "synthetic": (),
    "kitti": ("data", "labels"),
    "kitti_raw": ("data", "labels", "splits", "poses"),
    "nuscenes": ("data", "labels"),
}
HOLDS = {
    "kitti": "`dataset/sequences`",
    "kitti_raw": "2011_09_26, ...",
    "nuscenes": "samples and v1.0-trainval, ...",
}


def open_dataset(config: Config, split: str, folders: Folders) -> VideoDataset:
    """The data set that a configuration names, split `train` or `val`, for training.

    Truth that cannot be read is told on stderr and left out, as training does not need it. Raises
    InputError for a missing folder, one that is not read, or files that cannot be used.
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
    name, data = config.dataset, folders.data
    for folder in fields(folders):
        at = getattr(folders, folder.name)
        if at is not None and folder.name not in READ[name]:
            raise InputError(
                f"{at} is given for {folder.name}, which data set {name} does not read; name "
                "another with --dataset, or leave it out"
            )
    if name == "synthetic":
        # here, so that `python -m selfocc.datasets.synthetic` does not import itself twice
        from selfocc.datasets.synthetic import SyntheticConfig, prerender, synthetic_sequences

        world = SyntheticConfig(rig=config.rig, image_size=config.crop, frames=config.frames)
        scenes = config.scenes if split == "train" else config.scenes_val
        sequences = synthetic_sequences(world, split, scenes)
        prerender(sequences)
        return sequences
    if data is None:
        raise InputError(f"--dataset {name} needs --data DIR, the folder that holds {HOLDS[name]}")
    chosen = config.train if split == "train" else config.val
    labels = pseudo_labels(folders.labels, data, config)
    if name == "kitti_raw":
        return kitti_raw_sequences(data, split, chosen, folders.splits, folders.poses, labels)
    if name == "nuscenes":
        return nuscenes_sequences(
            data, config.version, split, chosen, config.volume_frame, labels, config.voxels
        )
    official = TRAIN_SEQUENCES if split == "train" else VAL_SEQUENCES
    parts = [parse_range(part) for part in (chosen or ",".join(official)).split(",")]
    return [s for name, frames in parts for s in kitti_sequences(data, [name], frames, labels)]
