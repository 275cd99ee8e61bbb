"""OpenAI's own client transcribes and translates, sync and async, against a real server; older clients and curl too."""

from __future__ import annotations

import asyncio
import io
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.audio import Transcription, TranscriptionVerbose, Translation, TranslationVerbose

from audio.errors import AudioError
from engine.errors import NonFiniteLogits
from runtime.transcription import SequentialChunking, VadChunking
from tests.api.conftest import run_async
from tests.api.speech import AUDIO, EVENTS, RECORDING, SEGMENTS, TEXT, SpeechServer, plays, speech_server
from tests.api.test_transcripts import SRT, USAGE, VTT

# The endpoint is marked as deprecated in the client.
deprecated = pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")


@pytest.fixture(scope="module")
def running() -> Iterator[SpeechServer]:
    with speech_server(api_key=("secret",)) as server:
        yield server


@pytest.fixture
def server(running: SpeechServer) -> SpeechServer:
    running.manager.script = plays(*EVENTS)
    running.manager.asked.clear()
    return running


@pytest.fixture
def client(server: SpeechServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="secret", max_retries=0, timeout=20) as client:
        yield client


def named_file(name: str = "speech.mp3") -> io.BytesIO:
    file = io.BytesIO(AUDIO)
    file.name = name
    return file


def test_every_format_is_what_the_client_types_it_as(client: openai.OpenAI) -> None:
    plain = client.audio.transcriptions.create(model="org/tiny", file=named_file())
    assert type(plain) is Transcription and plain.text == TEXT
    assert plain.usage is not None and plain.usage.to_dict() == USAGE and plain._request_id
    made = client.audio.transcriptions.create(
        model="model", file=named_file(), response_format="verbose_json", timestamp_granularities=["word", "segment"]
    )
    assert type(made) is TranscriptionVerbose
    TranscriptionVerbose.model_validate(made.to_dict(), strict=True)
    assert (made.language, made.duration, made.text) == ("malay", 3661.062, TEXT)
    assert made.segments is not None and [segment.id for segment in made.segments] == [0, 1, 2, 3]
    assert made.words is not None and [word.word for word in made.words] == ["Good", "morning,", "a", "Grüße"]
    for response_format, body in (("text", TEXT + "\n"), ("srt", SRT), ("vtt", VTT)):
        text: Any = client.audio.transcriptions.create(
            model="model",
            file=AUDIO,
            response_format=response_format,  # type: ignore[call-overload]  # one for each literal
        )
        assert text == body


@deprecated
def test_translations(client: openai.OpenAI, server: SpeechServer) -> None:
    plain = client.audio.translations.create(model="model", file=named_file(), prompt="Mr. Tan", temperature=0.5)
    assert type(plain) is Translation and plain.to_dict() == {"text": TEXT}
    asked = server.manager.asked[-1]
    assert (asked.task, asked.prompt, asked.temperature) == ("translate", "Mr. Tan", 0.5)
    made = client.audio.translations.create(model="model", file=named_file(), response_format="verbose_json")
    assert type(made) is TranslationVerbose and (made.language, made.text) == ("english", TEXT)
    assert client.audio.translations.create(model="model", file=named_file(), response_format="srt") == SRT
    client.audio.translations.create(model="model", file=named_file(), extra_body={"language": "ms"})
    assert server.manager.asked[-1].language == "ms"


def test_every_parameter_of_the_client_arrives(client: openai.OpenAI, server: SpeechServer) -> None:
    raw = client.audio.transcriptions.with_raw_response.create(
        model="model",
        file=("a.wav", AUDIO, "audio/wav"),
        language="es",
        prompt="Señor: “Núñez”",
        temperature=1,
        response_format="verbose_json",
        timestamp_granularities=["word"],
        chunking_strategy={
            "type": "server_vad",
            "threshold": 0.25,
            "prefix_padding_ms": 100,
            "silence_duration_ms": 700,
        },
        stream=False,
        extra_body={"seed": 11, "priority": -1},
    )
    assert "x-ignored-parameters" not in raw.headers
    asked = server.manager.asked[-1]
    assert asked.audio == AUDIO and asked.language == "es" and asked.prompt == "Señor: “Núñez”"
    assert asked.temperature == 1.0 and asked.has_words and asked.seed == 11 and asked.priority == -1
    assert asked.chunking == VadChunking(threshold=0.25, prefix_padding_ms=100, silence_duration_ms=700)
    client.audio.transcriptions.create(model="model", file=AUDIO, chunking_strategy="auto")
    assert server.manager.asked[-1].chunking == VadChunking()
    sequential: Any = {"type": "sequential"}
    client.audio.transcriptions.create(model="model", file=AUDIO, chunking_strategy=sequential)
    assert isinstance(server.manager.asked[-1].chunking, SequentialChunking)
    with pytest.raises(openai.BadRequestError, match="include") as caught:
        client.audio.transcriptions.create(model="model", file=AUDIO, include=["logprobs"])
    assert caught.value.code == "unsupported_parameter"
    with pytest.raises(openai.BadRequestError, match="known_speaker_names"):
        client.audio.transcriptions.create(model="model", file=AUDIO, known_speaker_names=["a", "b"])


