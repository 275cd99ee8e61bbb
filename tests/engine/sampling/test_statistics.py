"""Over 20,000 draws, what each filter leaves is drawn as often as the softmax says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.sampling.sampler import Sampler
from engine.sequence import SamplingParams, Sequence
from tests.engine.sampling import reference
from tests.engine.sampling.test_draw import chi_square_z

NUM_DRAWS = 20_000
NUM_ROWS = 500
EOS = frozenset({2})


@pytest.mark.parametrize(
    ("vocab_size", "params"),
    [
        pytest.param(50, {}, id="plain"),
        pytest.param(3000, {}, id="plain, large vocabulary"),
        pytest.param(50, {"temperature": 0.6}, id="cold"),
        pytest.param(50, {"temperature": 1.8}, id="hot"),
        pytest.param(300, {"top_k": 10}, id="top_k"),
        pytest.param(300, {"top_k": 100, "temperature": 2.0}, id="top_k beyond the candidates"),
        pytest.param(300, {"top_p": 0.8}, id="top_p"),
        pytest.param(300, {"top_p": 0.95, "temperature": 3.0}, id="top_p beyond the candidates"),
        pytest.param(300, {"min_p": 0.05}, id="min_p"),
        pytest.param(300, {"min_p": 0.02, "temperature": 4.0}, id="min_p beyond the candidates"),
        pytest.param(300, {"top_k": 30, "top_p": 0.9, "min_p": 0.01, "temperature": 1.3}, id="all filters"),
        pytest.param(
            50, {"repetition_penalty": 1.5, "frequency_penalty": 0.8, "presence_penalty": -0.4}, id="penalties"
        ),
        pytest.param(50, {"logit_bias": ((3, 2.0), (9, -100.0))}, id="bias"),
        pytest.param(50, {"min_tokens": 1000}, id="min_tokens"),
    ],
)
def test_frequencies_over_seeds_match_the_softmax(vocab_size: int, params: dict[str, Any]) -> None:
    def row(seed: int) -> Sequence:
        return Sequence(seed, [1, 7], SamplingParams(10**6, seed=seed, **params), 0.0, output_token_ids=[5, 6, 6])

    assert_frequencies_match(vocab_size, row)


@pytest.mark.parametrize("params", [{}, {"top_p": 0.8}], ids=["plain", "top_p"])
def test_frequencies_over_positions_match_the_softmax(params: dict[str, Any]) -> None:
    def row(position: int) -> Sequence:
        return Sequence(position, [1], SamplingParams(10**6, seed=-77, **params), 0.0, output_token_ids=[0] * position)

    assert_frequencies_match(50, row)


def assert_frequencies_match(vocab_size: int, row: Callable[[int], Sequence]) -> None:
    """Sample 20,000 rows that differ in their uniform alone, and compare with the plain twin's probabilities."""
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(11)) * 2.0
    batch = logits.expand(NUM_ROWS, -1)
    sampler = Sampler(vocab_size, EOS, "cpu")
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for start in range(0, NUM_DRAWS, NUM_ROWS):
        rows = [row(start + i) for i in range(NUM_ROWS)]
        counts += torch.bincount(torch.tensor(sampler.sample(batch, rows).token_ids), minlength=vocab_size)
        for sequence in rows:
            sampler.forget(sequence.sequence_id)
    probabilities = torch.zeros(vocab_size, dtype=torch.float64)
    for token_id, probability in reference.sample(logits[0], row(3), EOS).probabilities.items():
        probabilities[token_id] = probability
    support = probabilities > 0
    assert counts[~support].sum() == 0
    assert abs(chi_square_z(counts[support].double(), probabilities[support] * NUM_DRAWS)) < 4
