"""Gives memory back to the system while a model is loaded, so that its peak stays near what the model takes.

Knows nothing of models; everything here does nothing where the system has no such thing.
Called by model/quantize.py: a checkpoint is mapped, and every page of it that is read stays resident until the whole
file is closed; and what a layer needed for a moment stays with the process's heap.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

from torch import Tensor

_MADV_DONTNEED = 4  # Linux: pages of a file are read again when somebody looks
_MAPS = Path("/proc/self/maps")


def release_pages(tensor: Tensor) -> None:
    """Drop the resident pages of a contiguous tensor, if they are a file's: they are read again when somebody looks.

    What was written into such a tensor would be lost, so it must be as it was read. Pages of no file would lose their
    values altogether, and are left alone; so is everything on other systems than Linux.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < end and _is_of_file(start, end):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def trim_heap() -> None:
    """Give back what the C library keeps of freed memory, where it is glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _is_of_file(start: int, end: int) -> bool:
    """Whether a range of addresses is within one mapping of a file."""
    try:
        lines = _MAPS.read_text().splitlines()
    except OSError:
        return False
    for line in lines:
        addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
        first, last = (int(address, 16) for address in addresses.split("-"))
        if first <= start and end <= last:
            return inode != "0"
    return False
