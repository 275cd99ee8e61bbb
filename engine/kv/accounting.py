"""What the scheduler asks of KV memory, whatever form that memory has.

Knows nothing of slots, blocks or models' own caches; no torch here.
Answered by kv/manager.py, kv/paged_manager.py, kv/encoder_decoder.py and kv/states.py; asked by scheduler.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from engine.kv.pool import StorageOp
from engine.sequence import Sequence, Source


class KVAccounting(Protocol):
    """The accounts of one model's KV memory: who has how much of it."""

    is_chunkable: bool

    @property
    def prefix_queries_total(self) -> int:
        """Positions looked up for reuse."""

    @property
    def prefix_hits_total(self) -> int:
        """Positions found."""

    @property
    def num_tokens_used(self) -> int:
        """Token positions that hold something."""

    @property
    def num_tokens_allocated(self) -> int:
        """Token positions that memory is taken for."""

    def can_ever_hold(self, num_tokens: int) -> bool:
        """Whether a sequence of `num_tokens` fits when it is alone."""

    def can_ever_encode(self, source: Source | None) -> bool:
        """Whether an encoder output of this size fits when it is alone; without encoder, whether there is none."""

    def num_to_encode(self, sequence: Sequence) -> int:
        """Encoder positions that must be computed before a waiting sequence can run."""

    def is_being_computed(self, sequence: Sequence) -> bool:
        """Whether waiting a little spares this sequence a good deal of computing, because another is at it."""

    def admit(self, sequence: Sequence) -> bool:
        """Take memory for a waiting sequence and set what of it is already computed; False when there is no room."""

    def ensure(self, sequence: Sequence, num_tokens: int) -> bool:
        """Take memory for a running sequence's first `num_tokens`; False when there is no room."""

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Like ensure, while a step that writes to the sequence's memory is in flight: only where nothing is moved."""

    def commit(self, sequence: Sequence) -> None:
        """Note that the sequence's num_computed_tokens are in memory."""

    def free(self, sequence: Sequence, *, can_keep: bool) -> None:
        """Take a sequence's memory back; it may stay for its prefix when `can_keep`."""

    def take_ops(self) -> Iterable[StorageOp]:
        """What storage must do before the next forward."""

    def give_back(self, max_kept_tokens: int) -> None:
        """Free memory that no running sequence needs."""

    def remake(self) -> Iterable[StorageOp]:
        """Forget everything kept, after storage was lost; what it must make again."""

    def check_integrity(self) -> None:
        """Raise AssertionError when the accounts do not add up."""
