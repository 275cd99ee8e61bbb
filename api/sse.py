"""Server-sent events: frames around data, pings while nothing is said, errors after the 200, the closing [DONE].

Knows nothing of what the data means.
Used by api/answers.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Generic, Protocol, TypeVar

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus, SendTimeoutError
from starlette.types import Message, Receive, Scope, Send

from api.errors import is_expected, wire_error

logger = logging.getLogger(__name__)

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)
# Proxies cut connections that are silent for 30 to 60 s.
PING_S = 10.0
# A reader that takes nothing for this long holds a place in the server that others wait for.
SEND_TIMEOUT_S = 120.0
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Framer(Protocol[T_contra]):
    """Makes frames of one kind of answer."""

    def frames(self, item: T_contra, /) -> bytes:
        """The frames of one item, ready to be sent; maybe none."""

    def last_frames(self) -> bytes:
        """What follows the last item, maybe nothing."""


def frame(data: bytes) -> bytes:
    """One event; JSON holds no raw line breaks."""
    return b"data: " + data + b"\n\n"


def text_frame(text: str) -> bytes:
    """One event of plain text: readers put its lines together again, but all line breaks become line feeds."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "".join(f"data: {line}\n" for line in lines).encode() + b"\n"


class EventStream(EventSourceResponse, Generic[T]):
    """The streamed answer of one request; owns its items and closes them however it ends.

    Args:
        first: the first item, maybe still on its way.
        items: those after it.
        framer: turns them into frames.
        headers: more headers.
    """

    def __init__(
        self,
        first: asyncio.Task[T],
        items: AsyncGenerator[T, None],
        framer: Framer[T],
        headers: Mapping[str, str],
    ) -> None:
        self._first = first
        self._items = items
        self._framer = framer
        self._sending_since_s: float | None = None
        super().__init__(
            self._events(),
            headers={**_HEADERS, **headers},
            ping=PING_S,
            ping_message_factory=self._ping_message,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            logger.warning("a stream was given up: its reader took nothing for %g s", SEND_TIMEOUT_S)
        finally:
            # A generator that was never begun does not run its own finally.
            await close(self._first, self._items)

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        """Sends one chunk, without a timer of its own: those cost a fifth of the time; pings look at the clock."""
        self._sending_since_s = time.monotonic()
        await send(message)
        self._sending_since_s = None

    def _ping_message(self) -> ServerSentEvent:
        since_s = self._sending_since_s
        if since_s is not None and time.monotonic() - since_s > SEND_TIMEOUT_S:
            raise SendTimeoutError
        return ServerSentEvent(comment="ping", sep="\n")

    async def _events(self) -> AsyncGenerator[bytes, None]:
        try:
            if not self._first.done():
                yield PING
            yield self._framer.frames(await self._first)
            async for item in self._items:
                yield self._framer.frames(item)
            yield self._framer.last_frames()
        except Exception as error:
            if not is_expected(error):
                logger.exception("a stream failed")
            yield frame(wire_error(error).json)
        yield DONE


async def close(first: asyncio.Task[T], items: AsyncGenerator[T, None]) -> None:
    """Ends what makes the items, whether or not the first has come; idempotent."""
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await items.aclose()


def leave_streams_to_the_drain() -> None:
    """Keeps sse-starlette from cutting all streams at SIGTERM: they may finish within --shutdown-timeout."""
    AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]
