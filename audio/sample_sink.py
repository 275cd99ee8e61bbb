"""Takes decoded blocks of any rate and width and makes one array of mono samples at 16 kHz, no larger than allowed.

Knows nothing of files or decoders.
Filled by decode.py from whichever reader the file has.
"""

from __future__ import annotations

import numpy as np
import soxr
from numpy.typing import NDArray

from audio.errors import AudioError, AudioTooLong

SAMPLE_RATE_HZ = 16_000
MIN_INPUT_RATE_HZ = 4_000
MAX_INPUT_RATE_HZ = 384_000
MAX_CHANNELS = 8

Samples = NDArray[np.float32]


class SampleSink:
    """Mono float32 samples at 16 kHz, from blocks.

    Memory grows with what came, by a quarter at a time; nothing is reserved because a header says so.

    Args:
        max_seconds: blocks that go on beyond it are refused.
    """

    def __init__(self, max_seconds: float) -> None:
        self._max_seconds = max_seconds
        self._samples: Samples = np.empty(0, np.float32)
        self._num_samples = 0
        self._rate_hz = 0
        self._resampler: soxr.ResampleStream | None = None
        # Taken at the present rate, and the seconds at rates before it: counted whole, so that the limit is exact.
        self._num_frames_in = 0
        self._earlier_s = 0.0

    def push(self, block: Samples, rate_hz: int) -> None:
        """Takes the next [n, channels] samples, full scale being 1; the block is overwritten.

        Raises:
            AudioError: rate, channels or a sample break a rule.
            AudioTooLong: this block ends beyond max_seconds.
        """
        if rate_hz != self._rate_hz:  # the first block, or a decoder that found out only now what it decodes
            self._begin(rate_hz)
        check_channels(block.shape[1])
        start_s = self._seconds_in()
        self._num_frames_in += len(block)
        if self._seconds_in() > self._max_seconds:
            raise AudioTooLong(self._max_seconds)
        mono = _mix(block, start_s, rate_hz)
        self._append(mono if self._resampler is None else self._resampler.resample_chunk(mono))

    def finish(self) -> Samples:
        """All samples, [N] float32; the sink is empty afterwards."""
        self._flush()
        samples, self._samples = self._samples, np.empty(0, np.float32)
        samples.resize(self._num_samples, refcheck=False)
        self._num_samples = 0
        return samples

    def _begin(self, rate_hz: int) -> None:
        check_rate(rate_hz)
        self._flush()
        self._earlier_s, self._num_frames_in = self._seconds_in(), 0
        self._rate_hz = rate_hz
        if rate_hz != SAMPLE_RATE_HZ:
            self._resampler = soxr.ResampleStream(rate_hz, SAMPLE_RATE_HZ, 1, dtype="float32", quality="HQ")

    def _seconds_in(self) -> float:
        return self._earlier_s + (self._num_frames_in / self._rate_hz if self._rate_hz else 0.0)

    def _flush(self) -> None:
        """What the resampler still holds: its filter looks ahead."""
        if self._resampler is not None:
            self._append(self._resampler.resample_chunk(np.empty(0, np.float32), last=True))
            self._resampler = None

    def _append(self, mono: Samples) -> None:
        end = self._num_samples + len(mono)
        if end > len(self._samples):
            # In place where the allocator can move pages, so that an hour is not in memory twice.
            self._samples.resize(end + end // 4, refcheck=False)
        self._samples[self._num_samples : end] = mono
        self._num_samples = end


def check_rate(rate_hz: int) -> None:
    """Raises AudioError unless samples at that rate are taken."""
    if not MIN_INPUT_RATE_HZ <= rate_hz <= MAX_INPUT_RATE_HZ:
        raise AudioError(
            f"the audio's sample rate is {rate_hz} Hz; it must be {MIN_INPUT_RATE_HZ} to {MAX_INPUT_RATE_HZ} Hz"
        )


def check_channels(num_channels: int) -> None:
    """Raises AudioError unless that many channels are taken."""
    if not 1 <= num_channels <= MAX_CHANNELS:
        raise AudioError(f"the audio has {num_channels} channels; it must have 1 to {MAX_CHANNELS}")


def _mix(block: Samples, start_s: float, rate_hz: int) -> Samples:
    """The mean of all channels, each limited to full scale as a sound card would; overwrites the block.

    Samples that are no numbers are refused rather than replaced: what they stood for is lost, and a transcript would
    not say so. Float files louder than full scale are common and only clipped.
    """
    if not len(block):
        return block[:, 0]
    low, high = float(block.min()), float(block.max())  # NaN if any sample is
    if not (np.isfinite(low) and np.isfinite(high)):
        index = int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])
        value = block[index][~np.isfinite(block[index])][0]
        raise AudioError(f"the audio's sample at {start_s + index / rate_hz:.3f} seconds is {value}; it must be finite")
    if low < -1 or high > 1:
        np.clip(block, -1, 1, out=block)
    mono = np.ascontiguousarray(block[:, 0])
    for channel in range(1, block.shape[1]):  # three times as fast as mean(axis=1)
        mono += block[:, channel]
    if block.shape[1] > 1:
        mono /= block.shape[1]
    return mono
