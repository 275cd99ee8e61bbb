"""Turns a recording into timed text: cuts it into windows, finds the language, has them written down in order.

Knows nothing of HTTP, of file formats or of how the engine runs; each step is in a module of its own.
Made when a speech model is loaded; called by ModelManager.transcribe.

A recording of many windows is many sequences of the engine's one batch. Only a bounded number of them is in the engine
at a time, and only their spectrograms are in memory, however long the recording.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from engine.errors import InvalidValue, UnsupportedParameter
from runtime.generation import Generate
from runtime.request_sequences import RequestSequences
from runtime.speech_audio import SpeechAudio, Window
from runtime.speech_model import SAMPLE_RATE_HZ, SpeechModel, speech_model_of
from runtime.transcription import (
    Finished,
    Recording,
    SequentialChunking,
    TranscriptionEvent,
    TranscriptionRequest,
)
from runtime.transcription_job import Sources, TranscriptionJob
from runtime.whisper_prompts import Manner
from runtime.window_decoding import HeardLanguage, WindowDecoder, hear_language
from runtime.word_timing import WordTimer
from runtime.workers import Workers, WorkShare

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

    from runtime.speech_audio import Samples
    from text.speech import SpeechText

TranscriberMaker = Callable[[Generate], "Transcriber"]

# Threads that one request may keep busy: enough that the next window is ready when the engine is.
_MAX_THREADS_PER_REQUEST = 2
# Windows that are listened to for the language, as long as nothing but silence is heard.
_MAX_LANGUAGE_WINDOWS = 4


def transcriber_maker(
    config: PreTrainedConfig,
    generation_config: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
    audio: SpeechAudio,
    *,
    num_threads: int,
    max_windows: int,
) -> TranscriberMaker:
    """What makes the transcriber of a checkpoint, once there is something to run its sequences.

    Args:
        config, generation_config, tokenizer: of the checkpoint.
        audio: sound as numbers, with as many mel bins as the model reads.
        num_threads, max_windows: see Transcriber.
    Raises:
        NotASpeechModel: it is none.
    """
    from text.speech import SpeechText

    model = speech_model_of(config, generation_config, tokenizer)
    text = SpeechText(tokenizer, model.first_timestamp_id)
    return partial(Transcriber, model=model, text=text, audio=audio, num_threads=num_threads, max_windows=max_windows)


class Transcriber:
    """Transcribes with one model; one serves all requests, on the event loop.

    Args:
        generate: runs one sequence.
        model: its tokens and sizes.
        text: its vocabulary.
        audio: sound as numbers.
        num_threads: for work on sound, of all requests together.
        max_windows: most windows of one request in the engine at a time.
    """

    def __init__(
        self,
        generate: Generate,
        model: SpeechModel,
        text: SpeechText,
        audio: SpeechAudio,
        *,
        num_threads: int,
        max_windows: int,
    ) -> None:
        self.model = model
        self._generate = generate
        self._text = text
        self._audio = audio
        self._workers = Workers(num_threads)
        self._max_windows = max_windows
        self._num_in_flight = 0

    @property
    def num_windows_in_flight(self) -> int:
        """Windows of all requests that are being written down."""
        return self._num_in_flight

    def close(self) -> None:
        """Ends its threads."""
        self._workers.close()

    async def transcribe(self, request: TranscriptionRequest) -> AsyncGenerator[TranscriptionEvent, None]:
        """One Recording, its Segments in order, and Finished at the end; closing the iterator frees everything at once.

        The prompt stands before every window, so that names are spelt alike in all of them.

        Raises:
            CallerError: the audio cannot be read, or language, task or prompt are none for this model.
            OperatorError: it waited or ran too long, or the server shuts down.
            InternalError: a step failed, or the engine died.
        """
        language = self._language(request)
        work = self._workers.share(_MAX_THREADS_PER_REQUEST)
        previous_ids = await work.run(partial(self._text.prompt_ids, request.prompt, self.model.max_prompt_tokens))
        samples = await work.run(partial(self._audio.decode, request.audio))
        windows = await self._windows(request, samples, work)
        sources = Sources(self.model, self._audio, samples, work, request.cache_salt)
        sequences = RequestSequences(
            self._generate,
            priority=request.priority,
            cache_salt=request.cache_salt,
            arrival_time_s=request.arrival_time_s,
        )
        if language is None and windows and self.model.is_multilingual:
            language = await self._hear_language(windows, sources, sequences)
        yield Recording(len(samples) / SAMPLE_RATE_HZ, language if self.model.is_multilingual else "en", len(windows))
        # Without timestamps nothing would tell where the next window begins.
        is_sequential = isinstance(request.chunking, SequentialChunking)
        has_timestamps = request.has_timestamps or (is_sequential and len(windows) > 1)
        manner = Manner(language, request.task, has_timestamps, tuple(previous_ids))
        job = self._job(request, manner, sources, sequences, work)
        if is_sequential:
            segments = job.one_by_one(len(samples))
        else:
            segments = job.side_by_side(windows, self._max_windows)
        try:
            async for segment in segments:
                yield segment
        finally:
            await segments.aclose()
        yield Finished(job.num_tokens, job.num_fallbacks)

    def _language(self, request: TranscriptionRequest) -> str | None:
        """The code of the language asked for, else of the model's own; None where it must be heard, or is English."""
        model, asked = self.model, request.language
        if request.prompt.strip() and not model.max_prompt_tokens:
            raise UnsupportedParameter("prompt: this model has no token that says what came before", param="prompt")
        if not model.is_multilingual:
            if request.task != "transcribe":
                raise UnsupportedParameter("this model knows English alone and cannot translate")
            if asked is not None and asked.strip().lower() not in ("en", "english"):
                raise InvalidValue(f"language is {asked[:40]!r}: this model knows English alone", param="language")
            return None
        if request.task not in model.task_ids:
            raise UnsupportedParameter(f"this model has no token for the task {request.task}")
        if asked is None:
            return model.default_language
        code = model.language_code(asked)
        if code is None:
            known = ", ".join(sorted(model.language_ids))
            raise InvalidValue(f"language is {asked[:40]!r}: this model knows {known}", param="language")
        return code

    async def _windows(self, request: TranscriptionRequest, samples: Samples, work: WorkShare) -> list[Window]:
        if not isinstance(request.chunking, SequentialChunking):
            return await work.run(partial(self._audio.windows, samples, request.chunking))
        # As many as it would take if each were heard to its end.
        size = self.model.samples_per_window
        return [Window(start, min(start + size, len(samples))) for start in range(0, len(samples), size)]

    async def _hear_language(self, windows: Sequence[Window], sources: Sources, sequences: RequestSequences) -> str:
        """The language of the first window in which something is spoken, else of the one that is least like silence."""
        heard: list[HeardLanguage] = []
        for window in windows[:_MAX_LANGUAGE_WINDOWS]:
            source = await sources.of(window, keeps=True)
            heard.append(await hear_language(self.model, sequences, source))
            if heard[-1].is_speech:
                break
        return min(heard, key=lambda one: one.no_speech_prob).language

    def _job(
        self,
        request: TranscriptionRequest,
        manner: Manner,
        sources: Sources,
        sequences: RequestSequences,
        work: WorkShare,
    ) -> TranscriptionJob:
        seed = secrets.randbits(63) if request.seed is None else request.seed
        decoder = WindowDecoder(self.model, self._text, sequences, manner, request.temperature, seed)
        timer = None
        if request.has_words:
            timer = WordTimer(self.model, self._text, self._audio, work, sequences, manner)
        return TranscriptionJob(self.model, self._text, sources, decoder, timer, self._counted)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._num_in_flight += 1
        try:
            yield
        finally:
            self._num_in_flight -= 1
