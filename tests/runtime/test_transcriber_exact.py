"""What the transcriber writes is what generate() writes: prompts, rules, languages, segments, silence, long audio."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from runtime import fallback
from runtime.speech_audio import Window
from runtime.speech_model import SpeechModel, speech_model_of
from runtime.transcriber import Transcriber
from runtime.transcription import (
    Recording,
    Segment,
    SequentialChunking,
    TranscriptionEvent,
    TranscriptionRequest,
    VadChunking,
)
from tests import tiny_whisper
from tests.runtime.whisper_sequences import WhisperSequences
from text.speech import SpeechText

TOKENIZER = tiny_whisper.tokenizer()
IDS = TOKENIZER.get_vocab()
WINDOW_FRAMES = 2 * tiny_whisper.SHORT_SIZES["max_source_positions"]


class GlobalFeatures:
    """A recording as generate() sees it: one spectrogram, of which windows are cut out and filled up with zeros.

    A sample is its own number, so that a window's samples tell where it is.
    """

    def __init__(self, features: torch.Tensor) -> None:
        self._features = features

    def decode(self, data: bytes) -> Any:
        return np.arange(self._features.shape[-1] * 160, dtype=np.float32)

    def windows(self, samples: Any, chunking: VadChunking) -> list[Window]:
        return [Window(0, len(samples))]

    def features(self, samples: Any) -> Any:
        start = int(samples[0]) // 160
        cut = self._features[:, start : start + len(samples) // 160]
        return torch.nn.functional.pad(cut, (0, WINDOW_FRAMES - cut.shape[-1])).numpy()

    def token_times(self, alignment: Any, *, first_row: int, num_tokens: int, num_positions: int) -> list[float]:
        raise NotImplementedError


def sound(seed: int, num_frames: int) -> torch.Tensor:
    """Something that changes from time to time."""
    generator = torch.Generator().manual_seed(seed)
    slow = torch.randn(8, num_frames // 20 + 1, generator=generator).repeat_interleave(20, -1)[:, :num_frames]
    return slow + 0.3 * torch.randn(8, num_frames, generator=generator)


@pytest.fixture(autouse=True)
def only_greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model is sure of nothing: it would be sampled from."""
    monkeypatch.setattr(fallback, "LADDER", (0.0,))
    monkeypatch.setattr(fallback, "MAX_NO_SPEECH_PROB", 1.0)


@pytest.fixture(scope="module")
def whisper() -> Any:
    return tiny_whisper.model(1, **tiny_whisper.SHORT_SIZES)


def transcribe(whisper: Any, features: torch.Tensor, model: SpeechModel | None = None, **fields: Any) -> Any:
    """Events, and the sequences that were run."""
    sequences = WhisperSequences(whisper)
    model = model or speech_model_of(whisper.config, whisper.generation_config, TOKENIZER)
    text = SpeechText(TOKENIZER, model.first_timestamp_id)
    one = Transcriber(sequences.generate, model, text, GlobalFeatures(features), num_threads=1, max_windows=4)

    async def collect() -> list[TranscriptionEvent]:
        return [event async for event in one.transcribe(TranscriptionRequest(b"", **fields))]

    try:
        return asyncio.run(collect()), sequences
    finally:
        one.close()


def expected(whisper: Any, features: torch.Tensor, **options: Any) -> list[tuple[list[int], float, float]]:
    """Segments of generate(): tokens, start, end."""
    found = whisper.generate(features[None], return_segments=True, **options)["segments"][0]
    return [(s["tokens"].tolist(), float(s["start"]), float(s["end"])) for s in found]


def segments(events: list[TranscriptionEvent]) -> list[tuple[list[int], float, float]]:
    return [(list(e.token_ids), e.start_s, e.end_s) for e in events if isinstance(e, Segment)]


def without_end(tokens: list[int]) -> list[int]:
    """Without the token that ended them."""
    return [token for token in tokens if token != IDS["<|endoftext|>"]]


