"""Clients that hang up, mixed traffic and long prompts leave the server whole."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests import zoo
from tests.e2e.serving_tiny import TinyServer, serve_tiny

PATIENCE_S = 20.0


def _wait_until_empty(server: TinyServer) -> float:
    """Seconds until nobody runs or waits."""
    started = time.monotonic()
    while server.manager.num_admitted or server.manager.stats.num_running or server.manager.stats.num_waiting:
        assert time.monotonic() - started < PATIENCE_S, f"still held: {server.manager.stats}"
        time.sleep(0.02)
    return time.monotonic() - started


async def _hang_up(url: str, number: int, after_s: float) -> None:
    body = {
        "model": "model",
        "prompt": zoo.prompt(40 + number % 60, seed=number),
        "max_tokens": 100,
        "stream": number % 2 == 0,
        "n": 1 + number % 3,
        "ignore_eos": True,
    }
    limits = httpx.Timeout(after_s, connect=10.0, pool=10.0)
    async with httpx.AsyncClient(timeout=limits) as client:
        try:
            async with asyncio.timeout(after_s), client.stream("POST", f"{url}/v1/completions", json=body) as response:
                async for _ in response.aiter_bytes():
                    pass
        except (httpx.HTTPError, TimeoutError):
            pass


def _one_answer(url: str) -> httpx.Response:
    body = {"model": "model", "prompt": zoo.prompt(9), "max_tokens": 3, "temperature": 0}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=30)


def test_two_hundred_clients_that_hang_up_leave_nothing_behind(checkpoints: Path) -> None:
    process = psutil.Process()
    memory: list[int] = []
    with serve_tiny("qwen3", checkpoints, max_concurrent=64, continuous_batching_batch_size=16) as server:

        async def wave() -> None:
            await asyncio.gather(*(_hang_up(server.url, number, 0.5) for number in range(200)))

        for _ in range(3):
            asyncio.run(wave())
            assert _wait_until_empty(server) < PATIENCE_S
            assert _one_answer(server.url).status_code == 200
            memory.append(process.memory_info().rss)
        stack = server.manager._stack
        assert stack is not None
        _wait_until_empty(server)
        stack.engine.kv.check_integrity()  # type: ignore[attr-defined]
    # The first wave warms allocators up; after it nothing grows.
    assert memory[-1] < memory[0] * 1.25, memory


def _mixed_body(number: int, rng: random.Random) -> tuple[str, Any]:
    prompt = zoo.prompt(rng.randint(1, 60), seed=number)
    base: dict[str, Any] = {"model": "model", "prompt": prompt, "max_tokens": rng.randint(1, 12)}
    chat: dict[str, Any] = {"model": "model", "messages": [{"role": "user", "content": "hi" * rng.randint(1, 20)}]}
    return rng.choice(
        [
            ("completions", base),
            ("completions", {**base, "stream": True}),
            ("completions", {**base, "logprobs": 3, "echo": True}),
            ("completions", {**base, "temperature": -1}),
            ("completions", {**base, "prompt": [10**9]}),
            ("completions", {**base, "prompt": []}),
            ("completions", {**base, "prompt": zoo.prompt(400)}),
            ("completions", {**base, "model": "another"}),
            ("completions", {**base, "logit_bias": {"x": 1}}),
            ("chat/completions", {**chat, "max_tokens": 5}),
            ("chat/completions", {**chat, "max_tokens": 5, "stream": True, "n": 2}),
            ("chat/completions", {**chat, "max_tokens": 5, "tools": [{"type": "function"}]}),
            ("chat/completions", {**chat, "messages": "hello"}),
            ("chat/completions", "not json"),
            ("nowhere", base),
        ]
    )


def test_mixed_traffic_meets_no_unexpected_fault(checkpoints: Path) -> None:
    rng = random.Random(7)
    statuses: Counter[int] = Counter()
    with serve_tiny("llama", checkpoints, max_concurrent=40) as server:

        async def one(client: httpx.AsyncClient, number: int) -> None:
            path, body = _mixed_body(number, rng)
            content = body if isinstance(body, str) else json.dumps(body)
            limit_s = 0.05 if rng.random() < 0.15 else 60.0
            try:
                async with asyncio.timeout(limit_s):
                    headers = {"content-type": "application/json"}
                    answer = await client.post(f"{server.url}/v1/{path}", content=content, headers=headers)
            except (TimeoutError, httpx.HTTPError):
                statuses[0] += 1
                return
            statuses[answer.status_code] += 1
            if answer.status_code >= 400:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
                assert answer.json()["error"]["message"]

        async def run() -> None:
            limits = httpx.Limits(max_connections=50)
            async with httpx.AsyncClient(timeout=60, limits=limits) as client:
                for start in range(0, 2000, 50):
                    await asyncio.gather(*(one(client, number) for number in range(start, start + 50)))

        asyncio.run(run())
        _wait_until_empty(server)
        assert _one_answer(server.url).status_code == 200
    assert set(statuses) <= {0, 200, 400, 404, 429}, statuses
    assert statuses[200] > 300 and statuses[400] > 300


def test_health_answers_while_a_long_prompt_is_computed(checkpoints: Path) -> None:
    with serve_tiny("llama", checkpoints, max_positions=8192, max_model_len=8192, max_batch_tokens=4096) as server:
        body = {"model": "model", "prompt": zoo.prompt(4000), "max_tokens": 1, "temperature": 0}
        done = threading.Event()

        def prefill() -> None:
            for number in range(3):
                answer = httpx.post(
                    f"{server.url}/v1/completions", json={**body, "prompt": zoo.prompt(4000, seed=number)}, timeout=120
                )
                assert answer.status_code == 200
            done.set()

        thread = threading.Thread(target=prefill)
        delays: list[float] = []
        with httpx.Client() as client:
            client.get(f"{server.url}/health")
            thread.start()
            while not done.is_set() and len(delays) < 3000:
                started = time.perf_counter()
                assert client.get(f"{server.url}/health").status_code == 200
                delays.append(time.perf_counter() - started)
                time.sleep(0.005)
        thread.join(120)
        assert done.is_set()
    delays.sort()
    assert delays[int(0.99 * (len(delays) - 1))] < 0.1, delays[-5:]
