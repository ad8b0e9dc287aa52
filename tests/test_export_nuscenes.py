"""The embedded world written as nuScenes says what the world says, by the tables alone."""

import json
import shutil

import imageio.v3 as iio
import numpy as np
import pytest

from selfocc import InputError
from selfocc.datasets.export import main
from selfocc.datasets.export_nuscenes import (
    CAMERAS,
    EGO_TO_GLOBAL,
    NUMBERS,
    OCC3D_CLASS,
)
from selfocc.datasets.nuscenes import nuscenes_sequences, official_val
from selfocc.labels import PseudoLabels

SIZE = (24, 40)
TABLES = (
    "attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map", "sample",
    "sample_annotation", "sample_data", "scene", "sensor", "visibility",
)  # fmt: skip


@pytest.fixture(scope="module")
def tables(ring_files):
    """{table: {token: row}}."""
    files = {name: ring_files / "v1.0-trainval" / f"{name}.json" for name in TABLES}
    return {n: {row["token"]: row for row in json.loads(f.read_text())} for n, f in files.items()}


def matrix(row):
    """[4, 4] of a translation and a quaternion w, x, y, z."""
    w, x, y, z = row["rotation"]
    pose = np.eye(4)
    pose[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    pose[:3, 3] = row["translation"]
    return pose


def chain(tables, channel):
    """The sample_data of a channel in the order of `next`, with their sensor-to-global matrices."""
    mounted = tables["calibrated_sensor"]
    rows = [
        row
        for row in tables["sample_data"].values()
        if tables["sensor"][mounted[row["calibrated_sensor_token"]]["sensor_token"]]["channel"]
        == channel
    ]
    (row,) = (row for row in rows if not row["prev"])
    ordered = [row]
    while row["next"]:
        row = tables["sample_data"][row["next"]]
        assert row["prev"] == ordered[-1]["token"]
        ordered.append(row)
    assert len(ordered) == len(rows)
    return [
        (row, matrix(tables["ego_pose"][row["ego_pose_token"]])
         @ matrix(mounted[row["calibrated_sensor_token"]]))
        for row in ordered
    ]  # fmt: skip


def test_cameras_and_images(ring, ring_files, tables):
    for camera, channel in enumerate(CAMERAS):
        rows = chain(tables, channel)
        assert len(rows) == 6
        for frame, (row, camera_to_global) in enumerate(rows):
            k, poses = ring.cameras(frame)
            camera_to_global[:3, 3] -= EGO_TO_GLOBAL
            assert np.allclose(camera_to_global, poses[camera], atol=1e-9)
            mounted = tables["calibrated_sensor"][row["calibrated_sensor_token"]]
            assert np.array_equal(mounted["camera_intrinsic"], k[camera])
            assert np.array_equal(
                iio.imread(ring_files / row["filename"]), ring.images(frame)[camera]
            )
            classes = iio.imread(ring_files / "labels" / row["filename"])
            assert np.array_equal(classes, ring.semantics(frame)[camera])
            assert (row["height"], row["width"]) == SIZE
            assert row["is_key_frame"] == (frame in (0, 5))
            assert row["filename"].startswith("samples/" if frame in (0, 5) else "sweeps/")


def test_scans(ring, ring_files, tables):
    for frame, (row, lidar_to_global) in enumerate(chain(tables, "LIDAR_TOP")):
        scan = np.fromfile(ring_files / row["filename"], "<f4").reshape(-1, 5)
        lidar_to_global[:3, 3] -= EGO_TO_GLOBAL
        to_volume = np.linalg.inv(ring.volume_to_world(frame)) @ lidar_to_global
        points = scan[:, :3] @ to_volume[:3, :3].T + to_volume[:3, 3]
        assert np.allclose(points, ring.lidar(frame), atol=1e-4)
        # x is to the right of the vehicle, y ahead, z up
        assert np.allclose(to_volume[:3, :3], [[0, 1, 0], [-1, 0, 0], [0, 0, 1]], atol=1e-9)
        assert set(scan[:, 4]) <= set(range(64))


def test_samples_and_labels(ring, ring_files, tables):
    (scene,) = tables["scene"].values()
    assert scene["name"] == "scene-0003" and scene["nbr_samples"] == 2
    first = tables["sample"][scene["first_sample_token"]]
    last = tables["sample"][first["next"]]
    assert last["token"] == scene["last_sample_token"] and last["prev"] == first["token"]
    assert not first["prev"] and not last["next"]
    sweeps = [r for r in tables["sample_data"].values() if not r["is_key_frame"]]
    assert {row["sample_token"] for row in sweeps} == {last["token"]}
    for frame, sample in ((0, first), (5, last)):
        labels = np.load(ring_files / "gts" / "scene-0003" / sample["token"] / "labels.npz")
        voxels = ring.voxels(frame).transpose(1, 0, 2)
        assert labels["semantics"].shape == (200, 200, 16)
        assert np.array_equal(labels["semantics"], OCC3D_CLASS[voxels])
        assert np.array_equal(labels["mask_camera"] == 1, voxels != 255)
        assert 0 < labels["mask_lidar"].mean() < labels["mask_camera"].mean()
    assert OCC3D_CLASS[[0, 1, 9, 11, 13, 15, 255]].tolist() == [17, 4, 11, 13, 15, 16, 17]


def test_scans_of_four_columns_and_folders_behind_links(ring_files, tmp_path):
    """A scan as KITTI has it, in whole points of five floats as well; `samples` on another disk."""
    for path in ring_files.iterdir():
        if path.name != "samples":
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(ring_files / "samples", tmp_path / "away")
    (tmp_path / "samples").symlink_to(tmp_path / "away")
    labels = PseudoLabels(ring_files / "labels", tmp_path, 20)
    (read,) = nuscenes_sequences(tmp_path, "v1.0-trainval", "val", labels=labels)
    assert [label.shape for label in read.semantics(0)] == [SIZE] * 6
    for path in (tmp_path / "samples" / "LIDAR_TOP").iterdir():
        points = np.fromfile(path, "<f4").reshape(-1, 5)
        points = points[: len(points) // 5 * 5, :4]
        points.tofile(path)
    with pytest.raises(InputError, match=r"pcd.bin: holds 4 floats a point .*, not 5"):
        read.lidar(0)


@pytest.mark.parametrize("frame_of", ["ego", "lidar"])
def test_read_back_it_equals_the_direct_path(ring, ring_files, frame_of):
    labels = PseudoLabels(ring_files / "labels", ring_files, 20)
    (read,) = nuscenes_sequences(
        ring_files, "v1.0-trainval", "val", volume_frame=frame_of, labels=labels
    )
    assert (read.name, read.frames, read.labelled, read.inputs) == ("scene-0003", 6, [0, 5], [0, 5])
    turn = np.eye(4)  # from the volume of the world, the ego frame, to that asked for
    if frame_of == "lidar":
        turn = np.linalg.inv(ring.lidar_to_volume())
        turn[:3] = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]]) @ turn[:3]
    for frame in range(6):
        k, poses = read.cameras(frame)
        true_k, true_poses = ring.cameras(frame)
        assert np.array_equal(k, true_k)
        for other in (frame, 5):
            there = turn @ np.linalg.inv(ring.volume_to_world(other)) @ true_poses
            assert np.allclose(np.linalg.inv(read.volume_to_world(other)) @ poses, there, atol=1e-6)
        images = [read.image(frame, camera) for camera in range(6)]
        assert np.array_equal(images, ring.images(frame))
        assert np.array_equal(read.semantics(frame), ring.semantics(frame))
    for frame in (0, 5):
        points = ring.lidar(frame) @ turn[:3, :3].T + turn[:3, 3]
        assert np.allclose(read.lidar(frame), points, atol=1e-4)
        voxels, known = read.voxels(frame), ring.voxels(frame) != 255
        assert np.array_equal(read.voxel_mask(frame), known)
        assert np.array_equal(voxels[known] > 0, ring.voxels(frame)[known] > 0)
        assert np.array_equal(voxels[known], OCC3D_CLASS[ring.voxels(frame)[known]] % 17)
    assert read.voxels(1) is None
    assert np.allclose(read.path[5] - read.path[0], ring.path[5], rtol=0.05)


def test_official_names(ring_files):
    assert {f"scene-{n:04d}" for n in NUMBERS["val"]} <= official_val("v1.0-trainval")
    assert not {f"scene-{n:04d}" for n in NUMBERS["train"]} & official_val("v1.0-trainval")


def test_what_does_not_fit_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SELFOCC_CACHE", str(tmp_path))
    common = ["--scenes", "1", "--frames", "1", "--size", "8", "16"]
    assert main(["nuscenes", str(tmp_path / "a"), "--split", "test", *common]) == 2
    assert "splits train and val" in capsys.readouterr().err
    assert main(["openoccupancy", str(tmp_path / "a"), *common]) == 2
    assert "invalid choice: 'openoccupancy'" in capsys.readouterr().err
