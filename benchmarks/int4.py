"""Int4 weights against bfloat16 in one process, a step of one after a step of the other: a busy machine slows both.

Knows nothing of servers; prompts are random token ids.
Called as `python -m benchmarks.int4 qwen-0.5b --threads 1`.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.models import SHAPES, write_checkpoint
from benchmarks.report import table
from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.model.loader import LoadRequest, load_model
from engine.model.quantize import QuantiseRequest
from engine.sequence import SamplingParams, Sequence

PROMPT_TOKENS = 16
WARM_UP_STEPS = 2


@dataclass(slots=True)
class Steps:
    """Milliseconds of each decode step, by the wall's clock and by the thread's own."""

    wall: list[float] = field(default_factory=list)
    thread: list[float] = field(default_factory=list)


def build(directory: Path, quantise: QuantiseRequest | None, num_clients: int, num_steps: int) -> Engine:
    """Load the checkpoint and build an engine with room for the run; says how long that took."""
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    loaded = load_model(LoadRequest(str(directory), quantise=quantise), lambda _what, _share: None)
    config = EngineConfig(
        max_num_seqs=num_clients,
        max_batch_tokens=512,
        max_model_len=PROMPT_TOKENS + num_steps + WARM_UP_STEPS + 2,
        is_prefix_caching=False,
    )
    engine = build_engine(loaded, config, lambda _what, _share: None)
    sys.stdout.write(
        f"{'bfloat16' if quantise is None else 'int4'}: ready in {time.perf_counter() - started_s:.1f} s "
        f"({time.process_time() - started_cpu_s:.1f} s of processor), lane {engine.lane.name}\n"
    )
    return engine


def fill(engine: Engine, ids: Iterator[int], num_clients: int, vocab_size: int) -> list[int]:
    """Add sequences that never end and step until all of them decode; returns their ids."""
    numbers = random.Random(0)
    params = SamplingParams(max_tokens=engine.config.max_model_len - PROMPT_TOKENS, temperature=0.0, ignore_eos=True)
    added = [next(ids) for _ in range(num_clients)]
    for number in added:
        prompt = numbers.choices(range(3, vocab_size), k=PROMPT_TOKENS)
        engine.add(Sequence(number, prompt, params, arrival_time_s=time.monotonic()))
    while sum(len(output.token_ids) for output in engine.step()) < num_clients:
        pass
    return added


def measure(engines: dict[str, Engine], num_steps: int) -> dict[str, Steps]:
    """Step all engines in turn, in an order that turns too."""
    steps = {name: Steps() for name in engines}
    for number in range(num_steps + WARM_UP_STEPS):
        order = list(engines) if number % 2 else list(reversed(engines))
        for name in order:
            wall_s, thread_s = time.perf_counter(), time.thread_time()
            engines[name].step()
            if number >= WARM_UP_STEPS:
                steps[name].wall.append((time.perf_counter() - wall_s) * 1e3)
                steps[name].thread.append((time.thread_time() - thread_s) * 1e3)
    return steps


def main() -> None:
    """Compare on the shape that the command line names."""
    parser = argparse.ArgumentParser(description="Compare int4 weights with bfloat16, step by step in turn.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--models", type=Path, default=Path("build/models"), help="where checkpoints are kept")
    parser.add_argument("--cache", type=Path, default=Path("build/int4"), help="where int4 weights are kept")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--group-size", type=int, default=64)
    arguments = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)
    torch.set_num_threads(arguments.threads)
    directory = arguments.models / arguments.shape
    if not (directory / "config.json").exists():
        write_checkpoint(SHAPES[arguments.shape], directory)
    most = max(arguments.clients)
    engines = {
        "bfloat16": build(directory, None, most, arguments.steps),
        "int4": build(directory, QuantiseRequest(arguments.group_size, arguments.cache), most, arguments.steps),
    }
    ids = iter(range(10**9))
    rows = []
    for num_clients in arguments.clients:
        added = {n: fill(e, ids, num_clients, SHAPES[arguments.shape].vocab_size) for n, e in engines.items()}
        steps = measure(engines, arguments.steps)
        for name, engine in engines.items():
            for number in added[name]:
                engine.abort(number)
            wall, thread = statistics.median(steps[name].wall), statistics.median(steps[name].thread)
            rows.append(
                (f"{num_clients} clients, {name}", f"{wall:.1f}", f"{thread:.1f}", f"{num_clients / wall * 1e3:.1f}",
                 f"{statistics.median(steps['bfloat16'].wall) / wall:.2f}",
                 f"{statistics.median(steps['bfloat16'].thread) / thread:.2f}")
            )  # fmt: skip
    headings = ("", "step, ms", "its thread, ms", "tokens/s", "x", "x by thread")
    sys.stdout.write(table(headings, rows) + "\n")


if __name__ == "__main__":
    main()
