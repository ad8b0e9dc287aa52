"""The nuScenes loader on an exported street, whole and broken, and on a real excerpt."""

import json
import os
import pickle
import shutil
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from selfocc import InputError
from selfocc.datasets import Folders, open_dataset
from selfocc.datasets.check import Report
from selfocc.datasets.export_nuscenes import EGO_TO_GLOBAL, OCC3D_CLASS
from selfocc.datasets.nuscenes import nuscenes_sequences, official_val
from selfocc.datasets.nuscenes_tables import CHANNELS, Tables, _below, stream, whole
from selfocc.datasets.overlays import overlay
from selfocc.datasets.video import VideoDataset
from selfocc.labels import PseudoLabels
from selfocc.presets import build

REAL = Path(__file__).parents[2] / "shared" / "data" / "nuscenes"
VERSION = "v1.0-trainval"


@pytest.fixture
def root(ring_files, tmp_path, monkeypatch):
    """A copy to break."""
    monkeypatch.setenv("SELFOCC_CACHE", str(tmp_path / "cache"))
    shutil.copytree(ring_files, tmp_path / "data")
    return tmp_path / "data"


def only(root, **options):
    (sequence,) = nuscenes_sequences(root, VERSION, "val", **options)
    return sequence


def edit(root, name, change):
    path = root / VERSION / f"{name}.json"
    rows = json.loads(path.read_text())
    change(rows)
    path.write_text(json.dumps(rows, indent=0))


def test_an_exported_scene_is_the_world_itself(ring, root):
    sequence = only(root)
    assert (sequence.name, sequence.frames) == ("scene-0003", 6)
    assert sequence.inputs == sequence.labelled == [0, 5] and sequence.missing == []
    to_ego = ring.rig.volume_to_ego
    ego = np.stack([ring.volume_to_world(f) @ np.linalg.inv(to_ego) for f in range(6)])[:, :3, 3]
    assert np.allclose(sequence.path[1:], np.linalg.norm(np.diff(ego, axis=0), axis=1).cumsum())
    for frame in range(6):
        intrinsics, camera_to_world = sequence.cameras(frame)
        expected, poses = ring.cameras(frame)
        camera_to_world[:, :3, 3] -= EGO_TO_GLOBAL
        assert np.allclose(camera_to_world, poses, atol=1e-9) and np.array_equal(
            intrinsics, expected
        )
        assert np.array_equal(sequence.images(frame), ring.images(frame))
        volume = sequence.volume_to_world(frame) @ to_ego  # the volume of nuScenes is the ego's
        volume[:3, 3] -= EGO_TO_GLOBAL
        assert np.allclose(volume, ring.volume_to_world(frame), atol=1e-9)
    for frame in (0, 5):
        ego_points = ring.lidar(frame) @ to_ego[:3, :3].T + to_ego[:3, 3]
        assert np.allclose(sequence.lidar(frame), ego_points, atol=1e-4)
        labels = ring.voxels(frame)
        assert np.array_equal(sequence.voxels(frame), OCC3D_CLASS[labels] % 17)
        assert np.array_equal(sequence.voxel_mask(frame), labels != 255)
    assert sequence.lidar(1) is None and sequence.voxels(1) is None
    assert np.array_equal(pickle.loads(pickle.dumps(sequence)).image(5, 2), ring.image(5, 2))


def test_lidar_volume_frame(root):
    ego, lidar = only(root), only(root, volume_frame="lidar")
    points = np.c_[lidar.lidar(0), np.ones(len(lidar.lidar(0)))]
    there = points @ (np.linalg.inv(ego.volume_to_world(0)) @ lidar.volume_to_world(0)).T
    assert np.allclose(there[:, :3], ego.lidar(0), atol=1e-4)
    # x of the vehicle is y of its LiDAR
    assert np.allclose(lidar.voxels_to_volume(0)[:3, 0], [0, 1, 0], atol=1e-9)
    assert ego.voxels_to_volume(0) is None


def test_sweeps_follow_the_camera_that_has_the_fewest(root):
    def thin(rows):  # CAM_BACK keeps its sweeps of frames 1 and 3
        gone = [f"__CAM_BACK__{1_600_000_000_000_000 + f * 100_000}." for f in (2, 4)]
        rows[:] = [r for r in rows if not any(g in r["filename"] for g in gone)]

    edit(root, "sample_data", thin)
    sequence = only(root)
    assert sequence.frames == 4 and sequence.inputs == [0, 3]
    times = (sequence._views["time"] - 1_600_000_000_000_000) // 100_000
    assert (times == times[:, :1]).all() and times[:, 0].tolist() == [0, 1, 3, 5]


