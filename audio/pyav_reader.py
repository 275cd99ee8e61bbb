"""Reads mp4, m4a, webm, aac and what else FFmpeg decodes, where PyAV is installed.

Knows nothing of limits on length or of resampling; gives blocks as they are decoded.
Called by decode.py, for files whose first bytes say that they are of a kind listed here.

FFmpeg's demuxers include some that open what a file's text names: other files, network addresses. Four walls stand
between an upload and them: the kind found from the first bytes chooses the one demuxer, nothing is probed; that
demuxer must be on the list of those that only read their own bytes; no protocol may be opened; and whatever is opened
all the same is opened by a function that refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO, NoReturn

import numpy as np

from audio.errors import AudioError, UnreadableAudio
from audio.file_kind import FileKind
from audio.sample_sink import Samples, check_channels

if TYPE_CHECKING:
    from av import AudioFrame, AudioStream
    from av.container import InputContainer

PYAV = "av==18.1.0"
_DEMUXERS = {
    FileKind.WAV: "wav",
    FileKind.FLAC: "flac",
    FileKind.OGG: "ogg",
    FileKind.MP3: "mp3",
    FileKind.MP4: "mp4",
    FileKind.MATROSKA: "matroska",
    FileKind.AAC: "aac",
    FileKind.MPEG: "mpeg",
}
# No decoder of pictures: FFmpeg would try them while it looks at a file.
_DECODERS = (
    "aac,aac_latm,ac3,alac,amrnb,amrwb,eac3,flac,mp2,mp2float,mp3,mp3float,opus,vorbis,"
    "adpcm_ima_wav,adpcm_ms,pcm_alaw,pcm_f32be,pcm_f32le,pcm_f64be,pcm_f64le,pcm_mulaw,pcm_s16be,pcm_s16le,pcm_s24be,"
    "pcm_s24le,pcm_s32be,pcm_s32le,pcm_s8,pcm_u8"
)
# A few come where a stream was cut; more than this is no audio, and each costs time.
_MAX_UNDECODABLE_IN_A_ROW = 1000
_OPTIONS = {
    "format_whitelist": "wav,flac,ogg,mp3,mov,mp4,m4a,matroska,webm,aac,mpeg",
    "protocol_whitelist": "none",
    "codec_whitelist": _DECODERS,
    "max_streams": "32",
}


def is_available() -> bool:
    """Whether PyAV is installed."""
    try:
        import av  # noqa: F401
    except ImportError:
        return False
    return True


def open_blocks(file: BinaryIO, kind: FileKind) -> Iterator[tuple[Samples, int]]:
    """Blocks [n, channels] float32 of the file's best audio stream, each with its rate in Hz.

    Packets that cannot be decoded are left out, as players do, and counted in the error that the iterator then ends in.

    Raises:
        UnreadableAudio: the file cannot be opened; from the iterator: something after the first blocks is unreadable.
        AudioError: it holds no audio, or refers to another file.
    """
    import av

    try:
        container = av.open(
            file,
            "r",
            format=_DEMUXERS[kind],
            container_options=_OPTIONS,
            metadata_errors="replace",
            io_open=_refuse_to_open,
        )
    except av.error.FFmpegError as error:
        raise UnreadableAudio(f"the {kind.value} file cannot be read: {error.strerror}") from None
    return _blocks(container, _audio_stream(container))


def _refuse_to_open(url: str, flags: int, options: object) -> NoReturn:
    raise AudioError("the file refers to another file or address; a recording must be whole in itself")


def _audio_stream(container: InputContainer) -> AudioStream:
    import av

    # The best is None too where nobody has a decoder.
    stream = container.streams.best("audio") or next(iter(container.streams.audio), None)
    if stream is None:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
        raise AudioError(f"the file holds no audio; its streams: {kinds}")
    name = stream.codec_context.name if stream.codec_context else "unknown"
    if not isinstance(stream, av.AudioStream) or name not in _DECODERS.split(","):
        raise UnreadableAudio(f"the file's audio is coded as {name}, which is none of {_DECODERS}")
    return stream


def _blocks(container: InputContainer, stream: AudioStream) -> Iterator[tuple[Samples, int]]:
    import av

    num_undecodable = num_in_a_row = 0
    with container:
        try:
            for packet in container.demux(stream):
                try:
                    frames = packet.decode()
                except av.error.InvalidDataError:
                    num_undecodable += 1
                    num_in_a_row += 1
                    if num_in_a_row > _MAX_UNDECODABLE_IN_A_ROW:
                        break
                    continue
                num_in_a_row = 0
                for frame in frames:
                    yield _block_of(frame), frame.sample_rate
        except av.error.FFmpegError as error:
            raise UnreadableAudio(f"the audio cannot be read on: {error.strerror}") from None
    if num_undecodable:
        raise UnreadableAudio(f"{num_undecodable} packets of the audio cannot be decoded")


def _block_of(frame: AudioFrame) -> Samples:
    """The frame's samples as [n, channels], full scale being 1."""
    num_channels = frame.layout.nb_channels
    check_channels(num_channels)
    raw = frame.to_ndarray()
    interleaved = raw.T if frame.format.is_planar else raw.reshape(-1, num_channels)
    block = np.array(interleaved, np.float32, order="C")
    if raw.dtype == np.uint8:
        block -= 128
        block /= 128
    elif raw.dtype.kind == "i":
        block /= 1 << 8 * raw.dtype.itemsize - 1
    return block
