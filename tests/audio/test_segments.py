"""Windows: in order, apart, short enough, with all that is loud inside; cut where it is quiet; exact to the sample."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio.segments import FRAME_SAMPLES, VadParameters, Window, frame_levels_db, threshold_db, windows
from tests.audio.recordings import RATE_HZ, Samples, noise, speech_like

MAX_SAMPLES = 30 * RATE_HZ
QUIET = -65.0


def silence(seconds: float, *, seed: int = 0) -> Samples:
    return noise(seconds, QUIET, seed=seed)


def levels_one_by_one(samples: Samples) -> list[float]:
    """The slow twin of frame_levels_db."""
    levels = []
    for start in range(0, len(samples), FRAME_SAMPLES):
        frame = samples[start : start + FRAME_SAMPLES].astype(np.float64)
        levels.append(10 * np.log10(max(1e-10, np.mean((frame - frame.mean()) ** 2))))
    return levels


def check(samples: Samples, cut: list[Window], parameters: VadParameters) -> None:
    """What holds for every recording."""
    limit_db = threshold_db(frame_levels_db(samples), parameters.threshold)
    is_inside = np.zeros(len(samples), bool)
    position = 0
    for window in cut:
        assert position <= window.start_sample < window.end_sample <= len(samples)
        assert window.end_sample - window.start_sample <= MAX_SAMPLES
        is_inside[window.start_sample : window.end_sample] = True
        position = window.end_sample
    num_frames = len(samples) // FRAME_SAMPLES
    frames = samples[: num_frames * FRAME_SAMPLES].reshape(num_frames, FRAME_SAMPLES).astype(np.float64)
    levels = 10 * np.log10(np.maximum(frames.var(axis=1), 1e-10))
    left_out = ~is_inside[: num_frames * FRAME_SAMPLES].reshape(num_frames, FRAME_SAMPLES).any(axis=1)
    assert not (levels[left_out] > limit_db + 0.01).any()


def test_what_fits_is_one_window_of_everything() -> None:
    for num_samples in (1, 159, 16_000, MAX_SAMPLES):
        for samples in (np.zeros(num_samples, np.float32), noise(num_samples / RATE_HZ, -20)):
            assert windows(samples) == [Window(0, num_samples)]
    assert windows(np.empty(0, np.float32)) == []


def test_levels_are_those_of_the_plain_twin() -> None:
    samples = np.concatenate([speech_like(2.0), np.zeros(1000, np.float32), silence(1.003)])
    np.testing.assert_allclose(frame_levels_db(samples), levels_one_by_one(samples), atol=0.01)


def test_a_constant_offset_is_not_loud() -> None:
    samples = np.concatenate([speech_like(10), silence(40), speech_like(10, seed=1)])
    np.testing.assert_allclose(frame_levels_db(samples + np.float32(0.1)), frame_levels_db(samples), atol=1)
    assert windows(samples + np.float32(0.1)) == windows(samples)


def test_long_silence_between_speech_is_in_no_window() -> None:
    samples = np.concatenate([silence(45), speech_like(10), silence(600), speech_like(10, seed=1), silence(45, seed=1)])
    first, second = windows(samples)
    assert 44.5 <= first.start_s <= 45.1 and 9.9 <= first.duration_s <= 10.7
    assert 654.5 <= second.start_s <= 655.1 and 9.9 <= second.duration_s <= 10.7


@pytest.mark.parametrize("prefix_ms", [0, 100, 300])
@pytest.mark.parametrize("pause_ms", [200, 500])
def test_padding_is_kept_before_and_the_pause_after(prefix_ms: int, pause_ms: int) -> None:
    tone = np.sin(np.arange(RATE_HZ * 2) * 0.3).astype(np.float32) * 0.3
    samples = np.concatenate([silence(20), tone, silence(20)])
    parameters = VadParameters(prefix_padding_ms=prefix_ms, silence_duration_ms=pause_ms)
    assert windows(samples, parameters) == [Window((20_000 - prefix_ms) * 16, (22_000 + pause_ms) * 16)]


def test_a_window_reaches_to_the_last_pause_that_fits() -> None:
    """Phrases of 4 s and pauses of 1 s: the sixth phrase ends at 29 s, and the seventh would not fit."""
    samples = np.concatenate([np.append(speech_like(4, seed=seed), silence(1, seed=seed)) for seed in range(24)])
    cut = windows(samples)
    assert [round(window.start_s) for window in cut] == [0, 30, 60, 90]
    for window in cut:
        assert 28.7 < window.duration_s < 30


def test_speech_without_a_pause_is_cut_at_its_quietest_point_in_the_last_third() -> None:
    samples = np.tile(noise(1, -20), 100)
    samples[26 * RATE_HZ : 26 * RATE_HZ + 2400] *= 0.5  # 6 dB less for 150 ms: too loud and too short for a pause
    first, *rest = windows(samples)
    assert first.start_sample == 0
    assert 26.0 < first.duration_s < 26.15
    assert rest[0].start_sample == first.end_sample
    assert all(20 <= window.duration_s <= 30 for window in rest[:-1])
    assert rest[-1].end_sample == len(samples)


def test_an_earlier_pause_is_better_than_a_cut_inside_speech() -> None:
    loud = np.tile(noise(1, -20), 60)
    samples = np.concatenate([loud[: 12 * RATE_HZ], silence(0.6), loud, silence(20)])
    first, second, *_ = windows(samples)
    assert 12.0 < first.duration_s < 12.6
    assert second.start_sample <= 12.6 * RATE_HZ


def test_a_short_gap_late_is_better_than_an_earlier_pause() -> None:
    loud = np.tile(noise(1, -20), 60)
    samples = np.concatenate(
        [loud[: 12 * RATE_HZ], silence(0.6), loud[: 13 * RATE_HZ], silence(0.15), loud, silence(20)]
    )
    assert 25.6 < windows(samples)[0].duration_s < 25.75


@pytest.mark.parametrize("level_db", [-100.0, -70.0, -50.0])
def test_an_hour_of_silence_is_one_window(level_db: float) -> None:
    assert len(windows(np.tile(noise(60, level_db), 60))) == 1


def test_the_one_window_of_silence_is_where_something_might_be() -> None:
    samples = silence(120)
    samples[70 * RATE_HZ : 71 * RATE_HZ] *= 2
    (window,) = windows(samples)
    assert window.start_s <= 70 and window.start_s + window.duration_s >= 71
    assert window.duration_s == 30


def test_what_is_loud_throughout_is_not_taken_for_silence() -> None:
    """Music, or a voice over constant noise: nobody can tell them from noise by loudness alone."""
    cut = windows(np.tile(noise(10, -20), 12))
    assert sum(window.duration_s for window in cut) > 119


def test_one_soft_speaker_beside_a_loud_one_is_heard() -> None:
    soft = speech_like(20, seed=1, noise_db=-120) * np.float32(0.1)
    samples = np.concatenate([speech_like(60), silence(20), soft, silence(60)])
    samples += noise(len(samples) / RATE_HZ, -65, seed=5)
    cut = windows(samples)
    inside = sum(
        max(0.0, min(w.start_s + w.duration_s, 100) - max(w.start_s, 80)) for w in cut
    )  # of the soft speaker's 20 s
    assert inside > 19.5


def test_a_muted_microphone_does_not_make_the_room_silence() -> None:
    room = noise(60, -60) + speech_like(60, noise_db=-120)
    cut = windows(np.concatenate([room, np.zeros(60 * RATE_HZ, np.float32), room]))
    assert 119 < sum(window.duration_s for window in cut) < 123


def test_a_higher_threshold_wants_louder_speech() -> None:
    murmur = noise(20, -50, seed=2)
    samples = np.concatenate([speech_like(20), silence(60), murmur, silence(60)])
    by_threshold = [
        sum(window.duration_s for window in windows(samples, VadParameters(threshold=t))) for t in (0.1, 0.5, 1.0)
    ]
    assert by_threshold[0] >= by_threshold[1] > 39
    assert by_threshold[2] < 21


def test_another_window_length_is_kept_to() -> None:
    cut = windows(np.tile(noise(1, -20), 20), max_window_s=7.5)
    assert all(window.duration_s <= 7.5 for window in cut)
    assert sum(window.duration_s for window in cut) == 20


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"threshold": 1.5}, r"threshold is 1\.5; it must be 0 to 1"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"prefix_padding_ms": -1}, "prefix_padding_ms is -1; it must not be negative"),
        ({"silence_duration_ms": -5}, "silence_duration_ms is -5"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VadParameters(**parameters)  # type: ignore[arg-type]


PIECES = st.lists(
    st.tuples(
        st.sampled_from(["speech", "noise", "zeros"]),
        st.floats(0.005, 25),
        st.sampled_from([0, -10, -25, -40, -60, -80]),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=9,
)
POOL = {("speech", seed): speech_like(25, seed=seed) for seed in range(3)}
POOL |= {("noise", seed): noise(25, -10, seed=seed) for seed in range(3)}


@settings(deadline=None, max_examples=60)
@given(
    pieces=PIECES,
    threshold=st.floats(0, 1),
    prefix_ms=st.sampled_from([0, 1, 300, 5000]),
    pause_ms=st.sampled_from([0, 15, 200, 2000]),
)
def test_windows_are_ordered_apart_short_and_hold_all_that_is_loud(
    pieces: list[tuple[str, float, int, int]], threshold: float, prefix_ms: int, pause_ms: int
) -> None:
    parts = []
    for kind, seconds, gain_db, seed in pieces:
        length = round(seconds * RATE_HZ)
        source = np.zeros(length, np.float32) if kind == "zeros" else POOL[kind, seed][:length]
        parts.append(source * np.float32(10 ** (gain_db / 20)))
    samples = np.concatenate(parts)
    parameters = VadParameters(threshold, prefix_ms, pause_ms)
    cut = windows(samples, parameters)
    assert cut
    if len(samples) <= MAX_SAMPLES:
        assert cut == [Window(0, len(samples))]
    else:
        check(samples, cut, parameters)


def test_an_hour_takes_well_under_a_second() -> None:
    samples = np.tile(np.append(speech_like(50), silence(10)), 60)
    start = time.process_time()
    assert len(windows(samples)) >= 60
    assert time.process_time() - start < 1
