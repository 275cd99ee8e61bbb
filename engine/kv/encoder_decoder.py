"""The KV accounts of an encoder-decoder as one: decoder slots that grow, and encoder slots that are shared.

Knows nothing of tensors; no torch here.
Called by the scheduler in the place of kv/manager.py.
"""

from __future__ import annotations

from engine.kv.cross import CrossManager
from engine.kv.manager import KVManager
from engine.kv.pool import CrossOp, StorageOp
from engine.sequence import Sequence, Source


class EncoderDecoderKV:
    """Both accounts; a sequence has a place in both or in neither.

    Args:
        own: of the decoder's own K and V.
        cross: of the encoder's K and V.
        positions_per_token: bytes of an encoder position over bytes of a decoder token, for one figure of use.
    """

    is_chunkable = True

    def __init__(self, own: KVManager, cross: CrossManager, *, positions_per_token: float) -> None:
        self.own = own
        self.cross = cross
        self._positions_per_token = positions_per_token

    @property
    def prefix_queries_total(self) -> int:
        """Encoder positions that were asked for: the encoder's output is what these models reuse."""
        return self.cross.queries_total

    @property
    def prefix_hits_total(self) -> int:
        """Encoder positions that had been computed before."""
        return self.cross.hits_total

    @property
    def num_tokens_used(self) -> int:
        """Token positions that hold something; encoder positions count by their bytes."""
        return self.own.num_tokens_used + int(self.cross.num_positions_used * self._positions_per_token)

    @property
    def num_tokens_allocated(self) -> int:
        """Token positions that memory is taken for, likewise."""
        cross = self.cross.pool.num_tokens_allocated
        return self.own.num_tokens_allocated + int(cross * self._positions_per_token)

    def can_ever_hold(self, num_tokens: int) -> bool:
        """Whether a decoder sequence of `num_tokens` fits when it is alone."""
        return self.own.can_ever_hold(num_tokens)

    def can_ever_encode(self, source: Source | None) -> bool:
        """Whether there is a source, and room for it when it is alone."""
        return source is not None and self.cross.can_ever_hold(source)

    def is_being_computed(self, sequence: Sequence) -> bool:
        """Never: a source is shared from the moment it has a slot."""
        return False

    def num_to_encode(self, sequence: Sequence) -> int:
        """Encoder positions to compute before the sequence can run."""
        return 0 if sequence.source is None else self.cross.num_to_encode(sequence.source)

    def admit(self, sequence: Sequence) -> bool:
        """Take memory for a waiting sequence in both accounts; False when either has no room."""
        num_new = self.num_to_encode(sequence)
        if not self.cross.acquire(sequence):
            return False
        if self.own.admit(sequence):
            if sequence.num_preemptions == 0 and sequence.source is not None:
                # What callers call the prompt is the source.
                sequence.num_cached_tokens = sequence.source.num_positions - num_new
            return True
        self.cross.release(sequence, can_keep=True)
        return False

    def ensure(self, sequence: Sequence, num_tokens: int) -> bool:
        """Take memory for a running sequence's first `num_tokens`; False when there is no room."""
        return self.own.ensure(sequence, num_tokens)

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Like ensure, only where nothing is moved."""
        return self.own.extend(sequence, num_tokens)

    def commit(self, sequence: Sequence) -> None:
        """Note that the sequence's num_computed_tokens are in memory."""
        self.own.commit(sequence)

    def free(self, sequence: Sequence, *, can_keep: bool) -> None:
        """Take a sequence's memory back."""
        self.own.free(sequence, can_keep=can_keep)
        self.cross.release(sequence, can_keep=can_keep)

    def take_ops(self) -> list[StorageOp]:
        """What both storages must do before the next forward."""
        return [*self.own.take_ops(), *map(CrossOp, self.cross.take_ops())]

    def give_back(self, max_kept_tokens: int) -> None:
        """Free memory that no running sequence needs; a source takes too much to be kept by an idle server."""
        self.own.give_back(max_kept_tokens)
        self.cross.give_back()

    def remake(self) -> list[StorageOp]:
        """Forget everything kept, after storage was lost; what it must make again."""
        return [*self.own.remake(), *map(CrossOp, self.cross.remake())]

    def check_integrity(self) -> None:
        """Raise AssertionError when the accounts do not add up."""
        self.own.check_integrity()
        self.cross.check_integrity()
