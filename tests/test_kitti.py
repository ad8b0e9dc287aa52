"""The KITTI loader on a small hand-made folder, whole and broken, and on a real excerpt."""

import pickle
import re
import shutil
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from selfocc import InputError
from selfocc.datasets import Folders, kitti, open_dataset
from selfocc.datasets.kitti import kitti_sequences
from selfocc.datasets.reading import RECTIFIED, UNRECTIFIED, check_rectified, read_points
from selfocc.datasets.video import VideoDataset
from selfocc.presets import build
from selfocc.stereo import block_matching, stereo_depth

REAL = Path(__file__).parents[2] / "shared" / "data" / "kitti"
HEIGHT, WIDTH, FRAMES = 12, 20, 6
FOCAL, BASELINE = 10.0, 0.5
# a velodyne that is not mounted quite straight
TILT = np.array([[1, 0, 0], [0, np.cos(0.02), -np.sin(0.02)], [0, np.sin(0.02), np.cos(0.02)]])
TR = np.eye(4)
TR[:3, :3] = TILT @ np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0]])
TR[:3, 3] = 0.01, -0.07, -0.3


def row(matrix):
    return " ".join(f"{value:.9e}" for value in np.asarray(matrix)[:3].ravel())


def projection(offset):
    return [[FOCAL, 0, 9.5, offset * FOCAL], [0, FOCAL, 5.5, 0], [0, 0, 1, 0]]


def pose(frame):
    matrix = np.eye(4)
    angle = 0.05 * frame
    matrix[[0, 0, 2, 2], [0, 2, 0, 2]] = np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle)
    matrix[:3, 3] = 0.1 * frame, -0.02 * frame, 1.5 * frame
    return matrix