def test_every_sensor_has_its_own_ego_pose(root):
    def move(rows):
        pose = next(r for r in rows if r["token"] == late)
        pose["translation"][2] += 1.5

    path = root / VERSION / "sample_data.json"
    late = next(
        r["ego_pose_token"] for r in stream(path) if r["filename"].startswith("samples/CAM_BACK/")
    )
    before = only(root).cameras(0)[1]
    edit(root, "ego_pose", move)
    moved = only(root).cameras(0)[1] - before
    back = CHANNELS.index("CAM_BACK")
    assert moved[back, 2, 3] == pytest.approx(1.5)
    assert not np.delete(moved, back, 0).any()


def test_missing_images(root):
    shutil.rmtree(root / "sweeps")
    sequence = only(root)
    assert sequence.frames == 2
    assert sequence.missing == ["no sweeps: frames are 0.5 s apart"]
    next((root / "samples" / "CAM_BACK").iterdir()).unlink()
    with pytest.raises(InputError, match="images of scene-0003 are missing"):
        only(root)


START, PERIOD = 1_600_000_000_000_000, 100_000  # microseconds


def at(rows, channel, frame):
    """The row of a channel's image of a frame."""
    stamp = f"__{channel}__{START + frame * PERIOD}."
    (row,) = (row for row in rows if stamp in row["filename"])
    return row


def test_what_counts_is_the_time_between_frames(root):
    def all_keys(rows):
        for row in rows:
            row |= {"is_key_frame": True, "sample_token": f"sample {row['timestamp']}"}

    def samples(rows):
        times = (START + frame * PERIOD for frame in range(6))
        rows[:] = [dict(rows[0], token=f"sample {t}", timestamp=t) for t in times]

    edit(root, "sample_data", all_keys)
    edit(root, "sample", samples)
    sequence = only(root)
    assert sequence.inputs == list(range(6)) == list(sequence._scans)
    assert not any("sweeps" in line for line in sequence.missing)  # 10 Hz


def assert_same(sequence, other):
    for field in ("file", "time", "token", "rotation", "translation"):
        assert np.array_equal(sequence._views[field], other._views[field]), field
    assert sequence.inputs == other.inputs and sequence._scans == other._scans
    assert sequence.tokens.tolist() == other.tokens.tolist()
    for frame in range(sequence.frames):
        for matrix, true in zip(sequence.cameras(frame), other.cameras(frame), strict=True):
            assert np.array_equal(matrix, true)


TABLES = ("sample_data", "sample", "ego_pose", "calibrated_sensor", "scene", "sensor")


@pytest.mark.parametrize("name", TABLES)
def test_rows_that_are_there_twice(root, name):
    def again(rows):
        row = at(rows, "CAM_BACK", 0) if name == "sample_data" else rows[0]
        rows.insert(0, dict(row))

    def contradict(rows):
        column = next(c for c in ("translation", "timestamp", "name", "channel") if c in rows[0])
        rows[0][column] = [9, 9, 9] if column == "translation" else f"{rows[0][column]}0"

    sound = only(root)
    edit(root, name, again)
    sequence = only(root)
    assert_same(sequence, sound)
    (note,) = sequence.missing
    assert note.startswith(f"rows twice in {name}.json, used once: 1 (")
    assert only(root).missing == [note]  # also from the index on disk
    edit(root, name, contradict)
    with pytest.raises(InputError, match=rf"{name}\.json: the rows of token \w+ contradict"):
        only(root)


def test_rows_in_any_order(root):
    sound = only(root)
    for name in TABLES:
        edit(root, name, lambda rows: rows.reverse())
    assert_same(only(root), sound)


def test_two_key_frames_of_a_camera_for_one_sample(root):
    def later(rows):
        rows.insert(0, dict(at(rows, "CAM_BACK", 0), token="f" * 32, timestamp=START + 60_000))

    sound = only(root)
    edit(root, "sample_data", later)
    sequence = only(root)
    assert_same(sequence, sound)
    (note,) = sequence.missing
    assert note.startswith("key frames twice for a sample, the one nearer in time used: 1 (scene-0")


