"""Makes the samples a speech model hears from the bytes of an uploaded file, whatever those bytes are.

Knows nothing of HTTP, windows or models; never sees or opens a file name.
Called by runtime/recordings.py in a worker thread: decoding a long file takes seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from audio import pyav_reader, soundfile_reader
from audio.errors import AudioError, UnreadableAudio
from audio.file_kind import FileKind, find_kind
from audio.sample_sink import SAMPLE_RATE_HZ, Samples, SampleSink
from audio.timed_bytes import TimedBytes
from audio.wav_header import checked_wav

MIN_SECONDS = 0.1
_BY_SOUNDFILE = (FileKind.WAV, FileKind.FLAC, FileKind.OGG, FileKind.MP3)


@dataclass(frozen=True, slots=True)
class Audio:
    """A recording, ready for a model.

    Args:
        samples: [N] float32, mono, 16 kHz, full scale being 1.
        damage: what could not be decoded, if anything: the samples are the rest.
    """

    samples: Samples
    damage: str | None = None

    @property
    def duration_s(self) -> float:
        """How long it lasts."""
        return len(self.samples) / SAMPLE_RATE_HZ


def decode(data: bytes, *, max_seconds: float, timeout_s: float = 120.0) -> Audio:
    """Decodes a file of a kind that is found from its content.

    A truncated or damaged file gives what precedes the damage, if that is long enough.

    Args:
        data: the file.
        max_seconds: of audio; a longer file is refused once that much of it was decoded.
        timeout_s: wall time that decoding may take.

    Raises:
        AudioTooLong: longer than max_seconds.
        AudioError: of no known kind, not decodable, shorter than 0.1 s, or it breaks a rule that the message names.
    """
    found = find_kind(data)
    if found is None:
        raise AudioError(f"the file ({len(data)} bytes) is not audio of a kind that is read here: {_kinds_read()}")
    kind, start = found
    deadline_s = time.monotonic() + timeout_s
    sink = SampleSink(max_seconds)
    damage = None
    try:
        for block, rate_hz in _open(data[start:], kind, deadline_s):
            sink.push(block, rate_hz)
            _check_time(deadline_s, timeout_s)
    except UnreadableAudio as error:
        damage = error.message
    _check_time(deadline_s, timeout_s)  # a file whose time is over looks truncated to its reader
    samples = sink.finish()
    if len(samples) < MIN_SECONDS * SAMPLE_RATE_HZ:
        if damage and not len(samples):
            raise UnreadableAudio(damage)
        reason = f" ({damage})" if damage else ""
        raise AudioError(
            f"the audio lasts {len(samples) / SAMPLE_RATE_HZ:g} s; it must last at least {MIN_SECONDS:g} s{reason}"
        )
    return Audio(samples, damage)


def _open(data: bytes, kind: FileKind, deadline_s: float) -> Iterator[tuple[Samples, int]]:
    """The blocks of a file of that kind; where libsndfile cannot open it, PyAV may know the codec."""
    if kind not in _BY_SOUNDFILE:
        if not pyav_reader.is_available():
            raise AudioError(f"{kind.value} is not read here: {_kinds_read()}")
        return pyav_reader.open_blocks(TimedBytes(data, deadline_s), kind)
    if kind is FileKind.WAV:
        data = checked_wav(data)
    try:
        return soundfile_reader.open_blocks(TimedBytes(data, deadline_s), kind)
    except UnreadableAudio as refusal:
        if not pyav_reader.is_available():
            raise
        try:
            return pyav_reader.open_blocks(TimedBytes(data, deadline_s), kind)
        except UnreadableAudio:
            raise refusal from None  # it says more


def _kinds_read() -> str:
    """What works, and what would."""
    if pyav_reader.is_available():
        return "wav, flac, ogg, opus, mp3, mp4, m4a, webm, aac and mpeg are"
    return (
        "wav, flac, ogg, opus and mp3 are; for mp4, m4a, webm, aac and mpeg the server needs PyAV "
        f"(pip install {pyav_reader.PYAV})"
    )


def _check_time(deadline_s: float, timeout_s: float) -> None:
    if time.monotonic() > deadline_s:
        raise AudioError(f"decoding the audio took longer than {timeout_s:g} s, the most that is allowed")