@pytest.fixture
def root(tmp_path):
    """A complete sequence 03 of six small frames, labels for frames 0 and 5, a scan for frame 5."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "dataset" / "sequences" / "03"
    for part in ("image_2", "image_3", "velodyne", "voxels"):
        (folder / part).mkdir(parents=True)
    (tmp_path / "dataset" / "poses").mkdir()
    offsets = {"P0": 0, "P1": -BASELINE, "P2": 0.06, "P3": 0.06 - BASELINE}
    lines = [f"{key}: {row(projection(offset))}" for key, offset in offsets.items()]
    (folder / "calib.txt").write_text("\n".join([*lines, f"Tr: {row(TR)}", ""]))
    poses = "".join(row(pose(f)) + "\n" for f in range(FRAMES))
    (tmp_path / "dataset" / "poses" / "03.txt").write_text(poses)
    for f in range(FRAMES):
        for camera in ("image_2", "image_3"):
            image = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            iio.imwrite(folder / camera / f"{f:06d}.png", image)
    points = np.array([[10, 2, -1.7, 0.3], [5, -1, 0.5, 0.1]], np.float32)
    points.tofile(folder / "velodyne" / "000005.bin")
    for f in (0, 5):
        labels, invalid = np.zeros((256, 256, 32), np.uint16), np.zeros((256, 256, 32), np.uint8)
        labels[10, 200, 3] = 252  # a moving car, 2 m ahead, to the left
        labels[10, 20, 4] = 40
        labels[11, 20, 4] = 52  # "other structure" has no learning id
        labels[12, 20, 4] = 70
        invalid[12, 20, 4] = invalid[255] = 1
        labels.tofile(folder / "voxels" / f"{f:06d}.label")
        np.packbits(invalid).tofile(folder / "voxels" / f"{f:06d}.invalid")
    return tmp_path


def only(root, frames=None):
    return kitti_sequences(root, ["03"], frames)[0]


def test_reads_a_complete_sequence(root):
    sequence = only(root)
    assert (sequence.name, sequence.frames, sequence.missing) == ("03", FRAMES, [])
    assert sequence.labelled == [0, 5] and sequence.frame_id(5) == "000005"
    on_disk = iio.imread(root / "dataset/sequences/03/image_2/000004.png")
    assert np.array_equal(sequence.image(4, 0), on_disk)
    assert np.allclose(sequence.positions, [pose(f)[:3, 3] for f in range(FRAMES)])
    assert sequence.path[-1] == pytest.approx(5 * np.hypot(0.1, 1.5))  # over the ground: x and z
    assert sequence.depth(0) is None and sequence.semantics(0) is None
    assert np.array_equal(pickle.loads(pickle.dumps(sequence)).image(4, 0), on_disk)


@pytest.mark.parametrize("below", ["", "dataset", "dataset/sequences", "dataset/sequences/03"])
def test_finds_the_data_from_above_and_below(root, below):
    assert only(root / below).frames == FRAMES


def test_cameras_follow_the_published_matrices(root):
    """The published loader's lidar2img and temImg2lidar, built from the sequence's own matrices."""
    sequence = only(root)
    cam0_to_cam2, intrinsics = np.eye(4), np.eye(4)
    cam0_to_cam2[0, 3] = 0.06
    intrinsics[:3, :3] = np.array(projection(0))[:, :3]
    a = np.array([[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    velo_to_cam2 = cam0_to_cam2 @ TR

    def volume_to_image(at, of):
        k, camera_to_world = sequence.cameras(of)
        k4 = np.eye(4)
        k4[:3, :3] = k[0]
        return k4 @ np.linalg.inv(camera_to_world[0]) @ sequence.volume_to_world(at)

    assert np.allclose(volume_to_image(2, 2), intrinsics @ velo_to_cam2 @ np.linalg.inv(a))
    move = np.linalg.inv(pose(2)) @ pose(4)
    to_volume = a @ np.linalg.inv(velo_to_cam2) @ cam0_to_cam2 @ move
    to_volume = to_volume @ np.linalg.inv(cam0_to_cam2) @ np.linalg.inv(intrinsics)
    assert np.allclose(np.linalg.inv(volume_to_image(2, 4)), to_volume)


def test_a_frame_range_keeps_the_names_of_its_frames(root):
    sequence = only(root, range(3, 6))
    whole = only(root)
    assert sequence.frames == 3 and sequence.frame_id(0) == "000003" and sequence.labelled == [2]
    assert np.array_equal(sequence.images(1), whole.images(4))
    assert np.array_equal(sequence.volume_to_world(1), whole.volume_to_world(4))
    assert sequence.path[0] == 0


def test_voxels_are_mapped_masked_and_turned(root):
    voxels = only(root).voxels(5)
    assert voxels.shape == (256, 256, 32) and voxels.dtype == np.uint8
    # 200 of y_left is 55 from the left, on the axis that runs to the right
    assert voxels[10, 55, 3] == 1 and voxels[10, 235, 4] == 9
    assert voxels[11, 235, 4] == 255 and voxels[12, 235, 4] == 255 and (voxels[255] == 255).all()
    assert (voxels == 0).sum() == 255 * 256 * 32 - 4
    assert only(root).voxels(1) is None


def test_lidar_is_turned_into_the_volume(root):
    sequence = only(root)
    assert np.allclose(sequence.lidar(5), [[-2, 10, -1.7], [1, 5, 0.5]])
    assert sequence.lidar(5).dtype == np.float32 and sequence.lidar(0) is None


def test_stereo_pair(root):
    left, right, focal, baseline = only(root).stereo_pair(3)
    assert np.array_equal(left, only(root).images(3)[0]) and left.shape == right.shape
    assert not np.array_equal(left, right)
    assert (focal, baseline) == (pytest.approx(FOCAL), pytest.approx(BASELINE))


def test_tells_what_an_excerpt_lacks_and_goes_on(root):
    folder = root / "dataset" / "sequences" / "03"
    for part in ("velodyne", "voxels", "image_3"):
        shutil.rmtree(folder / part)
    (folder / "image_2").rename(folder / "image_0")
    grey = iio.imread(folder / "image_0" / "000000.png")[..., 0]
    iio.imwrite(folder / "image_0" / "000000.png", grey)
    calibration = (folder / "calib.txt").read_text().splitlines()
    (folder / "calib.txt").write_text(calibration[0] + "\n")
    sequence = only(root)
    lacks = [" ".join(phrase.split(":")[0].split()[:2]) for phrase in sequence.missing]
    assert sorted(lacks) == [
        "no Tr",
        "no image_1",
        "no image_2",
        "no velodyne",
        "no voxels",
    ]
    assert np.array_equal(sequence.image(0, 0), np.repeat(grey[..., None], 3, axis=2))
    assert sequence.labelled == [] and sequence.voxels(0) is None and sequence.lidar(0) is None
    assert sequence.stereo_pair(0) is None
    camera = np.linalg.inv(sequence.volume_to_world(0)) @ sequence.cameras(0)[1][0]
    assert np.allclose(camera[:3, 3], [0, 0.27, -0.08])  # ahead of the velodyne and below it
    assert np.allclose(camera[:3, 2], [0, 1, 0]) and np.allclose(camera[:3, 0], [1, 0, 0])


def test_published_validation_leaves_frames_out(root, monkeypatch):
    monkeypatch.setattr(kitti, "VAL_SEQUENCES", ("03",))
    assert only(root).labelled == [0, 5]  # an excerpt keeps all it has
    monkeypatch.setattr(kitti, "FULL_VAL_FRAMES", FRAMES)
    assert only(root).labelled == [5]


# broken input: (what to break, what to read, what the message must name)


def edit(name, line, text):
    def break_it(dataset):
        path = dataset / name
        lines = path.read_text().splitlines()
        lines[line : line + 1] = [] if text is None else [text]
        path.write_text("\n".join(lines) + "\n")

    return break_it


def cut(name, keep):
    def break_it(dataset):
        path = dataset / name
        data = path.read_bytes()
        path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])

    return break_it


def image(name, shape, dtype=np.uint8):
    return lambda dataset: iio.imwrite(dataset / name, np.ones(shape, dtype))


S = "sequences/03"
IDENTITY = "1 0 0 0 0 1 0 0 0 0 1 0"
BROKEN = {
    "calibration gone": (
        lambda d: (d / S / "calib.txt").unlink(),
        None,
        "calib.txt: cannot be read",
    ),
    "calibration line gone": (
        edit(f"{S}/calib.txt", 2, None),
        None,
        "calib.txt: line P2 is missing",
    ),
    "calibration short": (
        edit(f"{S}/calib.txt", 2, "P2: 1 2 3"),
        None,
        "line P2: 3 numbers instead of 12",
    ),
    "calibration garbled": (
        edit(f"{S}/calib.txt", 4, "Tr: 1 2 x"),
        None,
        "line Tr: could not convert",
    ),
    "calibration without colon": (edit(f"{S}/calib.txt", 0, "P0 1 2"), None, "'P0 1 2' is no"),
    "calibration binary": (
        lambda d: (d / S / "calib.txt").write_bytes(b"\xff\xfe\x80"),
        None,
        "not a text file",
    ),
    "calibration no pinhole": (
        edit(f"{S}/calib.txt", 2, f"P2: {row(-np.eye(4))}"),
        None,
        "line P2 is no rectified",
    ),
    "Tr no rotation": (
        edit(f"{S}/calib.txt", 4, f"Tr: {row(2 * np.eye(4))}"),
        None,
        "line Tr: its 3x3 part is no rotation",
    ),
    "focal lengths of other images": (
        edit(f"{S}/calib.txt", 2, "P2: 150 0 9.5 0 0 150 5.5 0 0 0 1 0"),
        None,
        "calib.txt: focal lengths 150, 150 and principal point 10, 6 do not suit images of 12x20",
    ),
    "poses gone": (lambda d: (d / "poses/03.txt").unlink(), None, "03.txt: cannot be read"),
    "pose NaN": (
        edit("poses/03.txt", 2, IDENTITY.replace("0", "nan", 1)),
        None,
        "03.txt, line 3: not all numbers are finite",
    ),
    "pose short": (edit("poses/03.txt", 4, "1 2"), None, "03.txt, line 5: 2 numbers instead of 12"),
    "pose scaled": (
        edit("poses/03.txt", 1, IDENTITY.replace("1", "1.01")),
        None,
        "03.txt, line 2: its 3x3 part is no rotation",
    ),
    "pose mirrored": (
        edit("poses/03.txt", 1, "-" + IDENTITY),
        None,
        "03.txt, line 2: its 3x3 part is no rotation",
    ),
    "poses too few": (
        edit("poses/03.txt", 5, None),
        None,
        "03.txt: 5 lines, but 03/image_2 goes on to frame 000005",
    ),
    "poses empty": (cut("poses/03.txt", 0), None, "03.txt: 0 lines"),
    "no images": (
        lambda d: shutil.rmtree(d / S / "image_2"),
        None,
        "no image_2/000000.png nor image_0",
    ),
    "first PNG truncated": (cut(f"{S}/image_2/000000.png", 0.5), None, "000000.png: damaged"),
    "PNG truncated": (
        cut(f"{S}/image_2/000002.png", 0.8),
        lambda s: s.images(2),
        "000002.png: damaged",
    ),
    "PNG empty": (cut(f"{S}/image_2/000002.png", 0), lambda s: s.images(2), "000002.png: damaged"),
    "right PNG truncated": (
        cut(f"{S}/image_3/000002.png", 0.5),
        lambda s: s.stereo_pair(2),
        "image_3/000002.png: damaged",
    ),
    "PNG of another size": (
        image(f"{S}/image_2/000002.png", (9, 8, 3)),
        lambda s: s.images(2),
        "000002.png: 9x8 pixels, but image_2/000000.png has 12x20",
    ),
    "PNG of 16 bits": (
        image(f"{S}/image_2/000002.png", (12, 20), np.uint16),
        lambda s: s.images(2),
        "000002.png: uint16",
    ),
    "scan torn": (
        cut(f"{S}/velodyne/000005.bin", 30),
        lambda s: s.lidar(5),
        "000005.bin: torn, 30 bytes",
    ),
    "scan empty": (cut(f"{S}/velodyne/000005.bin", 0), lambda s: s.lidar(5), "000005.bin: torn"),
    "scan NaN": (
        lambda d: np.full(4, np.nan, np.float32).tofile(d / S / "velodyne/000005.bin"),
        lambda s: s.lidar(5),
        "not finite",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_input_is_named_in_one_line(root, case):
    break_it, read, message = BROKEN[case]
    break_it(root / "dataset")
    if read:  # what is not read does not stop the rest
        sequence = only(root)
    with pytest.raises(InputError) as caught:
        read(sequence) if read else only(root)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(6, 10), (6, 20), (12, 10), (24, 40), (9, 14)])
def test_resized_images_with_the_old_calibration_are_refused(root, size):
    folder = root / "dataset" / S
    for f in range(FRAMES):
        iio.imwrite(folder / "image_2" / f"{f:06d}.png", np.zeros((*size, 3), np.uint8))
    with pytest.raises(InputError, match=r"calib.txt: .* do not suit images of ") as caught:
        only(root)
    assert f"images of {size[0]}x{size[1]} pixels; scale" in str(caught.value)
    # with its calibration scaled likewise the sequence is as good as ever
    v, u = size[0] / HEIGHT, size[1] / WIDTH
    scaled = np.diag([u, v, 1]) @ np.array(projection(0.06))
    edit(f"{S}/calib.txt", 2, f"P2: {row(scaled)}")(root / "dataset")
    assert np.allclose(only(root).intrinsics, scaled[:, :3])


@pytest.mark.parametrize("focal", RECTIFIED)
@pytest.mark.parametrize("size", [None, (192, 640), (320, 1024), (352, 1216), UNRECTIFIED])
def test_the_calibrations_of_kitti_know_their_images(focal, size):
    f, x, y = focal
    camera = np.array([[f, 0, x], [0, f, y], [0, 0, 1]])
    if size is None:
        check_rectified("calib.txt", camera, RECTIFIED[focal])
        check_rectified("calib.txt", camera, (*RECTIFIED[focal], 3), RECTIFIED[focal])
        return
    told = "unrectified images; take the rectified" if size == UNRECTIFIED else "scale its numbers"
    for said in (None, size):  # S_rect may have been adapted, and P_rect not
        with pytest.raises(InputError, match=rf"for images of 37\dx12\d\d pixels.*{told}"):
            check_rectified("calib.txt", camera, size, said)
    v, u = np.array(size) / RECTIFIED[focal]
    check_rectified("calib.txt", np.diag([u, v, 1]) @ camera, size)  # resized with its images


def test_cameras_that_lie_aside_pass():
    """nuScenes' back camera, and a KITTI image whose upper third is cut off, as is its centre."""
    back = np.array([[809.2, 0, 829.2], [0, 809.2, 481.8], [0, 0, 1]])
    check_rectified("tables", back, (900, 1600), (900, 1600))
    with pytest.raises(InputError, match="tables: is for images of 900x1600 pixels, but they have"):
        check_rectified("tables", back, (450, 800), (900, 1600))
    with pytest.raises(InputError, match=r"tables: .* do not suit images of 450x800"):
        check_rectified("tables", back, (450, 800), (450, 800))
    check_rectified(
        "calib.txt", np.array([[707.1, 0, 601.9], [0, 707.1, 69.1], [0, 0, 1]]), (256, 1226)
    )


