"""The demo speech corpus, with a stand-in for eSpeak: drawn alike from a seed, times and tokens where they belong."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor, WhisperTokenizer

from demo.speech.alignment import token_starts
from demo.speech.espeak import Manner, Spoken
from demo.speech.noise import colored
from demo.speech.pool import Habits, Pool
from demo.speech.vocabulary import DIGITS, WORDS, draw_digits, draw_sentence, draw_words, in_english
from demo.speech.voices import HELD_OUT, TRAINING
from demo.speech.windows import NUM_POSITIONS, POSITION_SAMPLES, Mixture, Segment, Window, draw_window
from demo.whisper_examples import Encoder, batches, collate, log_mel
from demo.whisper_scores import edit_distance
from demo.whisper_tokenizer import written

_WHISPER = Path(__file__).parents[2] / "demo" / "whisper"
_WORD_SAMPLES = 4000
_MIXTURE = Mixture()


def beep(text: str, manner: Manner) -> Spoken:
    """A quarter of a second of sound for each word, its pitch the word's."""
    words = text.split()
    time = np.arange(_WORD_SAMPLES) / 16000
    tones = [np.sin(2 * np.pi * (200 + 40 * WORDS.index(word) + manner.pitch) * time) for word in words]
    spans = tuple((i * _WORD_SAMPLES, (i + 1) * _WORD_SAMPLES) for i in range(len(words)))
    return Spoken((8000 * np.concatenate(tones)).astype(np.int16), spans)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return WhisperTokenizer.from_pretrained(_WHISPER)


def windows(seed: int, num_positions: int, number: int, mixture: Mixture = _MIXTURE) -> list[Window]:
    rng, pool = np.random.default_rng(seed), Pool(Habits(TRAINING), beep, seed)
    return [draw_window(rng, pool, num_positions, mixture) for _ in range(number)]


def test_the_same_seed_draws_the_same_windows_and_another_seed_others() -> None:
    first, again, other = windows(1, 200, 12), windows(1, 200, 12), windows(2, 200, 12)
    assert [w.segments for w in first] == [w.segments for w in again]
    assert all(np.array_equal(a.sound, b.sound) for a, b in zip(first, again, strict=True))
    assert [w.segments for w in first] != [w.segments for w in other]


def test_the_same_seed_makes_the_same_batches(tokenizer: Any) -> None:
    def batch() -> Any:
        return next(batches(tokenizer, beep, Habits(TRAINING), Mixture(), 3, ((100, 1.0),), 600))

    first, again = batch(), batch()
    assert torch.equal(first.features, again.features)
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.targets, again.targets)
    assert first.features.shape == (6, 80, 200)


@pytest.mark.parametrize("num_positions", [100, 400, NUM_POSITIONS])
def test_words_lie_in_order_inside_their_window_with_pauses_between_segments(num_positions: int) -> None:
    drawn = windows(4, num_positions, 30)
    assert any(window.language is None for window in drawn)
    for window in drawn:
        assert len(window.sound) == num_positions * POSITION_SAMPLES
        assert 0 <= window.first <= NUM_POSITIONS - num_positions
        edges = [edge for segment in window.segments for span in segment.spans for edge in span]
        assert edges == sorted(edges)
        assert not edges or edges[-1] <= len(window.sound)
        for before, after in pairwise(window.segments):
            assert after.spans[0][0] - before.spans[-1][1] >= 0.6 * 16000 - 1


def test_only_the_last_segment_of_a_whole_window_is_cut() -> None:
    drawn = windows(5, NUM_POSITIONS, 40, Mixture(quiet_share=0.0, short_share=0.0))
    assert any(window.segments[-1].is_cut for window in drawn)
    assert not any(segment.is_cut for window in drawn for segment in window.segments[:-1])
    assert not any(segment.is_cut for window in windows(5, 300, 40) for segment in window.segments)


def test_held_out_voices_are_never_training_voices() -> None:
    assert not set(HELD_OUT) & set(TRAINING)
    assert len(HELD_OUT) == 10 and len(set(TRAINING)) == len(TRAINING) >= 90


def test_every_word_that_is_said_is_known_and_translated() -> None:
    rng = random.Random(0)
    for language in DIGITS:
        said = [word for _ in range(400) for word in (*draw_words(rng, language, 7), *draw_digits(rng, language, 5))]
        assert set(said) <= set(WORDS)
        assert all(word in WORDS for word in in_english(language, tuple(said)))
    assert {word for _ in range(400) for word in draw_sentence(rng)} <= set(WORDS)
    assert in_english("ms", ("satu", "lapan")) == ("one", "eight")
    assert in_english("es", ("cero", "nueve")) == ("zero", "nine")


def test_features_are_those_of_the_feature_extractor() -> None:
    sound = np.zeros(480000, np.float32)
    sound[8000:60000] = 0.1 * colored(np.random.default_rng(0), 52000)
    expected = WhisperFeatureExtractor(feature_size=80)(sound, sampling_rate=16000, return_tensors="pt").input_features
    found = log_mel(torch.from_numpy(sound)[None])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    # A part that holds all the sound looks as it does in the whole window.
    part = log_mel(torch.from_numpy(sound[: 400 * 320])[None])
    torch.testing.assert_close(part[..., :-2], expected[..., :798], atol=1e-4, rtol=0)


def spoken(first: int = 0) -> Window:
    spans = ((3200, 6400), (6400, 12800))
    return Window(np.zeros(200 * 320, np.float32), first, "es", (Segment(("tres", "ocho"), spans),))


