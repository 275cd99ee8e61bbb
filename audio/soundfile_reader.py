"""Reads wav, flac, ogg (vorbis, opus, flac) and mp3 with libsndfile.

Knows nothing of limits on length or of resampling; gives blocks as they are decoded.
Called by decode.py, for files whose first bytes say that they are of these kinds.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import soundfile

from audio.errors import UnreadableAudio
from audio.file_kind import FileKind, find_kind
from audio.sample_sink import Samples, check_channels
from audio.timed_bytes import TimedBytes

# Small, because what a block held is lost when the decoder stumbles in it.
_BLOCK_FRAMES = 8192
# Files joined into one that are followed; each costs a copy of what is left.
_MAX_PARTS = 100
# Tags and pictures may follow the audio.
_MAX_TRAILER_BYTES = 16 * 1024


class _Stream(soundfile.SoundFile):  # type: ignore[misc]  # soundfile says nothing of its types
    """A file that is only ever read on: soundfile would seek after each block, five times the cost of decoding it."""

    def seekable(self) -> bool:
        return False


def open_blocks(file: TimedBytes, kind: FileKind) -> Iterator[tuple[Samples, int]]:
    """Blocks [n, channels] float32 of the recording, each with its rate in Hz.

    Raises:
        UnreadableAudio: nothing can be decoded; from the iterator: something after the first block cannot.
        AudioError: it has too many channels.
    """
    stream = _open(file)
    return _blocks(stream, _read(stream), file, kind)


def _blocks(stream: _Stream, block: Samples, file: TimedBytes, kind: FileKind) -> Iterator[tuple[Samples, int]]:
    """All blocks of a stream whose first was read, and of the streams after it."""
    rest = b""
    for _ in range(_MAX_PARTS):
        with stream:
            while len(block):
                yield block, stream.samplerate
                block = _read(stream)
        rest = file.rest()
        # mp3 files joined end to end are common; the length that the first one tells is its own.
        found = find_kind(rest) if kind is FileKind.MP3 else None
        if found is None or found[0] is not kind:
            break
        file = file.followed_by(rest[found[1] :])
        stream = _open(file)
        block = _read(stream)
    if len(rest) > _MAX_TRAILER_BYTES and kind is not FileKind.WAV:
        raise UnreadableAudio(f"{len(rest)} bytes follow the end of the audio, and were not read")


def _open(file: TimedBytes) -> _Stream:
    try:
        stream = _Stream(file)
    except soundfile.LibsndfileError as error:
        raise UnreadableAudio(f"the audio cannot be read: {_reason(error)}") from None
    check_channels(stream.channels)
    return stream


def _read(stream: _Stream) -> Samples:
    block = np.empty((_BLOCK_FRAMES, stream.channels), np.float32)
    try:
        read: Samples = stream.read(out=block)
    except soundfile.LibsndfileError as error:
        raise UnreadableAudio(f"the audio cannot be read on: {_reason(error)}") from None
    return read


def _reason(error: soundfile.LibsndfileError) -> str:
    """The library's words, without the name of a file that has none."""
    return str(error.error_string).removeprefix("Error : ").rstrip(". ")
