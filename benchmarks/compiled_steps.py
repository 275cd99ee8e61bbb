"""Decode steps eager and compiled, in turn, in one process: what does --torch-compile give on this machine?

Knows nothing of servers; prompts are random token ids.
Called as `python -m benchmarks.compiled_steps llama-135m --clients 1 4 16 --cache build/compiled`.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.models import SHAPES, write_checkpoint
from benchmarks.offline import run
from benchmarks.report import percentile
from engine.build import build_engine
from engine.compile.steps import CompiledSteps
from engine.config import CompileConfig, EngineConfig
from engine.engine import Engine
from engine.model.loader import LoadRequest, load_model
from engine.model.quantize import QuantiseRequest
from engine.model.runner import FlatRunner


def wait_for(engine: Engine, compiled: CompiledSteps, num_tried: int) -> None:
    """Let the engine try what is compiled until that many buckets are decided."""
    while compiled.num_decided < num_tried:
        if engine.has_work():
            engine.step()
        else:
            time.sleep(0.05)


@torch.inference_mode()
def time_plain(model: Any, num_rows: int, num_prompt_tokens: int, num_new_tokens: int) -> list[float]:
    """Milliseconds of each step of transformers' own model with its own cache, as generate() feeds it."""
    ids = torch.randint(3, model.config.vocab_size, (num_rows, num_prompt_tokens))
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    times = []
    for _ in range(num_new_tokens - 1):
        started_s = time.perf_counter()
        ids = output.logits[:, -1].argmax(-1, keepdim=True)
        output = model(input_ids=ids, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
        times.append((time.perf_counter() - started_s) * 1e3)
    return times


def main() -> None:
    """Compile, then time both kinds of steps in turn."""
    parser = argparse.ArgumentParser(description="Time decode steps, eager and compiled, in turn.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--models", type=Path, default=Path("build/models"), help="where checkpoints are kept")
    parser.add_argument("--cache", type=Path, default=Path("build/compiled"), help="where compiled code is kept")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--plain", action="store_true", help="time transformers' own model too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--int4", action="store_true", help="int4 weights, as with --hqq True")
    parser.add_argument("--int4-cache", type=Path, default=Path("build/int4"), help="where int4 weights are kept")
    parser.add_argument("--kernels", type=Path, default=Path("build/kernels"), help="where our own kernels are kept")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8d ms  %(message)s", stream=sys.stdout)
    torch.set_num_threads(arguments.threads)
    directory = arguments.models / arguments.shape
    if not (directory / "config.json").exists():
        write_checkpoint(SHAPES[arguments.shape], directory)
    quantise = QuantiseRequest(64, arguments.int4_cache) if arguments.int4 else None
    request = LoadRequest(str(directory), dtype=arguments.dtype, quantise=quantise, kernel_directory=arguments.kernels)
    loaded = load_model(request, lambda _what, _share: None)
    sizes = tuple(sorted(arguments.clients))
    config = EngineConfig(
        max_num_seqs=sizes[-1],
        max_batch_tokens=512,
        max_model_len=256,
        is_prefix_caching=False,
        compile=CompileConfig(arguments.cache, sizes=sizes),
    )
    engine = build_engine(loaded, config, lambda _what, _share: None)
    compiled, runner = engine.compiled, engine.runner
    assert isinstance(compiled, CompiledSteps) and isinstance(runner, FlatRunner)
    wait_for(engine, compiled, len(sizes))
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=arguments.dtype) if arguments.plain else None
    words = ""
    for num_clients in sizes:
        times: dict[str, list[float]] = {"eager": [], "compiled": []}
        for _ in range(arguments.rounds):
            for name, program in (("eager", compiled.program), ("compiled", compiled), ("eager", compiled.program)):
                runner.program = program
                times[name] += run(engine, num_clients, 32, arguments.new_tokens, loaded.vocab_size).decode_ms
        if plain is not None:
            plain_ms = percentile(time_plain(plain, num_clients, 32, arguments.new_tokens), 0.5)
            words = f", transformers' own {plain_ms:.1f} ms"
        eager, fast = (percentile(times[name], 0.5) for name in ("eager", "compiled"))
        sys.stdout.write(
            f"{arguments.shape}, {num_clients} clients, buckets {compiled.sizes}: eager {eager:.1f} ms, "
            f"compiled {fast:.1f} ms, {eager / fast:.2f} times{words}\n"
        )
    engine.close()


if __name__ == "__main__":
    main()
