"""Every format gives the same samples; every broken rule gives an error that names it."""

from __future__ import annotations

import io
import struct
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from audio import pyav_reader
from audio.decode import decode
from audio.errors import AudioError, AudioTooLong, UnreadableAudio
from tests.audio.recordings import (
    RATE_HZ,
    Samples,
    encode,
    encode_with_pyav,
    raw_wav,
    speech_like,
    video_without_sound,
)

SPEECH = speech_like(3.0)
# Name -> file, and how much longer than the recording it may be, in seconds: codecs pad, and not all containers say so.
FILES: dict[str, tuple[bytes, float]] = {
    "wav": (encode(SPEECH, "wav"), 0),
    "wav 44.1 kHz": (encode(SPEECH, "wav", rate_hz=44_100), 0.0001),
    "flac": (encode(SPEECH, "flac"), 0),
    "flac 48 kHz": (encode(SPEECH, "flac", rate_hz=48_000), 0.0001),
    "ogg vorbis": (encode(SPEECH, "ogg"), 0.0001),
    "opus": (encode(SPEECH, "opus"), 0.0001),
    "mp3": (encode(SPEECH, "mp3"), 0.0001),
    "mp3 44.1 kHz": (encode(SPEECH, "mp3", rate_hz=44_100), 0.0001),
    "mp3 by lame": (encode_with_pyav(SPEECH, "mp3", "libmp3lame"), 0.0001),
    "m4a": (encode_with_pyav(SPEECH, "mp4", "aac"), 0.065),
    "m4a 44.1 kHz": (encode_with_pyav(SPEECH, "ipod", "aac", rate_hz=44_100), 0.065),
    "mov": (encode_with_pyav(SPEECH, "mov", "pcm_s16le"), 0),
    "m4a alac": (encode_with_pyav(SPEECH, "mp4", "alac"), 0),
    "webm": (encode_with_pyav(SPEECH, "webm", "libopus", rate_hz=48_000), 0.0001),
    "mka": (encode_with_pyav(SPEECH, "matroska", "flac"), 0),
    "mpeg": (encode_with_pyav(SPEECH, "mpeg", "mp2", rate_hz=48_000), 0.1),
}
LOSSLESS = ("wav", "flac", "mov", "m4a alac", "mka")


def similarity(got: Samples, expected: Samples, *, lag: int = 0) -> float:
    """Correlation, 1 being the same but for its loudness, when `got` is `lag` samples late."""
    length = min(len(got) - lag, len(expected))
    return float(np.corrcoef(got[lag : lag + length], expected[:length])[0, 1])


@pytest.mark.parametrize("name", FILES)
def test_the_same_speech_in_any_format_gives_the_same_samples(name: str) -> None:
    data, max_longer_s = FILES[name]
    audio = decode(data, max_seconds=60)
    assert audio.samples.dtype == np.float32
    assert audio.damage is None
    assert 3.0 <= audio.duration_s <= 3.0 + max_longer_s
    # MPEG program streams do not say how much the encoder added in front: 481 samples at 48 kHz.
    assert similarity(audio.samples, SPEECH, lag=160 if name == "mpeg" else 0) > 0.98
    assert np.sqrt(np.mean(audio.samples**2)) == pytest.approx(np.sqrt(np.mean(SPEECH**2)), rel=0.1)
    if name in LOSSLESS:
        assert np.abs(audio.samples - SPEECH).max() < 2 / 32768


def test_bare_aac_is_late_by_the_delay_of_its_encoder_which_it_does_not_tell() -> None:
    audio = decode(encode_with_pyav(SPEECH, "adts", "aac"), max_seconds=60)
    assert 3.0 <= audio.duration_s < 3.2
    assert similarity(audio.samples, SPEECH, lag=1024) > 0.99


