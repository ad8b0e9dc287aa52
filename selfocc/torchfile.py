"""Files of torch.save from elsewhere: read without running code, checked before they are held."""

import ctypes
import mmap
import pickle  # the name of an error alone: nothing here unpickles
import re
import sys
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from selfocc import InputError


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict of a file of torch.save, memory mapped, without `module.` before its names.

    Raises InputError, before any of it is held in memory, if the file is damaged, larger than it
    says, or needs code to run.
    """
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)|global (\S+) ", str(error))
        what = next(filter(None, found.groups()), "code") if found else "code"
        raise InputError(
            f"{path} needs to run {what.rstrip('.,')} to be read, which could do anything; save "
            "its state_dict alone, with torch.save, where you trust the file"
        ) from None
    except Exception as error:  # torch raises whatever the broken byte leads to
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} cannot be read ({reason}); fetch it again") from None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state:
        raise InputError(f"{path} holds no state dict; name a published SelfOcc checkpoint")
    for name, tensor in state.items():
        dense = isinstance(tensor, Tensor) and tensor.layout is torch.strided
        if not isinstance(name, str) or not dense or tensor.is_quantized:
            raise InputError(
                f"{path}: {str(name)[:80]!r} is a {type(tensor).__name__}, not a plain tensor; "
                "name a published SelfOcc checkpoint"
            )
    held = sum(t.numel() * t.element_size() for t in state.values())
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.values()
    }
    if max(held, sum(storages.values())) > path.stat().st_size:
        raise InputError(f"{path} claims more numbers than it has bytes for; fetch it again")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def page_out(tensor: Tensor) -> None:
    """Free the memory of a tensor that is mapped from a file; it is read again when it is needed.

    Where the system cannot, nothing happens.
    """
    page, pageout = mmap.PAGESIZE, 21  # MADV_PAGEOUT, which Python does not name
    start = -(-tensor.data_ptr() // page) * page
    size = (tensor.data_ptr() + tensor.numel() * tensor.element_size() - start) // page * page
    if size > 0 and sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), pageout)


def _check_archive(path: Path) -> None:
    """Raise InputError unless the file is an archive as torch writes it, nothing packed."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
                raise InputError(f"{path} is compressed, which torch.save never does; not read")
            if sum(e.file_size for e in entries) > path.stat().st_size:
                raise InputError(f"{path} claims to hold more than its size; not read")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(
            f"{path} is not a whole file of torch.save, 1.6 or newer ({error}); fetch it again"
        ) from None
    if damaged is not None:
        raise InputError(f"{path} is damaged (in {damaged}); fetch it again")
