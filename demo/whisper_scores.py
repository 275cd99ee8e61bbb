"""Scores the demo speech model on windows that training never heard: words, languages, silence, times.

Knows nothing of files or cards; windows come from demo/speech, with the voices that it is given.
Called by evaluate_whisper.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from demo.speech.alignment import token_starts
from demo.speech.pool import Habits, Pool, Speak
from demo.speech.vocabulary import in_english
from demo.speech.windows import NUM_POSITIONS, POSITION_SAMPLES, SAMPLE_RATE_HZ, Mixture, Window, draw_window
from demo.whisper_tokenizer import NO_SPEECH, NO_TIMESTAMPS, START

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

_BATCH = 8
# Whisper's own bound for taking a window for silence.
_NO_SPEECH_PROB = 0.6


@dataclass(frozen=True, slots=True)
class WordScore:
    """Word errors (wrong, missing, added) among so many words, and how many windows came out without any."""

    num_errors: int
    num_words: int
    num_windows: int
    num_exact: int

    @property
    def error_rate(self) -> float:
        """Errors per word."""
        return self.num_errors / max(self.num_words, 1)


@dataclass(frozen=True, slots=True)
class StartTokens:
    """What the model makes of a window at the start token: the likeliest of its languages, how likely is no speech."""

    language: str
    no_speech_prob: float


def trial_windows(
    speak: Speak, habits: Habits, language: str, num_windows: int, seed: int, is_full: bool = False
) -> list[Window]:
    """Windows of up to 12 s of speech in this language, then silence; or windows full of it."""
    mixture = Mixture(languages=((language, 1.0),), quiet_share=0.0, short_share=0.0 if is_full else 1.0)
    rng, pool = np.random.default_rng(seed), Pool(habits, speak, seed)
    return [draw_window(rng, pool, NUM_POSITIONS, mixture) for _ in range(num_windows)]


def quiet_windows(speak: Speak, habits: Habits, num_windows: int, seed: int) -> list[Window]:
    """Windows in which nobody speaks."""
    rng, pool = np.random.default_rng(seed), Pool(habits, speak, seed)
    return [draw_window(rng, pool, NUM_POSITIONS, Mixture(quiet_share=1.0)) for _ in range(num_windows)]


class Listener:
    """The model and its processor, asked in the ways that are scored."""

    def __init__(self, model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> None:
        self._model = model
        self._processor = processor
        self._tokenizer = processor.tokenizer

    def features(self, windows: Iterable[Window]) -> Tensor:
        """`[B, 80, 3000]`, in the model's number format."""
        sounds = [window.sound for window in windows]
        made = self._processor.feature_extractor(sounds, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt")
        features: Tensor = made.input_features.to(self._model.dtype)
        return features

    @torch.inference_mode()
    def texts(self, windows: list[Window], language: str, task: str = "transcribe", stamps: bool = False) -> list[str]:
        """What greedy decoding hears, without marks."""
        found: list[str] = []
        for start in range(0, len(windows), _BATCH):
            ids = self._model.generate(
                self.features(windows[start : start + _BATCH]), language=language, task=task, return_timestamps=stamps
            )
            found += self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in found]

    @torch.inference_mode()
    def start_tokens(self, windows: list[Window]) -> list[StartTokens]:
        """The first prediction for each window."""
        config = self._model.generation_config
        names = {token: mark.strip("<|>") for mark, token in config.lang_to_id.items()}
        no_speech = self._tokenizer.convert_tokens_to_ids(NO_SPEECH)
        found = []
        for start in range(0, len(windows), _BATCH):
            features = self.features(windows[start : start + _BATCH])
            given = torch.full((len(features), 1), self._tokenizer.convert_tokens_to_ids(START))
            logits = self._model(features, decoder_input_ids=given).logits[:, 0].float()
            for row in logits:
                language = names[max(names, key=lambda token: float(row[token]))]
                found.append(StartTokens(language, float(row.softmax(-1)[no_speech])))
        return found

    @torch.inference_mode()
    def word_starts(self, window: Window, language: str) -> list[float]:
        """When each word of the window begins, in seconds, by the alignment heads, given the right text."""
        marks = [START, f"<|{language}|>", "<|transcribe|>", NO_TIMESTAMPS]
        ids = self._tokenizer.convert_tokens_to_ids(marks)
        firsts, num_marks = [], len(ids)
        for segment in window.segments:
            for word in segment.words:
                firsts.append(len(ids) - num_marks)
                ids += self._tokenizer.encode(" " + word, add_special_tokens=False)
            ids += self._tokenizer.encode(".", add_special_tokens=False)
        output = self._model(self.features([window]), decoder_input_ids=torch.tensor([ids]), output_attentions=True)
        heads = self._model.generation_config.alignment_heads
        seen = torch.stack([output.cross_attentions[layer][0, head] for layer, head in heads]).float()
        # The row that predicts a token stands one before it; what lies behind the recording's end is nobody's.
        last = window.segments[-1].spans[-1][1] // POSITION_SAMPLES + 25
        starts = token_starts(seen[:, num_marks - 1 : -1, :last].numpy())
        return [float(starts[first]) * POSITION_SAMPLES / SAMPLE_RATE_HZ for first in firsts]


def score_words(windows: list[Window], texts: list[str], translated: bool = False) -> WordScore:
    """Compares texts with what was said."""
    num_errors = num_words = num_exact = 0
    for window, text in zip(windows, texts, strict=True):
        expected = [word for segment in window.segments for word in segment.words]
        if translated:
            expected = list(in_english(window.language or "en", tuple(expected)))
        distance = edit_distance(expected, text.replace(".", " ").split())
        num_errors += distance
        num_words += len(expected)
        num_exact += distance == 0
    return WordScore(num_errors, num_words, len(windows), num_exact)


def edit_distance(expected: list[str], found: list[str]) -> int:
    """The least number of words to change, drop or add."""
    row = list(range(len(found) + 1))
    for i, word in enumerate(expected, 1):
        above, row[0] = row[0], i
        for j, other in enumerate(found, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (word != other))
    return row[-1]


def start_errors(listener: Listener, windows: list[Window], language: str) -> list[float]:
    """How far each word's start is off, in seconds."""
    errors = []
    for window in windows:
        spans = [span for segment in window.segments for span in segment.spans]
        found = listener.word_starts(window, language)
        errors += [abs(start - begin / SAMPLE_RATE_HZ) for start, (begin, _) in zip(found, spans, strict=True)]
    return errors


def is_taken_for_silence(start: StartTokens) -> bool:
    """By Whisper's bound."""
    return start.no_speech_prob > _NO_SPEECH_PROB
