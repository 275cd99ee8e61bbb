"""Sounds that are not speech: noises of several colours, hum, clicks; and a microphone's tone.

Knows nothing of words.
Called by windows.py and evaluate_whisper.py.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Sound = NDArray[np.float32]


def colored(rng: np.random.Generator, num_samples: int) -> Sound:
    """Noise whose power falls with frequency like 1/f^a, a from 0 (white) to 2; its root mean square is 1."""
    # Made at a power of two: lengths with large prime factors are slow.
    size = 1 << max(num_samples - 1, 1).bit_length()
    spectrum = np.fft.rfft(rng.standard_normal(size).astype(np.float32))
    spectrum[1:] /= np.arange(1, len(spectrum), dtype=np.float32) ** (rng.uniform(0, 2) / 2)
    spectrum[0] = 0
    sound: Sound = np.fft.irfft(spectrum, size)[:num_samples].astype(np.float32)
    level = np.float32(max(float(np.sqrt(np.mean(sound**2))), 1e-6))
    return (sound / level).astype(np.float32)


def not_speech(rng: np.random.Generator, num_samples: int) -> Sound:
    """Silence, noise, hum or clicks, at any loudness."""
    kind = rng.integers(5)
    loudness = np.float32(10 ** rng.uniform(-4, -0.7))
    if kind == 0:
        return np.zeros(num_samples, np.float32)
    if kind == 1:
        time = np.arange(num_samples, dtype=np.float32) / 16000
        pitch = float(rng.choice((50, 60, 100, 120, rng.uniform(80, 2000))))
        hum = np.zeros(num_samples)
        for k in (1, 2, 3, 5):
            hum += rng.uniform(0, 1) / k * np.sin(2 * np.pi * k * pitch * time + rng.uniform(0, 6))
        return (loudness * hum).astype(np.float32)
    if kind == 2:
        sound = 0.05 * loudness * colored(rng, num_samples)
        for _ in range(int(rng.integers(1, 12))):
            at, length = int(rng.integers(num_samples)), int(rng.integers(20, 800))
            click = rng.standard_normal(length).astype(np.float32) * np.exp(-np.arange(length) * 5 / length)
            end = min(at + length, num_samples)
            sound[at:end] += loudness * click[: end - at]
        return sound.astype(np.float32)
    return loudness * colored(rng, num_samples)


def toned(rng: np.random.Generator, sound: Sound) -> Sound:
    """The sound through a random short filter, as another microphone would hear it."""
    taps = rng.standard_normal(5).astype(np.float32) * np.float32(rng.uniform(0, 0.35))
    taps[2] = 1.0
    return np.convolve(sound, taps, "same").astype(np.float32)
