"""What is asked of a transcription and what comes back: plain data between the wire and the transcriber.

Knows nothing of HTTP, audio files or engines; no torch here.
Filled by api/audio.py, read and answered by runtime/transcriber.py.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

Task = Literal["transcribe", "translate"]


@dataclass(frozen=True, slots=True)
class VadChunking:
    """Cut long audio at pauses; all windows of a recording are transcribed side by side.

    Args:
        threshold: how loud or speech-like, 0 to 1, a moment must be to count as speech; None for the default.
        prefix_padding_ms: audio kept before speech; None for the default.
        silence_duration_ms: a pause must last this long to be one; None for the default.
    """

    threshold: float | None = None
    prefix_padding_ms: int | None = None
    silence_duration_ms: int | None = None


@dataclass(frozen=True, slots=True)
class SequentialChunking:
    """Seek through long audio window by window, each beginning where the last timestamp of the one before ended."""


Chunking = VadChunking | SequentialChunking


@dataclass(frozen=True, slots=True)
class TranscriptionRequest:
    """One recording and what is wanted of it.

    Args:
        audio: the uploaded file's bytes, of any format the server reads.
        task: transcribe in the language spoken, or translate to English.
        language: code such as `en`, as the model knows it; None to find it from the audio.
        prompt: text that comes before, for spelling and style.
        temperature: 0 for the ladder of 0 to 1 by 0.2; else the only one tried.
        has_timestamps: whether the model writes times, which keeps it on its way through a full window.
        has_words: whether words need their times.
        chunking: how audio longer than a window is cut.
        seed: makes what is drawn at temperatures above 0 repeatable; None for the server's choice.
        priority: lower runs first among those waiting.
        cache_salt: sources of different salts never share encoder output.
        arrival_time_s: time.monotonic() of the request's arrival.
    """

    audio: bytes = field(repr=False)
    task: Task = "transcribe"
    language: str | None = None
    prompt: str = ""
    temperature: float = 0.0
    has_timestamps: bool = True
    has_words: bool = False
    chunking: Chunking = VadChunking()
    seed: int | None = None
    priority: int = 0
    cache_salt: bytes = b""
    arrival_time_s: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Recording:
    """What is known before the first segment: always the first event of a transcription.

    Args:
        duration_s: of the audio.
        language: given or found, a code such as `en`; None when nothing is spoken and none was given.
        num_windows: pieces the audio was cut into.
    """

    duration_s: float
    language: str | None
    num_windows: int


@dataclass(frozen=True, slots=True)
class Word:
    """One word, with the space before it where the language writes one, and its time in the recording."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of speech, in the recording's time; segments come in order.

    Args:
        seek: where its window begins, in hundredths of a second.
        start_s, end_s: its time.
        text: as the model wrote it, leading space included.
        token_ids: the model's tokens, timestamps included.
        temperature: of the try that won.
        avg_logprob: of the window's tokens.
        compression_ratio: of the window's text (zlib), high when it repeats itself.
        no_speech_prob: of the window.
        words: None unless asked for.
    """

    seek: int
    start_s: float
    end_s: float
    text: str
    token_ids: tuple[int, ...]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    words: tuple[Word, ...] | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event: what the whole cost.

    Args:
        num_tokens: generated, all tries together.
        num_fallbacks: tries at a higher temperature.
    """

    num_tokens: int
    num_fallbacks: int


TranscriptionEvent = Recording | Segment | Finished
