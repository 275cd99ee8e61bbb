"""Recordings made up for tests: something like speech, in every format, and files that are not what they claim.

Knows nothing of the code under test.
Used by the tests of audio/ and of what is built on it.
"""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

Samples = NDArray[np.float32]
RATE_HZ = 16_000


def speech_like(seconds: float, *, seed: int = 0, noise_db: float = -70.0) -> Samples:
    """Voiced syllables of changing pitch and vowel with short gaps between words, over a little noise; peak 0.5."""
    rng = np.random.default_rng(seed)
    num_samples = round(seconds * RATE_HZ)
    out = np.zeros(num_samples)
    position = round(0.05 * RATE_HZ)
    while position < num_samples:
        length = round(rng.uniform(0.09, 0.22) * RATE_HZ)
        time_s = np.arange(length) / RATE_HZ
        pitch_hz = rng.uniform(90, 220) * (1 + 0.1 * np.sin(2 * np.pi * 3 * time_s))
        phase = 2 * np.pi * np.cumsum(pitch_hz) / RATE_HZ
        formants_hz = rng.uniform([300, 900, 2200], [800, 2000, 3000])
        syllable = np.zeros(length)
        for harmonic in range(1, 16):
            frequency_hz = harmonic * float(pitch_hz.mean())
            gain = sum(1 / (1 + ((frequency_hz - formant) / 120) ** 2) for formant in formants_hz)
            syllable += gain * np.sin(harmonic * phase)
        syllable *= np.hanning(length)
        end = min(num_samples, position + length)
        out[position:end] += syllable[: end - position]
        position += length + round(rng.choice([0.0, 0.0, 0.12]) * RATE_HZ)
    out *= 0.5 / np.abs(out).max()
    out += 10 ** (noise_db / 20) * rng.standard_normal(num_samples)
    return out.astype(np.float32)


def noise(seconds: float, level_db: float, *, seed: int = 0) -> Samples:
    """White noise of that level (root mean square, full scale 0 dB)."""
    white = np.random.default_rng(seed).standard_normal(round(seconds * RATE_HZ))
    return (white * 10 ** (level_db / 20)).astype(np.float32)


def encode(samples: NDArray[Any], kind: str, *, rate_hz: int = RATE_HZ, subtype: str | None = None) -> bytes:
    """A file of that kind, by libsndfile; `samples` are at 16 kHz and are resampled where the rate is another."""
    if rate_hz != RATE_HZ:
        samples = soxr.resample(samples, RATE_HZ, rate_hz, quality="VHQ")
    file = io.BytesIO()
    if kind == "opus":
        kind, subtype = "ogg", "OPUS"
    soundfile.write(file, samples, rate_hz, format=kind.upper(), subtype=subtype)
    return file.getvalue()


def encode_with_pyav(samples: Samples, container: str, codec: str, *, rate_hz: int = RATE_HZ) -> bytes:
    """A file by FFmpeg, of containers that libsndfile has not."""
    import av

    if rate_hz != RATE_HZ:
        samples = soxr.resample(samples, RATE_HZ, rate_hz, quality="VHQ")
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate_hz, layout="mono")
        assert isinstance(stream, av.AudioStream)
        whole = (samples * 32767).astype(np.int16)
        for start in range(0, len(whole), 1000):  # a packet each, where the codec has no frames of its own
            frame = av.AudioFrame.from_ndarray(whole[None, start : start + 1000], format="s16", layout="mono")
            frame.sample_rate, frame.pts = rate_hz, start
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def video_without_sound(container: str = "mp4") -> bytes:
    """A few black pictures."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for picture in [*[av.VideoFrame(32, 32, "yuv420p") for _ in range(5)], None]:
            output.mux(stream.encode(picture))
    return file.getvalue()


def raw_wav(
    data: bytes = bytes(32_000),
    *,
    rate_hz: int = RATE_HZ,
    channels: int = 1,
    bits: int = 16,
    codec: int = 1,
    claimed_bytes: int | None = None,
) -> bytes:
    """A wav file whose header says what it is told to."""
    frame_bytes = channels * bits // 8
    fields = (16, codec, channels, rate_hz, rate_hz * frame_bytes & 0xFFFFFFFF, frame_bytes & 0xFFFF, bits)
    claimed = len(data) if claimed_bytes is None else claimed_bytes
    chunks = b"WAVEfmt " + struct.pack("<IHHIIHH", *fields) + b"data" + struct.pack("<I", claimed) + data
    size = len(chunks) if claimed_bytes is None else min(claimed_bytes + 36, 0xFFFFFFFF)
    return b"RIFF" + struct.pack("<I", size) + chunks
