"""Folders of data, paths as they were named, and files that are written whole or not at all."""

import contextlib
import errno
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch

from selfocc import InputError

try:
    import fcntl
except ImportError:  # on Windows two runs into one folder are not noticed
    fcntl = None

OWNER = ".owner"  # locked by the process that writes to its folder


def as_named(path: Path) -> Path:
    """The absolute path with its links as they are named: only what a `..` follows is resolved."""
    parts = path.absolute().parts
    up = len(parts) - parts[::-1].index("..") if ".." in parts else 0
    return Path(*parts[:up]).resolve().joinpath(*parts[up:]) if up else Path(*parts)


def make_folder(path: Path) -> Path:
    """The folder, made with its parents where it is missing, before work is done for it.

    Raises InputError if it cannot be made, or no file can be written in it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path, buffering=0) as probe:
            probe.write(b"0")  # a full disk still takes empty files
    except OSError as error:
        raise InputError(
            f"cannot write in folder {path}: {error.strerror}; choose another"
        ) from None
    return path


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[Path]:
    """The folder, made, and in the block written to by this process alone.

    The lock is the kernel's: it ends with the process, however that ends, is not inherited by
    workers, and reaches other hosts where a network disk has locks. A folder in which the block
    writes nothing is removed again. Raises InputError where another process owns it.
    """
    made = not folder.exists()
    path = make_folder(folder) / OWNER
    with _locked(path) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield folder
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
                if made:
                    folder.rmdir()  # if it is empty


def _locked(path: Path) -> TextIO:
    """The file, opened and locked. Raises InputError where another process has locked it."""
    for _ in range(9):
        file = path.open("a+")
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # otherwise the disk has no locks
                file.seek(0)
                owner = file.read() or "another process"
                file.close()
                raise InputError(
                    f"{path.parent} is being written by {owner}; wait for it, stop it, or choose "
                    "another folder with --out"
                ) from None
        with contextlib.suppress(OSError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                break  # otherwise its owner has just removed it
    return file


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which becomes `path` at the end of the block.

    If the block fails, or the process dies in it, `path` stays what it was. Raises InputError where
    the block raises OSError (full disk, no permission).
    """
    temporary = path.with_name(f".{path.name}.partial")
    kept = " (the previous one is kept)" if path.exists() else ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as written:  # Windows syncs only what may be written
            os.fsync(written.fileno())
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}{kept}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_torch(path: Path, **options) -> object:
    """What torch.save wrote, on the CPU and without running code; options as of torch.load.

    Raises InputError for a file that is damaged, or needs code to run.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except Exception as error:  # torch raises whatever the broken byte leads to
        code = re.search(r"(?:GLOBAL|global) ([\w.]*\w)", str(error))
        if code:
            raise InputError(
                f"{path} needs to run {code[1]} to be read, which could do anything; save its "
                "state_dict alone, with torch.save, where you trust the file"
            ) from None
        reason = str(error).partition("\n")[0].partition(". In PyTorch")[0]
        raise InputError(f"{path}: not a readable torch file ({reason}); fetch it again") from None


def write_file(path: Path, content: bytes):
    """Write a file with its folder. Raises InputError if that is not possible."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def append(path: Path, text: str):
    """Write text at the end of a file. Raises InputError if that is not possible."""
    try:
        with path.open("a") as file:
            file.write(text)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
