"""Where the blocks are: fixed-size pages of KV, who refers to each, and which hold tokens that others may reuse.

Knows nothing of sequences, tensors or scheduling; no torch here.
Kept by kv/paged_manager.py, which gives sequences their block tables.

    free  --take-->  held by 1..n sequences  --release-->  cached, when a key says what it holds  --evict-->  free
                              ^---------------------share---------------'        (else straight to free)

Free blocks are taken lowest first, memory grows by doubling while the budget lasts, and only then does the cached block
that was used least recently go. When the server is idle the blocks in use are moved together and the rest given back.
A static pool has all its memory from the start, and its blocks never move: captured steps hold their addresses.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass

from engine.kv.pool import ResizeArena, SlotOp
from engine.kv.prefix import BLOCK_SIZE, PrefixIndex


@dataclass(slots=True, eq=False)
class Block:
    """Room for BLOCK_SIZE tokens: row `index` of every layer's tensors; `key` says which tokens, when it is full."""

    index: int
    num_refs: int = 0
    key: bytes | None = None


class BlockPool:
    """Hands out blocks within a budget, and keeps full ones that nobody refers to as long as there is room.

    Args:
        max_blocks: most blocks that memory may be taken for.
        is_static: memory for all of them is there already, and is never given back.
    """

    def __init__(self, max_blocks: int, *, is_static: bool = False) -> None:
        self.max_blocks = max_blocks
        self.is_static = is_static
        self.num_blocks = max_blocks if is_static else 0
        self.prefixes: PrefixIndex[Block] = PrefixIndex()
        self._free: list[int] = list(range(self.num_blocks))  # a heap: lowest index first
        self._cached: OrderedDict[Block, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing and whose memory is there."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody refers to and somebody may."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that could be handed out now, growing and evicting included."""
        return self.num_free + self.num_cached + self.max_blocks - self.num_blocks

    def take(self, count: int, ops: list[SlotOp]) -> list[Block] | None:
        """`count` blocks of one reference each, or None when there are not so many; appends growth to `ops`."""
        if count > self.num_available:
            return None
        missing = min(count - self.num_free, self.max_blocks - self.num_blocks)
        if missing > 0:
            self._grow(missing, ops)
        while self.num_free < count:
            self._evict()
        return [Block(heapq.heappop(self._free), 1) for _ in range(count)]

    def share(self, block: Block) -> None:
        """One more sequence refers to a block."""
        if block.num_refs == 0:
            del self._cached[block]
        block.num_refs += 1

    def release(self, block: Block) -> None:
        """One sequence less refers to it; the last one leaves it cached when it has a key, else free."""
        block.num_refs -= 1
        if block.num_refs:
            return
        if block.key is None:
            heapq.heappush(self._free, block.index)
        else:
            self._cached[block] = None

    def publish(self, block: Block, key: bytes) -> None:
        """Note what a full block holds; a second block of the same tokens stays its sequence's own."""
        if not self.prefixes.holders(key):
            block.key = key
            self.prefixes.publish(key, block)

    def retract(self, block: Block) -> None:
        """Let nobody else find a block."""
        if block.key is not None:
            self.prefixes.retract(block.key, block)
            block.key = None

    def compact(self, max_cached_blocks: int, held: set[Block], ops: list[SlotOp]) -> None:
        """Evict down to `max_cached_blocks`, move the blocks in use together and give the rest of the memory back.

        Static memory stays as it is. Renumbers `held`, every block that sequences refer to: whoever copied an index
        must read it again.
        """
        while self.num_cached > max_cached_blocks:
            self._evict()
        if self.is_static or not self._free:
            return
        used = sorted([*held, *self._cached], key=lambda block: block.index)
        ops.append(ResizeArena(BLOCK_SIZE, tuple(block.index for block in used), len(used)))
        for index, block in enumerate(used):
            block.index = index
        self.num_blocks = len(used)
        self._free.clear()

    def check_integrity(self, held: list[Block]) -> None:
        """Raise AssertionError unless `held`, one entry a reference, and what is cached and free are all there is."""
        counts: dict[Block, int] = {}
        for block in held:
            counts[block] = counts.get(block, 0) + 1
        for block, count in counts.items():
            assert block.num_refs == count, f"block {block.index} counts {block.num_refs} references and has {count}"
            assert block not in self._cached, f"block {block.index} is held and cached"
        for block in self._cached:
            assert block.num_refs == 0, f"cached block {block.index} is referred to"
            assert block.key is not None, f"cached block {block.index} has no key"
        indices = [*self._free, *(block.index for block in (*counts, *self._cached))]
        assert sorted(indices) == list(range(self.num_blocks)), "a block leaked or is there twice"
        assert self.num_blocks <= self.max_blocks, f"{self.num_blocks} blocks exceed {self.max_blocks}"

    def keyed(self, held: set[Block]) -> list[tuple[bytes, Block]]:
        """What the index of prefixes must say, given the blocks that sequences refer to."""
        return [(block.key, block) for block in (*held, *self._cached) if block.key is not None]

    def _grow(self, missing: int, ops: list[SlotOp]) -> None:
        # Doubling keeps copies amortised; near the budget's edge what is left must do.
        old = self.num_blocks
        self.num_blocks = min(self.max_blocks, max(2 * old, old + missing))
        for index in range(old, self.num_blocks):
            heapq.heappush(self._free, index)
        ops.append(ResizeArena(BLOCK_SIZE, tuple(range(old)), self.num_blocks))

    def _evict(self) -> None:
        block, _ = self._cached.popitem(last=False)
        self.retract(block)
        heapq.heappush(self._free, block.index)