# what training does not need does not stop it: (what to break, what the note says)
UNNEEDED = {
    "right line gone": (edit(f"{S}/calib.txt", 3, None), "calib.txt: line P3 is missing"),
    "eyes swapped": (
        edit(f"{S}/calib.txt", 3, f"P3: {row(projection(1))}"), "P3 is not P2 moved to the right"),
    "another right camera": (
        edit(f"{S}/calib.txt", 3, "P3: 5 0 9.5 -9 0 5 5.5 0 0 0 1 0"),
        "P3 is not P2 moved to the right"),
    "right eye unreadable": (cut(f"{S}/image_3/000000.png", 60), "image_3/000000.png: damaged"),
    "right eye of another size": (
        image(f"{S}/image_3/000000.png", (6, 10, 3)),
        "image_3/000000.png: 6x10 pixels, but image_2/000000.png has 12x20"),
    "invalid gone": (
        lambda d: (d / S / "voxels/000005.invalid").unlink(),
        "1 of 2 labelled frames not scored for occupancy: .*000005.invalid is missing"),
    "label gone": (
        lambda d: (d / S / "voxels/000000.label").unlink(),
        "1 of 2 labelled frames not scored for occupancy: .*000000.label is missing"),
    "label short": (
        cut(f"{S}/voxels/000005.label", 4000),
        "1 of 2 labelled frames not scored .*: .*000005.label: 4000 bytes instead of 4194304"),
    "invalid short": (
        cut(f"{S}/voxels/000000.invalid", 1),
        "1 of 2 labelled frames not scored .*: .*000000.invalid: 1 byte instead of 262144"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNNEEDED)
def test_what_training_does_not_need_is_told_and_left_out(root, case):
    break_it, said = UNNEEDED[case]
    whole = only(root)
    break_it(root / "dataset")
    sequence = only(root)
    (note,) = sequence.missing
    assert re.search(said, note) and "\n" not in note
    assert np.array_equal(sequence.images(3), whole.images(3))
    assert (sequence.stereo_pair(0) is None) == ("right" in case or case == "eyes swapped")
    broken = {"invalid gone": [0], "label short": [0], "label gone": [5], "invalid short": [5]}
    assert sequence.labelled == broken.get(case, [0, 5])  # never scored with unknown as free
    assert [f for f in (0, 5) if sequence.voxels(f) is not None] == sequence.labelled


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("part", ["velodyne/000005.bin", "image_3/000005.png"])
def test_damaged_truth_stops_scoring_not_training(part, split, root, capsys):
    if part.startswith("image_3"):
        (root / "dataset" / S / "velodyne/000005.bin").unlink()
    cut(f"{S}/{part}", 30)(root / "dataset")
    settings = ("data.crop=12,20", "data.pad=32,64", "data.source=0.1,9", f"data.{split}=03")
    config = build("street_kitti", settings)
    dataset = open_dataset(config, split, Folders(root))
    dataset.train, dataset.index = False, [(0, 5)]  # as for a picture or the validation
    for _ in range(2):
        sample = dataset[0]
        assert sample.lidar is None and sample.voxels is not None
        assert (sample.stereo is None) == part.startswith("image_3")
    assert len(pickle.loads(pickle.dumps(dataset))) == 1
    said = capsys.readouterr().err
    assert said.count("note: ") == 1 and said.startswith(f"note: {root / 'dataset' / S / part}: ")
    with pytest.raises(InputError, match=part):
        VideoDataset.every_frame(only(root), config.data)[5]


# scans: a file does not say how many floats a point has


def scan(columns, points=40):
    """Points of KITTI (4 columns) or of nuScenes (5)."""
    rng = np.random.default_rng(1)
    xyz = rng.uniform(-60, 60, (points, 3))
    more = rng.random((points, 1)) if columns == 4 else rng.integers(0, 32, (points, 2))
    return np.concatenate([xyz, more], 1).astype("<f4")


def test_the_columns_of_a_scan_are_told_apart(tmp_path):
    path = tmp_path / "scan.bin"
    for columns in (4, 5):  # 40 points of either are whole points of the other as well
        scan(columns).tofile(path)
        assert np.array_equal(read_points(path, columns), scan(columns)[:, :3])
        with pytest.raises(InputError, match=rf"scan.bin: holds {columns} floats a point"):
            read_points(path, 9 - columns)
    grey = scan(4)
    grey[:, 3] *= 255  # intensities as nuScenes has them, in four columns
    grey.tofile(path)
    with pytest.raises(InputError, match=r"scan.bin: holds 4 floats a point"):
        read_points(path, 5)
    for wrong in (scan(4)[:, :3], scan(4).astype("<f8"), scan(4)[:, ::-1]):
        wrong.tofile(path)
        for columns in (4, 5):
            with pytest.raises(InputError, match=rf"scan.bin: (is not {columns} float32 a|torn)"):
                read_points(path, columns)


# SemanticKITTI's .bin


def test_the_scan_as_voxels(root):
    folder = root / "dataset" / S
    hit = np.zeros((256, 256, 32), bool)
    hit[50, 138, 1] = hit[25, 122, 12] = True
    np.packbits(hit).tofile(folder / "voxels" / "000005.bin")
    points = np.array([[10.1, 2.1, -1.7, 0.3], [5.1, -1.1, 0.5, 0.1], [9, 30, 0, 0]], np.float32)
    points.tofile(folder / "velodyne" / "000005.bin")
    on_disk, computed = only(root).voxel_scan(5)
    assert np.array_equal(on_disk, computed) and on_disk.sum() == 2
    assert only(root).voxel_scan(0) is None


def test_wrong_places_are_named_in_one_line(root):
    (root / "empty").mkdir()
    wrong = {
        "elsewhere: no such folder": lambda: only(root / "elsewhere"),
        "no KITTI odometry data": lambda: only(root / "empty"),
        "no sequence 17; it holds 03": lambda: kitti_sequences(root, ["17"]),
        "no frame 6; it holds 0 to 5": lambda: only(root, range(4, 8)),
        "chooses nothing": lambda: only(root, range(4, 4)),
    }
    for message, read in wrong.items():
        with pytest.raises(InputError) as caught:
            read()
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_no_truncation_of_a_png_goes_unnoticed(root):
    path = root / "dataset/sequences/03/image_2/000001.png"
    data, sequence = path.read_bytes(), only(root)
    want = sequence.images(1)
    for keep in range(0, len(data), 7):
        path.write_bytes(data[:keep])
        try:
            got = sequence.images(1)
        except InputError:
            continue
        assert np.array_equal(got, want)  # only what ends after the last pixel may pass


# stereo


def test_block_matching_recovers_a_slanted_plane():
    torch.manual_seed(0)
    h, w = 60, 160
    scene = torch.nn.functional.interpolate(
        torch.rand(1, 1, h, 2 * w) * 255, scale_factor=(1, 2), mode="bilinear", align_corners=True
    )[0, 0]
    v, u = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    truth = 6 + 0.12 * v  # a road: disparity grows from row to row

    def sample(x):  # the scene at sub-pixel columns
        low = x.floor().long()
        return scene[v, low] * (1 - (x - low)) + scene[v, low + 1] * (x - low)

    left, right = sample(u + 40.0), sample(u + 40.0 + truth)
    disparity = block_matching(left, right, 24)
    found = disparity > 0
    assert found[5:-5, 25:-10].float().mean() > 0.8
    assert (disparity - truth).abs()[found].median() < 0.1
    assert ((disparity - truth).abs()[found] < 1).float().mean() > 0.995
    assert not found[:, :5].any()  # their match lies outside the right image


def test_block_matching_claims_nothing_without_texture_or_match():
    torch.manual_seed(0)
    flat = torch.full((40, 80), 90.0)
    assert not block_matching(flat, flat, 16).any()
    noise, other = torch.rand(2, 40, 80) * 255
    assert (block_matching(noise, other, 16) > 0).float().mean() < 0.01


@pytest.fixture(scope="module")
def real():
    if not REAL.is_dir():
        pytest.skip(f"no excerpt of KITTI at {REAL}")
    return kitti_sequences(REAL, ["06"])[0]


def test_real_excerpt(real):
    assert real.frames == 51 and real.image(50, 0).shape == (370, 1226, 3)
    assert real.path[-1] == pytest.approx(59.8, abs=0.1)
    assert not real.labelled and len(real.missing) == 4
    assert real.stereo_pair(40)[3] == pytest.approx(0.5372, abs=1e-4)


def test_real_stereo_sees_the_road_and_agrees_with_the_next_frame(real):
    depth = stereo_depth(real.stereo_pair(45))
    found = depth > 0
    assert 0.3 < found.mean() < 0.7
    v, u = np.nonzero(found)
    z = depth[found].astype(np.float64)
    points = np.stack([u * z, v * z, z], 1) @ np.linalg.inv(real.intrinsics).T

    road = points[(np.abs(points[:, 0]) < 2) & (points[:, 1] > 1) & (z < 15)]
    design = np.stack([np.ones(len(road)), road[:, 0], road[:, 2]], 1)
    height = np.linalg.lstsq(design, road[:, 1], rcond=None)[0][0]
    assert height == pytest.approx(1.65, abs=0.05)

    def error(scale):  # photometric, where these points lie in the next frame
        to_next = np.linalg.inv(real.cameras(46)[1][0]) @ real.cameras(45)[1][0]
        q = (scale * points @ to_next[:3, :3].T + to_next[:3, 3]) @ real.intrinsics.T
        x, y = np.rint(q[:, :2] / q[:, 2:]).astype(int).T
        inside = (x >= 0) & (x < 1226) & (y >= 0) & (y < 370) & (q[:, 2] > 0)
        now, after = (real.image(f, 0)[..., 0].astype(float) for f in (45, 46))
        return np.abs(now[v, u][inside] - after[y[inside], x[inside]]).mean()

    still = np.abs(
        np.subtract(*(real.image(f, 0)[..., 0].astype(float)[found] for f in (45, 46)))
    ).mean()
    assert error(1.0) < 0.4 * still
    assert error(1.0) < min(error(0.9), error(1.1))
