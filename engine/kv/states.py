"""Accounting for sequences whose cache is the model's own object (the solo lane): bytes by length, no slots.

Knows nothing of tensors or of what the object is; no torch here.
Called by the scheduler in the place of kv/manager.py.
"""

from __future__ import annotations

from engine.kv.pool import StorageOp
from engine.sequence import Sequence, Source


class StateManager:
    """Bounds the memory of per-sequence caches.

    Args:
        bytes_fixed: bytes a sequence takes whatever its length (recurrent and convolution states).
        bytes_per_token: bytes that each token adds.
        bytes_per_position: bytes that each position of an encoder's output adds.
        budget_bytes: most bytes of all sequences together; None for no bound.
        max_model_len: longest sequence in tokens.
    """

    is_chunkable = False  # recurrent kernels and convolution states take a prompt whole
    prefix_queries_total = 0
    prefix_hits_total = 0

    def __init__(
        self,
        *,
        bytes_fixed: int,
        bytes_per_token: int,
        budget_bytes: int | None,
        max_model_len: int,
        bytes_per_position: int = 0,
    ) -> None:
        self.bytes_fixed = bytes_fixed
        self.bytes_per_token = bytes_per_token
        self.bytes_per_position = bytes_per_position
        self.budget_bytes = budget_bytes
        self.max_model_len = max_model_len
        self._tokens: dict[int, int] = {}
        self._positions: dict[int, int] = {}  # of encoder outputs

    @property
    def num_tokens_used(self) -> int:
        """Tokens held by running sequences."""
        return sum(self._tokens.values())

    @property
    def num_tokens_allocated(self) -> int:
        """The same: these caches hold exactly what they use."""
        return self.num_tokens_used

    def can_ever_hold(self, num_tokens: int) -> bool:
        """Whether a sequence of `num_tokens` fits when it is alone."""
        return num_tokens <= self.max_model_len and (
            self.budget_bytes is None or self._bytes(1, num_tokens, 0) <= self.budget_bytes
        )

    def can_ever_encode(self, source: Source | None) -> bool:
        """Whether a source fits when it is alone, with one token."""
        num_positions = 0 if source is None else source.num_positions
        return self.budget_bytes is None or self._bytes(1, 1, num_positions) <= self.budget_bytes

    def num_to_encode(self, sequence: Sequence) -> int:
        """All of the sequence's source: these outputs are never shared."""
        return 0 if sequence.source is None else sequence.source.num_positions

    def is_being_computed(self, sequence: Sequence) -> bool:
        """Never: these caches are not shared."""
        return False

    def admit(self, sequence: Sequence) -> bool:
        """Account for a sequence's prompt and its next token; False when there is no room."""
        num_positions = self.num_to_encode(sequence)
        if not self._fits(1, sequence.num_tokens + 1, num_positions):
            return False
        self._positions[sequence.sequence_id] = num_positions
        self._tokens[sequence.sequence_id] = sequence.num_tokens + 1
        sequence.num_computed_tokens = 0
        return True

    def ensure(self, sequence: Sequence, num_tokens: int) -> bool:
        """Account for growth to `num_tokens`; False when there is no room."""
        held = self._tokens[sequence.sequence_id]
        if num_tokens > held:
            if not self._fits(0, num_tokens - held, 0):
                return False
            self._tokens[sequence.sequence_id] = num_tokens
        return True

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Never: these caches are stepped one after the other, by tokens that the host knows."""
        return False

    def commit(self, sequence: Sequence) -> None:
        """Nothing to publish: these caches are never shared."""

    def free(self, sequence: Sequence, *, can_keep: bool) -> None:
        """Forget a sequence; its cache object is dropped by the runner."""
        self._tokens.pop(sequence.sequence_id, None)
        self._positions.pop(sequence.sequence_id, None)

    def take_ops(self) -> list[StorageOp]:
        """No storage operations: the model makes its own cache."""
        return []

    def give_back(self, max_kept_tokens: int) -> None:
        """Nothing is kept after a sequence ends."""

    def remake(self) -> list[StorageOp]:
        """Nothing: there is no storage to lose."""
        return []

    def check_integrity(self) -> None:
        """Raise AssertionError when the budget is exceeded."""
        total = self._bytes(len(self._tokens), self.num_tokens_used, sum(self._positions.values()))
        assert self.budget_bytes is None or total <= self.budget_bytes, f"{total} bytes exceed {self.budget_bytes}"
        assert self._positions.keys() == self._tokens.keys(), "an encoder output belongs to no sequence"

    def _bytes(self, num_sequences: int, num_tokens: int, num_positions: int) -> int:
        sizes = (self.bytes_fixed, self.bytes_per_token, self.bytes_per_position)
        return sum(size * count for size, count in zip(sizes, (num_sequences, num_tokens, num_positions), strict=True))

    def _fits(self, more_sequences: int, more_tokens: int, more_positions: int) -> bool:
        if self.budget_bytes is None:
            return True
        held = (len(self._tokens), self.num_tokens_used, sum(self._positions.values()))
        more = (more_sequences, more_tokens, more_positions)
        return self._bytes(*(have + add for have, add in zip(held, more, strict=True))) <= self.budget_bytes
