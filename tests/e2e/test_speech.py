"""Speech over HTTP with the demo model: its golden recordings in every form, format and company."""

from __future__ import annotations

import asyncio
import difflib
import io
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import openai
import pytest
import soundfile

from tests.e2e.serving_tiny import TinyServer, serve

WHISPER = Path(__file__).parents[2] / "demo" / "whisper"
GOLDENS: list[dict[str, Any]] = json.loads((WHISPER / "golden.json").read_text(encoding="utf-8"))
RATE_HZ = 16_000
Sound = npt.NDArray[np.float32]
# Of one window, in which something is said.
SPOKEN = [golden for golden in GOLDENS if golden["text"] and golden["task"] == "transcribe" and golden["seconds"] <= 30]


def golden(name: str) -> dict[str, Any]:
    return next(entry for entry in GOLDENS if entry["name"] == name)


def sound_of(entry: dict[str, Any]) -> Sound:
    sound, rate_hz = soundfile.read(WHISPER / entry["audio"], dtype="float32")
    assert rate_hz == RATE_HZ
    return np.asarray(sound, np.float32)


def encoded(sound: Sound, kind: str, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound, RATE_HZ, format=kind, subtype=subtype)
    return file.getvalue()


def by_pyav(sound: Sound, container: str, codec: str, rate_hz: int) -> bytes:
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate_hz, layout="mono")
        frame = av.AudioFrame.from_ndarray(sound[None], format="flt", layout="mono")
        frame.sample_rate = RATE_HZ
        resampler = av.AudioResampler(format=stream.format, layout="mono", rate=rate_hz)
        fifo = av.AudioFifo()
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            piece.pts = None
            fifo.write(piece)
        size = stream.codec_context.frame_size or 1024
        while piece := fifo.read(size, partial=True):
            output.mux(stream.encode(piece))
        output.mux(stream.encode(None))
    return file.getvalue()


@pytest.fixture(scope="module")
def server() -> Iterator[TinyServer]:
    with serve("demo-whisper", max_audio_seconds=120) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: TinyServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
        yield client


def transcribe(client: openai.OpenAI, data: bytes, **fields: Any) -> Any:
    return client.audio.transcriptions.create(**{"model": "demo-whisper", "file": ("a", data), **fields})


def test_the_recordings_are_many_kinds_and_not_too_many_bytes() -> None:
    assert {"digits", "silence", "noise"} <= {entry["name"] for entry in GOLDENS}
    assert {entry["language"] for entry in GOLDENS} >= {"en", "es", "ms", None}
    assert sum(path.stat().st_size for path in (WHISPER / "audio").iterdir()) < 1_000_000


# The SDK calls its own method for translations deprecated.
@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
@pytest.mark.parametrize("entry", GOLDENS, ids=lambda entry: str(entry["name"]))
def test_golden_recordings_give_their_text(entry: dict[str, Any], client: openai.OpenAI) -> None:
    data = (WHISPER / entry["audio"]).read_bytes()
    endpoint = client.audio.translations if entry["task"] == "translate" else client.audio.transcriptions
    # What is longer than a window was written down by generate, which seeks through it.
    more = {"chunking_strategy": '{"type": "sequential"}'} if entry["seconds"] > 30 else {}
    assert endpoint.create(model="model", file=("a", data), extra_body=more).text == entry["text"]
    verbose = endpoint.create(model="model", file=("a", data), response_format="verbose_json", extra_body=more)
    assert verbose.text == entry["text"]
    assert float(verbose.duration) == pytest.approx(entry["seconds"], abs=0.01)
    if entry["language"] is not None:
        # The language was not given: it was heard.
        names = {"en": "english", "es": "spanish", "ms": "malay"}
        assert verbose.language == ("english" if entry["task"] == "translate" else names[entry["language"]])
        assert [segment.text.strip() for segment in verbose.segments or []] == [s["text"] for s in entry["segments"]]
    for segment in verbose.segments or []:
        assert -1 < segment.avg_logprob < 0 and 0 <= segment.no_speech_prob < 0.6 and segment.temperature == 0
        assert segment.compression_ratio > 0 and segment.tokens


def test_silence_and_noise_are_an_empty_text(client: openai.OpenAI) -> None:
    noise = 0.02 * np.random.default_rng(0).standard_normal(3 * RATE_HZ).astype(np.float32)
    for sound in (np.zeros(4 * RATE_HZ, np.float32), noise, np.zeros(70 * RATE_HZ, np.float32)):
        data = encoded(sound, "FLAC")
        assert transcribe(client, data).text == ""
        assert transcribe(client, data, response_format="srt").strip() == ""
        assert transcribe(client, data, response_format="vtt").strip() == "WEBVTT"


