"""Footage in the layouts of nerfstudio, COLMAP and KITTI is what its cameras saw."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from selfocc import InputError, presets
from selfocc.datasets import check, ground, usual
from selfocc.datasets import export_posed as exporter
from selfocc.datasets.captures import Capture, Shot, find
from selfocc.datasets.export_posed import LENSES, export_posed, rays
from selfocc.datasets.kitti_raw import kitti_raw_sequences, rotation
from selfocc.datasets.lens import Lens, fitted, horizon_row
from selfocc.datasets.nuscenes import nuscenes_sequences
from selfocc.datasets.posed import grouped, posed_sequences
from selfocc.datasets.synthetic import SyntheticConfig, synthetic_sequences
from selfocc.datasets.video import VideoDataset

SHARED = Path(__file__).parents[2] / "shared" / "data"
DRIVE = "2011_09_26_drive_0005_sync"
UP = np.array([0, 0, 1.0])


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    config = SyntheticConfig(frames=8, looks=0.0)
    return synthetic_sequences(config, "train", 1, cache=tmp_path_factory.mktemp("cache"))[0]


@pytest.fixture(scope="module")
def similarity():
    """[4, 4]: rotation, scale and shift."""
    world = np.eye(4)
    world[:3, :3] = 2.5 * rotation(0.4, -1.1, 2.3)
    world[:3, 3] = 30, -7, 12
    return world


@pytest.fixture(autouse=True)
def cached(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SELFOCC_CACHE", str(tmp_path_factory.mktemp("cache")))


def opened(folder, *changes, split="train", chosen=""):
    data = presets.build("posed", changes).data
    return posed_sequences(folder, split, chosen, data)[0]


def cameras_of(sequence, frame):
    intrinsics, poses = sequence.cameras(frame)
    return intrinsics, np.linalg.inv(sequence.volume_to_world(frame)) @ poses


@pytest.mark.parametrize("kind", ["nerfstudio", "colmap", "colmap-text", "kitti"])
def test_an_export_reads_back_to_the_same_samples(street, tmp_path, kind):
    export_posed([street], tmp_path, kind)
    got = opened(tmp_path, "data.source=0.8,10", chosen=street.name)
    for frame in range(street.frames):
        assert (got.image(frame, 0) == street.image(frame, 0)).all()
        for ours, theirs in zip(cameras_of(got, frame), cameras_of(street, frame), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-9)
    ours, theirs = (
        VideoDataset([s], presets.build("posed", ["data.source=0.8,10"]).data, train=True)
        for s in (got, street)
    )
    assert len(ours) == len(theirs) > 3
    for seed in range(4):
        a, b = ours[seed, seed], theirs[seed, seed]
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.target.images, b.target.images)
        assert torch.equal(a.sources.images, b.sources.images)
        torch.testing.assert_close(a.sources.camera_to_volume, b.sources.camera_to_volume)
    if kind == "nerfstudio":
        np.testing.assert_array_equal(got.depth(3)[0], street.depth(3)[0])
    elif kind != "kitti":  # sparse points lie on what the image shows
        moved = np.linalg.inv(cameras_of(got, 3)[1][0])
        x, y, z = moved[:3, :3] @ got.lidar(3).T + moved[:3, 3:]
        assert len(z) == 200
        u, v = (cameras_of(got, 3)[0][0] @ (x / z, y / z, np.ones_like(z)))[:2].round().astype(int)
        np.testing.assert_allclose(z, street.depth(3)[0][v, u], rtol=1e-5)


def test_what_nerfstudio_applied_is_undone(street, tmp_path):
    export_posed([street], tmp_path)
    path = tmp_path / street.name / "transforms.json"
    whole = json.loads(path.read_text())
    applied = np.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0]])  # as of its COLMAP poses
    for frame in whole["frames"]:
        moved = applied[:, :3] @ np.array(frame["transform_matrix"])[:3]
        moved[:, 3] *= 0.1
        frame["transform_matrix"] = moved.tolist()
    whole |= {"applied_transform": applied.tolist(), "applied_scale": 0.1}
    path.write_text(json.dumps(whole | {"depth_unit_scale_factor": 0.1}))
    got = opened(tmp_path, chosen=street.name)
    np.testing.assert_allclose(got.cameras(3)[1], street.cameras(3)[1], atol=1e-9)
    np.testing.assert_allclose(got.depth(3)[0], street.depth(3)[0], rtol=1e-6)


# Lenses


def written_out(kind, x, y, k1, k2, k3, k4, p1, p2):
    """As OpenCV's documentation has it."""
    r2 = x * x + y * y
    if kind == "brown":
        c = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3 + k4 * r2**4
        return (
            x * c + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
            y * c + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y,
        )
    r = math.sqrt(r2)
    t = math.atan(r)
    bent = t * (1 + k1 * t**2 + k2 * t**4 + k3 * t**6 + k4 * t**8)
    return x * bent / r, y * bent / r


