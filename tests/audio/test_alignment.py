"""Token times: the cheapest path, as a plain loop finds it; and what transformers makes of the same attention."""

from __future__ import annotations

import time
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from transformers.models.whisper.generation_whisper import (
    WhisperGenerationMixin,
    _dynamic_time_warping,
    _median_filter,
)

from audio.alignment import FRAME_S, median_filter, path_entries, token_times

Matrix = NDArray[np.float32]


def plain_path_entries(costs: NDArray[np.float64]) -> list[int]:
    """The slow twin: cell by cell, in whole numbers, and back."""
    num_rows, num_columns = costs.shape
    scores = np.rint(costs * 65536).astype(int).tolist()
    totals: dict[tuple[int, int], float] = {(-1, -1): 0}

    def total(row: int, column: int) -> float:
        return totals.get((row, column), float("inf"))

    for row in range(num_rows):
        for column in range(num_columns):
            ways = (total(row, column - 1), total(row - 1, column - 1), total(row - 1, column))
            totals[row, column] = scores[row][column] + min(ways)
    entries = [0] * num_rows
    row, column = num_rows - 1, num_columns - 1
    while row >= 0:
        left, diagonal, above = total(row, column - 1), total(row - 1, column - 1), total(row - 1, column)
        if left <= min(diagonal, above):
            column -= 1
            continue
        entries[row] = column
        column -= diagonal <= above
        row -= 1
    return entries


def library_path_entries(costs: NDArray[np.float64]) -> NDArray[np.int64]:
    """Where transformers' path enters each row, taken from it as transformers takes it."""
    text_indices, time_indices = _dynamic_time_warping(costs)
    jumps = np.pad(np.diff(text_indices), (1, 0), constant_values=1).astype(bool)
    return np.asarray(time_indices[jumps])


def path_cost(costs: NDArray[np.float64], entries: NDArray[np.int64]) -> float:
    """Of the path that enters each row there and leaves it where, or just before where, it enters the next."""
    num_columns = costs.shape[1]
    total = 0.0
    for row, entry in enumerate(entries):
        following = num_columns if row + 1 == len(entries) else entries[row + 1]
        to_diagonal = costs[row, entry:following].sum()
        to_below = to_diagonal + (costs[row, following] if following < num_columns else 0)
        total += to_below if following == entry else min(to_diagonal, to_below)
    return float(total)


SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 25))
# Few distinct values: many ways cost the same.
TIES = SHAPES.flatmap(lambda shape: arrays.arrays(np.float64, shape, elements=st.sampled_from([-1.0, 0.0, 0.5, 1.0])))
ANY = SHAPES.flatmap(lambda shape: arrays.arrays(np.float64, shape, elements=st.floats(-40, 40)))


@settings(deadline=None, max_examples=300)
@given(costs=st.one_of(TIES, ANY))
def test_paths_are_those_of_the_plain_twin(costs: NDArray[np.float64]) -> None:
    assert path_entries(costs).tolist() == plain_path_entries(costs)


def test_a_large_path_is_that_of_the_plain_twin() -> None:
    costs = np.random.default_rng(0).standard_normal((40, 300))
    costs[:, 100:130] = 0
    assert path_entries(costs).tolist() == plain_path_entries(costs)


@pytest.mark.parametrize("shape", [(1, 1), (1, 20), (9, 1), (5, 5), (12, 60), (30, 12)])
@pytest.mark.parametrize("seed", range(5))
def test_paths_are_those_of_transformers(shape: tuple[int, int], seed: int) -> None:
    costs = np.random.default_rng(seed).standard_normal(shape)
    np.testing.assert_array_equal(path_entries(costs), library_path_entries(costs))


def test_a_large_path_costs_no_more_than_that_of_transformers() -> None:
    costs = np.random.default_rng(1).standard_normal((100, 500))
    ours, theirs = path_entries(costs), library_path_entries(costs)
    assert path_cost(costs, ours) <= path_cost(costs, theirs) + 1e-3  # theirs adds up in single precision
    assert np.mean(ours == theirs) > 0.95


@pytest.mark.parametrize("width", [1, 3, 5, 7, 9, 15])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 5, 7, 8, 100])
def test_the_median_filter_is_that_of_transformers(width: int, num_frames: int) -> None:
    rng = np.random.default_rng(width)
    for drawn in (rng.standard_normal((5, num_frames)), rng.integers(0, 3, (5, num_frames))):
        values = np.asarray(drawn, np.float32)
        theirs = _median_filter(torch.from_numpy(values)[None], width)[0].numpy()
        np.testing.assert_array_equal(median_filter(values, width), theirs)


@pytest.mark.parametrize("width", [0, -1, 4])
def test_the_width_of_the_filter_is_odd(width: int) -> None:
    with pytest.raises(ValueError, match=f"width is {width}; it must be odd and positive"):
        median_filter(np.zeros((2, 9), np.float32), width)


def attention(num_rows: int, num_frames: int, *, heads: int = 4, seed: int = 0, sharpness: float = 6.0) -> Matrix:
    """[heads, rows, frames] that follow an uneven diagonal through noise, as heads that follow the audio do."""
    rng = np.random.default_rng(seed)
    centres = np.cumsum(rng.uniform(0.2, 1.8, num_rows))
    centres *= (num_frames - 1) / centres[-1]
    distance = (np.arange(num_frames) - centres[:, None]) / (num_frames / num_rows)
    logits = -np.minimum(sharpness * distance**2, 12) + rng.standard_normal((heads, num_rows, num_frames))
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True), np.float32)


