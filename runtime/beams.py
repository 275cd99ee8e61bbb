"""The bookkeeping of beam search: which continuations live on, which are finished, and when no better can come.

Knows nothing of models or of how candidates are computed; the rules are those of generate() in transformers, so that
the tokens are too. Driven by runtime/beam_search.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

EarlyStopping = bool | Literal["never"]

# A score that no sequence has; what is marked so is out of the running.
_OUT = -1.0e9


@dataclass(frozen=True, slots=True)
class BeamParams:
    """How wide to search, and what is best.

    Args:
        num_beams: sequences kept at each step, >= 2.
        length_penalty: scores are divided by the length to this power; above 0 favours long sequences.
        early_stopping: True: stop when there are num_beams finished sequences. False: when it is unlikely that a better
            one comes. `never`: when none can.
        num_return_sequences: how many of the best to give, at most num_beams.
        num_forced_tokens: at the prompt's end, that count as part of the sequence: a forced beginning.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    num_return_sequences: int = 1
    num_forced_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A sequence and how good it is.

    Args:
        token_ids: generated; the token that ended it is the last, unless it was cut off.
        score: sum of log-probabilities while it lives, divided by the length to the power of length_penalty at its end.
        end_token_id: the token that ended it; None while it lives, and when it was cut off at max_tokens.
    """

    token_ids: tuple[int, ...]
    score: float
    end_token_id: int | None = None


@dataclass(slots=True)
class Beams:
    """One search.

    Args:
        params: what is best.
        end_token_ids: any of them ends a sequence.
        max_tokens: longest sequence.
        min_tokens: shortest sequence that may end by a token.
    """

    params: BeamParams
    end_token_ids: frozenset[int]
    max_tokens: int
    min_tokens: int = 0
    live: list[Hypothesis] = field(default_factory=lambda: [Hypothesis((), 0.0)])  # best first
    finished: list[Hypothesis] = field(default_factory=list)  # best first
    is_over: bool = False
    _can_improve: bool = True

    @property
    def num_candidates(self) -> int:
        """Continuations compared at each step: as many as leave num_beams that go on, should all others end."""
        return max(2, 1 + len(self.end_token_ids)) * self.params.num_beams

    @property
    def num_wanted(self) -> int:
        """The likeliest tokens to be told of each live sequence: those compared, besides any that may not be chosen."""
        return self.num_candidates + (len(self.end_token_ids) if self._num_tokens < self.min_tokens else 0)

    @property
    def best(self) -> list[Hypothesis]:
        """The best sequences, when the search is over."""
        return self.finished[: self.params.num_return_sequences]

    def advance(self, continuations: Sequence[Sequence[tuple[int, float]]]) -> None:
        """Takes a step.

        Args:
            continuations: of each live sequence, its num_wanted likeliest next tokens and their log-probabilities, best
                first.
        """
        candidates = self._candidates(continuations)
        num_tokens = self._num_tokens + 1
        is_full = num_tokens >= self.max_tokens
        ends = [is_full or candidate.token_ids[-1] in self.end_token_ids for candidate in candidates]
        self.live = [c for c, is_end in zip(candidates, ends, strict=True) if not is_end][: self.params.num_beams]
        self._finish(candidates, ends, self._length(num_tokens))
        is_filled = len(self.finished) == self.params.num_beams
        self._can_improve = self._can_improve and self._could_improve(candidates, num_tokens, is_filled=is_filled)
        is_stopped = is_filled and self.params.early_stopping is True
        self.is_over = all(ends) or is_stopped or not self._can_improve

    @property
    def _num_tokens(self) -> int:
        """Generated so far, of any live sequence."""
        return len(self.live[0].token_ids)

    def _length(self, num_tokens: int) -> int:
        """As scores count it."""
        return num_tokens + self.params.num_forced_tokens

    def _candidates(self, continuations: Sequence[Sequence[tuple[int, float]]]) -> list[Hypothesis]:
        """The best continuations of all, best first; equal ones by beam, then by token."""
        may_end = self._num_tokens >= self.min_tokens
        ranked = sorted(
            (-(beam.score + logprob), number, token_id)
            for number, (beam, tokens) in enumerate(zip(self.live, continuations, strict=True))
            for token_id, logprob in tokens
            if may_end or token_id not in self.end_token_ids
        )
        return [
            Hypothesis((*self.live[number].token_ids, token_id), -cost)
            for cost, number, token_id in ranked[: self.num_candidates]
        ]

    def _finish(self, candidates: Sequence[Hypothesis], ends: Sequence[bool], length: int) -> None:
        """Only what would live on as a beam may finish; what is better than a finished one takes its place."""
        best = list(zip(candidates, ends, strict=True))[: self.params.num_beams]
        ended = [self._ended(candidate, length) for candidate, is_end in best if is_end]
        self.finished = sorted([*self.finished, *ended], key=lambda one: -one.score)[: self.params.num_beams]

    def _ended(self, candidate: Hypothesis, length: int) -> Hypothesis:
        last = candidate.token_ids[-1]
        score = candidate.score / length**self.params.length_penalty
        return Hypothesis(candidate.token_ids, score, last if last in self.end_token_ids else None)

    def _could_improve(self, candidates: Sequence[Hypothesis], num_tokens: int, *, is_filled: bool) -> bool:
        """Whether the best live sequence might still beat the worst finished one."""
        if not is_filled:
            return True
        penalty = self.params.length_penalty
        is_exact = self.params.early_stopping == "never" and penalty > 0
        length = self._length(self.max_tokens if is_exact else num_tokens)
        best = self.live[0].score if self.live else candidates[0].score + _OUT
        best_possible: float = best / length**penalty
        return best_possible > self.finished[-1].score
