"""The bridge between requests and the engine thread, with a scripted engine: delivery, abort, limits, ends."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import psutil
import pytest

from config import Settings
from engine.errors import (
    ContextLengthExceeded,
    InternalError,
    NotServing,
    QueueFull,
    RequestTimeout,
    StepFailed,
)
from engine.sequence import SamplingParams, Sequence, SequenceOutput, TokenLogprobs
from model_manager import GenerationRequest, ModelManager
from runtime.admission import Admission
from runtime.output_queue import OutputQueue
from tests.scripted_engine import TOO_LONG, ScriptedEngine, loader_of


@asynccontextmanager
async def serving(engine: ScriptedEngine, *, idle_after_s: float = 10.0, **options: Any) -> AsyncIterator[ModelManager]:
    options.setdefault("continuous_batching_microsleep", 0.0)
    manager = ModelManager(Settings(**options), loader_of(engine), idle_after_s=idle_after_s)
    await manager.start()
    await manager.wait_until_loaded()
    try:
        yield manager
    finally:
        engine.gate.set()
        await manager.close()
        assert manager.has_ended


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 30))


def request(max_tokens: int = 3, prompt_length: int = 1, **params: Any) -> GenerationRequest:
    return GenerationRequest([1] * prompt_length, SamplingParams(max_tokens=max_tokens, **params))


async def collect(manager: ModelManager, wanted: GenerationRequest) -> list[int]:
    return [token async for output in manager.generate(wanted) for token in output.token_ids]


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


def test_many_sequences_share_steps_and_each_gets_its_own_tokens_in_order() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine()
        engine.gate.clear()
        async with serving(engine) as manager:
            tasks = [asyncio.create_task(collect(manager, request(n))) for n in range(1, 9)]
            await asyncio.sleep(0.05)
            engine.gate.set()
            assert await asyncio.gather(*tasks) == [list(range(100, 100 + n)) for n in range(1, 9)]
            assert max(len(step) for step in engine.steps) >= 7  # the first may have run alone
            assert manager.stats.num_running == 0
            assert len(engine.threads) == 1 and threading.get_ident() not in engine.threads
            assert engine.aborted == []  # who ends by itself needs no abort

    run(scenario())


def test_one_step_wakes_the_loop_once_however_many_rows_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine()
        engine.gate.clear()
        async with serving(engine) as manager:
            tasks = [asyncio.create_task(collect(manager, request(20))) for _ in range(16)]
            await until(lambda: manager._queues.__len__() == 16)
            loop = asyncio.get_running_loop()
            wake_ups: list[object] = []
            real = loop.call_soon_threadsafe

            def counted(callback: Any, *arguments: Any, **context: Any) -> Any:
                wake_ups.append(callback)
                return real(callback, *arguments, **context)

            monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
            engine.gate.set()
            await asyncio.gather(*tasks)
            assert len(wake_ups) <= len(engine.steps) + 2  # two: going idle, and a step that had begun

    run(scenario())


def test_a_slow_reader_gets_everything_merged_and_delays_nobody() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine()
        async with serving(engine) as manager:
            slow = manager.generate(request(500, num_logprobs=0, num_prompt_logprobs=0))
            first = await anext(slow)
            assert await collect(manager, request(600)) == list(range(100, 700))  # longer, and done before
            rest = [output async for output in slow]
            assert len(rest) < 10
            outputs = [first, *rest]
            assert [t for o in outputs for t in o.token_ids] == list(range(100, 600))
            assert [e.logprob for o in outputs for e in o.logprobs or ()] == [-float(n) for n in range(500)]
            assert first.prompt_logprobs == (None,) and all(o.prompt_logprobs is None for o in rest)
            assert rest[-1].finish_reason == "length" and rest[-1].scheduled_time_s == 1.0

    run(scenario())


def test_closing_a_generation_aborts_it_in_the_engine() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(step_s=0.001)
        async with serving(engine) as manager:
            outputs = manager.generate(request(1_000_000))
            await anext(outputs)
            await outputs.aclose()
            await until(lambda: engine.aborted == [engine.added[0].sequence_id])
            await until(lambda: manager.stats.num_running == 0)
            assert not manager._queues

    run(scenario())


def test_cancelling_a_task_that_waits_aborts_its_sequence() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine()
        engine.gate.clear()
        async with serving(engine) as manager:
            task = asyncio.create_task(collect(manager, request()))
            await until(lambda: bool(engine.added))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            engine.gate.set()
            await until(lambda: engine.aborted == [0])

    run(scenario())


def test_a_sequence_that_can_never_fit_is_refused_alone() -> None:
    async def scenario() -> None:
        async with serving(ScriptedEngine(step_s=0.001)) as manager:
            neighbour = asyncio.create_task(collect(manager, request(50)))
            with pytest.raises(ContextLengthExceeded, match=str(TOO_LONG)):
                await collect(manager, request(prompt_length=TOO_LONG))
            assert await neighbour == list(range(100, 150))
            assert manager.state == "ready"

    run(scenario())


def test_an_unforeseen_failure_to_add_is_that_request_s_alone() -> None:
    def fail_for_two(sequence: Sequence) -> None:
        if len(sequence.prompt_token_ids) == 2:
            raise ZeroDivisionError

    async def scenario() -> None:
        engine = ScriptedEngine(on_add=fail_for_two)
        async with serving(engine) as manager:
            with pytest.raises(InternalError):
                await collect(manager, request(prompt_length=2))
            assert await collect(manager, request(2)) == [100, 101]
            assert set(engine.aborted) == {0}

    run(scenario())


def test_a_row_s_error_is_raised_after_the_tokens_before_it() -> None:
    async def scenario() -> None:
        queue = OutputQueue()
        queue.put(SequenceOutput(1, (5,)))
        queue.put(SequenceOutput(1, (6,)))
        queue.put(SequenceOutput(1, error=StepFailed("no")))
        queue.fail(NotServing("too late to matter"))
        assert (await queue.get()).token_ids == (5, 6)
        with pytest.raises(StepFailed):
            await queue.get()

    run(scenario())


def test_the_queue_merges_again_after_it_was_read() -> None:
    async def scenario() -> None:
        queue = OutputQueue()
        for start in (0, 10):
            for number in range(3):
                queue.put(SequenceOutput(1, (start + number,), logprobs=(TokenLogprobs(0.5),)))
            output = await queue.get()
            assert output.token_ids == (start, start + 1, start + 2)
            assert output.logprobs == (TokenLogprobs(0.5),) * 3
        queue.put(SequenceOutput(1, (7,)))
        assert (await queue.get()).logprobs is None

    run(scenario())


def test_merging_keeps_what_came_with_the_first_output() -> None:
    async def scenario() -> None:
        queue = OutputQueue()
        alignment = np.zeros((1, 2, 3), np.float32)
        queue.put(SequenceOutput(1, (5,), probed=(0.25,), alignment=alignment))
        queue.put(SequenceOutput(1, (6,), finish_reason="stop", stop_token_id=6))
        output = await queue.get()
        assert output.probed == (0.25,) and output.alignment is alignment

    run(scenario())


def test_an_idle_engine_sleeps_and_is_told_once() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine()
        async with serving(engine, idle_after_s=0.05) as manager:
            await collect(manager, request())
            await until(lambda: engine.num_idle == 1)
            process = psutil.Process()
            before, switches = process.cpu_times(), process.num_ctx_switches().voluntary
            await asyncio.sleep(0.5)
            after = process.cpu_times()
            assert after.user + after.system - before.user - before.system < 0.025  # two ticks of the clock
            if psutil.LINUX:
                assert process.num_ctx_switches().voluntary - switches < 20  # nobody polls
            assert engine.num_idle == 1
            await collect(manager, request())
            await until(lambda: engine.num_idle == 2)

    run(scenario())


def test_arrivals_within_the_microsleep_of_an_idle_engine_share_its_first_step() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine()
        async with serving(engine, continuous_batching_microsleep=0.3) as manager:
            await asyncio.sleep(0.05)  # until the engine sleeps
            first = asyncio.create_task(collect(manager, request(2)))
            await asyncio.sleep(0.1)
            second = asyncio.create_task(collect(manager, request(2)))
            await asyncio.gather(first, second)
            assert engine.steps == [[0, 1], [0, 1]]

    run(scenario())


def test_a_busy_engine_takes_no_microsleep() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(step_s=0.001)
        async with serving(engine, continuous_batching_microsleep=0.2) as manager:
            long = asyncio.create_task(collect(manager, request(1000)))
            await until(lambda: len(engine.steps) > 2)
            started = time.monotonic()
            await collect(manager, request(1))
            assert time.monotonic() - started < 0.15
            long.cancel()

    run(scenario())


def test_admission_is_refused_above_max_concurrent_with_a_time_to_retry() -> None:
    async def scenario() -> None:
        async with serving(ScriptedEngine(), max_concurrent=2) as manager:
            with manager.admission(), manager.admission():
                assert manager.num_admitted == 2
                with pytest.raises(QueueFull, match="--max-concurrent") as refused, manager.admission():
                    pass
                assert refused.value.retry_after_s is not None and refused.value.retry_after_s >= 1
            with manager.admission():
                assert manager.num_admitted == 1

    run(scenario())


def test_the_time_to_retry_follows_how_fast_requests_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    admission = Admission(1)
    for _ in range(10):  # one leaves every four seconds
        with admission.place():
            now += 4.0

    def refused() -> float:
        with pytest.raises(QueueFull) as error, admission.place():
            pass
        assert error.value.retry_after_s is not None
        return error.value.retry_after_s

    with admission.place():
        times = [refused() for _ in range(3)]
        assert times == pytest.approx([3.6, 7.2, 10.8])  # one place after the other
        now += 3600.0
        assert refused() == 60.0


def test_a_place_is_given_back_when_the_request_fails() -> None:
    async def scenario() -> None:
        admission = Admission(1)
        with pytest.raises(ZeroDivisionError), admission.place():
            raise ZeroDivisionError
        assert admission.num_inside == 0
        assert await admission.wait_until_empty(0.0)

    run(scenario())


def test_the_queue_deadline_counts_from_arrival() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine()
        async with serving(engine, max_queue_time=7.0) as manager:
            await collect(manager, GenerationRequest([1], SamplingParams(max_tokens=1), arrival_time_s=50.0))
            assert engine.added[0].deadline_s == 57.0
            assert engine.added[0].arrival_time_s == 50.0
        async with serving(other := ScriptedEngine(), max_queue_time=None) as manager:
            await collect(manager, request())
            assert other.added[0].deadline_s is None

    run(scenario())


def test_later_sequences_of_a_request_have_a_place_of_their_own_and_no_queue_deadline() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine()
        async with serving(engine, max_queue_time=7.0, request_timeout=1e6) as manager:
            arrival_s = time.monotonic()
            params = SamplingParams(max_tokens=1)
            await collect(
                manager,
                GenerationRequest([1], params, arrival_time_s=arrival_s, submitted_time_s=arrival_s + 5.0),
            )
            assert engine.added[0].arrival_time_s == arrival_s + 5.0
            assert engine.added[0].deadline_s is None

    run(scenario())


def test_a_request_that_runs_too_long_is_told_so_and_aborted() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(step_s=0.001)
        async with serving(engine, request_timeout=0.1) as manager:
            assert await collect(manager, request(2)) == [100, 101]
            with pytest.raises(RequestTimeout, match=r"--request-timeout 0\.1"):
                await collect(manager, request(1_000_000))
            await until(lambda: engine.aborted == [1])

    run(scenario())
