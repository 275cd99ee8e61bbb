"""Every format of a transcription, whole and in frames, against what it should look like to the letter."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.audio import Transcription, TranscriptionVerbose, Translation, TranslationVerbose

from api.transcription_plan import transcription_plan
from api.transcripts import JoinedText, answer_to
from models import TranscriptionBody
from runtime.transcription import Finished, Recording, Segment, Task, TranscriptionEvent
from tests.api.speech import EVENTS, SEGMENTS, TEXT
from tests.api.test_transcription_plan import INFO

FORMATS = ["json", "text", "srt", "vtt", "verbose_json"]
USAGE = {"type": "duration", "seconds": 3661.062}
SRT = """1
00:00:00,000 --> 00:00:02,500
Good morning,

2
00:00:02,500 --> 00:01:00,000
a -> b
& <c>

3
00:01:00,000 --> 01:01:01,001
Grüße 世界

"""
VTT = """WEBVTT

00:00:00.000 --> 00:00:02.500
Good morning,

00:00:02.500 --> 00:01:00.000
a --&gt; b
&amp; &lt;c&gt;

00:01:00.000 --> 01:01:01.001
Grüße 世界

"""
VERBOSE = {
    "task": "transcribe",
    "language": "malay",
    "duration": 3661.062,
    "text": TEXT,
    "segments": [
        {
            "id": 0, "seek": 0, "start": 0.0, "end": 2.5, "text": " Good morning,",
            "tokens": [50364, 2205, 2446, 11, 50489], "temperature": 0.0, "avg_logprob": -0.25,
            "compression_ratio": 1.1, "no_speech_prob": 0.01,
        },
        {
            "id": 1, "seek": 0, "start": 2.5, "end": 60.0, "text": " a --> b\n & <c> ", "tokens": [50489, 257],
            "temperature": 0.2, "avg_logprob": -0.5, "compression_ratio": 1.25, "no_speech_prob": 0.02,
        },
        {
            "id": 2, "seek": 3000, "start": 60.0, "end": 60.0, "text": "  ", "tokens": [50364], "temperature": 0.0,
            "avg_logprob": -0.125, "compression_ratio": 0.5, "no_speech_prob": 0.75,
        },
        {
            "id": 3, "seek": 3000, "start": 60.0, "end": 3661.001, "text": " Grüße 世界", "tokens": [3, 4, 5],
            "temperature": 1.0, "avg_logprob": -1.5, "compression_ratio": 2.5, "no_speech_prob": 0.5,
        },
    ],
    "words": [
        {"word": "Good", "start": 0.1, "end": 0.55},
        {"word": "morning,", "start": 0.55, "end": 2.5},
        {"word": "a", "start": 2.5, "end": 3.0},
        {"word": "Grüße", "start": 60.0, "end": 61.0},
    ],
    "usage": USAGE,
}  # fmt: skip


def answer(task: Task = "transcribe", **fields: Any) -> Any:
    return answer_to(transcription_plan(TranscriptionBody.model_validate(fields), task, INFO))


async def events_of(events: Sequence[TranscriptionEvent]) -> AsyncGenerator[TranscriptionEvent, None]:
    for event in events:
        yield event


def whole(answering: Any, events: Sequence[TranscriptionEvent] = EVENTS) -> bytes:
    made: bytes = asyncio.run(answering.whole(events_of(events)))
    return made


def streamed(answering: Any, events: Sequence[TranscriptionEvent] = EVENTS) -> list[str]:
    """The data of each event, as a reader of server-sent events puts it together."""
    raw = b"".join(map(answering.frames, events)) + answering.last_frames()
    found = []
    for event in raw.decode().split("\n\n")[:-1]:
        lines = event.split("\n")
        assert all(line.startswith("data: ") for line in lines)
        found.append("\n".join(line.removeprefix("data: ") for line in lines))
    return found


def test_json_is_text_and_usage() -> None:
    made = json.loads(whole(answer()))
    assert made == {"text": TEXT, "usage": USAGE}
    assert Transcription.model_validate(made, strict=True).text == TEXT


def test_text_ends_with_a_line_break() -> None:
    assert whole(answer(response_format="text")).decode() == TEXT + "\n"


def test_subtitles_to_the_letter() -> None:
    assert whole(answer(response_format="srt")).decode() == SRT
    assert whole(answer(response_format="vtt")).decode() == VTT


def test_verbose_json_has_every_value_of_every_segment_and_word() -> None:
    asked: dict[str, Any] = {"response_format": "verbose_json", "timestamp_granularities": ["word", "segment"]}
    made = json.loads(whole(answer(**asked)))
    assert made == VERBOSE
    typed = TranscriptionVerbose.model_validate(made, strict=True)
    assert typed.segments is not None and typed.words is not None and typed.usage is not None
    assert typed.segments[3].avg_logprob == -1.5 and typed.words[1].word == "morning,"


def test_verbose_json_lists_what_was_asked_for() -> None:
    segments = json.loads(whole(answer(response_format="verbose_json")))
    assert segments == {name: value for name, value in VERBOSE.items() if name != "words"}
    words = json.loads(whole(answer(response_format="verbose_json", timestamp_granularities="word")))
    assert words == {name: value for name, value in VERBOSE.items() if name != "segments"}


def test_translations_are_in_english_and_have_no_usage() -> None:
    made = json.loads(whole(answer("translate")))
    assert made == {"text": TEXT} and Translation.model_validate(made, strict=True)
    verbose = json.loads(whole(answer("translate", response_format="verbose_json")))
    expected = {name: value for name, value in VERBOSE.items() if name not in ("words", "usage")}
    assert verbose == {**expected, "task": "translate", "language": "english"}
    assert TranslationVerbose.model_validate(verbose, strict=True).language == "english"


@pytest.mark.parametrize("response_format", FORMATS)
def test_silence_is_an_empty_transcript_in_every_format(response_format: str) -> None:
    silence = (Recording(2.0, None, 1), Finished(3, 0))
    made = whole(answer(response_format=response_format), silence).decode()
    usage = {"type": "duration", "seconds": 2.0}
    match response_format:
        case "json":
            assert json.loads(made) == {"text": "", "usage": usage}
        case "verbose_json":
            expected = {"task": "transcribe", "language": "", "duration": 2.0, "text": "", "segments": []}
            assert json.loads(made) == {**expected, "usage": usage}
        case _:
            assert made == {"text": "\n", "srt": "", "vtt": "WEBVTT\n\n"}[response_format]


@pytest.mark.parametrize("response_format", ["text", "srt", "vtt"])
def test_the_data_of_streamed_text_joins_to_the_whole(response_format: str) -> None:
    asked: dict[str, Any] = {"response_format": response_format}
    data = streamed(answer(**asked))
    assert "".join(data) == whole(answer(**asked)).decode()
    assert len(data) == {"text": 4, "srt": 3, "vtt": 4}[response_format]


@pytest.mark.parametrize("task", ["transcribe", "translate"])
@pytest.mark.parametrize("response_format", ["json", "verbose_json"])
def test_deltas_join_to_the_text_and_the_last_event_holds_the_whole(response_format: str, task: Task) -> None:
    asked: dict[str, Any] = {"response_format": response_format}
    *deltas, done = map(json.loads, streamed(answer(task, **asked)))
    assert all(set(delta) == {"type", "delta"} and delta["type"] == "transcript.text.delta" for delta in deltas)
    assert [delta["delta"] for delta in deltas] == ["Good morning,", " a --> b\n & <c>", " " * 4 + "Grüße 世界"]
    assert "".join(delta["delta"] for delta in deltas) == done["text"] == TEXT
    expected = json.loads(whole(answer(task, **asked)))
    assert done == {"type": "transcript.text.done", **expected, "usage": USAGE}


@given(texts=st.lists(st.text(alphabet=" ab\n\r\u3000", max_size=6), max_size=8))
def test_whatever_the_segments_say_streams_join_to_the_stripped_text(texts: list[str]) -> None:
    joined = JoinedText()
    pieces = [joined.push(text) for text in texts]
    assert "".join(pieces) == str(joined) == "".join(texts).strip()
    events = [EVENTS[0], *(Segment(0, 0, 1, text, (), 0, 0, 0, 0) for text in texts), EVENTS[-1]]
    assert json.loads(whole(answer(), events))["text"] == str(joined)
    said = "".join(streamed(answer(response_format="text"), events))
    assert said == str(joined).replace("\r\n", "\n").replace("\r", "\n") + "\n"


def test_closing_is_left_to_nobody_else() -> None:
    closed = []

    async def endless() -> AsyncGenerator[TranscriptionEvent, None]:
        try:
            yield EVENTS[0]
            for segment in SEGMENTS:
                yield segment
            raise ZeroDivisionError
        finally:
            closed.append(True)

    for response_format in FORMATS:
        with pytest.raises(ZeroDivisionError):
            asyncio.run(answer(response_format=response_format).whole(endless()))
    assert len(closed) == len(FORMATS)
