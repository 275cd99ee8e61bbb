"""What every answer of one request has around its choices: id, time, model, usage; whole or as chunks of a stream.

Knows nothing of what is in a choice.
Used by api/chat.py and api/completions.py.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Mapping

import orjson

from api.sse import frame
from model_manager import ModelInfo


class Envelope:
    """The constant part of one request's answer.

    Args:
        id_prefix: `chatcmpl` or `cmpl`.
        model: as the request named it.
        kind: the `object` of a whole answer.
        chunk_kind: the `object` of a chunk.
        info: the model behind it.
        service_tier: under which the request is served.
        has_usage: whether chunks have a `usage` key (stream_options.include_usage).
    """

    def __init__(
        self,
        *,
        id_prefix: str,
        model: str,
        kind: str,
        chunk_kind: str,
        info: ModelInfo,
        service_tier: str,
        has_usage: bool,
    ) -> None:
        self._kind = kind
        self._fields: dict[str, object] = {
            "id": f"{id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": _fingerprint(info),
            "service_tier": service_tier,
        }
        self._has_usage = has_usage
        # All chunks of a request are alike but for their choice: the rest is serialised once, not once a token.
        head = orjson.dumps({"object": chunk_kind, **self._fields})
        self._head = head[:-1] + b',"choices":['
        self._tail = b'],"usage":null}' if has_usage else b"]}"

    def chunk(self, choice: Mapping[str, object]) -> bytes:
        """The frame of one chunk with one choice."""
        return frame(self._head + orjson.dumps(choice) + self._tail)

    def usage_chunk(self, usage: Mapping[str, object]) -> bytes:
        """The frame that follows all choices: usage where it was asked for, else nothing."""
        if not self._has_usage:
            return b""
        return frame(self._head + b'],"usage":' + orjson.dumps(usage) + b"}")

    def whole(self, choices: list[dict[str, object]], usage: Mapping[str, object]) -> dict[str, object]:
        """The body of an answer that is not streamed."""
        return {"object": self._kind, **self._fields, "choices": choices, "usage": usage}


def _fingerprint(info: ModelInfo) -> str:
    """Changes when the same seed may give other tokens: with the model, its number format, device or path."""
    parts = (info.name, info.architecture, info.dtype, info.device, info.lane)
    return "fp_" + hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:10]
