"""Looks at the chunks of a RIFF wav file before a decoder does.

Knows nothing of decoders; reads sizes and the format's first fields.
Called by decode.py: libsndfile says little about what is wrong with a header, and takes a length of 0 at its word.
"""

from __future__ import annotations

import struct

from audio.sample_sink import check_channels, check_rate

# Chunks before the samples; more than any recorder writes.
_MAX_CHUNKS = 64


def checked_wav(data: bytes) -> bytes:
    """The file, with a length of its samples where a recorder that never finished left a 0.

    Raises:
        AudioError: the header's rate or channels break a rule.
    """
    if data[:4] != b"RIFF":  # the rare kinds: big-endian, 64 bit
        return data
    pos = 12
    for _ in range(_MAX_CHUNKS):
        name, size = data[pos : pos + 4], data[pos + 4 : pos + 8]
        if len(size) < 4:
            break
        (num_bytes,) = struct.unpack("<I", size)
        if name == b"fmt " and len(data) >= pos + 16:
            channels, rate_hz = struct.unpack_from("<HI", data, pos + 10)
            check_channels(channels)
            check_rate(rate_hz)
        if name == b"data":
            if num_bytes == 0 and len(data) > pos + 8:
                return data[: pos + 4] + struct.pack("<I", len(data) - pos - 8) + data[pos + 8 :]
            break
        pos += 8 + num_bytes + num_bytes % 2
    return data