@pytest.mark.parametrize("change, note", [
    (lambda rows: rows.remove(at(rows, "CAM_BACK", 5)), "left out that lack a camera: 1"),
    (lambda rows: at(rows, "CAM_BACK", 5).update(timestamp=START), "sample's time: 1"),
    (lambda rows: at(rows, "CAM_BACK", 5).update(timestamp=START + 390_000), "by 0.11 s"),
])  # fmt: skip
def test_key_frames_that_are_not_whole(root, change, note):
    edit(root, "sample_data", change)
    sequence = only(root)
    assert sequence.inputs == [0] and sequence.frames == 1
    assert any(note in line for line in sequence.missing)
    assert "lack a camera: 1 (scene-0003" in sequence.missing[-1]


def test_sweeps_around_a_key_frame_that_lacks_a_camera(root):
    """Its other images are sweeps like any other."""

    def third(rows):
        for row in rows:
            if row["timestamp"] == START + 3 * PERIOD:
                row |= {"is_key_frame": "CAM_BACK__" not in row["filename"],
                        "sample_token": "third"}  # fmt: skip

    edit(root, "sample_data", third)
    edit(root, "sample", lambda rows: rows.append(
        dict(rows[0], token="third", timestamp=START + 3 * PERIOD)))  # fmt: skip
    sequence = only(root)
    assert sequence.inputs == [0, 5]
    times = (sequence._views["time"] - START) // PERIOD
    assert times[:, 0].tolist() == list(range(6)) and (times == times[:, :1]).all()
    assert sequence.frame_id(3) == f"third-{START + 3 * PERIOD}"


def test_scenes_without_key_frames_are_left_out(root):
    edit(root, "scene", lambda rows: rows.insert(0, dict(rows[0], token="none", name="scene-0012")))
    sequence = only(root)
    assert sequence.name == "scene-0003"
    assert sequence.missing == [
        "scenes skipped: 1 (scene-0012 has no key frame of all six cameras)"
    ]
    edit(root, "scene", lambda rows: rows[0].update(name="scene-0003"))
    assert len(only(root).missing) == 1
    edit(root, "sample", lambda rows: rows[1].update(scene_token="none"))
    with pytest.raises(InputError, match="scene-0003 is there with two tokens"):
        only(root)
    edit(root, "sample_data", lambda rows: rows.clear())
    with pytest.raises(InputError, match="no scene can be used: scenes skipped: 2"):
        only(root)


def test_columns_as_other_tools_write_them(root):
    def spell(rows):
        for number, row in enumerate(rows):
            row["is_key_frame"] = (str(row["is_key_frame"]), int(row["is_key_frame"]))[number % 2]
            row["timestamp"] = (str(row["timestamp"]), float(row["timestamp"]))[number % 2]
            row["filename"] = (
                row["filename"].replace("/", "\\"), f"/data/samples/nu/{row['filename']}"
            )[number % 2]  # fmt: skip

    sound = only(root)
    edit(root, "sample_data", spell)
    assert_same(only(root), sound)
    assert _below("C:\\nu\\sweeps\\CAM_BACK\\a.jpg") == "sweeps/CAM_BACK/a.jpg"
    assert _below("./samples/a/b.jpg") == "samples/a/b.jpg" and _below("more/samples/a") == (
        "more/samples/a"
    )
    assert whole("15") == whole(15.0) == 15
    for value in (1.5, "1.5", float("nan"), 1e30):
        with pytest.raises(ValueError):
            whole(value)


def test_other_image_sizes_are_refused_at_the_start(root):
    back = at(json.loads((root / VERSION / "sample_data.json").read_text()), "CAM_BACK", 0)
    iio.imwrite(root / back["filename"], np.zeros((12, 20, 3), np.uint8))
    with pytest.raises(InputError, match=r"CAM_BACK.*: 12x20 pixels, but sample_data"):
        only(root)


def test_the_index_is_shared_and_follows_the_tables(root, tmp_path):
    folder = root / VERSION
    first = np.array(Tables(folder).index())  # no map of what is torn below
    (file,) = (tmp_path / "cache").glob("nuscenes-*.npy")
    stamp = file.stat().st_mtime_ns
    assert np.array_equal(Tables(folder).index(), first)
    assert file.stat().st_mtime_ns == stamp
    file.write_bytes(file.read_bytes()[:1000])  # a torn index is made again
    assert np.array_equal(Tables(folder).index(), first)
    os.utime(folder / "ego_pose.json", ns=(0, 0))
    Tables(folder).index()
    assert len(list((tmp_path / "cache").glob("nuscenes-*.npy"))) == 2


def test_official_splits():
    assert len(official_val(VERSION)) == 150 and len(official_val("v1.0-mini")) == 2
    assert {"scene-0003", "scene-0221", "scene-1073"} <= official_val(VERSION)
    assert not {"scene-0001", "scene-0918", "scene-0061"} & official_val(VERSION)


