"""The embedded world is exact: images, depth, voxels, scans and distances agree."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from selfocc import InputError
from selfocc.datasets import cache as disk
from selfocc.datasets.export import main
from selfocc.datasets.export_kitti import RAW_LABEL, export_kitti
from selfocc.datasets.kitti import kitti_sequences
from selfocc.datasets.synthetic import SyntheticConfig, prerender, synthetic_sequences
from selfocc.street.world import FOLIAGE

CONFIG = SyntheticConfig(frames=6)
SMALL = SyntheticConfig(frames=2, image_size=(24, 80))
SURROUND = SyntheticConfig(rig="surround", frames=2, image_size=(48, 96))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", params=[CONFIG, SURROUND], ids=["forward", "surround"])
def scene(request, cache):
    return synthetic_sequences(request.param, "val", 1, seed=2, cache=cache)[0]


def surface_points(scene, frame):
    """Points [N, h, w, 3] of the depth map in the volume frame; NaN in the sky."""
    depth = scene.depth(frame).astype(np.float64)
    depth[depth == 0] = np.nan
    v, u = np.mgrid[: depth.shape[1], : depth.shape[2]]
    points = []
    for d, k, pose in zip(depth, scene.rig.intrinsics, scene.rig.camera_to_volume, strict=True):
        rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(k).T
        points.append((rays * d[..., None]) @ pose[:3, :3].T + pose[:3, 3])
    return np.stack(points)


def project(scene, frame, world):
    """Pixels [.., 2] and z-depth [..] of world points in camera 0 of a frame."""
    intrinsics, poses = scene.cameras(frame)
    local = (world - poses[0, :3, 3]) @ poses[0, :3, :3]
    return (local @ intrinsics[0].T)[..., :2] / local[..., 2:], local[..., 2]


def bilinear(image, pixel):
    """[h, w, ...] read at pixels [M, 2] that lie inside."""
    base = np.floor(pixel).astype(int)
    (fu, fv), (u, v) = (pixel - base).T, base.T
    shape = (-1, *[1] * (image.ndim - 2))
    fu, fv = fu.reshape(shape), fv.reshape(shape)
    top = image[v, u] * (1 - fu) + image[v, u + 1] * fu
    return top * (1 - fv) + (image[v + 1, u] * (1 - fu) + image[v + 1, u + 1] * fu) * fv


def test_follows_the_protocol(scene):
    cameras, (h, w) = len(scene.rig.intrinsics), scene.config.image_size
    intrinsics, poses = scene.cameras(0)
    assert intrinsics.shape == (cameras, 3, 3) and poses.shape == (cameras, 4, 4)
    assert intrinsics.dtype == poses.dtype == scene.volume_to_world(0).dtype == np.float64
    assert [image.shape for image in scene.images(0)] == [(h, w, 3)] * cameras
    assert scene.image(0, 0).dtype == np.uint8
    assert scene.depth(0).shape == scene.semantics(0).shape == (cameras, h, w)
    assert (scene.semantics(0) == 0).tolist() == (scene.depth(0) == 0).tolist()
    assert scene.path.shape == (scene.frames,)
    steps = np.diff(scene.path)
    assert steps.min() > 0.55 and steps.max() < 1.7
    rotation = poses[:, :3, :3]
    np.testing.assert_allclose(
        rotation @ rotation.swapaxes(1, 2), [np.eye(3)] * cameras, atol=1e-12
    )


def test_signed_distance_is_zero_on_what_is_seen(scene):
    points = surface_points(scene, 1)
    near = scene.depth(1) > 0
    near &= scene.depth(1) < 50
    distance = scene.signed_distance(1, points[near])
    assert np.median(np.abs(distance)) < 1e-4
    assert np.abs(distance).max() < 2e-3


def test_signed_distance_is_positive_before_the_surface(scene):
    points = surface_points(scene, 1)
    origin = scene.rig.camera_to_volume[:, None, None, :3, 3]
    seen = scene.depth(1) > 0
    before = (origin + 0.9 * (points - origin))[seen]
    assert scene.signed_distance(1, before).min() > 0


@pytest.mark.parametrize("seed", [2, 3, 6, 8])  # sun, clouds, sun, sun without colour
def test_neighbouring_frames_agree_in_depth_and_colour(cache, seed):
    still = dataclasses.replace(CONFIG, movers=0)
    scene = synthetic_sequences(still, "train", 1, seed=seed, cache=cache)[0]
    to_world = scene.volume_to_world(2)
    world = surface_points(scene, 2)[0] @ to_world[:3, :3].T + to_world[:3, 3]
    pixel, depth = project(scene, 3, world)
    h, w = CONFIG.image_size
    inside = (depth > 1) & (pixel > 1).all(-1) & (pixel < (w - 2, h - 2)).all(-1)
    there = bilinear(scene.depth(3)[0], pixel[inside])
    same = np.abs(there - depth[inside]) < 0.02 * depth[inside]  # the rest is hidden or on an edge
    assert same.mean() > 0.8
    assert np.median(np.abs(there - depth[inside])[same]) < 0.01
    images = scene.images(2)[0] / 255.0, scene.images(3)[0] / 255.0
    warped = np.abs(bilinear(images[1], pixel[inside]) - images[0][inside])[same].mean()
    unmoved = np.abs(images[1] - images[0])[inside][same].mean()
    assert warped < 0.03 and warped < unmoved / 3


def test_looks_differ_from_street_to_street(cache):
    scenes = synthetic_sequences(SMALL, "train", 16, cache=cache)
    plain = synthetic_sequences(dataclasses.replace(SMALL, looks=0.0), "train", 16, cache=cache)

    def spread(of):
        return [np.std([of(s) for s in streets]) for streets in (scenes, plain)]

    def air(scene):
        return scene.street.looks.haze

    def brightness(scene):
        return scene.image(0, 0)[scene.depth(0)[0] > 0].mean() / 255

    def colourfulness(scene):
        return np.ptp(scene.image(0, 0) / 255.0, axis=-1).mean()

    (hazy, clear), (bright, even) = spread(air), spread(brightness)
    assert hazy > 3e-4 and clear == 0
    assert bright > 0.04 and bright > even
    assert min(map(colourfulness, scenes)) < 0.03 < max(map(colourfulness, scenes)) / 2
    for scene in scenes[:4]:
        assert abs(brightness(scene) - scene.street.looks.brightness) < 0.12


def test_without_looks_the_world_is_plain(cache):
    """The world that was before there were looks: these numbers are its own."""
    config = dataclasses.replace(CONFIG, looks=0.0, rigs=0.0)
    scene = synthetic_sequences(config, "val", 1, cache=cache)[0]
    image, depth, label = scene.render(1)
    np.testing.assert_allclose(image.mean((0, 1, 2)), (86.753, 92.531, 91.886), atol=0.01)
    assert np.median(depth[depth > 0]) == pytest.approx(14.5471, abs=1e-3)
    assert (label == 13).mean() == pytest.approx(0.2512, abs=1e-4)


def test_shadows_are_where_solids_stand_before_the_sun(cache):
    scene = synthetic_sequences(CONFIG, "train", 1, seed=2, cache=cache)[0]
    street, solids = scene.street, scene.street.at(1)
    pose = scene.true_volume_to_world(1)
    points = surface_points(scene, 1)[0]
    chosen = (scene.semantics(1)[0] == 9) & (scene.depth(1)[0] < 30)
    points = points[chosen][::7] @ pose[:3, :3].T + pose[:3, 3]
    share = scene.shadows.lit(
        scene.shadows.at(solids), points.astype(np.float32), np.full(len(points), street.sun[2])
    )

    def meets(which, start):
        """Whether rays from the points to the sun meet some of the solids."""
        met = []
        for point in points:
            way = scene.shadows.pose[:3, 3] - point
            way /= np.linalg.norm(way)
            rays = np.tile(way.astype(np.float32), (len(which), 1))
            t = solids.cast(point + start * way, rays, which, np.arange(len(which)))
            met.append(np.isfinite(t).any())
        return np.array(met)

    dark = meets(np.flatnonzero(solids.style != FOLIAGE), 0.05)
    leafy = meets(np.flatnonzero(solids.style == FOLIAGE), 0.0)
    assert 0.1 < dark.mean() < 0.9
    assert (share[dark] < 0.5).mean() > 0.95
    assert (share[~dark & ~leafy] > 0.5).mean() > 0.95


def test_rigs_differ_and_are_told(cache):
    rigs = [s.rig for s in synthetic_sequences(SMALL, "train", 8, cache=cache)]
    focal = np.array([rig.intrinsics[0, 0, 0] for rig in rigs]) / 80
    height = np.array([rig.camera_to_volume[0, 2, 3] for rig in rigs])
    down = np.rad2deg(np.arcsin([-rig.camera_to_volume[0, 2, 2] for rig in rigs]))
    assert np.ptp(focal) > 0.03 and np.abs(focal / 0.58 - 1).max() <= 0.08 + 1e-9
    assert np.ptp(height) > 0.05 and np.abs(height + 0.08).max() <= 0.1 + 1e-9
    assert np.ptp(down) > 1 and np.abs(down).max() <= 1.5 + 1e-9
    one = dataclasses.replace(SMALL, rigs=0.0)
    same = [s.rig for s in synthetic_sequences(one, "train", 8, cache=cache)]
    assert all((rig.intrinsics == same[0].intrinsics).all() for rig in same)


def test_movers_move_and_nothing_else_does(cache):
    busy = dataclasses.replace(SMALL, movers=6.0, occluders=0.0)
    frozen = dataclasses.replace(busy, mover_speed=0.0)
    street, standing = (
        synthetic_sequences(config, "train", 1, seed=1, cache=cache)[0].street
        for config in (busy, frozen)
    )
    now, then = street.at(0), street.at(1)
    moving = now.mover >= 0
    assert np.linalg.norm(then.centre - now.centre, axis=1)[moving].max() > 0.3
    assert (then.centre == now.centre)[~moving].all()
    np.testing.assert_array_equal(standing.at(0).centre, standing.at(1).centre)


def test_voxels_agree_with_signed_distance(scene):
    voxels = scene.voxels(0)
    low, edge = np.array(scene.rig.box[:3]), scene.rig.voxel
    assert voxels.shape == ((256, 256, 32) if edge == 0.2 else (200, 200, 16))
    rng = np.random.default_rng(0)
    known = np.argwhere(voxels != 255)
    solid = np.argwhere((voxels > 0) & (voxels < 255))
    chosen = np.concatenate([rng.permutation(cells)[:1500] for cells in (known, solid)])
    centres = low + edge * (chosen[:, [1, 0, 2]] + 0.5)
    distance = scene.signed_distance(0, centres)
    occupied = voxels[tuple(chosen.T)] > 0
    clear = np.abs(distance - edge / 2) > 1e-3
    np.testing.assert_array_equal(occupied[clear], (distance <= edge / 2)[clear])
    assert 0.2 < (voxels == 255).mean() < 0.7
    assert {9, 13} <= set(np.unique(voxels))


def test_what_the_camera_sees_is_known_to_the_voxels(scene):
    points = surface_points(scene, 0)[scene.depth(0) > 0]
    labels = scene.semantics(0)[scene.depth(0) > 0]
    low, high = np.array(scene.rig.box[:3]), np.array(scene.rig.box[3:])
    inside = ((points > low + 0.5) & (points < high - 0.5)).all(1)
    cell = ((points[inside] - low) / scene.rig.voxel).astype(int)
    found = scene.voxels(0)[cell[:, 1], cell[:, 0], cell[:, 2]]
    assert (found == 255).mean() < 0.01
    assert (found == labels[inside]).mean() > 0.9


def test_lidar_agrees_with_depth(scene):
    points = scene.lidar(0).astype(np.float64)
    assert points.dtype == np.float64 and len(points) > 20000
    assert (
        np.linalg.norm(points - (0, 0, 1.73 if scene.config.rig == "surround" else 0), axis=1).max()
        < 80.1
    )
    assert np.abs(scene.signed_distance(0, points[::50])).max() < 2e-3
    to_world = scene.volume_to_world(0)
    pixel, depth = project(scene, 0, points @ to_world[:3, :3].T + to_world[:3, 3])
    h, w = scene.config.image_size
    inside = (depth > 0.5) & (pixel > 0).all(1) & (pixel < (w - 1, h - 1)).all(1)
    seen = scene.depth(0)[0][tuple(np.rint(pixel[inside]).astype(int).T[::-1])]
    close = np.abs(seen - depth[inside]) < 0.1 * depth[inside]  # two sensors: one sees past edges
    assert inside.sum() > 1000 and close.mean() > 0.8


def test_scenes_follow_from_their_seed(tmp_path):
    def images(split, seed, folder):
        return synthetic_sequences(SMALL, split, 1, seed, tmp_path / folder)[0].image(1, 0)

    first = images("train", 5, "a")
    np.testing.assert_array_equal(first, images("train", 5, "b"))
    assert (first != images("train", 6, "a")).any()


def test_splits_share_no_scene(tmp_path):
    seeds = [
        {s.seed for s in synthetic_sequences(SMALL, split, 8, seed, tmp_path)}
        for split, seed in (("train", 0), ("val", 3), ("test", 1))
    ]
    assert not (seeds[0] & seeds[1] or seeds[0] & seeds[2] or seeds[1] & seeds[2])
    with pytest.raises(InputError, match="known: train, val, test"):
        synthetic_sequences(SMALL, "trian", 1)


def test_street_is_not_flat(cache):
    def heights(relief):
        config = dataclasses.replace(SMALL, relief=relief)
        scenes = synthetic_sequences(config, "train", 8, cache=cache)
        y = np.arange(0.0, 50, 10)
        return np.stack(
            [s.street.ground.height(s.street.ground.place(y, 1.65)[0], y) for s in scenes]
        )

    assert np.ptp(heights(1.0), axis=1).mean() > 0.25
    assert np.abs(np.diff(heights(1.0), axis=1)).max() < 0.06 * 10
    assert np.abs(heights(0.0)).max() < 1e-6


def test_knobs(cache):
    def render(**knobs):
        config = dataclasses.replace(SMALL, looks=0.0, **knobs)
        return synthetic_sequences(config, "train", 1, seed=4, cache=cache)[0].render(1)

    image, depth, label = render()
    plain = render(texture=0.0)[0]
    walls = label == 13
    grain = [
        np.abs(np.diff(i.astype(float), axis=2)).mean(-1)[walls[:, :, 1:]] for i in (image, plain)
    ]
    assert np.median(grain[1]) < 0.5 * np.median(grain[0])
    np.testing.assert_array_equal(render(texture=0.0)[1], depth)
    assert (render(view_dependence=1.0)[0] != image).any()
    ratio = render(exposure=0.3)[0].astype(float).mean() / image.mean()
    assert 0.02 < abs(ratio - 1) < 0.3
    noisy = render(label_noise=0.2)[2]
    assert 0.1 < (noisy != label).mean() < 0.5
    assert len(np.unique(render(movers=0.0, occluders=0.0)[2])) < len(np.unique(label)) + 1


def test_pose_noise_moves_the_given_poses_only(cache):
    config = dataclasses.replace(SMALL, pose_noise=(0.05, 0.5))
    noisy = synthetic_sequences(config, "train", 1, cache=cache)[0]
    exact = synthetic_sequences(SMALL, "train", 1, cache=cache)[0]
    error = np.linalg.inv(exact.volume_to_world(1)) @ noisy.volume_to_world(1)
    assert 0.005 < np.linalg.norm(error[:3, 3]) < 0.3
    assert 0.001 < np.arccos((np.trace(error[:3, :3]) - 1) / 2) < 0.06
    np.testing.assert_array_equal(noisy.depth(1), exact.depth(1))


def test_damaged_cache_is_rendered_again(tmp_path):
    def open_scene():
        return synthetic_sequences(SMALL, "train", 1, cache=tmp_path)[0]

    def read():
        scene = open_scene()
        return np.concatenate([scene.image(1, 0).ravel(), scene.poses.ravel()])

    want, files = read(), sorted(tmp_path.iterdir())
    assert len(files) == 2  # frames and poses
    for file in files:
        whole = file.read_bytes()
        torn, flipped = whole[: len(whole) // 2], bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        for damage in (torn, bytes(flipped), b"", b"\x93NUMPY"):
            file.write_bytes(damage)
            np.testing.assert_array_equal(read(), want)
            assert file.read_bytes() == whole
    assert sorted(tmp_path.iterdir()) == files


def test_cache_that_cannot_be_written_is_bad_input(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    scene = synthetic_sequences(SMALL, "train", 1, cache=tmp_path / "file")[0]
    with pytest.raises(InputError, match="SELFOCC_CACHE"):
        scene.images(0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.np, "save", full)
    with pytest.raises(InputError, match="No space left on device"):
        synthetic_sequences(SMALL, "train", 1, cache=tmp_path / "disk")[0].images(0)
    assert not list((tmp_path / "disk").iterdir())


def test_prerender_fills_the_cache(tmp_path):
    scenes = synthetic_sequences(SMALL, "train", 2, cache=tmp_path)
    prerender(scenes)
    assert all(s.cached() for s in scenes)
    assert len(list(tmp_path.iterdir())) == 4  # frames and poses of each


def test_kitti_export_reads_back(tmp_path):
    config = dataclasses.replace(CONFIG, image_size=(32, 96))
    scene = synthetic_sequences(config, "val", 1, cache=tmp_path / "cache")[0]
    export_kitti([scene], tmp_path)
    (read,) = kitti_sequences(tmp_path, ["00"])
    assert read.missing == [] and read.frames == 6 and read.labelled == scene.labelled == [0, 5]
    np.testing.assert_allclose(read.path, scene.path, atol=1e-9)
    first = scene.cameras(0)[1][0]
    for frame in (0, 5):
        np.testing.assert_array_equal(read.images(frame), scene.images(frame))
        np.testing.assert_array_equal(read.voxels(frame), scene.voxels(frame))
        np.testing.assert_allclose(read.lidar(frame), scene.lidar(frame), atol=1e-6)
        on_disk, hit = read.voxel_scan(frame)
        assert (on_disk & hit).sum() > 0.99 * (on_disk | hit).sum() > 0
        k, poses = scene.cameras(frame)
        np.testing.assert_array_equal(read.cameras(frame)[0], k)
        np.testing.assert_allclose(first @ read.cameras(frame)[1][0], poses[0], atol=1e-9)
        np.testing.assert_allclose(
            first @ read.volume_to_world(frame), scene.volume_to_world(frame), atol=1e-9
        )
    left, right, focal, baseline = read.stereo_pair(0)
    assert baseline == pytest.approx(0.54) and focal == scene.rig.intrinsics[0, 0, 0]
    v, u = np.nonzero((scene.depth(0)[0] > 8) & (np.arange(96) > 10))
    shifted = u - focal * baseline / scene.depth(0)[0][v, u]
    there = bilinear(right / 255.0, np.stack([shifted, np.minimum(v, 30)], -1))
    assert np.abs(there - left[np.minimum(v, 30), u] / 255.0).mean() < 0.06

    folder = tmp_path / "dataset" / "sequences" / "00"
    sizes = {f.suffix: f.stat().st_size for f in (folder / "voxels").glob("000005.*")}
    assert sizes == {
        ".label": 256 * 256 * 32 * 2,
        **dict.fromkeys((".invalid", ".occluded", ".bin"), 256 * 256 * 32 // 8),
    }
    hit = np.unpackbits(np.fromfile(folder / "voxels" / "000005.bin", np.uint8)).reshape(
        256, 256, 32
    )
    x, y, z = np.argwhere(hit)[0] * 0.2 + (0.1, -25.5, -1.9)
    scan = np.fromfile(folder / "velodyne" / "000005.bin", "<f4").reshape(-1, 4)[:, :3]
    assert np.abs(scan - (x, y, z)).max(1).min() <= 0.1 + 1e-4
    assert RAW_LABEL[[1, 9, 13, 19]].tolist() == [10, 40, 50, 81]


def test_export_command(tmp_path, monkeypatch):
    monkeypatch.setenv("SELFOCC_CACHE", str(tmp_path / "cache"))
    options = f"kitti {tmp_path} --scenes 1 --frames 1 --size 24 80".split()
    module = "selfocc.datasets.export"
    subprocess.run([sys.executable, "-m", module, *options], check=True, capture_output=True)
    assert (tmp_path / "dataset" / "poses" / "00.txt").exists()


@pytest.mark.parametrize(
    "arguments", [["waymo", "x"], ["--scenes", "1"], ["kitti", "x", "--frames"]]
)
def test_export_refuses(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_unknown_rig_is_bad_input():
    with pytest.raises(InputError, match="known: forward, surround"):
        synthetic_sequences(dataclasses.replace(SMALL, rig="rear"), "train", 1)
