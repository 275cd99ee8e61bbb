"""The sampler agrees with its plain twin, and no row is touched by its neighbours."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import RepetitionPenaltyLogitsProcessor

from engine.errors import InvalidValue, NonFiniteLogits, StepFailed
from engine.sampling.sampler import Sampler
from engine.sequence import SamplingParams, Sequence
from tests.engine.sampling import reference

EOS = frozenset({2, 3})


def sequence(
    sequence_id: int = 0, *, prompt: list[int] | None = None, output: list[int] | None = None, **params: Any
) -> Sequence:
    return Sequence(
        sequence_id,
        prompt if prompt is not None else [1, 5, 9],
        SamplingParams(max_tokens=100, **params),
        0.0,
        output_token_ids=output if output is not None else [],
    )


def random_logits(rows: int, vocab_size: int, seed: int = 0, std: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * std


def tokens(logits: Tensor, rows: list[Sequence], sampler: Sampler | None = None) -> list[int]:
    sampled = (sampler or Sampler(logits.shape[1], EOS, "cpu")).sample(logits, rows)
    assert sampled.errors == [None] * len(rows)
    return sampled.token_ids


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.2},
    "top_k": {"top_k": 7},
    "wide top_k": {"top_k": 300, "temperature": 2.0},
    "top_k then top_p": {"top_k": 12, "top_p": 0.81},
    "wide top_k then top_p": {"top_k": 150, "top_p": 0.8137, "temperature": 3.0},
    "very wide top_k then top_p": {"top_k": 4500, "top_p": 0.9137, "temperature": 30.0},
    "top_p": {"top_p": 0.8537},
    "wide top_p": {"top_p": 0.9537, "temperature": 4.0},
    "very wide top_p": {"top_p": 0.9537, "temperature": 50.0},
    "min_p": {"min_p": 0.0512},
    "wide min_p": {"min_p": 0.0123, "temperature": 5.0},
    "all filters": {"top_k": 40, "top_p": 0.9137, "min_p": 0.0213, "temperature": 0.8},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.7, "presence_penalty": 0.4},
    "bias": {"logit_bias": ((4, 6.0), (11, -100.0)), "top_p": 0.9137},
    "min_tokens": {"min_tokens": 50, "stop_token_ids": frozenset({7})},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [40, 700, 5000])
def test_every_kind_of_row_agrees_with_the_plain_twin(kind: str, vocab_size: int) -> None:
    params = dict(KINDS[kind])
    if params.get("top_k", 0) > vocab_size:
        params["top_k"] = vocab_size - 3
    rows = []
    for i in range(12):
        prompt, output = [(i * 3 + j) % vocab_size for j in range(9)], [(i * j) % vocab_size for j in range(i)]
        rows.append(sequence(i, prompt=prompt, output=output, seed=i, **params))
    logits = random_logits(12, vocab_size)
    near = 0
    for i, token_id in enumerate(tokens(logits, rows)):
        expected = reference.sample(logits[i], rows[i], EOS)
        near += expected.margin < 1e-6
        assert token_id == expected.token_id or expected.margin < 1e-6
    assert near <= 2


@st.composite
def params_strategy(draw: st.DrawFn) -> dict[str, Any]:
    fields: dict[str, st.SearchStrategy[Any]] = {
        "temperature": st.sampled_from([0.0, 0.31, 1.0, 2.3]),
        "top_k": st.sampled_from([0, 1, 2, 5, 64, 65, 120]),
        "top_p": st.sampled_from([1.0, 0.0137, 0.5137, 0.9137, 0.9937]),
        "min_p": st.sampled_from([0.0, 0.0137, 0.3137, 1.0]),
        "frequency_penalty": st.sampled_from([0.0, -1.5, 0.7]),
        "presence_penalty": st.sampled_from([0.0, -0.5, 2.0]),
        "repetition_penalty": st.sampled_from([1.0, 0.7, 1.4]),
        "logit_bias": st.sampled_from([(), ((2, 4.0),), ((0, -100.0), (6, 2.5))]),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "min_tokens": st.sampled_from([0, 3]),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.sampled_from([frozenset(), frozenset({5})]),
    }
    return {name: draw(strategy) for name, strategy in fields.items()}


@settings(max_examples=60, deadline=None)
@given(
    params=st.lists(params_strategy(), min_size=1, max_size=5),
    output=st.lists(st.integers(0, 149), max_size=8),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_mixture_of_parameters_agrees_with_the_plain_twin(
    params: list[dict[str, Any]], output: list[int], seed: int, dtype: torch.dtype
) -> None:
    rows = [sequence(i, output=list(output), **p) for i, p in enumerate(params)]
    logits = random_logits(len(rows), 150, seed).to(dtype)
    for i, token_id in enumerate(tokens(logits, rows)):
        expected = reference.sample(logits[i], rows[i], EOS)
        # bfloat16 logits tie; a top_p that ends exactly between equal tokens may round either way.
        assert token_id == expected.token_id or expected.margin < 1e-6


def test_a_seeded_row_is_the_same_alone_among_any_neighbours_and_after_a_restart() -> None:
    vocab_size = 5003
    names = list(KINDS)
    logits = random_logits(len(names), vocab_size, 7)
    rows = [sequence(i, output=[i, 8], seed=1000 + i, num_logprobs=2, **KINDS[name]) for i, name in enumerate(names)]
    together = Sampler(vocab_size, EOS, "cpu").sample(logits, rows)
    backwards = Sampler(vocab_size, EOS, "cpu").sample(logits.flip(0), rows[::-1])
    assert backwards.token_ids[::-1] == together.token_ids
    assert backwards.logprobs[::-1] == together.logprobs
    reused = Sampler(vocab_size, EOS, "cpu")
    for i, row in enumerate(rows):
        for sampler in (reused, Sampler(vocab_size, EOS, "cpu")):
            alone = sampler.sample(logits[i : i + 1], [row])
            assert alone.token_ids == [together.token_ids[i]], names[i]
            assert alone.logprobs == [together.logprobs[i]], names[i]


def test_a_batch_larger_than_the_workspace_is_sampled_in_chunks() -> None:
    logits = random_logits(23, 500)
    rows = [sequence(i, seed=i, top_p=0.9) for i in range(23)]
    sampler = Sampler(500, EOS, "cpu")
    expected = tokens(logits, rows, sampler)
    sampler._max_chunk = 4
    sampler.release_memory()
    assert tokens(logits, rows, sampler) == expected


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the name of every operator that runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_plain_greedy_rows_cost_an_argmax_and_a_finite_check() -> None:
    sampler = Sampler(5000, EOS, "cpu")
    logits = random_logits(16, 5000).bfloat16()
    rows = [sequence(i, temperature=0.0) for i in range(16)]
    tokens(logits, rows, sampler)
    with _Recorder() as recorder:
        assert tokens(logits, rows, sampler) == logits.float().argmax(-1).tolist()
    assert not {"_softmax", "topk", "sort", "exp", "cumsum", "nonzero", "_local_scalar_dense"} & set(recorder.names)
    assert recorder.names.count("amax") == 1


def test_equal_logits_go_to_the_first_token() -> None:
    logits = torch.zeros(2, 300, dtype=torch.bfloat16)
    logits[1, [17, 200]] = 2.0
    assert tokens(logits, [sequence(0, temperature=0.0), sequence(1, temperature=1.0, top_k=1)]) == [0, 17]


def test_the_caller_keeps_its_logits() -> None:
    logits = random_logits(2, 300)
    before = logits.clone()
    tokens(logits, [sequence(0, repetition_penalty=2.0, temperature=0.5), sequence(1, logit_bias=((1, 5.0),))])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_finite_fails_alone(bad: float, kind: str) -> None:
    logits = random_logits(4, 400)
    rows = [sequence(i, seed=i, num_logprobs=3, **KINDS[kind]) for i in range(4)]
    expected = Sampler(400, EOS, "cpu").sample(logits, rows)
    broken = logits.clone()
    broken[1, 333] = bad
    broken[2, :] = -math.inf
    sampled = Sampler(400, EOS, "cpu").sample(broken, rows)
    assert [type(e) for e in sampled.errors] == [type(None), NonFiniteLogits, NonFiniteLogits, type(None)]
    for i in (0, 3):
        assert sampled.token_ids[i] == expected.token_ids[i]
        assert sampled.logprobs[i] == expected.logprobs[i]
    assert sampled.logprobs[1] is None and sampled.logprobs[2] is None


def test_a_row_left_with_nothing_to_choose_fails_alone() -> None:
    rows = [sequence(0, min_tokens=5, stop_token_ids=frozenset({0, 1})), sequence(1)]
    sampled = Sampler(4, EOS, "cpu").sample(torch.zeros(2, 4), rows)
    assert isinstance(sampled.errors[0], NonFiniteLogits) and sampled.errors[1] is None


def test_a_row_that_raises_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    logits = random_logits(4, 400)
    rows = [sequence(i, seed=i) for i in range(4)]
    expected = tokens(logits, rows)
    rows[1] = replace(rows[1], params=replace(rows[1].params, logit_bias=((400, 1.0),)))
    rows[2] = replace(rows[2], params=replace(rows[2].params, logit_bias=((0, "much"),)))  # type: ignore[arg-type]
    sampled = Sampler(400, EOS, "cpu").sample(logits, rows)
    assert isinstance(sampled.errors[1], InvalidValue) and sampled.errors[1].param == "logit_bias"
    assert isinstance(sampled.errors[2], StepFailed)
    assert "sequence 2" in caplog.text
    assert [sampled.token_ids[0], sampled.token_ids[3]] == [expected[0], expected[3]]
    assert sampled.errors[0] is None and sampled.errors[3] is None


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1, 400\]"):
        Sampler(400, EOS, "cpu").sample(torch.zeros(1, 401), [sequence()])


def test_no_rows_give_no_tokens() -> None:
    assert Sampler(400, EOS, "cpu").sample(torch.zeros(0, 400), []).token_ids == []


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits = random_logits(1, 300)
    row = sequence(prompt=[4, 4, 9, 250], output=[9, 17, 17], repetition_penalty=1.37, temperature=0.0)
    history = torch.tensor([row.prompt_token_ids + row.output_token_ids])
    expected = RepetitionPenaltyLogitsProcessor(1.37)(history, logits.clone())
    assert reference.processed(logits[0], row, EOS) == expected[0].tolist()
    for boosted in (4, 9, 17, 250, 100):
        nearly = logits.clone()
        nearly[0, boosted] = logits.max() + 1e-3
        penalised = RepetitionPenaltyLogitsProcessor(1.37)(history, nearly.clone())
        assert tokens(nearly, [row]) == penalised.argmax(-1).tolist()


def test_what_penalties_have_seen_is_kept_and_forgotten() -> None:
    sampler = Sampler(300, EOS, "cpu")
    row = sequence(
        5, prompt=[1, 2, 299, 1], repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.1, seed=9
    )
    other = sequence(6, temperature=0.0)
    for step in range(150):
        logits = random_logits(2, 300, step)
        kept = tokens(logits, [row, other], sampler)
        assert kept == tokens(logits, [row, other])
        row.output_token_ids.append(kept[0])
    assert sampler.num_tracked == 1
    sampler.forget(5)
    sampler.forget(5)
    assert sampler.num_tracked == 0
    logits = random_logits(2, 300, 999)
    assert tokens(logits, [row, other], sampler) == tokens(logits, [row, other])


def test_frequency_and_presence_look_at_output_alone() -> None:
    logits = torch.zeros(1, 300)
    logits[0, 7], logits[0, 8] = 1.0, 0.9
    assert tokens(logits, [sequence(prompt=[7], temperature=0.0, frequency_penalty=1.0, presence_penalty=1.0)]) == [7]
    assert tokens(logits, [sequence(prompt=[7], output=[7], temperature=0.0, presence_penalty=0.2)]) == [8]


@pytest.mark.parametrize(("ignore_eos", "expected"), [(False, 20), (True, 3)])
def test_min_tokens_forbids_what_would_end_the_sequence(ignore_eos: bool, expected: int) -> None:
    logits = torch.zeros(1, 300)
    logits[0, 3], logits[0, 7], logits[0, 20] = 3.0, 2.0, 1.0
    params: dict[str, Any] = {"temperature": 0.0, "min_tokens": 2, "ignore_eos": ignore_eos}
    assert tokens(logits, [sequence(output=[1], stop_token_ids=frozenset({7, 10**6}), **params)]) == [expected]
    assert tokens(logits, [sequence(output=[1, 1], stop_token_ids=frozenset({7}), **params)]) == [3]
