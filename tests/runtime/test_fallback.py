"""When a try stands, and what the next one is."""

from __future__ import annotations

import zlib

import pytest

from runtime.fallback import LADDER, Confidence, compression_ratio, mean, seed_of_try, temperatures


@pytest.mark.parametrize(
    ("avg_logprob", "ratio", "no_speech", "verdict"),
    [
        (-0.5, 1.5, 0.1, "good"),
        (-1.0, 2.4, 0.6, "good"),  # the bounds themselves are allowed
        (-1.1, 1.5, 0.1, "doubtful"),
        (-0.5, 2.5, 0.1, "doubtful"),
        (-1.1, 1.5, 0.7, "silent"),
        (-1.1, 9.0, 0.7, "silent"),
        (-0.5, 1.5, 0.9, "good"),
        (-0.5, 2.5, 0.9, "doubtful"),
    ],
)
def test_verdicts(avg_logprob: float, ratio: float, no_speech: float, verdict: str) -> None:
    assert Confidence(avg_logprob, ratio, no_speech).verdict == verdict


def test_the_ladder_is_climbed_only_from_zero() -> None:
    assert temperatures(0.0) == LADDER == (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    assert temperatures(0.4) == (0.4,)


def test_compression_is_that_of_the_texts_bytes() -> None:
    text = " Grüße " * 40
    data = text.strip().encode()
    assert compression_ratio(text) == len(data) / len(zlib.compress(data)) > 2.4
    assert compression_ratio(" A sentence that says each thing once.") < 1.2
    assert compression_ratio("  ") == 0.0


def test_means() -> None:
    assert mean([-1.0, -2.0]) == -1.5
    assert mean([]) == 0.0


def test_seeds_are_repeatable_distinct_and_fit_64_bits() -> None:
    seeds = [
        seed_of_try(seed, window, number) for seed in (0, 1, 2**63 - 1) for window in range(20) for number in range(6)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of_try(7, 1, 11) == seed_of_try(7, 1, 11) != seed_of_try(7, 11, 1)
