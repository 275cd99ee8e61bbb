"""One streamed completion over a bare asyncio connection, with the arrival time of every piece of text.

Knows nothing of scenarios or statistics; httpx would cost more per event than some servers spend on a token.
Called by benchmarks/serve.py.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


class RequestFailed(Exception):
    """The server answered with an error, or the stream ended without a finish reason."""


@dataclass(frozen=True, slots=True)
class StreamResult:
    """What one streamed request saw; times are of time.perf_counter().

    Args:
        sent_s: when the request was written.
        text_times_s: when each event with text arrived. Servers may put several tokens into one event.
        finished_s: when the stream ended.
        num_output_tokens: the usage's count, or without one the number of events with text.
        num_prompt_tokens, num_cached_tokens: the usage's counts, None when it has none.
    """

    sent_s: float
    text_times_s: tuple[float, ...]
    finished_s: float
    num_output_tokens: int
    num_prompt_tokens: int | None
    num_cached_tokens: int | None

    @property
    def ttft_s(self) -> float:
        """Time to first text."""
        return self.text_times_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Times between events with text."""
        return [b - a for a, b in zip(self.text_times_s, self.text_times_s[1:], strict=False)]


@dataclass(slots=True)
class _Fold:
    """What the events of a stream say, folded as they arrive."""

    on_text: Callable[[], None] | None
    times: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    is_finished: bool = False

    def push(self, event: dict[str, Any], now_s: float) -> None:
        if "error" in event:
            raise RequestFailed(str(event["error"]))
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices", ()):
            if choice.get("text") or (choice.get("delta") or {}).get("content"):
                self.times.append(now_s)
                if self.on_text is not None:
                    self.on_text()
            self.is_finished = self.is_finished or choice.get("finish_reason") is not None


async def stream_completion(
    base_url: str, body: dict[str, Any], *, api_key: str = "none", on_text: Callable[[], None] | None = None
) -> StreamResult:
    """POST `body` as a streamed completion (chat when it has `messages`) and read it to the end.

    Raises:
        RequestFailed: an error status, an error event, or no text at all.
        OSError: the connection failed.
    """
    path = "/chat/completions" if "messages" in body else "/completions"
    content = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    fold = _Fold(on_text)
    reader, writer = await _connect(base_url)
    try:
        sent_s = time.perf_counter()
        writer.write(_request_head("POST", base_url + path, api_key, len(content)) + content)
        status, headers = await _read_head(reader)
        if status != 200:
            raise RequestFailed(f"{status}: {(await reader.read(2000)).decode(errors='replace')}")
        async for data, now_s in _events(_body_pieces(reader, headers)):
            if data != b"[DONE]":
                fold.push(json.loads(data), now_s)
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
    if not fold.times or not fold.is_finished:
        raise RequestFailed(f"the stream ended after {len(fold.times)} events with text")
    details = fold.usage.get("prompt_tokens_details") or {}
    return StreamResult(
        sent_s=sent_s,
        text_times_s=tuple(fold.times),
        finished_s=time.perf_counter(),
        num_output_tokens=fold.usage.get("completion_tokens") or len(fold.times),
        num_prompt_tokens=fold.usage.get("prompt_tokens"),
        num_cached_tokens=details.get("cached_tokens"),
    )


async def _connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None:
        raise ValueError(f"only http:// addresses can be measured, not {url}")
    return await asyncio.open_connection(parts.hostname, parts.port or 80)


def _request_head(method: str, url: str, api_key: str, num_bytes: int) -> bytes:
    parts = urlsplit(url)
    lines = [
        f"{method} {parts.path or '/'} HTTP/1.1",
        f"Host: {parts.netloc}",
        f"Authorization: Bearer {api_key}",
        "Content-Type: application/json",
        f"Content-Length: {num_bytes}",
        "Connection: close",
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in head[1:] if ": " in line)
    return int(head[0].split(" ")[1]), headers


async def _body_pieces(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding") != "chunked":
        while piece := await reader.read(65_536):
            yield piece
        return
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[tuple[bytes, float]]:
    """The data of each server-sent event, and when its last byte came."""
    rest = b""
    async for piece in pieces:
        now_s = time.perf_counter()
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip(), now_s
