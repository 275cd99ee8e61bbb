"""Finds when each token was spoken from the attention that was paid to the audio while it was written.

Knows nothing of words, models or tensors; takes the weights of the heads that follow the audio.
Called by runtime/recordings.py in a worker thread, once per window whose words need their times.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

FRAME_S = 0.02
MEDIAN_WIDTH = 7

Matrix = NDArray[np.float32]
# Scores are rounded to this before they are added up: sums are then exact, in whatever order, and equal paths compare
# equal. It is finer than single precision is at the sums of a window.
_SCORE_STEP = 2.0**-16
# Rows filtered at a time, so that what is being sorted stays in the cache.
_FILTER_ROWS = 16


def token_times(
    weights: Matrix,
    num_frames: int,
    *,
    first_row: int = 0,
    num_tokens: int | None = None,
    median_width: int = MEDIAN_WIDTH,
) -> list[tuple[float, float]]:
    """Start and end of each text token, in seconds from the beginning of the window.

    The row that predicts a token (the one whose input is the token before it) tells where the token begins, and the
    next row where it ends; so there is one row more than tokens, the last predicting the end of the text. Every other
    row counts only in what is usual for a frame.

    Args:
        weights: [heads, rows, frames] attention after softmax, one row per decoder input, 0.02 s a frame. Overwritten
            never; frames beyond num_frames, the padding, are left out, and the rest made to sum to 1 again.
        num_frames: frames that hold the recording, at least 1.
        first_row: the row that predicts the first text token.
        num_tokens: text tokens; None for as many as there are rows.
        median_width: of the filter along time, odd; the model's configuration names it.

    Raises:
        ValueError: rows, frames or width do not fit, or a weight is not finite.
    """
    num_rows = weights.shape[1]
    num_tokens = num_rows - first_row - 1 if num_tokens is None else num_tokens
    if not 0 <= first_row <= first_row + num_tokens < num_rows:
        raise ValueError(f"rows {first_row} to {first_row + num_tokens} are wanted; there are {num_rows}")
    if not 1 <= num_frames <= weights.shape[2]:
        raise ValueError(f"num_frames is {num_frames}; it must be 1 to {weights.shape[2]}")
    heard = weights[:, :, :num_frames]
    if not np.isfinite(heard).all():
        raise ValueError("the attention weights hold a value that is not finite")
    salience = np.zeros((num_tokens + 1, num_frames), np.float32)
    for head in heard:  # one at a time: all of them are tens of MB
        standardised = _standardise(head)[first_row : first_row + num_tokens + 1]
        for row in range(0, num_tokens + 1, _FILTER_ROWS):
            salience[row : row + _FILTER_ROWS] += median_filter(standardised[row : row + _FILTER_ROWS], median_width)
    salience /= len(heard)
    frames = path_entries(-salience.astype(np.float64))
    edges_s = (frames * FRAME_S).tolist()
    return list(pairwise(edges_s))


def _standardise(weights: Matrix) -> Matrix:
    """[rows, frames] of one head, less what is usual for a frame over all rows, in units of how much it varies."""
    sums = weights.sum(axis=1, keepdims=True)
    shares = weights / np.where(sums > 0, sums, 1)
    deviations = shares - shares.mean(axis=0)
    std = shares.std(axis=0)
    # A frame that every token hears alike says nothing; dividing by 0 would say NaN.
    standardised: Matrix = deviations / np.where(std > 0, std, 1)
    return standardised


def median_filter(values: Matrix, width: int) -> Matrix:
    """[rows, frames]: each value the median of the `width` around it, reflected at the ends.

    Fewer frames than half a width are returned as they are. The least and the greatest of just over half of the values
    cannot be the median; they are dropped and the next value taken in, until one is left. Whole shifted arrays are
    compared at once: 14 times as fast as sorting.
    """
    if width < 1 or width % 2 == 0:
        raise ValueError(f"the median filter's width is {width}; it must be odd and positive")
    reach = width // 2
    num_frames = values.shape[1]
    if num_frames <= reach:
        return values
    padded = np.pad(values, ((0, 0), (reach, reach)), mode="reflect")
    waiting = [padded[:, shift : shift + num_frames] for shift in range(width)]
    held = [waiting.pop() for _ in range(reach + 1)]
    while waiting:
        held.append(waiting.pop())
        for index in range(1, len(held)):  # the least to the front
            least = np.minimum(held[0], held[index])
            held[index] = np.maximum(held[0], held[index])
            held[0] = least
        for index in range(1, len(held) - 1):  # the greatest to the back
            greatest = np.maximum(held[index], held[-1])
            held[index] = np.minimum(held[index], held[-1])
            held[-1] = greatest
        held = held[1:-1]
    return held[0]


def path_entries(costs: NDArray[np.float64]) -> NDArray[np.int64]:
    """Dynamic time warping: the column at which the cheapest monotone path enters each row, [rows].

    The path leads from the first cell to the last by steps right, down or both, and costs the sum of its cells. Of
    equal ways into a cell the one from the left is taken, then the diagonal one.

    Within a row the path only goes right, so that a row's costs are a running minimum over the columns at which it may
    have been entered: one pass over arrays per row, 448 for the longest text, where anti-diagonals would take 1,947.

    Args:
        costs: [rows, columns], finite, rounded to multiples of 2^-16 here.
    """
    num_rows, num_columns = costs.shape
    rounded = np.rint(costs / _SCORE_STEP)
    sums = np.cumsum(rounded, axis=1)
    sums_before = sums - rounded
    totals = np.full((num_rows + 1, num_columns + 1), np.inf)
    totals[0, 0] = 0
    for row in range(num_rows):
        entry = np.minimum(totals[row, :-1], totals[row, 1:])
        entry -= sums_before[row]
        np.minimum.accumulate(entry, out=entry)
        np.add(entry, sums[row], out=totals[row + 1, 1:])
    entries = np.empty(num_rows, np.int64)
    column = num_columns - 1
    for row in range(num_rows - 1, -1, -1):
        above, below = totals[row, : column + 2], totals[row + 1, : column + 1]
        column = int(np.flatnonzero(below > np.minimum(above[:-1], above[1:]))[-1])
        entries[row] = column
        column -= 0 if above[column + 1] < above[column] else 1
    return entries