def test_every_kind_of_file_gives_the_same_text(client: openai.OpenAI) -> None:
    entry = golden("digits")
    sound = sound_of(entry)
    files = {
        "wav": encoded(sound, "WAV"),
        "wav, float": encoded(sound, "WAV", "FLOAT"),
        "wav, stereo": encoded(np.stack([sound, sound], 1), "WAV"),
        "flac": encoded(sound, "FLAC"),
        "mp3": encoded(sound, "MP3"),
        "opus": encoded(sound, "OGG", "OPUS"),
        "vorbis": encoded(sound, "OGG", "VORBIS"),
        "m4a": by_pyav(sound, "ipod", "aac", 44_100),
        "webm": by_pyav(sound, "webm", "libopus", 48_000),
    }
    assert {kind: transcribe(client, data).text for kind, data in files.items()} == dict.fromkeys(files, entry["text"])


def test_subtitles_hold_the_segments(client: openai.OpenAI) -> None:
    entry = golden("digits")
    data = (WHISPER / entry["audio"]).read_bytes()
    verbose = transcribe(client, data, response_format="verbose_json")
    times = [(segment.start, segment.end) for segment in verbose.segments]
    for kind, mark in (("srt", ","), ("vtt", ".")):
        text = transcribe(client, data, response_format=kind)
        found = re.findall(rf"(\d\d):(\d\d):(\d\d)\{mark}(\d{{3}})", text)
        seconds = [int(h) * 3600 + int(m) * 60 + int(s) + int(ms) / 1000 for h, m, s, ms in found]
        assert seconds == pytest.approx([t for pair in times for t in pair], abs=0.002)
        assert entry["segments"][0]["text"] in text
        assert text.startswith("WEBVTT" if kind == "vtt" else "1\n00:00:0")
    assert transcribe(client, data, response_format="text").strip() == entry["text"]


def test_word_times_are_near_the_truth(client: openai.OpenAI) -> None:
    errors = []
    for entry in SPOKEN:
        data = (WHISPER / entry["audio"]).read_bytes()
        verbose = transcribe(client, data, response_format="verbose_json", timestamp_granularities=["word"])
        truth = [word for segment in entry["segments"] for word in segment["words"]]
        assert [re.sub(r"\W", "", word.word) for word in verbose.words] == [word["word"] for word in truth]
        starts = [word.start for word in verbose.words]
        assert starts == sorted(starts)
        errors += [abs(word.start - true["start"]) for word, true in zip(verbose.words, truth, strict=True)]
    assert statistics.median(errors) <= 0.2


@pytest.mark.parametrize("chunking", ["auto", {"type": "server_vad", "threshold": 0.5, "silence_duration_ms": 300}])
def test_a_long_recording_is_the_join_of_its_parts(chunking: Any, client: openai.OpenAI) -> None:
    english = [entry for entry in SPOKEN if entry["language"] == "en"]
    # So far apart that no window holds two of them: what comes out is then what each gives alone, at its place.
    starts_s = [0.0, 31.37, 62.9]
    parts = [(start_s, english[number % len(english)]) for number, start_s in enumerate(starts_s)]
    sound = np.zeros(66 * RATE_HZ, np.float32)
    for start_s, entry in parts:
        first = int(start_s * RATE_HZ)
        piece = sound_of(entry)[: len(sound) - first]
        sound[first : first + len(piece)] = piece
    verbose = transcribe(
        client,
        encoded(sound, "FLAC"),
        response_format="verbose_json",
        language="en",
        chunking_strategy=chunking,
        timestamp_granularities=["word", "segment"],
    )
    assert verbose.text == " ".join(entry["text"] for _, entry in parts)
    true_starts = [start_s + segment["start"] for start_s, entry in parts for segment in entry["segments"]]
    found = [segment.start for segment in verbose.segments]
    assert len(found) == len(true_starts)
    # The model's timestamps are its own; what must hold is that windows stand where they were cut.
    assert max(abs(a - b) for a, b in zip(found, true_starts, strict=True)) < 1.1
    words = [start_s + word["start"] for start_s, entry in parts for s in entry["segments"] for word in s["words"]]
    assert statistics.median(abs(w.start - true) for w, true in zip(verbose.words, words, strict=True)) <= 0.25


def test_windows_side_by_side_hear_what_seeking_hears(client: openai.OpenAI) -> None:
    entry = golden("long")
    heard = transcribe(client, (WHISPER / entry["audio"]).read_bytes()).text.split()
    # Cut elsewhere, a window full of digits may gain or lose one: the model is small.
    same = difflib.SequenceMatcher(None, heard, entry["text"].split(), autojunk=False)
    assert sum(block.size for block in same.get_matching_blocks()) >= 0.97 * len(entry["text"].split())
    assert abs(len(heard) - len(entry["text"].split())) <= 3