@pytest.mark.parametrize("kind", LENSES)
def test_lenses_are_as_opencv_has_them(kind):
    radial, tangential = (-0.2, 0.05, 0.01, -0.003), (2e-3, -1e-3)
    lens = Lens((96, 320), 186.0, 190.0, 157.0, 50.0, kind, radial, tangential)
    for x, y in ((0.3, -0.2), (-0.7, 0.1), (0.01, 0.4)):
        u, v = lens.project(np.array([x]), np.array([y]))
        extra = tangential if kind == "brown" else (0.0, 0.0)
        a, b = written_out(kind, x, y, *radial, *extra)
        assert u[0] == pytest.approx(186 * a + 157, abs=1e-9)
        assert v[0] == pytest.approx(190 * b + 50, abs=1e-9)
    x, y = rays(dataclasses.replace(lens, radial=LENSES[kind][0]))
    u, v = dataclasses.replace(lens, radial=LENSES[kind][0]).project(x, y)
    np.testing.assert_allclose(u, np.broadcast_to(np.arange(320), u.shape), atol=1e-6)
    np.testing.assert_allclose(v, np.broadcast_to(np.arange(96)[:, None], v.shape), atol=1e-6)


@pytest.mark.parametrize("kind", LENSES)
def test_undistorted_images_are_those_of_a_pinhole(tmp_path, kind):
    config = SyntheticConfig(frames=2, looks=0.0)
    street = synthetic_sequences(config, "train", 1, cache=tmp_path / "cache")[0]
    export_posed([street], tmp_path, "nerfstudio", kind)
    got = opened(tmp_path, chosen=street.name)
    images, depths, _ = street.render(1, intrinsics=got.cameras(1)[0])
    want = images[0].astype(float)
    ratio = got.depth(1)[0][depths[0] > 0] / depths[0][depths[0] > 0]
    assert np.quantile(np.abs(ratio - 1), 0.9) < 0.015
    for axis in (0, 1):  # it is worse half a pixel off to either side, and equally so
        before, here, after = (off(got.image(1, 0), want, axis, d) for d in (-0.5, 0, 0.5))
        assert here < 0.85 * min(before, after)
        assert abs(after - before) / (before + after - 2 * here) < 0.08  # half a pixel over 2 of it
    other = np.abs(street.image(1, 0)[8:-8, 8:-8] - want[8:-8, 8:-8]).mean()
    assert off(got.image(1, 0), want, 0, 0) < 0.65 * other


def off(image, want, axis, shift):
    """Mean difference of two images, one of them moved along an axis."""
    v, u = np.mgrid[: image.shape[0], : image.shape[1]].astype(np.float32)
    v, u = (v + shift, u) if axis == 0 else (v, u + shift)
    grid = np.stack([2 * u / (image.shape[1] - 1) - 1, 2 * v / (image.shape[0] - 1) - 1], -1)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    moved = torch.nn.functional.grid_sample(
        pixels, torch.from_numpy(grid)[None], align_corners=True
    )
    return np.abs(moved[0].permute(1, 2, 0).numpy() - want)[8:-8, 8:-8].mean()


def test_the_widest_pinhole_is_filled_by_its_lens():
    for kind, (radial, tangential) in LENSES.items():
        lens = Lens((96, 320), 186.0, 186.0, 159.5, 47.5, kind, radial, tangential)
        k = lens.pinhole()
        x, y = (np.arange(320) - k[0, 2]) / k[0, 0], (np.arange(96) - k[1, 2]) / k[1, 1]
        u, v = lens.project(*np.meshgrid(x, y))
        room = min(u.min(), v.min(), (319 - u).min(), (95 - v).min())
        assert -0.01 < room < 0.1  # it touches the border, and does not cross it


