"""Uploads that name files or addresses open neither; uploads that unpack to far more cost bounded memory and time.

Each lure is first shown to work on FFmpeg as it comes, so that a test which found nothing would be noticed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from audio import pyav_reader
from audio.decode import decode
from audio.errors import AudioError, UnreadableAudio
from audio.file_kind import FileKind
from tests.audio.recordings import RATE_HZ, encode_with_pyav, raw_wav, speech_like

ROOT = Path(__file__).parents[2]
needs_fifo = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
needs_limits = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc here")


class Lure:
    """A file and an address; either knows when it was opened."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "canary.wav"
        os.mkfifo(self.path)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.touched: list[str] = []
        self._threads = [threading.Thread(target=self._watch_file), threading.Thread(target=self._watch_address)]
        for thread in self._threads:
            thread.start()

    def _watch_file(self) -> None:
        descriptor = os.open(self.path, os.O_WRONLY)  # waits until somebody opens it to read
        self.touched.append("file")
        with contextlib.suppress(BrokenPipeError):
            os.write(descriptor, b"RIFF\0\0\0\0WAVE")
        os.close(descriptor)

    def _watch_address(self) -> None:
        connection, _ = self._listener.accept()
        self.touched.append("address")
        connection.close()

    def close(self) -> list[str]:
        """What was touched before this."""
        touched = list(self.touched)
        descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
        for thread in self._threads:
            thread.join(5)
        os.close(descriptor)
        self._listener.close()
        return touched


@pytest.fixture
def lure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lure]:
    monkeypatch.chdir(tmp_path)
    made = Lure(tmp_path)
    yield made
    made.close()


def mov_that_refers_to(path: str) -> bytes:
    """A QuickTime file whose samples are, so it says, in another file: a Macintosh alias with an absolute path."""
    mov = encode_with_pyav(speech_like(0.5), "mov", "pcm_s16le")
    record = bytes(10) + bytes(28) + bytes(12) + bytes(64) + bytes(16) + bytes(4) + bytes(16)
    raw_path = path.encode() + b"\0" * (len(path) % 2)
    record += struct.pack(">HH", 2, len(raw_path)) + raw_path + struct.pack(">HH", 0xFFFF, 0)
    entry = struct.pack(">I4sI", len(record) + 12, b"alis", 0) + record
    at = mov.index(b"dref") - 4
    (old_size,) = struct.unpack_from(">I", mov, at)
    dref = struct.pack(">I4sII", len(entry) + 16, b"dref", 0, 1) + entry
    out = bytearray(mov[:at] + dref + mov[at + old_size :])
    # The boxes around it grow by as much; the samples come first in the file, so that no offset changes.
    for name in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
        # In a sound's media header there are two `dinf`-like places at most: the last before `dref` is the parent.
        box = out.rindex(name, 0, at) - 4
        (size,) = struct.unpack_from(">I", out, box)
        struct.pack_into(">I", out, box, size + len(dref) - old_size)
    return bytes(out)


def lures(lure: Lure) -> dict[str, tuple[bytes, dict[str, Any], str]]:
    """Name -> upload, what makes FFmpeg fall for it, what it then touches."""
    concat = b"ffconcat version 1.0\nfile canary.wav\n"
    address = f"http://127.0.0.1:{lure.port}/speech.ts".encode()
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n" + address + b"\n#EXT-X-ENDLIST\n"
    mov = mov_that_refers_to(str(lure.path))
    return {
        "ffconcat": (concat, {}, "file"),
        "hls": (playlist, {"format": "hls"}, "address"),
        "mov": (mov, {"options": {"enable_drefs": "1", "use_absolute_path": "1"}}, "file"),
    }


NAMES = ("ffconcat", "hls", "mov")


