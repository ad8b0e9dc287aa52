"""A run's folder: who owns it, and going on from what it holds."""

import fcntl
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import train as train_script
from selfocc import InputError, checkpoint, files, presets, runs
from selfocc.datasets import Folders
from tests.tiny import ROOT, overrides

HOLD = "import sys; from pathlib import Path; from selfocc import files\n" + (
    "with files.owned(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def owner(tmp_path):
    """Another process, which owns the folder `run` until it is told to end or killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_has_one_owner(owner, tmp_path):
    said = f"is being written by process {owner.pid} on "
    with pytest.raises(InputError, match=said), files.owned(tmp_path / "run"):
        pass
    with files.owned(tmp_path / "another"):
        pass


@pytest.mark.parametrize("name", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_owner_owns_nothing(owner, tmp_path, name):
    owner.send_signal(name)
    owner.wait()
    with files.owned(tmp_path / "run") as folder:
        (folder / "kept").write_text("")
    assert (folder / "kept").exists()


def test_a_lock_on_a_file_that_is_gone_is_none(tmp_path, monkeypatch):
    """Between opening the file and locking it, its owner ends and removes it."""
    path, lock = tmp_path / files.OWNER, fcntl.lockf
    path.write_text("process 1 on a")

    def late(file, how):
        if path.exists() and path.read_text() == "process 1 on a":
            path.unlink()
        lock(file, how)

    monkeypatch.setattr(files.fcntl, "lockf", late)
    with files.owned(tmp_path):
        assert path.read_text().startswith(f"process {os.getpid()} on ")
    assert not path.exists()


def test_workers_do_not_inherit_the_folder(tmp_path):
    """A run that was killed is gone, however long its workers need to notice."""
    code = HOLD.replace("print", "import os; os.fork() or __import__('time').sleep(60); print")
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "held\n"
    process.kill()
    process.wait()
    with files.owned(tmp_path):
        pass
    subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)


def test_a_folder_in_which_nothing_was_written_goes_again(tmp_path):
    with pytest.raises(InputError, match="wrong"), files.owned(tmp_path / "new"):
        raise InputError("wrong")
    assert not (tmp_path / "new").exists()
    tmp_path.joinpath("old").mkdir()
    with files.owned(tmp_path / "old"):
        pass
    assert (tmp_path / "old").is_dir()


def test_training_and_evaluation_leave_an_owned_folder_alone(owner, tmp_path, capsys):
    import eval as eval_script

    settings = presets.build("synthetic", overrides())
    checkpoint.write(tmp_path / checkpoint.FILE_NAME, checkpoint.Checkpoint(settings, 1, {}))
    for script, words in ((train_script, ()), (eval_script, ("--ckpt", str(tmp_path)))):
        assert script.main([*words, "--out", str(tmp_path / "run")]) == 2
        assert f"is being written by process {owner.pid}" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [files.OWNER]


@pytest.fixture
def started(tmp_path, cache, monkeypatch):
    """The folder of a run that was stopped before its first checkpoint."""
    monkeypatch.setenv("SELFOCC_CACHE", str(cache))
    settings = presets.build("synthetic", [*overrides(optim__steps=1)])
    runs.Run(settings, Folders(), 1).write(tmp_path)
    return tmp_path


def test_a_run_goes_on_without_being_told(started, capsys):
    assert train_script.main(["--out", str(started), "--resume"]) == 0
    assert checkpoint.load(started).step == 1
    assert "steps 0 to 1" in capsys.readouterr().out
    assert train_script.main(["--out", str(started), "--resume", "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "optim.steps is now 2, was 1" in said and said.count(" is now ") == 1
    saved = checkpoint.load(started)
    assert saved.step == 2 and saved.config.volume.nodes == (17, 17, 5)
    assert train_script.main(["--out", str(started), "--resume"]) == 0
    assert "step 2 was the last; --steps N" in capsys.readouterr().out


def test_a_run_of_another_preset(started, capsys):
    words = ["--out", str(started), "--resume", "--preset", "kitti"]
    assert train_script.main(words) == 2
    assert "the run is of preset synthetic, not kitti" in capsys.readouterr().err


def test_nothing_to_go_on_from(tmp_path, capsys):
    assert train_script.main(["--out", str(tmp_path), "--resume"]) == 2
    assert "no checkpoint at" in capsys.readouterr().err


def test_record_and_what_changes(tmp_path):
    settings = presets.build("kitti")
    first = runs.Run(settings, Folders(data=Path("/a"), labels=Path("/b")), 2, Path("/c"))
    first.write(tmp_path)
    assert runs.read(tmp_path) == first
    assert first.changed(first) == []
    assert runs.completed(Folders(), first.folders) == first.folders
    assert runs.completed(Folders(data=Path("/a")), first.folders) == first.folders
    given = Folders(poses=Path("/p"))
    assert runs.completed(given, first.folders) == replace(first.folders, poses=Path("/p"))
    given = Folders(data=Path("/d"))
    assert runs.completed(given, first.folders) == given  # labels of /a are not of /d
    assert runs.completed(Folders(data=Path("d")), Folders()).data == Path.cwd() / "d"
    now = runs.Run(presets.build("kitti", ["optim.lr=0.5"]), Folders(data=Path("/d")), 4)
    lines = now.changed(first)
    assert lines[0] == "optim.lr is now 0.5, was 0.001"
    assert "data is now /d, was /a" in lines[1] and "labels is now None, was /b" in lines[2]
    assert lines[3].startswith("4 processes now, 2 before")


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"settings": {"optim": {"lr": "x"}}}'])
def test_a_damaged_record(tmp_path, content):
    (tmp_path / runs.FILE_NAME).write_text(content)
    with pytest.raises(InputError, match="is damaged"):
        runs.read(tmp_path)