def test_images_are_fitted_around_the_horizon():
    image = np.zeros((375, 1242, 3), np.uint8)
    image[170:175] = 255
    k = Lens(image.shape[:2], 721.5, 721.5, 609.6, 172.9).intrinsics
    small, fitted_k = fitted(image, k, (96, 320), 172.9)
    assert small.shape == (96, 320, 3)
    assert small[:, 100, 0].argmax() == 44  # as far up as the image reaches
    point = np.array([1.0, 0.4, 9.0])
    u, v, _ = k @ point / point[2]
    x, y, _ = fitted_k @ point / point[2]
    scale = 97 / 375
    assert (x + 0.5) == pytest.approx((u + 0.5) * 320 / 1242, abs=1e-9)
    assert (y + 0.5) == pytest.approx((v + 0.5) * scale, abs=1e-9)
    same, same_k = fitted(small, fitted_k, (96, 320), 0.0)
    assert (same == small).all()
    np.testing.assert_array_equal(same_k, fitted_k)


def test_the_horizon_is_where_a_pitched_camera_sees_it():
    pose = np.eye(4)
    pose[:3, :3] = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]]) @ rotation(np.deg2rad(-5), 0, 0)
    k = Lens((400, 600), 500.0, 500.0, 300.0, 200.0).intrinsics
    forward = pose[:3, 2]  # the camera looks down by 5 degrees, or up
    assert horizon_row(k, pose) == pytest.approx(200 + 500 * forward[2] / math.hypot(*forward[:2]))


def test_masked_pixels_are_black(street, tmp_path):
    export_posed([street], tmp_path)
    path = tmp_path / street.name / "transforms.json"
    whole = json.loads(path.read_text())
    mask = np.full((96, 320), 255, np.uint8)
    mask[80:] = 0
    iio.imwrite(path.parent / "mask.png", mask)
    path.write_text(json.dumps(whole | {"mask_path": "mask.png"}))
    image = opened(tmp_path, chosen=street.name).image(2, 0)
    assert (image[80:] == 0).all()
    assert (image[:80] == street.image(2, 0)[:80]).all()


# Scale, axes, volume


def test_scale_and_up_are_given_or_found(street, similarity, tmp_path):
    export_posed([street], tmp_path, world=similarity)
    up = similarity[:3, :3] @ street.volume_to_world(0)[:3, 2] / 2.5
    steps = np.linalg.norm(np.diff(street.positions, axis=0), axis=1).sum()
    for change, scale in ((f"scale_metres={0.4}", 0.4), (f"path_length={steps}", 0.4)):
        got = opened(tmp_path, f"data.{change}", chosen=street.name)
        assert got.path[-1] == pytest.approx(scale * 2.5 * street.path[-1], rel=1e-9)
    height = street.rig.camera_to_volume[0, 2, 3] + 1.73
    got = opened(tmp_path, f"data.camera_height={height}", chosen=street.name)
    assert got.path[-1] == pytest.approx(street.path[-1], rel=0.03)
    wrong = opened(tmp_path, "data.scale_metres=0.6", f"data.camera_height={height}")
    assert "one of it and the scale is wrong" in wrong.missing[0]
    _, camera = cameras_of(got, 3)
    assert camera[0, 2, 3] == pytest.approx(height - 1.73, abs=1e-6)
    assert camera[0, :2, 3] == pytest.approx([0, 0], abs=1e-6)
    assert camera[0, 1, 2] > 0.99  # it looks ahead, along y
    given = ",".join(map(str, up))
    got = opened(tmp_path, f"data.camera_height={height}", f"data.up={given}", chosen=street.name)
    found = np.linalg.inv(got.volume_to_world(3)) @ got.cameras(3)[1][0]
    # the camera is tilted in the volume as it is on average
    off = np.arccos(np.clip(found[2, :3] @ street.rig.camera_to_volume[0, 2, :3], -1, 1))
    assert np.rad2deg(off) < 0.2


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not there")
def test_a_real_drive_is_scaled_by_the_height_of_its_camera(similarity):
    sequences = kitti_raw_sequences(SHARED / "kitti_raw_0005", "train", f"{DRIVE}:94-153")
    drive = next(s for s in sequences if s.eye == "l")
    k = drive.intrinsics
    lens = Lens(drive.image(0, 0).shape[:2], k[0, 0], k[1, 1], k[0, 2], k[1, 2])
    shots = []
    for frame in range(drive.frames):
        pose = similarity @ drive.cameras(frame)[1][0]
        pose[:3, :3] /= 2.5
        shots.append(Shot(drive.image_path("l", frame), str(frame), pose, lens))
    poses = np.stack([shot.pose for shot in shots])
    up = ground.upright(poses[:, None], np.diff(poses[:, :3, 3], axis=0))
    assert ground.height(shots, up) / 2.5 == pytest.approx(1.65, rel=0.03)
    assert np.rad2deg(np.arccos(up @ (similarity[:3, :3] @ UP / 2.5))) < 1


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not there")
def test_nuscenes_as_a_rig_gives_the_samples_of_its_loader(tmp_path, monkeypatch):
    want = nuscenes_sequences(SHARED / "nuscenes", "v1.0-mini", "val", "scene-0103")
    images = iter([f for frame in range(2) for f in want[0].files(frame) if f.suffix == ".jpg"])

    def link(path, _):  # writing PNGs of them takes long
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(next(images).absolute())

    monkeypatch.setattr(exporter, "write_picture", link)
    export_posed(want, tmp_path)
    changes = ["data.dataset=posed", "data.source=0.1,30"]
    data = presets.build("nuscenes_small", changes).data
    got = posed_sequences(tmp_path, "val", "scene-0103", data)
    ours, theirs = (VideoDataset(s, data, train=False) for s in (got, want))
    assert len(ours) == len(theirs) == 2
    for index in range(2):
        a, b = ours[index], theirs[index]
        for x, y in ((a, b), (a.target, b.target), (a.sources, b.sources)):
            assert torch.equal(x.images, y.images)
            assert torch.equal(x.intrinsics, y.intrinsics)
            torch.testing.assert_close(x.camera_to_volume, y.camera_to_volume, atol=1e-9, rtol=0)


