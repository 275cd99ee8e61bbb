"""Draws one token id from weights by inverse CDF, with one reproducible uniform per (seed, position).

Knows nothing of sequences, parameters or filters: weights in, token ids out.
Called by engine/sampling/sampler.py and filters.py.

The CDF runs in token-id order, never in order of probability: two tokens whose logits differ by rounding alone (another
batch shape, another device) then move a boundary by that rounding, instead of swapping two intervals.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
"""Rows are padded to a multiple of this many tokens, and summed in blocks of it."""

_MASK = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def _mix(z: int) -> int:
    """SplitMix64's finaliser (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014)."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def uniform(seed: int, position: int) -> float:
    """Return the uniform in [0, 1) of one position of one seed: SplitMix64 seeded with the hash of `seed`, jumped to
    `position`.

    Args:
        seed: any int; taken modulo 2**64, so -1 and 2**64 - 1 are one seed.
        position: index of the output token, >= 0.

    Returns:
        A multiple of 2**-53, the same on every machine.
    """
    start = _mix((seed + _GOLDEN_GAMMA) & _MASK)
    return (_mix((start + (position + 1) * _GOLDEN_GAMMA) & _MASK) >> 11) * 2.0**-53


def running_sum(weights: Tensor) -> Tensor:
    """Cumulative sum of each row in float64, whose bits do not depend on how many rows there are.

    Args:
        weights: [R, N], any float dtype.

    Returns:
        [R, N] float64.
    """
    if weights.is_cuda and weights.shape[0] == 1:
        # A single row would take CUDA's device-wide scan, whose order of additions is not that of the row-wise scan.
        return weights.expand(2, -1).cumsum(-1, dtype=torch.float64)[:1]
    return weights.cumsum(-1, dtype=torch.float64)


def _first_above(cdf: Tensor, target: Tensor) -> Tensor:
    """Index [R, 1] of the first entry of `cdf` [R, N] above `target` [R, 1]: never an entry of weight zero.

    The target is kept below the last entry, so rounding cannot fall off the end; NaN rows are clamped so that the
    index can be used.
    """
    last = cdf[:, -1:]
    target = torch.minimum(target, torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(cdf, target, right=True).clamp_(max=cdf.shape[-1] - 1)


def draw_dense(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token per row from weights over the whole vocabulary, without sorting and without a float32 running sum.

    Blocks are summed first (float32 within 128 tokens, float64 across), then only the block that was hit is walked
    in float64: the error is that of 128 additions, not of 150,000.

    Args:
        weights: [R, Vp] float, >= 0, not normalised; Vp a multiple of BLOCK; padding has weight 0.
        uniforms: [R, 1] float64 in [0, 1).

    Returns:
        [R, 1] int64 token ids; meaningless (but in range) for rows that hold NaN.
    """
    num_rows, width = weights.shape
    num_blocks = width // BLOCK
    cdf = running_sum(weights.view(num_rows, num_blocks, BLOCK).sum(-1))
    target = uniforms * cdf[:, -1:]
    block = _first_above(cdf, target)
    before = torch.where(block > 0, cdf.gather(1, (block - 1).clamp_(min=0)), 0.0)
    first_block = torch.arange(0, num_rows * num_blocks, num_blocks, device=weights.device)
    inside = running_sum(weights.view(-1, BLOCK).index_select(0, first_block + block[:, 0]))
    return block * BLOCK + _first_above(inside, target - before)


def draw_sparse(weights: Tensor, token_ids: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token per row from a few candidates.

    Args:
        weights: [R, C] float64, >= 0, not normalised; 0 for candidates that a filter dropped.
        token_ids: [R, C] int64, distinct within a row, in any order.
        uniforms: [R, 1] float64 in [0, 1).

    Returns:
        [R, 1] int64 token ids.
    """
    ordered_ids, order = token_ids.sort(-1)
    cdf = running_sum(weights.gather(1, order))
    return ordered_ids.gather(1, _first_above(cdf, uniforms * cdf[:, -1:]))
