"""Reads wav, flac, ogg (vorbis, opus, flac) and mp3 with libsndfile.

Knows nothing of limits on length or of resampling; gives blocks as they are decoded.
Called by decode.py, for files whose first bytes say that they are of these kinds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import soundfile

from audio.errors import UnreadableAudio
from audio.sample_sink import Samples, check_channels

# Small, because what a block held is lost when the decoder stumbles in it.
_BLOCK_FRAMES = 8192


class _Stream(soundfile.SoundFile):  # type: ignore[misc]  # soundfile says nothing of its types
    """A file that is only ever read on: soundfile would seek after each block, five times the cost of decoding it."""

    def seekable(self) -> bool:
        return False


def open_blocks(file: BinaryIO) -> Iterator[tuple[Samples, int]]:
    """Blocks [n, channels] float32 of the recording, each with its rate in Hz.

    Raises:
        UnreadableAudio: the file cannot be opened; from the iterator: what follows the blocks so far is unreadable.
        AudioError: it has too many channels.
    """
    try:
        stream = _Stream(file)
    except soundfile.LibsndfileError as error:
        raise UnreadableAudio(f"the audio cannot be read: {_reason(error)}") from None
    check_channels(stream.channels)
    return _blocks(stream)


def _blocks(stream: _Stream) -> Iterator[tuple[Samples, int]]:
    with stream:
        while True:
            block = np.empty((_BLOCK_FRAMES, stream.channels), np.float32)
            try:
                block = stream.read(out=block)
            except soundfile.LibsndfileError as error:
                raise UnreadableAudio(f"the audio cannot be read on: {_reason(error)}") from None
            if not len(block):
                return
            yield block, stream.samplerate


def _reason(error: soundfile.LibsndfileError) -> str:
    """The library's words, without the name of a file that has none."""
    return str(error.error_string).removeprefix("Error : ").rstrip(". ")