def test_sixteen_at_once_are_as_one_by_one(server: TinyServer) -> None:
    chosen = [SPOKEN[number % len(SPOKEN)] for number in range(16)]

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(
                *(
                    client.audio.transcriptions.create(
                        model="model", file=("a", (WHISPER / entry["audio"]).read_bytes()), language=entry["language"]
                    )
                    for entry in chosen
                )
            )
        return [answer.text for answer in answers]

    assert asyncio.run(ask_all()) == [entry["text"] for entry in chosen]
    assert server.manager.stats.num_running == 0


def test_streams_join_to_the_whole(client: openai.OpenAI, server: TinyServer) -> None:
    for entry in GOLDENS:
        if entry["task"] != "transcribe" or entry["seconds"] > 30:
            continue
        data = (WHISPER / entry["audio"]).read_bytes()
        events = list(transcribe(client, data, stream=True))
        assert "".join(event.delta for event in events[:-1]) == events[-1].text == entry["text"]
        assert events[-1].type == "transcript.text.done"
    data = (WHISPER / golden("digits")["audio"]).read_bytes()
    for kind in ("srt", "vtt", "text"):
        whole = transcribe(client, data, response_format=kind)
        form = {"model": "model", "response_format": kind, "stream": "true"}
        response = httpx.post(f"{server.base_url}/audio/transcriptions", files={"file": data}, data=form)
        assert response.headers["content-type"].startswith("text/event-stream")
        joined = "\n\n".join(
            "\n".join(line.removeprefix("data: ").removeprefix("data:") for line in event.split("\n"))
            for event in response.text.split("\n\n")
            if event.startswith("data:") and event != "data: [DONE]"
        )
        assert joined.split() == whole.split()


def test_sequential_seeking_gives_the_text_too(client: openai.OpenAI) -> None:
    entry = golden("digits")
    data = (WHISPER / entry["audio"]).read_bytes()
    assert transcribe(client, data, extra_body={"chunking_strategy": '{"type": "sequential"}'}).text == entry["text"]


def test_a_prompt_and_a_seed_change_nothing_that_is_sure(client: openai.OpenAI) -> None:
    entry = golden("digits")
    data = (WHISPER / entry["audio"]).read_bytes()
    assert transcribe(client, data, language="en", extra_body={"seed": 3}).text == entry["text"]
    assert isinstance(transcribe(client, data, language="en", prompt="red <|endoftext|> green").text, str)


def hostile_files() -> dict[str, bytes]:
    rng = np.random.default_rng(1)
    wav = encoded(np.zeros(RATE_HZ, np.float32), "WAV")
    liar = wav[:4] + b"\xff\xff\xff\xff" + wav[8:40] + b"\xff\xff\xff\xff" + wav[44:60]
    return {
        "ffconcat": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "HLS": b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        "random": rng.bytes(200_000),
        "empty": b"",
        "a zip": b"PK\x03\x04" + rng.bytes(5_000),
        "a wav of 4 GiB": liar,
        "1 Hz": wav[:24] + (1).to_bytes(4, "little") + wav[28:],
        "no channels": wav[:22] + (0).to_bytes(2, "little") + wav[24:],
        "text": b"hello there, this is no audio " * 50,
        "hours of silence": encoded(np.zeros(600 * 8000, np.float32), "FLAC"),
    }


@pytest.mark.parametrize("name", sorted(hostile_files()))
def test_hostile_files_are_refused_and_the_server_lives_on(name: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        transcribe(client, hostile_files()[name])
    assert refused.value.status_code in (400, 413)
    assert refused.value.param == "file"
    assert "/etc/passwd" not in str(refused.value) and "root:" not in str(refused.value)
    entry = golden("digits")
    assert transcribe(client, (WHISPER / entry["audio"]).read_bytes()).text == entry["text"]


def test_text_endpoints_say_what_this_model_is_for(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="transcribes speech"):
        client.chat.completions.create(model="model", messages=[{"role": "user", "content": "Hi"}])


def test_metrics_count_what_was_heard(client: openai.OpenAI, server: TinyServer) -> None:
    def heard_s() -> float:
        text = httpx.get(f"{server.url}/metrics").text
        return float(re.findall(r"^transformers_openai:audio_seconds_total (\S+)$", text, re.MULTILINE)[0])

    before = heard_s()
    entry = golden("digits")
    transcribe(client, (WHISPER / entry["audio"]).read_bytes())
    assert heard_s() - before == pytest.approx(entry["seconds"], abs=0.05)