@pytest.mark.parametrize(
    ("subtype", "tolerance"),
    [
        ("PCM_U8", 2 / 128),
        ("PCM_16", 2 / 32768),
        ("PCM_24", 1e-6),
        ("PCM_32", 1e-6),
        ("FLOAT", 0),
        ("DOUBLE", 0),
        ("ULAW", 0.02),
        ("ALAW", 0.02),
        ("IMA_ADPCM", 0.1),
        ("MS_ADPCM", 0.1),
    ],
)
def test_every_coding_of_wav_is_read(subtype: str, tolerance: float) -> None:
    audio = decode(encode(SPEECH, "wav", subtype=subtype), max_seconds=60)
    assert len(SPEECH) <= len(audio.samples) <= len(SPEECH) + 1024  # some come in blocks
    assert np.abs(audio.samples[: len(SPEECH)] - SPEECH).max() <= tolerance


@pytest.mark.parametrize("rate_hz", [4_000, 8_000, 11_025, 22_050, 44_100, 48_000, 96_000, 384_000])
def test_block_by_block_resamples_as_the_whole_at_once_does(rate_hz: int) -> None:
    at_rate = soxr.resample(SPEECH, RATE_HZ, rate_hz)
    file = io.BytesIO(encode(SPEECH, "wav", rate_hz=rate_hz, subtype="FLOAT"))
    audio = decode(file.getvalue(), max_seconds=60)
    whole = soxr.resample(soxr.resample(SPEECH, RATE_HZ, rate_hz, quality="VHQ"), rate_hz, RATE_HZ, quality="HQ")
    assert len(at_rate) and abs(len(audio.samples) - len(SPEECH)) <= 4
    np.testing.assert_allclose(audio.samples, whole, atol=1e-6)


@pytest.mark.parametrize("channels", [2, 3, 8])
def test_channels_are_mixed_to_their_mean(channels: int) -> None:
    waves = np.stack([speech_like(1.0, seed=seed) for seed in range(channels)], axis=1)
    audio = decode(encode(waves, "wav", subtype="FLOAT"), max_seconds=60)
    np.testing.assert_allclose(audio.samples, waves.mean(axis=1), atol=1e-6)


