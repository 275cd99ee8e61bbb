"""Who reads which encoder output: slots for cross-attention K and V, shared by key, kept for the next who asks.

Knows nothing of tensors, encoders or scheduling; no torch here.
Used by kv/encoder_decoder.py; the storage operations it collects are carried out before the next forward.

A slot is read by one or more running sequences (the choices of one request, the tries of one window), or kept after its
last reader ended so that the same source need not be encoded again (the least recently used goes first), or free.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from engine.kv.pool import ClearSlot, Slot, SlotOp, SlotPool
from engine.sequence import Sequence, Source


@dataclass(slots=True, eq=False)
class _Reading:
    """One source's slot and who reads it."""

    source: Source
    slot: Slot
    is_encoded: bool = False
    readers: set[int] = field(default_factory=set)  # sequence ids


class CrossManager:
    """Slots for encoder outputs.

    Args:
        pool: the slots.
        is_caching: whether a slot is kept after its last reader has ended.
    """

    def __init__(self, pool: SlotPool, *, is_caching: bool) -> None:
        self.pool = pool
        self.is_caching = is_caching
        self.queries_total = 0
        self.hits_total = 0
        self._read: dict[bytes, _Reading] = {}
        self._kept: OrderedDict[bytes, _Reading] = OrderedDict()  # least recently used first; all encoded
        self._by_sequence: dict[int, _Reading] = {}
        self._ops: list[SlotOp] = []

    @property
    def num_positions_used(self) -> int:
        """Encoder positions that are read or kept."""
        return sum(r.source.num_positions for r in (*self._read.values(), *self._kept.values()))

    def can_ever_hold(self, source: Source) -> bool:
        """Whether a source fits when it is alone."""
        return self.pool.can_ever_hold(source.num_positions)

    def slot_of(self, sequence: Sequence) -> Slot:
        """The slot that a running sequence reads."""
        return self._by_sequence[sequence.sequence_id].slot

    def num_to_encode(self, source: Source) -> int:
        """Encoder positions that must be computed before a sequence with this source can run."""
        reading = self._read.get(source.key) or self._kept.get(source.key)
        return source.num_positions if reading is None else 0

    def acquire(self, sequence: Sequence) -> bool:
        """Let a sequence read its source's slot, made now if there is none; False when there is no room."""
        source = sequence.source
        assert source is not None  # checked when it was added
        reading = self._read.get(source.key)
        if reading is None:
            reading = self._kept.pop(source.key, None)
            if reading is None:
                slot = self._allocate(source.num_positions)
                if slot is None:
                    return False
                reading = _Reading(source, slot)
            self._read[source.key] = reading
        self.queries_total += source.num_positions
        self.hits_total += source.num_positions if reading.is_encoded else 0
        reading.readers.add(sequence.sequence_id)
        self._by_sequence[sequence.sequence_id] = reading
        return True

    def release(self, sequence: Sequence, *, can_keep: bool) -> None:
        """Note that a sequence reads no more; its slot is kept, or freed, with the last reader."""
        reading = self._by_sequence.pop(sequence.sequence_id, None)
        if reading is None:
            return
        reading.readers.remove(sequence.sequence_id)
        if not can_keep:
            # What was encoded may be wrong: those who read it now finish, nobody reads it anew.
            reading.is_encoded = False
        if reading.readers:
            return
        del self._read[reading.source.key]
        if reading.is_encoded and can_keep and self.is_caching:
            self._kept[reading.source.key] = reading
        else:
            if not can_keep:
                self._ops.append(ClearSlot(reading.slot))
            self.pool.release(reading.slot)

    def to_encode(self, sequences: list[Sequence]) -> list[tuple[Source, Slot]]:
        """The sources of these sequences that are not in their slots yet, each once."""
        readings = {id(r): r for r in (self._by_sequence[s.sequence_id] for s in sequences) if not r.is_encoded}
        return [(reading.source, reading.slot) for reading in readings.values()]

    def note_encoded(self, sources: list[Source]) -> None:
        """Note that these sources are in their slots."""
        for source in sources:
            self._read[source.key].is_encoded = True

    def take_ops(self) -> list[SlotOp]:
        """What storage must do, in this order, before the next forward; the list is handed over."""
        ops, self._ops = self._ops, []
        return ops

    def give_back(self) -> None:
        """Drop what is kept and free its memory."""
        while self._evict_one():
            pass
        self._trim(but=None)

    def remake(self) -> list[SlotOp]:
        """Drop what is kept and all pending operations; what storage must make again, empty, after it was lost."""
        self.give_back()
        self._ops.clear()
        return self.pool.remake()

    def check_integrity(self) -> None:
        """Raise AssertionError when a slot leaked or has readers nobody knows."""
        readings = [*self._read.values(), *self._kept.values()]
        slots = {reading.slot for reading in readings}
        assert len(slots) == len(readings), "two sources share a slot"
        self.pool.check_integrity(slots)
        readers = {i for reading in self._read.values() for i in reading.readers}
        assert readers == set(self._by_sequence), "readers are not those who hold slots"
        assert all(reading.readers for reading in self._read.values()), "a slot is held for nobody"
        assert all(not r.readers and r.is_encoded for r in self._kept.values()), "a kept slot is read or empty"

    def _allocate(self, num_positions: int) -> Slot | None:
        while True:
            slot = self.pool.allocate(num_positions, self._ops)
            if slot is not None:
                return slot
            self._trim(but=self.pool.class_for(num_positions))
            slot = self.pool.allocate(num_positions, self._ops)
            if slot is not None or not self._evict_one():
                return slot

    def _evict_one(self) -> bool:
        if not self._kept:
            return False
        _, reading = self._kept.popitem(last=False)
        self.pool.release(reading.slot)
        return True

    def _trim(self, *, but: int | None) -> None:
        moved = self.pool.trim(self._ops, but=but)
        for reading in (*self._read.values(), *self._kept.values()):
            reading.slot = moved.get(reading.slot, reading.slot)
