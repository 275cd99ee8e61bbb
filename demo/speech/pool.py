"""Utterances to build windows from: drawn, spoken, kept for a while, since speaking costs more than reading.

Knows nothing of windows, noise or tokens; how words become sound is the `speak` it is given.
Called by windows.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import soxr
from numpy.typing import NDArray

from demo.speech.espeak import Manner, Spoken
from demo.speech.vocabulary import draw_words
from demo.speech.voices import draw_accent, draw_manner

Speak = Callable[[str, Manner], Spoken | None]
# Speech longer than this is spoken again: it would not fit into the windows.
_MAX_SAMPLES = 9 * 16000


@dataclass(frozen=True, slots=True)
class Utterance:
    """Words of one breath by one voice: sound at 16 kHz, float32 with peak 1; `spans` in samples, one per word."""

    language: str
    words: tuple[str, ...]
    samples: NDArray[np.float32]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Habits:
    """How utterances are drawn.

    Args:
        voices: names of eSpeak's variants.
        kept: utterances kept for each voice and language; 0: each is spoken anew.
        fresh_share: how often a kept one is spoken anew.
        max_words: words of one utterance.
        long_share: utterances of up to twice as many.
        draw_words: what is said, of a random source, a language and the number of words.
        stretch: the sound is played up to this share faster or slower, which moves the formants too: more voices.
    """

    voices: tuple[str, ...]
    kept: int = 12
    fresh_share: float = 0.12
    max_words: int = 7
    long_share: float = 0.06
    draw_words: Callable[[random.Random, str, int], tuple[str, ...]] = draw_words
    stretch: float = 0.1


class Pool:
    """Draws utterances; the same seed, habits and `speak` give the same ones in the same order."""

    def __init__(self, habits: Habits, speak: Speak, seed: int) -> None:
        self._habits = habits
        self._speak = speak
        self._rng = random.Random(seed)
        self._kept: dict[tuple[str, str], list[Utterance]] = {}

    def draw_voice(self) -> str:
        """Any of the voices."""
        return self._rng.choice(self._habits.voices)

    def draw(self, language: str, voice: str) -> Utterance:
        """An utterance in this language by this voice, a kept one or a new one."""
        if not self._habits.kept:
            return self._new(language, voice)
        kept = self._kept.setdefault((language, voice), [])
        if len(kept) < self._habits.kept:
            kept.append(self._new(language, voice))
            return kept[-1]
        place = self._rng.randrange(len(kept))
        if self._rng.random() < self._habits.fresh_share:
            kept[place] = self._new(language, voice)
        return kept[place]

    def _new(self, language: str, voice: str) -> Utterance:
        while True:
            most = self._habits.max_words * (2 if self._rng.random() < self._habits.long_share else 1)
            words = self._habits.draw_words(self._rng, language, most)
            factor = 1 + self._rng.uniform(-self._habits.stretch, self._habits.stretch)
            manner = draw_manner(self._rng, draw_accent(self._rng, language), voice)
            utterance = say(self._speak, language, words, manner, factor)
            if utterance is not None and len(utterance.samples) <= _MAX_SAMPLES:
                return utterance


def say(speak: Speak, language: str, words: tuple[str, ...], manner: Manner, stretch: float = 1.0) -> Utterance | None:
    """These words in this manner, played `stretch` times as long; None where they cannot be told apart in the sound."""
    spoken = speak(" ".join(words), manner)
    if spoken is None:
        return None
    samples = spoken.samples.astype(np.float32)
    peak = float(np.abs(samples).max())
    if peak < 100:
        return None
    if stretch != 1.0:
        samples = soxr.resample(samples, 1.0, stretch)
    spans = tuple((round(begin * stretch), round(end * stretch)) for begin, end in spoken.spans)
    return Utterance(language, words, samples / peak, spans)
