"""Cuts a long recording at quiet points into windows that a speech model can take, exact to the sample.

Knows nothing of models or words; a recording is 16 kHz samples, a window two offsets into it.
Called by runtime/recordings.py, once per recording.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from audio.sample_sink import SAMPLE_RATE_HZ, Samples

MAX_WINDOW_S = 30.0
# Loudness is measured over 10 ms, and everything below is counted in frames of that.
FRAME_SAMPLES = 160
_FRAMES_PER_S = SAMPLE_RATE_HZ // FRAME_SAMPLES
_SILENCE_DB = -100.0
# The background is what the quietest tenth of the frames stays below, and at most so far below the loudest twentieth of
# those that are not digital silence: a muted microphone says nothing of the room.
_BACKGROUND_QUANTILE = 0.1
_LOUD_QUANTILE = 0.95
_MAX_RANGE_DB = 50.0
# How far above the background a frame is loud at threshold 1, if the recording's loud parts are not nearer. They never
# are in a recording as quiet as this: an hour of an empty room is one window, not 120.
_SPAN_DB = 24.0
_QUIET_DB = -45.0
# A window is cut where it is quiet within its last third, and prefers a pause as early as this to a cut inside speech.
_LATE = 2 / 3
_EARLY = 1 / 3
# The quietest point is sought on loudness averaged over this: a gap between words, not one inside a plosive.
_QUIET_FRAMES = 15


@dataclass(frozen=True, slots=True)
class VadParameters:
    """When a stretch of a recording counts as speech; names and defaults are those of OpenAI's server_vad.

    Args:
        threshold: 0 to 1; how far above the background a moment must be to count. The background is what the quietest
            tenth of the recording stays below; 1 is 24 dB above it, or the level of the loudest twentieth if that is
            nearer and above -45 dB; between them it is linear in dB. So what is loud throughout is never taken for
            silence.
        prefix_padding_ms: kept before speech.
        silence_duration_ms: a pause lasts at least this long, and so much of it is kept after speech.
    """

    threshold: float = 0.5
    prefix_padding_ms: int = 300
    silence_duration_ms: int = 200

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; it must be 0 to 1")
        for name in ("prefix_padding_ms", "silence_duration_ms"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")


@dataclass(frozen=True, slots=True)
class Window:
    """Samples start_sample to end_sample, exclusive, of a recording."""

    start_sample: int
    end_sample: int

    @property
    def start_s(self) -> float:
        """Where it begins in the recording."""
        return self.start_sample / SAMPLE_RATE_HZ

    @property
    def duration_s(self) -> float:
        """How long it lasts."""
        return (self.end_sample - self.start_sample) / SAMPLE_RATE_HZ


def windows(
    samples: Samples, parameters: VadParameters | None = None, *, max_window_s: float = MAX_WINDOW_S
) -> list[Window]:
    """The windows of a recording, in order, none longer than `max_window_s`.

    What fits is one window. Otherwise silence between windows is left out, so that it costs nothing; everything outside
    the windows is below the threshold. Windows are as few as that allows: each reaches as far as it can to the last
    pause, and is cut at its quietest point where no pause comes late enough.

    Args:
        samples: [N] float32, mono, 16 kHz.
        parameters: when a moment counts as speech.
        max_window_s: what the model takes at once.

    Returns:
        At least one window if there are samples: of a recording without speech the loudest stretch, so that it is the
        model that decides.
    """
    num_samples = len(samples)
    max_samples = int(max_window_s * SAMPLE_RATE_HZ)
    if num_samples <= max_samples:
        return [Window(0, num_samples)] if num_samples else []
    parameters = parameters or VadParameters()
    levels_db = frame_levels_db(samples)
    loud_db = threshold_db(levels_db, parameters.threshold)
    max_frames = max_samples // FRAME_SAMPLES
    stretches = _speech(levels_db > loud_db, parameters)
    cuts = _pack(stretches, levels_db, loud_db, max_frames) if stretches else [_loudest(levels_db, max_frames)]
    return [Window(start * FRAME_SAMPLES, min(end * FRAME_SAMPLES, num_samples)) for start, end in cuts]


def frame_levels_db(samples: Samples) -> NDArray[np.float32]:
    """Level of each 10 ms, [ceil(N / 160)] float32 in dB of full scale, -100 at least; a constant offset has none."""
    num_whole = len(samples) // FRAME_SAMPLES
    frames = samples[: num_whole * FRAME_SAMPLES].reshape(num_whole, FRAME_SAMPLES)
    powers = np.einsum("ft,ft->f", frames, frames) / FRAME_SAMPLES - np.square(frames.mean(axis=1))
    rest = samples[num_whole * FRAME_SAMPLES :]
    if len(rest):
        powers = np.append(powers, np.float32(rest.var()))
    levels_db: NDArray[np.float32] = 10 * np.log10(np.maximum(powers, np.float32(10 ** (_SILENCE_DB / 10))))
    return levels_db


def threshold_db(levels_db: NDArray[np.float32], threshold: float) -> float:
    """The level above which a frame is loud, see VadParameters.threshold."""
    heard = levels_db[levels_db > _SILENCE_DB]
    if not len(heard):
        return _SILENCE_DB
    loud = float(np.quantile(heard, _LOUD_QUANTILE))
    background = max(float(np.quantile(levels_db, _BACKGROUND_QUANTILE)), loud - _MAX_RANGE_DB)
    return background + threshold * (_SPAN_DB if loud < _QUIET_DB else min(_SPAN_DB, max(0.0, loud - background)))


def _speech(is_loud: NDArray[np.bool_], parameters: VadParameters) -> list[tuple[int, int]]:
    """Stretches of speech as frames (start, end), padded, in order, not overlapping."""
    loud = np.flatnonzero(is_loud)
    if not len(loud):
        return []
    prefix = parameters.prefix_padding_ms * _FRAMES_PER_S // 1000
    pause = max(1, parameters.silence_duration_ms * _FRAMES_PER_S // 1000)
    (gaps,) = np.nonzero(np.diff(loud) > pause)
    starts = loud[np.append(0, gaps + 1)]
    ends = loud[np.append(gaps, len(loud) - 1)] + 1
    # A pause shorter than both paddings is shared out at its middle.
    middles = (ends[:-1] + starts[1:]) // 2
    padded_starts = np.maximum(starts - prefix, np.append(0, middles))
    padded_ends = np.minimum(ends + pause, np.append(middles, len(is_loud)))
    return list(zip(padded_starts.tolist(), padded_ends.tolist(), strict=True))


def _pack(
    stretches: list[tuple[int, int]], levels_db: NDArray[np.float32], loud_db: float, max_frames: int
) -> list[tuple[int, int]]:
    """As few windows (start, end), in frames, as hold all stretches; each is cut as late as is good."""
    cuts: list[tuple[int, int]] = []
    index, start = 0, stretches[0][0]
    while True:
        limit = start + max_frames
        first = index  # of the stretches that do not end within the limit
        while first < len(stretches) and stretches[first][1] <= limit:
            first += 1
        pause = stretches[first - 1][1] if first > index else start
        if first == len(stretches):
            return [*cuts, (start, pause)]
        index, next_start = first, stretches[first][0]
        late = start + int(max_frames * _LATE)
        if pause >= late or next_start >= limit:
            cut = pause
        else:
            cut, level_db = _quietest(levels_db, late, limit)
            # Better a short window than one that ends inside a word.
            if level_db > loud_db and pause - start >= max_frames * _EARLY:
                cut = pause
        cuts.append((start, pause if cut <= next_start else cut))
        start = max(cut, next_start)


def _quietest(levels_db: NDArray[np.float32], start: int, end: int) -> tuple[int, float]:
    """The frame from `start` to `end` around which it is quietest, the latest of several, and the level there."""
    reach = _QUIET_FRAMES // 2
    first = max(0, start - reach)
    powers = np.power(10.0, levels_db[first : end + reach + 1].astype(np.float64) / 10)
    means = np.convolve(powers, np.full(_QUIET_FRAMES, 1 / _QUIET_FRAMES), mode="same")
    candidates = means[start - first : end - first + 1]
    offset = len(candidates) - 1 - int(np.argmin(candidates[::-1]))
    return start + offset, float(10 * np.log10(candidates[offset]))


def _loudest(levels_db: NDArray[np.float32], num_frames: int) -> tuple[int, int]:
    """The loudest stretch of that many frames."""
    totals = np.cumsum(np.append(0.0, np.power(10.0, levels_db / 10)))
    start = int(np.argmax(totals[num_frames:] - totals[:-num_frames]))
    return start, start + num_frames
