"""The check of data folders: sound data pass, each kind of damage is named, wrong poses show."""

import copy
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from selfocc.batch import Frames, Sequence
from selfocc.config import DataConfig
from selfocc.datasets.captures import OPENGL
from selfocc.datasets.check import Report, main
from selfocc.datasets.epipolar import (
    CONVENTIONS,
    find_matches,
    offsets,
    parallax,
    scan_agreement,
)  # fmt: skip
from selfocc.datasets.export_kitti import export_kitti_raw
from selfocc.datasets.kitti import kitti_sequences
from selfocc.datasets.kitti_raw import kitti_raw_sequences
from selfocc.datasets.overlays import draw_matches, overlay
from selfocc.datasets.reading import path_length
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
    true = [offsets(world, f, f + 1).median() for f in range(4)]
    assert np.median(true) < 0.5
    for axis in (0, 2):  # pitch and roll
        wrong = [offsets(Moved(world, turned(3, axis)), f, f + 1).median() for f in range(4)]
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

    blank = Blank(world, np.eye(4), labelled=[])
    assert offsets(blank, 0, 1) is None and draw_matches(blank, 0, 1) is None
    report = Report("val", [blank], DataConfig(crop=SIZE))
    report.check(1)
    assert "no frames 0.3 to 3 m apart look alike: poses are not judged" in report.notes


def test_overlay_marks_where_points_are(world):
    (drawn,) = overlay(world, 0)
    assert drawn.shape == (*SIZE, 3)
    changed = (drawn != world.images(0)[0]).any(-1)[16:]  # below the caption
    assert 0.1 < changed[40:].mean() < 0.9


def test_matches_are_where_exact_depth_says(world):
    (found,) = find_matches(world, 1, 2)
    (k,), (here,) = world.cameras(1)
    u, v = found.corners.long().T.numpy()
    z = world.depth(1)[0][v, u]
    seen = found.found.numpy() & (z > 2)
    points = (np.stack([u, v, np.ones_like(u)], 1) * z[:, None]) @ np.linalg.inv(k).T
    motion = np.linalg.inv(world.cameras(2)[1][0]) @ here
    there = (points @ motion[:3, :3].T + motion[:3, 3]) @ k.T
    wrong = np.linalg.norm(there[:, :2] / there[:, 2:] - found.places.numpy(), axis=1)[seen]
    assert seen.sum() > 50 and np.median(wrong) < 0.7


def misread(sequence, given):
    """The sequence, with the matrices that are made of its camera_to_world in their place."""
    wrong, frames = copy.copy(sequence), range(sequence.frames)
    true = [sequence.cameras(f) for f in frames]
    mount = [np.linalg.inv(true[f][1][0]) @ sequence.volume_to_world(f) for f in frames]
    wrong.cameras = lambda f: (true[f][0].copy(), given(true[f][1]))
    wrong.volume_to_world = lambda f: given(true[f][1])[0] @ mount[f]
    wrong.positions = np.stack([given(true[f][1])[0, :3, 3] for f in frames])
    wrong.path = path_length(wrong.positions)
    return wrong


# how matrices were written that have to be read as each of CONVENTIONS says
WRITTEN = {
    "as given": lambda true: true,
    "with the cameras' y and z flipped": lambda true: true @ OPENGL,
    "inverted": np.linalg.inv,
    "inverted and then flipped": lambda true: np.linalg.inv(true @ OPENGL),
}


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("data", ["street", "drive 0005"])
def test_conventions_of_poses_are_told(data, convention, world):
    sequence, frames = world, (0, 2, 4)
    if data == "drive 0005":
        if not (REAL / "kitti_raw_0005").is_dir():
            pytest.skip(f"no excerpt at {REAL / 'kitti_raw_0005'}")
        chosen = "2011_09_26_drive_0005_sync:94-153"
        (sequence,) = kitti_raw_sequences(REAL / "kitti_raw_0005", "train", chosen)
        frames = (5, 45)
    sequence = misread(sequence, WRITTEN[convention])
    report = Report("train", [sequence], DataConfig())
    report._fit([(sequence, f, f + 1) for f in frames])
    (said,) = [line for line in report.lines() if "conventions" in line]
    if convention == "as given":
        assert said.startswith("ok: ") and report.verdict().startswith("can work")
    else:
        assert said.startswith("problem: ") and f"; use camera_to_world {convention}: of" in said
        assert report.verdict() == "cannot work as it is, 1 problem to mend"


