"""How transcriptions look: as JSON, plain or verbose, as text, or as subtitles; whole, or in frames.

Knows nothing of the form that asked or of the model that answers.
Called by api/audio.py.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import orjson

from api.answers import Answer
from api.languages import ENGLISH, name_of
from api.sse import frame, text_frame
from api.subtitles import SrtWriter, SubtitleWriter, VttWriter
from api.transcription_plan import TranscriptionPlan
from runtime.transcription import Recording, Segment, TranscriptionEvent

Events = AsyncGenerator[TranscriptionEvent, None]


def answer_to(plan: TranscriptionPlan) -> Answer[TranscriptionEvent]:
    """The answer in the format that was asked for."""
    match plan.response_format:
        case "text":
            return TextAnswer()
        case "srt":
            return SubtitleAnswer(SrtWriter())
        case "vtt":
            return SubtitleAnswer(VttWriter())
        case _:
            return JsonAnswer(plan)


class JoinedText:
    """The text of segments, joined as the model wrote it; pieces given out never take back what others said."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._held = ""  # space that belongs to the text only if more text follows

    def push(self, text: str) -> str:
        """What a segment adds."""
        text = self._held + text
        if not self._pieces:
            text = text.lstrip()
        piece = text.rstrip()
        self._held = text[len(piece) :]
        if piece:
            self._pieces.append(piece)
        return piece

    def __str__(self) -> str:
        return "".join(self._pieces)


class JsonAnswer:
    """`json` and `verbose_json`; streamed, the last event holds what the whole answer would.

    Args:
        plan: what was asked.
    """

    media_type = "application/json"

    def __init__(self, plan: TranscriptionPlan) -> None:
        self._plan = plan
        self._recording = Recording(0.0, None, 0)
        self._segments: list[Segment] = []
        self._text = JoinedText()

    def frames(self, event: TranscriptionEvent) -> bytes:
        """The text a segment adds."""
        delta = self._take(event)
        return frame(orjson.dumps({"type": "transcript.text.delta", "delta": delta})) if delta else b""

    def last_frames(self) -> bytes:
        """The end, with usage."""
        done = {"type": "transcript.text.done", **self._body(), "usage": self._usage()}
        return frame(orjson.dumps(done))

    async def whole(self, events: Events) -> bytes:
        """The body of an answer that is not streamed; OpenAI's translations have no usage."""
        async with aclosing(events):
            async for event in events:
                self._take(event)
        has_usage = self._plan.task == "transcribe"
        return orjson.dumps(self._body() | {"usage": self._usage()} if has_usage else self._body())

    def _take(self, event: TranscriptionEvent) -> str:
        """Keeps an event; the text it adds."""
        if isinstance(event, Recording):
            self._recording = event
        elif isinstance(event, Segment):
            self._segments.append(event)
            return self._text.push(event.text)
        return ""

    def _body(self) -> dict[str, object]:
        text = str(self._text)
        plan = self._plan
        if plan.response_format != "verbose_json":
            return {"text": text}
        spoken = self._recording.language
        body: dict[str, object] = {
            "task": plan.task,
            # Of the text, as OpenAI has it.
            "language": name_of(ENGLISH if plan.task == "translate" else spoken),
            "duration": _seconds(self._recording.duration_s),
            "text": text,
        }
        if plan.has_segments:
            body["segments"] = [_segment(number, segment) for number, segment in enumerate(self._segments)]
        if plan.has_words:
            body["words"] = [
                {"word": word.text.strip(), "start": _seconds(word.start_s), "end": _seconds(word.end_s)}
                for segment in self._segments
                for word in segment.words or ()
            ]
        return body

    def _usage(self) -> dict[str, object]:
        return {"type": "duration", "seconds": _seconds(self._recording.duration_s)}


def _segment(number: int, segment: Segment) -> dict[str, object]:
    return {
        "id": number,
        "seek": segment.seek,
        "start": _seconds(segment.start_s),
        "end": _seconds(segment.end_s),
        "text": segment.text,
        "tokens": segment.token_ids,
        "temperature": segment.temperature,
        "avg_logprob": segment.avg_logprob,
        "compression_ratio": segment.compression_ratio,
        "no_speech_prob": segment.no_speech_prob,
    }


def _seconds(seconds: float) -> float:
    """To the millisecond: sums of frames are no round numbers, and nothing here is known more exactly."""
    return round(seconds, 3)


class TextAnswer:
    """`text`: what was said and a line break. Streamed, the data of all events joined is the same."""

    media_type = "text/plain"

    def __init__(self) -> None:
        self._text = JoinedText()

    def frames(self, event: TranscriptionEvent) -> bytes:
        """The text a segment adds."""
        piece = self._text.push(event.text) if isinstance(event, Segment) else ""
        return text_frame(piece) if piece else b""

    def last_frames(self) -> bytes:
        """The line break."""
        return text_frame("\n")

    async def whole(self, events: Events) -> bytes:
        """The body of an answer that is not streamed."""
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Segment):
                    self._text.push(event.text)
        return f"{self._text}\n".encode()


class SubtitleAnswer:
    """`srt` and `vtt`: a cue a segment. Streamed, each event is a cue, and the data of all joined is the file.

    Args:
        writer: of the format.
    """

    media_type = "text/plain"

    def __init__(self, writer: SubtitleWriter) -> None:
        self._writer = writer

    def frames(self, event: TranscriptionEvent) -> bytes:
        """The head of the file, or a cue."""
        text = self._write(event)
        return text_frame(text) if text else b""

    def last_frames(self) -> bytes:
        """Nothing: neither format has an end."""
        return b""

    async def whole(self, events: Events) -> bytes:
        """The file."""
        async with aclosing(events):
            return "".join([self._write(event) async for event in events]).encode()

    def _write(self, event: TranscriptionEvent) -> str:
        if isinstance(event, Recording):
            return self._writer.head()
        if isinstance(event, Segment):
            return self._writer.cue(event.start_s, event.end_s, event.text)
        return ""
