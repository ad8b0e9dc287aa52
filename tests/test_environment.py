"""What the machine lacks, or says differently, ends in one line or does no harm."""

import io
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from selfocc import InputError, distributed, evaluation, files, presets, protocols, render
from selfocc.batch import collate
from selfocc.commandline import Parser, run
from selfocc.datasets import cache, export, loader, nuscenes_tables, synthetic
from selfocc.datasets.loader import read_ahead
from selfocc.datasets.video import VideoDataset
from tests.tiny import ROOT

TORCHRUN = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}
CPU = torch.device("cpu")


def set_variables(monkeypatch, variables):
    for name in (*TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": "8"},
        {"RANK": "1"},
        {"LOCAL_RANK": "x"},
        {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
        TORCHRUN | {"LOCAL_RANK": ""},
    ],
    ids=lambda variables: ",".join(variables) or "none",
)
def test_part_of_the_variables_of_torchrun_is_one_process(variables, monkeypatch, capsys):
    set_variables(monkeypatch, variables)
    assert not distributed.under_torchrun()
    assert distributed.start(CPU) == (0, 1) and distributed.first_to_fail()
    said = capsys.readouterr().err
    assert said.startswith("note: WORLD_SIZE is set") == (variables.get("WORLD_SIZE", "1") != "1")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK is 3 and WORLD_SIZE 2"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"WORLD_SIZE": "2"}, "process 0 of 2 did not meet the others at 127.0.0.1:"),
        ({"taken": "yes"}, "address already in use"),
    ],
    ids=str,
)
def test_processes_that_do_not_meet_are_told_in_one_line(change, said, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "MEETING", timedelta(seconds=0.5))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        if change.pop("taken", None):
            taken.listen()
        else:
            taken.close()
        set_variables(monkeypatch, TORCHRUN | {"MASTER_PORT": port} | change)
        assert run(lambda: distributed.start(CPU)) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert said in line


