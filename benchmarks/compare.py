"""Runs the same load against several servers, one after the other on the same weights, and prints ratios to the first.

Knows nothing of the servers but the commands that start them (benchmarks/peers.md has some).
Called as `python -m benchmarks.compare llama-135m --server ours --server 'tf-cb=COMMAND with {model} and {port}'`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import platform
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.models import SHAPES, write_checkpoint
from benchmarks.prompts import PromptSource
from benchmarks.report import table
from benchmarks.scenarios import SCENARIOS, ScenarioResult, Target, run_scenarios
from benchmarks.serve import report_progress, results_table
from benchmarks.server_process import ServerFailed, running_server

OURS = f"{sys.executable} main.py --hf-model {{model}} --host 127.0.0.1 --port {{port}} --accelerator-type cpu"


@dataclass(frozen=True, slots=True)
class Round:
    """One server's turn: what the load gave, and what the process took."""

    server: str
    results: list[ScenarioResult]
    startup_s: float
    loaded_memory_bytes: int | None
    peak_memory_bytes: int | None
    idle_cpu_share: float | None
    machine_load: float


async def run_round(name: str, command: str, model: Path, arguments: argparse.Namespace, seed: int) -> Round:
    """Start one server, put it under every load, end it."""
    log = arguments.logs / f"{model.name}-{name}-{seed}.log"
    async with running_server(command, model, log, arguments.threads) as server:
        prompts = PromptSource(model, seed=seed)
        target = Target(server.base_url, str(model), prompts, length_scale=arguments.length_scale)
        await asyncio.sleep(2)
        await server.until_idle(arguments.settle)
        idle = await server.idle_cpu_share()
        loaded = server.memory_bytes()
        results = await run_scenarios(target, arguments.scenarios, report_progress, timeout_s=arguments.timeout)
        peak = server.memory_bytes()
    return Round(
        name, results, server.startup_s, loaded and loaded[0], peak and peak[1], idle, machine_load=os.getloadavg()[0]
    )


def ratios_table(rounds: Sequence[Round]) -> str:
    """Each server's tokens/s, wall time and first token against the first server's, means over its rounds."""
    names = list(dict.fromkeys(r.server for r in rounds))
    scenarios = list(dict.fromkeys(result.name for r in rounds for result in r.results))
    rows = []
    for scenario in scenarios:
        for name in names:
            cells = [
                _mean(rounds, server, scenario, what)
                for what in ("tokens_per_s", "wall_s", "ttft_p50_ms")
                for server in (names[0], name)
            ]
            base_rate, rate, base_wall, wall, base_ttft, ttft = cells
            numbers = (rate, rate / base_rate, base_wall / wall, ttft, base_ttft / ttft)
            rows.append((f"{scenario} {name}", *(f"{number:.2f}" for number in numbers)))
    return table(("scenario, server", "tokens/s", "x", "wall x", "TTFT p50 ms", "TTFT x"), rows)


def _mean(rounds: Sequence[Round], server: str, scenario: str, what: str) -> float:
    values = [getattr(s, what) for r in rounds if r.server == server for s in r.results if s.name == scenario]
    return statistics.fmean(values) if values else float("nan")


def round_summary(this: Round) -> str:
    """One round as text."""
    memory = [f"{size / 2**20:.0f} MiB" if size else "?" for size in (this.loaded_memory_bytes, this.peak_memory_bytes)]
    idle = "?" if this.idle_cpu_share is None else f"{this.idle_cpu_share:.1%} of a core"
    return (
        f"\n## {this.server}\nstart {this.startup_s:.1f} s, memory loaded {memory[0]}, peak {memory[1]}, idle {idle}, "
        f"machine load {this.machine_load:.1f}\n{results_table(this.results)}"
    )


def named(text: str) -> tuple[str, str]:
    """Name and command of one --server."""
    name, _, rest = text.partition("=")
    is_ours = name == "ours" or name.startswith("ours-")
    return name, f"{OURS} {rest}".strip() if is_ours else rest


def main() -> None:
    """Compare the servers that the command line names."""
    parser = argparse.ArgumentParser(description="Compare OpenAI-compatible servers under the same load.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument(
        "--server",
        action="append",
        required=True,
        help="ours, ours-NAME=OPTIONS, or NAME=COMMAND with {model} and {port}; repeatable",
    )
    parser.add_argument("--models", type=Path, default=Path("build/models"), help="where checkpoints are kept")
    parser.add_argument("--logs", type=Path, default=Path("build/logs"), help="where servers' output goes")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument(
        "--once", action="store_true", help="each server once; else the first has a second turn at the end"
    )
    parser.add_argument("--length-scale", type=float, default=1.0, help="factor on output lengths")
    # With two threads on a machine that others use too, each of a step's many barriers waits for a descheduled thread.
    parser.add_argument("--threads", type=int, help="threads of each server (OMP_NUM_THREADS; default: its own choice)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds a scenario may take")
    parser.add_argument("--settle", type=float, default=0, help="seconds that a server may go on compiling at most")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    arguments = parser.parse_args()
    # As an exception, so that the server of the moment is ended too.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))
    model = (arguments.models / arguments.shape).resolve()
    if not (model / "config.json").exists():
        write_checkpoint(SHAPES[arguments.shape], model)
    arguments.logs.mkdir(parents=True, exist_ok=True)
    servers = [named(text) for text in arguments.server]
    # The first again at the end: what the machine did meanwhile shows as the difference of its two turns.
    order = servers if arguments.once else [*servers, servers[0]]
    rounds: list[Round] = []
    for seed, (name, command) in enumerate(order):
        sys.stderr.write(f"{name}:\n")
        try:
            rounds.append(asyncio.run(run_round(name, command, model, arguments, seed)))
        except ServerFailed as failure:
            sys.stderr.write(f"{name}: {failure}\n")
            continue
        sys.stdout.write(round_summary(rounds[-1]) + "\n")
        sys.stdout.flush()
        if arguments.json:
            facts = {"shape": arguments.shape, "machine": platform.processor() or platform.machine()}
            content = {
                **facts,
                "cores": os.cpu_count(),
                "threads": arguments.threads,
                "rounds": [dataclasses.asdict(r) for r in rounds],
            }
            arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write("\n" + ratios_table(rounds) + "\n")


if __name__ == "__main__":
    main()
