"""Log-probabilities of the model's own distribution, under token rules: before bias, penalties and temperature.

Knows nothing of how a token was chosen.
Called by engine/sampling/sampler.py.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.sampling.candidates import best_tokens, top_tokens
from engine.sampling.filters import softmax_rows
from engine.sequence import TokenLogprobs

FLOOR = -9999.0
"""Stands for log 0 on the wire, where -inf is not JSON."""


@dataclass(frozen=True, slots=True)
class TokenValues:
    """The answers for some chosen tokens, where the logits are.

    Args:
        values: [S, 1 + K] float64, the chosen token's log-probability and those of the likeliest.
        top_ids: [S, K] int64, the likeliest tokens' ids.
    """

    values: Tensor
    top_ids: Tensor

    @staticmethod
    def entries(values: Rows[Rows[float]], top_ids: Rows[Rows[int]], num_top: Rows[int]) -> list[TokenLogprobs]:
        """Return the answers from numbers that have been read: `num_top` alternatives of each row."""
        return [
            TokenLogprobs(row[0], tuple(zip(ids[:k], row[1 : k + 1], strict=True)))
            for row, ids, k in zip(values, top_ids, num_top, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class RawLogprobs:
    """What is kept of some rows' logits, raw or under their token rules, to answer once their tokens are chosen.

    Args:
        index: [S] int64, rows of the batch.
        log_sum_exp: [S, 1] float64.
        top: [S, K] float64 log-probabilities, likeliest first; K = 0 when no row asks for alternatives.
        top_ids: [S, K] int64, their token ids; equal ones by lower id.
    """

    index: Tensor
    log_sum_exp: Tensor
    top: Tensor
    top_ids: Tensor

    @classmethod
    def of(cls, logits: Tensor, maxima: Tensor, index: Tensor, num_top: int, scratch: Tensor) -> RawLogprobs:
        """Read rows `index` of raw logits [R, Vp] float32 (padding -inf); `scratch` is overwritten."""
        largest, likeliest = best_tokens(logits, maxima)
        probabilities = softmax_rows(logits, index, None, scratch)
        largest = largest.index_select(0, index)[:, None].double()
        log_sum_exp = largest - probabilities.gather(1, likeliest.index_select(0, index)[:, None]).double().log()
        if num_top == 0:
            return cls(index, log_sum_exp, log_sum_exp[:, :0], index[:, None][:, :0])
        values, top_ids = top_tokens(logits, maxima, index, num_top)
        return cls(index, log_sum_exp, (values.double() - log_sum_exp).clamp_(min=FLOOR), top_ids)

    def of_tokens(self, logits: Tensor, token_ids: Tensor) -> TokenValues:
        """Return the logprobs of the chosen tokens.

        Args:
            logits: [R, V] any float dtype, the raw logits again: what rules forbid is never chosen.
            token_ids: [S, 1] int64, the chosen token of each row of `index`.
        """
        raw = logits[self.index, token_ids[:, 0]][:, None]
        chosen = (raw.double() - self.log_sum_exp).clamp_(min=FLOOR)
        return TokenValues(torch.cat([chosen, self.top], 1), self.top_ids)
