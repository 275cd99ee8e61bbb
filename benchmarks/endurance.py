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
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).parent.parent
HANG_UP_AFTER_S = 0.5
IDLE_S = 20.0
MEBI = 2**20


@dataclass(slots=True)
class Findings:
    """What was measured; memory in MiB of resident set, times in seconds."""

    ready_s: float = 0.0
    idle_rss_mib: float = 0.0
    idle_cpu_percent: float = 0.0
    rss_mib_after_wave: list[float] = field(default_factory=list)
    answer_s_after_wave: list[float] = field(default_factory=list)
    num_running_at_end: float = 0.0
    kv_usage_ratio_at_end: float = 0.0


@contextlib.contextmanager
def serve(options: list[str]) -> Iterator[tuple[psutil.Process, str, float]]:
    """A server of this project: its process, its URL and the seconds until it was ready."""
    started = time.monotonic()
    command = [sys.executable, "main.py", "--host", "127.0.0.1", "--port", "0", *options]
    log = Path("/dev/null")
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            found = re.search(r"ready: .*(http://\S+)/v1", line)
            if found:
                break
        else:
            raise SystemExit(f"the server did not start: exit code {process.wait()}")
        ready_s = time.monotonic() - started
        with log.open("w") as nowhere:
            drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=nowhere)
            try:
                yield psutil.Process(process.pid), found[1], ready_s
            finally:
                process.terminate()
                process.wait(60)
                drain.wait(10)


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
        async with (
            asyncio.timeout(HANG_UP_AFTER_S),
            client.stream("POST", f"{url}/v1/completions", json=body) as answer,
        ):
            async for _ in answer.aiter_bytes():
                pass


async def _wave(url: str, num_clients: int, rng: random.Random) -> float:
    """One wave of clients that leave; seconds until the next request is answered."""
    limits = httpx.Limits(max_connections=num_clients)
    async with httpx.AsyncClient(limits=limits, timeout=60) as client:
        await asyncio.gather(*(_hang_up(client, url, rng) for _ in range(num_clients)))
    started = time.monotonic()
    async with httpx.AsyncClient(timeout=60) as client:
        body = {"model": "model", "prompt": "And now?", "max_tokens": 1}
        answer = await client.post(f"{url}/v1/completions", json=body)
        answer.raise_for_status()
    return time.monotonic() - started


def _metric(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    return sum(float(value) for value in re.findall(rf"^transformers_openai:{name}(?:{{[^}}]*}})? (\S+)", text, re.M))


def measure(options: list[str], num_waves: int, num_clients: int) -> Findings:
    """Start a server, leave it alone, then send the waves."""
    findings = Findings()
    rng = random.Random(0)
    with serve(options) as (process, url, findings.ready_s):
        time.sleep(IDLE_S / 2)
        process.cpu_percent()
        time.sleep(IDLE_S)
        findings.idle_cpu_percent = process.cpu_percent()
        findings.idle_rss_mib = process.memory_info().rss / MEBI
        for _ in range(num_waves):
            findings.answer_s_after_wave.append(asyncio.run(_wave(url, num_clients, rng)))
            findings.rss_mib_after_wave.append(process.memory_info().rss / MEBI)
        time.sleep(3)
        findings.num_running_at_end = _metric(url, "num_requests_running") + _metric(url, "num_requests_waiting")
        findings.kv_usage_ratio_at_end = _metric(url, "kv_cache_usage_ratio")
    return findings


def main() -> None:
    """Measure and print, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="directory of a model")
    parser.add_argument("--waves", type=int, default=50)
    parser.add_argument("--clients", type=int, default=200, help="of each wave")
    parser.add_argument("options", nargs="*", help="more options of the server, after --")
    asked = parser.parse_args()
    findings = measure(["--hf-model", asked.model, *asked.options], asked.waves, asked.clients)
    print(json.dumps(asdict(findings), indent=1))


if __name__ == "__main__":
    main()