@needs_fifo
@pytest.mark.parametrize("name", NAMES)
def test_ffmpeg_as_it_comes_falls_for_the_lure(name: str, lure: Lure) -> None:
    import av

    upload, options, touched = lures(lure)[name]
    with contextlib.suppress(av.error.FFmpegError), av.open(io.BytesIO(upload), **options) as container:
        list(container.decode(audio=0))
    assert lure.close() == [touched]


@needs_fifo
@pytest.mark.parametrize("name", NAMES)
def test_no_upload_opens_a_file_or_an_address(name: str, lure: Lure) -> None:
    upload = lures(lure)[name][0]
    with contextlib.suppress(AudioError):
        decode(upload, max_seconds=60)
    assert lure.close() == []


@needs_fifo
@pytest.mark.parametrize("kind", FileKind)
@pytest.mark.parametrize("name", NAMES)
def test_nor_would_it_if_it_were_taken_for_any_kind(name: str, kind: FileKind, lure: Lure) -> None:
    upload = lures(lure)[name][0]
    with contextlib.suppress(AudioError):
        list(pyav_reader.open_blocks(io.BytesIO(upload), kind))
    assert lure.close() == []


@needs_fifo
@pytest.mark.parametrize("name", NAMES)
def test_nor_would_it_if_its_demuxer_were_let_in(name: str, lure: Lure, monkeypatch: pytest.MonkeyPatch) -> None:
    """The walls behind the first: with that demuxer chosen, the others still hold, each alone."""
    upload, options, _ = lures(lure)[name]
    demuxer = {"ffconcat": "concat", "hls": "hls", "mov": "mov"}[name]
    monkeypatch.setitem(pyav_reader._DEMUXERS, FileKind.MP4, demuxer)
    with contextlib.suppress(AudioError):
        list(pyav_reader.open_blocks(io.BytesIO(upload), FileKind.MP4))
    let_in = {**pyav_reader._OPTIONS, **options.get("options", {}), "format_whitelist": f"{demuxer},wav"}
    monkeypatch.setattr(pyav_reader, "_OPTIONS", let_in)
    with contextlib.suppress(AudioError):
        list(pyav_reader.open_blocks(io.BytesIO(upload), FileKind.MP4))
    assert lure.close() == []


def test_a_demuxer_that_is_not_on_the_list_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pyav_reader._DEMUXERS, FileKind.WAV, "aiff")
    with pytest.raises(UnreadableAudio):
        pyav_reader.open_blocks(io.BytesIO(raw_wav()), FileKind.WAV)


def test_pictures_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyav_reader, "_DECODERS", "opus")
    with pytest.raises(UnreadableAudio, match=r"coded as \w+, which is none of"):
        pyav_reader.open_blocks(io.BytesIO(encode_with_pyav(speech_like(0.5), "mp4", "aac")), FileKind.MP4)


# Decodes the file it is given with 256 MiB of address space more than Python and the libraries have taken.
LIMITED = """
import json, resource, sys, time
import av
from audio.decode import decode
from audio.errors import AudioError
from tests.audio.recordings import raw_wav
decode(raw_wav(), max_seconds=60)
path, max_seconds, more_mib = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
data = open(path, "rb").read()
limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + more_mib * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
start = time.process_time()
try:
    outcome = f"{decode(data, max_seconds=max_seconds).duration_s:g} s"
except AudioError as error:
    outcome = f"{type(error).__name__}: {error.message}"
print(json.dumps([outcome, time.process_time() - start]))
"""


