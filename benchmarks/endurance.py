"""What a server costs at rest, and what it keeps of clients that hang up: start, memory, idle CPU, waves of hang-ups.

Knows nothing of the server but its process and its HTTP routes.
Run by hand: python -m benchmarks.endurance --model DIR [--waves 50] [-- server options]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

from benchmarks.server_process import Server, running_server

HANG_UP_AFTER_S = 0.5
SETTLE_S = 12.0  # an engine gives memory back after 10 s without work
IDLE_S = 20.0
MEBI = 2**20


@dataclass(slots=True)
class Findings:
    """What was measured; memory in MiB of resident set, times in seconds."""

    first_answer_s: float = 0.0
    idle_rss_mib: float = 0.0
    idle_core_share: float = 0.0
    rss_mib_after_wave: list[float] = field(default_factory=list)
    answer_s_after_wave: list[float] = field(default_factory=list)
    num_requests_at_end: float = 0.0
    rss_mib_at_end: float = 0.0
    kv_usage_ratio_at_end: float = 0.0


async def _hang_up(client: httpx.AsyncClient, url: str, rng: random.Random) -> None:
    body = {
        "model": "model",
        "prompt": "".join(rng.choices("abcdefgh ", k=rng.randint(20, 400))),
        "max_tokens": 400,
        "stream": rng.random() < 0.5,
        "n": rng.randint(1, 3),
        "ignore_eos": True,
    }
    with contextlib.suppress(TimeoutError, httpx.HTTPError):
        async with asyncio.timeout(HANG_UP_AFTER_S), client.stream("POST", f"{url}/completions", json=body) as answer:
            async for _ in answer.aiter_bytes():
                pass


async def _wave(url: str, num_clients: int, rng: random.Random) -> float:
    """One wave of clients that leave; seconds until the next request is answered."""
    limits = httpx.Limits(max_connections=num_clients)
    async with httpx.AsyncClient(limits=limits, timeout=60) as client:
        await asyncio.gather(*(_hang_up(client, url, rng) for _ in range(num_clients)))
        started = time.monotonic()
        body = {"model": "model", "prompt": "And now?", "max_tokens": 1}
        # As the SDK does: a server still full of those who have just left says when to come again.
        while (
            answer := await client.post(f"{url}/completions", json=body)
        ).status_code == httpx.codes.TOO_MANY_REQUESTS:
            await asyncio.sleep(0.1)
        answer.raise_for_status()
    return time.monotonic() - started


def _metric(text: str, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^transformers_openai:{name}(?:{{[^}}]*}})? (\S+)", text, re.M))


def _rss_mib(server: Server) -> float:
    memory = server.memory_bytes()
    return float("nan") if memory is None else memory[0] / MEBI


async def measure(model: Path, options: list[str], num_waves: int, num_clients: int) -> Findings:
    """Start a server, leave it alone, then send the waves."""
    findings = Findings()
    rng = random.Random(0)
    command = " ".join([sys.executable, "main.py --host 127.0.0.1 --hf-model {model} --port {port}", *options])
    log = Path(tempfile.mkdtemp()) / "server.log"
    async with running_server(command, model, log, None) as server:
        url = server.base_url
        findings.first_answer_s = server.startup_s
        await asyncio.sleep(SETTLE_S)
        findings.idle_core_share = await server.idle_cpu_share(IDLE_S) or 0.0
        findings.idle_rss_mib = _rss_mib(server)
        for _ in range(num_waves):
            findings.answer_s_after_wave.append(await _wave(url, num_clients, rng))
            findings.rss_mib_after_wave.append(_rss_mib(server))
        await asyncio.sleep(SETTLE_S)
        metrics = httpx.get(f"{url}/metrics").text
        findings.num_requests_at_end = _metric(metrics, "num_requests_running") + _metric(
            metrics, "num_requests_waiting"
        )
        findings.kv_usage_ratio_at_end = _metric(metrics, "kv_cache_usage_ratio")
        findings.rss_mib_at_end = _rss_mib(server)
    return findings


def main() -> None:
    """Measure and print, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of a model")
    parser.add_argument("--waves", type=int, default=50)
    parser.add_argument("--clients", type=int, default=200, help="of each wave")
    parser.add_argument("options", nargs="*", help="more options of the server, after --")
    asked = parser.parse_args()
    findings = asyncio.run(measure(asked.model, asked.options, asked.waves, asked.clients))
    print(json.dumps(asdict(findings), indent=1))


if __name__ == "__main__":
    main()
