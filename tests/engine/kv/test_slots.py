"""Slots whose content may be wrong are cleared before anyone else gets them; fixed ones stay where they are."""

from __future__ import annotations

import pytest
import torch

from engine.kv.cross import CrossManager
from engine.kv.manager import KVManager
from engine.kv.pool import ResizeArena, SlotPool
from engine.kv.slots import LayerShape, SlotStorage
from engine.sequence import SamplingParams, Sequence, Source

SHAPES = (LayerShape(2, 4, 4, torch.float32), LayerShape(1, 4, 8, torch.float32))


def _sequence(number: int) -> Sequence:
    source = Source(bytes([number]), 9, tuple(range(9)))
    return Sequence(number, [1, 2, 3], SamplingParams(max_tokens=4), arrival_time_s=0.0, source=source)


def _spoil(storage: SlotStorage) -> None:
    for arena in storage.arenas.values():
        for tensor in (*arena.keys, *arena.values):
            tensor.fill_(float("nan"))


def _is_finite(storage: SlotStorage, capacity: int, index: int) -> bool:
    arena = storage.arenas[capacity]
    return all(bool(tensor[index].isfinite().all()) for tensor in (*arena.keys, *arena.values))


def test_a_decoders_slot_is_cleared_when_it_may_not_be_kept() -> None:
    storage = SlotStorage(SHAPES, torch.device("cpu"))
    manager = KVManager(SlotPool((16,), 4, None), is_prefix_caching=True)
    first, second = _sequence(0), _sequence(1)
    assert manager.admit(first) and manager.admit(second)
    slot, other = manager.slot_of(first), manager.slot_of(second)
    storage.apply(manager.take_ops())
    _spoil(storage)
    manager.free(first, can_keep=False)
    storage.apply(manager.take_ops())
    assert _is_finite(storage, slot.capacity, slot.index)
    assert not _is_finite(storage, other.capacity, other.index)


def test_an_encoders_slot_is_cleared_when_it_may_not_be_kept() -> None:
    storage = SlotStorage(SHAPES, torch.device("cpu"))
    manager = CrossManager(SlotPool((16,), 4, None), is_caching=True)
    first = _sequence(0)
    assert manager.acquire(first)
    slot = manager.slot_of(first)
    storage.apply(manager.take_ops())
    _spoil(storage)
    manager.release(first, can_keep=False)
    storage.apply(manager.take_ops())
    assert _is_finite(storage, slot.capacity, slot.index)
    manager.check_integrity()


def test_fixed_slots_are_emptied_where_they_are_and_others_are_refused() -> None:
    pool = SlotPool((16,), 3, 48, is_static=True)
    storage = SlotStorage(SHAPES, torch.device("cpu"), ResizeArena(16, (), 4))
    storage.apply(pool.preallocate())
    arena = storage.arenas[16]
    addresses = [tensor.data_ptr() for tensor in (*arena.keys, *arena.values)]
    _spoil(storage)
    storage.clear()
    storage.apply(pool.remake())
    assert storage.arenas[16] is arena and all(_is_finite(storage, 16, index) for index in range(4))
    assert [tensor.data_ptr() for tensor in (*arena.keys, *arena.values)] == addresses
    for op in (ResizeArena(16, (), 5), ResizeArena(32, (), 1)):
        with pytest.raises(ValueError, match="are not among"):
            storage.apply([op])
