"""POST /audio/transcriptions and /audio/translations.

Knows nothing of waveforms or models; what comes back is segments of text with times.
Mounted by app.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import ValidationError
from starlette.responses import Response

from api.answers import respond
from api.deps import CacheSalt, Parts, Place, UsesParts, check_model, check_transcribes, get_parts
from api.errors import AUDIO_FIELD, from_validation
from api.fields import ignored_form_fields, ignored_header
from api.metrics import RecordingTally
from api.multipart import read_form, unfold
from api.prepare import log_parameters
from api.transcription_plan import transcription_plan
from api.transcripts import answer_to
from engine.errors import InvalidValue
from models import TranscriptionBody
from runtime.transcription import Finished, Task, TranscriptionEvent, TranscriptionRequest

logger = logging.getLogger(__name__)

router = APIRouter()


@dataclass(frozen=True, slots=True)
class Upload:
    """A form that has been read."""

    fields: TranscriptionBody
    audio: bytes


async def _read_upload(request: Request) -> Upload:
    """The form, for the speech model that is served.

    Raises:
        CallerError: it is no form, has no audio, or asks for another model.
        QueueFull: as many uploads as there may be are being read.
    """
    parts = get_parts(request)
    check_transcribes(parts.manager.info)  # before megabytes are read for nothing
    settings = parts.settings
    with parts.uploads.place():
        form = await read_form(
            request, file_field=AUDIO_FIELD, max_file_bytes=settings.max_audio_size, option="--max-audio-size"
        )
    try:
        fields = TranscriptionBody.model_validate(unfold(form.fields))
    except ValidationError as error:
        raise from_validation(error) from None
    check_model(fields.model, settings)
    if not form.file:
        found = "is missing" if form.file is None else "is empty"
        raise InvalidValue(f"{AUDIO_FIELD} {found}: it must be an audio file", param=AUDIO_FIELD)
    return Upload(fields, form.file)


SpeechForm = Annotated[Upload, Depends(_read_upload)]


@router.post("/audio/transcriptions")
async def create_transcription(
    request: Request, parts: UsesParts, salt: CacheSalt, upload: SpeechForm, _place: Place
) -> Response:
    """What is said, in the language it is said in."""
    return await _answer(request, parts, salt, upload, "transcribe")


@router.post("/audio/translations")
async def create_translation(
    request: Request, parts: UsesParts, salt: CacheSalt, upload: SpeechForm, _place: Place
) -> Response:
    """What is said, in English; the field `language`, of the audio, is ours."""
    return await _answer(request, parts, salt, upload, "translate")


async def _answer(request: Request, parts: Parts, salt: bytes, upload: Upload, task: Task) -> Response:
    fields = upload.fields
    log_parameters(request, fields)
    ignored = ignored_form_fields(fields, is_strict=parts.settings.strict_parameters)
    plan = transcription_plan(fields, task, parts.manager.info)
    asked = plan.request(
        upload.audio,
        seed=parts.seeds.getrandbits(63),
        cache_salt=salt,
        # Not when its first byte came: minutes of uploading are not spent in the queue.
        arrival_time_s=time.monotonic(),
    )
    return await respond(
        request,
        _transcribe(parts, asked, request.state.request_id),
        answer_to(plan),
        is_streamed=bool(fields.stream),
        headers=ignored_header(ignored),
    )


async def _transcribe(
    parts: Parts, asked: TranscriptionRequest, request_id: str
) -> AsyncGenerator[TranscriptionEvent, None]:
    """The events of a transcription, counted; closing it ends the transcription."""
    tally = RecordingTally(parts.metrics, asked.arrival_time_s)
    async with aclosing(parts.manager.transcribe(asked)) as events:
        async for event in events:
            tally.take(event)
            if isinstance(event, Finished):
                _log(request_id, asked.task, tally, event)
            yield event


def _log(request_id: str, task: Task, tally: RecordingTally, end: Finished) -> None:
    """One line a recording: speech users watch how many seconds of audio a second takes."""
    duration_s, elapsed_s = tally.recording.duration_s, tally.elapsed_s
    logger.info(
        "request %s: %s of %.1f s of audio took %.2f s (%.1f a second), %d windows, %d fallbacks, %d tokens",
        request_id,
        {"transcribe": "transcription", "translate": "translation"}[task],
        duration_s,
        elapsed_s,
        duration_s / max(elapsed_s, 1e-3),
        tally.recording.num_windows,
        end.num_fallbacks,
        end.num_tokens,
    )
