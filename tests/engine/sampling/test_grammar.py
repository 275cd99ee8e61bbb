"""Grammars in the sampler: what they forbid is never chosen, their ends are kept, their neighbours never notice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from engine.errors import InvalidValue, NonFiniteLogits
from engine.sampling.grammar import GrammarMasks
from engine.sampling.sampler import Sampler
from engine.sequence import SamplingParams, Sequence

VOCAB = 300
EOS = 299


@dataclass
class Scripted:
    """A grammar whose allowed tokens are written down step by step; empty at the end of the script."""

    steps: list[Iterable[int]]
    ends: frozenset[int] = frozenset({EOS})

    def start(self) -> ScriptedState:
        return ScriptedState(self)


@dataclass
class ScriptedState:
    grammar: Scripted
    taken: list[int] = field(default_factory=list)

    @property
    def end_token_ids(self) -> frozenset[int]:
        return self.grammar.ends

    def fill(self, bits: npt.NDArray[np.uint8]) -> str | None:
        if len(self.taken) >= len(self.grammar.steps):
            return "the script is over"
        for token_id in self.grammar.steps[len(self.taken)]:
            bits[token_id // 8] |= 1 << token_id % 8
        return None

    def accept(self, token_id: int) -> bool:
        self.taken.append(token_id)
        return len(self.taken) == len(self.grammar.steps)


def sequence(
    number: int, steps: list[Iterable[int]] | None, output: list[int] | None = None, **params: Any
) -> Sequence:
    grammar = None if steps is None else Scripted(steps)
    made = Sequence(number, [1, 2], SamplingParams(max_tokens=9, grammar=grammar, **params), arrival_time_s=0.0)
    for token_id in output or ():
        made.output_token_ids.append(token_id)
        if made.grammar is not None:
            made.grammar.accept(token_id)
    return made


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def sampler() -> Sampler:
    return Sampler(VOCAB, [EOS], "cpu")


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 1.5}, {"temperature": 1.0, "top_k": 50}])
def test_only_what_the_grammar_allows_is_chosen(params: dict[str, Any]) -> None:
    chosen = set()
    for seed in range(60):
        allowed = [3, 7, 8, 255, 256, 298]
        rows = [sequence(0, [allowed], seed=seed, **params), sequence(1, [[seed]], **params)]
        first, second = sampler().sample(logits(2, seed), rows).token_ids
        assert first in allowed and second == seed
        chosen.add(first)
    assert len(chosen) > 3


def test_rows_without_a_grammar_keep_every_bit() -> None:
    x = torch.full((3, 384), float("-inf"))
    x[:, :VOCAB] = logits(3)
    before = x.clone()
    GrammarMasks().apply(x, [(1, sequence(1, [[4, 5]]))])
    assert torch.equal(x[[0, 2]], before[[0, 2]])
    assert torch.isfinite(x[1]).nonzero().flatten().tolist() == [4, 5]
    assert torch.equal(x[1, 4:6], before[1, 4:6])


def test_neighbours_choose_what_they_choose_alone() -> None:
    rows = [sequence(n, [range(n, 300, 7)] if n % 2 else None, seed=n) for n in range(6)]
    x = logits(6)
    together = sampler().sample(x, rows).token_ids
    assert together == [sampler().sample(x[n : n + 1], rows[n : n + 1]).token_ids[0] for n in range(6)]


def test_log_probabilities_are_the_models_own() -> None:
    x = logits(1)
    result = sampler().sample(x, [sequence(0, [[5]], num_logprobs=2)])
    entry = result.logprobs[0]
    assert entry is not None and result.token_ids == [5]
    assert entry.logprob == pytest.approx(x.log_softmax(-1)[0, 5].item(), abs=1e-4)
    assert entry.top[0][0] == int(x.argmax())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [5, 6])
def test_a_broken_row_fails_though_the_grammar_forbids_what_is_broken(wrong: float, place: int) -> None:
    x = logits(2)
    x[0, place] = wrong
    result = sampler().sample(x, [sequence(0, [[5]]), sequence(1, [[9]])])
    assert isinstance(result.errors[0], NonFiniteLogits)
    assert result.errors[1] is None and result.token_ids[1] == 9


def test_a_grammar_that_cannot_go_on_fails_its_row_only() -> None:
    result = sampler().sample(logits(2), [sequence(0, [[5]], [5]), sequence(1, [[9]])])
    error = result.errors[0]
    assert isinstance(error, InvalidValue)
    assert error.message == "the grammar cannot be followed any further at output token 1: the script is over"
    assert result.errors[1] is None and result.token_ids[1] == 9


@pytest.mark.parametrize(
    ("params", "allowed", "expected"),
    [
        ({"min_tokens": 1}, [5, EOS], 5),
        ({"min_tokens": 1}, [EOS], EOS),  # nothing else is left
        ({"min_tokens": 1, "stop_token_ids": frozenset({6})}, [5, 6, EOS], 5),
        ({"ignore_eos": True}, [5, EOS], 5),
        ({"ignore_eos": True}, [EOS], EOS),
        ({"ignore_eos": True, "stop_token_ids": frozenset({EOS})}, [5, EOS], EOS),
        ({}, [5, EOS], EOS),
    ],
)
def test_the_end_waits_while_something_else_may_follow(
    params: dict[str, Any], allowed: list[int], expected: int
) -> None:
    x = logits(1)
    x[0, EOS], x[0, 6] = 50.0, 40.0
    assert sampler().sample(x, [sequence(0, [allowed], temperature=0.0, **params)]).token_ids == [expected]


def test_bias_and_penalties_choose_among_what_is_allowed() -> None:
    x = torch.zeros(1, VOCAB)
    rows = [sequence(0, [[5, 6]], temperature=0.0, logit_bias=((6, 1.0), (7, 100.0)))]
    assert sampler().sample(x, rows).token_ids == [6]
    rows = [sequence(0, [[5], [5, 6]], [5], temperature=0.0, frequency_penalty=1.0)]
    assert sampler().sample(x, rows).token_ids == [6]
