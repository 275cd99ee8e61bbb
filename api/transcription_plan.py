"""From the fields of a form to what is asked of a transcription: bounds, defaults, and what depends on the model.

Knows nothing of HTTP or of how answers are framed.
Called by api/audio.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from api import bounds
from api.errors import shown
from api.languages import ENGLISH, code_of
from api.params import MAX_PRIORITY, MIN_TEMPERATURE
from engine.errors import InvalidValue, UnsupportedParameter
from model_manager import ModelInfo
from models import ChunkingStrategy, TranscriptionBody
from runtime.transcription import Chunking, SequentialChunking, Task, TranscriptionRequest, VadChunking

Format = Literal["json", "text", "srt", "verbose_json", "vtt"]
# The model reads its last 223 tokens at most, which are never as long as this.
MAX_PROMPT_CHARS = 20_000
# No window is longer: a longer pause or padding would mean nothing.
MAX_CHUNKING_MS = 30_000
# What clients of this API send for a language that is to be found.
_NO_LANGUAGE = frozenset({"none", "null"})


@dataclass(frozen=True, slots=True)
class TranscriptionPlan:
    """Everything one form asks for.

    Args:
        task: transcribe, or translate to English.
        response_format: of the answer.
        has_segments, has_words: what verbose_json lists.
        language: a code the model knows; None to find it.
        prompt: maybe empty.
        temperature: 0 for the ladder.
        chunking: how long audio is cut.
        seed: as asked for.
        priority: lower runs first.
    """

    task: Task
    response_format: Format
    has_segments: bool
    has_words: bool
    language: str | None
    prompt: str
    temperature: float
    chunking: Chunking
    seed: int | None
    priority: int

    def request(self, audio: bytes, *, seed: int, cache_salt: bytes, arrival_time_s: float) -> TranscriptionRequest:
        """What the transcriber is asked; `seed` is for requests that name none."""
        return TranscriptionRequest(
            audio,
            task=self.task,
            language=self.language,
            prompt=self.prompt,
            temperature=self.temperature,
            has_words=self.has_words,
            chunking=self.chunking,
            seed=seed if self.seed is None else self.seed,
            priority=self.priority,
            cache_salt=cache_salt,
            arrival_time_s=arrival_time_s,
        )


def transcription_plan(body: TranscriptionBody, task: Task, info: ModelInfo) -> TranscriptionPlan:
    """The plan of a transcription or translation.

    Raises:
        InvalidValue: a value is out of its bounds, or does not fit another.
        UnsupportedParameter: this server or this model cannot do it.
    """
    if task == "translate" and not info.languages:
        raise UnsupportedParameter(f"{info.name} knows English only: it cannot translate", param="model")
    response_format = _response_format(body)
    temperature = bounds.either(bounds.number(body, "temperature", 0, 1), 0.0)
    granularities = _granularities(body)
    chunking = _chunking(body.chunking_strategy)
    return TranscriptionPlan(
        task=task,
        response_format=response_format,
        has_segments="segment" in granularities,
        has_words="word" in granularities,
        language=_language(body.language, info),
        prompt=_prompt(body),
        temperature=temperature if temperature >= MIN_TEMPERATURE else 0.0,
        # The sequential seek goes from timestamp to timestamp.
        chunking=chunking,
        seed=bounds.integer(body, "seed", -(2**63), 2**64 - 1),
        priority=bounds.either(bounds.integer(body, "priority", -MAX_PRIORITY, MAX_PRIORITY), 0),
    )


def _response_format(body: TranscriptionBody) -> Format:
    if body.response_format == "diarized_json":
        raise UnsupportedParameter(
            'response_format is "diarized_json": this server does not tell speakers apart', param="response_format"
        )
    return body.response_format


def _granularities(body: TranscriptionBody) -> frozenset[str]:
    given = body.timestamp_granularities
    if given and body.response_format != "verbose_json":
        raise InvalidValue(
            f"timestamp_granularities is {shown(given)}: it needs response_format verbose_json",
            param="timestamp_granularities",
        )
    return frozenset(given or ("segment",))


def _language(given: str | None, info: ModelInfo) -> str | None:
    if given is None or given.lower() in _NO_LANGUAGE:
        return None
    known = info.languages or (ENGLISH,)
    code = code_of(given, known)
    if code is None:
        listed = f"one of {', '.join(known)}" if info.languages else "en, the only one that this model knows"
        raise InvalidValue(f"language is {shown(given)}: it must be {listed}, or its English name", param="language")
    return code


def _prompt(body: TranscriptionBody) -> str:
    prompt = body.prompt or ""
    if len(prompt) > MAX_PROMPT_CHARS:
        raise InvalidValue(
            f"prompt has {len(prompt)} characters: at most {MAX_PROMPT_CHARS} are allowed", param="prompt"
        )
    return prompt


def _chunking(strategy: ChunkingStrategy | None) -> Chunking:
    if strategy is None or strategy.type == "auto":
        return VadChunking()
    if strategy.type == "sequential":
        return SequentialChunking()
    within = "chunking_strategy"
    return VadChunking(
        threshold=bounds.number(strategy, "threshold", 0, 1, within=within),
        prefix_padding_ms=bounds.integer(strategy, "prefix_padding_ms", 0, MAX_CHUNKING_MS, within=within),
        silence_duration_ms=bounds.integer(strategy, "silence_duration_ms", 0, MAX_CHUNKING_MS, within=within),
    )
