"""Speaks a text with eSpeak NG and says where each of its words begins and ends in the sound.

Knows nothing of words, voices or models: a thin door to the C library that the package `espeakng-loader` brings.
Called by pool.py; one process holds one `Speaker`, for the library keeps its state to itself.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import soxr
from numpy.typing import NDArray

SAMPLE_RATE_HZ = 16000
# From the library's header speak_lib.h.
_SYNCHRONOUS, _UTF8, _CHARACTERS = 2, 1, 1
_RATE, _PITCH, _RANGE, _WORD_GAP = 1, 3, 4, 7
_WORD_EVENT = 1
# Sound below this share of the loudest is taken for silence when the edges of a word are looked for.
_QUIET = 0.02
_SMOOTHING = 80


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@dataclass(frozen=True, slots=True)
class Manner:
    """How a text is spoken: `voice` as eSpeak names it (`en+m3`), words per minute, pitch and its range 0-100, gaps."""

    voice: str
    rate: int
    pitch: int
    pitch_range: int
    word_gap: int


@dataclass(frozen=True, slots=True)
class Spoken:
    """Sound at 16 kHz, int16, from the first word's start to the last one's end; `spans` in samples, one per word."""

    samples: NDArray[np.int16]
    spans: tuple[tuple[int, int], ...]


class Speaker:
    """The library, opened once in this process.

    Raises:
        ImportError: `espeakng-loader` is not installed.
    """

    def __init__(self) -> None:
        import espeakng_loader

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._library.espeak_Synth.argtypes = (
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int,
            ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p,
        )  # fmt: skip
        self._rate_hz = self._library.espeak_Initialize(
            _SYNCHRONOUS, 0, str(espeakng_loader.get_data_path()).encode(), 0
        )
        if self._rate_hz <= 0:
            raise RuntimeError("espeak_Initialize failed: the data of espeakng-loader cannot be read")
        self._chunks: list[NDArray[np.int16]] = []
        self._starts: list[int] = []
        # Kept, for the library holds only its address.
        self._callback = _Callback(self._receive)
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, wav: ctypes._Pointer[ctypes.c_short], num_samples: int, events: ctypes._Pointer[_Event]) -> int:
        if wav and num_samples > 0:
            self._chunks.append(np.ctypeslib.as_array(wav, (num_samples,)).copy())
        i = 0
        while events[i].type:
            if events[i].type == _WORD_EVENT:
                self._starts.append(events[i].sample)
            i += 1
        return 0

    def speak(self, text: str, manner: Manner) -> Spoken | None:
        """The text as sound; None where eSpeak does not know the voice or ran two words into one."""
        if self._library.espeak_SetVoiceByName(manner.voice.encode()) != 0:
            return None
        for parameter, value in (
            (_RATE, manner.rate),
            (_PITCH, manner.pitch),
            (_RANGE, manner.pitch_range),
            (_WORD_GAP, manner.word_gap),
        ):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._chunks.clear()
        self._starts.clear()
        encoded = text.encode() + b"\0"
        self._library.espeak_Synth(encoded, len(encoded), 0, _CHARACTERS, 0, _UTF8, None, None)
        self._library.espeak_Synchronize()
        if len(self._starts) != len(text.split()) or not self._chunks:
            return None
        sound = soxr.resample(np.concatenate(self._chunks), self._rate_hz, SAMPLE_RATE_HZ)
        starts = [start * SAMPLE_RATE_HZ // self._rate_hz for start in self._starts]
        return _trimmed(sound, starts)


def _trimmed(sound: NDArray[np.int16], starts: list[int]) -> Spoken | None:
    """Each word from where it is first heard to where it is last heard, the sound from first to last of these."""
    loudness = np.abs(sound.astype(np.float32))
    loudness = np.convolve(loudness, np.full(_SMOOTHING, 1 / _SMOOTHING, np.float32), "same")
    spans = []
    for begin, end in zip(starts, [*starts[1:], len(sound)], strict=True):
        heard = np.flatnonzero(loudness[begin:end] > _QUIET * loudness.max())
        if not len(heard):
            return None
        spans.append((begin + int(heard[0]), begin + int(heard[-1]) + 1))
    first, last = spans[0][0], spans[-1][1]
    return Spoken(sound[first:last], tuple((begin - first, end - first) for begin, end in spans))
