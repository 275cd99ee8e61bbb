"""Words of a window and their times."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import numpy as np
import pytest

from engine.sequence import SequenceOutput, Source
from runtime.generation import Generate, GenerationRequest
from runtime.request_sequences import RequestSequences
from runtime.transcription import Word
from runtime.whisper_prompts import Manner
from runtime.word_timing import TimedText, WordTimer
from runtime.workers import Workers
from tests.runtime.scripted_speech import MODEL, TEXT, ScriptedAudio, says, seconds

ENGLISH = Manner("en", "transcribe", True)
SOURCE = Source(b"key", 1500, features=np.zeros((8, 3000), np.float32))


class TimedAudio(ScriptedAudio):
    """Gives the times it is told, and keeps what it was asked."""

    def __init__(self, times: list[float]) -> None:
        super().__init__()
        self.times = times
        self.asked: list[tuple[Any, int, int, int]] = []

    def token_times(self, alignment: Any, *, first_row: int, num_tokens: int, num_positions: int) -> list[float]:
        self.asked.append((alignment, first_row, num_tokens, num_positions))
        return self.times


def aligned(asked: list[GenerationRequest]) -> Generate:
    """Gives an alignment that holds the number of each row."""

    async def generate(request: GenerationRequest) -> Any:
        asked.append(request)
        rows = np.arange(len(request.prompt_token_ids), dtype=np.float32)
        yield SequenceOutput(0, finish_reason="length", alignment=np.tile(rows[None, :, None], (2, 1, 1500)))

    return generate


def time_words(
    stretches: list[TimedText], audio: TimedAudio, manner: Manner = ENGLISH, num_samples: int = seconds(10)
) -> tuple[list[tuple[Word, ...]], list[GenerationRequest]]:
    asked: list[GenerationRequest] = []

    async def scenario() -> list[tuple[Word, ...]]:
        workers = Workers(1)
        sequences = RequestSequences(aligned(asked), arrival_time_s=0.0)
        timer = WordTimer(MODEL, TEXT, audio, workers.share(1), sequences, manner)
        try:
            return await timer.words(stretches, SOURCE, num_samples, 0.0)
        finally:
            workers.close()

    return asyncio.run(scenario()), asked


def text_of(*texts: str, start_s: float = 0.0, end_s: float = 10.0) -> list[TimedText]:
    return [TimedText(tuple(says(text)), start_s, end_s) for text in texts]


def even_times(*texts: str) -> list[float]:
    """A tenth of a second for each token."""
    return [0.1 * index for index in range(sum(len(says(text)) for text in texts) + 1)]


def test_the_rows_are_those_from_which_each_token_and_the_end_were_written() -> None:
    audio = TimedAudio(even_times("fox dog"))
    _, (request,) = time_words(text_of("fox dog"), audio)
    ((alignment, first_row, num_tokens, num_positions),) = audio.asked
    # All rows are given, since what is usual for a frame counts; that of <|notimestamps|> wrote the first word.
    assert alignment[0, :, 0].tolist() == list(range(len(request.prompt_token_ids)))
    assert request.prompt_token_ids[first_row] == MODEL.no_timestamps_id
    assert request.prompt_token_ids[first_row + 1 :] == [*says("fox dog"), MODEL.end_id]
    assert num_tokens == len(says("fox dog"))
    assert num_positions == 500
    assert request.params.is_aligning and request.params.max_tokens == 0 and request.source is SOURCE


@pytest.mark.parametrize(("num_samples", "expected"), [(1, 1), (320, 1), (321, 2), (seconds(30), 1500)])
def test_padding_is_not_looked_at(num_samples: int, expected: int) -> None:
    audio = TimedAudio(even_times("fox"))
    time_words(text_of("fox"), audio, num_samples=num_samples)
    assert audio.asked[0][3] == expected


def test_a_word_lasts_from_its_first_token_to_the_next_words() -> None:
    texts = ("fox dog", "one two")
    (first, second), _ = time_words(text_of(*texts), TimedAudio(even_times(*texts)))
    assert [word.text for word in first] == [" fox", " dog"] and [word.text for word in second] == [" one", " two"]
    num = [len(says(word)) for word in ("fox", "dog", "one", "two")]
    borders = [0.1 * sum(num[:index]) for index in range(5)]
    found = [time for word in (*first, *second) for time in (word.start_s, word.end_s)]
    assert found == pytest.approx([time for pair in itertools.pairwise(borders) for time in pair])


def test_punctuation_lies_in_the_pause_after_a_word() -> None:
    num = [len(says(word)) for word in ("fox", "dog")]
    (words,), _ = time_words(text_of("fox, dog."), TimedAudio(even_times("fox, dog.")))
    assert [word.text for word in words] == [" fox,", " dog."]
    times = [time for word in words for time in (word.start_s, word.end_s)]
    assert times == pytest.approx([0.0, 0.1 * num[0], 0.1 * (num[0] + 1), 0.1 * (num[0] + 1 + num[1])])


def test_a_pause_is_taken_from_the_words_beside_it() -> None:
    # Attention begins at 0 and holds on to a sentence's last word; the stretch's own times say when it began and ended.
    num = len(says("fox dog")) - 2
    times = [0.0, 3.3, *[3.6] * num, 9.0]
    (words,), _ = time_words(text_of("fox dog", start_s=3.0, end_s=4.0), TimedAudio(times))
    assert words[0].start_s == 3.0 and words[-1].end_s == 4.0
    (words,), _ = time_words(text_of("fox dog"), TimedAudio(times))  # without such times, no word is very long
    assert words[0].start_s == pytest.approx(words[0].end_s - 1.4)
    assert words[-1].end_s == pytest.approx(words[-1].start_s + 1.4)


def test_times_never_fall_whatever_attention_says() -> None:
    generator = np.random.default_rng(2)
    text = "fox dog. one two, three! four five"
    for _ in range(100):
        times = sorted(generator.uniform(0, 10, len(says(text)) + 1).tolist())
        (words,), _ = time_words(text_of(text, start_s=1.0, end_s=8.0), TimedAudio(times))
        flat = [time for word in words for time in (word.start_s, word.end_s)]
        assert flat == sorted(flat)


def test_all_words_at_one_moment_stay_there() -> None:
    (words,), _ = time_words(text_of("fox dog"), TimedAudio([2.0] * (len(says("fox dog")) + 1)))
    assert {(word.start_s, word.end_s) for word in words} == {(2.0, 2.0)}


def test_a_transcript_too_long_to_read_again_has_its_rest_at_the_windows_end() -> None:
    text = "fox " * 200
    stretches = [TimedText((*says(text), *says(text), *says(text)), 0.0, 10.0)]
    num_read = 448 - 5
    (words,), (request,) = time_words(stretches, TimedAudio([0.01 * i for i in range(num_read + 1)]))
    assert len(request.prompt_token_ids) == 448
    assert (words[-1].start_s, words[-1].end_s) == (10.0, 10.0)


def test_text_without_spaces_is_timed_by_character_unless_it_was_translated() -> None:
    times = even_times("好你")
    (words,), _ = time_words(text_of("好你"), TimedAudio(times), Manner("zh", "transcribe", True))
    assert [word.text for word in words] == [" 好", "你"]
    (words,), _ = time_words(text_of("fox"), TimedAudio(even_times("fox")), Manner("zh", "translate", True))
    assert [word.text for word in words] == [" fox"]


def test_no_text_asks_nothing() -> None:
    audio = TimedAudio([])
    assert time_words([], audio) == ([], [])
    assert time_words([TimedText((), 0.0, 1.0)], audio) == ([()], [])
    assert audio.asked == []
