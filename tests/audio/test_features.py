"""The features of a window are the library's, and short windows cost little."""

from __future__ import annotations

import time
from typing import Any, cast

import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from audio.features import FeatureExtractor, log_mel
from tests.audio.recordings import RATE_HZ, Samples, noise, speech_like


def of_library(samples: Samples, extractor: Any) -> np.ndarray[Any, Any]:
    """The slow twin: the whole padded window through the extractor."""
    features = extractor(samples, sampling_rate=RATE_HZ, return_tensors="np")["input_features"][0]
    return cast("np.ndarray[Any, Any]", features)


def make(**options: Any) -> FeatureExtractor:
    return cast(FeatureExtractor, WhisperFeatureExtractor(**options))


@pytest.mark.parametrize("num_mels", [80, 128])
@pytest.mark.parametrize(
    "num_samples", [1600, 16_000, 16_001, 80_100, 240_000, 479_599, 479_601, 479_840, 479_999, 480_000]
)
def test_features_are_those_of_the_padded_window(num_mels: int, num_samples: int) -> None:
    extractor = make(feature_size=num_mels)
    samples = speech_like(30)[:num_samples]
    got = log_mel(samples, extractor)
    assert got.shape == (num_mels, 3000) and got.dtype == np.float32 and got.flags.c_contiguous
    np.testing.assert_allclose(got, of_library(samples, extractor), atol=3e-7, rtol=0)


@pytest.mark.parametrize("level_db", [-200.0, -90.0, 0.0])
def test_silence_and_noise_are_those_of_the_library_too(level_db: float) -> None:
    extractor = make()
    samples = noise(3.3, level_db)
    np.testing.assert_allclose(log_mel(samples, extractor), of_library(samples, extractor), atol=3e-7, rtol=0)


def test_other_checkpoints_have_other_frames_and_windows() -> None:
    extractor = make(feature_size=40, hop_length=200, n_fft=512, chunk_length=10)
    for num_samples in (1, 5_000, 159_900, 160_000):
        samples = speech_like(10)[:num_samples]
        got = log_mel(samples, extractor)
        assert got.shape == (40, 800)
        np.testing.assert_allclose(got, of_library(samples, extractor), atol=3e-7, rtol=0)


def test_padding_that_is_not_silence_is_left_to_the_extractor() -> None:
    extractor = make(padding_value=0.01)
    samples = speech_like(2)
    np.testing.assert_array_equal(log_mel(samples, extractor), of_library(samples, extractor))


def test_the_same_samples_give_the_same_features() -> None:
    extractor, samples = make(), speech_like(7)
    np.testing.assert_array_equal(log_mel(samples, extractor), log_mel(samples.copy(), extractor))


def test_a_window_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="has 480001 samples; the model takes 480000"):
        log_mel(np.zeros(480_001, np.float32), make())


def test_a_short_window_costs_less_than_a_full_one() -> None:
    extractor, samples = make(), speech_like(3)

    def cpu_s(length: int) -> float:
        window = np.resize(samples, length)
        times = []
        for _ in range(8):
            start = time.thread_time()
            log_mel(window, extractor)
            times.append(time.thread_time() - start)
        return min(times)

    assert cpu_s(3 * RATE_HZ) < cpu_s(30 * RATE_HZ) / 2
