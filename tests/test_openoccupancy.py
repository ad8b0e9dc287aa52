"""nuScenes against nuScenes-Occupancy: files, frames, the published script by hand, bad input."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from selfocc import InputError, evaluation, presets, protocols
from selfocc.datasets.nuscenes import nuscenes_sequences
from selfocc.datasets.nuscenes_voxels import OpenOccupancy
from selfocc.scores import Scores

BOX = OpenOccupancy.box
SHAPE = (64, 64, 40)  # voxels of 1.6 x 1.6 x 0.2 m instead of 512 x 512 x 40, for speed
# x right, y ahead of the LiDAR -> x ahead, y left of the vehicle
LIDAR_TO_EGO = torch.tensor([[0, 1, 0, 0.94], [-1, 0, 0, 0], [0, 0, 1, 1.84], [0, 0, 0, 1]])


def settings(protocol="corrected", **more):
    chosen = [
        "data.voxels=openoccupancy",
        *(f"{k.replace('__', '.')}={v}" for k, v in more.items()),
    ]
    of_nuscenes = presets.build("nuscenes", chosen)
    return of_nuscenes, protocols.choose(of_nuscenes, protocol)


# protocol


def street():
    """Labels over (y, x, z) of the LiDAR's frame: a road ahead, a wall on the right, a car."""
    truth = torch.zeros(SHAPE, dtype=torch.uint8)
    truth[12:52, 28:38, 15] = 11
    truth[12:52, 38, 15:28] = 15
    truth[40:43, 30:32, 16:24] = 4
    truth[20:24, 30:34, 18] = 255
    return truth


def volume_of(truth, classes=0):
    """A volume in the vehicle's frame that says what the labels say at the centres of voxels.

    Its nodes are these centres; in the vehicle's frame y is -x of the LiDAR, and x is y.
    """
    edge = 51.2 / SHAPE[0]
    corner = torch.tensor([-51.2 + edge, -51.2 + edge, -4.9, 1])
    x0, y0, z0 = (LIDAR_TO_EGO @ corner)[:3].tolist()
    box = (x0, y0 - 2 * (51.2 - edge), z0, x0 + 2 * (51.2 - edge), y0, z0 + 7.8)
    occupied = torch.where((truth > 0) & (truth < 255), -1.0, 1.0)
    ids = torch.where(truth == 255, 0, truth).long()
    logits = torch.nn.functional.one_hot(ids, 17).movedim(-1, 0)[1:] if classes else occupied[:0]
    grid = torch.cat([occupied[None], logits.float().reshape(-1, *SHAPE)])
    return grid.transpose(1, 2).flip(1)[None], box


def score(volume, box, truth, protocol, matrix=LIDAR_TO_EGO, **more):
    of_nuscenes, rules = settings(protocol, field__classes=0, **more)
    of_nuscenes = dataclasses.replace(
        of_nuscenes, volume=dataclasses.replace(of_nuscenes.volume, box=box)
    )
    scores = Scores(SimpleNamespace(config=of_nuscenes), rules)
    return scores.tables([scores.occupancy(volume, truth, matrix)])["occupancy"]


def test_true_voxels_are_perfect_and_moved_ones_are_not():
    truth = street()
    volume, box = volume_of(truth)
    row = score(volume, box, truth, "corrected")["SelfOcc"]
    assert (row["iou"], row["precision"], row["recall"], row["iou_above"]) == (1, 1, 1, 1)
    moves = (
        volume.roll(1, 2), volume.roll(1, 3), volume.roll(1, 4),
        volume.flip(2), volume.flip(3), volume.transpose(2, 3),
    )  # fmt: skip
    assert all(score(moved, box, truth, "corrected")["SelfOcc"]["iou"] < 0.96 for moved in moves)
    assert score(volume, box, truth, "corrected", matrix=None)["SelfOcc"]["iou"] < 0.5


def test_flat_ground_lies_where_the_road_is():
    """At z = 0 of the vehicle, which is 1.84 m below the LiDAR: the voxel from -2 to -1.8 m."""
    of_nuscenes, rules = settings()
    truth = torch.zeros(SHAPE, dtype=torch.uint8)
    truth[6:-6, 6:-6, 5:16] = 11  # the plane is at the top of voxel 15, and all below is full
    scores = Scores(SimpleNamespace(config=of_nuscenes), rules)
    table = scores.tables([scores.occupancy(torch.ones(1, 22, 3, 3, 3), truth, LIDAR_TO_EGO)])
    row = table["occupancy"]["flat ground, best threshold"]
    assert row["iou"] == 1 and abs(row["threshold"]) <= 0.1


