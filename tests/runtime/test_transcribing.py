"""From files to text through the real loader, engine and sampler, on a tiny Whisper whose windows are two seconds."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import WhisperFeatureExtractor

from audio.errors import AudioError
from config import Settings
from model_manager import ModelManager
from runtime import fallback
from runtime.transcription import Finished, Recording, Segment, TranscriptionEvent, TranscriptionRequest
from tests import tiny_whisper
from tests.audio.recordings import encode, speech_like
from text.speech import SpeechText

TOKENIZER = tiny_whisper.tokenizer()
IDS = TOKENIZER.get_vocab()
SHORT = speech_like(1.9, seed=3)
LONG = speech_like(9.0, seed=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("whisper")
    return directory, tiny_whisper.write_checkpoint(directory, seed=1)


@asynccontextmanager
async def serving(directory: Path, **options: Any) -> AsyncIterator[ModelManager]:
    fields = {"torch_dtype": "float32", "continuous_batching_microsleep": 0.0, **options}
    manager = ModelManager(Settings(hf_model=str(directory), **fields))
    await manager.start()
    await manager.wait_until_loaded()
    try:
        yield manager
        while manager.stats.num_running:
            await asyncio.sleep(0.005)
    finally:
        await manager.close()


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(120):
            await coroutine

    asyncio.run(bounded())


@pytest.fixture
def only_greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model is sure of nothing: it would be sampled from."""
    monkeypatch.setattr(fallback, "LADDER", (0.0,))
    monkeypatch.setattr(fallback, "MAX_NO_SPEECH_PROB", 1.0)


async def transcribe(manager: ModelManager, samples: Any, **fields: Any) -> list[TranscriptionEvent]:
    request = TranscriptionRequest(encode(samples, "wav", subtype="FLOAT"), **fields)
    return [event async for event in manager.transcribe(request)]


def segments(events: list[TranscriptionEvent]) -> list[Segment]:
    return [event for event in events if isinstance(event, Segment)]


def written(events: list[TranscriptionEvent]) -> list[Any]:
    """All but the probabilities, whose last bits depend on what shares a step."""
    plain = [dataclasses.replace(s, words=None, avg_logprob=0.0, no_speech_prob=0.0) for s in segments(events)]
    return [events[0], *plain, events[-1]]


def tokens(events: list[TranscriptionEvent]) -> list[int]:
    return [token_id for segment in segments(events) for token_id in segment.token_ids]


def text_tokens(events: list[TranscriptionEvent]) -> list[int]:
    return [token_id for token_id in tokens(events) if token_id < IDS["<|endoftext|>"]]


@pytest.mark.usefixtures("only_greedy")
@pytest.mark.parametrize("seed", range(3))
def test_a_file_is_written_down_as_generate_would(checkpoint: tuple[Path, Any], seed: int) -> None:
    directory, model = checkpoint
    samples = speech_like(1.9, seed=seed)
    extractor = WhisperFeatureExtractor.from_pretrained(directory)
    features = extractor(samples, sampling_rate=16_000, return_tensors="pt").input_features
    language_id = int(model.detect_language(features, generation_config=model.generation_config)[0])
    language = next(code for code in tiny_whisper.LANGUAGES if IDS[f"<|{code}|>"] == language_id)
    prompt = SpeechText(TOKENIZER, IDS["<|0.00|>"]).prompt_ids("the lazy fox", 31)

    def expected(**options: Any) -> list[int]:
        """The text of one window; stretches without any are left out of transcripts."""
        found = model.generate(features, force_unique_generate_call=True, **options)[0].tolist()
        start = found.index(IDS["<|startoftranscript|>"])
        return [token_id for token_id in found[start:] if token_id < IDS["<|endoftext|>"]]

    async def scenario() -> None:
        async with serving(directory) as manager:
            heard = await transcribe(manager, samples, has_timestamps=False)
            assert heard[0] == Recording(1.9, language, 1)
            assert text_tokens(heard) == expected(language=language, task="transcribe")
            timed = await transcribe(manager, samples, language="de", task="translate", prompt="the lazy fox")
            assert text_tokens(timed) == expected(
                language="de",
                task="translate",
                return_timestamps=True,
                prompt_ids=torch.tensor([IDS["<|startofprev|>"], *prompt]),
            )
            assert text_tokens(heard) != text_tokens(timed)

    run(scenario())


@pytest.mark.usefixtures("only_greedy")
def test_windows_are_written_alike_alone_and_among_others(checkpoint: tuple[Path, Any]) -> None:
    async def scenario() -> None:
        async with serving(checkpoint[0], continuous_batching_batch_size=3) as manager:
            alone = await transcribe(manager, LONG)
            assert isinstance(alone[0], Recording) and alone[0].num_windows > 4
            again = await asyncio.gather(*(transcribe(manager, LONG) for _ in range(4)), transcribe(manager, SHORT))
            assert [written(events) for events in again[:4]] == [written(alone)] * 4
            assert written(again[4]) == written(await transcribe(manager, SHORT))
            for before, after in zip(segments(alone), segments(alone)[1:], strict=False):
                assert before.start_s <= before.end_s <= after.start_s <= 9.0

    run(scenario())


@pytest.mark.usefixtures("only_greedy")
def test_words_lie_within_their_window_and_make_up_the_text(checkpoint: tuple[Path, Any]) -> None:
    async def scenario() -> None:
        async with serving(checkpoint[0]) as manager:
            plain = await transcribe(manager, LONG, language="en")
            timed = await transcribe(manager, LONG, language="en", has_words=True)
            assert written(timed) == written(plain)
            num_words = 0
            for segment in segments(timed):
                words = segment.words or ()
                assert "".join(word.text for word in words) == segment.text
                times = [time for word in words for time in (word.start_s, word.end_s)]
                assert times == sorted(times)
                assert segment.seek / 100 - 0.01 <= times[0] and times[-1] <= segment.seek / 100 + 2.01
                num_words += len(words)
            assert num_words > 10

    run(scenario())


def test_a_doubtful_window_is_drawn_anew_and_a_seed_repeats_it(
    checkpoint: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fallback, "LADDER", (0.0, 0.4))

    async def scenario() -> None:
        async with serving(checkpoint[0]) as manager:
            first = await transcribe(manager, LONG, language="en", seed=7)
            assert isinstance(first[-1], Finished) and first[-1].num_fallbacks > 0
            assert {segment.temperature for segment in segments(first)} != {0.0}
            assert written(await transcribe(manager, LONG, language="en", seed=7)) == written(first)
            assert tokens(await transcribe(manager, LONG, language="en", seed=8)) != tokens(first)

    run(scenario())


def test_hanging_up_frees_the_engine_and_bad_files_never_reach_it(checkpoint: tuple[Path, Any]) -> None:
    async def scenario() -> None:
        async with serving(checkpoint[0]) as manager:
            with pytest.raises(AudioError):
                async for _ in manager.transcribe(TranscriptionRequest(b"no audio at all")):
                    pass
            assert manager.stats.step_tokens_total == 0
            stream = manager.transcribe(TranscriptionRequest(encode(LONG, "flac"), language="en"))
            assert isinstance(await anext(stream), Recording)
            pending = asyncio.create_task(anext(stream))
            while not manager.stats.num_running:
                await asyncio.sleep(0.001)
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)
            await stream.aclose()
            assert manager.transcriber.num_windows_in_flight == 0
            while manager.stats.num_running:
                await asyncio.sleep(0.005)
            assert not manager._queues

    run(scenario())
