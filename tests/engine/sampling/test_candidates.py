"""The best tokens are those of a full sort by (logit, lower id first), whatever the ties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling.candidates import best_tokens, block_maxima, rank_tokens, top_tokens
from engine.sampling.draw import BLOCK


def padded(values: torch.Tensor) -> torch.Tensor:
    width = -(-values.shape[1] // BLOCK) * BLOCK
    out = torch.full((values.shape[0], width), -math.inf)
    out[:, : values.shape[1]] = values
    return out


def ranking(row: torch.Tensor) -> list[int]:
    values = row.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab_size=st.integers(1, 6 * BLOCK),
    levels=st.sampled_from([1, 2, 5, 40, 100_000]),
    count=st.integers(1, 5 * BLOCK),
)
def test_top_tokens_are_the_head_of_a_full_sort(seed: int, vocab_size: int, levels: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, levels, (3, vocab_size), generator=generator).float() - levels / 2
    logits[1, ::3] = -math.inf
    count = min(count, vocab_size)
    x = padded(logits)
    values, token_ids = top_tokens(x, block_maxima(x), torch.tensor([2, 0, 1]), count)
    for position, row in enumerate([2, 0, 1]):
        expected = ranking(logits[row])[:count]
        assert token_ids[position].tolist() == expected
        assert values[position].tolist() == logits[row][expected].tolist()
        assert rank_tokens(logits[row], count).tolist() == expected
    best_values, best_ids = best_tokens(x, block_maxima(x))
    assert best_ids.tolist() == [ranking(row)[0] for row in logits]
    assert best_values.tolist() == logits.amax(-1).tolist()


def test_minus_zero_equals_zero() -> None:
    logits = torch.tensor([[-0.0, 0.0, -1.0, -0.0]])
    x = padded(logits)
    assert top_tokens(x, block_maxima(x), torch.tensor([0]), 4)[1].tolist() == [[0, 1, 3, 2]]
    assert rank_tokens(logits[0], 4).tolist() == [0, 1, 3, 2]


@pytest.mark.parametrize("where", [0, BLOCK - 1, BLOCK + 5])
def test_a_nan_is_reported_as_the_best_value(where: int) -> None:
    logits = torch.zeros(2, 2 * BLOCK)
    logits[1, where] = math.nan
    values, token_ids = best_tokens(logits, block_maxima(logits))
    assert values[0] == 0 and math.isnan(values[1].item())
    assert bool((token_ids < 2 * BLOCK).all())
