"""Who owns which blocks: a block table for each sequence, beginning with blocks that others computed.

Knows nothing of tensors, layers or scheduling; no torch here.
Called by the scheduler, as kv/manager.py is where KV lives in slots; model/paged_inputs.py reads the tables.

A prefix is reused by referring to its full blocks: nothing is copied. Only full blocks are ever shared, and the token
whose logits are wanted is always computed, so whatever a sequence writes goes to a block of its own.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from engine.kv.paged_pool import Block, BlockPool
from engine.kv.pool import SlotOp
from engine.kv.prefix import BLOCK_SIZE, block_keys, chain, may_reuse
from engine.sequence import Sequence, Source

WORTH_WAITING_BLOCKS = 4  # a beginning that another sequence computes right now is waited for from this length on


@dataclass(slots=True, eq=False)
class _Holding:
    """What one sequence holds."""

    blocks: list[Block]
    num_shared: int  # the first of them, which others computed
    num_tokens: int  # computed so far
    keys: list[bytes]  # of the full blocks
    promised: list[bytes] = field(default_factory=list)  # of its prompt, not computed yet; the next one last
    table: array[int] = field(default_factory=lambda: array("q"))  # the blocks' indices

    def append(self, blocks: list[Block]) -> None:
        self.blocks.extend(blocks)
        self.table.extend(block.index for block in blocks)


def num_blocks_for(num_tokens: int) -> int:
    """Blocks that hold `num_tokens`."""
    return -(-num_tokens // BLOCK_SIZE)


class PagedManager:
    """Block tables for sequences, with reuse of what other sequences already computed.

    Args:
        pool: the blocks.
        is_prefix_caching: whether computed prefixes are kept and shared.
    """

    is_chunkable = True

    def __init__(self, pool: BlockPool, *, is_prefix_caching: bool) -> None:
        self.pool = pool
        self.is_prefix_caching = is_prefix_caching
        self.prefix_queries_total = 0
        self.prefix_hits_total = 0
        self._held: dict[int, _Holding] = {}
        self._waiting_keys: dict[int, list[bytes]] = {}  # block keys of sequences that wait
        self._ops: list[SlotOp] = []

    @property
    def num_tokens_used(self) -> int:
        """Token positions that hold something, of running sequences and of cached blocks, shared ones once."""
        num_used = self.pool.num_blocks - self.pool.num_free
        unfilled = sum(len(h.blocks) * BLOCK_SIZE - h.num_tokens for h in self._held.values())
        return num_used * BLOCK_SIZE - unfilled

    @property
    def num_tokens_allocated(self) -> int:
        """Token positions that storage has memory for."""
        return self.pool.num_blocks * BLOCK_SIZE

    def can_ever_hold(self, num_tokens: int) -> bool:
        """Whether a sequence of `num_tokens` fits when it is alone."""
        return num_blocks_for(num_tokens) <= self.pool.max_blocks

    def can_ever_encode(self, source: Source | None) -> bool:
        """Only nothing: these blocks are a decoder's."""
        return source is None

    def num_to_encode(self, sequence: Sequence) -> int:
        """None."""
        return 0

    def table_of(self, sequence: Sequence) -> array[int]:
        """The indices of a running sequence's blocks: position p is in table[p // BLOCK_SIZE]; not to be kept."""
        return self._held[sequence.sequence_id].table

    def take_ops(self) -> list[SlotOp]:
        """What storage must do, in this order, before the next forward; the list is handed over."""
        ops, self._ops = self._ops, []
        return ops

    def is_being_computed(self, sequence: Sequence) -> bool:
        """Whether a running sequence is about to compute a good deal of this one's tokens: it pays to wait for them."""
        if not self._can_reuse(sequence):
            return False
        keys = self._keys_of(sequence)
        last = self.pool.prefixes.num_found(keys) + WORTH_WAITING_BLOCKS - 1
        return last < len(keys) and self.pool.prefixes.is_promised(keys[last])

    def admit(self, sequence: Sequence) -> bool:
        """Give a sequence blocks for its tokens and the next one, the first of them shared where they are computed.

        Sets its num_computed_tokens and num_cached_tokens. Returns False, changing nothing, when there is no room.
        """
        keys = self._keys_of(sequence) if self._can_reuse(sequence) else []
        found = keys[: self.pool.prefixes.num_found(keys)]
        shared = [self.pool.prefixes.holders(key)[-1] for key in found]
        # Referred to before others are taken, so that taking does not evict them.
        for block in shared:
            self.pool.share(block)
        wanted = min(num_blocks_for(sequence.num_tokens + 1), self.pool.max_blocks)
        own = self.pool.take(wanted - len(shared), self._ops)
        if own is None:
            for block in reversed(shared):
                self.pool.release(block)
            return False
        holding = _Holding([], len(shared), len(shared) * BLOCK_SIZE, found)
        holding.append([*shared, *own])
        self._held[sequence.sequence_id] = holding
        # What is known of it now: what it will generate nobody can wait for.
        holding.promised = keys[len(found) :][::-1]
        self.pool.prefixes.promise(holding.promised)
        self._waiting_keys.pop(sequence.sequence_id, None)
        sequence.num_computed_tokens = holding.num_tokens
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = holding.num_tokens
            if self.is_prefix_caching:
                self.prefix_queries_total += len(sequence.prompt_token_ids)
                self.prefix_hits_total += holding.num_tokens
        return True

    def ensure(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for a running sequence's first `num_tokens`; False, changing nothing, when there are not so many."""
        holding = self._held[sequence.sequence_id]
        missing = num_blocks_for(num_tokens) - len(holding.blocks)
        if missing <= 0:
            return True
        blocks = self.pool.take(missing, self._ops)
        if blocks is None:
            return False
        holding.append(blocks)
        return True

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """As ensure: blocks are added, and those that a step in flight writes to stay the sequence's own."""
        return self.ensure(sequence, num_tokens)

    def commit(self, sequence: Sequence) -> None:
        """Note that the sequence's first num_computed_tokens tokens are now in its blocks."""
        holding = self._held[sequence.sequence_id]
        holding.num_tokens = sequence.num_computed_tokens
        if not self.is_prefix_caching:
            return
        start = len(holding.keys) * BLOCK_SIZE
        while start + BLOCK_SIZE <= holding.num_tokens:
            if holding.promised:
                key = holding.promised.pop()
                self.pool.prefixes.redeem([key])
            else:
                last = holding.keys[-1] if holding.keys else sequence.kv_salt
                key = chain(last, sequence.token_slice(start, start + BLOCK_SIZE))
            self.pool.publish(holding.blocks[len(holding.keys)], key)
            holding.keys.append(key)
            start += BLOCK_SIZE

    def free(self, sequence: Sequence, *, can_keep: bool) -> None:
        """Take a sequence's blocks back; `can_keep` False for rows whose KV may be wrong (NaN, a failed step)."""
        self._waiting_keys.pop(sequence.sequence_id, None)
        holding = self._held.pop(sequence.sequence_id, None)
        if holding is None:
            return
        self.pool.prefixes.redeem(holding.promised)
        if not can_keep:
            for block in holding.blocks[holding.num_shared :]:
                self.pool.retract(block)
        # The last first: without what precedes it a block is never found, so the ends of prefixes are evicted first.
        for block in reversed(holding.blocks):
            self.pool.release(block)

    def give_back(self, max_kept_tokens: int) -> None:
        """Keep the most recently used cached blocks, up to that many tokens, and free all other memory not in use.

        Static memory is never given back, so there everything stays cached.
        """
        if not self.pool.is_static:
            self._compact(max_kept_tokens // BLOCK_SIZE)

    def remake(self) -> list[SlotOp]:
        """Drop every cached block and all pending operations; nothing is made again before it is asked for."""
        self._compact(0)
        self._ops.clear()
        return []

    def check_integrity(self) -> None:
        """Raise AssertionError when a block leaked, is counted wrongly, or a key leads nowhere."""
        references = [block for holding in self._held.values() for block in holding.blocks]
        self.pool.check_integrity(references)
        for holding in self._held.values():
            assert list(holding.table) == [block.index for block in holding.blocks], "a block moved unnoticed"
            assert holding.num_tokens <= len(holding.blocks) * BLOCK_SIZE, "more tokens than there is room for"
            assert len(holding.keys) * BLOCK_SIZE <= holding.num_tokens, "a block was published before it was full"
            for block in holding.blocks[len(holding.keys) :]:
                assert (block.num_refs, block.key) == (1, None), "a block that is not full is shared"
        promised = [key for holding in self._held.values() for key in holding.promised]
        self.pool.prefixes.check_integrity(self.pool.keyed(set(references)), promised)

    def _compact(self, max_cached_blocks: int) -> None:
        held = {block for holding in self._held.values() for block in holding.blocks}
        self.pool.compact(max_cached_blocks, held, self._ops)
        for holding in self._held.values():
            holding.table = array("q", (block.index for block in holding.blocks))

    def _can_reuse(self, sequence: Sequence) -> bool:
        return self.is_prefix_caching and may_reuse(sequence)

    def _keys_of(self, sequence: Sequence) -> list[bytes]:
        keys = self._waiting_keys.get(sequence.sequence_id)
        if keys is None:
            keys = self._waiting_keys[sequence.sequence_id] = block_keys(sequence)
        return keys
