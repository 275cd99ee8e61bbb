"""A manager that transcribes: limits of requests, hanging up, shutting down, and models that cannot."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from api.metrics import Metrics
from config import Settings
from engine.errors import NotServing, RequestTimeout, UnsupportedParameter
from engine.sequence import SequenceOutput
from model_manager import ModelManager
from runtime.transcriber import transcriber_maker
from runtime.transcription import Finished, Recording, TranscriptionRequest
from tests import tiny_whisper
from tests.runtime.scripted_speech import ScriptedAudio, seconds
from tests.scripted_engine import ScriptedEngine, stack_of

REQUEST = TranscriptionRequest(str(seconds(75)).encode(), language="en", temperature=1.0)
CUTS = [(seconds(n), seconds(n + 10)) for n in (1, 12, 30)]


class ProbedEngine(ScriptedEngine):
    """Hears silence everywhere."""

    def step(self) -> list[SequenceOutput]:
        return [dataclasses.replace(output, probed=(1.0,)) for output in super().step()]


@asynccontextmanager
async def serving(engine: ScriptedEngine, **options: Any) -> AsyncIterator[ModelManager]:
    settings = Settings(continuous_batching_microsleep=0.0, **options)
    maker = transcriber_maker(
        tiny_whisper.config(),
        tiny_whisper.generation_config(),
        tiny_whisper.tokenizer(),
        ScriptedAudio(CUTS),
        num_threads=1,
        max_windows=2,
    )
    stack = dataclasses.replace(stack_of(engine, settings), make_transcriber=maker)
    manager = ModelManager(settings, lambda *_: stack)
    await manager.start()
    await manager.wait_until_loaded()
    try:
        yield manager
    finally:
        engine.gate.set()
        await manager.close()
        assert manager.has_ended


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await coroutine

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_windows_of_a_recording_share_the_engines_steps() -> None:
    async def scenario() -> None:
        engine = ProbedEngine()
        async with serving(engine) as manager:
            events = [event async for event in manager.transcribe(REQUEST)]
            assert events == [Recording(75.0, "en", 3), Finished(3 * 445, 0)]
            assert max(len(step) for step in engine.steps) == 2  # as many as max_windows
            assert engine.aborted == []
            assert [sequence.deadline_s is None for sequence in engine.added] == [False, True, True]
            assert manager.transcriber.num_windows_in_flight == 0

    run(scenario())


def test_hanging_up_aborts_every_window() -> None:
    async def scenario() -> None:
        engine = ProbedEngine(step_s=0.001)
        async with serving(engine) as manager:
            stream = manager.transcribe(REQUEST)
            assert isinstance(await anext(stream), Recording)
            pending = asyncio.create_task(anext(stream))
            await until(lambda: manager.stats.num_running == 2)
            text = Metrics(manager).text().decode()
            assert manager.num_audio_windows == 2 and "num_audio_windows 2.0" in text
            pending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await pending
            await stream.aclose()
            await until(lambda: manager.stats.num_running == 0)
            assert sorted(engine.aborted) == [0, 1]
            assert len(engine.added) == 2
            assert not manager._queues and len(asyncio.all_tasks()) == 1

    run(scenario())


def test_the_request_timeout_counts_for_all_windows_together() -> None:
    async def scenario() -> None:
        engine = ProbedEngine(step_s=0.002)
        async with serving(engine, request_timeout=0.2) as manager:
            request = dataclasses.replace(REQUEST, arrival_time_s=asyncio.get_running_loop().time())
            with pytest.raises(RequestTimeout):
                async for _ in manager.transcribe(request):
                    pass
            await until(lambda: manager.stats.num_running == 0)
            assert not manager._queues

    run(scenario())


def test_shutting_down_answers_who_is_being_transcribed() -> None:
    async def scenario() -> None:
        engine = ProbedEngine(step_s=0.01)
        async with serving(engine) as manager:
            stream = manager.transcribe(REQUEST)
            await anext(stream)
            pending = asyncio.create_task(anext(stream))
            await until(lambda: len(engine.added) == 2)
            await manager.close()
            with pytest.raises(NotServing):
                await pending

    run(scenario())


def test_a_model_without_speech_says_so() -> None:
    async def scenario() -> None:
        settings = Settings(hf_model="some/chat-model")
        engine = ScriptedEngine()
        manager = ModelManager(settings, lambda *_: stack_of(engine, settings))
        with pytest.raises(NotServing):
            manager.transcribe(REQUEST)
        await manager.start()
        await manager.wait_until_loaded()
        with pytest.raises(UnsupportedParameter, match="some/chat-model is no speech model"):
            manager.transcribe(REQUEST)
        await manager.close()

    run(scenario())
