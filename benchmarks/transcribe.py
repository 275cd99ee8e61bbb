"""Speech over HTTP: the same recordings, clients and weights for each server in turn, the first again at the end.

Knows nothing of the servers but the commands that start them (benchmarks/peers.md has some).
Called as `python -m benchmarks.transcribe whisper-small --server ours --server 'tf=COMMAND with {model} and {port}'`.

A server of random weights does not end by itself: the checkpoint suppresses the end, and has as many positions as
--new-tokens asks for, so that all servers write as much for each window.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import math
import statistics
import sys
import time
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from transformers import GenerationConfig, WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

from benchmarks.compare import named
from benchmarks.report import percentile, table
from benchmarks.seq2seq import SHAPES, WINDOW_S, Shape, make
from benchmarks.server_process import ServerFailed, running_server
from benchmarks.speech import write_for_peers
from benchmarks.sse_client import RequestFailed

SAMPLE_RATE_HZ = 16_000
PROMPT_TOKENS = 4  # start, language, task, and that no times are wanted
REQUEST_TIMEOUT_S = 300
# Not 0, which would ask for more tries of a text that the model doubts, as one of random weights always does.
TEMPERATURE = "0.01"


@dataclass(frozen=True, slots=True)
class Turn:
    """What one server did: seconds of all requests together, and of each."""

    server: str
    wall_s: float
    latencies_s: tuple[float, ...]
    startup_s: float


def write_speech_checkpoint(shape: Shape, directory: Path, *, num_new_tokens: int, has_language: bool) -> None:
    """Write random weights of `shape` with everything that a server wants of a Whisper checkpoint.

    Args:
        shape: of a Whisper.
        directory: made where it is not there.
        num_new_tokens: how many tokens are written for a window, when it is not asked for times.
        has_language: whether the checkpoint is for English; else each recording's language is to be found.
    """
    num_positions = num_new_tokens + PROMPT_TOKENS
    model = make(Shape(shape.model_type, {**shape.values, "max_target_positions": num_positions}), torch.float32)
    write_for_peers(model, directory)
    tokenizer = WhisperTokenizer.from_pretrained(directory)
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(directory)
    ids: dict[str, int] = tokenizer.get_vocab()
    languages = {name: number for name, number in ids.items() if name.startswith("<|") and 4 < len(name) < 8}
    languages = {name: number for name, number in languages.items() if name[2:-2].isalpha()}
    end = ids["<|endoftext|>"]
    config = GenerationConfig(
        decoder_start_token_id=ids["<|startoftranscript|>"], eos_token_id=end, bos_token_id=end, pad_token_id=end
    )
    fields: dict[str, Any] = {
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "prev_sot_token_id": ids["<|startofprev|>"],
        "is_multilingual": True,
        "lang_to_id": languages,
        "task_to_id": {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
        "suppress_tokens": [end],
        "begin_suppress_tokens": None,
        "max_length": num_positions,
        **({"language": "<|en|>", "task": "transcribe"} if has_language else {}),
    }
    for name, value in fields.items():
        setattr(config, name, value)
    model.config.update({name: getattr(config, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")})
    model.config.decoder_start_token_id = config.decoder_start_token_id
    model.config.save_pretrained(directory)
    config.save_pretrained(directory)


def recording(number: int) -> bytes:
    """A WAV file of one window of noise."""
    noise = np.random.default_rng(number).normal(0.0, 3000.0, int(WINDOW_S) * SAMPLE_RATE_HZ)
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE_HZ, 0, "NONE", ""))
        file.writeframes(noise.clip(-32_768, 32_767).astype("<i2").tobytes())
    return content.getvalue()


async def transcribe(client: httpx.AsyncClient, base_url: str, model: Path, audio: bytes) -> float:
    """Post one recording and read its text; seconds.

    Raises:
        RequestFailed: the server has not loaded its model yet.
        ServerFailed: it answered something else.
        httpx.TransportError: it does not listen.
    """
    started_s = time.perf_counter()
    answer = await client.post(
        f"{base_url}/audio/transcriptions",
        data={"model": str(model), "temperature": TEMPERATURE},
        files={"file": ("audio.wav", audio)},
    )
    if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        raise RequestFailed(answer.text)
    if answer.status_code != httpx.codes.OK or not answer.json()["text"]:
        raise ServerFailed(f"{answer.status_code}: {answer.text[:500]}")
    return time.perf_counter() - started_s


async def until_it_transcribes(base_url: str, model: str) -> None:
    """Ask for one transcript. Raises OSError while nobody listens; the transcript is the server's warm-up."""
    async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S) as client:
        try:
            await transcribe(client, base_url, Path(model), recording(10_000))
        except httpx.TransportError as error:
            raise OSError(str(error)) from error