def test_rows_are_streamed_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("selfocc.datasets.nuscenes_tables.CHUNK", 7)
    rows = [{"token": "a]}", "values": [1.5, [2, 3]]}, {"token": "{b"}, {"token": ""}]
    for indent in (None, 0, 2):
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(rows, indent=indent))
        assert list(stream(path)) == rows
        path.write_text(json.dumps(rows, indent=indent)[:-3])
        with pytest.raises(InputError, match="broken off or damaged after 2 rows"):
            list(stream(path))
    path.write_text("[]")
    assert list(stream(path)) == []


def enlarge(root, channel, rows, cols):
    """Images of a channel with every pixel repeated, tables to match."""

    def grow(data):
        for row in data:
            if f"/{channel}/" in row["filename"]:
                for folder in (root, root / "labels"):
                    path = folder / row["filename"]
                    iio.imwrite(path, iio.imread(path).repeat(rows, 0).repeat(cols, 1))
                row |= {"height": rows * row["height"], "width": cols * row["width"]}

    def calibrate(data):
        sensor = next(r["token"] for r in stream(root / VERSION / "sensor.json")
                      if r["channel"] == channel)  # fmt: skip
        (row,) = (r for r in data if r["sensor_token"] == sensor)
        k = np.array(row["camera_intrinsic"])
        for axis, scale in ((0, cols), (1, rows)):
            k[axis] *= scale
            k[axis, 2] += (scale - 1) / 2
        row["camera_intrinsic"] = k.tolist()

    edit(root, "sample_data", grow)
    edit(root, "calibrated_sensor", calibrate)


def test_cameras_of_different_sizes_make_the_same_samples(root):
    """A camera enlarged three and two times is scaled back by the means of equal pixels."""
    sizes = [f"data.{name}=24,40" for name in ("crop", "pad", "target_crop")]
    more = ["scale=1", "target_scale=1", "augment=false", "source=0.01,40", "label_map="]
    settings = build("nuscenes_small", sizes + [f"data.{text}" for text in more]).data

    def sample():
        sequence = only(root, labels=PseudoLabels(root / "labels", root, 20))
        data = VideoDataset([sequence], settings, train=False)
        return sequence, data[0].to(torch.device("cpu"))

    _, before = sample()
    enlarge(root, "CAM_BACK", 3, 2)
    sequence, after = sample()
    assert sequence.missing == ["CAM_BACK of 80x72 pixels is scaled to 40x24, as others are"]
    back = CHANNELS.index("CAM_BACK")
    assert [image.shape[0] for image in sequence.images(0)] == [24, 24, 24, 72, 24, 24]
    for name in ("intrinsics", "camera_to_volume"):
        assert torch.allclose(getattr(after, name), getattr(before, name), atol=1e-9)
        for frames in ("target", "sources"):
            one, other = (getattr(getattr(s, frames), name) for s in (after, before))
            assert torch.allclose(one, other, atol=1e-9)
    assert torch.equal(after.semantics, before.semantics)
    assert torch.equal(after.lidar, before.lidar) and after.lidar[back].any()
    others = [camera for camera in range(6) if camera != back]
    assert torch.equal(after.target.images[others], before.target.images[others])
    # smoothing reaches into the next pixels, as it does wherever images are made smaller
    assert (after.target.images - before.target.images).abs()[back].mean() < 0.02
    drawn = overlay(sequence, 0)
    assert drawn[back].shape == (72, 80, 3)
    report = Report("val", [sequence], settings)
    report.check(2)
    assert report.found["images"] == 2 and not report.problems


