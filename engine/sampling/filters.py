"""Samples rows under temperature, top_k, top_p and min_p.

Knows nothing of sequences, penalties or log-probabilities; a row's result depends on that row alone, bit for bit.
Called by engine/sampling/sampler.py.

Every filter keeps a prefix of the tokens ordered by logit (ties to the lower id), so a handful of candidates decides
nearly every row; a row whose prefix is longer than the candidates is ranked whole.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.sampling.candidates import rank_tokens, top_tokens
from engine.sampling.draw import draw_dense, draw_sparse, running_sum
from engine.sequence import SamplingParams
from engine.transfer import upload

NUM_CANDIDATES = 64
"""How many of the best tokens every filtered row looks at."""

NUM_CANDIDATES_DEFERRED = 256
"""The same where ranking a row whole is put off, which costs more than a few candidates too many."""

NUM_RANKED = 4096
"""How many a row looks at next, alone, before all."""

UNDECIDED = -2
"""In the place of a token id: the row must be ranked whole, which was put off."""


@dataclass(frozen=True, slots=True)
class FilterRows:
    """The rows to sample and their parameters as tensors, one entry a row.

    Args:
        index: [S] int64, rows of the logits.
        temperature: [S, 1] float64, > 0.
        top_k: [S, 1] int64, the vocabulary's size where off.
        top_p, min_p: [S, 1] float64.
        uniforms: [S, 1] float64 in [0, 1).
        has_open_top_p: whether some row's top_p is a share of the whole vocabulary's mass.
    """

    index: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniforms: Tensor
    has_open_top_p: bool

    @classmethod
    def of(
        cls,
        index: Rows[int],
        params: Rows[SamplingParams],
        uniforms: Rows[float],
        vocab_size: int,
        device: torch.device,
    ) -> FilterRows:
        """Gather the parameters of rows `index`; one transfer for the integers, one for the floats."""
        top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
        integers = upload([list(index), top_k], torch.int64, device)
        floats = upload(
            [[p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params], list(uniforms)],
            torch.float64,
            device,
        )
        return cls(
            index=integers[0],
            top_k=integers[1][:, None],
            temperature=floats[0][:, None],
            top_p=floats[1][:, None],
            min_p=floats[2][:, None],
            uniforms=floats[3][:, None].contiguous(),
            has_open_top_p=any(p.top_p < 1.0 and k == vocab_size for p, k in zip(params, top_k, strict=True)),
        )

    def row(self, i: int) -> FilterRows:
        """Return row `i` alone."""
        part = slice(i, i + 1)
        return FilterRows(
            index=self.index[part],
            temperature=self.temperature[part],
            top_k=self.top_k[part],
            top_p=self.top_p[part],
            min_p=self.min_p[part],
            uniforms=self.uniforms[part],
            has_open_top_p=self.has_open_top_p,
        )


def softmax_rows(logits: Tensor, index: Tensor, temperature: Tensor | None, scratch: Tensor) -> Tensor:
    """Write the softmax of some rows to `scratch` and return the written part.

    Args:
        logits: [R, Vp] float32; padding is -inf.
        index: [S] int64, which rows.
        temperature: [S, 1] to divide by, None for 1.
        scratch: [>= S, Vp] float32, overwritten.

    Returns:
        [S, Vp] float32. Softmax works row by row, so a row's bits do not depend on S (a plain sum of one row would
        be split among threads).
    """
    out = scratch[: index.shape[0]]
    torch.index_select(logits, 0, index, out=out)
    if temperature is not None:
        out.div_(temperature.float())
    return torch.softmax(out, -1, out=out)


def sample_dense(logits: Tensor, rows: FilterRows, scratch: Tensor) -> Tensor:
    """Draw from the whole softmax, for rows without top_k, top_p and min_p: [S, 1] int64 token ids."""
    return draw_dense(softmax_rows(logits, rows.index, rows.temperature, scratch), rows.uniforms)


def _kept_weights(values: Tensor, rows: FilterRows, full_mass: Tensor | None, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Apply top_k, then top_p to what is left, then min_p.

    Args:
        values: [S, C] float32 logits, largest first.
        rows: their parameters.
        full_mass: [S, 1] float64, sum over the vocabulary of weights relative to the first; None if no row needs it.
        vocab_size: a top_k of this is off.

    Returns:
        [S, C] float64 weights, zero where dropped, and [S] bool: whether the kept prefix ends within the C candidates.
    """
    count = values.shape[1]
    weights = ((values.double() - values[:, :1].double()) / rows.temperature).exp_()
    sums = running_sum(weights)
    mass = sums.gather(1, rows.top_k.clamp(max=count) - 1)
    if full_mass is not None:
        mass = torch.where(rows.top_k > count, full_mass, mass)
    # The first token is always kept; a token is kept while those before it have not reached top_p.
    is_kept = (torch.arange(count, device=values.device) < rows.top_k) & (weights >= rows.min_p)
    is_kept &= (sums - weights < rows.top_p * mass) | (rows.top_p >= 1.0)
    # A top_p after a top_k that reaches beyond the candidates is a share of a mass not known here.
    is_complete = (rows.top_k <= count) | ((rows.top_k >= vocab_size) & ~is_kept[:, -1:])
    return weights * is_kept, is_complete[:, 0]


