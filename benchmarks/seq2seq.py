"""Encoder-decoders in-process on random weights of real shapes: the engine with all requests at once, and plain
`generate`, one after the other.

Knows nothing of servers, text or audio; sources are random ids, or random spectrograms.
Called as `python -m benchmarks.seq2seq t5-base --requests 16`; the engine, generate, and the engine again.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, GenerationConfig, GenerationMixin

from benchmarks.offline import profiled
from benchmarks.report import table
from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.model.loader import DTYPES, describe, pack_weights
from engine.sequence import SamplingParams, Sequence, Source

START_ID = 0
WINDOW_S = 30.0  # of audio, whatever is spoken in it


@dataclass(frozen=True, slots=True)
class Shape:
    """The architecture and sizes of a real encoder-decoder."""

    model_type: str
    values: dict[str, Any]


def _whisper(width: int, layers: int, heads: int) -> Shape:
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
             (("layers", layers), ("attention_heads", heads), ("ffn_dim", 4 * width))}  # fmt: skip
    return Shape("whisper", {"vocab_size": 51_865, "d_model": width, **sides})


SHAPES = {
    "t5-base": Shape("t5", {"vocab_size": 32_128, "d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}),
    "whisper-tiny": _whisper(384, 4, 6),
    "whisper-small": _whisper(768, 12, 12),
}


def make(shape: Shape, dtype: torch.dtype) -> Any:
    """A model of random weights that does not end by itself."""
    ids = {"eos_token_id": None, "pad_token_id": 0, "bos_token_id": 0, "decoder_start_token_id": START_ID}
    config = AutoConfig.for_model(shape.model_type, **{**shape.values, **ids})
    factory = AutoModelForSpeechSeq2Seq if shape.model_type == "whisper" else AutoModelForSeq2SeqLM
    torch.manual_seed(0)
    model = factory.from_config(config, dtype=dtype).eval()
    model.generation_config = GenerationConfig(**ids, do_sample=False)
    return model


def sources_of(model: Any, count: int, length: int) -> list[Source]:
    """Random texts of `length` tokens, or spectrograms of 30 s."""
    if not hasattr(model.config, "num_mel_bins"):
        numbers = random.Random(0)
        texts = [tuple(numbers.choices(range(3, model.config.vocab_size), k=length)) for _ in range(count)]
        return [Source(repr(ids).encode(), length, ids) for ids in texts]
    noise = np.random.default_rng(0)
    size = (model.config.num_mel_bins, 2 * model.config.max_source_positions)
    made = [noise.standard_normal(size).astype(np.float32) for _ in range(count)]
    return [
        Source(bytes([number]), model.config.max_source_positions, features=features)
        for number, features in enumerate(made)
    ]


def build(model: Any, sources: list[Source], num_new_tokens: int) -> Engine:
    """An engine with room for all sources at once, its weights packed as the loader packs them."""
    loaded = describe(model)
    pack_weights(loaded)
    config = EngineConfig(
        max_num_seqs=len(sources),
        max_batch_tokens=512,
        max_model_len=num_new_tokens + 1,
        max_source_len=max(source.num_positions for source in sources),
    )
    return build_engine(loaded, config, lambda _what, _share: None)


def run_engine(engine: Engine, sources: list[Source], num_new_tokens: int, round_number: int) -> float:
    """All requests at once, in chunks of what the engine takes; seconds."""
    params = SamplingParams(max_tokens=num_new_tokens, temperature=0.0)
    started_s = time.perf_counter()
    for number, source in enumerate(sources):
        # Another key each round: no round shall find the encodings of the one before.
        fresh = Source(source.key + bytes([round_number]), source.num_positions, source.token_ids, source.features)
        engine.add(Sequence(round_number * 1000 + number, [START_ID], params, time.monotonic(), source=fresh))
    while engine.has_work():
        for output in engine.step():
            if output.error is not None:
                raise output.error
    return time.perf_counter() - started_s


@torch.inference_mode()
def run_generate(model: Any, sources: list[Source], num_new_tokens: int) -> float:
    """One request after the other through transformers' generate; seconds."""
    started_s = time.perf_counter()
    for source in sources:
        if source.features is None:
            inputs = torch.tensor([source.token_ids])
        else:
            inputs = torch.from_numpy(source.features)[None].to(model.dtype)
        # The base class's: Whisper's own adds rules for timestamps, which are not compared here.
        GenerationMixin.generate(model, inputs, do_sample=False, max_new_tokens=num_new_tokens)
    return time.perf_counter() - started_s


def main() -> None:
    """Time the shape that the command line names."""
    parser = argparse.ArgumentParser(description="Compare the engine with plain generate on an encoder-decoder.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--source-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--dtype", default="float32", choices=sorted(DTYPES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-generate", action="store_true", help="the engine alone")
    parser.add_argument("--profile", type=Path, metavar="TRACE", help="profile the engine; a Chrome trace goes here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape, dtype = SHAPES[arguments.shape], DTYPES[arguments.dtype]
    plain = make(shape, dtype)
    sources = sources_of(plain, arguments.requests, arguments.source_tokens)
    engine = build(make(shape, dtype), sources, arguments.new_tokens)
    sys.stdout.write(f"lane {engine.lane.name}: {engine.lane.reason}\n")
    run_engine(engine, sources[:2], 4, 0)  # warm-up
    rows = []
    for number, name in enumerate(("engine", "generate", "engine"), start=1):
        if name == "engine":
            with profiled(arguments.profile):
                seconds = run_engine(engine, sources, arguments.new_tokens, number)
        elif arguments.no_generate:
            continue
        else:
            seconds = run_generate(plain, sources, arguments.new_tokens)
        audio_s = WINDOW_S * len(sources) / seconds if shape.model_type == "whisper" else float("nan")
        rate = len(sources) * arguments.new_tokens / seconds
        rows.append((name, f"{seconds:.2f}", f"{rate:.1f}", f"{audio_s:.1f}"))
    sys.stdout.write(table(("what", "seconds", "tokens/s", "audio s/s"), rows) + "\n")


if __name__ == "__main__":
    main()