@pytest.mark.parametrize(
    "name, said",
    [
        ("foo", "it may be cpu, cuda or cuda:N"),
        ("meta", "it may be cpu, cuda or cuda:N"),
        ("xpu", "it may be cpu, cuda or cuda:N"),
        ("cuda:", "it may be cpu, cuda or cuda:N"),
        ("mps", "cameras are float64, which MPS lacks; give --device cpu"),
        ("cuda:9", "the GPUs here are 0 to 1"),
        ("cuda", "process 2 of this machine needs its own"),
    ],
)
def test_device(name, said, monkeypatch):
    set_variables(monkeypatch, TORCHRUN | {"LOCAL_RANK": "2"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError) as error:
        distributed.choose_device(name)
    assert str(error.value).startswith(f"--device {name} cannot be used here")
    assert said in str(error.value) and len(str(error.value)) < 200


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.choose_device(None) == distributed.choose_device("cpu") == CPU
    with pytest.raises(InputError, match=r"finds no GPU|built for CPUs only"):
        distributed.choose_device("cuda:0")


def test_torch_without_its_distributed_part(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.delattr(torch.distributed, "is_initialized")
    with distributed.chief_first():
        assert distributed.gather_dicts({1: 2}) == {1: 2}


# -------------------------------------------------------------------------------------------------
# Workers


class Numbers(Dataset):
    """Items that are as harmful as they are told."""

    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.item(index)


# seconds until a worker ends, when all indices are handed out: PyTorch tells of its end by an
# exception out of a signal handler, which would leave a queue locked that is just written to
LATER = 0.5


class Unshared:
    """As a tensor for which there is no shared memory: it fails when handed over."""

    def __reduce__(self):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")


def kill_worker(index):
    if torch.utils.data.get_worker_info() is not None:
        time.sleep(LATER)
        os.kill(os.getpid(), signal.SIGKILL)
    return index


def hand_over(index):
    time.sleep(LATER)
    return Unshared()


@pytest.mark.parametrize("item", [kill_worker, hand_over])
def test_what_ends_a_worker_ends_the_run_in_one_line(item, monkeypatch, capsys):
    monkeypatch.setattr(loader, "_check_shared_memory", lambda *_: None)
    assert run(lambda: list(read_ahead(Numbers(item), 2, batch_size=None))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "DataLoader worker (pid" in line and "--shm-size" in line


def test_killed_process_of_prerender(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(synthetic, "_render", kill_process)
    world = synthetic.SyntheticConfig(frames=2, image_size=(8, 16))
    sequences = synthetic.synthetic_sequences(world, "train", 1, cache=tmp_path)
    assert run(lambda: synthetic.prerender(sequences)) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: a process that reads or renders ahead was ended")


def kill_process(*_):
    os.kill(os.getpid(), signal.SIGKILL)


Disk = namedtuple("Disk", "f_bavail f_blocks f_frsize")


@pytest.mark.parametrize(
    "free, size, world, enough",
    [
        (7992, 7992, 1, True),  # 6 batches (2 x 2 + 2) of 2 samples and 1 beside, 444 bytes each
        (7991, 8000, 1, False),
        (8000, 15983, 2, False),  # both processes need the same again
        (8000, 15984, 2, True),
    ],
)
def test_shared_memory_must_hold_what_is_read_ahead(free, size, world, enough, monkeypatch):
    monkeypatch.setattr(loader, "SHARED", Path("/"))
    monkeypatch.setattr(os, "statvfs", lambda _: Disk(free, size, 1))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    dataset = Numbers(lambda index: torch.zeros(111))
    options = dict(world=world, beside=1, batch_size=2)
    assert len(read_ahead(dataset, 0, **options)) == 2  # needs none
    if enough:
        read_ahead(dataset, 2, **options)
        return
    with pytest.raises(InputError, match=r"--shm-size=8g\), or --set optim.workers=0"):
        read_ahead(dataset, 2, **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A data set of the embedded world: 12 tiny frames."""
    changes = ["data.crop=32,64", "data.pad=32,64", "data.frames=12"]
    settings = presets.build("synthetic", changes)
    street = synthetic.SyntheticConfig(frames=12, image_size=(32, 64))
    folder = tmp_path_factory.mktemp("cache")
    sequences = synthetic.synthetic_sequences(street, "train", 1, cache=folder)
    return settings, VideoDataset(sequences, settings.data, train=True)


def test_what_workers_are_started_with_can_be_pickled(world):
    """On macOS and Windows, and on Linux from Python 3.14 on, workers are not forked."""
    settings, dataset = world
    dataset[0, 1]  # opens the memory map
    rules = protocols.choose(settings)
    samples = evaluation.Samples(dataset, rules, ("occupancy", "depth"), settings.volume)
    read, again, copy, _ = pickle.loads(
        pickle.dumps((dataset, samples, collate, loader._start_worker))
    )
    assert torch.equal(read[0, 1].images, dataset[0, 1].images)
    assert again.rules == rules and len(again.dataset) == len(dataset)
    assert copy([dataset[0, 1]]).name == [dataset[0, 1].name[0]]


# -------------------------------------------------------------------------------------------------
# Folders


def test_cache_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SELFOCC_CACHE", str(tmp_path / "named"))
    assert cache.folder() == tmp_path / "named"
    monkeypatch.setenv("SELFOCC_CACHE", "~/named")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "named"
    monkeypatch.delenv("SELFOCC_CACHE")
    assert cache.folder() == tmp_path / ".cache" / "selfocc"
    assert not capsys.readouterr().err


@pytest.mark.parametrize("home", ["none", "a file"])
def test_without_a_home_the_cache_is_a_temporary_folder(home, monkeypatch, tmp_path, capsys):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SELFOCC_CACHE", raising=False)
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    cache._temporary.cache_clear()
    if home == "none":
        monkeypatch.setattr(Path, "home", no_home)
    else:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert cache.folder() == cache.folder() == tmp_path / "selfocc"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: ") and "SELFOCC_CACHE" in line
    cache._temporary.cache_clear()


@pytest.mark.parametrize("folder", ["file/below", "/proc/selfocc", "/dev/full"])
def test_unwritable_cache_is_found_before_rendering(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(synthetic.SyntheticSequence, "render", None)
    world = synthetic.SyntheticConfig(frames=2, image_size=(8, 16))
    sequences = synthetic.synthetic_sequences(world, "train", 1, cache=tmp_path / folder)
    for work in (lambda: synthetic.prerender(sequences), lambda: sequences[0].images(0)):
        with pytest.raises(InputError, match="choose another with SELFOCC_CACHE"):
            work()


def full_disk(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_folder_that_takes_no_files_is_found_at_once(tmp_path, monkeypatch):
    assert list(files.make_folder(tmp_path / "new").iterdir()) == []
    monkeypatch.setattr(files.tempfile, "TemporaryFile", full_disk)
    with pytest.raises(InputError, match=r"cannot write in folder .*: No space left on device"):
        files.make_folder(tmp_path)


def test_export_tries_its_folder_before_rendering(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(synthetic.SyntheticSequence, "render", None)
    assert export.main(["kitti", str(tmp_path / "file" / "x"), "--frames", "2"]) == 2
    assert "Not a directory" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------
# Other systems


def test_modules_that_only_unix_has():
    """Everything is imported without them, and without Triton."""
    code = """if True:
        import os, sys
        for name in ("fcntl", "resource", "triton"):
            sys.modules[name] = None
        import train, eval, selfocc.bench, selfocc.datasets.check, selfocc.datasets.export
        from selfocc.datasets import nuscenes_tables
        assert nuscenes_tables.fcntl is None
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tables_are_indexed_without_file_locks(monkeypatch, tmp_path):
    for name in nuscenes_tables.NAMES:
        (tmp_path / f"{name}.json").write_text("[]")
    monkeypatch.setattr(nuscenes_tables, "fcntl", None)
    monkeypatch.setenv("SELFOCC_CACHE", str(tmp_path / "cache"))
    assert len(nuscenes_tables.Tables(tmp_path).index()) == 0


@pytest.mark.parametrize("system", ["macOS", "Windows"])
def test_free_memory_that_nobody_tells(system, monkeypatch):
    def sysconf(name):
        raise ValueError("unrecognized configuration name")

    if system == "macOS":
        monkeypatch.setattr(os, "sysconf", sysconf)
    else:
        monkeypatch.delattr(os, "sysconf")
    rays = render._rays_at_once(torch.zeros(1, 4, 2, 2, 2))
    assert rays == render.ASSUMED_FREE // 4 // (12 * 14)


# -------------------------------------------------------------------------------------------------
# Output and arguments


def test_home_folder_in_quotes(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = Parser()
    parser.add_argument("--out", type=Path)
    assert parser.parse_args(["--out=~/runs"]).out == tmp_path / "runs"
    assert parser.parse_args(["--out", "runs/~"]).out == Path("runs/~")
    with pytest.raises(InputError, match="no such home"):
        parser.parse_args(["--out=~nobody-of-this-name/runs"])


def test_names_that_the_terminal_cannot_show(monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert run(lambda: print("Straße \udcff")) == 0
    assert shown.buffer.getvalue() == b"Stra\\xdfe \\udcff\n"


def test_closed_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert run(lambda: sys.stdout.write("to nobody")) == 0


def test_reader_that_leaves(monkeypatch, capsys):
    """As `| head` does: no traceback, also when the output is written at the very end."""
    for lines in (1, 100_000):
        ours, theirs = os.pipe()
        os.close(ours)
        with open(theirs, "w") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            assert run(lambda n=lines: print("line\n" * n)) == 141
            monkeypatch.undo()
    assert not capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_output_that_is_full(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run(lambda: print("x" * 100_000)) == 2
        monkeypatch.undo()
    assert capsys.readouterr().err == "error: No space left on device\n"


def test_system_errors_are_told_in_one_line(capsys, tmp_path):
    assert run(lambda: np.load(tmp_path / "absent.npy")) == 2
    said = capsys.readouterr().err
    assert said == f"error: {tmp_path / 'absent.npy'}: No such file or directory\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError(
            "[enforce fail] err == 0. DefaultCPUAllocator: can't allocate memory: 9 bytes"
        ),
    ],
)
def test_out_of_memory_is_a_line(error, capsys):
    def work():
        raise error

    assert run(work) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory") and said.count("\n") == 1
    assert "Lower optim.batch" in said
