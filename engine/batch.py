"""One step's work: which tokens of which sequences, and what sampling chose for them.

Knows nothing of how it is decided, or of tensors; no torch here.
Made by scheduler.py; read by the runners and the sampler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.sequence import Sequence, TokenLogprobs


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Tokens [start, start + num_tokens) of one sequence; `num_logits` of the last of them want logits."""

    sequence: Sequence
    start: int
    num_tokens: int
    num_logits: int

    @property
    def stop(self) -> int:
        """Past its last token."""
        return self.start + self.num_tokens

    @property
    def is_sampling(self) -> bool:
        """Whether this step computes the sequence's last token, so that the next one can be chosen.

        That is the last known one, or the one after it where the step was launched before that was known.
        """
        return self.stop >= self.sequence.num_tokens

    @property
    def token_ids(self) -> list[int]:
        """Its tokens; 0 for one that is not known yet."""
        return self.sequence.token_slice(self.start, self.stop) or [0]

    def holds(self, position: int) -> bool:
        """Whether the token at `position` of the sequence is computed here."""
        return self.start <= position < self.stop


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work.

    Args:
        items: the sequences and their tokens.
        preempted: had to go to make room, and recompute when they are admitted again.
        num_to_encode: encoder positions that must be computed before the items' tokens.
    """

    items: tuple[ScheduledSequence, ...]
    preempted: tuple[Sequence, ...] = ()
    num_to_encode: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(item.num_tokens for item in self.items)

    @property
    def kind(self) -> Literal["prefill", "decode"]:
        """Decode when every sequence computes one token, prefill when a prompt or a source is among them."""
        return "decode" if self.num_tokens == len(self.items) and not self.num_to_encode else "prefill"


@dataclass(frozen=True, slots=True)
class Chosen:
    """What sampling decided for one sequence of the batch."""

    token_id: int
    logprobs: TokenLogprobs | None
