"""Tells what kind of recording a file is from its first bytes, whatever it is called.

Knows nothing of decoders; reads headers only, never past the first 64 KiB after a tag.
Called by decode.py, which gives each kind to the reader that is trusted with it and nothing else to any.
"""

from __future__ import annotations

from enum import Enum

# How far into a file an MPEG frame is looked for: what cuts streams or files by bytes leaves part of a frame first.
_MAX_JUNK = 64 * 1024
# Frames that must follow each other before bytes are taken for MPEG audio: two fit by chance once in some MB of noise.
_MIN_CHAINED_FRAMES = 3

# Kilobits a second by bitrate index 1 to 14, and samples a frame, by (is MPEG-1, layer).
_KBITS = {
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_MPEG1_RATES_HZ = (44_100, 48_000, 32_000)


class FileKind(Enum):
    """The containers that have a reader; the value is how messages call them."""

    WAV = "wav"
    FLAC = "flac"
    OGG = "ogg"
    MP3 = "mp3"
    MP4 = "mp4/m4a"
    MATROSKA = "webm/matroska"
    AAC = "aac"
    MPEG = "mpeg"


def find_kind(data: bytes) -> tuple[FileKind, int] | None:
    """The kind of a file and where in it the recording begins; None for anything else, text above all."""
    if data[:4] in (b"RIFF", b"RIFX", b"RF64") and data[8:12] == b"WAVE":
        return FileKind.WAV, 0
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide"):
        return FileKind.MP4, 0
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return FileKind.MATROSKA, 0
    if data[:4] == b"\0\0\x01\xba":
        return FileKind.MPEG, 0
    start = _end_of_tags(data)
    if data[start : start + 4] == b"fLaC":
        return FileKind.FLAC, start
    if data[start : start + 4] == b"OggS":
        return FileKind.OGG, start
    return _find_frames(data, start)


def _end_of_tags(data: bytes) -> int:
    """Where the ID3v2 tags at the beginning end, however many there are."""
    pos = 0
    while data[pos : pos + 3] == b"ID3" and len(data) >= pos + 10:
        size = 0
        for byte in data[pos + 6 : pos + 10]:  # seven bits a byte
            size = size << 7 | byte & 0x7F
        has_footer = data[pos + 5] & 0x10
        pos += 10 + size + (10 if has_footer else 0)
    return pos


def _find_frames(data: bytes, start: int) -> tuple[FileKind, int] | None:
    """The first place from `start` on where frames of MPEG audio (layers I to III, or AAC) follow each other."""
    end = min(len(data), start + _MAX_JUNK)
    pos = data.find(b"\xff", start, end)
    while pos != -1:
        for kind, num_bytes_at in ((FileKind.MP3, _mpeg_frame_bytes), (FileKind.AAC, _adts_frame_bytes)):
            at, num_frames = pos, 0
            while num_frames < _MIN_CHAINED_FRAMES and (num_bytes := num_bytes_at(data, at)):
                at, num_frames = at + num_bytes, num_frames + 1
            # A file may be shorter than that; then all of it must be frames.
            if num_frames == _MIN_CHAINED_FRAMES or (num_frames and pos == start and at >= len(data)):
                return kind, pos
        pos = data.find(b"\xff", pos + 1, end)
    return None


def _mpeg_frame_bytes(data: bytes, at: int) -> int:
    """Length of the MPEG-1, 2 or 2.5 frame of layer I, II or III whose header stands there; 0 if none does."""
    header = data[at : at + 4]
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return 0
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)
    bitrate, rate = header[2] >> 4, header[2] >> 2 & 3
    if version == 1 or layer == 4 or bitrate in (0, 15) or rate == 3:  # reserved, or a length that is nowhere written
        return 0
    is_mpeg1 = version == 3
    bits_s = _KBITS[is_mpeg1, layer][bitrate - 1] * 1000
    rate_hz = _MPEG1_RATES_HZ[rate] >> (0 if is_mpeg1 else 1 if version == 2 else 2)
    padding = header[2] >> 1 & 1
    if layer == 1:
        return (12 * bits_s // rate_hz + padding) * 4
    samples = 1152 if is_mpeg1 or layer == 2 else 576
    return samples // 8 * bits_s // rate_hz + padding


def _adts_frame_bytes(data: bytes, at: int) -> int:
    """Length of the AAC frame whose ADTS header stands there; 0 if none does."""
    header = data[at : at + 7]
    if len(header) < 7 or header[0] != 0xFF or header[1] & 0xF6 != 0xF0 or header[2] >> 2 & 15 > 12:
        return 0
    num_bytes = (header[3] & 3) << 11 | header[4] << 3 | header[5] >> 5
    return num_bytes if num_bytes > 7 else 0
