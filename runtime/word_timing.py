"""Gives the words of a window their times, from where the model looks while it reads its own transcript.

Knows nothing of how attention becomes times; that is audio/'s. Times here are seconds from the window's beginning.
Called by the transcriber for windows whose words are wanted.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from engine.sequence import SamplingParams, Source
from runtime.request_sequences import RequestSequences
from runtime.speech_audio import SpeechAudio
from runtime.speech_model import SAMPLE_RATE_HZ, SAMPLES_PER_POSITION, SpeechModel
from runtime.transcription import Word
from runtime.whisper_prompts import Manner, alignment_prompt
from runtime.workers import WorkShare
from text.words import UNSPACED_LANGUAGES, ends_sentence, split_words

if TYPE_CHECKING:
    from text.speech import SpeechText

# Pauses are given to the words beside them; nobody speaks one word for much longer than twice the usual time, and the
# usual time is bounded so that a window of a few slow words does not make everything usual.
_MAX_USUAL_S = 0.7
_MAX_OF_USUAL = 2.0


@dataclass(frozen=True, slots=True)
class TimedText:
    """A stretch of text and the time the model gave it, which may be the window's.

    Args:
        text_ids: its tokens, all of them text.
        start_s, end_s: from the window's beginning.
    """

    text_ids: tuple[int, ...]
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class WordTimer:
    """Times the words of one recording's windows.

    Args:
        model: its tokens.
        text: its vocabulary.
        audio: makes times of attention.
        work: threads for that.
        sequences: of the request.
        manner: in which the windows were written.
    """

    model: SpeechModel
    text: SpeechText
    audio: SpeechAudio
    work: WorkShare
    sequences: RequestSequences
    manner: Manner

    async def words(
        self, stretches: Sequence[TimedText], source: Source, num_samples: int, submitted_time_s: float
    ) -> list[tuple[Word, ...]]:
        """The words of each stretch of a window.

        Args:
            stretches: in order.
            source: the window's spectrogram.
            num_samples: of sound in it; the rest is padding.
            submitted_time_s: the window's place in the queue.
        Raises:
            ServerError: whatever the sequence failed with.
        """
        text_ids = [token_id for stretch in stretches for token_id in stretch.text_ids]
        if not text_ids:
            return [() for _ in stretches]
        times = await self._token_times(text_ids, source, num_samples, submitted_time_s)
        found: list[list[Word]] = []
        first = 0
        is_spaced = self.manner.language not in UNSPACED_LANGUAGES or self.manner.task == "translate"
        for stretch in stretches:
            spans = split_words(self.text.pieces(stretch.text_ids), is_spaced=is_spaced)
            found.append([Word(s.text, times[first + s.sound_start], times[first + s.sound_stop]) for s in spans])
            first += len(stretch.text_ids)
        max_s = _longest_credible(found)
        return [
            tuple(_tidied(words, stretch, max_s)) if max_s is not None else tuple(words)
            for words, stretch in zip(found, stretches, strict=True)
        ]

    async def _token_times(
        self, text_ids: Sequence[int], source: Source, num_samples: int, submitted_time_s: float
    ) -> list[float]:
        """When each token begins, and when the last ends; one more than there are tokens."""
        # The end token and what begins the prompt need room too. A transcript so long has gone wrong anyway.
        num_others = len(alignment_prompt(self.model, self.manner, ())[0])
        aligned = text_ids[: self.model.max_target_positions - num_others]
        prompt, first_row = alignment_prompt(self.model, self.manner, aligned)
        params = SamplingParams(max_tokens=0, temperature=0.0, is_aligning=True)
        result = await self.sequences.run(prompt, params, source, submitted_time_s=submitted_time_s)
        if result.alignment is None:
            raise RuntimeError("the engine did not align the transcript")
        num_positions = min(-(-num_samples // SAMPLES_PER_POSITION), self.model.num_positions)
        times = await self.work.run(
            partial(
                self.audio.token_times,
                result.alignment,
                first_row=first_row,
                num_tokens=len(aligned),
                num_positions=num_positions,
            )
        )
        end_s = num_positions * SAMPLES_PER_POSITION / SAMPLE_RATE_HZ
        return times + [end_s] * (len(text_ids) + 1 - len(times))


def _longest_credible(words: Sequence[Sequence[Word]]) -> float | None:
    """How long a word of this window may last; None where no word lasts at all."""
    durations = [word.end_s - word.start_s for stretch in words for word in stretch if word.end_s > word.start_s]
    if not durations:
        return None
    return _MAX_OF_USUAL * min(statistics.median(durations), _MAX_USUAL_S)


def _tidied(words: Sequence[Word], stretch: TimedText, max_s: float) -> list[Word]:
    """Takes from words what is a pause: before the first of a sentence or stretch, and after the last of one."""
    tidied = []
    for index, word in enumerate(words):
        is_first = index == 0 or ends_sentence(words[index - 1].text)
        is_last = index == len(words) - 1 or ends_sentence(word.text)
        start_s, end_s = word.start_s, word.end_s
        # Where the model itself wrote when a stretch begins or ends, believe it.
        if is_first and end_s - start_s > max_s:
            is_said = index == 0 and start_s < stretch.start_s < end_s
            start_s = stretch.start_s if is_said else end_s - max_s
        if is_last and end_s - start_s > max_s:
            is_said = index == len(words) - 1 and start_s < stretch.end_s < end_s
            end_s = stretch.end_s if is_said else start_s + max_s
        tidied.append(replace(word, start_s=start_s, end_s=end_s))
    return tidied
