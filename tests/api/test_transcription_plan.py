"""From a form's fields to what the transcriber is asked."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from pydantic import ValidationError

from api.errors import from_validation
from api.transcription_plan import TranscriptionPlan, transcription_plan
from config import Settings
from engine.errors import CallerError, UnsupportedParameter
from models import TranscriptionBody
from runtime.transcription import SequentialChunking, Task, VadChunking
from tests.api.scripted import ScriptedEngine, byte_tokenizer, says, stack

LOADED = stack(ScriptedEngine(says([65], None)), byte_tokenizer(), family="speech", languages=("en", "ms", "jw"))
INFO = LOADED(Settings(hf_model="org/tiny"), lambda *_: None).info
ENGLISH_ONLY = dataclasses.replace(INFO, languages=())


def plan(task: Task = "transcribe", info: Any = INFO, **fields: Any) -> TranscriptionPlan:
    try:
        body = TranscriptionBody.model_validate(fields)
    except ValidationError as error:
        raise from_validation(error) from None
    return transcription_plan(body, task, info)


def test_without_fields_everything_is_found_out() -> None:
    request = plan().request(b"audio", seed=7, cache_salt=b"salt", arrival_time_s=1.5)
    assert (request.audio, request.task, request.language, request.prompt) == (b"audio", "transcribe", None, "")
    assert (request.temperature, request.has_timestamps, request.has_words) == (0.0, True, False)
    assert request.chunking == VadChunking() and request.priority == 0
    assert (request.seed, request.cache_salt, request.arrival_time_s) == (7, b"salt", 1.5)


def test_every_field_reaches_the_request() -> None:
    made = plan(
        "translate",
        language="Malay",
        prompt="Tun Dr.",
        response_format="verbose_json",
        temperature="0.4",
        timestamp_granularities=["word"],
        chunking_strategy='{"type": "server_vad", "threshold": 0.3, "prefix_padding_ms": 0, "silence_duration_ms": 9}',
        seed="-5",
        priority="3",
    )
    request = made.request(b"", seed=7, cache_salt=b"", arrival_time_s=0)
    assert (request.task, request.language, request.prompt) == ("translate", "ms", "Tun Dr.")
    assert (request.temperature, request.has_timestamps, request.has_words) == (0.4, True, True)
    assert request.chunking == VadChunking(threshold=0.3, prefix_padding_ms=0, silence_duration_ms=9)
    assert (request.seed, request.priority) == (-5, 3)
    assert made.has_words and not made.has_segments


def test_objects_may_come_as_json_or_entry_by_entry() -> None:
    entries = {"type": "server_vad", "threshold": "0.3", "silence_duration_ms": "250"}
    json_text = '{"type": "server_vad", "threshold": 0.3, "silence_duration_ms": 250}'
    assert plan(chunking_strategy=entries).chunking == plan(chunking_strategy=json_text).chunking
    assert (
        plan(chunking_strategy="auto").chunking == plan(chunking_strategy='{"type": "auto"}').chunking == VadChunking()
    )
    assert plan(chunking_strategy='{"type": "server_vad"}').chunking == VadChunking()


@pytest.mark.parametrize("response_format", ["json", "text", "srt", "vtt", "verbose_json"])
def test_times_are_always_asked_for_so_that_every_format_has_one_text(response_format: str) -> None:
    made = plan(response_format=response_format)
    assert made.request(b"", seed=1, cache_salt=b"", arrival_time_s=0.0).has_timestamps


def test_seeking_can_be_asked_for() -> None:
    assert plan(chunking_strategy='{"type": "sequential"}').chunking == SequentialChunking()


def test_granularities_are_segments_unless_named() -> None:
    for given, segments, words in ((None, True, False), (["segment"], True, False), ("word", False, True)):
        made = plan(response_format="verbose_json", timestamp_granularities=given)
        assert (made.has_segments, made.has_words) == (segments, words)
    both = plan(response_format="verbose_json", timestamp_granularities=["word", "segment", "word"])
    assert both.has_segments and both.has_words


@pytest.mark.parametrize(
    ("language", "code"),
    [("ms", "ms"), ("EN", "en"), ("Javanese", "jw"), ("jv", "jw"), ("null", None), ("None", None), ("", None)],
)
def test_languages_are_codes_or_names_and_older_clients_nothings(language: str, code: str | None) -> None:
    assert plan(language=language).language == code


def test_a_model_of_one_language_knows_english_and_does_not_translate() -> None:
    assert plan(info=ENGLISH_ONLY, language="english").language == "en"
    assert plan(info=ENGLISH_ONLY).language is None
    with pytest.raises(CallerError, match=r'language is "ms": it must be en, the only one'):
        plan(info=ENGLISH_ONLY, language="ms")
    with pytest.raises(UnsupportedParameter, match=r"org/tiny knows English only"):
        plan("translate", info=ENGLISH_ONLY)


def test_empty_fields_are_fields_not_given() -> None:
    empty: dict[str, Any] = dict.fromkeys(TranscriptionBody.model_fields, "")
    assert plan(**empty) == plan()


def test_a_temperature_that_is_next_to_nothing_is_the_ladder() -> None:
    assert plan(temperature="1e-300").temperature == 0.0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"language": "xx"}, "language"),
        ({"language": "english-US"}, "language"),
        ({"prompt": "x" * 20_001}, "prompt"),
        ({"response_format": "xml"}, "response_format"),
        ({"response_format": "diarized_json"}, "response_format"),
        ({"temperature": "1.1"}, "temperature"),
        ({"temperature": "-0.1"}, "temperature"),
        ({"temperature": "nan"}, "temperature"),
        ({"temperature": "inf"}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"temperature": ["0", "1"]}, "temperature"),
        ({"timestamp_granularities": ["word"]}, "timestamp_granularities"),
        ({"timestamp_granularities": ["segment"], "response_format": "srt"}, "timestamp_granularities"),
        ({"timestamp_granularities": ["words"], "response_format": "verbose_json"}, "timestamp_granularities[0]"),
        ({"timestamp_granularities": {"a": "word"}}, "timestamp_granularities"),
        ({"stream": "maybe"}, "stream"),
        ({"seed": str(2**64)}, "seed"),
        ({"seed": "1.5"}, "seed"),
        ({"priority": "1001"}, "priority"),
        ({"model": ["a", "b"]}, "model"),
        ({"chunking_strategy": "none"}, "chunking_strategy"),
        ({"chunking_strategy": "[]"}, "chunking_strategy"),
        ({"chunking_strategy": "{"}, "chunking_strategy"),
        ({"chunking_strategy": "[" * 100_000}, "chunking_strategy"),
        ({"chunking_strategy": ["auto"]}, "chunking_strategy"),
        ({"chunking_strategy": "{}"}, "chunking_strategy.type"),
        ({"chunking_strategy": '{"type": "client_vad"}'}, "chunking_strategy.type"),
        ({"chunking_strategy": '{"type": "auto", "threshold": 0.5}'}, "chunking_strategy"),
        ({"chunking_strategy": '{"type": "server_vad", "threshold": 1.5}'}, "chunking_strategy.threshold"),
        ({"chunking_strategy": '{"type": "server_vad", "threshold": NaN}'}, "chunking_strategy.threshold"),
        ({"chunking_strategy": '{"type": "server_vad", "threshold": "x"}'}, "chunking_strategy.threshold"),
        (
            {"chunking_strategy": {"type": "server_vad", "prefix_padding_ms": "-1"}},
            "chunking_strategy.prefix_padding_ms",
        ),
        (
            {"chunking_strategy": '{"type": "server_vad", "silence_duration_ms": 30001}'},
            "chunking_strategy.silence_duration_ms",
        ),
    ],
)
def test_values_out_of_bounds_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(CallerError) as caught:
        plan(**fields)
    assert caught.value.param == param
    assert str(caught.value).startswith(param) and len(str(caught.value)) < 300
