"""Drives the engine in-process, without HTTP or text: where does a step's time go?

Knows nothing of servers; prompts are random token ids.
Called as `python -m benchmarks.offline llama-135m --clients 16 --profile`, or under py-spy.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.models import SHAPES, write_checkpoint
from benchmarks.report import percentile
from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.model.loader import LoadRequest, load_model
from engine.model.quantize import QuantiseRequest
from engine.sequence import SamplingParams, Sequence


@dataclass(slots=True)
class Timings:
    """Step times in milliseconds, apart for steps that only decode and steps that also prefill."""

    started_s: float = field(default_factory=time.perf_counter)
    decode_ms: list[float] = field(default_factory=list)
    prefill_ms: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0

    def summary(self) -> str:
        """The numbers as text."""
        wall_s = time.perf_counter() - self.started_s
        lines = [f"{self.num_output_tokens} tokens in {wall_s:.2f} s: {self.num_output_tokens / wall_s:.1f} tokens/s"]
        for name, times in (("decode", self.decode_ms), ("with prefill", self.prefill_ms)):
            lines.append(
                f"steps, {name}: {len(times)}, sum {sum(times) / 1e3:.2f} s, "
                f"p50 {percentile(times, 0.5):.1f} ms, p99 {percentile(times, 0.99):.1f} ms"
            )
        if self.prefill_ms:
            lines.append(f"prefill: {self.num_prompt_tokens / sum(self.prefill_ms) * 1e3:.0f} prompt tokens/s")
        return "\n".join(lines)


def run(engine: Engine, num_clients: int, num_prompt_tokens: int, num_new_tokens: int, vocab_size: int) -> Timings:
    """Add all sequences at once and step until they are done; greedy, no EOS."""
    numbers = random.Random(0)
    params = SamplingParams(max_tokens=num_new_tokens, temperature=0.0, ignore_eos=True)
    for index in range(num_clients):
        prompt = numbers.choices(range(3, vocab_size), k=num_prompt_tokens)
        engine.add(Sequence(index, prompt, params, arrival_time_s=time.monotonic()))
    timings = Timings(num_prompt_tokens=num_clients * num_prompt_tokens)
    while engine.has_work():
        started_s = time.perf_counter()
        outputs = engine.step()
        step_ms = (time.perf_counter() - started_s) * 1e3
        failed = [output.error for output in outputs if output.error is not None]
        if failed:
            raise failed[0]
        num_tokens = sum(len(output.token_ids) for output in outputs)
        timings.num_output_tokens += num_tokens
        is_decode = engine.stats().last_step_tokens == num_tokens
        (timings.decode_ms if is_decode else timings.prefill_ms).append(step_ms)
    return timings


@contextmanager
def profiled(trace: Path | None) -> Iterator[None]:
    """Print torch's operators by their own CPU time, and write a Chrome trace to `trace`; nothing when it is None."""
    if trace is None:
        yield
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield
    sys.stdout.write(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25) + "\n")
    profile.export_chrome_trace(str(trace))


def main() -> None:
    """Time the engine on the shape that the command line names."""
    parser = argparse.ArgumentParser(description="Drive the engine in-process and time its steps.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--models", type=Path, default=Path("build/models"), help="where checkpoints are kept")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-tokens", type=int, default=512, help="token budget of a step")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--int4", action="store_true", help="int4 weights, as with --hqq True")
    parser.add_argument("--group-size", type=int, default=64, help="of int4 weights")
    parser.add_argument("--cache", type=Path, default=Path("build/int4"), help="where int4 weights are kept")
    parser.add_argument("--in-turn", action="store_true", help="steps that do not overlap; on CUDA they do")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--profile", type=Path, metavar="TRACE", help="profile with torch; a Chrome trace goes here")
    parser.add_argument("--kernels", type=Path, default=Path("build/kernels"), help="where our own kernels are kept")
    arguments = parser.parse_args()
    directory = arguments.models / arguments.shape
    if not (directory / "config.json").exists():
        write_checkpoint(SHAPES[arguments.shape], directory)
    quantise = QuantiseRequest(arguments.group_size, arguments.cache) if arguments.int4 else None
    request = LoadRequest(
        str(directory),
        dtype=arguments.dtype,
        device=arguments.device,
        quantise=quantise,
        kernel_directory=arguments.kernels,
    )
    loaded = load_model(request, lambda _what, _share: None)
    config = EngineConfig(
        max_num_seqs=arguments.clients,
        max_batch_tokens=arguments.batch_tokens,
        max_model_len=arguments.prompt_tokens + arguments.new_tokens,
        is_prefix_caching=False,
        is_overlapped=loaded.device.type == "cuda" and not arguments.in_turn,
    )
    engine = build_engine(loaded, config, lambda _what, _share: None)
    sys.stdout.write(f"lane {engine.lane.name}: {engine.lane.reason}\n")
    run(engine, arguments.clients, 8, 4, loaded.vocab_size)  # warm-up
    for _ in range(arguments.repeats):
        with profiled(arguments.profile):
            timings = run(engine, arguments.clients, arguments.prompt_tokens, arguments.new_tokens, loaded.vocab_size)
        sys.stdout.write(timings.summary() + "\n")


if __name__ == "__main__":
    main()
