"""Token rules are those of transformers' Whisper, token by token; no row without them, and no neighbour, is touched."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

from engine.errors import InvalidValue, NonFiniteLogits
from engine.sampling.candidates import block_maxima
from engine.sampling.draw import BLOCK
from engine.sampling.rules import MAX_KEPT, RuleBook
from engine.sampling.sampler import Sampler
from engine.sequence import SamplingParams, Sequence, TimestampRules, TokenRules
from tests.engine.sampling import reference

NO_EOS: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Vocabulary:
    """Text, the end of text, other special tokens, <|notimestamps|>, timestamps."""

    end_of_text_id: int
    first_id: int
    size: int

    def rules(self, *, max_initial_index: int | None = 5, **fields: Any) -> TokenRules:
        """Whisper's: some text and special tokens never, two not at first, and timestamps."""
        end = self.end_of_text_id
        return TokenRules(
            **{
                "suppressed": (1, 2, 7, end // 2, end - 3, end + 1, end + 2, end + 2),
                "suppressed_first": (5, end),
                "timestamps": TimestampRules(self.first_id, end, self.first_id - 1, max_initial_index),
                **fields,
            }
        )


# The end of the text: within the first block of logits, at the beginning of one, within another; and Whisper's own.
TINY = Vocabulary(60, 66, 100)
EVEN = Vocabulary(2 * BLOCK, 2 * BLOCK + 4, 400)
ODD = Vocabulary(700, 712, 900)
WHISPER = Vocabulary(50257, 50364, 51865)
VOCABULARIES = [TINY, EVEN, ODD]


def sequence(rules: TokenRules | None, output: list[int] | None = None, number: int = 0, **params: Any) -> Sequence:
    params = {"temperature": 0.0, **params}
    return Sequence(
        number, [9, 8, 7], SamplingParams(448, token_rules=rules, **params), 0.0, output_token_ids=output or []
    )


def random_logits(vocabulary: Vocabulary, rows: int, seed: int, timestamps: float = 0.0) -> Tensor:
    logits = torch.randn(rows, vocabulary.size, generator=torch.Generator().manual_seed(seed)) * 3
    logits[:, vocabulary.first_id :] += timestamps
    return logits


def expected(logits: Tensor, row: Sequence) -> Tensor:
    """What generate()'s own processors, in generate()'s order, make of one row [V] of logits."""
    rules = row.params.token_rules
    assert rules is not None
    times = rules.timestamps
    config = SimpleNamespace(
        return_timestamps=times is not None,
        suppress_tokens=list(rules.suppressed) or None,
        begin_suppress_tokens=list(rules.suppressed_first) or None,
        no_speech_threshold=None,
    )
    if times is not None:
        config.no_timestamps_token_id = times.no_timestamps_id
        config.eos_token_id = times.end_of_text_id
        config.max_initial_timestamp_index = times.max_initial_index
    begin = len(row.prompt_token_ids)
    processors = WhisperGenerationMixin._retrieve_logit_processors(None, config, None, begin, 1, "cpu") or []
    scores = logits[None].float()
    if rules.allowed is not None:
        is_allowed = torch.zeros(logits.shape[0], dtype=torch.bool)
        is_allowed[list(rules.allowed)] = True
        scores = scores.masked_fill(~is_allowed, -math.inf)
    ids = torch.tensor([row.prompt_token_ids + row.output_token_ids])
    for processor in processors:
        scores = processor(ids, scores)
    return scores[0]


def padded(logits: Tensor) -> Tensor:
    width = -(-logits.shape[1] // BLOCK) * BLOCK
    return torch.nn.functional.pad(logits.float(), (0, width - logits.shape[1]), value=-math.inf)


def ruled(logits: Tensor, rows: list[Sequence]) -> Tensor:
    """What we make of them; the maxima that come with them must be those of the result."""
    x = padded(logits)
    maxima = RuleBook(logits.shape[1], x.shape[1], torch.device("cpu")).apply(x, rows)
    assert torch.equal(maxima, block_maxima(x))
    assert torch.all(x[:, logits.shape[1] :] == -math.inf)
    unread = padded(logits)
    RuleBook(logits.shape[1], x.shape[1], torch.device("cpu"), is_deferring=True).apply(unread, rows)
    torch.testing.assert_close(unread, x, rtol=0, atol=0, equal_nan=True)
    return x[:, : logits.shape[1]]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("max_initial_index", [None, 0, 5, 10**6])
@pytest.mark.parametrize("timestamps", [-4.0, 0.0, 3.0])
def test_a_transcript_is_ruled_token_by_token_as_generate_does(
    vocabulary: Vocabulary, max_initial_index: int | None, timestamps: float
) -> None:
    rules = vocabulary.rules(max_initial_index=max_initial_index)
    rows = [sequence(rules, [], number) for number in range(6)]
    generator = torch.Generator().manual_seed(3)
    kinds = set()
    for step in range(40):
        logits = random_logits(vocabulary, len(rows), step, timestamps)
        ours = ruled(logits, rows)
        theirs = torch.stack([expected(logits[i], row) for i, row in enumerate(rows)])
        assert torch.equal(ours, theirs)
        for row, probabilities in zip(rows, theirs.softmax(-1), strict=True):
            if not probabilities.isnan().any():  # timestamps have run out
                row.output_token_ids.append(int(probabilities.multinomial(1, generator=generator)))
                is_time = row.output_token_ids[-1] >= vocabulary.first_id
                kinds.add((is_time, bool((probabilities[: vocabulary.first_id] == 0).all())))
    assert kinds >= {(False, False), (True, True)}  # text was made, and timestamps where only they were left


@settings(max_examples=150, deadline=None)
@given(data=st.data(), vocabulary=st.sampled_from(VOCABULARIES), seed=st.integers(0, 10**6))
def test_any_history_and_any_rules_are_ruled_as_generate_does(
    data: st.DataObject, vocabulary: Vocabulary, seed: int
) -> None:
    text, times = st.integers(0, vocabulary.first_id - 1), st.integers(vocabulary.first_id, vocabulary.size - 1)
    ids = st.lists(st.integers(0, vocabulary.size - 1), max_size=30).map(tuple)
    rules = st.builds(
        vocabulary.rules,
        max_initial_index=st.none() | st.integers(0, vocabulary.size),
        suppressed=ids,
        suppressed_first=ids,
        allowed=st.none() | ids.filter(bool),
        **({} if data.draw(st.booleans()) else {"timestamps": st.none()}),
    )
    histories = data.draw(st.lists(st.lists(text | times, max_size=6), min_size=1, max_size=5))
    rows = [sequence(data.draw(rules), history, number) for number, history in enumerate(histories)]
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    logits = random_logits(vocabulary, len(rows), seed, data.draw(st.sampled_from([-6.0, 0.0, 6.0]))).to(dtype)
    ours = ruled(logits, rows)
    for i, row in enumerate(rows):
        assert torch.equal(ours[i], expected(logits[i], row)), row.output_token_ids


@pytest.mark.parametrize("more", [0.0, 1e-3, -1e-3])
def test_a_timestamp_as_likely_as_the_likeliest_text_leaves_the_text(more: float) -> None:
    logits = random_logits(ODD, 1, 0)
    logits[:, ODD.first_id :] = -math.inf
    logits[0, ODD.first_id + 20] = logits[0, : ODD.end_of_text_id].max() + more
    row = sequence(TokenRules(timestamps=TimestampRules(ODD.first_id, ODD.end_of_text_id, 711)), [ODD.first_id, 11])
    ours = ruled(logits, [row])[0]
    assert torch.equal(ours, expected(logits[0], row))
    assert bool(ours[: ODD.end_of_text_id].isfinite().any()) == (more <= 0)


def mixed_rows(vocabulary: Vocabulary, **params: Any) -> list[Sequence]:
    """Rows of several rules, states and parameters, some without any rule."""
    first, end = vocabulary.first_id, vocabulary.end_of_text_id
    full = vocabulary.rules()
    texts: list[tuple[TokenRules | None, list[int], dict[str, Any]]] = [
        (full, [], {}),
        (None, [], {}),
        (full, [first], {"temperature": 0.7}),
        (full, [first, 11, 12], {}),
        (None, [4, 5], {"temperature": 1.0, "top_p": 0.9}),
        (full, [first, 11, first + 9], {}),
        (full, [first, 11, first + 9, first + 9], {"temperature": 1.0, "top_k": 5}),
        (full, [first, 11, first + 9, first + 9, 12], {"logit_bias": ((12, 3.0), (1, 100.0))}),
        (TokenRules(allowed=(end + 1, end + 3, 4)), [], {"temperature": 1.0}),
        (TokenRules(suppressed=(3, 4), suppressed_first=(end,)), [], {"temperature": 1.3}),
        (TokenRules(suppressed=(3, 4), suppressed_first=(end,)), [6], {"repetition_penalty": 1.4}),
        (None, [6], {"presence_penalty": 1.0}),
        (TokenRules(), [6], {"temperature": 0.3}),
    ]
    return [
        sequence(rules, output, number, seed=50 + number, **{**fields, **params})
        for number, (rules, output, fields) in enumerate(texts)
    ]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("seed", range(4))
def test_tokens_and_logprobs_are_of_what_the_rules_leave(vocabulary: Vocabulary, seed: int) -> None:
    rows = mixed_rows(vocabulary, num_logprobs=4)
    logits = random_logits(vocabulary, len(rows), seed)
    sampled = Sampler(vocabulary.size, NO_EOS, "cpu").sample(logits, rows)
    assert sampled.errors == [None] * len(rows)
    for i, row in enumerate(rows):
        left = logits[i] if row.params.token_rules is None else expected(logits[i], row)
        # The plain twin, from what transformers' processors leave.
        assert sampled.token_ids[i] == reference.sample(left, row, NO_EOS).token_id
        entry = sampled.logprobs[i]
        assert entry is not None
        of_all = left.double().log_softmax(-1)
        assert entry.logprob == pytest.approx(of_all[sampled.token_ids[i]].item(), abs=1e-5)
        best = sorted(range(vocabulary.size), key=lambda j: (-left[j].item(), j))[:4]
        assert [token_id for token_id, _ in entry.top] == best
        for token_id, logprob in entry.top:
            assert logprob == pytest.approx(max(of_all[token_id].item(), -9999.0), abs=1e-5)


def test_a_row_is_the_same_alone_among_any_neighbours_and_in_any_order() -> None:
    rows = mixed_rows(ODD, num_logprobs=3)
    logits = random_logits(ODD, len(rows), 5)
    together = Sampler(ODD.size, NO_EOS, "cpu").sample(logits, rows)
    backwards = Sampler(ODD.size, NO_EOS, "cpu").sample(logits.flip(0), rows[::-1])
    assert backwards.token_ids[::-1] == together.token_ids and backwards.logprobs[::-1] == together.logprobs
    sampler = Sampler(ODD.size, NO_EOS, "cpu")
    whole = ruled(logits, rows)
    for i, row in enumerate(rows):
        alone = sampler.sample(logits[i : i + 1], [row])
        assert (alone.token_ids, alone.logprobs) == ([together.token_ids[i]], [together.logprobs[i]])
        assert torch.equal(ruled(logits[i : i + 1], [row])[0], whole[i])
    sampler._max_chunk = 4
    sampler.release_memory()
    assert sampler.sample(logits, rows) == together


def test_rows_without_rules_keep_every_bit() -> None:
    rows = mixed_rows(ODD)
    logits = random_logits(ODD, len(rows), 6)
    logits[:, 40:44] = torch.tensor([-0.0, math.nan, math.inf, -math.inf])
    after = ruled_bits(logits, rows)
    for i, row in enumerate(rows):
        if row.params.token_rules is None or row.params.token_rules == TokenRules():
            assert torch.equal(after[i], logits[i].view(torch.int32))


def ruled_bits(logits: Tensor, rows: list[Sequence]) -> Tensor:
    x = padded(logits)
    RuleBook(logits.shape[1], x.shape[1], torch.device("cpu")).apply(x, rows)
    return x[:, : logits.shape[1]].contiguous().view(torch.int32)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operators(sampler: Sampler, logits: Tensor, rows: list[Sequence]) -> list[str]:
    sampler.sample(logits, rows)  # indices are made once
    recorder = _Recorder()
    with recorder:
        sampler.sample(logits, rows)
    return recorder.names


def test_a_step_without_rules_runs_nothing_more() -> None:
    logits = random_logits(ODD, 8, 0)
    plain = [sequence(None, [11], number) for number in range(8)]
    sampler, fresh = Sampler(ODD.size, NO_EOS, "cpu"), Sampler(ODD.size, NO_EOS, "cpu")
    sampler.sample(logits, mixed_rows(ODD)[:8])
    assert operators(sampler, logits, plain) == operators(fresh, logits, plain)
    assert "index_add_" not in operators(fresh, logits, plain)


def test_many_rows_of_equal_rules_take_as_many_operators_as_one() -> None:
    logits = random_logits(ODD, 16, 0)
    # Equal, not the same object: every request makes its own.
    rows = [sequence(ODD.rules(), [ODD.first_id, 11, 12 + number], number) for number in range(16)]
    sampler = Sampler(ODD.size, NO_EOS, "cpu")
    assert len(operators(sampler, logits, rows)) == len(operators(sampler, logits[:1], rows[:1]))


def test_indices_of_many_rules_are_not_kept_for_ever() -> None:
    sampler = Sampler(ODD.size, NO_EOS, "cpu")
    logits = random_logits(ODD, 1, 0)
    for number in range(MAX_KEPT + 20):
        row = sequence(TokenRules(suppressed=(number % ODD.size, (number // 2) % ODD.size)), [])
        assert sampler.sample(logits, [row]).errors == [None]
        assert len(sampler._rules._kept) <= MAX_KEPT


@pytest.mark.parametrize("output", [[], [712], [712, 11], [712, 11, 720], [712, 11, 720, 720]])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [2, 300, 690, 697, 700, 702, 711, 712, 715, 890])
def test_what_is_not_finite_is_never_hidden_by_a_rule(output: list[int], bad: float, place: int) -> None:
    rules = [ODD.rules(), ODD.rules(), TokenRules(allowed=(3, 715)), None]
    rows = [sequence(r, output, number) for number, r in enumerate(rules)]
    logits = random_logits(ODD, 4, 1)
    broken = logits.clone()
    broken[[0, 2], place] = bad
    before = Sampler(ODD.size, NO_EOS, "cpu").sample(logits, rows)
    after = Sampler(ODD.size, NO_EOS, "cpu").sample(broken, rows)
    assert [type(error) for error in after.errors] == [NonFiniteLogits, type(None), NonFiniteLogits, type(None)]
    assert [after.token_ids[i] for i in (1, 3)] == [before.token_ids[i] for i in (1, 3)]


def test_a_row_that_the_rules_leave_nothing_fails_alone() -> None:
    everything = tuple(range(TINY.size))
    rows = [
        sequence(TINY.rules(), [66, 11], 0, num_logprobs=1),
        sequence(TokenRules(suppressed=everything), [], 1, num_logprobs=1),
        sequence(TokenRules(suppressed=(3, 4), allowed=(3, 4)), [], 2),
        sequence(replace(TINY.rules(), suppressed=everything), [66], 3),
        sequence(None, [], 4),
    ]
    logits = random_logits(TINY, 5, 2)
    sampled = Sampler(TINY.size, NO_EOS, "cpu").sample(logits, rows)
    assert [error is None for error in sampled.errors] == [True, False, False, False, True]
    assert all(isinstance(error, NonFiniteLogits) for error in sampled.errors[1:4])
    assert sampled.token_ids[4] == int(logits[4].argmax())
    assert sampled.token_ids[0] == int(expected(logits[0], rows[0]).argmax())
    assert sampled.logprobs[1] is None


def test_a_rule_outside_the_vocabulary_fails_its_row_alone() -> None:
    logits = random_logits(TINY, 3, 2)
    rows = [sequence(None, [], 0), sequence(TokenRules(suppressed=(TINY.size,)), [], 1), sequence(TINY.rules(), [], 2)]
    sampled = Sampler(TINY.size, NO_EOS, "cpu").sample(logits, rows)
    assert isinstance(sampled.errors[1], InvalidValue) and sampled.errors[0] is sampled.errors[2] is None
    assert sampled.token_ids[0] == int(logits[0].argmax())
    assert sampled.token_ids[2] == int(expected(logits[2], rows[2]).argmax())


def test_at_whispers_own_size_the_rules_are_generates() -> None:
    rows = [
        sequence(WHISPER.rules(max_initial_index=50), output, number)
        for number, output in enumerate(([], [50364], [50364, 11], [50364, 11, 50500], [50364, 11, 50500, 50500, 9]))
    ]
    for seed, timestamps in enumerate((-9.0, 0.0)):
        logits = random_logits(WHISPER, len(rows), seed, timestamps)
        ours = ruled(logits, rows)
        for i, row in enumerate(rows):
            assert torch.equal(ours[i], expected(logits[i], row))
