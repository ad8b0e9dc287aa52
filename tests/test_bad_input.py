"""Whatever is wrong is told in one line, with exit code 2, and nothing that was there is lost."""

import re
import shutil

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import eval as eval_script
import train as train_script
from selfocc import checkpoint
from tests.tiny import TORCHRUN, overrides, run

PINHOLE = "60 0 32 0 0 60 12 0 0 0 1 0"
VELO_TO_CAM = "0 -1 0 0 0 0 -1 -0.08 1 0 0 -0.27"
GRID = 256 * 256 * 32


@pytest.fixture
def kitti(tmp_path):
    """KITTI's sequence 06: eight frames of noise, a metre apart, voxels of the first."""
    sequence = tmp_path / "kitti" / "dataset" / "sequences" / "06"
    poses = tmp_path / "kitti" / "dataset" / "poses"
    for folder in (sequence / "image_2", sequence / "voxels", poses):
        folder.mkdir(parents=True)
    (sequence / "calib.txt").write_text(f"P2: {PINHOLE}\nTr: {VELO_TO_CAM}\n")
    lines = (f"1 0 0 0 0 1 0 0 0 0 1 {frame}\n" for frame in range(8))
    (poses / "06.txt").write_text("".join(lines))
    rng = np.random.default_rng(0)
    for frame in range(8):
        image = rng.integers(0, 256, (32, 64, 3), dtype=np.uint8)
        iio.imwrite(sequence / "image_2" / f"{frame:06d}.png", image)
    np.full(GRID, 40, np.uint16).tofile(sequence / "voxels" / "000000.label")
    np.zeros(GRID // 8, np.uint8).tofile(sequence / "voxels" / "000000.invalid")
    return tmp_path / "kitti"


def kitti_options(folder):
    options = ("--dataset", "kitti", "--data", folder, "--train", "06", "--val", "06")
    return tuple(str(word) for word in options)


@pytest.fixture
def call(cache, capsys, monkeypatch):
    """Run a script's command line here; it must fail in one line, which is returned."""

    def call(script, *words, **changes):
        monkeypatch.setenv("SELFOCC_CACHE", str(cache))
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        words = [str(word) for word in words]
        if script is train_script:
            words += [word for o in overrides(**changes) for word in ("--set", o)]
        code = script.main(words)
        lines = [line for line in capsys.readouterr().err.splitlines() if "it/s" not in line]
        assert code == 2
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
        return lines[-1]

    return call


def truncate(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def drop_line(path, number):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:number] + lines[number + 1 :]))