def library_times(weights: Matrix, num_frames: int, num_input_ids: int, width: int) -> NDArray[np.float64]:
    """When each row begins, by transformers: one layer, whose heads are all alignment heads."""
    heads, num_rows, _ = weights.shape
    whole = torch.from_numpy(weights)[None]
    steps = [whole[:, :, :num_input_ids], *(whole[:, :, row : row + 1] for row in range(num_input_ids, num_rows))]

    class Outputs(dict[str, Any]):
        cross_attentions = tuple((step,) for step in steps)
        sequences = torch.zeros(1, num_rows + 1)

    model = SimpleNamespace(config=SimpleNamespace(decoder_layers=1, median_filter_width=width))
    times = WhisperGenerationMixin._extract_token_timestamps(
        model, Outputs(), [(0, head) for head in range(heads)], num_frames=2 * num_frames, num_input_ids=num_input_ids
    )
    return np.asarray(times[0, num_input_ids:-1].numpy(), np.float64)  # the last is there twice


def library_salience(weights: Matrix, width: int) -> NDArray[np.float64]:
    """[rows, frames]: what transformers looks for the path in."""
    whole = torch.from_numpy(weights)
    std, mean = torch.std_mean(whole, dim=-2, keepdim=True, unbiased=False)
    return np.asarray(_median_filter((whole - mean) / std, width).mean(dim=0).numpy(), np.float64)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("num_tokens", "num_frames"), [(1, 20), (7, 60), (30, 250), (12, 5), (20, 12)])
@pytest.mark.parametrize("width", [1, 7])
def test_times_are_those_of_transformers(num_tokens: int, num_frames: int, seed: int, width: int) -> None:
    num_input_ids = 3  # transformers leaves their rows out of everything
    weights = attention(num_input_ids + num_tokens + 1, num_frames, seed=seed)
    theirs = library_times(weights, num_frames, num_input_ids, width)
    times = token_times(weights[:, num_input_ids:], num_frames, median_width=width)
    ours = np.array([*(start for start, _ in times), times[-1][1]])
    if width == 1 and num_tokens > 1:
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
        return
    # Filtered neighbours are often equal, as is how far two rows are from their mean, and so are paths then; which one
    # transformers takes is up to its rounding.
    costs = -library_salience(weights[:, num_input_ids:], width)
    our_cost, their_cost = (path_cost(costs, np.rint(path / FRAME_S).astype(int)) for path in (ours, theirs))
    assert abs(our_cost - their_cost) < 1e-3
    assert np.abs(ours - theirs).max() < 0.05


def test_tokens_are_found_where_they_were_heard() -> None:
    num_tokens, num_frames = 20, 400
    weights = attention(num_tokens + 1, num_frames, sharpness=10)
    times = token_times(weights, num_frames)
    heard = weights.mean(axis=0).argmax(axis=1) * FRAME_S
    for (start_s, end_s), at_s in zip(times, heard[:-1], strict=True):
        assert start_s - 0.1 <= at_s <= end_s + 0.1


def test_each_token_ends_where_the_next_begins() -> None:
    times = token_times(attention(30, 300), 300)
    assert all(end == start for (_, end), (start, _) in pairwise(times))
    assert times[0][0] == 0 and times[-1][1] <= 300 * FRAME_S


def test_padding_is_neither_heard_nor_counted() -> None:
    weights = attention(12, 200)
    padded = np.concatenate([weights * np.float32(0.3), np.full((4, 12, 1300), 0.7 / 1300, np.float32)], axis=2)
    assert token_times(padded, 200) == token_times(weights, 200)


def test_rows_before_and_after_the_text_count_in_what_is_usual_only() -> None:
    weights = attention(20, 200)
    times = token_times(weights, 200, first_row=4, num_tokens=10)
    assert len(times) == 10 and times[0][0] == 0
    standardised = (weights - weights.mean(axis=1, keepdims=True)) / weights.std(axis=1, keepdims=True)
    filtered = _median_filter(torch.from_numpy(standardised), 7).numpy().mean(axis=0)[4:15]
    entries = path_entries(-filtered.astype(np.float64)) * FRAME_S
    np.testing.assert_allclose([start for start, _ in times], entries[:-1])


def test_frames_that_all_tokens_hear_alike_do_no_harm() -> None:
    weights = attention(10, 100)
    weights[:, :, 40:60] = 0
    weights[:, :, 70] = 0.01
    assert np.isnan(library_salience(weights, 7)).any()
    times = token_times(weights, 100)
    np.testing.assert_allclose(times, token_times(attention(10, 100), 100), atol=0.5)
    uniform = token_times(np.full((2, 5, 50), 0.02, np.float32), 50)
    assert np.isfinite(uniform).all()
    silent = token_times(np.zeros((2, 5, 50), np.float32), 50)
    assert silent == uniform


def test_no_tokens_have_no_times() -> None:
    assert token_times(attention(1, 50), 50) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "num_frames is 0; it must be 1 to 50"),
        ({"num_frames": 51}, "num_frames is 51"),
        ({"num_frames": 50, "first_row": 10}, "rows 10 to 9 are wanted; there are 10"),
        ({"num_frames": 50, "num_tokens": 10}, "rows 0 to 10 are wanted; there are 10"),
        ({"num_frames": 50, "first_row": -1}, "rows -1"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_times(attention(10, 50), **options)


def test_attention_that_is_no_number_is_refused() -> None:
    weights = attention(10, 50)
    weights[1, 2, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        token_times(weights, 50)


def test_the_longest_text_takes_a_fraction_of_a_second() -> None:
    weights = attention(448, 1500, heads=6)
    path_entries(np.zeros((2, 2)))
    start = time.process_time()
    token_times(weights, 1500)
    assert time.process_time() - start < 1  # 0.06 s on an idle core
