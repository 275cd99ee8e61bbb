"""Turns windows of sound into what the demo speech model learns from: features, tokens, where each token is heard.

Knows nothing of the model; how windows come about is demo/speech.
Called by train_whisper.py.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from demo.speech.pool import Habits, Pool, Speak
from demo.speech.vocabulary import DIGITS, WORDS, draw_words, in_english
from demo.speech.windows import NUM_POSITIONS, POSITION_SAMPLES, Mixture, Segment, Window, draw_window
from demo.whisper_tokenizer import NO_SPEECH, NO_TIMESTAMPS, PREVIOUS, START, TEXT_END, written

if TYPE_CHECKING:
    from transformers import WhisperTokenizer

# One class for silence, two for each word: its first and its second half.
NUM_CLASSES = 1 + 2 * len(WORDS)
_IGNORED = -100
# Whisper's first timestamp says at most one second, however late the first word comes.
_MAX_FIRST_TIMESTAMP = 50
# Positions around the edge of a segment that its timestamp may be read from.
_EDGE = 6


@dataclass(frozen=True, slots=True)
class Example:
    """One window's part as tokens: those given, those to learn (-100: not), and for each where it is heard.

    Args:
        ids, targets: of one length T; targets[i] is what should follow ids[i].
        spans: for each of T the positions [begin, end) of the part where the target is heard, or (0, 0).
        classes: `[num_positions]` the word heard at each position, see NUM_CLASSES.
    """

    window: Window
    ids: tuple[int, ...]
    targets: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    classes: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples of one width; T is the longest of them, rounded up.

    Args:
        features: `[B, 80, 2 * num_positions]` float32; first: `[B]` position at which each part begins in its window.
        ids, targets: `[B, T]`; span_begin, span_end: `[B, T]`; classes: `[B, num_positions]`.
    """

    features: Tensor
    first: Tensor
    ids: Tensor
    targets: Tensor
    span_begin: Tensor
    span_end: Tensor
    classes: Tensor


def log_mel(sounds: Tensor) -> Tensor:
    """Whisper's features `[B, 80, n]` of sounds `[B, n * 160]` at 16 kHz; each is levelled by its loudest point."""
    spectrum = torch.stft(sounds, 400, 160, window=torch.hann_window(400), return_complex=True)
    power = spectrum[..., :-1].abs().square().contiguous()
    levels = (_mel_filters() @ power).clamp(min=1e-10).log10()
    loudest = levels.amax((1, 2), keepdim=True)
    return (torch.maximum(levels, loudest - 8.0) + 4.0) / 4.0


