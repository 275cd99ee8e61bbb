"""A recording whose windows say what a script says, and the sequences that a transcriber asks for it.

Knows nothing of sound or models: a sample is its own number, and so a spectrogram tells which window it is of.
Used by the tests of the transcriber.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.sequence import SequenceOutput, TokenLogprobs
from runtime.generation import GenerationRequest
from runtime.speech_audio import Window
from runtime.speech_model import speech_model_of
from runtime.transcriber import Transcriber
from runtime.transcription import VadChunking
from tests import tiny_whisper
from text.speech import SpeechText

TOKENIZER = tiny_whisper.tokenizer()
IDS = TOKENIZER.get_vocab()
MODEL = speech_model_of(tiny_whisper.config(), tiny_whisper.generation_config(), TOKENIZER)
ENGLISH_MODEL = speech_model_of(tiny_whisper.config(), tiny_whisper.generation_config(is_multilingual=False), TOKENIZER)
T0 = MODEL.first_timestamp_id
TEXT = SpeechText(TOKENIZER, T0)


def says(text: str) -> list[int]:
    """Tokens of text."""
    return TEXT.prompt_ids(text, 400)


def at(seconds: float) -> int:
    """A timestamp token."""
    return T0 + round(seconds / 0.02)


def start_of(request: GenerationRequest) -> int:
    """The first sample of the window that a sequence is about."""
    assert request.source is not None and request.source.features is not None
    return int(request.source.features[0, 0])


@dataclass(frozen=True)
class Said:
    """What a window says in one try."""

    tokens: list[int]
    logprob: float = -0.1
    no_speech: float = 0.01


@dataclass
class ScriptedAudio:
    """Windows as they are written here; the upload is the number of samples in letters."""

    cuts: list[tuple[int, int]] = field(default_factory=list)
    decoded: int = 0
    num_features: int = 0

    def decode(self, data: bytes) -> Any:
        self.decoded += 1
        return np.arange(int(data), dtype=np.float32)

    def windows(self, samples: Any, chunking: VadChunking) -> list[Window]:
        return [Window(*cut) for cut in self.cuts]

    def features(self, samples: Any) -> Any:
        self.num_features += 1
        return np.full((MODEL.num_mels, 4), samples[0], np.float32)

    def token_times(self, alignment: Any, *, first_row: int, num_tokens: int, num_positions: int) -> list[float]:
        """A tenth of a second for each."""
        assert alignment.dtype == np.float32 and first_row + num_tokens < alignment.shape[1]
        return [min(0.1 * index, num_positions * 0.02) for index in range(num_tokens + 1)]


@dataclass
class ScriptedSequences:
    """Runs sequences by a script: window's first sample and temperature to what is said; languages likewise."""

    script: Callable[[int, float], Said]
    hears: Callable[[int], tuple[str, float]] = lambda _: ("en", 0.01)
    before: Callable[[int], Any] = lambda _: asyncio.sleep(0)
    requests: list[GenerationRequest] = field(default_factory=list)
    num_running: int = 0
    most_running: int = 0

    def windows(self) -> list[GenerationRequest]:
        """Those that write a window down."""
        return [r for r in self.requests if r.params.max_tokens > 1]

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[SequenceOutput, None]:
        self.requests.append(request)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            start = start_of(request)
            await self.before(start)
            for output in self._outputs(request, start):
                yield output
                await asyncio.sleep(0)
        finally:
            self.num_running -= 1

    def _outputs(self, request: GenerationRequest, start: int) -> list[SequenceOutput]:
        params = request.params
        if params.is_aligning:
            shape = (2, len(request.prompt_token_ids), MODEL.num_positions)
            return [SequenceOutput(0, finish_reason="length", alignment=np.zeros(shape, np.float32))]
        if params.token_rules is not None and params.token_rules.allowed is not None:
            language, no_speech = self.hears(start)
            return [SequenceOutput(0, (IDS[f"<|{language}|>"],), finish_reason="length", probed=(no_speech,))]
        said = self.script(start, params.temperature)
        probed = None if params.probe is None else (said.no_speech,)
        tokens = [*said.tokens, MODEL.end_id]
        outputs = []
        for index, token in enumerate(tokens):
            is_last = index + 1 == len(tokens)
            outputs.append(
                SequenceOutput(
                    0,
                    (token,),
                    logprobs=(TokenLogprobs(said.logprob),),
                    finish_reason="stop" if is_last else None,
                    stop_token_id=token if is_last else None,
                    probed=probed if index == 0 else None,
                )
            )
        return outputs


def transcriber(sequences: ScriptedSequences, audio: ScriptedAudio, **changes: Any) -> Transcriber:
    """One over the script."""
    options: dict[str, Any] = {"model": MODEL, "text": TEXT, "audio": audio, "num_threads": 2, "max_windows": 4}
    return Transcriber(sequences.generate, **(options | changes))


def seconds(number: float) -> int:
    """Samples."""
    return math.floor(number * 16_000)
