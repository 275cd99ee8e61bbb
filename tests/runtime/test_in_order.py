"""Many coroutines, a few at a time, results in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import pytest

from runtime.in_order import in_order


class Works:
    """Numbers that take a while, and who runs."""

    def __init__(self) -> None:
        self.running: set[int] = set()
        self.most_running = 0
        self.begun: list[int] = []

    async def number(self, number: int, delay_s: float) -> int:
        self.begun.append(number)
        self.running.add(number)
        self.most_running = max(self.most_running, len(self.running))
        try:
            await asyncio.sleep(delay_s)
            if number == 13:
                raise ValueError("thirteen")
            return number
        finally:
            self.running.discard(number)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


def works_of(works: Works, delays_s: list[float], first: int = 0) -> list[Callable[[], Coroutine[Any, Any, int]]]:
    return [partial(works.number, first + index, delay_s) for index, delay_s in enumerate(delays_s)]


def test_results_come_in_order_and_only_so_many_run() -> None:
    async def scenario() -> None:
        works = Works()
        delays_s = [0.02, 0.0, 0.01, 0.0, 0.005, 0.0]
        assert [n async for n in in_order(works_of(works, delays_s), 3)] == [0, 1, 2, 3, 4, 5]
        assert works.most_running == 3
        assert works.begun == [0, 1, 2, 3, 4, 5]

    run(scenario())


def test_those_behind_a_slow_one_go_on() -> None:
    async def scenario() -> None:
        works = Works()
        results = in_order(works_of(works, [0.2, 0.0, 0.0, 0.0, 0.0]), 2)
        first = asyncio.ensure_future(anext(results))
        while len(works.begun) < 5:
            await asyncio.sleep(0.001)
        assert not first.done()
        await first
        await results.aclose()

    run(scenario())


def test_an_error_comes_in_its_turn_and_ends_the_rest() -> None:
    async def scenario() -> None:
        works = Works()
        found = []
        with pytest.raises(ValueError, match="thirteen"):
            async for number in in_order(works_of(works, [0.01, 0.0, 60.0], first=12), 3):
                found.append(number)
        assert found == [12]
        assert not works.running and len(asyncio.all_tasks()) == 1

    run(scenario())


def test_closing_cancels_what_runs_and_never_begins_what_waits() -> None:
    async def scenario() -> None:
        works = Works()
        results = in_order(works_of(works, [0.0, 60.0, 60.0, 60.0]), 2)
        assert await anext(results) == 0
        await results.aclose()
        assert not works.running and len(asyncio.all_tasks()) == 1
        assert set(works.begun) <= {0, 1, 2}

    run(scenario())


def test_nothing_gives_nothing() -> None:
    async def scenario() -> None:
        nothing: list[Callable[[], Coroutine[Any, Any, int]]] = []
        assert [n async for n in in_order(nothing, 2)] == []

    run(scenario())
