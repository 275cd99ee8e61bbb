"""Who owns which slot, and whose tokens may be reused: sequences and prefixes over the pool's slots.

Knows nothing of tensors, layers or scheduling; no torch here.
Called by the scheduler; the storage operations it collects are taken and carried out before the next forward.

A slot is held by a running sequence, or kept after its sequence ended for the prefix it holds (the least recently used
goes first when room is needed), or free. Whose tokens may be reused is found in kv/prefix.py's index.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from engine.kv.pool import ClearSlot, CopySlot, Slot, SlotOp, SlotPool
from engine.kv.prefix import BLOCK_SIZE, PrefixIndex, block_keys, chain, may_reuse
from engine.sequence import Sequence, Source

WORTH_WAITING_BLOCKS = 4  # a beginning that another sequence computes right now is waited for from this length on
RESERVED_OUTPUT_TOKENS = 64  # room asked for beyond the prompt, so that short answers never move


@dataclass(slots=True, eq=False)
class _Holding:
    """What one slot holds: the tokens computed so far, and the keys of their full blocks."""

    slot: Slot
    num_tokens: int = 0
    keys: list[bytes] = field(default_factory=list)
    promised: list[bytes] = field(default_factory=list)  # of its prompt, not computed yet; the next one last


@dataclass(frozen=True, slots=True)
class _Match:
    holding: _Holding
    keys: list[bytes]

    @property
    def num_tokens(self) -> int:
        return len(self.keys) * BLOCK_SIZE


class KVManager:
    """Slots for sequences, with reuse of what other sequences already computed.

    Args:
        pool: the slots.
        is_prefix_caching: whether computed prefixes are kept and shared.
    """

    is_chunkable = True

    def __init__(self, pool: SlotPool, *, is_prefix_caching: bool) -> None:
        self.pool = pool
        self.is_prefix_caching = is_prefix_caching
        self.prefix_queries_total = 0
        self.prefix_hits_total = 0
        self._held: dict[int, _Holding] = {}
        self._kept: OrderedDict[Slot, _Holding] = OrderedDict()  # least recently used first
        self._index: PrefixIndex[_Holding] = PrefixIndex()
        self._waiting_keys: dict[int, list[bytes]] = {}  # block keys of sequences that wait
        self._ops: list[SlotOp] = []

    @property
    def num_tokens_used(self) -> int:
        """Token positions that hold something, of running and of kept sequences."""
        return sum(h.num_tokens for h in self._held.values()) + sum(h.num_tokens for h in self._kept.values())

    @property
    def num_tokens_allocated(self) -> int:
        """Token positions that storage has memory for."""
        return self.pool.num_tokens_allocated

    def can_ever_hold(self, num_tokens: int) -> bool:
        """Whether a sequence of `num_tokens` fits when it is alone."""
        return self.pool.can_ever_hold(num_tokens)

    def can_ever_encode(self, source: Source | None) -> bool:
        """Only nothing: these slots are the decoder's."""
        return source is None

    def num_to_encode(self, sequence: Sequence) -> int:
        """None."""
        return 0

    def slot_of(self, sequence: Sequence) -> Slot:
        """The slot a running sequence holds."""
        return self._held[sequence.sequence_id].slot

    def take_ops(self) -> list[SlotOp]:
        """What storage must do, in this order, before the next forward; the list is handed over."""
        ops, self._ops = self._ops, []
        return ops

    def is_being_computed(self, sequence: Sequence) -> bool:
        """Whether a running sequence is about to compute a good deal of this one's tokens: it pays to wait for them."""
        if not self._can_reuse(sequence):
            return False
        keys = self._keys_of(sequence)
        last = self._index.num_found(keys) + WORTH_WAITING_BLOCKS - 1
        return last < len(keys) and self._index.is_promised(keys[last])

    def admit(self, sequence: Sequence) -> bool:
        """Give a sequence a slot, with as much of its prompt as is already computed somewhere.

        Sets its num_computed_tokens and num_cached_tokens. Returns False, changing nothing of others' but kept slots,
        when there is no room.
        """
        match = self._match(sequence)
        num_tokens = sequence.num_tokens + 1
        remaining = max(0, sequence.params.max_tokens - len(sequence.output_token_ids))
        wanted = min(sequence.num_tokens + min(remaining, RESERVED_OUTPUT_TOKENS), self.pool.capacities[-1])
        wanted = max(wanted, min(num_tokens, self.pool.capacities[-1]))
        if match is not None and self._can_take_over(match, wanted):
            holding = self._take_over(match)
        else:
            slot = self._allocate(wanted, sparing=match.holding if match else None)
            if slot is None and match is not None:
                # No room beside what we wanted to copy from: continue in it when it is nobody's, else do without.
                if match.holding.slot in self._kept and match.holding.slot.capacity >= wanted:
                    holding = self._take_over(match)
                    return self._begin(sequence, holding, match)
                slot, match = self._allocate(wanted, sparing=None), None
            if slot is None:
                return False
            holding = _Holding(slot)
            if match is not None:
                self._ops.append(CopySlot(match.holding.slot, slot, match.num_tokens))
        return self._begin(sequence, holding, match)

    def ensure(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make room for `num_tokens` in a running sequence's slot, moving it if it must; False when there is none."""
        holding = self._held[sequence.sequence_id]
        if num_tokens <= holding.slot.capacity:
            return True
        slot = self._allocate(num_tokens, sparing=None)
        if slot is None:
            return False
        # holding.slot is read after _allocate: trimming may have renumbered it.
        self._ops.append(CopySlot(holding.slot, slot, holding.num_tokens))
        self.pool.release(holding.slot)
        holding.slot = slot
        return True

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether a running sequence's slot has room already: a move would leave behind what is in flight."""
        return num_tokens <= self._held[sequence.sequence_id].slot.capacity

    def commit(self, sequence: Sequence) -> None:
        """Note that the sequence's first num_computed_tokens tokens are now in its slot."""
        holding = self._held[sequence.sequence_id]
        holding.num_tokens = sequence.num_computed_tokens
        if not self.is_prefix_caching:
            return
        start = len(holding.keys) * BLOCK_SIZE
        while start + BLOCK_SIZE <= holding.num_tokens:
            if holding.promised:
                key = holding.promised.pop()
                self._index.redeem([key])
            else:
                last = holding.keys[-1] if holding.keys else sequence.kv_salt
                key = chain(last, sequence.token_slice(start, start + BLOCK_SIZE))
            holding.keys.append(key)
            self._index.publish(key, holding)
            start += BLOCK_SIZE

    def free(self, sequence: Sequence, *, can_keep: bool) -> None:
        """Take a sequence's slot back; `can_keep` False for rows whose KV may be wrong (NaN, a failed step)."""
        self._waiting_keys.pop(sequence.sequence_id, None)
        holding = self._held.pop(sequence.sequence_id, None)
        if holding is None:
            return
        self._index.redeem(holding.promised)
        holding.promised.clear()
        if can_keep and holding.keys:
            self._kept[holding.slot] = holding
        else:
            self._forget(holding)
            if not can_keep:
                self._ops.append(ClearSlot(holding.slot))
            self.pool.release(holding.slot)

    def give_back(self, max_kept_tokens: int) -> None:
        """Drop the least recently used kept slots until their capacities fit `max_kept_tokens`, and free the memory."""
        while self._kept and sum(slot.capacity for slot in self._kept) > max_kept_tokens:
            self._evict_one(sparing=None)
        self._trim(but=None)

    def remake(self) -> list[SlotOp]:
        """Drop every kept slot and all pending operations; what storage must make again, empty, after it was lost."""
        self.give_back(0)
        self._ops.clear()
        return self.pool.remake()

    def check_integrity(self) -> None:
        """Raise AssertionError when a slot leaked, is held twice, or a key leads nowhere."""
        holdings = [*self._held.values(), *self._kept.values()]
        slots = {holding.slot for holding in holdings}
        assert len(slots) == len(holdings), "two holdings share a slot"
        assert all(slot == holding.slot for slot, holding in self._kept.items()), "a kept slot moved unnoticed"
        self.pool.check_integrity(slots)
        for holding in holdings:
            assert holding.num_tokens <= holding.slot.capacity, "a slot holds more tokens than it has room for"
            assert len(holding.keys) * BLOCK_SIZE <= holding.num_tokens, "a block was published before it was full"
        held = [(key, holding) for holding in holdings for key in holding.keys]
        self._index.check_integrity(held, [key for holding in holdings for key in holding.promised])

    def _begin(self, sequence: Sequence, holding: _Holding, match: _Match | None) -> bool:
        if match is not None and holding is not match.holding:
            holding.keys = list(match.keys)
            holding.num_tokens = match.num_tokens
            for key in match.keys:
                self._index.publish(key, holding)
        sequence.num_computed_tokens = match.num_tokens if match else 0
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            if self.is_prefix_caching:
                self.prefix_queries_total += len(sequence.prompt_token_ids)
                self.prefix_hits_total += sequence.num_cached_tokens
        self._held[sequence.sequence_id] = holding
        if self._can_reuse(sequence):
            # What is known of it now: what it will generate nobody can wait for.
            holding.promised = self._keys_of(sequence)[len(holding.keys) :][::-1]
            self._index.promise(holding.promised)
        self._waiting_keys.pop(sequence.sequence_id, None)
        return True

    def _match(self, sequence: Sequence) -> _Match | None:
        if not self._can_reuse(sequence):
            return None
        keys = self._keys_of(sequence)
        keys = keys[: self._index.num_found(keys)]
        if not keys:
            return None
        holders = self._index.holders(keys[-1])
        # A slot nobody runs in can be continued in place, so it is the better source.
        holding = next((h for h in reversed(holders) if h.slot in self._kept), holders[-1])
        if holding.slot in self._kept:
            self._kept.move_to_end(holding.slot)
        return _Match(holding, keys)

    def _can_reuse(self, sequence: Sequence) -> bool:
        return self.is_prefix_caching and may_reuse(sequence)

    def _keys_of(self, sequence: Sequence) -> list[bytes]:
        keys = self._waiting_keys.get(sequence.sequence_id)
        if keys is None:
            keys = self._waiting_keys[sequence.sequence_id] = block_keys(sequence)
        return keys

    def _can_take_over(self, match: _Match, wanted: int) -> bool:
        # Continuing in place spares a copy and a slot, but what lies past the match is lost to others.
        holding = match.holding
        is_extension = holding.num_tokens - match.num_tokens <= BLOCK_SIZE
        return is_extension and holding.slot in self._kept and holding.slot.capacity >= wanted

    def _take_over(self, match: _Match) -> _Holding:
        holding = match.holding
        del self._kept[holding.slot]
        num_blocks = len(match.keys)
        for key in holding.keys[num_blocks:]:
            self._index.retract(key, holding)
        del holding.keys[num_blocks:]
        holding.num_tokens = match.num_tokens
        return holding

    def _allocate(self, num_tokens: int, *, sparing: _Holding | None) -> Slot | None:
        """A slot, at the cost of kept ones if it must be: first their slots are reused, then their memory."""
        capacity = self.pool.class_for(num_tokens)
        if capacity is None:
            return None
        while True:
            slot = self.pool.allocate(num_tokens, self._ops)
            if slot is not None:
                return slot
            # When the class has all its slots, only one of its own can help; else it is memory that lacks.
            among = capacity if self.pool.is_full(capacity) else None
            if among is None:
                self._trim(but=capacity)
                slot = self.pool.allocate(num_tokens, self._ops)
            if slot is not None or not self._evict_one(sparing=sparing, among=among):
                return slot

    def _evict_one(self, *, sparing: _Holding | None, among: int | None = None) -> bool:
        for slot, holding in self._kept.items():
            if holding is not sparing and among in (None, slot.capacity):
                del self._kept[slot]
                self._forget(holding)
                self.pool.release(slot)
                return True
        return False

    def _trim(self, *, but: int | None) -> None:
        moved = self.pool.trim(self._ops, but=but)
        if not moved:
            return
        for holding in self._held.values():
            holding.slot = moved.get(holding.slot, holding.slot)
        kept = list(self._kept.values())
        self._kept.clear()
        for holding in kept:
            holding.slot = moved.get(holding.slot, holding.slot)
            self._kept[holding.slot] = holding

    def _forget(self, holding: _Holding) -> None:
        for key in holding.keys:
            self._index.retract(key, holding)
        holding.keys.clear()