def test_streams_are_the_clients_own_events(client: openai.OpenAI, server: SpeechServer) -> None:
    server.manager.script = plays(RECORDING, *(event for segment in SEGMENTS for event in (0.02, segment)), EVENTS[-1])
    with client.audio.transcriptions.create(model="model", file=named_file(), stream=True) as stream:
        *deltas, done = list(stream)
    assert [delta.type for delta in deltas] == ["transcript.text.delta"] * 3
    assert done.type == "transcript.text.done"
    assert "".join(delta.delta for delta in deltas if delta.type == "transcript.text.delta") == done.text == TEXT
    assert done.usage is not None and done.usage.to_dict() == USAGE


def test_errors_are_the_clients_own_exceptions(client: openai.OpenAI, server: SpeechServer) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.audio.transcriptions.create(model="whisper-1", file=AUDIO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature is 3"):
        client.audio.transcriptions.create(model="model", file=AUDIO, temperature=3)
    with pytest.raises(openai.BadRequestError, match="file is empty"):
        client.audio.transcriptions.create(model="model", file=b"")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").audio.transcriptions.create(model="model", file=AUDIO)
    with pytest.raises(openai.NotFoundError, match="transcribes speech"):
        client.chat.completions.create(model="model", messages=[{"role": "user", "content": "Hi"}])
    with pytest.raises(openai.APIStatusError, match="--max-audio-size") as too_large:
        client.audio.transcriptions.create(model="model", file=bytes(27_000_000))
    assert too_large.value.status_code == 413
    with pytest.raises(openai.APIStatusError, match=r"file has more than 25000000 bytes"):
        client.audio.transcriptions.create(model="model", file=bytes(25_000_001))
    server.manager.script = plays(AudioError("file is no audio that this server can read"))
    with pytest.raises(openai.BadRequestError, match="no audio that this server can read") as unreadable:
        client.audio.transcriptions.create(model="model", file=AUDIO)
    assert unreadable.value.param == "file"
    server.manager.script = plays(RECORDING, SEGMENTS[0], NonFiniteLogits("NaN"))
    with pytest.raises(openai.APIError, match="NaN"):
        list(client.audio.transcriptions.create(model="model", file=AUDIO, stream=True))


@deprecated
def test_async_clients_side_by_side(server: SpeechServer) -> None:
    server.manager.script = plays(RECORDING, 0.05, *SEGMENTS, 0.05, EVENTS[-1])

    async def scenario() -> None:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="secret", max_retries=0) as client:

            async def one(number: int) -> str:
                audio = AUDIO + bytes([number])
                if number % 4 == 0:
                    return (await client.audio.transcriptions.create(model="model", file=audio)).text
                if number % 4 == 1:
                    return (await client.audio.translations.create(model="model", file=audio)).text
                if number % 4 == 2:
                    verbose = await client.audio.transcriptions.create(
                        model="model", file=audio, response_format="verbose_json"
                    )
                    return verbose.text
                stream = await client.audio.transcriptions.create(model="model", file=audio, stream=True)
                events = [event async for event in stream]
                deltas = [event.delta for event in events if event.type == "transcript.text.delta"]
                assert events[-1].type == "transcript.text.done" and events[-1].text == TEXT
                return "".join(deltas)

            assert await asyncio.gather(*map(one, range(32))) == [TEXT] * 32
        assert sorted(asked.audio for asked in server.manager.asked) == [AUDIO + bytes([n]) for n in range(32)]

    run_async(scenario())
    assert server.manager.num_open == 0


def test_what_older_clients_of_this_api_send_is_understood(server: SpeechServer) -> None:
    form: Any = {
        "top_k": (None, "50"),
        "timestamp_granularities": (None, "segment"),
        "top_p": (None, "0.95"),
        "model": (None, "model"),
        "temperature": (None, "0"),
        "response_format": (None, "verbose_json"),
        "language": (None, "null"),
        "repetition_penalty": (None, "1"),
        "file": ("test.mp3", AUDIO, "audio/mpeg"),
    }
    headers = {"authorization": "Bearer secret"}
    response = httpx.post(f"{server.url}/audio/transcriptions", files=form, headers=headers)
    assert response.status_code == 200 and response.json()["segments"][0]["text"] == " Good morning,"
    assert server.manager.asked[-1].language is None
    assert response.headers["x-ignored-parameters"] == "top_k, top_p, repetition_penalty"


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl_gets_cues_as_they_are_decided(server: SpeechServer) -> None:
    server.manager.script = plays(RECORDING, SEGMENTS[0], 30.0)
    curl = [
        "curl", "-sN", "-X", "POST", f"{server.url}/audio/transcriptions", "-H", "authorization: Bearer secret",
        "-H", "Content-Type: multipart/form-data", "-F", "file=@-;filename=a.mp3;type=audio/mpeg", "-F", "model=model",
        "-F", "response_format=srt", "-F", "stream=true",
    ]  # fmt: skip
    with subprocess.Popen(curl, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(AUDIO)
        process.stdin.close()
        lines = [process.stdout.readline() for _ in range(6)]
        process.kill()
    cue = ["1", "00:00:00,000 --> 00:00:02,500", "Good morning,", "", ""]
    assert b"".join(lines).decode() == "".join(f"data: {line}\n" for line in cue) + "\n"
    assert server.manager.asked[-1].audio == AUDIO
