"""Transcriptions and translations over HTTP: the fields, the refusals, what is counted and logged."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from api import answers
from audio.errors import AudioError, AudioTooLong
from engine.errors import EngineDead, NonFiniteLogits, QueueTimeout
from runtime.transcription import VadChunking
from tests.api.conftest import MakeHarness, run_async
from tests.api.speech import AUDIO, EVENTS, FINISHED, RECORDING, SEGMENTS, TEXT, SpeechApp, plays, speech_app
from tests.api.test_chat import HELLO, frames_of, post
from tests.api.test_errors import error_of
from tests.api.test_transcripts import SRT, USAGE, VERBOSE, VTT

TASKS = ["transcriptions", "translations"]


def sse_data(response: httpx.Response) -> list[str]:
    """The data of the events of plain text, as a reader puts it together."""
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [event for event in response.text.split("\n\n") if event != ": ping"]
    assert events.pop() == ""
    return ["\n".join(line.removeprefix("data: ") for line in event.split("\n")) for event in events]


async def samples(app: SpeechApp) -> dict[str, float]:
    response = await app.client.get("/metrics")
    return {
        sample.name.removeprefix("transformers_openai:"): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
        if "le" not in sample.labels
    }


@pytest.mark.parametrize("prefix", ["/v1", ""])
def test_what_is_said_comes_back_with_and_without_the_version(prefix: str) -> None:
    async def scenario() -> None:
        async with speech_app() as app:
            for path, task in zip(TASKS, ("transcribe", "translate"), strict=True):
                files = {"file": ("x.mp3", AUDIO)}
                response = await app.client.post(f"{prefix}/audio/{path}", data={"model": "org/tiny"}, files=files)
                assert response.status_code == 200 and response.json()["text"] == TEXT
                assert response.headers["content-type"] == "application/json"
                assert response.headers["x-request-id"] and "x-ignored-parameters" not in response.headers
                asked = app.manager.asked[-1]
                assert asked.audio == AUDIO and asked.task == task and asked.chunking == VadChunking()
            assert app.manager.num_open == 0 and app.manager.num_admitted == 0

    run_async(scenario())


@pytest.mark.parametrize(
    ("response_format", "content_type", "body"),
    [
        ("text", "text/plain; charset=utf-8", TEXT + "\n"),
        ("srt", "text/plain; charset=utf-8", SRT),
        ("vtt", "text/plain; charset=utf-8", VTT),
        ("json", "application/json", {"text": TEXT, "usage": USAGE}),
        ("verbose_json", "application/json", {k: v for k, v in VERBOSE.items() if k != "words"}),
    ],
)
def test_every_format_has_its_type(response_format: str, content_type: str, body: Any) -> None:
    async def scenario() -> None:
        async with speech_app() as app:
            response = await app.post({"response_format": response_format})
            assert response.headers["content-type"] == content_type
            assert (response.json() if isinstance(body, dict) else response.text) == body

    run_async(scenario())


def test_arrays_come_with_brackets_or_without() -> None:
    async def scenario() -> None:
        async with speech_app() as app:
            for name in ("timestamp_granularities[]", "timestamp_granularities"):
                fields = {"response_format": "verbose_json", name: ["word", "segment"]}
                assert (await app.post(fields)).json() == VERBOSE
                assert app.manager.asked[-1].has_words

    run_async(scenario())


@pytest.mark.parametrize("task", TASKS)
def test_streamed_json_is_deltas_then_the_end_then_done(task: str) -> None:
    async def scenario() -> None:
        async with speech_app() as app:
            response = await app.post({"stream": "true"}, task)
            assert response.headers["cache-control"] == "no-cache" and response.headers["x-accel-buffering"] == "no"
            *deltas, done = frames_of(response)
            assert {delta["type"] for delta in deltas} == {"transcript.text.delta"} and len(deltas) == 3
            assert "".join(delta["delta"] for delta in deltas) == TEXT
            assert done == {"type": "transcript.text.done", "text": TEXT, "usage": USAGE}

    run_async(scenario())


@pytest.mark.parametrize("response_format", ["text", "srt", "vtt"])
def test_streamed_text_and_subtitles_are_events_whose_data_is_the_file(response_format: str) -> None:
    async def scenario() -> None:
        async with speech_app() as app:
            whole = await app.post({"response_format": response_format})
            *data, done = sse_data(await app.post({"response_format": response_format, "stream": "true"}))
            assert "".join(data) == whole.text and done == "[DONE]" and len(data) >= 3

    run_async(scenario())


def test_errors_after_the_200_are_an_event_followed_by_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "STATUS_WAIT_S", 0.0)

    async def scenario() -> None:
        async with speech_app() as app:
            for response_format in ("json", "srt"):
                app.manager.script = plays(RECORDING, SEGMENTS[0], NonFiniteLogits("NaN in row 3"))
                *_, last = sse_data(await app.post({"stream": "true", "response_format": response_format}))[:-1]
                assert json.loads(last)["error"]["code"] == "server_error"
                # What decodes for longer than the status line waits.
                app.manager.script = plays(0.1, AudioError("not audio"))
                (last,) = sse_data(await app.post({"stream": "true", "response_format": response_format}))[:-1]
                assert json.loads(last)["error"] == {
                    "message": "not audio",
                    "type": "invalid_request_error",
                    "param": "file",
                    "code": "invalid_request_error",
                }
                assert app.manager.num_open == 0

    run_async(scenario())


@pytest.mark.parametrize("stream", ["true", "false"])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (AudioError("file is not audio"), 400, "invalid_request_error"),
        (AudioTooLong(8), 413, "audio_too_long"),
        (QueueTimeout("waited"), 503, "overloaded"),
        (NonFiniteLogits("NaN"), 500, "server_error"),
        (EngineDead("dead"), 500, "server_error"),
        (ZeroDivisionError("secret"), 500, "server_error"),
    ],
)
def test_errors_before_the_first_event_have_a_status_of_their_own(
    stream: str, error: Exception, status: int, code: str
) -> None:
    async def scenario() -> None:
        async with speech_app() as app:
            app.manager.script = plays(error)
            response = await app.post({"stream": stream})
            found = error_of(response)
            assert (response.status_code, found["code"]) == (status, code)
            assert found["param"] == ("file" if isinstance(error, AudioError) else None)
            assert "secret" not in response.text
            assert app.manager.num_open == 0 and app.manager.num_admitted == 0

    run_async(scenario())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"model": "whisper-1"}, 404, "model_not_found", "model"),
        ({"language": "xx"}, 400, "invalid_request_error", "language"),
        ({"temperature": "2"}, 400, "invalid_request_error", "temperature"),
        ({"temperature": "hot"}, 400, "invalid_request_error", "temperature"),
        ({"response_format": "xml"}, 400, "invalid_request_error", "response_format"),
        ({"response_format": "diarized_json"}, 400, "unsupported_parameter", "response_format"),
        ({"timestamp_granularities[]": "word"}, 400, "invalid_request_error", "timestamp_granularities"),
        ({"chunking_strategy": "{}"}, 400, "invalid_request_error", "chunking_strategy.type"),
        ({"chunking_strategy[type]": "x"}, 400, "invalid_request_error", "chunking_strategy.type"),
        ({"stream": "2"}, 400, "invalid_request_error", "stream"),
        ({"include[]": "logprobs"}, 400, "unsupported_parameter", "include"),
        ({"known_speaker_names[]": "agent"}, 400, "unsupported_parameter", "known_speaker_names"),
        ({"known_speaker_references[]": "data:"}, 400, "unsupported_parameter", "known_speaker_references"),
        ({"keywords[]": "word"}, 400, "unsupported_parameter", "keywords"),
        ({"languages[]": ["en", "ms"]}, 400, "unsupported_parameter", "languages"),
        ({"prompt": "x", "prompt[a]": "y"}, 400, "invalid_request_error", "prompt"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    task: str, fields: dict[str, Any], status: int, code: str, param: str
) -> None:
    async def scenario() -> None:
        async with speech_app() as app:
            response = await app.post(fields, task)
            error = error_of(response)
            assert (response.status_code, error["code"], error["param"]) == (status, code, param), error
            assert param in error["message"] and not app.manager.asked

    run_async(scenario())


def test_fields_that_nobody_knows_are_named_or_refused() -> None:
    unknown = {"top_k": "50", "chunking_strategy[type]": "server_vad", "chunking_strategy[pace]": "1", "a%22b": "2"}

    async def scenario() -> None:
        async with speech_app() as app:
            for stream in ("true", "false"):
                response = await app.post({**unknown, "stream": stream})
                names = response.headers["x-ignored-parameters"].split(", ")
                assert set(names) == {"top_k", "chunking_strategy.pace", "a%2522b"}
        async with speech_app(strict_parameters=True) as app:
            response = await app.post({"top_k": "50"})
            assert response.status_code == 400 and error_of(response)["param"] == "top_k"
            response = await app.post({"chunking_strategy": '{"type": "auto", "pace": 1}'})
            assert response.status_code == 400 and error_of(response)["param"] == "chunking_strategy.pace"
            known = {"include[]": "", "language": "", "seed": "1", "priority": "2", "chunking_strategy": "auto"}
            response = await app.post(known)
            assert response.status_code == 200 and "x-ignored-parameters" not in response.headers

    run_async(scenario())


def test_a_speech_model_says_that_it_transcribes() -> None:
    async def scenario() -> None:
        async with speech_app() as app:
            for path, body in (("chat/completions", HELLO), ("completions", {"prompt": "a"})):
                for stream in (True, False):
                    response = await app.client.post(f"/v1/{path}", json={**body, "stream": stream})
                    error = error_of(response)
                    assert (response.status_code, error["code"]) == (404, "unsupported_model")
                    assert "/v1/audio/transcriptions" in error["message"] and "org/tiny" in error["message"]
            entry = (await app.client.get("/v1/models")).json()["data"][0]
            assert entry["family"] == "speech" and entry["languages"] == ["en", "ms", "es", "jw"]
            assert (await app.client.get("/health")).json()["family"] == "speech"
            endpoints = (await app.client.get("/")).json()["endpoints"]
            assert {"/v1/audio/transcriptions", "/v1/audio/translations"} <= set(endpoints)

    run_async(scenario())


def test_keys_are_asked_for_and_keep_recordings_apart() -> None:
    async def scenario() -> None:
        async with speech_app(api_key=("one", "two")) as app:
            assert (await app.post()).status_code == 401
            for key in ("one", "two", "one"):
                await app.post(headers={"authorization": f"Bearer {key}"})
            salts = [asked.cache_salt for asked in app.manager.asked]
            assert salts[0] == salts[2] != salts[1] and len(salts[0]) == 32

    run_async(scenario())


def test_seeds_are_the_requests_or_repeat_with_the_servers() -> None:
    async def scenario() -> None:
        drawn = []
        for _ in range(2):
            async with speech_app(seed=3) as app:
                for seed in ("7", "", ""):
                    await app.post({"seed": seed})
                drawn.append([asked.seed for asked in app.manager.asked])
        assert drawn[0] == drawn[1] and drawn[0][0] == 7 and len(set(drawn[0])) == 3

    run_async(scenario())


def test_metrics_count_seconds_and_fallbacks_as_they_come() -> None:
    async def scenario() -> None:
        async with speech_app() as app:
            seen: list[dict[str, float]] = []

            async def script(request: Any) -> Any:
                for event in EVENTS:
                    yield event
                    seen.append(await samples(app))

            app.manager.script = script
            await app.post()
            ends_s = [0.0, 2.4999, 59.9996, 59.9996, 3661.0006, 3661.0625]
            assert [sample["audio_seconds_total"] for sample in seen] == pytest.approx(ends_s)
            app.manager.script = plays(RECORDING, SEGMENTS[0], NonFiniteLogits("NaN"))
            await app.post()
            last = await samples(app)
            assert last["audio_seconds_total"] == pytest.approx(3661.0625 + 2.4999)
            assert last["audio_fallbacks_total"] == FINISHED.num_fallbacks
            assert last["generation_tokens_total"] == FINISHED.num_tokens
            assert last["e2e_request_latency_seconds_count"] == 1

    run_async(scenario())


def test_one_line_is_logged_for_each_recording_and_no_word_of_it(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with speech_app() as app:
            await app.post({"prompt": "secret"}, "translations", headers={"x-request-id": "mine"})

    with caplog.at_level(logging.INFO, "api"):
        run_async(scenario())
    (line,) = [record.getMessage() for record in caplog.records if record.name == "api.audio"]
    assert re.fullmatch(
        r"request mine: translation of 3661\.1 s of audio took \d+\.\d\d s \(\d+\.\d a second\), "
        r"123 windows, 6 fallbacks, 17 tokens",
        line,
    )
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "api"):
        run_async(scenario())
    assert "secret" not in caplog.text and "Good morning" not in caplog.text and "request mine" in caplog.text


def test_a_decoder_is_still_a_decoder(harness: MakeHarness) -> None:
    async def scenario() -> None:
        async with harness() as h:
            assert (await post(h, HELLO)).status_code == 200
            response = await h.client.post("/audio/transcriptions", files={"file": ("x.wav", AUDIO)})
            assert response.status_code == 404 and error_of(response)["code"] == "unsupported_model"

    run_async(scenario())
