"""The loads a server is put under, and what is measured in each.

Knows nothing of which server answers, or of processes; requests are greedy completions of a fixed length.
Called by benchmarks/serve.py and benchmarks/compare.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.prompts import PromptSource
from benchmarks.report import percentile
from benchmarks.sse_client import RequestFailed, StreamResult, stream_completion

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """A server and how to ask it.

    Args:
        base_url: up to and with /v1.
        model: the name it serves under.
        prompts: where prompts come from.
        is_chat: chat completions instead of completions (a template adds a few tokens).
        extra: fields added to every body, such as ignore_eos for servers that know it.
        length_scale: factor on every output length, for quick looks.
    """

    base_url: str
    model: str
    prompts: PromptSource
    is_chat: bool = False
    api_key: str = "none"
    extra: dict[str, Any] = field(default_factory=dict)
    length_scale: float = 1.0

    async def ask(self, prompt: str, max_tokens: int, on_text: Callable[[], None] | None = None) -> StreamResult:
        """Stream one greedy answer of `max_tokens` tokens."""
        asked: dict[str, Any] = (
            {"messages": [{"role": "user", "content": prompt}]} if self.is_chat else {"prompt": prompt}
        )
        body = {"model": self.model, "max_tokens": max_tokens, "temperature": 0, **asked, **self.extra}
        return await stream_completion(self.base_url, body, api_key=self.api_key, on_text=on_text)

    def scaled(self, num_tokens: int) -> int:
        """An output length, scaled, at least 4."""
        return max(4, round(num_tokens * self.length_scale))


@dataclass(frozen=True, slots=True)
class ScenarioResult:
    """Numbers of one scenario on one server; times in milliseconds unless the name says otherwise.

    Args:
        tokens_per_s: output tokens of all requests over wall time.
        gap_*: time between events with text ("inter-token", where a server sends one token an event).
        expected_tokens: output tokens asked for; fewer came when the server ended early or counts differently.
        details: what only this scenario measures.
    """

    name: str
    wall_s: float
    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    gap_p50_ms: float
    gap_p99_ms: float
    output_tokens: int
    expected_tokens: int
    details: dict[str, float] = field(default_factory=dict)


def summarise(
    name: str, results: Sequence[StreamResult], expected_tokens: int, details: dict[str, float] | None = None
) -> ScenarioResult:
    """Fold the requests of a scenario, whose wall time is from first send to last end."""
    wall_s = max(r.finished_s for r in results) - min(r.sent_s for r in results)
    tokens = sum(r.num_output_tokens for r in results)
    ttfts = [r.ttft_s * 1e3 for r in results]
    gaps = [gap * 1e3 for r in results for gap in r.gaps_s]
    return ScenarioResult(
        name=name,
        wall_s=wall_s,
        tokens_per_s=tokens / wall_s,
        ttft_p50_ms=percentile(ttfts, 0.5),
        ttft_p99_ms=percentile(ttfts, 0.99),
        gap_p50_ms=percentile(gaps, 0.5),
        gap_p99_ms=percentile(gaps, 0.99),
        output_tokens=tokens,
        expected_tokens=expected_tokens,
        details=details or {},
    )


async def one_client(target: Target) -> ScenarioResult:
    """Two requests of 128 prompt tokens one after the other: the latency of an idle server."""
    length = target.scaled(64)
    results = [await target.ask(target.prompts.make(128), length) for _ in range(2)]
    return summarise("one_client", results, 2 * length)


async def sixteen_clients(target: Target) -> ScenarioResult:
    """Sixteen requests of 128 prompt tokens at once: throughput."""
    length = target.scaled(96)
    results = await asyncio.gather(*(target.ask(target.prompts.make(128), length) for _ in range(16)))
    return summarise("sixteen_clients", results, 16 * length)


async def four_long_prompts(target: Target) -> ScenarioResult:
    """Four requests of 1,500 prompt tokens at once: prefill."""
    length = target.scaled(32)
    results = await asyncio.gather(*(target.ask(target.prompts.make(1500), length) for _ in range(4)))
    return summarise("four_long_prompts", results, 4 * length)


async def shared_prefix(target: Target) -> ScenarioResult:
    """One request with a new 1,000-token prefix, two more alone, then eight at once with the same prefix."""
    length = target.scaled(16)
    prefix = target.prompts.make(1000)

    def ask() -> Awaitable[StreamResult]:
        return target.ask(prefix + target.prompts.make(20), length)

    cold = await ask()
    warm = [await ask() for _ in range(2)]
    together = await asyncio.gather(*(ask() for _ in range(8)))
    warm_ttft_ms = min(r.ttft_s for r in warm) * 1e3
    details = {
        "cold_ttft_ms": cold.ttft_s * 1e3,
        "warm_ttft_ms": warm_ttft_ms,
        "warm_over_cold": warm_ttft_ms / (cold.ttft_s * 1e3),
        "cached_tokens": float(min(r.num_cached_tokens or 0 for r in [*warm, *together])),
    }
    return summarise("shared_prefix", together, 8 * length, details)


async def long_arrival(target: Target) -> ScenarioResult:
    """Eight streams run, a 1,500-token prompt arrives: how long do they stall until its first token?"""
    num_streams, length = 8, target.scaled(160)
    started = asyncio.Semaphore(0)
    # Each stream counts itself in after some pieces of text: all are decoding when the long prompt comes.
    counts = [0] * num_streams

    def counter(index: int) -> Callable[[], None]:
        def on_text() -> None:
            counts[index] += 1
            if counts[index] == min(32, length // 4):
                started.release()

        return on_text

    streams = [
        asyncio.create_task(target.ask(target.prompts.make(64), length, counter(index))) for index in range(num_streams)
    ]
    for _ in range(num_streams):
        await started.acquire()
    intruder = await target.ask(target.prompts.make(1500), 4)
    results = await asyncio.gather(*streams)
    before_from_s = max(r.text_times_s[0] for r in results)
    before = _gaps_between(results, before_from_s, intruder.sent_s)
    during = _gaps_between(results, intruder.sent_s, intruder.text_times_s[0])
    details = {
        "intruder_ttft_ms": intruder.ttft_s * 1e3,
        "before_p50_ms": percentile(before, 0.5),
        "before_p99_ms": percentile(before, 0.99),
        "during_p50_ms": percentile(during, 0.5),
        "during_p99_ms": percentile(during, 0.99),
        "during_max_ms": percentile(during, 1.0),
        "during_over_before_p99": percentile(during, 0.99) / percentile(before, 0.99),
    }
    return summarise("long_arrival", results, num_streams * length, details)


def _gaps_between(results: Sequence[StreamResult], start_s: float, end_s: float) -> list[float]:
    """Gaps, in milliseconds, that end after `start_s` and begin before `end_s`."""
    pairs = [pair for r in results for pair in zip(r.text_times_s, r.text_times_s[1:], strict=False)]
    return [(b - a) * 1e3 for a, b in pairs if b > start_s and a < end_s]


Scenario = Callable[[Target], Awaitable[ScenarioResult]]

SCENARIOS: dict[str, Scenario] = {
    scenario.__name__: scenario
    for scenario in (one_client, sixteen_clients, four_long_prompts, shared_prefix, long_arrival)
}


async def run_scenarios(
    target: Target, names: Sequence[str], on_result: Callable[[ScenarioResult], None], *, timeout_s: float = 300
) -> list[ScenarioResult]:
    """Warm the server up, then run the scenarios one after the other; what fails or takes too long is left out."""
    await target.ask(target.prompts.make(16), 8)
    results = []
    for name in names:
        try:
            async with asyncio.timeout(timeout_s):
                result = await SCENARIOS[name](target)
        except (RequestFailed, TimeoutError, OSError) as failure:
            logger.warning("%s: %s", name, failure or f"not done in {timeout_s:.0f} s")
            continue
        results.append(result)
        on_result(result)
        await asyncio.sleep(0.5)
    return results
