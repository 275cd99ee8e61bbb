"""Zeros with room to grow into: memory that the system hands out page by page, when it is first written.

Knows nothing of slots or sequences.
Called by kv/slots.py, whose arenas grow while others wait: an arena of 1.5 GB took 4 s to be made anew and filled.
"""

from __future__ import annotations

import math
import mmap
import sys

import torch


def zeros_with_room(size: tuple[int, ...], room: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros [size], on the CPU of a Unix with storage behind them for `room` entries of the first dimension.

    All of it takes no memory until it is written. Where no more is asked for than `size`, that is taken at once; on
    other systems, and where so large a mapping is refused (`ulimit -v`), there is no room behind either.
    """
    num_bytes = room * math.prod(size[1:]) * dtype.itemsize
    if device.type != "cpu" or sys.platform == "win32" or room <= size[0] or num_bytes == 0:
        return torch.zeros(size, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return torch.zeros(size, dtype=dtype, device=device)
    # The tensor keeps the mapping, which goes with it.
    return torch.frombuffer(memory, dtype=dtype)[: math.prod(size)].view(size)


def grown(tensor: torch.Tensor, length: int) -> torch.Tensor | None:
    """The same with `length` entries in its first dimension, on the storage it has; None where that has no room."""
    num_bytes = length * math.prod(tensor.shape[1:]) * tensor.element_size()
    if tensor.untyped_storage().nbytes() < num_bytes:
        return None
    return tensor.as_strided((length, *tensor.shape[1:]), tensor.stride())
