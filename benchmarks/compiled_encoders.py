"""Encoders eager and compiled, in turn, in one process: what does --torch-compile give them on this machine?

Knows nothing of servers, decoders or text; sources are random.
Called as `python -m benchmarks.compiled_encoders whisper-small --sources 1 2 --cache build/compiled`.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

import torch

from benchmarks.seq2seq import SHAPES, make
from engine.build import source_shape
from engine.compile.encoder import compile_encoder
from engine.compile.tried import Runs, time_run
from engine.config import CompileConfig
from engine.model.encoder import EncoderInputs, PlainEncoder
from engine.model.loader import DTYPES, describe, pack_weights
from engine.model.seq2seq_check import try_flat


@torch.inference_mode()
def main() -> None:
    """Compile, then time both kinds of encoders in turn."""
    parser = argparse.ArgumentParser(description="Time encoders, eager and compiled, in turn.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--sources", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 256], help="of texts, in tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--cache", type=Path, default=Path("build/compiled"), help="where compiled code is kept")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8d ms  %(message)s", stream=sys.stdout)
    torch.set_num_threads(arguments.threads)
    loaded = describe(make(SHAPES[arguments.shape], DTYPES[arguments.dtype]))
    pack_weights(loaded)
    is_speech = loaded.family == "speech"
    parts = try_flat(loaded.model, loaded.device, num_positions=64, is_speech=is_speech)
    assert not isinstance(parts, str), parts
    plain = PlainEncoder(loaded.model.get_encoder())
    source = source_shape(loaded, max(arguments.lengths))
    config = CompileConfig(arguments.cache, sizes=tuple(sorted(arguments.sources)))
    compiled = compile_encoder(plain, source, config, max(arguments.sources), lambda: True)
    while compiled.num_decided < len(arguments.sources):
        if compiled.has_work():
            compiled.advance()
        else:
            time.sleep(0.05)
    for num_sources in sorted(arguments.sources):
        for length in [None] if is_speech else arguments.lengths:
            if length is None:
                inputs = EncoderInputs(torch.randn(num_sources, *source.shape).to(source.dtype), None)
            else:
                ids = torch.randint(1, source.vocab_size, (num_sources, length))
                inputs = EncoderInputs(ids, torch.ones_like(ids))
            programs: tuple[Runs[EncoderInputs], ...] = (plain, compiled)
            times = [[time_run(program, inputs) for program in programs] for _ in range(arguments.rounds)]
            eager, fast = (min(of_one) * 1e3 for of_one in zip(*times, strict=True))
            sys.stdout.write(
                f"{arguments.shape}, {num_sources} sources of {length or 'one window'}, sizes {compiled.sizes}: "
                f"eager {eager:.1f} ms, compiled {fast:.1f} ms, {eager / fast:.2f} times\n"
            )
    compiled.close()


if __name__ == "__main__":
    main()