def test_beyond_the_volume_is_free_unless_published():
    """A volume all of which is occupied, 20 m wide: corrected it ends, published it goes on."""
    volume, box = torch.full((1, 1, 3, 3, 3), -1.0), (-10.0, -10.0, -1.0, 10.0, 10.0, 5.4)
    _, rules = settings("corrected")
    sdf, likeliest = protocols.read_voxels(volume, 0, rules, box, SHAPE, LIDAR_TO_EGO)
    x, y, z = torch.meshgrid(*protocols.centres(BOX, SHAPE), indexing="ij")
    inside = (x.abs() < 10) & ((y + 0.94).abs() < 10) & (z + 1.84 > -1) & (z + 1.84 < 5.4)
    assert torch.equal(sdf <= 0, inside.transpose(0, 1)) and likeliest is None
    assert sdf[~inside.transpose(0, 1)].isinf().all()
    narrow, _ = protocols.read_voxels(volume, 0, rules, box, SHAPE, None)  # of the LiDAR's frame
    x_inside = (narrow <= 0).any(dim=2).any(dim=0)
    assert torch.equal(x_inside, protocols.centres(BOX, SHAPE)[0].abs() < 10)
    _, rules = settings("published")
    sdf, _ = protocols.read_voxels(volume, 0, rules, box, SHAPE, LIDAR_TO_EGO)
    assert (sdf == -1).all()


def test_classes_are_read_where_the_sdf_is():
    truth = street()
    volume, box = volume_of(truth, classes=16)
    _, rules = settings("corrected")
    sdf, likeliest = protocols.read_voxels(volume, 16, rules, box, SHAPE, LIDAR_TO_EGO)
    known = (truth > 0) & (truth < 255)
    assert torch.equal(sdf <= 0, known)
    assert torch.equal(likeliest[known] + 1, truth[known].long())


def test_the_published_script_by_hand():
    """What it reads, frees and counts, written out on 16 x 16 x 12 voxels."""
    shape = (16, 16, 12)
    _, rules = settings("published")
    freed = rules.crop(torch.full(shape, -1.0)).isinf()
    kept = torch.zeros(shape, dtype=torch.bool)
    kept[6:10, 6:10, 5:8] = True  # of 12 levels, 5 below and 4 above
    assert torch.equal(~freed, kept)
    # nodes where its points are, from end to end of the box; the matrix is not heeded
    volume = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(0))
    sdf, _ = protocols.read_voxels(volume, 0, rules, BOX, shape, LIDAR_TO_EGO)
    assert torch.allclose(sdf, volume[0, 0], atol=1e-4)
    truth = torch.zeros(shape, dtype=torch.uint8)
    truth[4:9, 7:12, 2:7] = 15
    row = score(volume, BOX, truth, "published")["SelfOcc"]
    occupied = (volume[0, 0] <= 0) & kept
    both, either = (occupied & (truth > 0)).sum(), (occupied | (truth > 0)).sum()
    assert row["iou"] == pytest.approx(float(both / either)) and 0 < both < either
    of_nuscenes, _ = settings()
    scores = Scores(SimpleNamespace(config=of_nuscenes), rules)
    assert "semantics" not in scores.occupancy(torch.ones(1, 22, 3, 3, 3), truth)


def test_margins_of_pooled_voxels():
    _, rules = settings("own", volume__voxel=2)
    kept = rules.crop(torch.ones(256, 256, 20)) == 1
    assert kept.sum() == 250 * 250 * (20 - 3 - 2) and not kept[..., :3].any()
    _, rules = settings("own", volume__crop_margins="false")
    assert rules.scored == protocols.ALL and rules.box == BOX


# files


@pytest.fixture
def scene(ring_files, tmp_path, monkeypatch):
    """Opens the exported scene."""
    monkeypatch.setenv("SELFOCC_CACHE", str(tmp_path))

    def open_scene(frame="lidar", voxels="openoccupancy"):
        (sequence,) = nuscenes_sequences(
            ring_files, "v1.0-trainval", "val", volume_frame=frame, voxels=voxels
        )
        return sequence

    return open_scene


def test_exported_labels_are_where_the_world_is(ring, scene):
    """Every occupied voxel of the ring, and the points of the scan, through the tables alone."""
    sequence = scene("ego")
    assert sequence.labelled == [0, 5] and sequence.missing == []
    labels, matrix = sequence.voxels(0), sequence.voxels_to_volume(0)
    assert labels.shape == (512, 512, 40) and sequence.voxel_mask(0) is None
    assert set(np.unique(labels)) <= set(range(17)) and (labels > 0).sum() > 10_000
    x, y, z = (metres.numpy() for metres in protocols.centres(BOX, labels.shape))
    place = np.argwhere(labels > 0)[::50]
    centres = np.stack([x[place[:, 1]], y[place[:, 0]], z[place[:, 2]]], 1)
    centres = centres @ matrix[:3, :3].T + matrix[:3, 3]
    solid = ring.signed_distance(0, centres) < 0.4  # 0.2 m from there to a voxel of the world
    mirrored = ring.signed_distance(0, centres * [-1, 1, 1]) < 0.4
    assert solid.mean() > 0.999 and mirrored.mean() < 0.95
    truth = scene("ego", "occ3d").voxels(0)  # 40 m around the vehicle, voxels of 0.4 m
    i, j, k = np.floor((centres - [-40, -40, -1]) / 0.4).astype(int).T
    assert np.array_equal(truth[j, i, k], labels[tuple(place.T)])

    lidar = scene("lidar")
    assert lidar.voxels_to_volume(0) is None
    points = lidar.lidar(0)
    points = points[(np.abs(points[:, :2]) < 30).all(1)]

    def hits(points):
        i, j, k = np.floor((points - BOX[:3]) / 0.2).astype(int).T
        return (labels[j, i, k] > 0).mean()

    assert hits(points) > 0.8
    for mirror in ([-1, 1, 1], [1, -1, 1], [1, 1, -1]):
        assert hits(points * mirror) < hits(points) - 0.1