async def run_turn(name: str, command: str, model: Path, arguments: argparse.Namespace, first: int) -> Turn:
    """Start one server, let all clients send a recording each at once, end it."""
    audios = [recording(first + number) for number in range(arguments.clients)]
    log = arguments.logs / f"{model.name}-{name}-{first}.log"
    async with (
        running_server(command, model, log, arguments.threads, until_it_transcribes) as server,
        httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S) as client,
    ):
        started_s = time.perf_counter()
        latencies = await asyncio.gather(*(transcribe(client, server.base_url, model, audio) for audio in audios))
        wall_s = time.perf_counter() - started_s
    return Turn(name, wall_s, tuple(latencies), server.startup_s)


def results(turns: Sequence[Turn]) -> str:
    """Every turn, and the first server's rate over each server's (means)."""
    rates: dict[str, list[float]] = {}
    for turn in turns:
        rates.setdefault(turn.server, []).append(len(turn.latencies_s) * WINDOW_S / turn.wall_s)
    first = statistics.fmean(next(iter(rates.values()), [math.nan]))
    rows = [
        (
            turn.server,
            f"{turn.wall_s:.2f}",
            f"{len(turn.latencies_s) * WINDOW_S / turn.wall_s:.2f}",
            f"{percentile(turn.latencies_s, 0.5):.2f}",
            f"{first / statistics.fmean(rates[turn.server]):.2f}",
        )
        for turn in turns
    ]
    return table(("server", "seconds", "audio s/s", "median request s", "first server's rate over its"), rows)


def main() -> None:
    """Compare the servers that the command line names."""
    parser = argparse.ArgumentParser(description="Compare transcription servers under the same load.")
    parser.add_argument("shape", choices=[name for name in SHAPES if name.startswith("whisper")])
    parser.add_argument("--server", action="append", required=True, help="as benchmarks/compare.py takes it")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=100, help="tokens written for each window")
    parser.add_argument("--find-language", action="store_true", help="no language is given: servers find it first")
    parser.add_argument("--models", type=Path, default=Path("build/models"), help="where checkpoints are kept")
    parser.add_argument("--logs", type=Path, default=Path("build/logs"), help="where servers' output goes")
    parser.add_argument("--threads", type=int, default=1, help="threads of each server (OMP_NUM_THREADS)")
    parser.add_argument("--once", action="store_true", help="each server once")
    arguments = parser.parse_args()
    kind = "any" if arguments.find_language else "en"
    model = (arguments.models / f"{arguments.shape}-{arguments.new_tokens}-{kind}").resolve()
    if not (model / "generation_config.json").exists():
        write_speech_checkpoint(
            SHAPES[arguments.shape],
            model,
            num_new_tokens=arguments.new_tokens,
            has_language=not arguments.find_language,
        )
    arguments.logs.mkdir(parents=True, exist_ok=True)
    servers = [named(text) for text in arguments.server]
    turns = []
    for number, (name, command) in enumerate(servers if arguments.once else [*servers, servers[0]]):
        try:
            turns.append(asyncio.run(run_turn(name, command, model, arguments, 100 * number)))
        except ServerFailed as failure:
            sys.stderr.write(f"{name}: {failure}\n")
            continue
        sys.stderr.write(f"{name}: {turns[-1].wall_s:.2f} s\n")
    sys.stdout.write(results(turns) + "\n")


if __name__ == "__main__":
    main()
