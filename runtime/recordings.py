"""The sound of real recordings: audio/ with one model's feature extractor and the operator's limits.

Knows nothing of sequences or transcripts.
Made by model_loading.py for speech models; called by the transcriber, always on a worker thread.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from runtime.speech_audio import Window
from runtime.transcription import VadChunking

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from audio.features import FeatureExtractor
    from runtime.speech_audio import Samples


logger = logging.getLogger(__name__)


class Recordings:
    """A SpeechAudio of files.

    Args:
        extractor: makes the model's spectrograms.
        max_seconds: longest recording that is decoded.
        median_width: of the filter over attention, as the model's config names it.
    """

    def __init__(self, extractor: FeatureExtractor, *, max_seconds: float, median_width: int) -> None:
        extractor.dither = 0.0  # noise drawn anew each time: the same recording would not give the same text
        self._extractor = extractor
        self._max_seconds = max_seconds
        self._median_width = median_width

    def decode(self, data: bytes) -> Samples:
        """Mono samples at 16 kHz of an uploaded file; raises AudioError for what is none, or too long."""
        from audio.decode import decode

        audio = decode(data, max_seconds=self._max_seconds)
        if audio.damage is not None:
            logger.info("a recording is transcribed as far as it could be read: %s", audio.damage)
        return audio.samples

    def windows(self, samples: Samples, chunking: VadChunking) -> list[Window]:
        """Where something is spoken, in order and without overlap."""
        from audio.segments import VadParameters, windows

        given = {
            name: value
            for name in ("threshold", "prefix_padding_ms", "silence_duration_ms")
            if (value := getattr(chunking, name)) is not None
        }
        longest_s = self._extractor.n_samples / self._extractor.sampling_rate
        found = windows(samples, VadParameters(**given), max_window_s=longest_s)
        return [Window(window.start_sample, window.end_sample) for window in found]

    def features(self, samples: Samples) -> npt.NDArray[np.float32]:
        """The spectrogram of one window, float32 [mel bins, frames], silence after its end."""
        from audio.features import log_mel

        return log_mel(samples, self._extractor)

    def token_times(
        self, alignment: npt.NDArray[np.float32], *, first_row: int, num_tokens: int, num_positions: int
    ) -> list[float]:
        """When each token begins, and when the last ends; see SpeechAudio."""
        from audio.alignment import token_times

        times = token_times(
            alignment, num_positions, first_row=first_row, num_tokens=num_tokens, median_width=self._median_width
        )
        return [start_s for start_s, _ in times] + [times[-1][1]]
