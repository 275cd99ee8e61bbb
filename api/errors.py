"""Every way a request can fail, as the status, headers and body that OpenAI's clients understand.

Knows nothing of how requests are served; the errors themselves are in engine/errors.py.
Used by app.py (exception handlers), api/middleware.py and api/sse.py (error frames).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from audio.errors import AudioError, AudioTooLong
from engine.errors import (
    CallerError,
    ContextLengthExceeded,
    InternalError,
    NotServing,
    OperatorError,
    QueueFull,
    QueueTimeout,
    RequestTimeout,
    ServerError,
    UnsupportedParameter,
)
from text.errors import PromptError, PromptTooLong

# What 503 says when nobody knows how long it will last.
RETRY_AFTER_S = 5.0
# The field of a form that brings the audio.
AUDIO_FIELD = "file"
# Longest stretch of a caller's own value that a message repeats.
MAX_SHOWN = 80


class InvalidKey(CallerError):
    """The request carries no key, or none of --api-key."""


class ModelNotFound(CallerError):
    """The request names a model that is not the one served."""


class BodyTooLarge(CallerError):
    """The body exceeds --max-body-size, or an upload --max-audio-size."""


class WrongMediaType(CallerError):
    """The Content-Type is not the endpoint's: browsers send bodies that are not JSON anywhere without asking."""


class WrongFamily(CallerError):
    """The endpoint is not for models of this family: it transcribes, or the model does."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """How one class of errors looks on the wire."""

    error: type[Exception]
    status: int
    type: str
    code: str
    should_retry: bool = False


# The first that fits counts: subclasses before their bases.
_KINDS = (
    _Kind(InvalidKey, 401, "invalid_request_error", "invalid_api_key"),
    _Kind(ModelNotFound, 404, "invalid_request_error", "model_not_found"),
    _Kind(WrongFamily, 404, "invalid_request_error", "unsupported_model"),
    _Kind(BodyTooLarge, 413, "invalid_request_error", "request_too_large"),
    _Kind(WrongMediaType, 415, "invalid_request_error", "unsupported_media_type"),
    _Kind(ContextLengthExceeded, 400, "invalid_request_error", "context_length_exceeded"),
    _Kind(UnsupportedParameter, 400, "invalid_request_error", "unsupported_parameter"),
    _Kind(CallerError, 400, "invalid_request_error", "invalid_request_error"),
    _Kind(PromptTooLong, 400, "invalid_request_error", "context_length_exceeded"),
    _Kind(PromptError, 400, "invalid_request_error", "invalid_request_error"),
    _Kind(AudioTooLong, 413, "invalid_request_error", "audio_too_long"),
    _Kind(AudioError, 400, "invalid_request_error", "invalid_request_error"),
    _Kind(QueueFull, 429, "rate_limit_error", "rate_limit_exceeded", should_retry=True),
    _Kind(QueueTimeout, 503, "server_error", "overloaded", should_retry=True),
    # It would run into the same limit again.
    _Kind(RequestTimeout, 503, "server_error", "request_timeout"),
    _Kind(NotServing, 503, "server_error", "unavailable", should_retry=True),
    _Kind(OperatorError, 503, "server_error", "overloaded", should_retry=True),
    _Kind(InternalError, 500, "server_error", "server_error"),
    _Kind(Exception, 500, "server_error", "server_error"),
)
_STATUS_CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 429: "rate_limit_exceeded"}


@dataclass(frozen=True, slots=True)
class WireError:
    """An error as it goes out: `body` is the JSON object of the `error` key."""

    status: int
    body: Mapping[str, str | None]
    headers: Mapping[str, str]

    @property
    def json(self) -> bytes:
        """The whole body; also the data of an error frame."""
        return orjson.dumps({"error": dict(self.body)})

    def response(self) -> Response:
        """As the answer to a request."""
        return Response(self.json, self.status, dict(self.headers), media_type="application/json")


def is_expected(error: Exception) -> bool:
    """Whether it was raised on purpose, with a message for the caller; anything else is for the log."""
    return isinstance(error, ServerError | PromptError | AudioError)


def wire_error(error: Exception) -> WireError:
    """How an error looks on the wire; exceptions nobody meant show none of their insides."""
    if isinstance(error, HTTPException):
        return _from_status(error)
    if isinstance(error, RequestValidationError):
        return wire_error(_first_mistake(error.errors()))
    kind = next(kind for kind in _KINDS if isinstance(error, kind.error))
    is_known = is_expected(error)
    message = str(error) if is_known else "the server failed to handle this request; its log says why"
    param = getattr(error, "param", None) if is_known else None
    if isinstance(error, AudioError):
        param = AUDIO_FIELD
    headers = {"x-should-retry": "true" if kind.should_retry else "false"}
    if kind.status == 401:
        headers["www-authenticate"] = "Bearer"
    if kind.should_retry:
        retry_after_s = getattr(error, "retry_after_s", None)
        retry_after_s = RETRY_AFTER_S if retry_after_s is None else max(retry_after_s, 0.0)
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
        headers["retry-after-ms"] = str(max(1, math.ceil(retry_after_s * 1000)))
    return WireError(kind.status, _body(message, kind.type, param, kind.code), headers)


def _body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, str | None]:
    return {"message": message, "type": kind, "param": param, "code": code}


def _from_status(error: HTTPException) -> WireError:
    """An error of the framework's own, such as an unknown path or method."""
    is_ours = error.status_code >= 500
    body = _body(
        str(error.detail),
        "server_error" if is_ours else "invalid_request_error",
        None,
        "server_error" if is_ours else _STATUS_CODES.get(error.status_code, "invalid_request_error"),
    )
    return WireError(error.status_code, body, {**(error.headers or {}), "x-should-retry": "false"})


def from_validation(error: ValidationError) -> CallerError:
    """The first mistake of a body that does not fit its wire model, as field, value and rule."""
    return _first_mistake(error.errors(include_url=False))


def _first_mistake(mistakes: Any) -> CallerError:
    first = mistakes[0]
    # Tags of unions begin with a bar, and FastAPI says `body` first: neither is a field.
    path = [part for part in first["loc"] if not str(part).startswith("|") and part not in ("body", "[key]")]
    names = (f"[{part}]" if isinstance(part, int) else f".{part[:MAX_SHOWN]}" for part in path)
    param = "".join(names).removeprefix(".") or None
    rule = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("json_invalid", "missing") or param is None:
        where = "the body" if param is None else param
        return CallerError(f"{where}: {rule}", param=param)
    return CallerError(f"{param} is {shown(first['input'])}: {rule}", param=param)


def shown(value: object) -> str:
    """A value of the caller's for a message: as JSON, and not all of it when it is long."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, str | list) and len(value) > MAX_SHOWN:
        value = value[:MAX_SHOWN]
    try:
        text = orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"
