"""Accounting for sequences whose cache is the model's own object (the solo lane): bytes by length, no slots.

Knows nothing of tensors or of what the object is; no torch here.
Called by the scheduler in the place of kv/manager.py.
"""

from __future__ import annotations

from engine.kv.pool import StorageOp
from engine.sequence import Sequence


class StateManager:
    """Bounds the memory of per-sequence caches.

    Args:
        bytes_fixed: bytes a sequence takes whatever its length (recurrent and convolution states).
        bytes_per_token: bytes that each token adds.
        budget_bytes: most bytes of all sequences together; None for no bound.
        max_model_len: longest sequence in tokens.
    """

    is_chunkable = False  # recurrent kernels and convolution states take a prompt whole
    prefix_queries_total = 0
    prefix_hits_total = 0

    def __init__(self, *, bytes_fixed: int, bytes_per_token: int, budget_bytes: int | None, max_model_len: int) -> None:
        self.bytes_fixed = bytes_fixed
        self.bytes_per_token = bytes_per_token
        self.budget_bytes = budget_bytes
        self.max_model_len = max_model_len
        self._tokens: dict[int, int] = {}

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
            self.budget_bytes is None or self._bytes(1, num_tokens) <= self.budget_bytes
        )

    def is_being_computed(self, sequence: Sequence) -> bool:
        """Never: these caches are not shared."""
        return False

    def admit(self, sequence: Sequence) -> bool:
        """Account for a sequence's prompt and its next token; False when there is no room."""
        if not self._fits(1, sequence.num_tokens + 1):
            return False
        self._tokens[sequence.sequence_id] = sequence.num_tokens + 1
        sequence.num_computed_tokens = 0
        return True

    def ensure(self, sequence: Sequence, num_tokens: int) -> bool:
        """Account for growth to `num_tokens`; False when there is no room."""
        held = self._tokens[sequence.sequence_id]
        if num_tokens > held:
            if not self._fits(0, num_tokens - held):
                return False
            self._tokens[sequence.sequence_id] = num_tokens
        return True

    def commit(self, sequence: Sequence) -> None:
        """Nothing to publish: these caches are never shared."""

    def free(self, sequence: Sequence, *, can_keep: bool) -> None:
        """Forget a sequence; its cache object is dropped by the runner."""
        self._tokens.pop(sequence.sequence_id, None)

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
        total = self._bytes(len(self._tokens), self.num_tokens_used)
        assert self.budget_bytes is None or total <= self.budget_bytes, f"{total} bytes exceed {self.budget_bytes}"

    def _bytes(self, num_sequences: int, num_tokens: int) -> int:
        return num_sequences * self.bytes_fixed + num_tokens * self.bytes_per_token

    def _fits(self, more_sequences: int, more_tokens: int) -> bool:
        if self.budget_bytes is None:
            return True
        return self._bytes(len(self._tokens) + more_sequences, self.num_tokens_used + more_tokens) <= self.budget_bytes
