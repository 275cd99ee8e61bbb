"""Finds when each token is heard from the attention that predicts it: the cheapest monotone path through a matrix.

Knows nothing of models or tokenizers; the method is Whisper's own (standardise, median filter, dynamic time warping).
Called by evaluate_whisper.py.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def token_starts(attention: NDArray[np.float32], filter_width: int = 7) -> NDArray[np.int64]:
    """The position at which each token begins.

    Args:
        attention: `[heads, T, S]`, for each of T tokens the weights of S positions when it was predicted.
        filter_width: of the median filter along the positions, odd.

    Returns:
        `[T]` positions, never falling.
    """
    mean, std = attention.mean(-2, keepdims=True), attention.std(-2, keepdims=True)
    scaled = (attention - mean) / np.maximum(std, 1e-6)
    padded = np.pad(scaled, ((0, 0), (0, 0), (filter_width // 2, filter_width // 2)), mode="reflect")
    filtered = np.median(np.lib.stride_tricks.sliding_window_view(padded, filter_width, axis=-1), axis=-1)
    return _path(-filtered.mean(0))


def _path(cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """The first column of each row on the cheapest way from the upper left to the lower right."""
    num_rows, num_columns = cost.shape
    total = np.full((num_rows + 1, num_columns + 1), np.inf)
    total[0, 0] = 0
    came = np.zeros((num_rows + 1, num_columns + 1), np.int8)
    for i in range(1, num_rows + 1):
        for j in range(1, num_columns + 1):
            ways = (total[i - 1, j - 1], total[i - 1, j], total[i, j - 1])
            came[i, j] = int(np.argmin(ways))
            total[i, j] = cost[i - 1, j - 1] + ways[came[i, j]]
    starts = np.zeros(num_rows, np.int64)
    i, j = num_rows, num_columns
    while i > 0:
        starts[i - 1] = j - 1
        way = 2 if j == 0 else came[i, j]
        i, j = (i - (way != 2), j - (way != 1))
        if j == 0 and i > 0:
            starts[:i] = 0
            break
    return starts
