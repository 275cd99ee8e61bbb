"""Drift: nothing between equals, and what it is between others; one text through every family."""

from __future__ import annotations

import math

import pytest
import torch

from engine.model.drift import measure_drift, trial_logits
from tests import zoo, zoo_seq2seq
from tests.engine.harness import tiny_model


def test_equal_logits_have_not_drifted() -> None:
    logits = torch.randn(5, 7)
    drift = measure_drift(logits, logits.clone())
    assert (drift.num_positions, drift.mean_kl, drift.top1_agreement, drift.max_abs) == (5, 0.0, 1.0, 0.0)


def test_drift_is_what_the_textbook_says() -> None:
    expected = torch.tensor([[0.0, math.log(3.0)], [2.0, 0.0]])
    got = torch.tensor([[0.0, 0.0], [2.0, 0.5]])
    drift = measure_drift(expected, got)
    first = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    p, q = (math.exp(2) / (math.exp(2) + math.exp(x)) for x in (0.0, 0.5))
    second = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert drift.mean_kl == pytest.approx((first + second) / 2, rel=1e-5)
    assert drift.top1_agreement == 0.5  # the first row is a tie, which the first token wins
    assert drift.max_abs == pytest.approx(math.log(3.0))
    assert "50.0%" in str(drift) and "2 tokens" in str(drift)


def test_a_decoder_reads_the_text() -> None:
    model = tiny_model("llama")
    ids = zoo.prompt(9)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    assert torch.equal(trial_logits(model, ids), expected)


def test_an_encoder_decoder_reads_it_and_writes_it() -> None:
    model = zoo_seq2seq.make("t5")
    ids = zoo.prompt(9)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(trial_logits(model, ids), expected)


def test_who_hears_gets_a_noise_that_is_always_the_same() -> None:
    model = zoo_seq2seq.make_whisper()
    first, second = (trial_logits(model, zoo.prompt(9)) for _ in range(2))
    assert first.shape[0] == 9 and torch.equal(first, second)
