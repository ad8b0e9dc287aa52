"""Data sets: one file each, all read through `video.VideoDataset`."""

import functools
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from tqdm import tqdm

from selfocc import InputError, presets
from selfocc.batch import Sequence
from selfocc.config import Config, DataConfig, Folders
from selfocc.datasets.kitti import TRAIN_SEQUENCES, VAL_SEQUENCES, kitti_sequences
from selfocc.datasets.kitti_raw import kitti_raw_sequences
from selfocc.datasets.nuscenes import nuscenes_sequences
from selfocc.datasets.posed import posed_sequences, suggested
from selfocc.datasets.reading import parse_range
from selfocc.datasets.synthetic import SyntheticConfig, prerender, synthetic_sequences
from selfocc.datasets.video import VideoDataset
from selfocc.labels import pseudo_labels

# what is read of each data set, and what --data names
READ = {
    "synthetic": (),
    "kitti": ("data", "labels"),
    "kitti_raw": ("data", "labels", "splits", "poses"),
    "nuscenes": ("data", "labels"),
    "posed": ("data", "labels"),
}
HOLDS = {
    "kitti": "`dataset/sequences`",
    "kitti_raw": "2011_09_26, ...",
    "nuscenes": "samples and v1.0-trainval, ...",
    "posed": "transforms.json, sparse/0 or poses.txt",
}
TRUTH = ("depth", "lidar", "voxels", "stereo_pair")


def usual(
    preset: str | None, dataset: str | None, data: Path | None
) -> tuple[str | None, list[str]]:
    """The preset to take where none is named, and what it needs to be told of the data.

    Of footage, that follows from its cameras. Raises InputError.
    """
    if data is None or (dataset or (preset and presets.build(preset).data.dataset)) != "posed":
        return preset or dataset, []
    suited, cameras = suggested(data)
    return preset or suited, [f"encoder.cameras={cameras}"]


def open_dataset(config: Config, split: str, folders: Folders) -> VideoDataset:
    """The data set that a configuration names, split `train` or `val`, for training.

    Truth that cannot be read is told on stderr and left out, as training does not need it; of `val`
    that goes for pseudo labels too. Raises InputError for a missing folder, one that is not read,
    or files that cannot be used.
    """
    sequences, train = open_sequences(config.data, split, folders), split == "train"
    for sequence in sequences:
        for name in TRUTH if train else (*TRUTH, "semantics"):
            setattr(sequence, name, functools.partial(_read_or_tell, getattr(sequence, name)))
    return VideoDataset(sequences, config.data, train)


def _read_or_tell(read: Callable, frame: int):
    try:
        return read(frame)
    except InputError as error:
        _tell(error.line())


@functools.cache
def _tell(reason: str) -> None:
    tqdm.write(f"note: {reason} (training goes on without)", file=sys.stderr)


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
        world = SyntheticConfig(
            rig=config.rig, image_size=config.crop, frames=config.frames, looks=config.looks,
            rigs=config.looks,
        )  # fmt: skip
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
    if name == "posed":
        return posed_sequences(data, split, chosen, config, labels)
    if name == "nuscenes":
        return nuscenes_sequences(
            data, config.version, split, chosen, config.volume_frame, labels, config.voxels
        )
    official = TRAIN_SEQUENCES if split == "train" else VAL_SEQUENCES
    parts = [parse_range(part) for part in (chosen or ",".join(official)).split(",")]
    return [s for name, frames in parts for s in kitti_sequences(data, [name], frames, labels)]
