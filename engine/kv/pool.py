"""Which KV slots exist, in which size classes, and what memory they may take: the accounting of storage.

Knows nothing of tensors, sequences or what a slot holds; no torch here.
Driven by kv/manager.py; the storage operations it emits are carried out by kv/slots.py, in order.

A slot is a run of token positions for one sequence. Slots of one capacity form an arena, one tensor a layer, so that
sequences of like lengths are attended to in one call, on views. An arena doubles to grow and is trimmed under pressure:

    capacity 128   [0][1][2][3]         lowest free index first, so that the slots in use stay dense
    capacity 256   [0][1]
    capacity 512   [0]                  sum(num_slots * capacity) <= budget_tokens, always
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Slot:
    """Room for `capacity` tokens: row `index` of that capacity's arena."""

    capacity: int
    index: int


@dataclass(frozen=True, slots=True)
class ResizeArena:
    """Make the arena `num_slots` long; old rows `keep` become rows 0, 1, 2, ... of the new one.

    It may come to have `room` slots: where memory can be set aside without being taken, it is set aside for so many.
    """

    capacity: int
    keep: tuple[int, ...]
    num_slots: int
    room: int = 0


@dataclass(frozen=True, slots=True)
class CopySlot:
    """Copy the first `num_tokens` positions of `source` to `target`."""

    source: Slot
    target: Slot
    num_tokens: int


@dataclass(frozen=True, slots=True)
class ClearSlot:
    """Make a slot's content zeros: what it held may be NaN, and a masked NaN is one still."""

    slot: Slot


SlotOp = ResizeArena | CopySlot | ClearSlot


@dataclass(frozen=True, slots=True)
class CrossOp:
    """An operation on the storage of the encoder's K and V, which an encoder-decoder has beside its own."""

    op: SlotOp


StorageOp = SlotOp | CrossOp


@dataclass(slots=True)
class _Arena:
    num_slots: int = 0
    used: set[int] = field(default_factory=set)
    free: list[int] = field(default_factory=list)  # a heap: lowest index first


def size_classes(smallest: int, largest: int) -> tuple[int, ...]:
    """Capacities from `smallest`, doubling, ending in exactly `largest`."""
    capacities = []
    capacity = smallest
    while capacity < largest:
        capacities.append(capacity)
        capacity *= 2
    return (*capacities, largest)


