"""A probe's probabilities are the softmax of the raw logits, and a broken row is told as such."""

from __future__ import annotations

import math

import pytest
import torch

from engine.sampling.probe import probabilities


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_are_those_of_a_float32_softmax(dtype: torch.dtype) -> None:
    logits = (torch.randn(5, 700, generator=torch.Generator().manual_seed(1)) * 4).to(dtype)
    before = logits.clone()
    told = probabilities(logits, [4, 0, 4], [(3, 699), (), (0,)])
    softmax = logits.float().softmax(-1)
    assert [len(row or ()) for row in told] == [2, 0, 1]
    assert told[0] == pytest.approx((softmax[4, 3].item(), softmax[4, 699].item()))
    assert told[2] == pytest.approx((softmax[4, 0].item(),))
    assert torch.equal(logits, before)


def test_a_row_is_told_the_same_bits_whatever_else_is_asked() -> None:
    logits = torch.randn(9, 51_865, generator=torch.Generator().manual_seed(2))
    ids = [tuple(range(row, 51_865, 500)) for row in range(9)]
    together = probabilities(logits, range(9), ids)
    assert together == [probabilities(logits, [row], [ids[row]])[0] for row in range(9)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_none_and_its_neighbours_are_told(bad: float) -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = bad
    assert probabilities(logits, [0, 1, 2], [(0,), (0,), (3,)]) == [(0.25,), None, (0.25,)]
    logits[1] = -math.inf
    assert probabilities(logits, [1], [(0,)]) == [None]


def test_impossible_tokens_have_no_probability() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0]])
    assert probabilities(logits, [0], [(0, 1)]) == [(0.5, 0.0)]


def test_nothing_asked_is_nothing_told() -> None:
    assert probabilities(torch.zeros(3, 4), [], []) == []
