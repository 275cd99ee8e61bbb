"""Measures what the server itself costs: processor time per streamed token, with an engine that has nothing to compute.

Knows nothing of models; the server is a process of its own, so that its clients' work is not counted.
Run as `python benchmarks/wire_cost.py --streams 64 --tokens 500`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TEXT = "The quick brown fox jumps over the lazy dog. "


def serve(port: int, step_s: float, *, is_profiled: bool) -> None:
    """The server process: answers each line on its standard input with its processor time so far."""
    import threading

    import uvicorn

    from app import create_app
    from config import Settings
    from engine.sequence import SequenceOutput
    from model_manager import ModelManager
    from tests.api.scripted import ScriptedEngine, byte_tokenizer, says, stack

    class TimedEngine(ScriptedEngine):
        """Knows how much of the processor's time its thread has used, which is not the server's fault."""

        thread_s = 0.0

        def step(self) -> list[SequenceOutput]:
            outputs = super().step()
            self.thread_s = time.thread_time()
            return outputs

    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(TEXT, add_special_tokens=False) * 1000
    engine = TimedEngine(says(ids, None), step_s=step_s)
    settings = Settings(hf_model="scripted", max_concurrent=10_000)
    manager = ModelManager(settings, stack(engine, tokenizer, max_model_len=100_000))
    server = uvicorn.Server(
        # The loop that requirements.txt gives, whatever else is installed here.
        uvicorn.Config(
            create_app(settings, manager),
            loop="asyncio",
            host="127.0.0.1",
            port=port,
            log_config=None,
            access_log=False,
        )
    )

    def report() -> None:
        for _ in sys.stdin:
            print(time.process_time(), engine.thread_s, flush=True)
        server.should_exit = True

    threading.Thread(target=report, daemon=True).start()
    if is_profiled:
        import cProfile

        cProfile.runctx("server.run()", globals(), locals(), "wire_cost.prof")
    else:
        server.run()


async def stream(port: int, num_tokens: int) -> tuple[int, int]:
    """One client; returns how many frames with content and how many bytes it got."""
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": "Go"}],
            "stream": True,
            "max_tokens": num_tokens,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    data = b"".join([piece async for piece in _pieces(reader)])
    writer.close()
    if b"data: [DONE]" not in data:
        raise RuntimeError(data[:500].decode(errors="replace"))
    return data.count(b'"delta":{"content":"'), len(data)


async def _pieces(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while piece := await reader.read(2**16):
        yield piece


def main() -> None:
    """Starts the server, warms it up, measures, prints one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=500, help="per stream")
    parser.add_argument(
        "--step-ms", type=float, default=10.0, help="pace of the scripted engine; too fast merges tokens"
    )
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help="run the server under cProfile, into wire_cost.prof")
    args = parser.parse_args()
    if args.serve:
        serve(args.port, args.step_ms / 1000, is_profiled=args.profile)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = args.port or probe.getsockname()[1]
    command = [sys.executable, __file__, "--serve", "--port", str(port), "--step-ms", str(args.step_ms)]
    command += ["--profile"] if args.profile else []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        asyncio.run(_measure(args, port, server))


async def _measure(args: argparse.Namespace, port: int, server: subprocess.Popen[str]) -> None:
    assert server.stdin is not None and server.stdout is not None

    def processor_s() -> tuple[float, float]:
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write("\n")
        server.stdin.flush()
        whole, engine = server.stdout.readline().split()
        return float(whole), float(engine)

    for _ in range(600):
        try:
            await stream(port, 20)
            break
        except (OSError, RuntimeError):
            await asyncio.sleep(0.1)
    idle_s, _ = processor_s()
    await asyncio.sleep(1.0)
    idle_s = processor_s()[0] - idle_s
    before_s, engine_before_s = processor_s()
    start = time.monotonic()
    results = await asyncio.gather(*(stream(port, args.tokens) for _ in range(args.streams)))
    elapsed = time.monotonic() - start
    after_s, engine_after_s = processor_s()
    used_s, engine_s = after_s - before_s, engine_after_s - engine_before_s
    num_tokens = args.streams * args.tokens
    num_frames = sum(frames for frames, _ in results)
    print(
        f"{args.streams} streams x {args.tokens} tokens: {used_s / num_tokens * 1e6:.1f} us of processor time a token "
        f"({used_s / num_frames * 1e6:.1f} a frame, {num_frames / num_tokens:.3f} frames a token; "
        f"{engine_s / num_tokens * 1e6:.1f} of it the scripted engine's own thread), "
        f"{num_tokens / elapsed:.0f} tokens/s, {used_s / elapsed * 100:.0f} % of a core, idle {idle_s * 100:.2f} %"
    )
    server.stdin.close()


if __name__ == "__main__":
    main()
