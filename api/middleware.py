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
from api.multipart import MAX_FIELD_BYTES, MEDIA_TYPE

logger = logging.getLogger(__name__)

MAX_REQUEST_ID = 128
# int() refuses thousands of digits with an exception of its own.
_MAX_DIGITS = 18


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
    """Ends a request whose body is beyond the limit: as Content-Length says, and counted, as that may lie or be absent.

    Args:
        max_bytes: of a body (--max-body-size).
        max_upload_bytes: of a form (--max-audio-size); only the routes that take uploads read forms.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_upload_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_form_bytes = max_upload_bytes + MAX_FIELD_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limit, option = self._max_bytes, "--max-body-size"
        if headers.get("content-type", "").lower().startswith(MEDIA_TYPE):
            limit, option = self._max_form_bytes, f"--max-audio-size, and {MAX_FIELD_BYTES} for other fields"
        announced = headers.get("content-length", "")
        is_announced = announced.isdecimal() and (len(announced) > _MAX_DIGITS or int(announced) > limit)
        num_bytes = 0

        async def receive_within_limit() -> Message:
            nonlocal num_bytes
            if is_announced:  # before anything is read: a client that waits for 100 Continue then sends nothing
                raise _too_large(limit, option)
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > limit:
                    raise _too_large(limit, option)
            return message

        await self._app(scope, receive_within_limit, send)


def _too_large(limit: int, option: str) -> BodyTooLarge:
    return BodyTooLarge(f"the body has more than {limit} bytes ({option})")