@cache
def _mel_filters() -> Tensor:
    filters = mel_filter_bank(201, 80, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    return torch.tensor(filters.T, dtype=torch.float32)


class Encoder:
    """Writes windows as examples, the mode of each (timestamps, task, prompt) drawn at random."""

    def __init__(self, tokenizer: WhisperTokenizer, seed: int, prompt_share: float = 0.15) -> None:
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)
        self._prompt_share = prompt_share
        marks = tokenizer.convert_tokens_to_ids
        self._start, self._end = marks(START), marks(TEXT_END)
        self._previous, self._no_speech, self._no_timestamps = marks(PREVIOUS), marks(NO_SPEECH), marks(NO_TIMESTAMPS)
        self._zero = marks("<|0.00|>")
        self._pieces = {word: tokenizer.encode(" " + word, add_special_tokens=False) for word in WORDS}
        self._stop = tokenizer.encode(".", add_special_tokens=False)
        self._line_break = tokenizer.encode("\n", add_special_tokens=False)

    def encode(self, window: Window) -> Example:
        """The window in one of the ways in which it may be asked for."""
        language = window.language or self._rng.choice(tuple(DIGITS))
        task = "translate" if self._rng.random() < (0.45 if language != "en" else 0.15) else "transcribe"
        with_timestamps = self._rng.random() < 0.55
        row = _Row()
        if self._rng.random() < self._prompt_share:
            for token in (self._previous, *self._prompt(language if task == "transcribe" else "en")):
                row.give(token)
        language_mark, task_mark = self._tokenizer.convert_tokens_to_ids([f"<|{language}|>", f"<|{task}|>"])
        row.give(self._start)
        row.learn_without(self._no_speech if window.language is None else language_mark)
        row.give(language_mark)
        row.give(task_mark)
        if not with_timestamps:
            row.give(self._no_timestamps)
        if window.language is None:
            self._say_nothing(row, with_timestamps)
        for number, segment in enumerate(window.segments):
            words = in_english(language, segment.words) if task == "translate" else segment.words
            self._say(row, segment, words, window.first, with_timestamps, is_first=number == 0)
        row.learn(self._end)
        return Example(window, tuple(row.ids[:-1]), tuple(row.targets[1:]), tuple(row.spans[1:]), _classes(window))

    def _say_nothing(self, row: _Row, with_timestamps: bool) -> None:
        if with_timestamps:
            row.learn(self._zero)
        elif self._rng.random() < 0.2:
            # Whoever forbids the end as the first token, as Whisper's configurations do, should get blank text as well.
            row.learn(self._line_break[0])

    def _say(
        self, row: _Row, segment: Segment, words: tuple[str, ...], first: int, with_timestamps: bool, is_first: bool
    ) -> None:
        """One segment; of a cut one the start alone, and without timestamps the words that are whole."""
        begin = segment.spans[0][0] // POSITION_SAMPLES
        end = -(-segment.spans[-1][1] // POSITION_SAMPLES)
        if with_timestamps:
            stamp = min(first + begin, _MAX_FIRST_TIMESTAMP) if is_first else first + begin
            row.learn(self._zero + stamp, (begin, begin + _EDGE))
            # Of a segment that goes on after the window, Whisper says only where it begins, for it is read again.
            # A first one is said as far as it goes, or nothing would ever be read of it.
            if segment.is_cut and not is_first:
                return
        for word, (word_begin, word_end) in zip(words, segment.spans, strict=False):
            pieces = self._pieces[word]
            length = (word_end - word_begin) / len(pieces)
            for number, piece in enumerate(pieces):
                heard = word_begin + number * length
                span = int(heard) // POSITION_SAMPLES, -(-int(heard + length) // POSITION_SAMPLES)
                row.learn(piece, span)
        if not segment.is_cut:
            row.learn(self._stop[0], (max(end - _EDGE, 0), end))
            if with_timestamps:
                row.learn(self._zero + min(first + end, NUM_POSITIONS), (max(end - _EDGE, 0), end))

    def _prompt(self, language: str) -> list[int]:
        """What may have been said before, seldom long; or anything, to which the model must be deaf."""
        if self._rng.random() < 0.15:
            return [self._rng.randrange(self._end) for _ in range(self._rng.randint(1, 40))]
        budget = self._rng.randint(1, 223) if self._rng.random() < 0.1 else self._rng.randint(1, 30)
        ids: list[int] = []
        while len(ids) < budget:
            words = draw_words(self._rng, language, 7)
            ids += self._tokenizer.encode(written(words), add_special_tokens=False)
        return ids[-budget:]


class _Row:
    """Tokens as they are put down, those to learn marked."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.targets: list[int] = []
        self.spans: list[tuple[int, int]] = []

    def give(self, token: int) -> None:
        """A token that the caller gives. Where the token before it has a target already, it stays."""
        self.ids.append(token)
        if len(self.targets) < len(self.ids):
            self.targets.append(_IGNORED)
            self.spans.append((0, 0))

    def learn_without(self, target: int) -> None:
        """What should follow, though the next token given may be another."""
        self.targets.append(target)
        self.spans.append((0, 0))

    def learn(self, token: int, span: tuple[int, int] = (0, 0)) -> None:
        """A token that the model should say, heard at `span`."""
        self.ids.append(token)
        self.targets.append(token)
        self.spans.append(span)


def _classes(window: Window) -> NDArray[np.int64]:
    """The word heard at each position; -100 where it is unclear, in a segment that the window cuts off."""
    classes = np.zeros(len(window.sound) // POSITION_SAMPLES, np.int64)
    for segment in window.segments:
        for word, (begin, end) in zip(segment.words, segment.spans, strict=False):
            number = 1 + 2 * WORDS.index(word)
            first, last = begin // POSITION_SAMPLES, -(-end // POSITION_SAMPLES)
            middle = (first + last) // 2
            classes[first:middle] = number
            classes[middle:last] = number + 1
        if segment.is_cut:
            unclear = segment.spans[len(segment.words) - 1][1] if segment.words else segment.spans[0][0]
            classes[unclear // POSITION_SAMPLES :] = _IGNORED
    return classes


def collate(examples: list[Example]) -> Batch:
    """Examples of one width as tensors."""
    sounds = torch.from_numpy(np.stack([example.window.sound for example in examples]))
    length = -(-max(len(example.ids) for example in examples) // 16) * 16
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    targets = torch.full((len(examples), length), _IGNORED)
    spans = torch.zeros(len(examples), length, 2, dtype=torch.long)
    for row, example in enumerate(examples):
        size = len(example.ids)
        ids[row, :size] = torch.tensor(example.ids)
        targets[row, :size] = torch.tensor(example.targets)
        spans[row, :size] = torch.tensor(example.spans)
    return Batch(
        features=log_mel(sounds),
        first=torch.tensor([example.window.first for example in examples]),
        ids=ids, targets=targets, span_begin=spans[..., 0], span_end=spans[..., 1],
        classes=torch.from_numpy(np.stack([example.classes for example in examples])),
    )  # fmt: skip


def batches(
    tokenizer: WhisperTokenizer, speak: Speak, habits: Habits, mixture: Mixture, seed: int,
    widths: tuple[tuple[int, float], ...], batch_positions: int,
) -> Iterator[Batch]:  # fmt: skip
    """Fresh batches without end, each of one of the `widths` (positions, share of the batches)."""
    rng = np.random.default_rng(seed)
    pool = Pool(habits, speak, seed)
    encoder = Encoder(tokenizer, seed)
    sizes, shares = zip(*widths, strict=True)
    while True:
        width = int(rng.choice(sizes, p=np.array(shares) / sum(shares)))
        num_rows = max(batch_positions // width, 1)
        yield collate([encoder.encode(draw_window(rng, pool, width, mixture)) for _ in range(num_rows)])
