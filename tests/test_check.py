"""The check of data folders: sound data pass, each kind of damage is named, wrong poses show."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from selfocc.config import DataConfig
from selfocc.datasets.check import Report, main, overlay
from selfocc.datasets.epipolar import epipolar_offset, scan_agreement
from selfocc.datasets.export_kitti import export_kitti_raw
from selfocc.datasets.kitti import kitti_sequences
from selfocc.datasets.synthetic import SyntheticConfig, SyntheticSequence, synthetic_sequences

REAL = Path(__file__).parents[2] / "shared" / "data"
SIZE, FRAMES = (96, 192), 6
DRIVE = "2011_09_26/2011_09_26_drive_0001_sync"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    config = SyntheticConfig(image_size=SIZE, frames=FRAMES, movers=0, rigs=0.0)
    return synthetic_sequences(config, "train", 1, cache=tmp_path_factory.mktemp("cache"))[0]


@pytest.fixture(scope="module")
def exported(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    export_kitti_raw([world], folder)
    return folder


class Moved(SyntheticSequence):
    """The world, whose cameras of odd frames are turned or moved by a matrix."""

    def __init__(self, world, matrix, **changes):
        vars(self).update(vars(world), matrix=matrix, **changes)

    def cameras(self, frame):
        intrinsics, poses = super().cameras(frame)
        return intrinsics, poses @ self.matrix if frame % 2 else poses


def turned(degrees, axis):
    angle, matrix = np.deg2rad(degrees), np.eye(4)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
    return matrix


def test_matches_lie_on_epipolar_lines_of_true_poses_only(world):
    true = [epipolar_offset(world, f, f + 1) for f in range(4)]
    assert np.median(true) < 0.5
    for axis in (0, 2):  # pitch and roll
        wrong = [epipolar_offset(Moved(world, turned(3, axis)), f, f + 1) for f in range(4)]
        assert np.median(wrong) > 3 * np.median(true) and np.median(wrong) > 1.5


def test_scans_follow_true_poses_only(world):
    moved, still = np.median([scan_agreement(world, f, f + 2) for f in range(3)], axis=0)
    assert moved < 0.6 * still
    back = np.eye(4)
    back[2, 3] = -4.0  # metres, more than the way between the frames: they seem to go backwards
    wrong = [scan_agreement(Moved(world, back), f, f + 1) for f in range(3)]
    assert np.median(wrong, axis=0)[0] > still


def test_no_texture_no_claim(world):
    class Blank(Moved):
        def image(self, frame, camera):
            return np.full((*SIZE, 3), 90, np.uint8)

    assert epipolar_offset(Blank(world, np.eye(4)), 0, 1) is None


def test_overlay_marks_where_points_are(world):
    (drawn,) = overlay(world, 0)
    assert drawn.shape == (*SIZE, 3)
    changed = (drawn != world.images(0)[0]).any(-1)[16:]  # below the caption
    assert 0.1 < changed[40:].mean() < 0.9


def check(folder, out, *more):
    return main(["--dataset", "kitti_raw", "--preset", "street_kitti_raw", "--data", str(folder),
                 "--out", str(out), "--set", "data.crop=96,192", "--train",
                 "2011_09_26_drive_0001_sync:0-5", "--val", "2011_09_26_drive_0001_sync:0-5",
                 *more])  # fmt: skip


def test_sound_data_pass_with_what_each_task_needs(exported, tmp_path, capsys):
    assert check(exported, tmp_path) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"2 sequences, 12 frames, \d+ m; read 12, of which 12 with images, 12 with li", said
    )
    assert re.search(r"matches lie 0\.\d pixels off", said) and "problem" not in said
    for line in (
        "occupancy: lacks voxel labels", "depth: judged against lidar",
        "semantic training: lacks --labels DIR", "training: 8 frames with neighbours 0.5 to 10 m",
    ):  # fmt: skip
        assert f"  {line}" in said
    assert {path.name for path in tmp_path.iterdir()} == {
        "kitti_raw_train.png",
        "kitti_raw_val.png",
    }


def test_rare_scans_are_not_overlooked(world):
    """Of few frames read, one is a frame that is judged by a scan."""

    class Rare(Moved):
        def lidar(self, frame):
            return super().lidar(frame) if frame in self.inputs else None

        def depth(self, frame):
            return None

    report = Report(
        "val",
        [Rare(world, np.eye(4), inputs=[3], labelled=[])],
        DataConfig(crop=SIZE, pad=(96, 192)),
    )
    report.check(1, pairs=0)
    assert report.found["lidar"] == 1 and "depth: judged against lidar" in report.needs()


def test_damage_is_listed_and_ends_with_2(exported, tmp_path, capsys):
    root = tmp_path / "broken"
    shutil.copytree(exported, root)
    image = root / DRIVE / "image_02/data/0000000002.png"
    image.write_bytes(image.read_bytes()[:300])
    scan = root / DRIVE / "velodyne_points/data/0000000003.bin"
    scan.write_bytes(scan.read_bytes()[:50])
    oxts = root / DRIVE / "oxts/data/0000000004.txt"
    words = oxts.read_text().split()
    words[0] = str(float(words[0]) + 1e-3)  # of a degree: 111 m to the north
    oxts.write_text(" ".join(words))
    assert check(root, tmp_path / "out") == 2
    said = capsys.readouterr()
    for problem in (
        r"0000000002.png: damaged", r"0000000003.bin: torn, 50 bytes",
        r"drive_0001_sync/l: 2 steps of more than [5-9].* the first, 11\d\.\d, after frame 0+3",
    ):  # fmt: skip
        assert re.search(f"problem: .*{problem}", said.out)
    assert re.search(r"^error: \d+ problems found, the first: ", said.err, re.MULTILINE)


def test_crop_and_data_set_are_checked(exported, tmp_path, capsys):
    few = ("--train", f"{DRIVE[11:]}:0-1", "--val", f"{DRIVE[11:]}:0-1")
    assert check(exported, tmp_path, *few, "--set", "data.crop=352,1216", "--frames", "2") == 2
    assert "96x192 pixels are fewer than the crop 352x1216" in capsys.readouterr().out
    assert main(["--data", str(exported)]) == 2
    assert "--dataset is needed" in capsys.readouterr().err
    for frames in ("-1", "1.5", "all"):
        assert check(exported, tmp_path, "--frames", frames) == 2
        assert f"'{frames}' is no whole number from 0 on" in capsys.readouterr().err


def test_the_preset_knows_its_data_set(exported, tmp_path, capsys):
    drive = ("--train", "2011_09_26_drive_0001_sync:2-2", "--val", "2011_09_26_drive_0001_sync:2-2")
    words = ["--preset", "street_kitti_raw", "--data", str(exported), "--out", str(tmp_path)]
    assert main([*words, *drive, "--set", "data.crop=96,192"]) == 2
    said = capsys.readouterr()
    assert "  2 sequences, 2 frames, 0 m; read 2, of which 2 with images" in said.out
    # a frame alone has no neighbours, which is the only thing to mend
    assert "training: no frame can be used" in said.out
    assert "error: 1 problem found, the first: no usable frame in" in said.err


def test_resized_images_are_a_problem(world):
    class Resized(Moved):
        def image(self, frame, camera):
            return super().image(frame, camera)[::2, ::2]

        def depth(self, frame):
            return None

        semantics = depth

    report = Report("train", [Resized(world, np.eye(4), labelled=[])], DataConfig(crop=(48, 96)))
    for frame in (0, 1):
        report._read(report.sequences[0], frame)
    said = set(report.problems)
    assert len(said) == 1 and "camera 0: focal lengths 111, 111 and principal point" in min(said)


@pytest.fixture(scope="module")
def voxels(tmp_path_factory):
    """The real excerpt's sequence 00, whose voxels/ may be changed."""
    if not (REAL / "semantickitti").is_dir():
        pytest.skip(f"no excerpt at {REAL / 'semantickitti'}")
    folder = tmp_path_factory.mktemp("semantickitti") / "dataset"
    below = "sequences/00"
    (folder / below).mkdir(parents=True)
    for part in ("poses", f"{below}/image_2", f"{below}/velodyne", f"{below}/calib.txt"):
        (folder / part).symlink_to(REAL / "semantickitti/dataset" / part)
    (folder / below / "voxels").mkdir()
    return folder


