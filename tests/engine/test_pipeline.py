"""Steps that overlap give what steps one after the other give, whatever comes, goes and fails on the way."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import ScheduledSequence
from engine.engine import Engine
from engine.errors import NonFiniteLogits, StepFailed
from engine.model.chosen_ids import ChosenIds
from engine.pipeline import PAUSE_STEPS
from engine.sampling import filters, sampler
from engine.sequence import SamplingParams, Sequence, SequenceOutput, TokenRules
from tests.engine.remembering_runner import VOCAB_SIZE, Poisoned, logits_after, remembering_engine

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.9},
    "hot": {"top_p": 0.97, "temperature": 3.0},
    "biased": {"logit_bias": ((4, 3.0), (9, -100.0))},
    "telling": {"num_logprobs": 3, "top_p": 0.95},
    "held back": {"min_tokens": 7},
    "penalised": {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
    "ruled": {"token_rules": TokenRules(suppressed=(3, 5, 8))},
    "scored": {"num_prompt_logprobs": 1, "temperature": 0.0},
}
STEADY = [kind for kind, params in KINDS.items() if not SamplingParams(1, **params).needs_history]


@dataclass(frozen=True)
class Request:
    """A sequence, when it comes, and after how many tokens it is aborted."""

    sequence_id: int
    prompt: tuple[int, ...]
    params: SamplingParams
    arrives_after: int
    aborted_after: int | None = None

    def sequence(self) -> Sequence:
        return Sequence(self.sequence_id, list(self.prompt), self.params, arrival_time_s=float(self.sequence_id))


def told(output: SequenceOutput) -> tuple[Any, ...]:
    """All of an output that does not depend on when it was computed."""
    return (
        output.token_ids, output.logprobs, output.prompt_logprobs, output.finish_reason, output.stop_token_id,
        type(output.error),
    )  # fmt: skip


def serve(
    engine: Engine, requests: list[Request], at_step: Callable[[int], None] = lambda _: None
) -> dict[int, list[tuple[Any, ...]]]:
    """What each request was told; the accounts are checked after every step."""
    outputs: dict[int, list[tuple[Any, ...]]] = {request.sequence_id: [] for request in requests}
    coming = sorted(requests, key=lambda request: request.arrives_after)
    aborts = {request.sequence_id: request.aborted_after for request in requests}
    steps = 0
    while coming or engine.has_work():
        while coming and (coming[0].arrives_after <= steps or not engine.has_work()):
            engine.add(coming.pop(0).sequence())
        at_step(steps)
        for output in engine.step():
            outputs[output.sequence_id].append(told(output))
            if len(outputs[output.sequence_id]) == aborts[output.sequence_id]:
                engine.abort(output.sequence_id)
        engine.kv.check_integrity()
        steps += 1
        assert steps < 5_000, "the engine makes no progress"
    return outputs


def leave_nothing(engine: Engine) -> None:
    """Sees that an engine without sequences holds no memory once it has given back what it kept."""
    engine.on_idle()
    engine.kv.give_back(0)
    engine.kv.check_integrity()
    assert engine.kv.num_tokens_used == engine.kv.num_tokens_allocated == 0, "a sequence left something behind"


@st.composite
def request_strategy(draw: st.DrawFn, kinds: list[str]) -> Request:
    number = draw(st.integers(0, 10**9))
    # A few common beginnings, so that computed prefixes are found.
    base = random.Random(f"prompt {draw(st.integers(0, 2))}").choices(range(10, VOCAB_SIZE), k=90)
    params = SamplingParams(
        max_tokens=draw(st.sampled_from([1, 2, 5, 17, 36, 90])),
        seed=draw(st.integers(0, 99)),
        stop_token_ids=draw(st.sampled_from([frozenset(), frozenset(range(0, VOCAB_SIZE, 11))])),
        **KINDS[draw(st.sampled_from(kinds))],
    )
    length = draw(st.sampled_from([1, 3, 15, 16, 31, 33, 64, 80]))
    return Request(
        number, tuple(base[:length]), params, draw(st.integers(0, 50)), draw(st.sampled_from([None, None, 1, 2, 6]))
    )


def mixes(kinds: list[str]) -> st.SearchStrategy[list[Request]]:
    return st.lists(request_strategy(kinds), min_size=1, max_size=9, unique_by=lambda request: request.sequence_id)


@pytest.mark.parametrize("storage", ["slots", "pages"])
@pytest.mark.parametrize("kinds", [STEADY, list(KINDS)], ids=["steady", "mixed"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_mix_is_told_the_same_with_steps_that_overlap(storage: str, kinds: list[str], data: st.DataObject) -> None:
    requests = data.draw(mixes(kinds))
    budget = data.draw(st.sampled_from([None, 192, 256]))
    num_candidates = data.draw(st.sampled_from([2, 30, 256]))
    broken = {
        (request.sequence_id, len(request.prompt) + data.draw(st.integers(-1, 8)))
        for request in requests
        if data.draw(st.integers(0, 4)) == 0
    }
    results = []
    for is_overlapped in (False, True):
        engine, faults = remembering_engine(
            storage, budget, is_overlapped=is_overlapped, eos_token_ids=frozenset({2, 77})
        )
        faults.nan_at = broken
        with pytest.MonkeyPatch.context() as patch:
            for module in (filters, sampler):
                patch.setattr(module, "NUM_CANDIDATES_DEFERRED", num_candidates)
            results.append(serve(engine, requests))
        leave_nothing(engine)
    assert results[1] == results[0]


def _requests(count: int, max_tokens: int, **params: Any) -> list[Request]:
    return [
        Request(n, tuple(range(10 * n + 3, 10 * n + 20)), SamplingParams(max_tokens, seed=n, **params), 0)
        for n in range(count)
    ]


@pytest.mark.parametrize("storage", ["slots", "pages"])
def test_decode_steps_are_launched_before_the_last_ones_tokens_are_read(storage: str) -> None:
    engine, _ = remembering_engine(storage, is_overlapped=True)
    for request in _requests(4, 40):
        engine.add(request.sequence())
    in_flight: list[list[int]] = []
    while engine.has_work():
        engine.step()
        in_flight.append([sequence.num_in_flight for sequence in engine.scheduler.running])
    assert in_flight[0] == [0] * 4  # a prompt's step is followed when its tokens are known
    # From then on always, but where a slot must be moved.
    assert in_flight.count([1] * 4) >= (37 if storage == "pages" else 35)
    assert engine.step() == []


@pytest.mark.parametrize("storage", ["slots", "pages"])
def test_who_is_sure_to_end_has_no_row_for_nothing(storage: str) -> None:
    # By max_tokens one after the other, the last by the length of the context.
    requests = [
        replace(r, params=replace(r.params, max_tokens=(5, 9, 70, 500)[r.sequence_id])) for r in _requests(4, 0)
    ]
    results = []
    for is_overlapped in (False, True):
        engine, _ = remembering_engine(storage, is_overlapped=is_overlapped)
        results.append((serve(engine, requests), engine.stats().step_tokens_total, engine.stats().steps_total))
    assert results[0] == results[1]


def test_a_slot_that_must_grow_takes_along_what_was_just_computed() -> None:
    results = []
    for is_overlapped in (False, True):
        engine, _ = remembering_engine("slots", is_overlapped=is_overlapped)
        results.append(serve(engine, _requests(3, 100)))
        assert [len(entries) for entries in results[-1].values()] == [100] * 3
    assert results[0] == results[1]


def test_a_token_that_is_chosen_again_costs_its_sequence_no_more_than_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (filters, sampler):
        monkeypatch.setattr(module, "NUM_CANDIDATES_DEFERRED", 1)
    requests = _requests(2, 40)
    requests[1] = replace(requests[1], params=replace(requests[1].params, top_p=0.97, temperature=3.0))
    engine, _ = remembering_engine("pages", is_overlapped=True)
    serve(engine, requests)
    # Every one of its tokens is: steps go one by one then, and now and then two are tried.
    assert engine.stats().steps_total <= 40 * (1 + 2 / PAUSE_STEPS)


def test_rows_that_depend_on_history_wait_for_it() -> None:
    for kind in set(KINDS) - set(STEADY):
        engine, _ = remembering_engine("pages", is_overlapped=True)
        engine.add(Request(0, (5, 6, 7), SamplingParams(10, **KINDS[kind]), 0).sequence())
        for _ in range(10):
            engine.step()
            assert engine.scheduler.running == [] or engine.scheduler.running[0].num_in_flight == 0


def test_an_arrival_and_an_abort_wait_for_no_more_than_the_step_that_runs() -> None:
    engine, _ = remembering_engine("pages", is_overlapped=True)
    first, second, third = (request.sequence() for request in _requests(3, 30))
    engine.add(first)
    engine.add(second)
    for _ in range(5):
        engine.step()
    assert first.num_in_flight == second.num_in_flight == 1
    engine.abort(first.sequence_id)
    engine.add(third)
    (output,) = engine.step()
    assert output.sequence_id == second.sequence_id and second.num_in_flight == 0
    assert {output.sequence_id for output in engine.step()} == {second.sequence_id, third.sequence_id}


def _stop_token(request: Request, number: int) -> int:
    """The greedy token number `number` of a request."""
    ids = [float(token_id) for token_id in request.prompt]
    for _ in range(number + 1):
        ids.append(float(logits_after(ids).argmax()))
    return int(ids[-1])


def test_what_a_row_wrote_past_its_end_is_never_read() -> None:
    (request,) = _requests(1, 30, temperature=0.0)
    stop = _stop_token(request, 8)
    request = replace(request, params=replace(request.params, stop_token_ids=frozenset({stop})))
    end = len(request.prompt) + 9
    for storage in ("slots", "pages"):
        engine, faults = remembering_engine(storage, is_overlapped=True, max_num_seqs=1, max_batch_tokens=8)
        faults.nan_at = {(0, end - 1)}  # the stop token's own position, which nobody asked to be computed
        assert serve(engine, [request])[0][-1][3] == "stop"
        # Whoever comes next finds the same slot or pages, and no NaN in them.
        others = [replace(request, sequence_id=n, prompt=tuple(range(n, n + 20))) for n in range(1, 6)]
        plain, _ = remembering_engine(storage, max_num_seqs=1, max_batch_tokens=8)
        assert serve(engine, others) == serve(plain, others)


def test_the_poison_that_the_test_above_looks_for_would_be_seen() -> None:
    engine, _ = remembering_engine("slots")
    for request in _requests(1, 9):
        engine.add(request.sequence())
    engine.step()
    with torch.inference_mode():
        for arena in engine.runner.storage.arenas.values():  # type: ignore[attr-defined]
            arena.keys[0][:, :, 25:] = torch.nan
    (output,) = engine.step()
    assert isinstance(output.error, StepFailed) and Poisoned.__name__ in str(output.error)


@pytest.mark.parametrize("storage", ["slots", "pages"])
def test_a_launch_that_fails_costs_its_own_sequences_after_they_were_told_of_the_step_before(storage: str) -> None:
    requests = [replace(r, params=replace(r.params, max_tokens=6 + 9 * r.sequence_id)) for r in _requests(3, 0)]
    results = []
    for is_overlapped in (False, True):
        engine, faults = remembering_engine(storage, is_overlapped=is_overlapped)
        faults.raise_at = {(2, len(requests[2].prompt) + 8)}
        results.append(serve(engine, requests))
        assert [entry[-1] for entry in results[-1][0]] == [type(None)] * 6
        for number in (1, 2):
            assert [entry[-1] for entry in results[-1][number]] == [type(None)] * 9 + [StepFailed]
        again = [replace(request, sequence_id=request.sequence_id + 10) for request in requests]
        assert all(entry[-1] is type(None) for told_ in serve(engine, again).values() for entry in told_)
    assert results[0] == results[1]


def test_a_device_that_fails_late_costs_the_sequences_in_flight_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = remembering_engine("pages", is_overlapped=True)
    for request in _requests(2, 30):
        engine.add(request.sequence())
    for _ in range(4):
        engine.step()
    assert engine._flight is not None and engine._flight.pending is not None

    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(engine._flight.pending, "collect", fail)
    outputs = engine.step()
    assert {output.sequence_id for output in outputs} == {0, 1}
    assert all(isinstance(output.error, StepFailed) for output in outputs)
    assert engine.step() == [] and not engine.has_work()
    third = replace(_requests(1, 12)[0], sequence_id=3)
    plain, _ = remembering_engine("pages")
    assert serve(engine, [third]) == serve(plain, [third])


def test_storage_lost_at_a_launch_costs_everybody_after_the_step_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, _ = remembering_engine("pages", is_overlapped=True)
    for request in _requests(2, 30):
        engine.add(request.sequence())
    for _ in range(4):
        engine.step()
    apply = engine.runner.apply

    def lose(_ops: Any) -> None:
        monkeypatch.setattr(engine.runner, "apply", apply)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.runner, "apply", lose)
    assert [len(output.token_ids) for output in engine.step()] == [1, 1]
    assert all(isinstance(output.error, StepFailed) for output in engine.step())
    assert not engine.has_work()
    again = [replace(request, sequence_id=9) for request in _requests(1, 12)]
    plain, _ = remembering_engine("pages")
    assert serve(engine, again) == serve(plain, again)


def test_closing_while_a_step_is_in_flight_leaves_nothing() -> None:
    engine, _ = remembering_engine("slots", is_overlapped=True)
    for request in _requests(3, 30):
        engine.add(request.sequence())
    for _ in range(4):
        engine.step()
    engine.abort(1)
    engine.close()
    engine.kv.check_integrity()
    engine.kv.give_back(0)
    assert not engine.has_work() and engine.kv.num_tokens_allocated == 0


def test_a_row_that_is_not_finite_fails_alone_and_its_memory_is_cleaned() -> None:
    requests = _requests(4, 20)
    results = []
    for is_overlapped in (False, True):
        engine, faults = remembering_engine("slots", is_overlapped=is_overlapped)
        faults.nan_at = {(1, len(requests[1].prompt) + 3)}
        results.append(serve(engine, requests))
        assert results[-1][1][-1][-1] is NonFiniteLogits and len(results[-1][1]) == 5
        later = [replace(request, sequence_id=request.sequence_id + 10) for request in requests]
        results[-1].update(serve(engine, later))
    assert results[0] == results[1]
    assert all(results[1][n][-1][3] == "length" for n in (0, 2, 3, 10, 11, 12, 13))


def test_tokens_go_to_the_rows_of_their_sequences() -> None:
    items = [ScheduledSequence(request.sequence(), 17, 1, 1) for request in _requests(4, 9)]
    chosen = ChosenIds(torch.tensor([50, 51, 52, 53]), {0: 2, 1: 0, 2: 3, 3: 1})
    assert chosen.inputs_for(items).tolist() == [[52, 50, 53, 51]]
    assert chosen.inputs_for([items[n] for n in (1, 3, 0, 2)]).tolist() == [[50, 51, 52, 53]]
    assert chosen.inputs_for(items[2:]).tolist() == [[53, 51]]
