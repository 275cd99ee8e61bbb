"""The load generator measures what a server of known rhythm does."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.compare import Round, ratios_table
from benchmarks.prompts import PromptSource
from benchmarks.scenarios import SCENARIOS, ScenarioResult, Target, run_scenarios
from benchmarks.serve import results_table
from benchmarks.server_process import ServerFailed, running_server
from benchmarks.sse_client import RequestFailed, StreamResult, stream_completion
from tests.benchmarks.fake_server import FakeServer


def ask(server: FakeServer, max_tokens: int) -> StreamResult:
    async def run() -> StreamResult:
        async with await server.start():
            return await stream_completion(server.base_url, {"prompt": "a b c", "max_tokens": max_tokens})

    return asyncio.run(run())


@pytest.mark.parametrize("bytes_per_write", [1, 7, 10_000])
def test_a_stream_is_read_whole_however_it_is_cut(bytes_per_write: int) -> None:
    result = ask(FakeServer(bytes_per_write=bytes_per_write), 5)
    assert len(result.text_times_s) == 5
    assert result.num_output_tokens == 5
    assert result.num_prompt_tokens == 3


def test_times_are_those_of_the_server() -> None:
    result = ask(FakeServer(first_s=0.1, gap_s=0.02), 6)
    # Only lower bounds: a busy machine delays what it likes.
    assert result.ttft_s >= 0.1
    assert len(result.gaps_s) == 5
    assert result.text_times_s[-1] - result.sent_s >= 0.1 + 5 * 0.02
    assert result.finished_s >= result.text_times_s[-1]


def test_an_error_status_and_an_empty_answer_are_failures() -> None:
    with pytest.raises(RequestFailed, match="503"):
        ask(FakeServer(failing=frozenset({0})), 3)
    with pytest.raises(RequestFailed, match="0 events"):
        ask(FakeServer(), 0)


def run_all(server: FakeServer, names: Sequence[str] = tuple(SCENARIOS), timeout_s: float = 60) -> list[ScenarioResult]:
    async def run() -> list[ScenarioResult]:
        async with await server.start():
            target = Target(server.base_url, "m", PromptSource(None, seed=0), length_scale=0.2)
            return await run_scenarios(target, names, lambda _result: None, timeout_s=timeout_s)

    return asyncio.run(run())


def test_every_scenario_counts_all_tokens_and_sends_what_it_says() -> None:
    server = FakeServer(first_s=0.02, gap_s=0.003)
    results = run_all(server)
    assert [result.name for result in results] == list(SCENARIOS)
    assert all(result.output_tokens == result.expected_tokens for result in results)
    assert all(result.ttft_p50_ms >= 20 for result in results)
    assert results[0].wall_s >= 2 * (0.02 + 12 * 0.003)
    prompts = [str(body["prompt"]).split() for body in server.bodies]
    lengths = [len(words) for words in prompts]
    assert lengths.count(1500) == 4 + 1
    assert lengths.count(128) == 2 + 16
    assert lengths.count(1020) == 1 + 2 + 8
    assert all(body["temperature"] == 0 and body["stream"] for body in server.bodies)
    assert len({tuple(words[:1000]) for words in prompts if len(words) == 1020}) == 1
    assert len({tuple(words) for words in prompts}) == len(prompts)
    long_arrival = results[-1].details
    assert long_arrival["intruder_ttft_ms"] >= 20
    assert 0 < long_arrival["during_p50_ms"] <= long_arrival["during_p99_ms"] <= long_arrival["during_max_ms"]
    assert all(result.name in results_table(results) for result in results)


def test_a_scenario_that_fails_or_takes_too_long_is_left_out_and_the_others_run() -> None:
    # Request 0 is the warm-up, 1 the first of the first scenario.
    assert [result.name for result in run_all(FakeServer(failing=frozenset({1})))] == list(SCENARIOS)[1:]
    assert run_all(FakeServer(gap_s=0.1), ["one_client"], timeout_s=0.3) == []


def test_a_server_process_is_started_watched_and_ended(tmp_path: Path) -> None:
    command = f"{sys.executable} -m tests.benchmarks.fake_server {{port}}"

    async def run() -> tuple[tuple[int, int] | None, str]:
        async with running_server(command, tmp_path, tmp_path / "log", 1) as server:
            memory = server.memory_bytes()
            await stream_completion(server.base_url, {"prompt": "a", "max_tokens": 2})
        return memory, server.base_url

    memory, base_url = asyncio.run(run())
    if sys.platform == "linux":
        assert memory is not None
        assert 2**20 < memory[0] <= memory[1]
    with pytest.raises(OSError):
        asyncio.run(stream_completion(base_url, {"prompt": "a", "max_tokens": 2}))


def test_a_server_that_ends_at_once_is_named(tmp_path: Path) -> None:
    async def run() -> None:
        async with running_server(f"{sys.executable} -c 'raise SystemExit(3)'", tmp_path, tmp_path / "log", None):
            raise AssertionError

    with pytest.raises(ServerFailed, match="exit code 3"):
        asyncio.run(run())


def test_ratios_are_to_the_mean_of_the_first_servers_rounds() -> None:
    def round_of(server: str, rate: float) -> Round:
        result = ScenarioResult("one_client", 10.0, rate, 100.0, 100.0, 10.0, 10.0, 64, 64)
        return Round(server, [result], 1.0, None, None, None, 0.0)

    text = ratios_table([round_of("a", 10.0), round_of("b", 30.0), round_of("a", 20.0)])
    row = next(line for line in text.splitlines() if "one_client b" in line)
    assert [cell.strip() for cell in row.split("|")[2:4]] == ["30.00", "2.00"]
