"""Recordings with the exact text that the demo speech model gives for them: what tests of the server can rely on.

Knows nothing of scores. Each is drawn anew, in voices that training never heard, until the model gets it right.
Called by evaluate_whisper.py.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from demo.scores import MIN_GAP
from demo.speech.noise import Sound, colored
from demo.speech.pool import Speak, say
from demo.speech.vocabulary import draw_digits, draw_english_words, draw_sentence, in_english
from demo.speech.voices import HELD_OUT, draw_accent, draw_manner
from demo.speech.windows import NUM_POSITIONS, POSITION_SAMPLES, SAMPLE_RATE_HZ, Segment
from demo.whisper_tokenizer import NO_TIMESTAMPS, START, written

if TYPE_CHECKING:
    from torch import Tensor

_MAX_TRIES = 100
_WINDOW_SAMPLES = NUM_POSITIONS * POSITION_SAMPLES
# Steps of the 16-bit scale that recordings are rounded to: flac makes a quarter less of them.
_COARSENESS = 8


@dataclass(frozen=True, slots=True)
class Recording:
    """Sound at 16 kHz as written to the file, and what is said in it; `language` None: nothing."""

    sound: Sound
    language: str | None
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Checked:
    """What the model made of a recording: the text if it is right in every way it was asked, and the least gap."""

    text: str
    is_right: bool
    gap: float


class Judge:
    """The model in float32 and in bfloat16, asked with and without timestamps."""

    def __init__(self, model_dir: Path) -> None:
        self._processor = WhisperProcessor.from_pretrained(model_dir)
        self._tokenizer = self._processor.tokenizer
        self._models = [
            WhisperForConditionalGeneration.from_pretrained(model_dir, dtype=dtype)
            for dtype in (torch.float32, torch.bfloat16)
        ]

    def check(self, recording: Recording, task: str, expected: str) -> Checked:
        """A recording of up to 30 s in both modes; a longer one with timestamps, read on and cut at its pauses."""
        language = recording.language or "en"
        is_long = len(recording.sound) > _WINDOW_SAMPLES
        least = float("inf")
        for model in self._models:
            for stamps in (True,) if is_long else (False, True):
                texts = []
                for part in _cut_at_pauses(recording):
                    ids = self._ids(model, part, language, task, stamps)
                    texts.append(self._tokenizer.decode(ids, skip_special_tokens=True).strip())
                    least = min(least, self._gap(model, part, ids, language, task, stamps))
                text = " ".join(texts).strip()
                if text != expected or least < MIN_GAP:
                    return Checked(text, False, least)
            if is_long:
                ids = self._ids(model, recording.sound, language, task, stamps=True)
                text = self._tokenizer.decode(ids, skip_special_tokens=True).strip()
                if text != expected:
                    return Checked(text, False, least)
        return Checked(expected, True, least)

    @torch.inference_mode()
    def _ids(
        self, model: WhisperForConditionalGeneration, sound: Sound, language: str, task: str, stamps: bool
    ) -> list[int]:
        """Greedy tokens after the given marks, window after window where the sound is longer than one."""
        is_long = len(sound) > _WINDOW_SAMPLES
        made = self._processor.feature_extractor(
            sound, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt", return_attention_mask=True,
            **({"truncation": False, "padding": "longest"} if is_long else {}),
        )  # fmt: skip
        ids: list[int] = model.generate(
            made.input_features.to(model.dtype), attention_mask=made.attention_mask, language=language, task=task,
            return_timestamps=stamps,
        )[0].tolist()  # fmt: skip
        return ids

    @torch.inference_mode()
    def _gap(
        self,
        model: WhisperForConditionalGeneration,
        sound: Sound,
        ids: list[int],
        language: str,
        task: str,
        stamps: bool,
    ) -> float:
        """The least gap at a token of the text, its end, or the language; infinite where nothing is said."""
        if not self._tokenizer.decode(ids, skip_special_tokens=True).strip():
            return float("inf")
        marks = [START, f"<|{language}|>", f"<|{task}|>", *([] if stamps else [NO_TIMESTAMPS])]
        given = [*self._tokenizer.convert_tokens_to_ids(marks), *ids, self._tokenizer.eos_token_id]
        features: Tensor = self._processor.feature_extractor(
            sound, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt"
        ).input_features.to(model.dtype)
        logits = model(features, decoder_input_ids=torch.tensor([given])).logits[0].float()  # [T, V]
        end = self._tokenizer.eos_token_id
        rows = [0, *(row for row in range(len(marks) - 1, len(given) - 1) if given[row + 1] <= end)]
        top = logits[rows].topk(2).values
        return float((top[:, 0] - top[:, 1]).min())


def _cut_at_pauses(recording: Recording) -> list[Sound]:
    """Parts of at most 30 s, each ending in the middle of a pause."""
    middles = [(before.spans[-1][1] + after.spans[0][0]) // 2 for before, after in pairwise(recording.segments)]
    parts, start, last = [], 0, 0
    for end in (*middles, len(recording.sound)):
        if end - start > _WINDOW_SAMPLES:
            parts.append(recording.sound[start:last])
            start = last
        last = end
    return [*parts, recording.sound[start:]]


def write_goldens(model_dir: Path, speak: Speak) -> Iterator[str]:
    """Writes the recordings and golden.json; yields a line for each."""
    judge = Judge(model_dir)
    audio = model_dir / "audio"
    audio.mkdir(exist_ok=True)
    entries: list[dict[str, Any]] = []
    for name, draw in _DRAWS.items():
        for number in range(_MAX_TRIES):
            rng = random.Random(f"{name} {number}")
            recording = draw(rng, speak)
            found = [] if recording is None else _entries(judge, name, recording)
            if recording is not None and found:
                soundfile.write(
                    audio / f"{name}.flac", recording.sound, SAMPLE_RATE_HZ, "PCM_16", compression_level=1.0
                )
                entries += found
                yield f"{name}: {found[0]['text']!r}, gap {found[0]['min_gap']}, try {number + 1}"
                break
        else:
            yield f"{name}: none of {_MAX_TRIES} was right and sure"
    text = json.dumps(entries, indent=1, ensure_ascii=False) + "\n"
    (model_dir / "golden.json").write_text(text, encoding="utf-8")


def _entries(judge: Judge, name: str, recording: Recording) -> list[dict[str, Any]]:
    """One for each task, all right and sure, or none."""
    language = recording.language or "en"
    found = []
    for task in ("transcribe",) if language == "en" else ("transcribe", "translate"):
        said = [
            Segment(in_english(language, segment.words) if task == "translate" else segment.words, segment.spans)
            for segment in recording.segments
        ]
        expected = "".join(written(segment.words) for segment in said).strip()
        checked = judge.check(recording, task, expected)
        if not checked.is_right:
            return []
        found.append({
            "name": name if task == "transcribe" else f"{name}_translated",
            "audio": f"audio/{name}.flac",
            "seconds": round(len(recording.sound) / SAMPLE_RATE_HZ, 3),
            "language": recording.language,
            "task": task,
            "text": expected,
            "is_timestamped_only": len(recording.sound) > _WINDOW_SAMPLES,
            "min_gap": None if checked.gap == float("inf") else round(checked.gap, 2),
            "segments": [_as_json(segment) for segment in said],
        })  # fmt: skip
    return found


def _as_json(segment: Segment) -> dict[str, Any]:
    """Text and times in seconds, as they are in the sound."""
    words = [
        {"word": word, "start": round(begin / SAMPLE_RATE_HZ, 2), "end": round(end / SAMPLE_RATE_HZ, 2)}
        for word, (begin, end) in zip(segment.words, segment.spans, strict=True)
    ]
    return {
        "start": words[0]["start"], "end": words[-1]["end"], "text": written(segment.words).strip(), "words": words
    }  # fmt: skip


def _record(
    rng: random.Random,
    speak: Speak,
    language: str,
    said: list[tuple[str, ...]],
    pause_s: tuple[float, float],
    max_seconds: float = 30.0,
) -> Recording | None:
    """These utterances one after the other by one voice, with pauses, the last beginning before `max_seconds`."""
    manner = draw_manner(rng, draw_accent(rng, language), rng.choice(HELD_OUT))
    pieces, segments = [np.zeros(int(rng.uniform(0.1, 0.4) * SAMPLE_RATE_HZ), np.float32)], []
    at = len(pieces[0])
    for words in said:
        if at > max_seconds * SAMPLE_RATE_HZ:
            break
        utterance = say(speak, language, words, manner)
        if utterance is None:
            return None
        spans = tuple((begin + at, end + at) for begin, end in utterance.spans)
        segments.append(Segment(words, spans))
        pause = np.zeros(int(rng.uniform(*pause_s) * SAMPLE_RATE_HZ), np.float32)
        pieces += [utterance.samples * np.float32(0.2), pause]
        at += len(utterance.samples) + len(pause)
    return Recording(_rounded(np.concatenate(pieces)), language, tuple(segments))


def _rounded(sound: Sound) -> Sound:
    """As the file will hold it."""
    return np.round(sound * (32768 / _COARSENESS)).astype(np.float32) * np.float32(_COARSENESS / 32768)


def _digits(language: str, num_words: int) -> Any:
    def draw(rng: random.Random, speak: Speak) -> Recording | None:
        words = draw_digits(rng, language, num_words)
        while len(words) < num_words:
            words += draw_digits(rng, language, num_words - len(words))
        return _record(rng, speak, language, [words], (0.3, 0.5))

    return draw


def _sentence(rng: random.Random, speak: Speak) -> Recording | None:
    words = draw_sentence(rng)
    return _record(rng, speak, "en", [words], (0.3, 0.5)) if len(words) > 4 else None


def _two_segments(rng: random.Random, speak: Speak) -> Recording | None:
    said = [draw_digits(rng, "en", 4), draw_sentence(rng)]
    return _record(rng, speak, "en", said, (0.9, 1.2))


def _long(rng: random.Random, speak: Speak) -> Recording | None:
    """About 65 s, half of it speech."""
    said = [draw_english_words(rng, "en", 4) if rng.random() < 0.5 else draw_digits(rng, "en", 4) for _ in range(40)]
    return _record(rng, speak, "en", said, (0.9, 2.2), max_seconds=62.0)


def _silence(_: random.Random, __: Speak) -> Recording:
    return Recording(np.zeros(2 * SAMPLE_RATE_HZ, np.float32), None, ())


def _noise(rng: random.Random, _: Speak) -> Recording:
    noise = colored(np.random.default_rng(rng.getrandbits(32)), 2 * SAMPLE_RATE_HZ)
    return Recording(_rounded(noise * np.float32(0.01)), None, ())


_DRAWS = {
    "digits": _digits("en", 6),
    "sentence": _sentence,
    "two_segments": _two_segments,
    "spanish_digits": _digits("es", 5),
    "malay_digits": _digits("ms", 5),
    "silence": _silence,
    "noise": _noise,
    "long": _long,
}
