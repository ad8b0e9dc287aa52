"""Label maps and label files: read, refused, and equal to the published tables."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from selfocc import InputError
from selfocc.config import DataConfig
from selfocc.datasets.kitti import kitti_sequences
from selfocc.labels import (
    OCC3D,
    SEMANTICKITTI,
    TABLES,
    PseudoLabels,
    label_map,
    pseudo_labels,
    read_label_map,
    settle_classes,
)
from selfocc.presets import build
from tests.test_kitti import HEIGHT, WIDTH, root  # noqa: F401 - a fixture

ROAD = {"name": "road", "occ3d": "driveable_surface", "kitti": "road"}


def named(name):
    return label_map(DataConfig(dataset="kitti", label_map=name))


def test_the_published_tables():
    """The look-up tables of the published evaluation, as they were recorded."""
    openseed = [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 9, 10, 11, 12, 13, 14, 14, 15, 15, 16, 0]
    cityscapes = [9, 11, 13, 13, 14, 18, 19, 19, 15, 17, 0, 6, 7, 1, 4, 5, 5, 3, 2]
    assert list(named("openseed21").voxel_classes("nuscenes")) == openseed
    assert list(named("cityscapes19").voxel_classes("kitti")) == cityscapes
    assert list(named("semantickitti20").kitti) == list(range(20))
    assert len(OCC3D) == 17 and len(SEMANTICKITTI) == 20


def test_a_label_map_of_ones_own(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([ROAD, {"name": "air", "occ3d": "free", "kitti": "free"}]))
    assert named(str(file)).names == ("road", "air")
    assert named(str(file)).occ3d == (11, 0) and named(str(file)).kitti == (9, 0)


@pytest.mark.parametrize(
    "content, said",
    [
        ("[", "not JSON"),
        ("{}", "expected a list of 1 to 256 entries"),
        ("[]", "expected a list of 1 to 256 entries"),
        (json.dumps([{"name": "road"}]), "expected a list of 1 to 256 entries"),
        (json.dumps([ROAD | {"kitti": "raod"}]), "'road' stands for 'raod', which is none of"),
    ],
)
def test_a_wrong_label_map(content, said, tmp_path):
    file = tmp_path / "map.json"
    file.write_text(content)
    with pytest.raises(InputError, match=said):
        named(str(file))


def test_a_label_map_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        named(str(tmp_path / "map.json"))
    with pytest.raises(InputError, match="openseed must be one of openseed21, cityscapes19"):
        named("openseed")
    with pytest.raises(InputError, match="--label-map is missing"):
        named("")
    with pytest.raises(InputError, match="no such folder"):
        pseudo_labels(tmp_path / "labels", tmp_path, DataConfig(label_map="cityscapes19"))


def test_the_semantic_loss_sets_the_number_of_classes():
    settings = ["data.dataset=kitti", "data.label_map=cityscapes19"]
    assert settle_classes(build("kitti", settings)).field.classes == 0
    settings.append("loss.weight_semantic=0.1")
    assert settle_classes(build("kitti", settings)).field.classes == len(TABLES["cityscapes19"])
    assert settle_classes(build("synthetic", settings[2:])).field.classes == 20


def test_reads_grey_and_palette(tmp_path):
    ids = np.arange(6, dtype=np.uint8).reshape(2, 3)
    grey, palette = Image.fromarray(ids), Image.fromarray(ids, mode="P")
    palette.putpalette(list(range(255, -1, -1)) * 3)
    for image in (grey, palette):
        image.save(tmp_path / "a.png")
        assert np.array_equal(read_label_map(tmp_path / "a.png", (2, 3), 6), ids)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda p: p.unlink(), "no such label map"),
        (lambda p: p.write_bytes(p.read_bytes()[:50]), "damaged or unreadable"),
        (lambda p: Image.new("RGB", (3, 2)).save(p), "mode RGB, not of 8 bits"),
        (lambda p: Image.new("I;16", (3, 2)).save(p), "not of 8 bits"),
        (lambda p: Image.new("L", (2, 3)).save(p), "3x2 pixels, but its image has 2x3"),
        (lambda p: Image.new("L", (3, 2), 19).save(p), "id 19 is beyond the 19 ids"),
    ],
)
def test_label_files_that_cannot_be_used(change, said, tmp_path):
    path = tmp_path / "a.png"
    Image.new("L", (3, 2), 18).save(path)
    assert read_label_map(path, (2, 3), 19).max() == 18
    change(path)
    with pytest.raises(InputError, match=f"a.png: .*{said}"):
        read_label_map(path, (2, 3), 19)


def test_labels_mirror_the_images(root, tmp_path):  # noqa: F811
    folder = tmp_path / "labels" / "dataset" / "sequences" / "03" / "image_2"
    folder.mkdir(parents=True)
    ids = np.random.default_rng(0).integers(0, 19, (HEIGHT, WIDTH), dtype=np.uint8)
    Image.fromarray(ids).save(folder / "000002.png")
    labels = PseudoLabels(tmp_path / "labels", root, 19)
    sequence = kitti_sequences(root, ["03"], None, labels)[0]
    assert np.array_equal(sequence.semantics(2), ids[None])
    with pytest.raises(InputError, match="no such label map"):
        sequence.semantics(3)
    elsewhere = PseudoLabels(tmp_path / "labels", root / "dataset" / "poses", 19)
    with pytest.raises(InputError, match="--labels mirrors --data, but"):
        kitti_sequences(root, ["03"], None, elsewhere)[0].semantics(2)


@pytest.mark.parametrize(
    "link, data",
    [
        ("dataset/sequences/03/image_2", ""),
        ("dataset/sequences/03", ""),
        ("dataset/sequences", ""),
        ("dataset", ""),
        ("dataset/sequences/03/image_2", "dataset"),
        ("dataset/sequences/03/image_2", "dataset/poses/.."),
        ("dataset/sequences/03/image_2", "dataset/sequences/03"),
        ("dataset/sequences/03", "dataset/sequences/03"),
        ("dataset", "dataset/sequences"),
        ("", ""),
        ("", "dataset"),
    ],
)
@pytest.mark.parametrize("relative", [False, True])
def test_labels_mirror_images_behind_links(link, data, relative, root, tmp_path, monkeypatch):  # noqa: F811
    """Whichever folder is a link, labels lie where the images are named to be, below --data."""
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "dataset").rename(home / "dataset")
    (home / link).rename(tmp_path / "elsewhere")
    (home / link).symlink_to(tmp_path / "elsewhere")
    named = home / data
    if relative:
        monkeypatch.chdir(tmp_path)
        named = named.relative_to(tmp_path)
    below = (home / "dataset/sequences/03/image_2").relative_to(os.path.normpath(home / data))
    folder = tmp_path / "labels" / below
    folder.mkdir(parents=True)
    ids = np.random.default_rng(0).integers(0, 19, (HEIGHT, WIDTH), dtype=np.uint8)
    Image.fromarray(ids).save(folder / "000002.png")
    labels = PseudoLabels(tmp_path / "labels", named, 19)
    sequence = kitti_sequences(named, ["03"], None, labels)[0]
    assert np.array_equal(sequence.semantics(2), ids[None])


def test_data_named_by_a_link_into_the_data_set(root, tmp_path):  # noqa: F811
    """The folder that the link names has no `dataset` above it, its target has."""
    (tmp_path / "away").mkdir()
    named = tmp_path / "away" / "six"
    named.symlink_to(root / "dataset/sequences/03")
    sequence = kitti_sequences(named, ["03"], None, None)[0]
    path = sequence.folder / "image_2" / "000002.png"
    labels = PseudoLabels(tmp_path / "labels", named, 19)
    assert labels.file(path) == tmp_path / "labels" / "image_2" / "000002.png"