# Rigs


def rig_of(tmp_path, names):
    """A capture of images that nobody reads, cameras at places that tell them apart."""
    shots = []
    for number, name in enumerate(names):
        pose = np.eye(4)
        pose[0, 3] = number
        shots.append(Shot(tmp_path / name, name, pose, Lens((8, 8), 8.0, 8.0, 4.0, 4.0)))
    return Capture(tmp_path, shots, [])


@pytest.mark.parametrize(
    ("names", "cameras", "frames"),
    [
        (["a/2.png", "a/10.png", "b/2.png", "b/10.png"], ["a", "b"], [[0, 2], [1, 3]]),
        (["left_01.png", "right_01.png", "left_02.png", "right_02.png"], None, [[0, 1], [2, 3]]),
        (["01_cam1.png", "02_cam1.png", "01_cam2.png", "02_cam2.png"], None, [[0, 2], [1, 3]]),
        (["f/100.png", "b/101.png", "f/200.png", "b/203.png", "f/300.png"], ["b", "f"],
         [[1, 0], [3, 2]]),
        (["frame_9.png", "frame_10.png"], ["camera"], [[0], [1]]),
        (["1.50.png", "1.25.png"], None, [[1], [0]]),
    ],
)  # fmt: skip
def test_images_of_one_time_are_a_frame(tmp_path, names, cameras, frames):
    found, shots, _, _ = grouped(rig_of(tmp_path, names))
    assert cameras in (None, found)
    assert [[int(s.pose[0, 3]) for s in frame] for frame in shots] == frames


def test_what_a_rig_lacks_is_told(tmp_path):
    names = ["a/1.png", "b/1.png", "a/2.png", "a/01.png"]
    _, shots, _, notes = grouped(rig_of(tmp_path, names))
    assert [shot.name for shot in shots[0]] == ["a/1.png", "b/1.png"] and len(shots) == 1
    assert notes == [
        "time stamps twice, the first used: 1 (a/01.png)",
        "2 cameras: a, b",
        "1 of 2 time stamps have an image of every camera",
    ]


def test_the_preset_follows_from_the_rig(street, ring, tmp_path):
    export_posed([street], tmp_path / "one")
    export_posed([ring], tmp_path / "ring")
    assert usual(None, "posed", tmp_path / "one") == ("posed", ["encoder.cameras=1"])
    assert usual(None, "posed", tmp_path / "ring") == ("posed_surround", ["encoder.cameras=6"])
    assert usual("street_kitti", None, tmp_path / "one") == ("street_kitti", [])