def is_decided_by(num_candidates: int, params: SamplingParams, vocab_size: int) -> bool:
    """Whether that many of the best tokens are sure to be enough for a row of these parameters."""
    return num_candidates >= vocab_size or 0 < params.top_k <= num_candidates


def sample_filtered(
    logits: Tensor, maxima: Tensor, rows: FilterRows, vocab_size: int, scratch: Tensor, *, is_deferring: bool = False
) -> Tensor:
    """Draw from rows that have top_k, top_p or min_p.

    Args:
        logits: [R, Vp] float32; padding is -inf.
        maxima: [R, Vp / BLOCK], block_maxima(logits).
        rows: which rows, and their parameters.
        vocab_size: V <= Vp.
        scratch: [>= S, Vp] float32, overwritten.
        is_deferring: whether a row that must be ranked whole is left UNDECIDED: to know it the host would have to wait.

    Returns:
        [S, 1] int64 token ids.
    """
    # A constant, never what the neighbours need: a row's bits depend on how many weights are summed.
    count = min(NUM_CANDIDATES_DEFERRED if is_deferring else NUM_CANDIDATES, vocab_size)
    values, token_ids = top_tokens(logits, maxima, rows.index, count)
    full_mass = None
    if rows.has_open_top_p and count < vocab_size:
        # The likeliest token's weight is 1, so the mass is one over its probability.
        probabilities = softmax_rows(logits, rows.index, rows.temperature, scratch)
        full_mass = probabilities.gather(1, token_ids[:, :1]).double().reciprocal()
    weights, is_complete = _kept_weights(values, rows, full_mass, vocab_size)
    drawn = draw_sparse(weights, token_ids, rows.uniforms)
    if is_deferring:
        return torch.where(is_complete[:, None], drawn, UNDECIDED)
    for i in (~is_complete).nonzero()[:, 0].tolist():
        mass = None if full_mass is None else full_mass[i : i + 1]
        drawn[i] = _sample_ranked(logits[rows.index[i], :vocab_size], rows.row(i), mass, scratch)
    return drawn


def _sample_ranked(logits: Tensor, row: FilterRows, full_mass: Tensor | None, scratch: Tensor) -> Tensor:
    """Draw from one row [V] by ranking as much of it as its filters need: [1, 1] int64 token id."""
    vocab_size = logits.shape[0]
    for count in (min(NUM_RANKED, vocab_size), vocab_size):
        token_ids = rank_tokens(logits, count)
        weights, is_complete = _kept_weights(logits[token_ids][None], row, full_mass, vocab_size)
        if is_complete.item():
            break
    dense = scratch[:1].zero_()
    dense[0, token_ids] = weights[0].float()
    return draw_dense(dense, row.uniforms)