def close(found: list[Any], wanted: list[Any]) -> bool:
    return [tokens for tokens, *_ in found] == [tokens for tokens, *_ in wanted] and all(
        times == pytest.approx(other, abs=1e-6) for (_, *times), (_, *other) in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("prompt", ["", "the lazy <|en|> fox"])
def test_sequential_windows_of_a_recording_are_those_of_generate(whisper: Any, seed: int, prompt: str) -> None:
    features = sound(seed, 410)
    options: dict[str, Any] = {"language": "de", "task": "translate", "return_timestamps": True}
    if prompt:
        model = speech_model_of(whisper.config, whisper.generation_config, TOKENIZER)
        ids = SpeechText(TOKENIZER, model.first_timestamp_id).prompt_ids(prompt, 31)
        options["prompt_ids"] = torch.tensor([IDS["<|startofprev|>"], *ids])
    wanted = expected(whisper, features, condition_on_prev_tokens=False, **options)
    events, _ = transcribe(
        whisper, features, language="de", task="translate", prompt=prompt, chunking=SequentialChunking()
    )
    assert len(wanted) > 1
    # generate() gives tokens without text too, and times beyond the recording's end.
    wanted = [
        (tokens, min(start, 4.1), min(end, 4.1))
        for tokens, start, end in wanted
        if TOKENIZER.decode(tokens, skip_special_tokens=True).strip()
    ]
    assert close(segments(events), wanted)


@pytest.mark.parametrize("seed", range(3))
def test_one_window_without_timestamps_is_that_of_generate(whisper: Any, seed: int) -> None:
    features = sound(10 + seed, WINDOW_FRAMES)
    tokens = whisper.generate(features[None], language="es", task="transcribe")[0].tolist()
    events, sequences = transcribe(whisper, features, language="es", has_timestamps=False)
    found = [token for tokens, *_ in segments(events) for token in tokens]
    assert found == without_end(tokens)
    assert len(found) > 3
    assert sequences.num_encoded == 1


@pytest.mark.parametrize("seed", range(3))
def test_the_language_is_the_one_generate_hears(whisper: Any, seed: int) -> None:
    features = sound(20 + seed, WINDOW_FRAMES)
    language_id = int(whisper.detect_language(features[None], generation_config=whisper.generation_config)[0])
    events, sequences = transcribe(whisper, features)
    assert isinstance(events[0], Recording)
    assert IDS[f"<|{events[0].language}|>"] == language_id
    assert sequences.num_encoded == 1  # and the window is not encoded again


def test_an_english_model_writes_what_generate_writes(whisper: Any) -> None:
    whisper.generation_config = tiny_whisper.generation_config(is_multilingual=False, lang_to_id=None, task_to_id=None)
    try:
        features = sound(30, WINDOW_FRAMES)
        tokens = whisper.generate(features[None])[0].tolist()
        events, sequences = transcribe(whisper, features, has_timestamps=False)
        assert sequences.requests[0].prompt_token_ids == [IDS["<|startoftranscript|>"], IDS["<|notimestamps|>"]]
        assert [token for found, *_ in segments(events) for token in found] == [
            token for token in tokens if token != IDS["<|endoftext|>"]
        ]
    finally:
        whisper.generation_config = tiny_whisper.generation_config()


def test_confidence_is_what_generate_judges_by(whisper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    features = sound(40, WINDOW_FRAMES)
    judged: list[tuple[float, float]] = []
    original = type(whisper)._need_fallback

    def spy(self: Any, sequence: Any, outputs: Any, index: int, processors: Any, *rest: Any) -> Any:
        detector = processors[0]
        logprob = self._retrieve_avg_logprobs(outputs[index]["scores"], sequence, 0.0)
        judged.append((float(logprob), float(detector.no_speech_prob[index])))
        return original(self, sequence, outputs, index, processors, *rest)

    monkeypatch.setattr(type(whisper), "_need_fallback", spy)
    whisper.generate(
        features[None], language="en", task="transcribe", logprob_threshold=-100.0, no_speech_threshold=1.0,
        compression_ratio_threshold=100.0, temperature=(0.0,),
    )  # fmt: skip
    events, _ = transcribe(whisper, features, language="en", has_timestamps=False)
    found = next(event for event in events if isinstance(event, Segment))
    assert (found.avg_logprob, found.no_speech_prob) == pytest.approx(judged[0], rel=1e-4)