def test_a_ring_of_cameras_stands_in_its_volume(ring, similarity, tmp_path):
    export_posed([ring], tmp_path, world=similarity)
    changes = ["data.rig=surround", "data.scale_metres=0.4", "data.camera_height=1.5"]
    got = opened(tmp_path, *changes, "data.crop=24,40", chosen=ring.name)
    order = [got.camera_names.index(name) for name in ring.camera_names]
    ours, theirs = cameras_of(got, 3)[1][order], cameras_of(ring, 3)[1]
    middle = theirs[:, :3, 3].mean(0) * (1, 1, 0)
    np.testing.assert_allclose(ours[:, :3, 3], theirs[:, :3, 3] - middle, atol=0.005)
    np.testing.assert_allclose(ours[:, :3, :3], theirs[:, :3, :3], atol=0.003)


# Bad input


def _edit(change):
    def edit(folder):
        path = folder / "transforms.json"
        whole = json.loads(path.read_text())
        change(whole)
        path.write_text(json.dumps(whole))

    return edit


def _set(whole, **values):
    for frame in whole["frames"]:
        frame.update(values)


def _first(whole, row, column, value):
    whole["frames"][0]["transform_matrix"][row][column] = value


def _still(whole):
    for frame in whole["frames"]:
        frame["transform_matrix"] = whole["frames"][0]["transform_matrix"]


def _one(folder):
    (folder / "rig.json").unlink()
    _edit(lambda w: w.update(frames=w["frames"][:1]))(folder)


def _torn(folder):
    path = folder / "images" / "000003.png"
    path.write_bytes(path.read_bytes()[:400])


BAD = {
    "no such": (lambda f: shutil.rmtree(f), "no such folder"),
    "unknown": (lambda f: (f / "transforms.json").unlink(), "neither transforms.json"),
    "no json": (lambda f: (f / "transforms.json").write_text("{"), "no transforms.json"),
    "no frames": (_edit(lambda w: w.pop("frames")), "'frames' is missing"),
    "no size": (_edit(lambda w: _set(w, fl_x=None)), "no transforms.json"),
    "other size": (_edit(lambda w: _set(w, w=640, h=192, cx=320, cy=96, fl_x=372, fl_y=372)),
                   "but its intrinsics are for 192x640"),
    "no rotation": (_edit(lambda w: _first(w, 0, 0, 5.0)), "is no rotation"),
    "NaN": (_edit(lambda w: _first(w, 0, 3, math.nan)), "not all numbers are finite"),
    "model": (_edit(lambda w: _set(w, camera_model="EQUIRECTANGULAR")), "is not among"),
    "fisheye": (_edit(lambda w: _set(w, camera_model="OPENCV_FISHEYE")), "'k1' is missing"),
    "one frame": (_one, "one frame alone"),
    "still": (_edit(_still), "do not move"),
    "other images": (lambda f: shutil.rmtree(f / "images"), "no image on disk"),
    "torn image": (_torn, "damaged or unreadable PNG"),
    "rig": (lambda f: (f / "rig.json").write_text('{"frames": [{"x": "images/9.png"}]}'),
            "'images/9.png' is not there"),
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(street, tmp_path_factory):
    folder = tmp_path_factory.mktemp("posed")
    export_posed([street], folder)
    return folder / street.name


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_told_in_a_line(exported, tmp_path, what, capfd):
    spoil, said = BAD[what]
    folder = tmp_path / "mine"
    shutil.copytree(exported, folder)
    spoil(folder)
    words = ["--dataset", "posed", "--data", folder, "--out", tmp_path / "out", "--scale", "1"]
    assert check.main(list(map(str, words))) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and said in last


@pytest.mark.parametrize("table", ["cameras", "images", "points3D"])
def test_a_torn_colmap_model_is_told(street, tmp_path, table):
    export_posed([street], tmp_path, "colmap")
    path = tmp_path / street.name / "sparse" / "0" / f"{table}.bin"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match=f"{table}.bin: ends too early"):
        find(tmp_path)


def test_the_height_of_a_camera_needs_ground(exported, tmp_path, similarity):
    folder = tmp_path / "mine"
    shutil.copytree(exported, folder)
    (folder / "rig.json").unlink()
    for path in (folder / "images").iterdir():
        iio.imwrite(path, np.zeros((96, 320, 3), np.uint8))
    with pytest.raises(InputError, match=r"no ground is seen .* --scale"):
        opened(folder, "data.camera_height=1.6")