@pytest.mark.parametrize(
    "options, said",
    [
        (("--dataset", "kitti"), "needs --data DIR"),
        (
            ("--dataset", "kitti", "--preset", "kitti", "--data", "nowhere"),
            "nowhere: no such folder",
        ),
        (("--preset", "sinthetic"), "did you mean 'synthetic'"),
        (("--set", "optim.step=3"), "did you mean 'steps'"),
        (("--unknown",), "unrecognized arguments: --unknown"),
        (("--dataset", "cityscapes"), "invalid choice: 'cityscapes'"),
        (("--device", "tpu"), "--device tpu"),
        (("--device", "cuda"), "--device cuda"),
        (("--backbone-weights", "nowhere.pth"), "nowhere.pth"),
        (("--resume",), "no checkpoint"),
    ],
    ids=" ".join,
)
def test_options(options, said, call, tmp_path):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert said in call(train_script, *options, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unwritable_folders(finished, call, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for script, words in ((train_script, ()), (eval_script, ("--ckpt", finished))):
        assert "Not a directory" in call(script, *words, "--out", tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.parametrize(
    "path, change, said",
    [
        ("sequences/06/calib.txt", lambda p: drop_line(p, 0), "line P2 is missing"),
        ("sequences/06/image_2/000000.png", lambda p: truncate(p, 400), "000000.png: damaged"),
        ("poses/06.txt", lambda p: drop_line(p, 0), "7 lines"),
        (
            "poses/06.txt",
            lambda p: p.write_text(p.read_text().replace("5\n", "nan\n")),
            "06.txt, line 6",
        ),
    ],
    ids=["calibration line", "truncated PNG", "too few poses", "NaN pose"],
)
def test_kitti_files(path, change, said, kitti, call, tmp_path):
    change(kitti / "dataset" / path)
    options = ("--preset", "synthetic", *kitti_options(kitti))
    assert said in call(train_script, *options, "--out", tmp_path / "run")


def test_voxels_that_are_not_whole(kitti, finished, call, capsys, tmp_path):
    """What training does not need does not stop it, and is never scored."""
    voxels = kitti / "dataset/sequences/06/voxels"
    shutil.copy(voxels / "000000.label", voxels / "000001.label")  # without .invalid
    truncate(voxels / "000000.label", 4000)
    options = kitti_options(kitti)
    said = call(eval_script, "--ckpt", finished, *options, "--out", tmp_path)
    assert "000000.label: 4000 bytes instead of 4194304" in said
    words = ["--preset", "synthetic", *options, "--out", str(tmp_path / "run")]
    settings = overrides(optim__steps="1", optim__workers="0")
    assert train_script.main([*words, *(w for o in settings for w in ("--set", o))]) == 0
    told = capsys.readouterr()
    assert "val_IoU" not in told.out + told.err
    assert re.search(
        "2 of 2 labelled frames not scored for occupancy: .*000000.label: 4000 bytes instead of",
        told.out + told.err,
    )


@pytest.fixture
def copied(finished, tmp_path):
    """A run of six steps that may be spoilt."""
    return shutil.copytree(finished, tmp_path / "copied")


def test_truncated_png_met_by_a_worker(kitti, copied, cache):
    before = (copied / checkpoint.FILE_NAME).read_bytes()
    for frame in range(1, 8):
        truncate(kitti / f"dataset/sequences/06/image_2/{frame:06d}.png", 400)
    options = ("--preset", "synthetic", "--resume", "--out", copied, *kitti_options(kitti))
    done = run("train.py", *options, cache=cache, optim__steps="50", optim__workers="1")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "damaged or unreadable PNG; copy it again" in last
    assert (copied / checkpoint.FILE_NAME).read_bytes() == before


def test_full_disk_keeps_the_previous_checkpoint(copied, cache):
    before = (copied / checkpoint.FILE_NAME).read_bytes()
    options = ("--resume", "--out", copied)
    done = run("train.py", *options, cache=cache, limit=20_000, optim__steps="50")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: cannot write") and "the previous one is kept" in last
    assert (copied / checkpoint.FILE_NAME).read_bytes() == before
    assert not list(copied.glob(".*"))


def test_run_folder_is_not_overwritten(copied, call):
    before = (copied / checkpoint.FILE_NAME).read_bytes()
    assert "already holds a run" in call(train_script, "--out", copied)
    assert (copied / checkpoint.FILE_NAME).read_bytes() == before


def test_checkpoint_of_another_preset(copied, call):
    before = (copied / checkpoint.FILE_NAME).read_bytes()
    options = ("--resume", "--out", copied)
    said = call(train_script, "--preset", "street", *options)
    assert "is of preset synthetic, not street" in said
    said = call(train_script, *options, backbone__width="16")
    assert "the checkpoint is of another model: backbone." in said
    assert (copied / checkpoint.FILE_NAME).read_bytes() == before


def test_unreadable_checkpoints(copied, call, tmp_path):
    file, picture = copied / checkpoint.FILE_NAME, tmp_path / "picture.png"
    iio.imwrite(picture, np.zeros((8, 8, 3), np.uint8))
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, other)
    truncate(file, file.stat().st_size - 1000)
    short = file.read_bytes()
    assert "truncated" in call(eval_script, "--ckpt", file)
    assert "truncated" in call(train_script, "--resume", "--out", copied)
    assert file.read_bytes() == short
    assert "not a readable checkpoint" in call(eval_script, "--ckpt", picture)
    assert "not a SelfOcc checkpoint" in call(eval_script, "--ckpt", other)
    assert "no checkpoint" in call(eval_script, "--ckpt", tmp_path / "nowhere")


def test_one_failing_process_ends_all_and_alone_says_why(cache, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    done = run(*TORCHRUN, "--out", tmp_path / "file" / "run", cache=cache)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "Not a directory" in said[0]
    assert "RuntimeError" not in done.stderr