def test_no_convention_is_blamed_for_other_mistakes(world):
    report = Report("train", [Moved(world, turned(8, 2))], DataConfig())
    report._fit([(report.sequences[0], f, f + 1) for f in range(3)])
    assert not report.problems and not report.facts


def test_the_worst_pair_is_named(world):
    class Once(Moved):
        def cameras(self, frame):
            return super().cameras(frame) if frame == 3 else SyntheticSequence.cameras(self, frame)

    report = Report("train", [Once(world, turned(3, 2))], DataConfig())
    report._check_matches([(report.sequences[0], f, f + 1) for f in range(5)])
    (said,) = [line for line in report.lines() if "epipolar" in line]
    assert re.search(
        r"^ok: matches lie 0\.\d pixels .* at most [2-6]\.\d \(.*0000(02|03) and", said
    )


def test_parallax_by_hand():
    k, size = np.array([[100.0, 0, 64], [0, 100, 32], [0, 0, 1]]), (64, 128)
    poses = np.tile(np.eye(4), (3, 1, 1, 1))
    poses[1, 0, :3, 3], poses[2, 0, :3, 3] = (0.5, 0, 0), (0, 0, 1)  # to the right, and ahead
    frames = [
        Frames(torch.zeros(1, 3, *size), torch.tensor(k[None]), torch.tensor(p)) for p in poses
    ]
    target, *sources = frames
    right, ahead = (source.each(lambda x: x[None]) for source in sources)
    assert parallax(target, right, 10.0) == pytest.approx(100 * 0.5 / 10)
    v, u = np.meshgrid(np.arange(0, 64, 4) - 32, np.arange(0, 128, 4) - 64)
    assert parallax(target, ahead, 10.0) == pytest.approx(np.sort(np.hypot(u, v), None)[255] / 9)


def test_too_little_parallax_is_a_problem_of_training(world):
    for scale, fine in ((1.0, True), (1 / 16, False)):
        data = DataConfig(crop=SIZE, pad=SIZE, source=(0.4, 10), target_scale=scale)
        report = Report("train", [world], data)
        report._check_parallax(3)
        (said,) = report.lines()[1:]
        pixels, far = map(float, re.findall(r"is ([.\d]+) pixels at 10 m and ([.\d]+)", said)[0])
        assert said.startswith("ok: " if fine else "problem: ") and pixels > 2.5 * far > 0
        assert pixels > 3 if fine else 0.05 < pixels < 0.5 and "--set data.source" in said


def test_what_stands_still_and_what_flickers(tmp_path):
    plain = SyntheticConfig(image_size=(48, 96), frames=6, movers=0)
    bright = SyntheticConfig(image_size=(48, 96), frames=6, movers=0, exposure=0.3)
    steady, flickers = (
        synthetic_sequences(c, "train", 1, cache=tmp_path)[0] for c in (plain, bright)
    )
    still = copy.copy(steady)
    still.positions = 0.01 * steady.positions
    said = {}
    for name, sequence in (("steady", steady), ("flickers", flickers), ("still", still)):
        report = Report("train", [sequence], DataConfig())
        report._check_video([(sequence, f, f + 1) for f in range(5)])
        said[name] = [*report.facts, *report.notes]
    assert all(line.startswith("ok: ") for line in said["steady"])
    changes = [
        100 * abs(sequence.images(f + 1)[0].mean() / sequence.images(f)[0].mean() - 1)
        for sequence in (steady, flickers) for f in range(5)
    ]  # fmt: skip
    assert f"changes by {np.median(changes[:5]):.1f}% to" in said["steady"][1]
    jumps = np.mean(np.array(changes[5:]) > 10)
    assert jumps >= 0.4 and said["flickers"][1].startswith("bright")
    assert f"changes by {np.median(changes[5:]):.1f}% to the next frame, by more than 10% in "
    assert f"in {jumps:.0%} of pairs; colours" in said["flickers"][1]
    assert said["still"][1].startswith("100% of frames are less than 0.05 m away")


