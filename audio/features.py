"""Makes what Whisper's encoder takes of a window: its log-mel spectrogram, by the library's own feature extractor.

Knows nothing of models or tensors, and not where the extractor comes from.
Called by runtime/recordings.py in a worker thread, once per window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from audio.sample_sink import Samples


class FeatureExtractor(Protocol):
    """What is used of transformers' WhisperFeatureExtractor."""

    sampling_rate: int
    n_fft: int
    hop_length: int
    n_samples: int
    padding_value: float
    dither: float

    def __call__(
        self, raw_speech: Samples, *, sampling_rate: int, padding: str, max_length: int, return_tensors: str
    ) -> Mapping[str, Any]:
        """`input_features`, [1, n_mels, max_length // hop_length]."""


def log_mel(samples: Samples, extractor: FeatureExtractor) -> NDArray[np.float32]:
    """The features of one window, padded to the length that the model takes.

    The extractor is given the window and the little padding that its last frames reach into. All frames beyond hear
    nothing but padding, as the last of these does, and are copies of it: a window of 5 s costs a sixth of a full one.

    Args:
        samples: [N] float32, mono, at the extractor's rate; at most its n_samples.
        extractor: of the model.

    Returns:
        [n_mels, n_samples / hop_length] float32: equal to what the extractor gives for the padded window, but for the
        last bit in places, as its products of matrices round by shape.

    Raises:
        ValueError: longer than the model takes.
    """
    if len(samples) > extractor.n_samples:
        raise ValueError(f"the window has {len(samples)} samples; the model takes {extractor.n_samples}")
    hop = extractor.hop_length
    # Half a transform before the end of what is padded, and the frame that the extractor leaves out.
    num_needed = len(samples) + extractor.n_fft // 2 + hop
    num_given = min(extractor.n_samples, -(-num_needed // hop) * hop)
    if extractor.padding_value or extractor.dither:  # then padding is not nothing
        num_given = extractor.n_samples
    features = extractor(
        samples,
        sampling_rate=extractor.sampling_rate,
        padding="max_length",
        max_length=num_given,
        return_tensors="np",
    )["input_features"][0]
    num_mels, num_frames = features.shape
    out = np.empty((num_mels, extractor.n_samples // hop), np.float32)
    out[:, :num_frames] = features
    out[:, num_frames:] = features[:, -1:]
    return out
