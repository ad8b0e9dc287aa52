"""Paths as they were named, and files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from selfocc import InputError


def as_named(path: Path) -> Path:
    """The absolute path with its links as they are named: only what a `..` follows is resolved."""
    parts = path.absolute().parts
    up = len(parts) - parts[::-1].index("..") if ".." in parts else 0
    return Path(*parts[:up]).resolve().joinpath(*parts[up:]) if up else Path(*parts)


def make_folder(path: Path) -> Path:
    """The folder, made with its parents where it is missing. Raises InputError if it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make folder {path}: {error.strerror}; choose another") from None
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which becomes `path` at the end of the block.

    If the block fails, or the process dies in it, `path` stays what it was. Raises InputError where
    the block raises OSError (full disk, no permission).
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.partial")
    kept = " (the previous one is kept)" if path.exists() else ""
    try:
        yield temporary
        with temporary.open("rb") as written:
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
