"""A manager of a speech model that plays back scripts instead of transcribing, and apps around it.

Knows nothing of audio: what is uploaded is any bytes.
Used by the tests of api/audio.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from config import Settings
from model_manager import ModelManager
from runtime.transcription import Finished, Recording, Segment, TranscriptionEvent, TranscriptionRequest, Word
from tests.api.conftest import opened, serving
from tests.api.scripted import ScriptedEngine, byte_tokenizer, says, stack

LANGUAGES = ("en", "ms", "es", "jw")
AUDIO = bytes(range(256)) * 40
# Two windows. Times that are no round numbers, an arrow, a line break, and a segment that is only space.
SEGMENTS = (
    Segment(
        0, 0.0, 2.4999, " Good morning,", (50364, 2205, 2446, 11, 50489), 0.0, -0.25, 1.1, 0.01,
        (Word(" Good", 0.1, 0.55), Word(" morning,", 0.55, 2.4999)),
    ),
    Segment(0, 2.5, 59.9996, " a --> b\n & <c> ", (50489, 257), 0.2, -0.5, 1.25, 0.02, (Word(" a", 2.5, 3.0),)),
    Segment(3000, 59.9996, 59.9996, "  ", (50364,), 0.0, -0.125, 0.5, 0.75, ()),
    Segment(3000, 60.0, 3661.0006, " Grüße 世界", (3, 4, 5), 1.0, -1.5, 2.5, 0.5, (Word(" Grüße", 60.0, 61.0),)),
)  # fmt: skip
RECORDING = Recording(3661.0625, "ms", 123)
FINISHED = Finished(num_tokens=17, num_fallbacks=6)
EVENTS: tuple[TranscriptionEvent, ...] = (RECORDING, *SEGMENTS, FINISHED)
TEXT = "Good morning, a --> b\n & <c>" + " " * 4 + "Grüße 世界"

Script = Callable[[TranscriptionRequest], AsyncIterator[TranscriptionEvent]]


def plays(*events: TranscriptionEvent | Exception | float) -> Script:
    """A script of events; a number waits for so many seconds, an exception is raised."""

    async def script(request: TranscriptionRequest) -> AsyncIterator[TranscriptionEvent]:
        for event in events:
            if isinstance(event, Exception):
                raise event
            if isinstance(event, int | float):
                await asyncio.sleep(event)
            else:
                yield event

    return script


class ScriptedTranscriber(ModelManager):
    """Keeps what it was asked, and how many transcriptions are open."""

    def __init__(self, settings: Settings, *, family: str = "speech", languages: tuple[str, ...] = LANGUAGES) -> None:
        tokenizer = byte_tokenizer()
        engine = ScriptedEngine(says([65], tokenizer.eos_token_id))
        super().__init__(settings, stack(engine, tokenizer, family=family, languages=languages))
        self.script = plays(*EVENTS)
        self.asked: list[TranscriptionRequest] = []
        self.num_open = 0

    async def transcribe(self, request: TranscriptionRequest) -> AsyncGenerator[TranscriptionEvent, None]:
        self.asked.append(request)
        self.num_open += 1
        try:
            async for event in self.script(request):
                yield event
        finally:
            self.num_open -= 1


@dataclass
class SpeechApp:
    """A running app."""

    manager: ScriptedTranscriber
    client: httpx.AsyncClient

    async def post(
        self, data: dict[str, Any] | None = None, path: str = "transcriptions", **more: Any
    ) -> httpx.Response:
        """A form with audio."""
        files = {"file": ("speech.wav", AUDIO, "audio/wav")}
        return await self.client.post(f"/v1/audio/{path}", **{"data": data or {}, "files": files, **more})


@contextlib.asynccontextmanager
async def speech_app(
    *, family: str = "speech", languages: tuple[str, ...] = LANGUAGES, is_loaded: bool = True, **options: Any
) -> AsyncIterator[SpeechApp]:
    """An app in the loop of the test."""
    settings = Settings(hf_model="org/tiny", **options)
    manager = ScriptedTranscriber(settings, family=family, languages=languages)
    async with opened(settings, manager, is_loaded=is_loaded) as (_, client):
        yield SpeechApp(manager, client)


@dataclass
class SpeechServer:
    """A server on a port of its own."""

    url: str
    manager: ScriptedTranscriber


@contextlib.contextmanager
def speech_server(**options: Any) -> Iterator[SpeechServer]:
    """A real server, in a thread."""
    settings = Settings(hf_model="org/tiny", shutdown_timeout=1, **options)
    manager = ScriptedTranscriber(settings)
    with serving(settings, manager) as url:
        yield SpeechServer(url, manager)