class Wall(Sequence):
    """A wall 10 m away, passed in steps of 0.5 m; a share of its rows moves down by itself."""

    name, frames, labelled = "wall", 6, ()

    def __init__(self, share):
        self.share, self.texture = share, np.random.default_rng(0).uniform(0, 255, (40, 80))
        self.positions = np.arange(6)[:, None] * [0.5, 0, 0]
        self.path = path_length(self.positions)

    def frame_id(self, frame):
        return str(frame)

    def volume_to_world(self, frame):
        pose = np.eye(4)
        pose[:3, 3] = self.positions[frame]
        return pose

    def cameras(self, frame):
        k = np.array([[100.0, 0, 64], [0, 100, 48], [0, 0, 1]])
        return k[None], self.volume_to_world(frame)[None]

    def image(self, frame, camera):
        grey = np.kron(self.texture, np.ones((4, 4)))  # blocks of four pixels: corners
        alone = int(self.share * 96)  # rows
        rows = np.r_[np.arange(alone) + 40 - 5 * frame, np.arange(alone, 96) + 50]
        shown = grey[np.ix_(rows, np.arange(128) + 5 * frame)]  # 100 pixels * 0.5 m / 10 m
        return np.repeat(shown[..., None], 3, -1).astype(np.uint8)


def test_what_moves_by_itself_is_counted_roughly():
    shares = []
    for share in (0.0, 0.25, 0.5):
        report = Report("train", [Wall(share)], DataConfig(crop=(96, 128), pad=(96, 128)))
        report._check_matches([(report.sequences[0], f, f + 1) for f in range(3)])
        (said,) = [line for line in report.lines() if "by themselves" in line]
        shares.append(int(re.search(r"roughly (\d+)% of", said)[1]) / 100)
        assert said.startswith("note: " if share == 0.5 else "ok: ") or share == 0.25
    # corners near the seam, which differ between frames, are not found
    assert shares[0] < 0.02 and 0.1 < shares[1] < 0.27 and 0.36 < shares[2] < 0.52


def test_the_picture_of_matches_shows_dots_on_lines(world):
    drawn = draw_matches(world, 1, 2)
    height = 4 * SIZE[0]  # 192 pixels are drawn 768 wide, as at least 640 are
    assert drawn.shape[1] == 4 * SIZE[1] and 2 * height < len(drawn) < 2.3 * height
    # the one thing that is drawn between captions are dots and lines
    image = np.kron(world.image(2, 0), np.ones((4, 4, 1), np.uint8))
    changed = (drawn[-height:] != image).any(-1)
    assert 0.003 < changed.mean() < 0.2
    matches = find_matches(world, 1, 2)[0]
    shown = np.unique(np.linspace(0, len(matches.corners) - 1, 16).round().astype(int))
    places = [matches.places[p] for p in shown if matches.found[p]]
    assert len(places) > 5 and all(changed[int(4 * v + 2), int(4 * u + 2)] for u, v in places)


ENDINGS = "", "_ground", "_matches"


def check(folder, out, *more):
    return main(["--dataset", "kitti_raw", "--preset", "street_kitti_raw", "--data", str(folder),
                 "--out", str(out), "--set", "data.crop=96,192", "--train",
                 "2011_09_26_drive_0001_sync:0-5", "--val", "2011_09_26_drive_0001_sync:0-1",
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
    names = {f"kitti_raw_{s}{what}.png" for s in ("train", "val") for what in ENDINGS}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert len(re.findall(r"\n  verdict: can work, \d notes? to read\n", said)) == 2


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
    (line,) = [line for line in report.lines() if "voxels/*.bin and scans" in line]
    overlap = float(re.search(r"IoU of ([.\d]+) \(median of 2 frames\)", line)[1])
    assert overlap > 0.98 if shift == 0 else overlap < 0.25
    said = {
        -1: r"voxels/.* of 0\.[012]\d .*; 1 voxel higher they have (0\.99|1\.00); ",
        1: r"voxels/.* of 0\.[012]\d .*; 1 voxel lower they have (0\.99|1\.00); .*2020",
        5: r"voxels/\*\.bin and scans have an IoU of 0\.[01]\d .*; they are not of the same frames",
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


@pytest.mark.parametrize(
    "dataset, train, val",
    [("kitti", "06:0-39", "06:40-42"),
     ("kitti_raw", "2011_09_26_drive_0052_sync:0-30", "2011_09_26_drive_0052_sync:31-37")],
)  # fmt: skip
def test_real_excerpts_pass(dataset, train, val, tmp_path, capsys):
    if not (REAL / dataset).is_dir():
        pytest.skip(f"no excerpt at {REAL / dataset}")
    words = ["--dataset", dataset, "--preset", f"street_{dataset}", "--data", str(REAL / dataset)]
    words += ["--train", train, "--val", val]
    assert main([*words, "--frames", "2", "--out", str(tmp_path)]) == 0
    assert "problem" not in capsys.readouterr().out
