"""Puts a running OpenAI-compatible server under load: time to first token, inter-token time, tokens a second.

Knows nothing of how the server was started; give it the model's tokenizer so that prompts have exact lengths.
Called as `python -m benchmarks.serve --base-url http://127.0.0.1:7088/v1 --tokenizer DIRECTORY`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.prompts import PromptSource
from benchmarks.report import table
from benchmarks.scenarios import SCENARIOS, ScenarioResult, Target, run_scenarios

HEADER = ("scenario", "tokens/s", "wall s", "TTFT p50", "TTFT p99", "gap p50", "gap p99 ms", "tokens", "of")


def results_table(results: Sequence[ScenarioResult]) -> str:
    """The common numbers as a table, and below it what single scenarios add."""
    rows = [
        (
            r.name,
            f"{r.tokens_per_s:.1f}",
            f"{r.wall_s:.2f}",
            *(f"{ms:.0f}" for ms in (r.ttft_p50_ms, r.ttft_p99_ms)),
            *(f"{ms:.1f}" for ms in (r.gap_p50_ms, r.gap_p99_ms)),
            str(r.output_tokens),
            str(r.expected_tokens),
        )
        for r in results
    ]
    details = [f"{r.name}: " + ", ".join(f"{k} {v:.2f}" for k, v in r.details.items()) for r in results if r.details]
    return "\n".join([table(HEADER, rows), "", *details])


def report_progress(result: ScenarioResult) -> None:
    """One line to standard error as soon as a scenario is done."""
    sys.stderr.write(f"{result.name}: {result.tokens_per_s:.1f} tokens/s, wall {result.wall_s:.1f} s\n")


def main() -> None:
    """Measure the server that the command line names."""
    parser = argparse.ArgumentParser(description="Load a running OpenAI-compatible server and measure it.")
    parser.add_argument("--base-url", default="http://127.0.0.1:7088/v1")
    parser.add_argument("--model", default="model", help="name the server knows the model by (default: model)")
    parser.add_argument("--tokenizer", type=Path, help="directory with tokenizer.json; without it a word is a token")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--chat", action="store_true", help="chat completions instead of completions")
    parser.add_argument("--ignore-eos", action="store_true", help="send ignore_eos, for servers that know it")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--length-scale", type=float, default=1.0, help="factor on output lengths (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other prompts (default: 0)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds a scenario may take (default: 300)")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    target = Target(
        base_url=arguments.base_url.rstrip("/"),
        model=arguments.model,
        prompts=PromptSource(arguments.tokenizer, seed=arguments.seed),
        is_chat=arguments.chat,
        api_key=arguments.api_key,
        extra={"ignore_eos": True} if arguments.ignore_eos else {},
        length_scale=arguments.length_scale,
    )
    results = asyncio.run(run_scenarios(target, arguments.scenarios, report_progress, timeout_s=arguments.timeout))
    sys.stdout.write(results_table(results) + "\n")
    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(r) for r in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
