"""Speech in-process on random weights of a real Whisper's shape: the engine, plain `generate`, and CTranslate2.

Knows nothing of servers, text or files; each request is a window of 30 s, written down in a fixed number of tokens.
Called as `python -m benchmarks.speech whisper-small --requests 8`; each is timed in turn, the engine at both ends.

CTranslate2, where it is installed, is what faster-whisper runs on. It is given all windows as one batch, and one after
the other.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

from benchmarks.models import train_tokenizer
from benchmarks.report import table
from benchmarks.seq2seq import SHAPES, WINDOW_S, build, make, run_engine, run_generate, sources_of
from engine.model.loader import DTYPES
from engine.sequence import Source

NUM_TEXT_TOKENS = 50_257
LANGUAGES = 99


def special_tokens() -> list[str]:
    """Whisper's special tokens, in its order."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES as NAMES

    languages = [f"<|{code}|>" for code in list(NAMES)[:LANGUAGES]]
    tasks = ["translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps"]
    stamps = [f"<|{0.02 * number:.2f}|>" for number in range(1501)]
    return ["<|startoftranscript|>", *languages, *(f"<|{task}|>" for task in tasks), *stamps]


def write_for_peers(model: Any, directory: Path) -> tuple[int, int]:
    """The same weights as a checkpoint with a tokenizer, which a converter needs; ids of its start and end tokens."""
    model.save_pretrained(directory)
    backend = train_tokenizer(NUM_TEXT_TOKENS - 1)
    vocabulary = {token: number for token, number in backend.get_vocab().items() if number < NUM_TEXT_TOKENS - 1}
    # The end is Whisper's last token of text, and every id below it is a word.
    vocabulary["<|unused|>"] = vocabulary.pop("<|endoftext|>")
    vocabulary["<|endoftext|>"] = NUM_TEXT_TOKENS - 1
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": special_tokens()})
    tokenizer.save_pretrained(directory)
    WhisperFeatureExtractor().save_pretrained(directory)
    ids = tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|endoftext|>"])
    return int(ids[0]), int(ids[1])


def ctranslate2_runs(
    directory: Path, start_id: int, end_id: int, sources: list[Source], arguments: argparse.Namespace
) -> dict[str, Callable[[], float]]:
    """Timed runs by name; none where the package is missing."""
    try:
        import ctranslate2  # type: ignore[import-not-found]  # a peer, installed by hand
    except ImportError:
        sys.stderr.write("ctranslate2 is not installed: not compared\n")
        return {}
    features = np.stack([source.features for source in sources if source.features is not None])
    runs: dict[str, Callable[[], float]] = {}
    for kind in arguments.peers:
        target = directory / f"ct2-{kind}"
        if not target.exists():
            ctranslate2.converters.TransformersConverter(str(directory)).convert(str(target), quantization=kind)
        model = ctranslate2.models.Whisper(
            str(target), device="cpu", compute_type=kind, intra_threads=arguments.threads, inter_threads=1
        )

        def run(model: Any = model, *, size: int) -> float:
            started_s = time.perf_counter()
            for first in range(0, len(features), size):
                batch = ctranslate2.StorageView.from_array(np.ascontiguousarray(features[first : first + size]))
                num = len(features[first : first + size])
                # No sampling, no beams; ends are suppressed, so that all write as much.
                model.generate(
                    batch,
                    [[start_id]] * num,
                    beam_size=1,
                    max_length=arguments.new_tokens + 1,
                    suppress_tokens=[end_id],
                    suppress_blank=False,
                )
            return time.perf_counter() - started_s

        runs[f"ctranslate2 {kind}, one batch"] = lambda run=run: run(size=len(features))  # type: ignore[misc]
        runs[f"ctranslate2 {kind}, in turn"] = lambda run=run: run(size=1)  # type: ignore[misc]
    return runs


def main() -> None:
    """Time the shape that the command line names."""
    parser = argparse.ArgumentParser(description="Compare the engine with generate and CTranslate2 on speech.")
    parser.add_argument("shape", choices=[name for name in SHAPES if name.startswith("whisper")])
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=sorted(DTYPES))
    parser.add_argument("--peers", nargs="*", default=["float32", "int8"], help="compute types of CTranslate2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-generate", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = SHAPES[arguments.shape]
    plain = make(shape, torch.float32)
    assert isinstance(plain, WhisperForConditionalGeneration) and isinstance(plain.config, WhisperConfig)
    sources = sources_of(plain, arguments.requests, 0)
    runs: dict[str, Callable[[], float]] = {}
    for dtype in arguments.dtypes:
        engine = build(make(shape, DTYPES[dtype]), sources, arguments.new_tokens)
        run_engine(engine, sources[:1], 4, 0)  # warm-up
        rounds = iter(range(1, 100))
        runs[f"engine {dtype}"] = lambda engine=engine, rounds=rounds: run_engine(  # type: ignore[misc]
            engine, sources, arguments.new_tokens, next(rounds)
        )
    ours = dict(runs)
    if not arguments.no_generate:
        runs["generate float32"] = lambda: run_generate(plain, sources, arguments.new_tokens)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        if arguments.peers:
            start_id, end_id = write_for_peers(plain, directory)
            runs |= ctranslate2_runs(directory, start_id, end_id, sources, arguments)
        rows = []
        for name, run in [*runs.items(), *((f"{name}, again", run) for name, run in ours.items())]:
            seconds = run()
            rate = len(sources) * WINDOW_S / seconds
            rows.append((name, f"{seconds:.2f}", f"{rate:.2f}"))
            sys.stderr.write(f"{name}: {seconds:.2f} s\n")
    sys.stdout.write(table(("what", "seconds", "audio s/s"), rows) + "\n")


if __name__ == "__main__":
    main()