class Frame:
    """A data set of one frame, with labels that are given."""

    def __init__(self, sequence, labels):
        self.sequence, self.labels = sequence, labels

    def locate(self, index):
        return self.sequence, index

    def __getitem__(self, index):
        return SimpleNamespace(voxels=torch.from_numpy(self.labels))


@pytest.mark.parametrize(("protocol", "ids"), [("published", [0, 1, 4]), ("own", [0, 4, 255])])
def test_noise_is_scored_as_published_alone(protocol, ids, scene, monkeypatch):
    labels = np.zeros((512, 512, 40), np.uint8)
    labels[100, 200, 20], labels[101, 200, 20] = 255, 4
    stacked = lambda samples: SimpleNamespace(voxels=samples[0].voxels[None])  # noqa: E731
    monkeypatch.setattr(evaluation, "collate", stacked)
    frame = Frame(scene("ego"), labels)
    config, rules = settings(protocol)
    sample = evaluation.Labelled(frame, rules, ("occupancy",), config.volume)[0]
    assert sample.labels.unique().tolist() == ids and labels[100, 200, 20] == 255
    assert sample.voxels_to_volume is not None


ROWS = np.array([[3, 5, 7, 4], [0, 0, 511, 16], [39, 511, 0, 0]])


def written(ring_files, rows):
    file = ring_files / "nuScenes-Occupancy" / "scene_a" / "occupancy" / "b.npy"
    file.parent.mkdir(parents=True)
    np.save(file, rows)
    return OpenOccupancy(ring_files, "a", {0: "b", 5: "c"}), file


@pytest.mark.parametrize("kind", [np.int16, np.int64, np.float32, "velocity"])
def test_rows_are_z_y_x_class(kind, tmp_path):
    if kind == "velocity":
        rows = np.insert(ROWS.astype(float), [3, 3, 3], [0.5, -2.0, 0.1], axis=1)
    else:
        rows = ROWS.astype(kind)
    voxels, _ = written(tmp_path, rows)
    assert list(voxels.files) == [0]
    labels = voxels.labels(0)
    assert np.argwhere(labels).tolist() == [[0, 511, 0], [5, 7, 3], [511, 0, 39]]
    assert labels[labels > 0].tolist() == [16, 4, 255]


BAD = {
    "no table": (np.zeros((512, 512, 40), np.uint8), "instead of rows z, y, x, class"),
    "three columns": (ROWS[:, :3], "instead of rows"),
    "words": (ROWS.astype(str), "instead of rows"),
    "z is too large": (ROWS + np.array([1, 0, 0, 0]), "rows beyond 40, 512, 512"),
    "x is too large": (ROWS + np.array([0, 0, 1, 0]), "rows beyond"),
    "z is last": (ROWS[:, [2, 1, 0, 3]], "rows beyond"),
    "negative": (ROWS - np.array([0, 1, 0, 0]), "rows beyond"),
    "class": (ROWS + np.array([0, 0, 0, 1]), "class 16"),
    "not finite": (ROWS * [[1, 1, 1, np.nan]], "no whole numbers"),
    "halves": (ROWS * 0.5, "no whole numbers"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_rows(what, tmp_path):
    rows, message = BAD[what]
    voxels, file = written(tmp_path, rows)
    with pytest.raises(InputError, match=message) as error:
        voxels.labels(0)
    assert str(file) in error.value.line() and "\n" not in error.value.line()


def test_torn_files(tmp_path):
    voxels, file = written(tmp_path, ROWS)
    whole = file.read_bytes()
    for size in (0, 5, 60, len(whole) - 3):
        file.write_bytes(whole[:size])
        with pytest.raises(InputError, match="damaged; copy it again"):
            voxels.labels(0)


def test_what_is_missing_is_said(scene, ring_files):
    (ring_files / "nuScenes-Occupancy").rename(ring_files / "away")
    try:
        sequence = scene()
    finally:
        (ring_files / "away").rename(ring_files / "nuScenes-Occupancy")
    assert sequence.labelled == [] and sequence.voxels(0) is None
    assert sequence.missing[-1].startswith("no nuScenes-Occupancy of some scenes")
