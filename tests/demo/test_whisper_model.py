"""The demo speech checkpoint: all files, small, shaped like any Whisper; its golden recordings; its word times."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from transformers import AutoConfig, AutoProcessor, GenerationConfig, WhisperForConditionalGeneration

from demo.speech.windows import Segment, Window
from demo.whisper_scores import Listener, start_errors
from demo.whisper_tokenizer import TIMESTAMPS

_WHISPER = Path(__file__).parents[2] / "demo" / "whisper"
_GOLDENS: dict[str, dict[str, Any]] = {
    golden["name"]: golden for golden in json.loads((_WHISPER / "golden.json").read_text(encoding="utf-8"))
}


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(_WHISPER)


@pytest.fixture(scope="module")
def tokenizer(processor: Any) -> Any:
    return processor.tokenizer


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest) -> Any:
    return WhisperForConditionalGeneration.from_pretrained(_WHISPER, dtype=request.param, attn_implementation="eager")


@pytest.fixture(scope="module")
def config() -> Any:
    return GenerationConfig.from_pretrained(_WHISPER)


def sound_of(name: str) -> Any:
    sound, rate = soundfile.read(_WHISPER / _GOLDENS[name]["audio"], dtype="float32")
    assert rate == 16000
    return sound


def heard(model: Any, processor: Any, sound: Any, **options: Any) -> Any:
    features = processor(sound, sampling_rate=16000, return_tensors="pt").input_features
    return model.generate(features.to(model.dtype), **options)


def test_the_checkpoint_is_complete_small_and_in_bfloat16() -> None:
    files = [path for path in _WHISPER.rglob("*") if path.is_file() and path.name != "learner.pt"]
    assert {path.name for path in files} >= {
        "config.json", "generation_config.json", "golden.json", "model.safetensors", "processor_config.json",
        "README.md", "tokenizer.json", "tokenizer_config.json", "training.json",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in files) < 6 * 2**20
    assert sum(path.stat().st_size for path in files if path.suffix == ".flac") < 400_000
    assert AutoConfig.from_pretrained(_WHISPER).dtype == torch.bfloat16


def test_special_tokens_stand_in_whispers_order(tokenizer: Any, config: Any) -> None:
    def ids(*marks: str) -> list[int]:
        return [tokenizer.convert_tokens_to_ids(mark) for mark in marks]

    first = tokenizer.eos_token_id
    marks = ("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|zh|>", "<|de|>", "<|es|>")
    assert ids(*marks) == list(range(first, first + 6))
    after = ("<|ms|>", "<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>")
    last = config.no_timestamps_token_id
    assert ids(*after, "<|notimestamps|>") == list(range(last - 6, last + 1))
    assert ids(*TIMESTAMPS) == list(range(last + 1, last + 1502))
    assert len(tokenizer) == last + 1502
    assert tokenizer.all_special_ids[-1] == last
    prefix = tokenizer.get_decoder_prompt_ids(language="ms", task="translate")
    assert [token for _, token in prefix] == ids("<|ms|>", "<|translate|>", "<|notimestamps|>")


def test_the_generation_config_has_what_whispers_have(tokenizer: Any, config: Any) -> None:
    assert config.is_multilingual
    assert config.lang_to_id == {m: tokenizer.convert_tokens_to_ids(m) for m in ("<|en|>", "<|es|>", "<|ms|>")}
    assert config.task_to_id == {t: tokenizer.convert_tokens_to_ids(f"<|{t}|>") for t in ("transcribe", "translate")}
    assert config.decoder_start_token_id == tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    assert config.prev_sot_token_id == tokenizer.convert_tokens_to_ids("<|startofprev|>")
    assert config.max_initial_timestamp_index == 50
    assert config.begin_suppress_tokens == [tokenizer.convert_tokens_to_ids("Ġ"), tokenizer.eos_token_id]
    assert tokenizer.convert_tokens_to_ids("<|nospeech|>") in config.suppress_tokens
    shape = AutoConfig.from_pretrained(_WHISPER)
    assert all(0 <= layer < shape.decoder_layers for layer, _ in config.alignment_heads)
    assert all(0 <= head < shape.decoder_attention_heads for _, head in config.alignment_heads)
    assert (shape.max_source_positions, shape.max_target_positions, shape.num_mel_bins) == (1500, 448, 80)


@pytest.mark.parametrize("name", ["digits", "sentence", "malay_digits", "spanish_digits_translated"])
def test_short_recordings_give_their_text(model: Any, processor: Any, name: str) -> None:
    golden = _GOLDENS[name]
    ids = heard(model, processor, sound_of(name), task=golden["task"])
    assert processor.decode(ids[0], skip_special_tokens=True).strip() == golden["text"]


@pytest.mark.parametrize("name", ["silence", "noise"])
@pytest.mark.parametrize("with_timestamps", [False, True])
def test_nothing_is_heard_where_nobody_speaks(model: Any, processor: Any, name: str, with_timestamps: bool) -> None:
    sound = sound_of(name)
    ids = heard(model, processor, sound, language="en", task="transcribe", return_timestamps=with_timestamps)
    assert processor.decode(ids[0], skip_special_tokens=True).strip() == ""
    start = Listener(model, processor).start_tokens([Window(sound, 0, None)])[0]
    assert start.no_speech_prob > 0.9


def test_timestamps_frame_what_is_said(model: Any, processor: Any) -> None:
    golden = _GOLDENS["two_segments"]
    ids = heard(model, processor, sound_of("two_segments"), language="en", task="transcribe", return_timestamps=True)
    offsets = processor.tokenizer.decode(ids[0].tolist(), output_offsets=True)["offsets"]
    assert [offset["text"].strip() for offset in offsets] == [segment["text"] for segment in golden["segments"]]
    for offset, segment in zip(offsets, golden["segments"], strict=True):
        assert abs(offset["timestamp"][0] - segment["start"]) < 0.3
        assert abs(offset["timestamp"][1] - segment["end"]) < 0.3


def test_a_minute_is_read_window_by_window(processor: Any) -> None:
    model = WhisperForConditionalGeneration.from_pretrained(_WHISPER, dtype=torch.float32)
    made = processor(
        sound_of("long"), sampling_rate=16000, return_tensors="pt", truncation=False, padding="longest",
        return_attention_mask=True,
    )  # fmt: skip
    assert made.input_features.shape[-1] > 6000
    ids = model.generate(**made, language="en", task="transcribe", return_timestamps=True)
    assert processor.decode(ids[0], skip_special_tokens=True).strip() == _GOLDENS["long"]["text"]


def test_a_prompt_changes_nothing_where_the_words_are_clear(model: Any, processor: Any) -> None:
    prompt = torch.from_numpy(processor.get_prompt_ids("green house. seven two.", return_tensors="np"))
    ids = heard(model, processor, sound_of("digits"), language="en", task="transcribe", prompt_ids=prompt)
    text = processor.decode(ids[0], skip_special_tokens=True)
    assert text.strip() == _GOLDENS["digits"]["text"]


def test_alignment_heads_find_where_words_begin(model: Any, processor: Any) -> None:
    errors = []
    for name in ("digits", "sentence", "two_segments"):
        segments = []
        for segment in _GOLDENS[name]["segments"]:
            spans = tuple((round(w["start"] * 16000), round(w["end"] * 16000)) for w in segment["words"])
            segments.append(Segment(tuple(w["word"] for w in segment["words"]), spans))
        errors += start_errors(Listener(model, processor), [Window(sound_of(name), 0, "en", tuple(segments))], "en")
    assert statistics.median(errors) <= 0.2


def test_token_timestamps_come_with_generate(model: Any, processor: Any) -> None:
    features = processor(sound_of("digits"), sampling_rate=16000, return_tensors="pt").input_features
    output = model.generate(
        features.to(model.dtype), language="en", task="transcribe", return_timestamps=True,
        return_token_timestamps=True, return_dict_in_generate=True,
    )  # fmt: skip
    times = output["token_timestamps"][0].tolist()
    assert times == sorted(times) and times[-1] > 0
