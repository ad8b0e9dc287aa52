"""2-D pseudo labels: what their ids mean, which class of a benchmark that is, and their files.

Labels are 8-bit PNGs, one value a pixel, that mirror the images: those of DATA/a/b/c.jpg are in
LABELS/a/b/c.png. A label map names the ids, and for each gives the class of Occ3D-nuScenes and that
of SemanticKITTI that it stands for: `openseed21`, `cityscapes19`, `semantickitti20` (also what the
embedded world draws), or a JSON file, a list with an entry for every id:

    [{"name": "road", "occ3d": "driveable_surface", "kitti": "road"}, ...]

Any segmentation network writes them. With `transformers`, for KITTI and `cityscapes19`:

    name = "nvidia/segformer-b5-finetuned-cityscapes-1024-1024"
    segment = SegformerForSemanticSegmentation.from_pretrained(name).cuda()
    processor = AutoImageProcessor.from_pretrained(name)
    for path in data.glob("dataset/sequences/*/image_2/*.png"):
        image = Image.open(path).convert("RGB")
        with torch.no_grad():
            out = segment(**processor(image, return_tensors="pt").to("cuda"))
        (ids,) = processor.post_process_semantic_segmentation(out, [image.size[::-1]])
        target = (labels / path.relative_to(data)).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ids.byte().cpu().numpy()).save(target)
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from selfocc import InputError
from selfocc.config import Config, DataConfig
from selfocc.files import as_named

# The classes of the voxels by id; 0 is free. Occ3D's "others" (0) is merged into free and its
# "free" (17) moved there, as the published evaluation does.
OCC3D = (
    "free", "barrier", "bicycle", "bus", "car", "construction_vehicle", "motorcycle", "pedestrian",
    "traffic_cone", "trailer", "truck", "driveable_surface", "other_flat", "sidewalk", "terrain",
    "manmade", "vegetation",
)  # fmt: skip
SEMANTICKITTI = (
    "free", "car", "bicycle", "motorcycle", "truck", "other-vehicle", "person", "bicyclist",
    "motorcyclist", "road", "parking", "sidewalk", "other-ground", "building", "fence",
    "vegetation", "trunk", "terrain", "pole", "traffic-sign",
)  # fmt: skip

Palette = dict[int, tuple[str, tuple[int, int, int]]]  # class -> its name and colour
# a class that is not named here has the colour of the one that Occ3D knows it as
COLOURS = {
    "free": "969ca4", "barrier": "d68e4a", "bicycle": "e36b96", "bus": "f2b84b",
    "car": "4a86de", "construction_vehicle": "c4963c", "motorcycle": "be58b2",
    "pedestrian": "e54a4a", "traffic_cone": "f38235", "trailer": "7870ce", "truck": "5c62bc",
    "driveable_surface": "7a7486", "other_flat": "a89496", "sidewalk": "c4aebe",
    "terrain": "a0bc68", "manmade": "d8be96", "vegetation": "4a9458", "parking": "9686aa",
    "fence": "be8862", "trunk": "866246", "pole": "ecd660", "traffic-sign": "ee5a3c",
}  # fmt: skip

# classes of SemanticKITTI that Occ3D knows by another name
KITTI_AS_OCC3D = {
    "other-vehicle": "bus", "person": "pedestrian", "bicyclist": "bicycle",
    "motorcyclist": "motorcycle", "road": "driveable_surface", "parking": "driveable_surface",
    "other-ground": "other_flat", "building": "manmade", "fence": "manmade",
    "trunk": "vegetation", "pole": "manmade", "traffic-sign": "manmade",
}  # fmt: skip

# A row an id: its name, the class of Occ3D-nuScenes, the class of SemanticKITTI.
# As published: from OpenSeeD to Occ3D, from Cityscapes to SemanticKITTI; the others are ours.
TABLES = {
    "openseed21": (
        ("barrier", "barrier", "fence"),
        ("bicycle", "bicycle", "bicycle"),
        ("bus", "bus", "other-vehicle"),
        ("car", "car", "car"),
        ("construction_vehicle", "construction_vehicle", "other-vehicle"),
        ("crane", "construction_vehicle", "other-vehicle"),
        ("motorcycle", "motorcycle", "motorcycle"),
        ("person", "pedestrian", "person"),
        ("traffic_cone", "traffic_cone", "free"),
        ("trailer", "trailer", "other-vehicle"),
        ("trailer_truck", "trailer", "truck"),
        ("truck", "truck", "truck"),
        ("road", "driveable_surface", "road"),
        ("other_flat", "other_flat", "other-ground"),
        ("sidewalk", "sidewalk", "sidewalk"),
        ("terrain", "terrain", "terrain"),
        ("grass", "terrain", "terrain"),
        ("building", "manmade", "building"),
        ("wall", "manmade", "building"),
        ("tree", "vegetation", "vegetation"),
        ("sky", "free", "free"),
    ),
    "cityscapes19": (
        ("road", "driveable_surface", "road"),
        ("sidewalk", "sidewalk", "sidewalk"),
        ("building", "manmade", "building"),
        ("wall", "manmade", "building"),
        ("fence", "manmade", "fence"),
        ("pole", "manmade", "pole"),
        ("traffic light", "manmade", "traffic-sign"),
        ("traffic sign", "manmade", "traffic-sign"),
        ("vegetation", "vegetation", "vegetation"),
        ("terrain", "terrain", "terrain"),
        ("sky", "free", "free"),
        ("person", "pedestrian", "person"),
        ("rider", "bicycle", "bicyclist"),
        ("car", "car", "car"),
        ("truck", "truck", "truck"),
        ("bus", "bus", "other-vehicle"),
        ("train", "bus", "other-vehicle"),
        ("motorcycle", "motorcycle", "motorcycle"),
        ("bicycle", "bicycle", "bicycle"),
    ),
    "semantickitti20": tuple(
        (name, KITTI_AS_OCC3D.get(name, name), name) for name in SEMANTICKITTI
    ),
}


@dataclass(frozen=True)
class LabelMap:
    """The ids of pseudo labels: what they are called, and the voxel classes they stand for."""

    names: tuple[str, ...]
    occ3d: tuple[int, ...]  # places in OCC3D
    kitti: tuple[int, ...]  # places in SEMANTICKITTI

    def voxel_classes(self, dataset: str) -> tuple[int, ...]:
        """The class of a voxel of this data set for every id."""
        return self.occ3d if dataset == "nuscenes" else self.kitti


def voxel_names(dataset: str) -> tuple[str, ...]:
    """Names of the voxel classes of a data set by id; the first is free."""
    return OCC3D if dataset == "nuscenes" else SEMANTICKITTI


def voxel_palette(dataset: str) -> Palette:
    """Names and colours of the voxel classes of a data set."""
    known = {n: COLOURS.get(n) or COLOURS[KITTI_AS_OCC3D[n]] for n in voxel_names(dataset)}
    return {k: (n, tuple(bytes.fromhex(c))) for k, (n, c) in enumerate(known.items())}


def class_colours(palette: Palette | None) -> np.ndarray:
    """Colours, uint8 [256, 3], of classes; InputError without a palette. What it lacks is grey."""
    if not palette:
        raise InputError("classes are drawn with a palette; give one, as labels.voxel_palette does")
    return np.array([palette.get(k, ("", (155, 155, 155)))[1] for k in range(256)], np.uint8)


def label_map(data: DataConfig) -> LabelMap:
    """The label map that `data.label_map` names; the embedded world needs no name.

    Raises InputError where there is none, or for a file that is none.
    """
    name = data.label_map or ("semantickitti20" if data.dataset == "synthetic" else "")
    if name in TABLES:
        return _make(TABLES[name], name)
    if not name.endswith(".json"):
        raise InputError(
            f"--label-map {name or 'is missing: it'} must be one of {', '.join(TABLES)} or a file "
            "that ends with .json"
        )
    return _make(_read_table(Path(name)), name)


def _read_table(path: Path) -> list[tuple]:
    try:
        entries = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"--label-map {path}: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise InputError(f"--label-map {path}: not JSON ({error})") from None
    keys = ("name", "occ3d", "kitti")
    if (
        not isinstance(entries, list)
        or not 1 <= len(entries) <= 256
        or not all(isinstance(e, dict) and all(isinstance(e.get(k), str) for k in keys)
                   for e in entries)
    ):  # fmt: skip
        raise InputError(
            f"--label-map {path}: expected a list of 1 to 256 entries such as "
            '{"name": "road", "occ3d": "driveable_surface", "kitti": "road"}'
        )
    return [tuple(entry[key] for key in keys) for entry in entries]


def _make(rows, where: str) -> LabelMap:
    columns = []
    for place, known in ((1, OCC3D), (2, SEMANTICKITTI)):
        for row in rows:
            if row[place] not in known:
                raise InputError(
                    f"--label-map {where}: {row[0]!r} stands for {row[place]!r}, which is none of "
                    f"{', '.join(known)}"
                )
        columns.append(tuple(known.index(row[place]) for row in rows))
    return LabelMap(tuple(row[0] for row in rows), *columns)


def settle_classes(config: Config) -> Config:
    """`field.classes` as the label map has them where the semantic loss is on."""
    if not config.loss.weight_semantic:
        return config
    classes = len(label_map(config.data).names)
    return dataclasses.replace(config, field=dataclasses.replace(config.field, classes=classes))


def check_classes(config: Config) -> None:
    """Raises InputError unless the label map names the classes of a model that knows classes."""
    if not config.field.classes:
        return
    named = len(label_map(config.data).names)
    if named != config.field.classes:
        raise InputError(
            f"the model knows {config.field.classes} classes, the label map {named}; give the "
            "--label-map that it was trained with"
        )


@dataclass(frozen=True)
class PseudoLabels:
    """The label files that belong to a folder of images."""

    folder: Path  # --labels
    data: Path  # --data
    classes: int

    def read(self, image: Path, size: tuple[int, int]) -> np.ndarray:
        """Class ids, uint8 [h, w], of an image file; InputError as `read_label_map`."""
        return read_label_map(self.file(image), size, self.classes)

    def file(self, image: Path) -> Path:
        """The label file of an image below the data folder, whatever links lie between the two."""
        # where --data is a link into a data set, its images may be named without it
        for path in (as_named, Path.resolve):
            if path(image).is_relative_to(path(self.data)):
                below = path(image).relative_to(path(self.data))
                return (self.folder / below).with_suffix(".png")
        raise InputError(
            f"--labels mirrors --data, but {image} is not below {self.data}; name the folder that "
            "holds all of the data set"
        )


def pseudo_labels(folder: Path | None, data: Path, config: DataConfig) -> PseudoLabels | None:
    """The labels in `folder` for images in `data`; None without a folder. Raises InputError."""
    if folder is None:
        return None
    if not folder.is_dir():
        raise InputError(f"--labels {folder}: no such folder")
    return PseudoLabels(folder, data, len(label_map(config).names))


def read_label_map(path: Path, size: tuple[int, int], classes: int) -> np.ndarray:
    """Class ids, uint8 [h, w], of an 8-bit PNG of this size (h, w), each below `classes`.

    Raises InputError for a file that is missing, damaged, of another kind or size, or whose ids go
    beyond the label map.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: no such label map; write one for every image, or train without --labels"
        )
    try:
        with Image.open(path) as image:
            mode, labels = image.mode, np.asarray(image)
    except Exception as error:  # decoders raise whatever the damage makes them raise
        raise InputError(f"{path}: damaged or unreadable PNG; write it again") from error
    if mode not in ("L", "P"):  # of a palette, the indices are the ids
        raise InputError(f"{path}: PNG of mode {mode}, not of 8 bits and one channel")
    if labels.shape != tuple(size):
        raise InputError(
            f"{path}: {labels.shape[0]}x{labels.shape[1]} pixels, but its image has "
            f"{size[0]}x{size[1]}; write labels at the size of the image, without interpolation"
        )
    if labels.max() >= classes:
        raise InputError(
            f"{path}: id {labels.max()} is beyond the {classes} ids of the label map; choose the "
            "--label-map that belongs to these labels"
        )
    return labels
