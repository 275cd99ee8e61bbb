"""Builds windows of sound as Whisper sees them: utterances with pauses between them, noise, silence to fill up.

Knows nothing of tokens or features; times are samples at 16 kHz from the window's start.
Called by whisper_examples.py and tests.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from demo.speech.noise import colored, not_speech, toned
from demo.speech.pool import Pool, Utterance

SAMPLE_RATE_HZ = 16000
# Samples of one encoder position, 0.02 s, and their number in a window of 30 s.
POSITION_SAMPLES = 320
NUM_POSITIONS = 1500


@dataclass(frozen=True, slots=True)
class Segment:
    """Words of one breath and their spans in samples; where `is_cut` the window ends before they do."""

    words: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    is_cut: bool = False


@dataclass(frozen=True, slots=True)
class Window:
    """A window of 30 s, or that part of it which begins at position `first` and holds all its sound.

    Args:
        sound: `[num_positions * 320]` float32.
        first: position of the part in the window.
        language: None where nobody speaks.
        segments: what is said, in order; times count from the part's start.
    """

    sound: NDArray[np.float32]
    first: int
    language: str | None
    segments: tuple[Segment, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Mixture:
    """Shares of what windows are made of.

    Args:
        languages: how often each language is drawn.
        quiet_share: windows in which nobody speaks.
        moved_share: parts that are not the window's beginning.
        short_share: whole windows with one or a few utterances and then silence.
        clean_share: windows without any noise.
    """

    languages: tuple[tuple[str, float], ...] = (("en", 0.6), ("es", 0.2), ("ms", 0.2))
    quiet_share: float = 0.07
    moved_share: float = 0.4
    short_share: float = 0.4
    clean_share: float = 0.35


def draw_window(rng: np.random.Generator, pool: Pool, num_positions: int, mixture: Mixture) -> Window:
    """A window, or a part of so many positions of one."""
    is_whole = num_positions == NUM_POSITIONS
    is_moved = not is_whole and rng.random() < mixture.moved_share
    first = int(rng.integers(NUM_POSITIONS - num_positions + 1)) if is_moved else 0
    num_samples = num_positions * POSITION_SAMPLES
    if rng.random() < mixture.quiet_share:
        return _quiet(rng, num_samples, first, is_moved)
    names, shares = zip(*mixture.languages, strict=True)
    language = str(rng.choice(names, p=np.array(shares) / sum(shares)))
    budget = num_samples
    if is_whole and rng.random() < mixture.short_share:
        budget = int(rng.integers(1, 12) * SAMPLE_RATE_HZ)
    is_cut_allowed = is_whole and budget == num_samples and rng.random() < 0.6
    sound = np.zeros(num_samples, np.float32)
    segments, end = _speak(rng, pool, sound[:budget], language, is_cut_allowed)
    # The recording ends some time after its last word; a part's must reach its end where the window goes on.
    recorded = num_samples
    if not is_moved and not (segments and segments[-1].is_cut):
        recorded = min(num_samples, end + int(rng.exponential(0.4) * SAMPLE_RATE_HZ))
    _spoil(rng, sound[:recorded], mixture)
    return Window(sound, first, language, segments)


def _speak(
    rng: np.random.Generator, pool: Pool, sound: NDArray[np.float32], language: str, is_cut_allowed: bool
) -> tuple[tuple[Segment, ...], int]:
    """Fills `sound` with utterances of one voice; returns them and where the last one ends."""
    voice = pool.draw_voice()
    # Most recordings begin at once; some much later than the second that Whisper's first timestamp can say.
    at = int((rng.uniform(0, 0.5) if rng.random() < 0.8 else rng.uniform(0, 3)) * SAMPLE_RATE_HZ)
    at = min(at, len(sound) // 4)
    segments: list[Segment] = []
    end = 0
    for attempt in range(60):
        utterance = pool.draw(language, voice)
        room = len(sound) - at
        if room < POSITION_SAMPLES * 15:
            break
        if len(utterance.samples) > room:
            if not segments and not is_cut_allowed:
                utterance = _shortened(utterance, room)
            elif not is_cut_allowed:
                if attempt < 8 and rng.random() < 0.7:
                    continue
                break
        if not utterance.words:
            continue
        placed = utterance.samples[:room]
        sound[at : at + len(placed)] += placed * np.float32(rng.uniform(0.5, 1.0))
        spans = [(begin + at, finish + at) for begin, finish in utterance.spans]
        whole = sum(finish <= len(sound) for _, finish in spans)
        is_cut = whole < len(spans)
        segments.append(Segment(utterance.words[:whole], tuple(spans[:whole]) or ((at, len(sound)),), is_cut))
        end = at + len(placed)
        if is_cut:
            break
        at = end + int(min(0.6 + rng.exponential(0.7), 5.0) * SAMPLE_RATE_HZ)
    return tuple(segments), end


def _shortened(utterance: Utterance, room: int) -> Utterance:
    """Its first words, as many as there is room for."""
    num_words = sum(end <= room for _, end in utterance.spans)
    end = utterance.spans[num_words - 1][1] if num_words else 0
    return Utterance(
        utterance.language, utterance.words[:num_words], utterance.samples[:end], utterance.spans[:num_words]
    )


def _quiet(rng: np.random.Generator, num_samples: int, first: int, is_moved: bool) -> Window:
    """Nobody speaks: silence or noise, to the end or followed by the silence that fills a window up."""
    sound = np.zeros(num_samples, np.float32)
    recorded = num_samples if is_moved or rng.random() < 0.3 else int(rng.integers(num_samples // 20, num_samples))
    sound[:recorded] = not_speech(rng, recorded)
    return Window(sound, first, None)


def _spoil(rng: np.random.Generator, sound: NDArray[np.float32], mixture: Mixture) -> None:
    """Another microphone, another loudness, noise: in place."""
    if rng.random() < 0.4:
        sound[:] = toned(rng, sound)
    sound *= np.float32(10 ** rng.uniform(-1.7, -0.1) / max(float(np.abs(sound).max()), 1e-3))
    if rng.random() >= mixture.clean_share:
        power = float(np.sqrt(np.mean(sound[np.abs(sound) > 1e-4] ** 2))) if np.any(np.abs(sound) > 1e-4) else 0.01
        sound += colored(rng, len(sound)) * np.float32(power * 10 ** (-rng.uniform(8, 45) / 20))
