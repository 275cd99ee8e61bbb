"""Serves a generation as one JSON body or as a stream, and gives up as soon as nobody is listening.

Knows nothing of chat or text completions: an Answer says what theirs look like.
Called by api/chat.py and api/completions.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Mapping
from collections.abc import Sequence as Series
from typing import Any, Protocol, TypeVar

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive

from api.generation import Choice, ChoiceDelta, fold, run
from api.sse import EventStream, Framer, close
from model_manager import ModelManager

T = TypeVar("T")
# How long the status line waits for the first delta: refusals and early failures then have their own status, not 200.
STATUS_WAIT_S = 1.0


class Answer(Framer, Protocol):
    """How an endpoint's answer looks, whole or in frames."""

    def whole(self, folded: list[ChoiceDelta]) -> dict[str, object]:
        """The body of an answer that is not streamed."""


async def respond(
    request: Request,
    manager: ModelManager,
    choices: Series[Choice],
    answer: Answer,
    *,
    is_streamed: bool,
    headers: Mapping[str, str],
) -> Response:
    """Runs the choices and answers.

    Raises:
        ServerError: the generation failed before anything was sent.
        ClientDisconnect: the client has gone; everything is freed.
    """
    deltas = run(manager, choices)
    if not is_streamed:
        folded = await _while_connected(request.receive, fold(deltas, len(choices)))
        return Response(orjson.dumps(answer.whole(folded)), headers=dict(headers), media_type="application/json")
    first = asyncio.create_task(_next(deltas))
    try:
        await _while_connected(request.receive, asyncio.wait((first,), timeout=STATUS_WAIT_S))
        if first.done():
            first.result()
    except BaseException:
        await close(first, deltas)
        raise
    return EventStream(first, deltas, answer, headers)


async def _next(deltas: AsyncGenerator[ChoiceDelta, None]) -> ChoiceDelta:
    return await anext(deltas)


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
