"""KITTI raw: the embedded world written as KITTI raw and read back, whole and broken."""

import pickle
import re
import shutil
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import eval as eval_script
import train as train_script
from selfocc import InputError
from selfocc.datasets.export_kitti import BASELINE, export_kitti_raw
from selfocc.datasets.kitti_raw import drives_on_disk, kitti_raw_sequences, oxts_poses
from selfocc.datasets.synthetic import SyntheticConfig, synthetic_sequences
from selfocc.datasets.video import VideoDataset, project_points
from selfocc.labels import PseudoLabels
from selfocc.presets import build
from tests.tiny import here

REAL = Path(__file__).parents[2] / "shared" / "data" / "kitti_raw"
SIZE, FRAMES = (24, 48), 6
DATE, DRIVE = "2011_09_26", "2011_09_26_drive_0001_sync"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    config = SyntheticConfig(image_size=SIZE, frames=FRAMES, rigs=0.0)
    return synthetic_sequences(config, "train", 1, cache=tmp_path_factory.mktemp("cache"))[0]


@pytest.fixture(scope="module")
def exported(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    export_kitti_raw([world], folder)
    return folder


@pytest.fixture
def root(exported, tmp_path):
    """A copy of the export to break; without improved ground truth."""
    shutil.copytree(exported / DATE, tmp_path / DATE)
    return tmp_path


def eyes(root, chosen=DRIVE, **options):
    return kitti_raw_sequences(root, "train", chosen, **options)


def relative(sequence, frame, other):
    """Camera of `other` in the volume frame of `frame`."""
    return np.linalg.inv(sequence.volume_to_world(frame)) @ sequence.cameras(other)[1][0]


def test_left_eye_equals_the_direct_path(world, exported):
    left, _ = eyes(exported)
    assert left.name == f"{DRIVE}/l" and left.frames == FRAMES and left.frame_id(3) == "0000000003"
    for frame in range(FRAMES):
        assert np.array_equal(left.images(frame), world.images(frame))
        assert np.allclose(left.cameras(frame)[0], world.cameras(frame)[0], rtol=1e-12)
        assert np.allclose(left.lidar(frame), world.lidar(frame), atol=1e-5)
        depth, truth = left.depth(frame), world.depth(frame)
        assert np.abs(depth - truth)[truth < 255].max() <= 0.5 / 256 + 1e-4
        assert (depth[truth >= 255] == 0).all()
        for other in range(FRAMES):
            assert np.allclose(
                relative(left, frame, other), relative(world, frame, other), atol=1e-6
            )
    assert np.allclose(
        left.path[-1], np.linalg.norm(np.diff(world.positions, axis=0), axis=1).sum()
    )
    assert left.missing == [
        "no pose file: poses are taken from OXTS, good to some centimetres",
        "no voxels in KITTI raw: occupancy is not scored",
    ]
    assert np.array_equal(pickle.loads(pickle.dumps(left)).images(1), left.images(1))


def test_samples_equal_those_of_the_direct_path(world, exported):
    settings = ("data.crop=24,48", "data.pad=32,64", "data.scale=1", "data.target_scale=1")
    data = build("street_kitti_raw", settings).data
    direct, read = (
        VideoDataset.every_frame(sequence, data) for sequence in (world, eyes(exported)[0])
    )
    for frame in (0, 3):
        want, got = direct[frame], read[frame]
        assert torch.equal(got.images, want.images)
        assert torch.equal(got.sources.images, want.sources.images)
        for part in ("target", "sources"):
            frames, true = getattr(got, part), getattr(want, part)
            assert torch.allclose(frames.intrinsics, true.intrinsics, rtol=1e-9)
            assert torch.allclose(frames.camera_to_volume, true.camera_to_volume, atol=1e-6)
        # a point in a hundred may fall into the next pixel by rounding
        assert (got.lidar - want.lidar).abs().lt(1e-3).float().mean() > 0.99
        assert got.lidar.gt(0).float().mean() > 0.1
        near = want.depth < 255
        assert (got.depth - want.depth)[near].abs().max() <= 0.5 / 256 + 1e-4


def test_the_other_eye_often_is_a_source(exported):
    settings = ("data.crop=24,48", "data.pad=32,64", "data.scale=1", "data.target_scale=1")
    data = build(
        "street_kitti_raw", [*settings, "data.stereo_source=True", "data.augment=False"]
    ).data
    left, right = eyes(exported)
    train = VideoDataset([left], data, train=True)
    counts = torch.zeros(2, 2)  # which source, whether it is the other eye
    for seed in range(60):
        sample = train[2, seed]
        _, frame = train.locate(2)
        other = torch.tensor(right.image(frame, 0)[None]).permute(0, 3, 1, 2)
        for k in range(2):
            is_other = torch.equal(sample.sources.images[k], other)
            counts[k, int(is_other)] += 1
            if is_other:
                between = torch.linalg.inv(sample.target.camera_to_volume)
                between = between @ sample.sources.camera_to_volume[k]
                assert torch.allclose(between[0, :3, 3], torch.tensor([BASELINE, 0, 0]).double())
    assert (counts[:, 1] > 8).all() and counts[:, 1].sum() < 55  # two thirds of 60


def test_labels_mirror_the_images(world, exported):
    labels = PseudoLabels(exported / "labels", exported, 20)
    for sequence, classes in zip(
        eyes(exported, labels=labels),
        (world.semantics(1), world.render(1, shift=BASELINE)[2]),
        strict=True,
    ):
        assert np.array_equal(sequence.semantics(1), classes)
    assert eyes(exported)[0].semantics(1) is None


def test_labels_mirror_a_linked_drive(root):
    folder = root / DATE / DRIVE
    folder.rename(root / "away")
    folder.symlink_to(root / "away")
    labels = PseudoLabels(root / "labels", root, 20)
    place = root / "labels" / DATE / DRIVE / "image_02" / "data" / "0000000001.png"
    place.parent.mkdir(parents=True)
    iio.imwrite(place, np.full(SIZE, 7, np.uint8))
    assert (eyes(root, labels=labels)[0].semantics(1) == 7).all()


def test_right_eye_is_a_sequence_of_its_own(world, exported):
    left, right = eyes(exported)
    image, depth, _ = world.render(2, shift=BASELINE)
    assert right.name == f"{DRIVE}/r" and np.array_equal(right.images(2), image)
    assert np.abs(right.depth(2) - depth)[depth < 255].max() <= 0.5 / 256 + 1e-4
    between = np.linalg.inv(left.cameras(2)[1][0]) @ right.cameras(2)[1][0]
    assert np.allclose(between[:3, 3], [BASELINE, 0, 0]) and np.allclose(between[:3, :3], np.eye(3))
    assert np.allclose(left.volume_to_world(2), right.volume_to_world(2))
    # the scan, seen from the right, is where the right depth says
    to_camera = np.linalg.inv(right.cameras(2)[1][0]) @ right.volume_to_world(2)
    seen = project_points(right.lidar(2), to_camera, right.intrinsics, SIZE)
    both = (seen > 0) & (seen < 20) & (depth[0] > 0)
    assert np.median(np.abs(seen - depth[0])[both] / seen[both]) < 0.05


def test_each_eye_offers_the_other(exported):
    left, right = eyes(exported)
    for eye, there in ((left, right), (right, left)):
        intrinsics, pose, images = eye.other_eye(1)
        assert np.array_equal(images, there.images(1))
        assert np.allclose(pose, there.cameras(1)[1]) and np.allclose(intrinsics, there.intrinsics)
    first, second, focal, baseline = left.stereo_pair(1)
    assert np.array_equal(first, left.images(1)[0]) and np.array_equal(second, right.images(1)[0])
    assert (focal, baseline) == (left.intrinsics[0, 0], pytest.approx(BASELINE))
    assert right.stereo_pair(1) is None


def test_projection_is_that_of_the_published_loader(exported):
    """lidar2img = P_rect R_rect T_velo_to_cam A^-1, with the fourth column of P_rect."""

    def matrix(path, key, shape):
        lines = dict(line.split(":", 1) for line in path.read_text().splitlines())
        m = np.eye(4)
        m[: shape[0], : shape[1]] = np.array(lines[key].split(), float).reshape(shape)
        return m

    date = exported / DATE
    velo_to_cam = matrix(date / "calib_velo_to_cam.txt", "R", (3, 3))
    velo_to_cam[:3, 3] = matrix(date / "calib_velo_to_cam.txt", "T", (1, 3))[0, :3]
    a = np.array([[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    for sequence, key in zip(eyes(exported), ("P_rect_02", "P_rect_03"), strict=True):
        cam = date / "calib_cam_to_cam.txt"
        want = matrix(cam, key, (3, 4)) @ matrix(cam, "R_rect_00", (3, 3)) @ velo_to_cam
        k = np.eye(4)
        k[:3, :3] = sequence.intrinsics
        to_camera = np.linalg.inv(sequence.cameras(4)[1][0]) @ sequence.volume_to_world(4)
        assert np.allclose(k @ to_camera, want @ np.linalg.inv(a))


def test_mercator_of_the_devkit():
    rows = np.array([[49.0, 8.4, 110, 0, 0, 0], [49.001, 8.4, 111, 0.1, 0.2, np.pi / 2],
                     [49.0, 8.401, 110, 0, 0, 0]])  # fmt: skip
    poses = oxts_poses(rows)
    assert np.allclose(poses[0], np.eye(4))
    metres = 6378137 * np.deg2rad(0.001)  # of latitude
    assert np.allclose(poses[1, :3, 3], [0, metres, 1], rtol=1e-4)
    assert np.allclose(poses[2, :3, 3], [metres * np.cos(np.deg2rad(49)), 0, 0])
    # yaw turns east to north; pitch lifts x down, roll turns about what x has become
    assert np.allclose(poses[1, :3, 0], [0, np.cos(0.2), -np.sin(0.2)])


def test_pose_files_stand_in_for_oxts(world, root):
    """Camera-0 files, camera-2 files in the drive, and both kinds through --poses."""
    left, _ = eyes(root)
    folder = root / DATE / DRIVE
    cam2 = [np.linalg.inv(left.cameras(0)[1][0]) @ left.cameras(f)[1][0] for f in range(FRAMES)]
    cam2_to_cam0 = left.drive.camera("l")[1]
    cam0 = [cam2_to_cam0 @ p @ np.linalg.inv(cam2_to_cam0) for p in cam2]
    shutil.rmtree(folder / "oxts")

    def write(path, poses):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(" ".join(map(repr, p[:3].ravel().tolist())) + "\n" for p in poses))

    given = root.parent / f"{root.name}_poses"
    write(given / "a" / DATE / f"{DRIVE}.txt", cam0)
    write(given / "b" / f"{DRIVE}_cam2.txt", cam2)
    with pytest.raises(InputError, match="no poses: neither poses"):
        eyes(root)
    for options in ({"pose_folder": given / "a"}, {"pose_folder": given / "b"}, {}):
        if not options:
            write(folder / "poses_cam2.txt", cam2)
        sequence = eyes(root, **options)[0]
        for frame in (0, 2):
            want = relative(world, frame, frame + 3)
            assert np.allclose(relative(sequence, frame, frame + 3), want, atol=1e-6)
        assert not any("OXTS" in line for line in sequence.missing)
    with pytest.raises(InputError, match=r"--poses .*neither"):
        eyes(root, pose_folder=root)


def test_ranges_and_the_default_split(root, exported):
    left, _ = eyes(root, f"{DRIVE}:2-4")
    assert left.frames == 3 and left.frame_id(0) == "0000000002"
    assert np.array_equal(left.images(1), eyes(root)[0].images(3))
    assert np.allclose(relative(left, 0, 2), relative(eyes(root)[0], 2, 4), atol=1e-9)
    train, val = (kitti_raw_sequences(exported, split)[0] for split in ("train", "val"))
    assert (train.numbers, val.numbers) == ([0, 1, 2, 3], [4, 5])
    assert val.missing[0] == f"no --split-dir: the val split is {DRIVE}:4-5"
    (root / DATE / DRIVE / "velodyne_points/data/0000000004.bin").unlink()
    assert kitti_raw_sequences(root, "val")[0].inputs == [1]  # only what can be judged
    for camera in ("image_02", "image_03"):
        for frame in range(1, FRAMES):
            (root / DATE / DRIVE / camera / f"data/{frame:010d}.png").unlink()
    with pytest.raises(InputError, match="too few frames to split"):
        kitti_raw_sequences(root, "train")


def test_unrectified_drives_are_left_out_or_refused(root, tmp_path):
    """`_extract` drives, and any kind but `_sync`: the calibration is not that of their images."""
    extract, other = DRIVE.replace("sync", "extract"), DRIVE.replace("sync", "half")
    for name in (extract, other):
        shutil.copytree(root / DATE / DRIVE, root / DATE / name)
    why = "only those of _sync drives are rectified, .* and synchronised"
    drives_on_disk.cache_clear()
    left, _ = eyes(root, "")
    assert left.drive.name == DRIVE
    assert re.search(rf"^2 drives left out \({extract}, ..\): {why}", left.missing[1])
    for name in (extract, other):
        with pytest.raises(InputError, match=rf"images of {name} cannot be used: {why}; .*_sync"):
            eyes(root, f"{name}:0-3")
        (tmp_path / "train_files.txt").write_text(f"{DATE}/{DRIVE} 1 l\n{DATE}/{name} 1 l\n")
        with pytest.raises(InputError, match=rf"train_files.txt: the images of {name} cannot be"):
            eyes(root, "", split_folder=tmp_path)
    shutil.rmtree(root / DATE / DRIVE)
    drives_on_disk.cache_clear()
    for chosen in ("", extract, DRIVE):
        with pytest.raises(InputError, match=rf"images of {extract} cannot be used: {why}"):
            eyes(root, chosen)


def test_an_extract_drive_under_the_name_of_a_sync_one(root):
    line("calib_cam_to_cam.txt", "R_rect_00", "S_rect_02: 1242 375\nS_rect_03: 1242 375\n"
         "R_rect_00: 1 0 0 0 1 0 0 0 1")(root / DATE)  # fmt: skip
    iio.imwrite(root / DATE / IMAGE / "0000000000.png", np.zeros((512, 1392), np.uint8))
    with pytest.raises(InputError, match=r"375x1242 .* 512x1392; these are unrectified images"):
        eyes(root)


def test_the_right_eye_may_lack_frames_and_its_calibration(root, tmp_path):
    for frame in (1, 4):
        (root / DATE / DRIVE / f"image_03/data/{frame:010d}.png").unlink()
    left, right = eyes(root, f"{DRIVE}:0-4")
    assert (left.numbers, right.numbers) == ([0, 1, 2, 3, 4], [0, 2, 3])
    assert "image_03 lacks 2 frames: no stereo there" in left.missing
    with pytest.raises(InputError, match="no frame 6; it holds 0 to 5"):
        eyes(root, f"{DRIVE}:4-6")
    line("calib_cam_to_cam.txt", "P_rect_03", None)(root / DATE)
    (tmp_path / "train_files.txt").write_text(f"{DATE}/{DRIVE} 1 l\n")  # of the left eye alone
    (left,) = eyes(root, "", split_folder=tmp_path)
    assert left.inputs == [1]


@pytest.mark.parametrize("below", ["", DATE, f"{DATE}/{DRIVE}"])
def test_finds_the_data_from_above_and_below(exported, below):
    assert len(eyes(exported / below)) == 2


def test_split_files_choose_inputs_by_eye(root, tmp_path):
    def listed(text, name="train"):
        (tmp_path / f"{name}_files.txt").write_text(text)
        chosen = "" if name == "train" else name
        return eyes(root, chosen, split_folder=tmp_path)

    names = f"{DATE}/{DRIVE} 0000000004 l\n{DATE}/{DRIVE} 1 l\n{DATE}/{DRIVE} 2 r\n\n"
    left, right = listed(names)
    assert (left.eye, left.inputs, left.frames) == ("l", [1, 4], FRAMES)
    assert (right.eye, right.inputs, right.frames) == ("r", [2], FRAMES)
    assert [s.eye for s in listed(names.splitlines()[2], "test")] == ["r"]
    wrong = {
        "names no frame": "\n",
        "names 2 frames of .*image_02 that are not on disk, 0000000006 first": names
        + f"{DATE}/{DRIVE} 7 l\n{DATE}/{DRIVE} 6 l\n",
        "train_files.txt: names drive 2011_09_28": "2011_09_28/2011_09_28_drive_0001_sync 1 l\n",
        "line 2: .* is no": f"{DATE}/{DRIVE} 1 l\n{DATE}/{DRIVE} x l\n",
        "line 1: .* is no": f"2011_09_28/{DRIVE} 1 l\n",
    }
    for message, text in wrong.items():
        with pytest.raises(InputError, match=message):
            listed(text)
    with pytest.raises(InputError, match=r"val_files.txt: cannot be read"):
        eyes(root, "val", split_folder=tmp_path)


def test_jpeg_images_and_what_an_excerpt_lacks(root):
    folder = root / DATE / DRIVE
    for path in sorted((folder / "image_02/data").glob("*.png")):
        iio.imwrite(path.with_suffix(".jpg"), iio.imread(path), quality=95)
        path.unlink()
    shutil.rmtree(folder / "image_03")
    shutil.rmtree(folder / "velodyne_points")
    (left,) = eyes(root)
    assert left.image(0, 0).shape == (*SIZE, 3)
    assert not left.has_other_eye(0)
    assert left.stereo_pair(0) is left.lidar(0) is left.depth(0) is None
    lacks = [line.split(":")[0] for line in left.missing]
    assert lacks[1:3] == ["no image_03", "no velodyne_points nor data_depth_annotated"]


# broken input: (what to break in DATE, what to read, what the message must name)
IMAGE, OXTS = f"{DRIVE}/image_02/data", f"{DRIVE}/oxts/data"


def line(name, key, text):
    """Replace the line of a calibration file that begins with `key`; None drops it."""

    def break_it(date):
        lines = (date / name).read_text().splitlines()
        lines = [text if at.startswith(f"{key}:") else at for at in lines]
        (date / name).write_text("\n".join(at for at in lines if at is not None) + "\n")

    return break_it


def word(name, index, text):
    def break_it(date):
        words = (date / name).read_text().split()
        words[index : index + 1] = text.split()
        (date / name).write_text(" ".join(words) + "\n")

    return break_it


def cut(name, keep):
    return lambda date: (date / name).write_bytes((date / name).read_bytes()[:keep])


BROKEN = {
    "calibration gone": (
        lambda d: (d / "calib_cam_to_cam.txt").unlink(), None, "calib_cam_to_cam.txt: cannot be"),
    "projection gone": (
        line("calib_cam_to_cam.txt", "P_rect_02", None), None, "line P_rect_02 is missing"),
    "other projection gone": (
        line("calib_cam_to_cam.txt", "P_rect_03", None), None, "line P_rect_03 is missing"),
    "rectification gone": (
        line("calib_cam_to_cam.txt", "R_rect_00", None), None, "line R_rect_00 is missing"),
    "rectification scaled": (
        line("calib_cam_to_cam.txt", "R_rect_00", "R_rect_00: 2 0 0 0 2 0 0 0 2"), None,
        "line R_rect_00: its 3x3 part is no rotation"),
    "projection short": (
        line("calib_cam_to_cam.txt", "P_rect_02", "P_rect_02: 1 2"), None,
        "line P_rect_02: 2 numbers instead of 12"),
    "eyes swapped": (
        line("calib_cam_to_cam.txt", "P_rect_03", "P_rect_03: 28 0 24 30 0 28 12 0 0 0 1 0"),
        lambda s: s.stereo_pair(0), "P_rect_03 is not P_rect_02 moved to the right"),
    "eyes swapped, as a source": (
        line("calib_cam_to_cam.txt", "P_rect_03", "P_rect_03: 28 0 24 30 0 28 12 0 0 0 1 0"),
        lambda s: s.other_eye(0), "P_rect_03 is not P_rect_02 moved to the right"),
    "images of half the size": (
        lambda d: [iio.imwrite(p, iio.imread(p)[::2, ::2]) for p in (d / IMAGE).glob("*.png")],
        None, "calib_cam_to_cam.txt: focal lengths 28, 28 and principal point 24, 12 do not suit "
        "images of 12x24 pixels"),
    "images of another size than S_rect": (
        line("calib_cam_to_cam.txt", "R_rect_00", "S_rect_02: 1.242000e+03 3.750000e+02\n"
             "S_rect_03: 48 24\nR_rect_00: 1 0 0 0 1 0 0 0 1"), None,
        "calib_cam_to_cam.txt: is for images of 375x1242 pixels, but they have 24x48; scale its"),
    "velodyne gone": (
        lambda d: (d / "calib_velo_to_cam.txt").unlink(), None, "calib_velo_to_cam.txt: cannot be"),
    "velodyne T gone": (
        line("calib_velo_to_cam.txt", "T", None), None, "calib_velo_to_cam.txt: line T is missing"),
    "IMU gone": (
        lambda d: (d / "calib_imu_to_velo.txt").unlink(), None, "calib_imu_to_velo.txt: cannot be"),
    "OXTS NaN": (
        word(f"{OXTS}/0000000002.txt", 1, "nan"), None, "0000000002.txt: not all numbers are fin"),
    "OXTS torn": (cut(f"{OXTS}/0000000003.txt", 60), None, "0000000003.txt: "),
    "OXTS frame gone": (
        lambda d: (d / f"{OXTS}/0000000001.txt").unlink(), None, "0000000001.txt: cannot be read"),
    "OXTS off the globe": (
        word(f"{OXTS}/0000000002.txt", 0, "490"), None, "latitude and longitude are impossible"),
    "no images": (
        lambda d: [shutil.rmtree(d / DRIVE / c) for c in ("image_02", "image_03")], None,
        "neither image_02/data nor image_03/data has images"),
    "image truncated": (
        cut(f"{IMAGE}/0000000002.png", 200), lambda s: s.images(2), "0000000002.png: damaged"),
    "image of another size": (
        lambda d: iio.imwrite(d / IMAGE / "0000000002.png", np.ones((9, 8, 3), np.uint8)),
        lambda s: s.images(2), "0000000002.png: 9x8 pixels, but 0000000000.png has 24x48"),
    "scan torn": (
        cut(f"{DRIVE}/velodyne_points/data/0000000002.bin", 30), lambda s: s.lidar(2),
        "0000000002.bin: torn, 30 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_input_is_named_in_one_line(root, case):
    break_it, read, message = BROKEN[case]
    break_it(root / DATE)
    if read:  # what is not read does not stop the rest
        sequence = eyes(root)[0]
    with pytest.raises(InputError) as caught:
        read(sequence) if read else eyes(root)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_broken_ground_truth_is_named_in_one_line(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "whole")
    left = eyes(tmp_path / "whole")[0]
    for content, message in (
        (np.ones(SIZE, np.uint8), "is no 16-bit depth"),
        (np.ones((5, 6), np.uint16), "5x6 pixels"),
    ):
        iio.imwrite(left._truth / "0000000001.png", content)
        with pytest.raises(InputError, match=f"0000000001.png: .*{message}"):
            left.depth(1)


def test_broken_poses_and_wrong_places_are_named_in_one_line(root):
    folder = root / DATE / DRIVE
    identity = "1 0 0 0 0 1 0 0 0 0 1 0\n"
    for text, message in (
        (identity.replace("0", "nan", 1) * FRAMES, "poses.txt, line 1: not all numbers are finite"),
        (identity * 3, "poses.txt: 3 lines, but .* goes on to frame 0000000005"),
    ):
        (folder / "poses.txt").write_text(text)
        with pytest.raises(InputError, match=message):
            eyes(root)
    empty = root.parent / f"{root.name}_empty"
    empty.mkdir()
    wrong = {
        "elsewhere: no such folder": lambda: eyes(root / "elsewhere"),
        "no KITTI raw data": lambda: eyes(empty),
        "there is no drive 2011_09_26_drive_0099_sync": lambda: eyes(
            root, "2011_09_26_drive_0099_sync"
        ),
        "no frame 6; it holds 0 to 5": lambda: eyes(root, f"{DRIVE}:4-7"),
    }
    (folder / "poses.txt").unlink()
    for message, read in wrong.items():
        with pytest.raises(InputError) as caught:
            read()
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_scripts_train_and_evaluate_on_a_split(exported, tmp_path, cache, capsys):
    names = {"train": (1, 2), "val": (3,), "test": (4,)}
    for name, frames in names.items():
        lines = [f"{DATE}/{DRIVE} {frame} {eye}" for frame in frames for eye in "lr"]
        (tmp_path / f"{name}_files.txt").write_text("\n".join(lines))
    common = ("--dataset", "kitti_raw", "--data", exported, "--split-dir", tmp_path)
    out = tmp_path / "run"
    words = ("--preset", "street_kitti_raw", *common, "--out", out)
    assert here(train_script, *words, cache=cache, data__crop="24,48", data__pad="32,64",
                data__scale=1, data__target_scale=1, optim__steps=1) == 0  # fmt: skip
    said = capsys.readouterr()
    assert "4 training and 2 validation frames" in said.err + said.out
    words = ("--ckpt", out, *common, "--val", "test", "--pictures", "0")
    assert here(eval_script, *words, cache=cache) == 0
    said = capsys.readouterr().out
    assert "2 frames" in said and "depth, lidar" in said
    words = ("--ckpt", out, *common[:-1], tmp_path / "none", "--pictures", "0")
    assert here(eval_script, *words, cache=cache) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "val_files.txt: cannot be read" in said


@pytest.fixture(scope="module")
def real():
    if not REAL.is_dir():
        pytest.skip(f"no excerpt of KITTI raw at {REAL}")
    return eyes(REAL, "2011_09_26_drive_0052_sync")[0]


def test_real_excerpt(real):
    assert real.frames == 48 and real.image(47, 0).shape == (375, 1242, 3)
    assert real.path[-1] == pytest.approx(7.03, abs=0.01)
    assert [f for f in range(48) if real.judged(f)] == list(range(0, 48, 4))
    # the camera is ahead of the velodyne, below it, 6 cm to the left of camera 0, and level
    camera = np.linalg.inv(real.volume_to_world(7)) @ real.cameras(7)[1][0]
    assert np.allclose(camera[:3, 3], [-0.06, 0.27, -0.08], atol=0.02)
    assert np.allclose(camera[:3, 2], [0, 1, 0], atol=0.02)


def test_real_scan_fits_the_next_frames(real):
    """Grey values at scan points agree with a later frame, best at the length of the poses."""
    frame, later = 24, 27
    to_camera = np.linalg.inv(real.cameras(frame)[1][0]) @ real.volume_to_world(frame)
    points = real.lidar(frame) @ to_camera[:3, :3].T + to_camera[:3, 3]
    points = points[points[:, 2] > 2]
    motion = np.linalg.inv(real.cameras(later)[1][0]) @ real.cameras(frame)[1][0]
    now, then = (real.image(f, 0).astype(float).mean(-1) for f in (frame, later))

    def pixels(points):
        return np.rint(points @ real.intrinsics[:2].T / points[:, 2:]).astype(int)

    def error(length):
        here, there = pixels(points), pixels(points @ motion[:3, :3].T + length * motion[:3, 3])
        limit = [1242, 375]
        inside = ((here >= 0) & (here < limit) & (there >= 0) & (there < limit)).all(1)
        (u, v), (x, y) = here[inside].T, there[inside].T
        return np.median(np.abs(now[v, u] - then[y, x]))

    assert error(1.0) < 0.75 * error(0.0)
    assert error(1.0) < min(error(0.8), error(1.25))
