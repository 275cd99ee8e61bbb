"""Who is in the server: a bounded number of requests, and when to come back for those who find it full.

Knows nothing of what requests are; lives on the event loop only.
Owned by model_manager.py; api/deps.py has one more, for uploads that are being read.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Iterator

from engine.errors import QueueFull

_MIN_RETRY_S = 1.0
# A client told to stay away for longer than this would rather go elsewhere.
_MAX_RETRY_S = 60.0


class Admission:
    """Counts requests in and out; from how fast they left of late it knows when a place will be free.

    Args:
        max_concurrent: most at once.
        what: they are and do, for those who find no place.
    """

    def __init__(self, max_concurrent: int, what: str = "requests are in the server") -> None:
        self._max_concurrent = max_concurrent
        self._what = what
        self._num_inside = 0
        self._nobody_inside = asyncio.Event()
        self._nobody_inside.set()
        self._departures_s: deque[float] = deque(maxlen=32)
        self._num_refused = 0  # of late; they may all be waiting for the next places

    @property
    def num_inside(self) -> int:
        """Requests in the server."""
        return self._num_inside

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Holds one request's place; raises QueueFull when there is none."""
        if self._num_inside >= self._max_concurrent:
            raise QueueFull(
                f"{self._num_inside} {self._what}, as many as --max-concurrent allows",
                retry_after_s=self._retry_after_s(time.monotonic()),
            )
        self._num_inside += 1
        self._nobody_inside.clear()
        try:
            yield
        finally:
            self._num_inside -= 1
            self._departures_s.append(time.monotonic())
            self._num_refused = max(0, self._num_refused - 1)
            if self._num_inside == 0:
                self._nobody_inside.set()

    async def wait_until_empty(self, timeout_s: float) -> bool:
        """Waits for the last request to leave; returns whether it did in time."""
        if self._num_inside == 0:  # wait_for would not even look when the timeout is 0
            return True
        try:
            await asyncio.wait_for(self._nobody_inside.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def _retry_after_s(self, now_s: float) -> float:
        """The k-th caller turned away is sent to the k-th departure, so that not all come back at once."""
        self._num_refused += 1
        if not self._departures_s:
            return _MIN_RETRY_S
        # Measured up to now, not to the latest departure: when nobody leaves any more, the estimate must grow.
        interval_s = (now_s - self._departures_s[0]) / len(self._departures_s)
        return min(max(self._num_refused * interval_s, _MIN_RETRY_S), _MAX_RETRY_S)
