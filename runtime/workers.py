"""Threads for work that would hold the event loop: decoding, spectrograms, word times.

Knows nothing of that work.
Owned by the transcriber.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Workers:
    """A few threads of one's own, so that a burst of uploads leaves the loop's to everyone else.

    Args:
        num_threads: how much is worked on at once; the rest waits in order.
    """

    def __init__(self, num_threads: int) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="speech")

    def share(self, max_running: int) -> WorkShare:
        """What one request may use: a recording of a hundred windows must not stand a hundred times in the queue."""
        return WorkShare(self._executor, max_running)

    def close(self) -> None:
        """Lets go of what waits; what runs ends by itself."""
        self._executor.shutdown(wait=False, cancel_futures=True)


class WorkShare:
    """One request's part of the threads; made by Workers."""

    def __init__(self, executor: ThreadPoolExecutor, max_running: int) -> None:
        self._executor = executor
        self._places = asyncio.Semaphore(max_running)

    async def run(self, work: Callable[[], T]) -> T:
        """The result of `work`, called on a thread; when cancelled, work that has not begun never will."""
        async with self._places:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
