"""Writes down the windows of one recording, side by side or one after the other, and puts their times in place.

Knows nothing of whole files, of languages or of how the engine runs.
Made by the transcriber, one for each request.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from engine.sequence import Source
from runtime.in_order import in_order
from runtime.segmenting import Stretch, cut_window
from runtime.speech_audio import SpeechAudio, Window
from runtime.speech_model import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, SAMPLES_PER_POSITION, SpeechModel
from runtime.transcription import Segment, Word
from runtime.window_decoding import DecodedWindow, WindowDecoder
from runtime.word_timing import TimedText, WordTimer
from runtime.workers import WorkShare

if TYPE_CHECKING:
    from runtime.speech_audio import Samples
    from text.speech import SpeechText


@dataclass(frozen=True, slots=True)
class Sources:
    """Makes what the encoder reads of a recording's windows.

    Args:
        model: its sizes.
        audio: makes spectrograms.
        samples: of the recording.
        work: threads for that.
        cache_salt: of the request.
    """

    model: SpeechModel
    audio: SpeechAudio
    samples: Samples
    work: WorkShare
    cache_salt: bytes
    _kept: dict[Window, Source] = field(default_factory=dict)

    async def of(self, window: Window, *, keeps: bool = False) -> Source:
        """The source of a window; `keeps` holds it until it is asked for again."""
        source = self._kept.pop(window, None)
        if source is None:
            source = await self.work.run(partial(self._make, window))
        if keeps:
            self._kept[window] = source
        return source

    def _make(self, window: Window) -> Source:
        features = self.audio.features(self.samples[window.start_sample : window.end_sample])
        digest = hashlib.sha256(len(self.cache_salt).to_bytes(4, "big") + self.cache_salt)
        digest.update(features.tobytes())
        return Source(digest.digest(), self.model.num_positions, features=features)


@dataclass(frozen=True, slots=True)
class WrittenWindow:
    """What one window gave: its segments, and the sample at which the next should begin."""

    segments: tuple[Segment, ...]
    next_sample: int


@dataclass(slots=True)
class TranscriptionJob:
    """One recording on its way to text.

    Args:
        model: its tokens and sizes.
        text: its vocabulary.
        sources: of the recording.
        decoder: writes windows down.
        timer: times words; None when nobody wants them.
        counted: wraps the time in which a window is in flight.
        num_tokens: generated so far.
        num_fallbacks: tries at a higher temperature so far.
    """

    model: SpeechModel
    text: SpeechText
    sources: Sources
    decoder: WindowDecoder
    timer: WordTimer | None
    counted: Callable[[], AbstractContextManager[None]]
    num_tokens: int = 0
    num_fallbacks: int = 0

    async def side_by_side(self, windows: Sequence[Window], max_running: int) -> AsyncGenerator[Segment, None]:
        """All windows at once, as far as `max_running` goes; what a window leaves unfinished is kept as it is."""
        works = [partial(self._write, window, number, keeps_unfinished=True) for number, window in enumerate(windows)]
        written_windows = in_order(works, max_running)
        try:
            async for written in written_windows:
                for segment in written.segments:
                    yield segment
        finally:
            await written_windows.aclose()

    async def one_by_one(self, num_samples: int) -> AsyncGenerator[Segment, None]:
        """Each window begins where the last one's timestamps end, as the published models are used on long audio.

        Nothing but the prompt is carried from one to the next, as in generate() without condition_on_prev_tokens.
        """
        start, number = 0, 0
        while start < num_samples:
            window = Window(start, min(start + self.model.samples_per_window, num_samples))
            written = await self._write(window, number, keeps_unfinished=False)
            for segment in written.segments:
                yield segment
            # A model that ends a stretch where it began would have us listen to the same for ever.
            start = written.next_sample if written.next_sample > start else window.end_sample
            number += 1

    async def _write(self, window: Window, number: int, *, keeps_unfinished: bool) -> WrittenWindow:
        with self.counted():
            source = await self.sources.of(window)
            decoded = await self.decoder.decode(source, number)
            self.num_tokens += decoded.num_tokens
            self.num_fallbacks += decoded.num_fallbacks
            cut = cut_window(decoded.token_ids, self.model.first_timestamp_id, keeps_unfinished=keeps_unfinished)
            segments = [self._segment(window, decoded, stretch) for stretch in cut.stretches]
            segments = [segment for segment in segments if segment.text.strip()]
            if self.timer is not None:
                segments = await self._with_words(self.timer, window, source, decoded, segments)
        next_sample = window.end_sample
        if cut.next_start is not None:
            next_sample = min(window.start_sample + cut.next_start * SAMPLES_PER_POSITION, next_sample)
        return WrittenWindow(tuple(segments), next_sample)

    def _segment(self, window: Window, decoded: DecodedWindow, stretch: Stretch) -> Segment:
        token_ids = decoded.token_ids[stretch.first : stretch.stop]
        confidence = decoded.confidence
        return Segment(
            seek=window.start_sample // SAMPLES_PER_FRAME,
            start_s=_second(window, stretch.start),
            end_s=_second(window, stretch.end),
            text=self.text.decode(token_ids),
            token_ids=token_ids,
            temperature=decoded.temperature,
            avg_logprob=confidence.avg_logprob,
            compression_ratio=confidence.compression_ratio,
            no_speech_prob=confidence.no_speech_prob,
        )

    async def _with_words(
        self, timer: WordTimer, window: Window, source: Source, decoded: DecodedWindow, segments: Sequence[Segment]
    ) -> list[Segment]:
        offset_s = window.start_sample / SAMPLE_RATE_HZ
        stretches = [
            TimedText(tuple(self.text.text_ids(s.token_ids)), s.start_s - offset_s, s.end_s - offset_s)
            for s in segments
        ]
        num_samples = window.end_sample - window.start_sample
        words = await timer.words(stretches, source, num_samples, decoded.submitted_time_s)
        return [
            replace(segment, words=tuple(_moved(word, window) for word in found))
            for segment, found in zip(segments, words, strict=True)
        ]


def _second(window: Window, step: int | None) -> float:
    """A moment of a window in the recording's time, never after the window; None is its end."""
    if step is None:
        return window.end_sample / SAMPLE_RATE_HZ
    return min(window.start_sample + step * SAMPLES_PER_POSITION, window.end_sample) / SAMPLE_RATE_HZ


def _moved(word: Word, window: Window) -> Word:
    """A word in the recording's time."""
    start_s, end_s = window.start_sample / SAMPLE_RATE_HZ, window.end_sample / SAMPLE_RATE_HZ
    return Word(word.text, min(start_s + word.start_s, end_s), min(start_s + word.end_s, end_s))
