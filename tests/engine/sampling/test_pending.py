"""A launch reads nothing from the device, and what it collects to is what sampling at once gives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.errors import InvalidValue, NonFiniteLogits
from engine.sampling import filters, sampler
from engine.sampling.sampler import Sampler
from engine.sequence import Sequence, TimestampRules, TokenRules
from tests.engine.sampling.test_sampler import EOS, KINDS, params_strategy, random_logits, sequence

RULES = TokenRules((3, 4), (5,), timestamps=TimestampRules(160, 150, 159, 8))


def _samplers(vocab_size: int) -> tuple[Sampler, Sampler]:
    """One that chooses at once, one that defers."""
    return Sampler(vocab_size, EOS, "cpu"), Sampler(vocab_size, EOS, "cpu", is_deferring=True)


@pytest.mark.parametrize("vocab_size", [40, 700, 5000])
def test_deferred_rows_get_the_tokens_and_logprobs_of_rows_chosen_at_once(vocab_size: int) -> None:
    rows = []
    for i in range(3 * len(KINDS)):
        kind = list(KINDS.values())[i % len(KINDS)]
        rows.append(sequence(i, output=[i % 40] * (i % 5), seed=i, num_logprobs=(None, 0, 3)[i // len(KINDS)], **kind))
    logits = random_logits(len(rows), vocab_size)
    logits[4, 7] = math.nan
    logits[-1] = -math.inf
    at_once, deferring = _samplers(vocab_size)
    expected = at_once.sample(logits, rows)
    pending = deferring.launch(logits, rows)
    logits.fill_(0.0)  # the next step may compute into the same memory
    told = pending.token_ids.tolist()
    got = pending.collect()
    assert (got.token_ids, got.logprobs) == (expected.token_ids, expected.logprobs)
    assert list(map(type, got.errors)) == list(map(type, expected.errors))
    assert {i for i, error in enumerate(got.errors) if error is not None} == {4, len(rows) - 1}
    assert bool(got.revised) == (vocab_size > filters.NUM_CANDIDATES_DEFERRED)
    assert all(0 <= token_id < vocab_size for token_id in told)
    assert [t for i, t in enumerate(told) if i not in got.revised] == [
        t for i, t in enumerate(got.token_ids) if i not in got.revised
    ]


@settings(max_examples=40, deadline=None)
@given(
    params=st.lists(params_strategy(), min_size=1, max_size=6),
    seed=st.integers(0, 10**6),
    num_candidates=st.sampled_from([1, 3, 40, 150]),
    max_chunk=st.integers(1, 7),
)
def test_any_mixture_deferred_is_the_mixture_chosen_at_once(
    params: list[dict[str, Any]], seed: int, num_candidates: int, max_chunk: int
) -> None:
    rows = [sequence(i, output=[i, 2], num_logprobs=i % 3, **p) for i, p in enumerate(params)]
    logits = random_logits(len(rows), 150, seed)
    at_once, deferring = _samplers(150)
    deferring._max_chunk = max_chunk
    with pytest.MonkeyPatch.context() as patch:
        for module in (filters, sampler):
            patch.setattr(module, "NUM_CANDIDATES_DEFERRED", num_candidates)
        got = deferring.sample(logits, rows)
    expected = at_once.sample(logits, rows)
    assert (got.token_ids, got.logprobs, got.errors) == (expected.token_ids, expected.logprobs, expected.errors)


def test_tokens_that_are_not_known_yet_count_for_the_position() -> None:
    logits = random_logits(4, 700)
    kinds: list[dict[str, Any]] = [
        {"seed": 5},
        {"seed": 5, "top_p": 0.9, "num_logprobs": 2},
        {"seed": 6, "top_k": 3},
        {},
    ]
    for mode in _samplers(700):
        for known in range(3):
            rows = [sequence(i, output=[8] * known, **kind) for i, kind in enumerate(kinds)]
            pending = mode.launch(logits, rows, num_unknown=2)
            for row in rows:
                row.output_token_ids.extend([9, 9])
            assert pending.collect() == mode.sample(logits, rows)


def test_a_row_that_raises_or_is_not_finite_fails_alone() -> None:
    logits = random_logits(5, 5000)
    rows = [sequence(i, seed=i, top_p=0.97, temperature=20.0, num_logprobs=1) for i in range(5)]
    at_once, deferring = _samplers(5000)
    expected = at_once.sample(logits, rows)
    rows[1] = sequence(1, logit_bias=((5000, 1.0),))
    logits[3, 4321] = math.inf
    got = deferring.sample(logits, rows)
    assert [type(e) for e in got.errors] == [type(None), InvalidValue, type(None), NonFiniteLogits, type(None)]
    for row in (0, 2, 4):
        assert (got.token_ids[row], got.logprobs[row]) == (expected.token_ids[row], expected.logprobs[row])
    assert got.revised == [0, 2, 4] and got.logprobs[1] is None and got.logprobs[3] is None


def test_a_launch_reads_nothing_from_the_device() -> None:
    # Fake tensors have no values: whatever would read one, or depend on one, raises.
    kinds = [*KINDS.values(), {"token_rules": RULES}, {"token_rules": TokenRules(allowed=(3, 9))}]
    rows: list[Sequence] = [sequence(i, output=[7], num_logprobs=2, **kind) for i, kind in enumerate(kinds)]
    with FakeTensorMode() as mode:
        logits = mode.from_tensor(torch.empty(len(rows), 5000))
        pending = _samplers(5000)[1].launch(logits, rows)
        assert [part.error for part in pending._parts] == [None]
        assert pending.token_ids.shape == (len(rows),)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            pending.collect()
        at_once = _samplers(5000)[0].launch(logits, rows)
        assert any(part.error is not None for part in at_once._parts)
