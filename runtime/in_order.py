"""Runs many coroutines a few at a time and gives their results in the order they were asked for.

Knows nothing of what they do.
Called by the transcriber.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def in_order(works: Iterable[Callable[[], Coroutine[Any, Any, T]]], max_running: int) -> AsyncGenerator[T, None]:
    """The results of `works`, first to last; a later one may be done long before it is given.

    Args:
        works: each is called when its turn comes.
        max_running: most that run at once.
    Raises:
        Whatever one of them raises, in its turn; closing the generator or an error cancels all others, and waits until
        they have ended.
    """
    places = asyncio.Semaphore(max_running)

    async def in_place(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        async with places:
            return await work()

    tasks = [asyncio.create_task(in_place(work)) for work in works]
    try:
        for task in tasks:
            yield await task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
