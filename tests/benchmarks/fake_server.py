"""A server that answers completions with a fixed rhythm, run in the test's own event loop or as a process.

Knows nothing of models; says one word an event and counts tokens as it is told.
Called by tests of the load generator.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import suppress


class FakeServer:
    """Answers every POST with `max_tokens` events of text, after `first_s` and then `gap_s` apart.

    Args:
        bytes_per_write: frames are cut into pieces of this size, wherever that falls.
        failing: which requests, counted from 0, are answered with 503.
    """

    def __init__(
        self,
        *,
        first_s: float = 0.0,
        gap_s: float = 0.0,
        bytes_per_write: int = 10_000,
        failing: frozenset[int] = frozenset(),
    ) -> None:
        self.first_s, self.gap_s, self.bytes_per_write, self.failing = first_s, gap_s, bytes_per_write, failing
        self.bodies: list[dict[str, object]] = []
        self.base_url = ""

    async def start(self, port: int = 0) -> asyncio.Server:
        """Listen on the loopback address."""
        server = await asyncio.start_server(self._answer, "127.0.0.1", port)
        self.base_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        return server

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._answer_one(reader, writer)
        except ConnectionError:
            pass  # the client went away
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        size = int(head.split("content-length: ")[1].split("\r\n")[0])
        body = json.loads(await reader.readexactly(size))
        status = 503 if len(self.bodies) in self.failing else 200
        self.bodies.append(body)
        writer.write(f"HTTP/1.1 {status} X\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        await asyncio.sleep(self.first_s)
        for index in range(body["max_tokens"]):
            await self._frame(writer, {"choices": [{"index": 0, "text": f" w{index}", "finish_reason": None}]})
            await asyncio.sleep(self.gap_s)
        usage = {"prompt_tokens": len(body["prompt"].split()), "completion_tokens": body["max_tokens"]}
        await self._frame(writer, {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        await self._frame(writer, {"choices": [], "usage": usage})
        await self._frame(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")

    async def _frame(self, writer: asyncio.StreamWriter, data: object) -> None:
        content = data if isinstance(data, str) else json.dumps(data)
        frame = f"data: {content}\r\n\r\n".encode()
        for start in range(0, len(frame), self.bytes_per_write):
            piece = frame[start : start + self.bytes_per_write]
            writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        await writer.drain()


async def _main(port: int) -> None:
    async with await FakeServer(gap_s=0.001).start(port) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1])))
