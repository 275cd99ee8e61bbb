"""Faults stay with those they belong to, and the engine lives on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from engine.batch import Batch
from engine.engine import Engine
from engine.errors import NonFiniteLogits, StepFailed
from engine.kv.pool import StorageOp
from engine.model.chosen_ids import ChosenIds
from engine.model.runner import FlatRunner, StepLogits
from engine.sequence import SamplingParams, Sequence
from tests import zoo
from tests.engine.harness import drive, engine_for, greedy, reference, tokens


class _Faulty:
    """A runner that passes everything on, after a fault of the test's choosing."""

    name = "flat"
    can_run_ahead = True

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.nan_for: set[int] = set()
        self.raise_once = False
        self.lose_storage_once = False

    def apply(self, ops: Iterable[StorageOp]) -> None:
        if self.lose_storage_once:
            self.lose_storage_once = False
            raise RuntimeError("no memory")
        self.inner.apply(ops)

    def forward(self, batch: Batch, chosen_ids: ChosenIds | None = None) -> StepLogits:
        if self.raise_once:
            self.raise_once = False
            raise RuntimeError("boom")
        result: StepLogits = self.inner.forward(batch, chosen_ids)
        row = 0
        for item in result.items:
            if item.sequence.sequence_id in self.nan_for and item.num_logits:
                result.logits[row] = float("nan")
            row += item.num_logits
        return result

    def forget(self, sequence: Sequence) -> None:
        self.inner.forget(sequence)

    def reset(self) -> None:
        self.inner.reset()


def _faulty_engine(**limits: Any) -> tuple[Engine, _Faulty]:
    engine = engine_for("llama", **limits)
    assert isinstance(engine.runner, FlatRunner)
    faulty = _Faulty(engine.runner)
    engine.runner = faulty
    return engine, faulty


def test_a_row_of_nan_fails_alone_and_is_never_shared() -> None:
    engine, faulty = _faulty_engine()
    faulty.nan_for = {1}
    prompts = [zoo.prompt(70, seed=n) for n in range(3)]
    outputs = drive(engine, [greedy(n, prompt, 10) for n, prompt in enumerate(prompts)])
    assert isinstance(outputs[1][-1].error, NonFiniteLogits)
    for number in (0, 2):
        assert tokens(outputs[number]) == reference("llama", prompts[number], 10)
    again = drive(engine, [greedy(7, prompts[1], 10)])
    assert again[7][0].num_cached_tokens == 0
    assert tokens(again[7]) == reference("llama", prompts[1], 10)


def test_what_a_row_of_nan_left_behind_can_be_cleared_when_idle() -> None:
    engine, faulty = _faulty_engine()
    faulty.nan_for = {0}
    outputs = drive(engine, [greedy(0, zoo.prompt(20), 5)])
    assert isinstance(outputs[0][-1].error, NonFiniteLogits)
    engine.on_idle()
    prompt = zoo.prompt(30, seed=1)
    assert tokens(drive(engine, [greedy(1, prompt, 5)])[1]) == reference("llama", prompt, 5)


def test_a_forward_that_raises_fails_its_batch_and_the_next_request_is_served() -> None:
    engine, faulty = _faulty_engine()
    faulty.raise_once = True
    outputs = drive(engine, [greedy(n, zoo.prompt(20, seed=n), 5) for n in range(2)], stagger=1)
    assert isinstance(outputs[0][-1].error, StepFailed)
    prompt = zoo.prompt(30, seed=9)
    assert tokens(drive(engine, [greedy(9, prompt, 5)])[9]) == reference("llama", prompt, 5)


@pytest.mark.parametrize("is_static_cache", [False, True])
def test_lost_storage_fails_everyone_running_and_starts_afresh(is_static_cache: bool) -> None:
    engine, faulty = _faulty_engine(is_static_cache=is_static_cache)
    first = greedy(0, zoo.prompt(20), 50)
    engine.add(first)
    for _ in range(5):
        engine.step()
    faulty.lose_storage_once = True
    (output,) = engine.step()
    assert isinstance(output.error, StepFailed)
    prompt = zoo.prompt(40, seed=3)
    assert tokens(drive(engine, [greedy(1, prompt, 5)])[1]) == reference("llama", prompt, 5)


def test_idle_memory_goes_and_the_next_request_is_exact() -> None:
    engine = engine_for("mistral")
    prompts = [zoo.prompt(100, seed=n) for n in range(8)]
    drive(engine, [greedy(n, prompt, 20) for n, prompt in enumerate(prompts)])
    assert isinstance(engine.runner, FlatRunner)
    storage = engine.runner.storage
    assert storage.num_bytes == engine.stats().kv_bytes_allocated > 0
    engine.on_idle()
    assert storage.num_bytes == engine.stats().kv_bytes_allocated
    outputs = drive(engine, [greedy(n, prompt, 20) for n, prompt in enumerate(prompts)])
    assert tokens(outputs[5]) == reference("mistral", prompts[5], 20)
    engine.close()
    assert storage.num_bytes == 0 and not engine.has_work()


def test_bytes_of_kv_are_what_arithmetic_says() -> None:
    engine = engine_for("llama")
    assert engine.lane.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4  # layers, K and V, KV heads, head size, float32
    drive(engine, [greedy(0, zoo.prompt(60), 8)])
    assert engine.stats().kv_bytes_allocated == 128 * engine.lane.kv_bytes_per_token


@pytest.mark.parametrize("budget", [256, 9])
def test_prompt_logprobs_are_the_models_own_whatever_the_chunks(budget: int) -> None:
    engine = engine_for("qwen2", max_batch_tokens=budget)
    prompt = zoo.prompt(30, seed=4)
    params = SamplingParams(max_tokens=1, temperature=0.0, num_logprobs=2, num_prompt_logprobs=2)
    (last,) = drive(engine, [Sequence(0, prompt, params, arrival_time_s=0.0)])[0]
    assert last.prompt_logprobs is not None and last.prompt_logprobs[0] is None
    model, _ = zoo.make("qwen2")
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    for position in range(1, 30):
        entry = last.prompt_logprobs[position]
        assert entry is not None
        assert entry.logprob == pytest.approx(expected[position - 1, prompt[position]].item(), abs=1e-4)
        assert entry.top[0][0] == int(expected[position - 1].argmax())
    assert len(last.prompt_logprobs) == 30


def test_a_prompt_can_be_scored_without_generating() -> None:
    engine = engine_for("qwen2")
    params = SamplingParams(max_tokens=0, num_prompt_logprobs=0)
    (only,) = drive(engine, [Sequence(0, zoo.prompt(10), params, arrival_time_s=0.0)])[0]
    assert only.token_ids == () and only.finish_reason == "length"
    assert only.prompt_logprobs is not None and len(only.prompt_logprobs) == 10
