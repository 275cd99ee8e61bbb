"""Makes impossible what a sequence's TokenRules forbid, for all rows of a step together.

Knows nothing of penalties, drawing or log-probabilities: it runs before them, so all of them see what is left.
Called by engine/sampling/sampler.py, for steps in which some row has rules.

Thousands of sequences share one TokenRules: its indices are made once, and its rows are changed together.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.sampling.candidates import block_maxima
from engine.sampling.timestamps import TimestampGrammar
from engine.sequence import Sequence, TimestampRules, TokenRules
from engine.transfer import upload
from engine.validation import check_rules

MAX_KEPT = 256
"""Distinct rules whose indices are kept; a server's languages and tasks are fewer."""


@dataclass(frozen=True, slots=True)
class _Indices:
    """One TokenRules, ready for use.

    Args:
        forbidden: [N] int64, never to be chosen.
        forbidden_first: [M] int64, not to be chosen as the first token; those of `forbidden` among them.
        allowed: [A] int64, None for all.
        grammar: of timestamps, None where there are none.
    """

    forbidden: Tensor
    forbidden_first: Tensor
    allowed: Tensor | None
    grammar: TimestampGrammar | None


class RuleBook:
    """Applies token rules to batches of logits; keeps the indices of those it has met.

    Args:
        vocab_size: V.
        width: Vp, of the padded logits.
        device: where they are.
        is_deferring: whether reading from the device would make the host wait.
    """

    def __init__(self, vocab_size: int, width: int, device: torch.device, *, is_deferring: bool = False) -> None:
        self._is_deferring = is_deferring
        self._vocab_size = vocab_size
        self._width = width
        self._device = device
        self._kept: dict[TokenRules, _Indices] = {}

    def apply(self, logits: Tensor, rows: Rows[Sequence]) -> Tensor:
        """Set what is forbidden to -inf; rows without rules keep every bit.

        A NaN or infinite logit is never hidden: it stays, or becomes NaN, and its row fails by it.

        Args:
            logits: [R, Vp] float32, padding -inf; changed in place.
            rows: the R sequences.

        Returns:
            block_maxima(logits) as the rules left them.

        Raises:
            InvalidValue: a rule names a token outside the vocabulary.
        """
        members: dict[TokenRules, list[int]] = {}
        for row, sequence in enumerate(rows):
            if sequence.params.token_rules is not None:
                members.setdefault(sequence.params.token_rules, []).append(row)
        groups = [(self._indices_of(rules), group) for rules, group in members.items()]
        for indices, group in groups:
            if indices.allowed is not None:
                self._allow_only(logits, indices.allowed, group)
            self._forbid(logits, indices.forbidden_first, [row for row in group if not rows[row].output_token_ids])
            self._forbid(logits, indices.forbidden, [row for row in group if rows[row].output_token_ids])
        maxima = block_maxima(logits)
        for indices, group in groups:
            if indices.grammar is not None:
                histories = [rows[row].output_token_ids for row in group]
                indices.grammar.apply(logits, maxima, self._to(group), histories)
        return maxima

    def _forbid(self, logits: Tensor, token_ids: Tensor, group: list[int]) -> None:
        if not group or not token_ids.shape[0]:
            return
        positions = (self._to(group)[:, None] * self._width + token_ids).view(-1)
        # Added, not written over: NaN and infinity become NaN, not an innocent -inf.
        minus_infinity = torch.full((1,), float("-inf"), device=self._device).expand(positions.shape[0])
        logits.view(-1).index_add_(0, positions, minus_infinity)

    def _allow_only(self, logits: Tensor, token_ids: Tensor, group: list[int]) -> None:
        index = self._to(group)
        positions = (index[:, None] * self._width + token_ids).view(-1)
        flat = logits.view(-1)
        kept = flat.index_select(0, positions).view(len(group), -1)  # [S, A]
        # A copy of whole rows would tell which are broken too, but fresh pages cost more than this pass over all.
        is_finite = block_maxima(logits).amax(-1).index_select(0, index) < float("inf")
        logits.index_fill_(0, index, float("-inf"))
        flat.index_copy_(0, positions, torch.where(is_finite[:, None], kept, float("nan")).view(-1))

    def _indices_of(self, rules: TokenRules) -> _Indices:
        indices = self._kept.get(rules)
        if indices is None:
            check_rules(rules, self._vocab_size)
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            times = rules.timestamps
            forbidden = {*rules.suppressed} if times is None else {*rules.suppressed, times.no_timestamps_id}
            indices = self._kept[rules] = _Indices(
                forbidden=self._to(sorted(forbidden)),
                forbidden_first=self._to(sorted(forbidden | {*rules.suppressed_first})),
                allowed=None if rules.allowed is None else self._to(sorted({*rules.allowed})),
                grammar=None if times is None else self._grammar(times),
            )
        return indices

    def _grammar(self, times: TimestampRules) -> TimestampGrammar:
        return TimestampGrammar(times, self._width, self._device, is_deferring=self._is_deferring)

    def _to(self, values: Collection[int]) -> Tensor:
        return upload(list(values), torch.int64, self._device)
