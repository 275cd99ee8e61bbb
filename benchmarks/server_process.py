"""Starts a server as a child process, waits until it answers, watches its memory and CPU, and ends it.

Knows nothing of what is measured over HTTP; memory and CPU are read from /proc, so they are None but on Linux.
Called by benchmarks/compare.py and its like.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.sse_client import RequestFailed, stream_completion

# Asks a server at this base URL for something of this model; raises OSError or RequestFailed while it cannot answer.
Probe = Callable[[str, str], Awaitable[None]]
START_TIMEOUT_S = 600
# Share of a core; some servers poll when nobody asks anything.
IDLE_SHARE = 0.2
END_TIMEOUT_S = 20


class ServerFailed(Exception):
    """The server ended or never answered; the message says where its log is."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers completions."""

    base_url: str
    pid: int
    startup_s: float

    def memory_bytes(self) -> tuple[int, int] | None:
        """Resident memory of the process and its children: now, and at most so far."""
        now = peak = 0
        for pid in _tree(self.pid):
            lines = _proc(pid, "status").splitlines()
            fields = {key: value for key, _, value in (line.partition(":") for line in lines)}
            now += int(fields.get("VmRSS", "0").split()[0]) * 1024
            peak += int(fields.get("VmHWM", "0").split()[0]) * 1024
        return (now, peak) if now else None

    async def idle_cpu_share(self, duration_s: float = 5.0) -> float | None:
        """Share of one core that it uses while nobody asks anything."""
        before = self._cpu_s()
        await asyncio.sleep(duration_s)
        after = self._cpu_s()
        return None if before is None or after is None else (after - before) / duration_s

    async def until_idle(self, max_wait_s: float) -> None:
        """Wait while it or its children still prepare something, such as compiled code, but no longer than asked."""
        deadline_s = time.perf_counter() + max_wait_s
        while time.perf_counter() < deadline_s:
            share = await self.idle_cpu_share(duration_s=3.0)
            if share is None or share < IDLE_SHARE:
                return

    def _cpu_s(self) -> float | None:
        stats = [_proc(pid, "stat").rpartition(")")[2].split() for pid in _tree(self.pid)]
        # Of its own and of the children that it has waited for: one that ends takes nothing back.
        ticks = [sum(int(field) for field in fields[11:15]) for fields in stats if fields]
        return sum(ticks) / os.sysconf("SC_CLK_TCK") if ticks else None


@asynccontextmanager
async def running_server(
    command: str, model: Path, log: Path, num_threads: int | None, probe: Probe | None = None
) -> AsyncIterator[Server]:
    """Run `command`, with {model} and {port} filled in, until the block ends; torch gets `num_threads` where given.

    Raises:
        ServerFailed: it did not answer `probe` in time.
    """
    port = _free_port()
    argv = shlex.split(command.format(model=model, port=port))
    base_url = f"http://127.0.0.1:{port}/v1"
    with log.open("wb") as output:
        process = _start(argv, output, num_threads)
        started_s = time.perf_counter()
        try:
            await _until_it_answers(process, lambda: (probe or complete)(base_url, str(model)), log)
            yield Server(base_url, process.pid, time.perf_counter() - started_s)
        finally:
            await asyncio.to_thread(_end, process)


def _start(argv: list[str], output: IO[bytes], num_threads: int | None) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    # A session of its own, so that its workers can be ended with it.
    return subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment)


async def complete(base_url: str, model: str) -> None:
    """Ask for a completion, not for /models: some servers load at the first request, some list only a hub's cache."""
    await stream_completion(base_url, {"model": model, "prompt": "Hello", "max_tokens": 2, "temperature": 0})


async def _until_it_answers(process: subprocess.Popen[bytes], probe: Callable[[], Awaitable[None]], log: Path) -> None:
    deadline_s = time.perf_counter() + START_TIMEOUT_S
    while time.perf_counter() < deadline_s:
        if process.poll() is not None:
            raise ServerFailed(f"the server ended with exit code {process.returncode}; see {log}")
        try:
            await probe()
            return
        except (OSError, RequestFailed, asyncio.IncompleteReadError):
            pass  # not listening or still loading
        await asyncio.sleep(0.5)
    raise ServerFailed(f"the server did not answer within {START_TIMEOUT_S} s; see {log}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _tree(pid: int) -> list[int]:
    """A process and its descendants; a child is listed with the thread that started it."""
    children = [int(child) for thread in _threads(pid) for child in _proc(pid, f"task/{thread}/children").split()]
    return [pid, *(descendant for child in children for descendant in _tree(child))]


def _threads(pid: int) -> list[str]:
    try:
        return [path.name for path in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return []


def _proc(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8")
    except OSError:
        return ""