BROKEN = {
    "dangling pose": ("ego_pose", lambda rows: rows.pop(3), "refers to ego_pose"),
    "dangling sensor": ("sensor", lambda rows: rows.pop(0), "refers to sensor"),
    "dangling sample": ("sample", lambda rows: rows.pop(0), "refers to sample"),
    "no column": ("sample_data", lambda rows: rows[2].pop("timestamp"), "has no 'timestamp'"),
    "NaN pose": (
        "ego_pose",
        lambda rows: rows[5].update(translation=[float("nan"), 0, 0]),
        "is not finite",
    ),
    "no rotation": ("ego_pose", lambda rows: rows[5].update(rotation=[0, 0, 0, 0]), "no rotation"),
    "longer than a rotation": (
        "calibrated_sensor",
        lambda rows: rows[1].update(rotation=[1, 1, 0, 0]),
        "rotation of .* is none",
    ),
    "intrinsics of other pixels": (
        "calibrated_sensor",
        lambda rows: rows[1].update(camera_intrinsic=[[48, 0, 38], [0, 48, 12], [0, 0, 1]]),
        "principal point 38, 12 do not suit images of 24x40 pixels",
    ),
    "intrinsics in a row": (
        "calibrated_sensor",
        lambda rows: rows[1].update(camera_intrinsic=[48, 20, 12]),
        r"calibrated_sensor\.json: cannot reshape",
    ),
    "transposed intrinsics": (
        "calibrated_sensor",
        lambda rows: rows[1].update(camera_intrinsic=[[48, 0, 0], [0, 48, 0], [20, 12, 1]]),
        "camera_intrinsic of .* is none",
    ),
    "time in seconds": (
        "sample_data",
        lambda rows: [row.update(timestamp=row["timestamp"] / 1e6) for row in rows],
        r"sample_data\.json: row \w+ is malformed",
    ),
    "time in milliseconds": (
        "sample_data",
        lambda rows: [row.update(timestamp=row["timestamp"] // 1000) for row in rows],
        "100 microseconds apart",
    ),
    "neither key frame nor sweep": (
        "sample_data",
        lambda rows: rows[2].update(is_key_frame="perhaps"),
        "is malformed",
    ),
    "other scenes": ("scene", lambda rows: rows[0].update(name="scene-0001"), "none is of split"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_tables(root, what):
    name, change, message = BROKEN[what]
    edit(root, name, change)
    with pytest.raises(InputError, match=message):
        only(root)


def test_broken_files(root):
    sequence = only(root)
    image = root / sequence._views[0, 1]["file"].decode()
    iio.imwrite(image, np.zeros((20, 40, 3), np.uint8))
    with pytest.raises(InputError, match="20x40 pixels, but sample_data"):
        sequence.image(0, 1)
    scan = root / sequence._scans[0]
    whole_points = scan.read_bytes()
    np.linspace(1.0, 2.0, 40, dtype="<f4").tofile(scan)  # ten points of four floats
    with pytest.raises(InputError, match=r"holds 4 floats|is not 5 float32"):
        sequence.lidar(0)
    scan.write_bytes(whole_points)
    scan.write_bytes(scan.read_bytes()[:-3])
    with pytest.raises(InputError, match="torn"):
        sequence.lidar(0)
    labels = sequence._voxels.files[0]
    labels.write_bytes(labels.read_bytes()[:-300])
    with pytest.raises(InputError, match="damaged"):
        sequence.voxels(0)
    path = root / VERSION / "sample_data.json"
    path.write_text(path.read_text()[:-200])
    with pytest.raises(InputError, match=r"sample_data\.json: broken off"):
        only(root)
    with pytest.raises(InputError, match="--data"):
        nuscenes_sequences(root, "v1.0-mini", "val")


def test_choosing_scenes(root):
    assert only(root, chosen="scene-0003:1-1").frames == 1
    for chosen, message in (
        ("scene-0099", "no scene-0099"),
        ("scene-0003:0-9", "key frames are 0 to 1"),
        ("scene 3", "cannot read"),
    ):
        with pytest.raises(InputError, match=message):
            only(root, chosen=chosen)


@pytest.mark.skipif(not REAL.exists(), reason=f"no excerpt of nuScenes at {REAL}")
def test_real_excerpt(tmp_path, monkeypatch):
    monkeypatch.setenv("SELFOCC_CACHE", str(tmp_path))
    (scene,) = nuscenes_sequences(REAL, "v1.0-mini", "train")
    assert scene.name == "scene-0061" and scene.frames == 1
    points = scene.lidar(0)
    ground = np.median(points[(np.abs(points[:, :2]) < 8).all(1) & (points[:, 2] < 0.5), 2])
    assert len(points) == 34688 and abs(ground) < 0.15  # the ego frame lies on the road
    overrides = ["data.version=v1.0-mini", "data.train=scene-0103", "data.val=scene-0103"]
    config = build("nuscenes_small", overrides)
    training = open_dataset(config, "train", Folders(data=REAL))
    sample = training[(0, 1)]
    assert len(training) == 2 and sample.images.shape == (6, 3, 96, 224)
    assert sample.sources.images.shape == (2, 6, 3, 96, 200)
    there, here = (f.camera_to_volume[..., :3, 3] for f in (sample.sources, sample.target))
    assert ((there - here).norm(dim=-1) - 4.3).abs().max() < 0.3  # metres between the frames
