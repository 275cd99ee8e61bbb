"""Serves what a request makes, item by item, as one body or as a stream; gives up as soon as nobody is listening.

Knows nothing of completions or transcriptions: an Answer says what theirs look like.
Called by api/chat.py, api/completions.py and api/audio.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive

from api.sse import EventStream, Framer, close

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)
# How long the status line waits for the first item: refusals and early failures then have their own status, not 200.
STATUS_WAIT_S = 1.0


class Answer(Framer[T_contra], Protocol[T_contra]):
    """How an endpoint's answer looks, whole or in frames."""

    @property
    def media_type(self) -> str:
        """Of an answer that is not streamed."""

    async def whole(self, items: AsyncGenerator[T_contra, None], /) -> bytes:
        """The body of an answer that is not streamed, from all items; closes them."""


async def respond(
    request: Request,
    items: AsyncGenerator[T, None],
    answer: Answer[T],
    *,
    is_streamed: bool,
    headers: Mapping[str, str],
) -> Response:
    """Runs what makes the items, and answers.

    Args:
        request: whose body has been read.
        items: not begun; closing them frees everything.
        answer: how they look.
        is_streamed: whether each is sent as soon as it is there.
        headers: more headers.
    Raises:
        ServerError: it failed before anything was sent.
        ClientDisconnect: the client has gone; everything is freed.
    """
    if not is_streamed:
        body = await _while_connected(request.receive, answer.whole(items))
        return Response(body, headers=dict(headers), media_type=answer.media_type)
    first = asyncio.create_task(_next(items))
    try:
        await _while_connected(request.receive, asyncio.wait((first,), timeout=STATUS_WAIT_S))
        if first.done():
            first.result()
    except BaseException:
        await close(first, items)
        raise
    return EventStream(first, items, answer, headers)


async def _next(items: AsyncGenerator[T, None]) -> T:
    return await anext(items)


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, unless the client goes first: then it is cancelled and ClientDisconnect raised."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has gone; only for requests whose body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