class SlotPool:
    """Hands out slots within a budget.

    Args:
        capacities: size classes in tokens, rising; the last is the longest a sequence can be.
        max_slots: most slots of one capacity.
        budget_tokens: most token positions over all arenas; None for no bound.
        is_static: memory is taken once, by preallocate, and never given back.
    """

    def __init__(
        self, capacities: tuple[int, ...], max_slots: int, budget_tokens: int | None, *, is_static: bool = False
    ) -> None:
        self.capacities = capacities
        self.max_slots = max_slots
        self.budget_tokens = budget_tokens
        self.is_static = is_static
        self.num_tokens_allocated = 0
        self._arenas = {capacity: _Arena() for capacity in capacities}

    def preallocate(self) -> list[SlotOp]:
        """Make every slot of every arena now."""
        ops: list[SlotOp] = []
        for capacity, arena in self._arenas.items():
            while arena.num_slots < self.max_slots and self._grow(capacity, arena, ops):
                pass
        return ops

    def remake(self) -> list[SlotOp]:
        """What makes the arenas that exist again, empty, after storage was lost."""
        return [
            ResizeArena(capacity, (), arena.num_slots, self._room(capacity))
            for capacity, arena in self._arenas.items()
            if arena.num_slots
        ]

    def class_for(self, num_tokens: int) -> int | None:
        """The smallest capacity that holds `num_tokens`, or None when none does."""
        return next((capacity for capacity in self.capacities if capacity >= num_tokens), None)

    def can_ever_hold(self, num_tokens: int) -> bool:
        """Whether an empty pool could hold a sequence of `num_tokens`."""
        capacity = self.class_for(num_tokens)
        return capacity is not None and (self.budget_tokens is None or capacity <= self.budget_tokens)

    def is_full(self, capacity: int) -> bool:
        """Whether every slot that this capacity may have exists and is out."""
        arena = self._arenas[capacity]
        return len(arena.used) == self.max_slots

    def allocate(self, num_tokens: int, ops: list[SlotOp]) -> Slot | None:
        """A slot for `num_tokens`, or None when the budget has no room; appends what storage must do to `ops`."""
        capacity = self.class_for(num_tokens)
        if capacity is None:
            return None
        arena = self._arenas[capacity]
        if not arena.free and not self._grow(capacity, arena, ops):
            return None
        index = heapq.heappop(arena.free)
        arena.used.add(index)
        return Slot(capacity, index)

    def release(self, slot: Slot) -> None:
        """Give a slot back; its arena keeps the memory until it is trimmed."""
        arena = self._arenas[slot.capacity]
        arena.used.remove(slot.index)
        heapq.heappush(arena.free, slot.index)

    def trim(self, ops: list[SlotOp], *, but: int | None = None) -> dict[Slot, Slot]:
        """Give the memory of free slots back, in every arena except that of capacity `but`.

        Slots in use are renumbered densely; returns old -> new for those that moved.
        """
        moved: dict[Slot, Slot] = {}
        if self.is_static:
            return moved
        for capacity, arena in self._arenas.items():
            if not arena.free or capacity == but:
                continue
            keep = tuple(sorted(arena.used))
            ops.append(ResizeArena(capacity, keep, len(keep), self._room(capacity)))
            moved.update({Slot(capacity, old): Slot(capacity, new) for new, old in enumerate(keep) if new != old})
            self.num_tokens_allocated -= capacity * (arena.num_slots - len(keep))
            self._arenas[capacity] = _Arena(num_slots=len(keep), used=set(range(len(keep))))
        return moved

    def check_integrity(self, slots_in_use: set[Slot]) -> None:
        """Raise AssertionError unless exactly `slots_in_use` are out and the sums agree."""
        used = {Slot(capacity, index) for capacity, arena in self._arenas.items() for index in arena.used}
        assert used == slots_in_use, f"slots out {used} are not the slots held {slots_in_use}"
        total = 0
        for capacity, arena in self._arenas.items():
            assert sorted(arena.used | set(arena.free)) == list(range(arena.num_slots)), f"arena {capacity} lost a slot"
            assert len(arena.used) + len(arena.free) == arena.num_slots, f"arena {capacity} has a slot twice"
            total += capacity * arena.num_slots
        assert total == self.num_tokens_allocated, f"{self.num_tokens_allocated} tokens counted, {total} allocated"
        assert self.budget_tokens is None or total <= self.budget_tokens, f"{total} tokens exceed {self.budget_tokens}"

    def _room(self, capacity: int) -> int:
        """Most slots of that capacity that there can be."""
        if self.budget_tokens is None:
            return self.max_slots
        return min(self.max_slots, self.budget_tokens // capacity)

    def _grow(self, capacity: int, arena: _Arena, ops: list[SlotOp]) -> bool:
        # Doubling keeps copies amortised; near the budget's edge one slot at a time still fits what can fit.
        for num_new in (self.max_slots if self.is_static else max(1, arena.num_slots), 1):
            wanted = min(num_new, self.max_slots - arena.num_slots)
            if wanted < 1:
                return False
            tokens = capacity * wanted
            if self.budget_tokens is None or self.num_tokens_allocated + tokens <= self.budget_tokens:
                break
        else:
            return False
        old = arena.num_slots
        arena.num_slots = old + wanted
        for index in range(old, arena.num_slots):
            heapq.heappush(arena.free, index)
        self.num_tokens_allocated += tokens
        ops.append(ResizeArena(capacity, tuple(range(old)), arena.num_slots, self._room(capacity)))
        return True