def decode_limited(data: bytes, path: Path, *, max_seconds: float, more_mib: int = 128) -> tuple[str, float]:
    """What came of decoding a file in a process of little memory, and how many seconds of a core that took."""
    path.write_bytes(data)
    command = [sys.executable, "-c", LIMITED, str(path), str(max_seconds), str(more_mib)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    outcome, seconds = json.loads(done.stdout)
    return outcome, seconds


def silence(hours: float, kind: str) -> bytes:
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", RATE_HZ, 1, format=kind.upper()) as output:
        block = np.zeros(RATE_HZ * 60, np.int16)
        for _ in range(round(hours * 60)):
            output.write(block)
    return file.getvalue()


@needs_limits
@pytest.mark.parametrize(("kind", "hours"), [("flac", 1.0), ("ogg", 0.1)])
def test_hours_of_silence_in_a_small_file_are_refused_early(kind: str, hours: float, tmp_path: Path) -> None:
    data = silence(hours, kind)
    assert len(data) < 400_000
    outcome, seconds = decode_limited(data, tmp_path / "silence", max_seconds=60, more_mib=64)
    assert outcome.startswith("AudioTooLong")
    assert seconds < 5


def test_decoding_ends_when_its_time_is_over() -> None:
    data = silence(0.5, "flac")
    start = time.monotonic()
    with pytest.raises(AudioError, match=r"took longer than 0\.02 s"):
        decode(data, max_seconds=36_000, timeout_s=0.02)
    assert time.monotonic() - start < 10


@needs_limits
def test_a_long_recording_that_is_allowed_is_in_memory_little_more_than_once(tmp_path: Path) -> None:
    outcome, _ = decode_limited(silence(0.5, "flac"), tmp_path / "silence", max_seconds=4000, more_mib=165)
    assert outcome == "1800 s"  # 110 MiB of samples


def claims() -> dict[str, bytes]:
    """Files whose headers speak of far more than they hold."""
    flac = bytearray(silence(0.01, "flac"))
    flac[21:26] = b"\xff" * 5  # the number of samples, 36 bits
    m4a = bytearray(encode_with_pyav(speech_like(1.0), "mp4", "aac"))
    at = m4a.index(b"stsz") + 12
    m4a[at : at + 4] = b"\x7f\xff\xff\xff"  # the number of packets
    mka = bytearray(encode_with_pyav(speech_like(1.0), "matroska", "pcm_s16le"))
    at = mka.index(b"\x1f\x43\xb6\x75") + 4
    mka[at : at + 8] = b"\x01" + b"\xff" * 7  # the size of a cluster
    tag = b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + bytes(100_000)
    wav = raw_wav(claimed_bytes=0xFFFFFFF0)
    chunk = b"LIST" + struct.pack("<I", 0xFFFFFFF0)
    return {
        "wav of 4 GiB": wav,
        "wav with a chunk of 4 GiB": wav[:12] + chunk + wav[12:],
        "wav with many chunks": wav[:12] + (b"LIST" + bytes(4)) * 500_000 + wav[12:],
        "flac of 68 billion samples": bytes(flac),
        "m4a of 2 billion packets": bytes(m4a),
        "mka with an endless cluster": bytes(mka),
        "tag of 256 MiB": tag,
        "ogg of pages without end": b"OggS" * 500_000,
        "mp3 of headers": b"\xff\xfb\x90\x00" * 500_000,
        "mpeg of start codes": b"\0\0\x01\xba" * 500_000,
    }


@needs_limits
@pytest.mark.parametrize("name", claims())
def test_what_a_header_claims_is_not_believed(name: str, tmp_path: Path) -> None:
    outcome, seconds = decode_limited(claims()[name], tmp_path / "claim", max_seconds=60)
    assert outcome.endswith(" s") or outcome.startswith("AudioError: ") or outcome.startswith("UnreadableAudio: ")
    assert seconds < 5


def test_a_decoder_that_never_ends_is_starved() -> None:
    """Whatever a reader does with it, the file ends when its time is over."""
    from audio.timed_bytes import TimedBytes

    file = TimedBytes(bytes(1000), deadline_s=float("inf"))
    assert len(file.read(10)) == 10
    buffer = bytearray(10)
    assert file.readinto(buffer) == 10
    late = TimedBytes(bytes(1000), deadline_s=0.0)
    assert late.has_expired and late.read(10) == b"" and late.readinto(buffer) == 0
