"""Files that are written whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from selfocc import InputError


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


def write_file(path: Path, content: bytes):
    """Write a file with its folder. Raises InputError if that is not possible."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
