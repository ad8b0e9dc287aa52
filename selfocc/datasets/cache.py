"""Arrays kept on disk: written whole or not at all, checked when opened, remade when damaged."""

import functools
import hashlib
import os
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np

from selfocc import InputError
from selfocc.files import make_folder


def folder() -> Path:
    """$SELFOCC_CACHE, or ~/.cache/selfocc.

    Where there is no home to write in, as in containers, it is below the folder for temporary
    files, and that is said. Raises InputError if $SELFOCC_CACHE names a home that is not there.
    """
    named = os.environ.get("SELFOCC_CACHE")
    if named:
        try:
            return Path(named).expanduser()
        except RuntimeError:
            raise InputError(f"SELFOCC_CACHE is {named}, and there is no such home") from None
    try:
        kept = Path.home() / ".cache" / "selfocc"
        kept.mkdir(parents=True, exist_ok=True)
        return kept
    except (OSError, RuntimeError):
        return _temporary()


@functools.cache
def _temporary() -> Path:
    path = Path(tempfile.gettempdir()) / "selfocc"
    print(
        f"note: no home folder to keep files in, so in {path}; or set SELFOCC_CACHE",
        file=sys.stderr,
    )
    return path


def key(*parts):
    """A name that depends on everything given (through its repr)."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def load_or_make(path, make, dtype=None, shape=None, what="what was rendered"):
    """An array as a read-only memory map; where the file is missing or damaged `make()` gives it.

    A .npy file followed by 4 bytes, the CRC-32 of the rest; dtype and shape are those it must have,
    None where only `make` knows. Any number of processes may ask for the same file at once. Raises
    InputError if the folder cannot be written."""
    array = load(path, dtype, shape)
    if array is None:
        check_writable(path.parent)
        _store(path, make(), what)
        array = load(path, dtype, shape)
    if array is None:
        raise InputError(
            f"{path}: what was just written does not read back; check the disk or set SELFOCC_CACHE"
        )
    return array


def check_writable(path: Path) -> None:
    """Make the folder; InputError where it cannot be written, said before work is done for it."""
    try:
        make_folder(path)
    except InputError as error:
        raise InputError(f"{error} with SELFOCC_CACHE") from None


def load(path, dtype=None, shape=None):
    """The same, or None; also where the file has another dtype or shape."""
    try:
        raw = np.memmap(path, np.uint8, "r")
        if len(raw) < 4 or zlib.crc32(raw[:-4]) != int.from_bytes(raw[-4:].tobytes(), "little"):
            return None
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return array if dtype is None or (array.dtype, array.shape) == (dtype, shape) else None


def _store(path, array, what):
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "r+b") as file:
            np.save(file, array)
            file.flush()
            crc = zlib.crc32(np.memmap(temporary, np.uint8, "r"))
            file.write(crc.to_bytes(4, "little"))
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise InputError(
            f"{path.parent}: cannot keep {what} ({error.strerror}); free some space or "
            "set SELFOCC_CACHE to another folder"
        ) from error
