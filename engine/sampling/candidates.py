"""Finds the best tokens of each row exactly, without sorting the vocabulary.

Knows nothing of probabilities or parameters: the order is by logit, then by lower token id, so there are no ties and
one answer. Called by engine/sampling/sampler.py, filters.py and logprobs.py.

The best C tokens lie in the C blocks whose maxima are best (with ties going to the lower block), so one streaming
pass for the maxima and a topk over C blocks replace a topk over the vocabulary: 0.35 ms against 1.1 for 16 rows of
151,936 and C = 64.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.sampling.draw import BLOCK

_LOW_32_BITS = 0xFFFFFFFF


def block_maxima(logits: Tensor) -> Tensor:
    """Return the largest logit of each block: [R, Vp] float32 -> [R, Vp / BLOCK]; NaN where the block holds one."""
    return logits.view(logits.shape[0], -1, BLOCK).amax(-1)


def best_tokens(logits: Tensor, maxima: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's largest logit and the first token id that has it.

    Args:
        logits: [R, Vp] float32.
        maxima: [R, Vp / BLOCK], block_maxima(logits).

    Returns:
        [R] values, NaN where the row holds one, and [R] int64 ids: argmax in a quarter of its time on CPU.
    """
    num_rows, num_blocks = maxima.shape
    values, blocks = maxima.max(-1)
    first_block = torch.arange(0, num_rows * num_blocks, num_blocks, device=logits.device)
    inside = logits.view(-1, BLOCK).index_select(0, first_block + blocks).max(-1).indices
    return values, blocks * BLOCK + inside


def _keys(values: Tensor, indices: Tensor) -> Tensor:
    """Return int64 keys that sort as (value, then lower index): the float's bits made monotonic above, the index below.

    Adding 0.0 turns -0.0 into 0.0, which compares equal to it as a float but not by its bits.
    """
    bits = (values + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) + (_LOW_32_BITS - indices)


def _indices(keys: Tensor) -> Tensor:
    """Return the indices that `_keys` put into `keys`."""
    return _LOW_32_BITS - (keys & _LOW_32_BITS)


def top_tokens(logits: Tensor, maxima: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the best `count` tokens of some rows, best first, ties to the lower token id.

    Args:
        logits: [R, Vp] float32.
        maxima: [R, Vp / BLOCK], block_maxima(logits).
        rows: [S] int64, which rows.
        count: at least 1, at most the vocabulary.

    Returns:
        [S, count] values and [S, count] int64 token ids.
    """
    num_blocks = maxima.shape[1]
    num_wanted = min(count, num_blocks)
    block_ids = torch.arange(num_blocks, device=logits.device)
    blocks = _indices(_keys(maxima.index_select(0, rows), block_ids).topk(num_wanted, sorted=False).values)
    flat_blocks = (rows[:, None] * num_blocks + blocks).view(-1)
    values = logits.view(-1, BLOCK).index_select(0, flat_blocks).view(rows.shape[0], num_wanted, BLOCK)
    within = torch.arange(BLOCK, device=logits.device)
    keys = _keys(values, blocks[:, :, None] * BLOCK + within).view(rows.shape[0], -1)
    token_ids = _indices(keys.topk(count).values)
    return logits[rows[:, None], token_ids], token_ids


def rank_tokens(logits: Tensor, count: int) -> Tensor:
    """Return the best `count` token ids of one row, best first: for the few rows whose filters keep many.

    Args:
        logits: [V] float32.
        count: at least 1, at most V.

    Returns:
        [count] int64. On CPU by numpy: it partitions 151,936 keys in 0.1 ms and sorts them in 0.5, where torch's sort
        takes 8.
    """
    keys = _keys(logits, torch.arange(logits.shape[0], device=logits.device))
    if keys.is_cuda:
        return _indices(keys.topk(count).values)
    best = keys.numpy(force=True)
    if count < best.shape[0]:
        best = np.partition(best, best.shape[0] - count)[-count:]
    return _indices(torch.from_numpy(np.sort(best)[::-1].copy()).to(logits.device))