def test_an_example_learns_language_text_and_times_but_not_what_is_given(tokenizer: Any) -> None:
    seen = set()
    for seed in range(60):
        example = Encoder(tokenizer, seed).encode(spoken())
        marks = tokenizer.convert_ids_to_tokens(example.ids)
        start = marks.index("<|startoftranscript|>")
        learnt = [token for token in example.targets if token >= 0]
        assert all(token == -100 for token in example.targets[:start])
        assert tokenizer.convert_ids_to_tokens(learnt[0]) == "<|es|>"
        assert learnt[-1] == tokenizer.eos_token_id
        assert marks[start + 1] == "<|es|>"
        text = "three eight." if marks[start + 2] == "<|translate|>" else "tres ocho."
        assert tokenizer.decode(learnt[1:], skip_special_tokens=True).strip() == text
        times = [mark for mark in tokenizer.convert_ids_to_tokens(learnt) if mark[2:3].isdigit()]
        assert times == ([] if marks[start + 3] == "<|notimestamps|>" else ["<|0.20|>", "<|0.80|>"])
        seen.add((text, bool(times), start > 0))
    assert len(seen) == 8


def test_each_token_is_heard_in_its_share_of_its_word(tokenizer: Any) -> None:
    window = Window(np.zeros(64000, np.float32), 0, "en", (Segment(("chair",), ((6400, 12800),)),))
    example = Encoder(tokenizer, 0, prompt_share=0.0).encode(window)
    pieces = tokenizer.encode(" chair", add_special_tokens=False)
    assert len(pieces) > 1
    at = [example.targets.index(piece) for piece in pieces]
    assert example.spans[at[0]][0] == 20 and example.spans[at[-1]][1] == 40
    assert all(example.spans[a][1] >= example.spans[b][0] for a, b in pairwise(at))
    assert [int(c > 0) for c in example.classes] == [0] * 20 + [1] * 20 + [0] * 160


def test_times_of_a_moved_part_are_the_windows_but_the_first_says_one_second_at_most(tokenizer: Any) -> None:
    pair = Segment(("dos",), ((16000, 19200),)), Segment(("uno",), ((32000, 35200),))
    window = Window(np.zeros(200 * 320, np.float32), 500, "es", pair)
    for seed in range(20):
        example = Encoder(tokenizer, seed).encode(window)
        times = [mark for mark in tokenizer.convert_ids_to_tokens(example.ids[3:]) if mark[2:3].isdigit()]
        if times:
            assert times[-4:] == ["<|1.00|>", "<|11.20|>", "<|12.00|>", "<|12.20|>"]
            return
    raise AssertionError("never with timestamps")


def test_of_a_cut_segment_only_the_start_is_said_with_timestamps_and_its_whole_words_without(tokenizer: Any) -> None:
    cut = Segment(("ocho",), ((460000, 464000),), is_cut=True)
    window = Window(np.zeros(480000, np.float32), 0, "es", (Segment(("dos",), ((3200, 6400),)), cut))
    ends = set()
    for seed in range(30):
        example = Encoder(tokenizer, seed).encode(window)
        ends.add(tuple(tokenizer.convert_ids_to_tokens(example.targets[-3:])))
    assert ("<|0.40|>", "<|28.74|>", "<|endoftext|>") in ends and len(ends) > 1
    assert all(end[-1] == "<|endoftext|>" and "." not in end[1:] for end in ends)


def test_where_nobody_speaks_no_speech_is_learnt_and_no_text(tokenizer: Any) -> None:
    window = Window(np.zeros(64000, np.float32), 0, None)
    endings = set()
    for seed in range(60):
        example = Encoder(tokenizer, seed).encode(window)
        learnt = [token for token in example.targets if token >= 0]
        assert tokenizer.convert_ids_to_tokens(learnt[0]) == "<|nospeech|>"
        assert tokenizer.decode(learnt[1:], skip_special_tokens=True).strip() == ""
        endings.add(tuple(learnt[1:]))
    assert (tokenizer.convert_tokens_to_ids("<|0.00|>"), tokenizer.eos_token_id) in endings


def test_rows_of_a_batch_are_padded_where_nothing_is_learnt(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, 1, prompt_share=0.5)
    examples = [encoder.encode(spoken(first)) for first in (0, 0, 300, 900)]
    batch = collate(examples)
    assert batch.ids.shape[1] % 16 == 0
    assert batch.first.tolist() == [0, 0, 300, 900]
    for row, example in enumerate(examples):
        size = len(example.ids)
        assert batch.targets[row, :size].tolist() == list(example.targets)
        assert (batch.targets[row, size:] == -100).all()
        assert (batch.span_end[row, size:] == 0).all()


def test_text_has_a_stop_unless_it_is_cut() -> None:
    assert written(("one", "two")) == " one two."
    assert written(("one",), is_cut=True) == " one"
    assert written(()) == ""


def test_word_errors_are_counted_as_changed_missing_and_added() -> None:
    assert edit_distance(["a", "b", "c"], ["a", "b", "c"]) == 0
    assert edit_distance(["a", "b", "c"], ["a", "x", "c", "d"]) == 2
    assert edit_distance(["a", "b", "c"], []) == 3


def test_token_starts_follow_a_staircase_of_attention() -> None:
    attention = np.full((2, 3, 60), 1e-4, np.float32)
    for row, (begin, end) in enumerate(((0, 20), (20, 45), (45, 60))):
        attention[:, row, begin:end] = 1 / (end - begin)
    assert token_starts(attention).tolist() == [0, 20, 45]
