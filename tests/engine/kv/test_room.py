"""Zeros with room behind them grow where they are, and take no memory until they are written."""

from __future__ import annotations

import mmap
import sys
from array import array
from pathlib import Path

import pytest
import torch

from engine.kv.pool import ResizeArena
from engine.kv.room import grown, zeros_with_room
from engine.kv.slots import LayerShape, SlotStorage

CPU = torch.device("cpu")
HAS_ROOM = sys.platform != "win32"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.skipif(not HAS_ROOM, reason="room is the exact size on Windows")
def test_what_grows_stays_where_it_is_and_goes_on_with_zeros(dtype: torch.dtype) -> None:
    tensor = zeros_with_room((2, 3, 5), 4, dtype, CPU)
    assert tensor.shape == (2, 3, 5) and tensor.dtype is dtype and not tensor.any()
    tensor.fill_(7)
    larger = grown(tensor, 4)
    assert larger is not None
    assert larger.data_ptr() == tensor.data_ptr() and larger.is_contiguous()
    assert (larger[:2] == 7).all() and not larger[2:].any()
    assert grown(tensor, 5) is None


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="what is resident is read from /proc")
def test_room_takes_no_memory_until_it_is_written() -> None:
    tensor = zeros_with_room((1 << 20,), 1 << 26, torch.float32, CPU)  # 4 of 256 MiB
    assert num_resident(tensor) == 0
    tensor[: tensor.numel() // 2] = 1.0
    assert num_resident(tensor) >= num_pages(tensor) // 2
    static = zeros_with_room((1 << 20,), 1 << 20, torch.float32, CPU)
    assert num_resident(static) >= num_pages(static)  # nothing is left to be taken later


def num_pages(tensor: torch.Tensor) -> int:
    return tensor.nbytes // mmap.PAGESIZE


def num_resident(tensor: torch.Tensor) -> int:
    """How many of the tensor's pages are in memory: their bit 63 in the kernel's table says so."""
    first = tensor.data_ptr() // mmap.PAGESIZE
    last = (tensor.data_ptr() + tensor.nbytes - 1) // mmap.PAGESIZE
    with Path("/proc/self/pagemap").open("rb", buffering=0) as table:
        table.seek(first * 8)
        entries = array("Q", table.read((last + 1 - first) * 8))
    return sum(entry >> 63 for entry in entries)


def test_where_the_system_refuses_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("engine.kv.room.mmap.mmap", refuse)
    tensor = zeros_with_room((2, 3), 4, torch.float32, CPU)
    assert tensor.shape == (2, 3) and not tensor.any()
    assert grown(tensor, 3) is None


@pytest.mark.parametrize("room", [0, 6])
def test_arenas_keep_their_rows_with_room_or_without(room: int) -> None:
    storage = SlotStorage([LayerShape(2, 4, 3, torch.float32)] * 2, CPU)
    storage.apply([ResizeArena(8, (), 2, room)])
    arena = storage.arenas[8]
    for tensor in (*arena.keys, *arena.values):
        tensor[0], tensor[1] = 1, 2
    place = arena.keys[0].data_ptr()
    storage.apply([ResizeArena(8, (0, 1), 4, room)])
    assert (arena.keys[0].data_ptr() == place) == (room > 0 and HAS_ROOM)
    for tensor in (*arena.keys, *arena.values):
        assert tensor[:, 0, 0, 0].tolist() == [1, 2, 0, 0]
        tensor[3] = 4
    storage.apply([ResizeArena(8, (1, 3), 2, room)])  # trimmed: slots in use become dense
    storage.apply([ResizeArena(8, (0, 1), 3, room)])
    for tensor in (*arena.keys, *arena.values):
        assert tensor[:, 0, 0, 0].tolist() == [2, 4, 0]
