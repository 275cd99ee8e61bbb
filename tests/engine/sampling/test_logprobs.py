"""Logprobs are those of the model itself: no temperature, filter, bias or penalty shows in them."""

from __future__ import annotations

import math

import pytest
import torch

from engine.errors import NonFiniteLogits
from engine.sampling.sampler import Sampler
from engine.sequence import SamplingParams, Sequence, TokenLogprobs


def sequence(sequence_id: int, params: SamplingParams) -> Sequence:
    return Sequence(sequence_id, [1, 2], params, 0.0, output_token_ids=[3, 3])


def random_logits(rows: int, vocab_size: int) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(5)) * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_the_log_softmax_of_the_raw_logits(dtype: torch.dtype) -> None:
    logits = random_logits(5, 1000).to(dtype)
    rows = [
        sequence(0, SamplingParams(100, temperature=0.0, num_logprobs=0)),
        sequence(1, SamplingParams(100, temperature=0.0)),
        sequence(2, SamplingParams(100, temperature=1.9, top_k=30, num_logprobs=20, seed=3)),
        sequence(3, SamplingParams(100, logit_bias=((77, 100.0),), num_logprobs=3)),
        sequence(4, SamplingParams(100, repetition_penalty=2.0, presence_penalty=2.0, min_tokens=9, num_logprobs=5)),
    ]
    sampled = Sampler(1000, {0}, "cpu").sample(logits, rows)
    expected = torch.log_softmax(logits.double(), -1)
    assert sampled.logprobs[1] is None
    assert sampled.token_ids[3] == 77
    for i, num_top in ((0, 0), (2, 20), (3, 3), (4, 5)):
        entry = sampled.logprobs[i]
        assert entry is not None
        assert entry.logprob == pytest.approx(expected[i, sampled.token_ids[i]].item(), abs=1e-5)
        assert len(entry.top) == num_top
        ranked = sorted(range(1000), key=lambda j: (-logits[i, j].item(), j))[:num_top]
        assert [token_id for token_id, _ in entry.top] == ranked
        for token_id, logprob in entry.top:
            assert logprob == pytest.approx(expected[i, token_id].item(), abs=1e-5)


def test_a_greedy_token_leads_its_alternatives_even_when_tied() -> None:
    logits = torch.zeros(1, 500, dtype=torch.bfloat16)
    sampled = Sampler(500, {0}, "cpu").sample(logits, [sequence(0, SamplingParams(9, temperature=0.0, num_logprobs=2))])
    entry = sampled.logprobs[0]
    assert entry is not None
    assert sampled.token_ids == [0]
    assert entry.logprob == pytest.approx(-math.log(500), abs=1e-6)
    assert [token_id for token_id, _ in entry.top] == [0, 1]


def test_minus_infinity_becomes_the_floor() -> None:
    logits = torch.full((1, 6), -math.inf)
    logits[0, 4] = 1.0
    sampled = Sampler(6, {0}, "cpu").sample(logits, [sequence(0, SamplingParams(9, num_logprobs=20))])
    assert sampled.logprobs[0] == TokenLogprobs(0.0, ((4, 0.0), *((i, -9999.0) for i in (0, 1, 2, 3, 5))))


def test_very_unlikely_tokens_keep_their_logprob() -> None:
    logits = torch.zeros(1, 200)
    logits[0, 9] = 400.0
    sampled = Sampler(200, {0}, "cpu").sample(
        logits, [sequence(0, SamplingParams(9, temperature=0.0, logit_bias=((9, -100.0), (8, 100.0)), num_logprobs=0))]
    )
    assert sampled.token_ids == [9]
    entries = Sampler(200, {0}, "cpu").prompt_logprobs(logits, [8], 1)
    assert entries == [TokenLogprobs(-400.0, ((9, 0.0),))]


def test_prompt_logprobs_are_the_log_softmax_in_chunks_of_any_size() -> None:
    logits = random_logits(11, 700).bfloat16()
    next_ids = [(i * 61) % 700 for i in range(11)]
    sampler = Sampler(700, {0}, "cpu")
    whole = sampler.prompt_logprobs(logits, next_ids, 4)
    sampler._max_chunk = 3
    sampler.release_memory()
    assert sampler.prompt_logprobs(logits, next_ids, 4) == whole
    expected = torch.log_softmax(logits.double(), -1)
    for i, entry in enumerate(whole):
        assert entry.logprob == pytest.approx(expected[i, next_ids[i]].item(), abs=1e-5)
        assert [round(p, 4) for _, p in entry.top] == [round(p, 4) for p in expected[i].topk(4).values.tolist()]
    assert all(entry.top == () for entry in sampler.prompt_logprobs(logits, next_ids, 0))


def test_prompt_logprobs_of_broken_logits_raise() -> None:
    logits = random_logits(3, 700)
    logits[1, 5] = math.nan
    with pytest.raises(NonFiniteLogits):
        Sampler(700, {0}, "cpu").prompt_logprobs(logits, [1, 2, 3], 0)
