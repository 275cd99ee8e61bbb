"""What ModelManager does when a model loads, when it drains, and when everything ends."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import AsyncExitStack

import pytest

import model_manager
from config import Settings, StartupError
from engine.errors import (
    EngineDead,
    NotServing,
)
from model_manager import LoadedStack, ModelManager, Progress
from tests.scripted_engine import ScriptedEngine, stack_of
from tests.test_model_manager import collect, request, run, serving, until


def test_an_engine_that_raises_is_dead_and_answers_everyone(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine()
        engine.gate.clear()

        def die() -> None:
            raise RuntimeError("device lost")

        engine.on_step = die
        async with serving(engine) as manager:
            tasks = [asyncio.create_task(collect(manager, request(9))) for _ in range(5)]
            await asyncio.sleep(0.02)
            engine.gate.set()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, EngineDead) for result in results)
            assert manager.state == "dead"
            with pytest.raises(EngineDead), manager.admission():
                pass
            with pytest.raises(EngineDead):
                await collect(manager, request())
            assert engine.is_closed
            await manager.drain(5.0)
            assert manager.state == "dead"

    run(scenario())
    assert "device lost" in caplog.text


def test_a_dead_engine_s_error_does_not_grow_with_every_request() -> None:
    async def scenario() -> None:
        async with serving(ScriptedEngine(on_step=lambda: 1 // 0)) as manager:  # type: ignore[arg-type]
            lengths = []
            for _ in range(4):
                with pytest.raises(EngineDead) as raised:
                    await collect(manager, request())
                lengths.append(len(raised.traceback))
            assert lengths[1:] == [lengths[1]] * 3

    run(scenario())


def test_a_drain_lets_running_requests_finish_and_refuses_new_ones() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(step_s=0.002)
        async with serving(engine) as manager:

            async def one_request() -> list[int]:
                with manager.admission():
                    await asyncio.sleep(0.05)  # still before its first sequence when the drain begins
                    return await collect(manager, request(20))

            task = asyncio.create_task(one_request())
            await asyncio.sleep(0.01)
            drain = asyncio.create_task(manager.drain(10.0))
            await asyncio.sleep(0)
            assert manager.state == "draining"
            with pytest.raises(NotServing), manager.admission():
                pass
            assert not drain.done()
            assert await task == list(range(100, 120))
            await asyncio.wait_for(drain, 1.0)

    run(scenario())


def test_a_drain_cuts_off_at_its_timeout_with_an_error() -> None:
    async def scenario() -> None:
        async with serving(ScriptedEngine(step_s=0.001)) as manager:
            got: list[int] = []

            async def endless() -> None:
                with manager.admission():
                    async for output in manager.generate(request(1_000_000)):
                        got.extend(output.token_ids)

            task = asyncio.create_task(endless())
            await until(lambda: bool(got))
            started = time.monotonic()
            await manager.drain(0.1)
            assert 0.1 <= time.monotonic() - started < 1.0
            with pytest.raises(NotServing, match="shut down"):
                await task

    run(scenario())


def test_a_drain_does_not_wait_for_ever_for_who_ignores_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_manager, "FAREWELL_S", 0.1)

    async def scenario() -> None:
        async with serving(ScriptedEngine()) as manager, AsyncExitStack() as stack:
            stack.enter_context(manager.admission())
            await asyncio.wait_for(manager.drain(0.05), 1.0)

    run(scenario())


def test_closing_answers_whoever_is_left_and_closes_the_engine() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(step_s=0.001)
        async with serving(engine) as manager:
            task = asyncio.create_task(collect(manager, request(1_000_000)))
            await until(lambda: bool(engine.steps))
            await manager.close()
            with pytest.raises(NotServing):
                await task
            assert engine.is_closed and manager.has_ended

    run(scenario())


def test_nothing_is_served_while_the_model_loads() -> None:
    async def scenario() -> None:
        may_load = threading.Event()
        engine = ScriptedEngine()

        def load(settings: Settings, progress: Progress) -> LoadedStack:
            progress("loading", 0.5)
            may_load.wait(10)
            return stack_of(engine, settings)

        manager = ModelManager(Settings(hf_model="m"), load)
        await manager.start()
        await asyncio.sleep(0.02)
        assert manager.state == "loading" and not manager.is_stalled
        for read in (lambda: manager.info, lambda: manager.prompts, lambda: manager.tokenizer):
            with pytest.raises(NotServing, match="loading"):
                read()
        with pytest.raises(NotServing, match="loading"), manager.admission():
            pass
        with pytest.raises(NotServing, match="loading"):
            await collect(manager, request())
        may_load.set()
        assert (await manager.wait_until_loaded()).name == "m"
        assert manager.info.name == "m"
        with manager.admission():  # it is ready
            pass
        await manager.close()

    run(scenario())


@pytest.mark.parametrize("error", [StartupError("does not fit"), RuntimeError("broken"), SystemExit(3)])
def test_a_failed_load_is_told_to_who_waits_for_it(error: BaseException) -> None:
    def load(settings: Settings, progress: Progress) -> LoadedStack:
        raise error

    async def scenario() -> None:
        manager = ModelManager(Settings(), load)
        await manager.start()
        with pytest.raises(type(error) if isinstance(error, Exception) else RuntimeError):
            await manager.wait_until_loaded()
        assert manager.state == "dead"
        await manager.close()
        assert manager.has_ended

    run(scenario())


def test_closing_while_loading_does_not_wait_for_the_load() -> None:
    may_load = threading.Event()

    def load(settings: Settings, progress: Progress) -> LoadedStack:
        may_load.wait(10)
        return stack_of(ScriptedEngine(), settings)

    async def scenario() -> None:
        manager = ModelManager(Settings(), load)
        await manager.start()
        await asyncio.wait_for(manager.close(), 1.0)
        assert not manager.has_ended
        assert manager.state == "draining"
        may_load.set()
        await manager.wait_until_loaded()
        assert manager.state == "draining"
        await until(lambda: manager.has_ended)

    run(scenario())


def test_a_step_that_never_ends_is_a_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_manager, "STALLED_AFTER_S", 0.05)

    async def scenario() -> None:
        engine = ScriptedEngine()
        async with serving(engine) as manager:
            engine.gate.clear()
            task = asyncio.create_task(collect(manager, request(1)))
            await until(lambda: manager.is_stalled)
            engine.gate.set()
            await task
            assert not manager.is_stalled
            await asyncio.sleep(0.1)
            assert not manager.is_stalled  # idle is not stalled

    run(scenario())