@pytest.mark.parametrize("shift", [-1, 0, 1, 5])
def test_voxels_that_lie_above_or_below_the_scans(shift, voxels):
    for path in (REAL / "semantickitti/dataset/sequences/00/voxels").iterdir():
        content = path.read_bytes()
        if path.suffix == ".bin":
            bits = np.unpackbits(np.frombuffer(content, np.uint8)).reshape(256, 256, 32)
            content = np.packbits(np.roll(bits, shift, axis=2)).tobytes()
        (voxels / "sequences/00/voxels" / path.name).write_bytes(content)
    sequence = kitti_sequences(voxels, ["00"])[0]
    report = Report("val", [sequence], DataConfig())
    for frame in sequence.labelled:
        report._read(sequence, frame)
    report._check_voxels()
    (line,) = [line for line in report.lines() if line.startswith("voxels/")]
    overlap = float(re.search(r"IoU of ([.\d]+) \(median of 2 frames\)", line)[1])
    assert overlap > 0.98 if shift == 0 else overlap < 0.25
    said = {
        -1: r"voxels lie 1 voxel below the scans: .* is 0\.[012]\d, and (0\.99|1\.00) there",
        1: r"voxels lie 1 voxel above the scans: .* is 0\.[012]\d, and (0\.99|1\.00) there; .*2020",
        5: r"voxels/\*\.bin and scans have an IoU of 0\.[01]\d; they are not of the same frames",
    }
    assert len(report.problems) == (shift != 0)
    assert shift == 0 or re.search(said[shift], report.problems[0])


def test_damaged_voxels_are_a_problem_though_training_goes_on(voxels):
    invalid = voxels / "sequences/00/voxels/000005.invalid"
    content = invalid.read_bytes()
    invalid.unlink()
    report = Report("val", kitti_sequences(voxels, ["00"]), DataConfig(crop=(370, 1220)))
    report.check(1, pairs=0)
    invalid.write_bytes(content)
    assert report.sequences[0].labelled == [0]
    assert any("000005.invalid is missing" in line for line in report.problems)
    assert any(line.startswith("1 of 2 labelled frames not scored") for line in report.notes)


@pytest.mark.parametrize("dataset", ["kitti", "kitti_raw"])
def test_real_excerpts_pass(dataset, tmp_path, capsys):
    if not (REAL / dataset).is_dir():
        pytest.skip(f"no excerpt at {REAL / dataset}")
    split = ["--train", "06:0-39", "--val", "06:40-50"] if dataset == "kitti" else []
    words = ["--dataset", dataset, "--preset", f"street_{dataset}", "--data", str(REAL / dataset)]
    assert main([*words, *split, "--frames", "4", "--out", str(tmp_path)]) == 0
    assert "problem" not in capsys.readouterr().out
