"""Around every request: its id and duration in the headers, a limit on its body, an answer to any exception.

Knows nothing of routes. Plain ASGI: BaseHTTPMiddleware would cost a task and a queue for every streamed chunk.
Installed by app.py.
"""

from __future__ import annotations

import logging
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import BodyTooLarge, wire_error

logger = logging.getLogger(__name__)

MAX_REQUEST_ID = 128


class RequestContext:
    """Gives responses `x-request-id` and `openai-processing-ms`; an unexpected exception becomes a 500 with both."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrival_s = time.monotonic()
        request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        state = scope.setdefault("state", {})
        state["request_id"], state["arrival_s"] = request_id, arrival_s
        has_started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["openai-processing-ms"] = str(round((time.monotonic() - arrival_s) * 1000))
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            if has_started:
                raise
            logger.exception("request %s: %s %s failed", request_id, scope["method"], scope["path"])
            await wire_error(error).response()(scope, receive, send_with_headers)


def _request_id(given: str | None) -> str:
    """The caller's own id, when it can stand in a header and a log line; else a new one."""
    if given and len(given) <= MAX_REQUEST_ID and given.isascii() and given.isprintable():
        return given
    return f"req_{uuid.uuid4().hex}"


class BodyLimit:
    """Ends a request whose body grows beyond the limit, counted while reading: Content-Length may lie or be absent."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        num_bytes = 0

        async def receive_within_limit() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > self._max_bytes:
                    raise BodyTooLarge(f"the body has more than {self._max_bytes} bytes (--max-body-size)")
            return message

        await self._app(scope, receive_within_limit, send)