def test_channels_of_a_container_are_mixed_alike() -> None:
    import av

    waves = np.stack([speech_like(1.0, seed=seed) for seed in range(2)])
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("pcm_f32le", rate=RATE_HZ, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(waves), format="fltp", layout="stereo")
        frame.sample_rate = RATE_HZ
        output.mux([*stream.encode(frame), *stream.encode(None)])
    np.testing.assert_allclose(decode(file.getvalue(), max_seconds=60).samples, waves.mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("rate_hz", [0, 1, 3_999, 384_001, 0xFFFFFFFF])
def test_rates_out_of_range_are_refused_by_rule_and_value(rate_hz: int) -> None:
    with pytest.raises(AudioError, match=rf"sample rate is {rate_hz} Hz; it must be 4000 to 384000 Hz"):
        decode(raw_wav(rate_hz=rate_hz), max_seconds=60)


@pytest.mark.parametrize("channels", [0, 9, 1024, 65535])
def test_numbers_of_channels_out_of_range_are_refused_by_rule_and_value(channels: int) -> None:
    with pytest.raises(AudioError, match=f"has {channels} channels; it must have 1 to 8"):
        decode(raw_wav(channels=channels), max_seconds=60)


@pytest.mark.parametrize("kind", ["flac", "ogg"])
def test_rates_and_channels_of_other_formats_are_checked_too(kind: str) -> None:
    with pytest.raises(AudioError, match="sample rate is 3000 Hz"):
        decode(encode(speech_like(1.0), kind, rate_hz=3_000), max_seconds=60)
    if kind == "ogg":
        with pytest.raises(AudioError, match="has 9 channels"):
            decode(encode(np.zeros((RATE_HZ, 9), np.float32), kind), max_seconds=60)


@pytest.mark.parametrize("claimed_bytes", [0, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_wav_that_claims_another_size_gives_what_it_holds(claimed_bytes: int) -> None:
    data = (SPEECH * 32767).astype("<i2").tobytes()
    audio = decode(raw_wav(data, claimed_bytes=claimed_bytes), max_seconds=60)
    assert audio.duration_s == 3.0
    assert similarity(audio.samples, SPEECH) > 0.9999


def test_a_wav_with_chunks_before_its_samples_is_read() -> None:
    whole = raw_wav((SPEECH * 32767).astype("<i2").tobytes(), claimed_bytes=0)
    odd = b"LIST" + struct.pack("<I", 5) + b"hello\0"
    assert decode(whole[:12] + odd + whole[12:], max_seconds=60).duration_s == 3.0


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("m4a", "m4a 44.1 kHz", "mov", "m4a alac")])
def test_a_truncated_file_gives_what_is_there(name: str) -> None:
    data = FILES[name][0]
    audio = decode(data[: len(data) * 7 // 10], max_seconds=60)
    whole = decode(data, max_seconds=60).samples
    assert 0.9 < audio.duration_s < 2.6
    settled = len(audio.samples) - RATE_HZ // 5  # the last frame of a codec wants its neighbour
    np.testing.assert_allclose(audio.samples[:settled], whole[:settled], atol=1e-3)


def test_what_was_not_decoded_is_said() -> None:
    flac = FILES["flac"][0]
    assert "lost sync" in str(decode(flac[: len(flac) * 7 // 10], max_seconds=60).damage)
    m4a = bytearray(FILES["m4a"][0])
    m4a[len(m4a) // 2 : len(m4a) // 2 + 40] = b"\xff" * 40
    audio = decode(bytes(m4a), max_seconds=60)
    assert "1 packets" in str(audio.damage)
    assert 2.8 < audio.duration_s < 3.0  # what follows the damage is there


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_less_than_a_tenth_of_a_second_is_refused(kind: str) -> None:
    with pytest.raises(AudioError, match=r"lasts 0\.0\d+ s; it must last at least 0\.1 s"):
        decode(encode(SPEECH[1000:2500], kind), max_seconds=60)
    assert decode(encode(SPEECH[:1600], "wav"), max_seconds=60).duration_s == 0.1


def test_the_limit_itself_is_allowed() -> None:
    wave = np.zeros(RATE_HZ * 60, np.float32)
    assert decode(encode(wave, "flac"), max_seconds=60).duration_s == 60
    with pytest.raises(AudioTooLong):
        decode(encode(np.append(wave, np.float32(0)), "flac"), max_seconds=60)


def test_longer_than_allowed_is_refused() -> None:
    for name, (data, _) in FILES.items():
        assert decode(data, max_seconds=3.2).duration_s < 3.2, name
        with pytest.raises(AudioTooLong, match=r"longer than 2\.9 seconds"):
            decode(data, max_seconds=2.9)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_that_are_no_numbers_are_refused_by_place_and_value(value: float, channels: int) -> None:
    waves = np.repeat(SPEECH[:, None], channels, axis=1)
    waves[24_000, channels - 1] = value
    with pytest.raises(AudioError, match=rf"sample at 1\.500 seconds is {value}; it must be finite"):
        decode(encode(waves, "wav", subtype="FLOAT"), max_seconds=60)


def test_samples_beyond_full_scale_are_clipped_per_channel() -> None:
    waves = np.stack([SPEECH * 8, SPEECH * 1e30], axis=1).astype(np.float32)
    audio = decode(encode(waves, "wav", subtype="FLOAT"), max_seconds=60)
    np.testing.assert_allclose(audio.samples, np.clip(waves, -1, 1).mean(axis=1), atol=1e-6)


def zip_file() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("speech.wav", FILES["wav"][0])
    return file.getvalue()


NO_AUDIO = {
    "empty": b"",
    "one byte": b"R",
    "random": np.random.default_rng(1).bytes(200_000),
    "zeros": bytes(100_000),
    "ones": b"\xff" * 200_000,
    "zip": zip_file(),
    "html": b"<!doctype html><title>404</title>",
    "json": b'{"error": "none"}',
    "playlist": b"#EXTM3U\n#EXTINF:1,\nspeech.wav\n",
    "ffconcat": b"ffconcat version 1.0\nfile speech.wav\n",
    "cue": b'FILE "speech.wav" WAVE\n  TRACK 01 AUDIO\n',
    "tag only": b"ID3\x03\0\0\x7f\x7f\x7f\x7f" + bytes(1000),
    "sync and noise": b"\xff\xfb\x90\x00" + np.random.default_rng(2).bytes(100_000),
}


@pytest.mark.parametrize("has_pyav", [True, False])
@pytest.mark.parametrize("name", NO_AUDIO)
def test_what_is_no_audio_is_refused_whatever_it_is_called(
    name: str, has_pyav: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyav_reader, "is_available", lambda: has_pyav)
    with pytest.raises(AudioError, match=rf"\({len(NO_AUDIO[name])} bytes\) is not audio of a kind"):
        decode(NO_AUDIO[name], max_seconds=60)


RNG = np.random.default_rng(3)
BROKEN = {
    "wav without data": raw_wav(b""),
    "wav header only": b"RIFF\0\0\0\0WAVE",
    "wav of no bits": raw_wav(bits=0),
    "wav of an unknown codec": raw_wav(codec=0x1234),
    "wav of mp3 that is none": raw_wav(codec=0x55),
    "flac of noise": b"fLaC" + RNG.bytes(50_000),
    "ogg of noise": b"OggS" + RNG.bytes(50_000),
    "mp4 of noise": b"\0\0\0\x1cftypisom" + RNG.bytes(50_000),
    "webm of noise": b"\x1a\x45\xdf\xa3" + RNG.bytes(50_000),
    "mpeg of noise": b"\0\0\x01\xba" + RNG.bytes(50_000),
    "m4a cut before its index": FILES["m4a"][0][:8000],
}


@pytest.mark.parametrize("has_pyav", [True, False])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_with_a_reason(name: str, has_pyav: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyav_reader, "is_available", lambda: has_pyav)
    with pytest.raises(AudioError, match=r".{20,}"):
        decode(BROKEN[name], max_seconds=60)


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_video_without_sound_is_refused(container: str) -> None:
    with pytest.raises(AudioError, match="holds no audio; its streams: video"):
        decode(video_without_sound(container), max_seconds=60)


@pytest.mark.parametrize("name", ["m4a", "webm", "mka", "mpeg"])
def test_without_pyav_the_answer_says_what_works_and_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyav_reader, "is_available", lambda: False)
    with pytest.raises(AudioError, match=r"wav, flac, ogg, opus and mp3 are; .*\(pip install av==\d"):
        decode(FILES[name][0], max_seconds=60)


@pytest.mark.parametrize("name", ["wav", "flac", "ogg vorbis", "opus", "mp3"])
def test_the_core_formats_need_no_pyav(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyav_reader, "is_available", lambda: False)
    monkeypatch.setattr(pyav_reader, "open_blocks", None)
    assert decode(FILES[name][0], max_seconds=60).duration_s == pytest.approx(3.0, abs=0.0002)


def test_a_codec_that_libsndfile_lacks_is_read_by_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_with_pyav(SPEECH, "ogg", "flac")
    assert similarity(decode(data, max_seconds=60).samples, SPEECH) > 0.9999
    monkeypatch.setattr(pyav_reader, "is_available", lambda: False)
    with pytest.raises(UnreadableAudio, match="flac decoder"):
        decode(data, max_seconds=60)


def test_decoding_that_takes_too_long_is_stopped() -> None:
    for name, (data, _) in FILES.items():
        start = time.monotonic()
        with pytest.raises(AudioError, match="took longer than 0 s"):
            decode(data, max_seconds=60, timeout_s=0)
        assert time.monotonic() - start < 10, name


def test_mp3_is_found_behind_tags_and_half_a_frame() -> None:
    mp3 = FILES["mp3 by lame"][0]
    tag = b"ID3\x04\0\0" + bytes([0, 0, 0x0F, 0x10]) + bytes(0x0F << 7 | 0x10)
    whole = decode(mp3, max_seconds=60).samples
    np.testing.assert_array_equal(decode(tag + mp3, max_seconds=60).samples, whole)
    np.testing.assert_array_equal(decode(tag + tag + mp3, max_seconds=60).samples, whole)
    cut = decode(mp3[len(mp3) // 3 :], max_seconds=60)  # a file cut into pieces by bytes
    assert 1.8 < cut.duration_s < 2.1


@pytest.mark.parametrize("name", ["mp3", "mp3 by lame"])
def test_joined_mp3_files_are_read_to_the_end(name: str) -> None:
    """Each tells its own length; a decoder that believes the first stops there."""
    tag = b"ID3\x04\0\0" + bytes([0, 0, 0, 100]) + bytes(100)
    mp3 = FILES[name][0]
    audio = decode(mp3 + tag + mp3 + mp3 + b"TAG" + bytes(125), max_seconds=60)
    assert audio.duration_s == pytest.approx(9.0, abs=0.001)
    assert audio.damage is None
    assert similarity(audio.samples[6 * RATE_HZ :], SPEECH) > 0.98


def test_what_follows_the_audio_unread_is_said() -> None:
    assert decode(FILES["wav"][0] + bytes(50_000), max_seconds=60).damage is None
    ogg = FILES["ogg vorbis"][0]
    audio = decode(ogg * 3, max_seconds=60)
    assert audio.duration_s == pytest.approx(3.0, abs=0.001)
    assert "follow the end of the audio" in str(audio.damage)


def test_packets_that_cannot_be_decoded_are_not_tried_for_ever() -> None:
    header_only = b"\xff\xf1\x60\x40\x01\x1f\xfc\x00"
    with pytest.raises(UnreadableAudio, match="1001 packets of the audio cannot be decoded"):
        decode(header_only * 20_000, max_seconds=60)


def test_files_decoded_at_once_give_what_each_gives_alone() -> None:
    alone = {name: decode(data, max_seconds=60).samples for name, (data, _) in FILES.items()}
    with ThreadPoolExecutor(4) as pool:
        together = pool.map(lambda name: (name, decode(FILES[name][0], max_seconds=60).samples), [*FILES] * 3)
        for name, samples in together:
            np.testing.assert_array_equal(samples, alone[name])


def test_the_version_to_install_is_the_one_that_is_tested() -> None:
    root = Path(__file__).parents[2]
    assert pyav_reader.PYAV in (root / "tests" / "requirements.txt").read_text().splitlines()
    assert f"pip install {pyav_reader.PYAV} " in (root / "requirements.txt").read_text()


def test_flac_is_found_behind_a_tag() -> None:
    tag = b"ID3\x04\0\0" + bytes([0, 0, 0, 100]) + bytes(100)
    assert decode(tag + FILES["flac"][0], max_seconds=60).duration_s == 3.0


@settings(deadline=None, max_examples=150)
@given(name=st.sampled_from(sorted(FILES)), data=st.data())
def test_a_damaged_file_gives_sound_samples_or_a_reason(name: str, data: Any) -> None:
    raw = bytearray(FILES[name][0])
    for _ in range(data.draw(st.integers(1, 8))):
        # Headers are where the harm is.
        position = data.draw(st.one_of(st.integers(0, 200), st.integers(0, len(raw) - 1)))
        raw[position] = data.draw(st.integers(0, 255))
    try:
        audio = decode(bytes(raw), max_seconds=10, timeout_s=20)
    except AudioError as error:
        assert len(error.message) > 10
    else:
        assert 0.1 <= audio.duration_s <= 10.001
        assert np.isfinite(audio.samples).all()
        assert np.abs(audio.samples).max() <= 2
