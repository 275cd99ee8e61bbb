"""What is read from Whisper checkpoints of every age."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.speech_model import NotASpeechModel, SpeechModel, speech_model_of
from tests import tiny_whisper
from tests.text import vocabularies

TOKENIZER = tiny_whisper.tokenizer()
IDS = TOKENIZER.get_vocab()


def read(tokenizer: Any = TOKENIZER, *, values: dict[str, Any] | None = None, **changes: Any) -> SpeechModel:
    config = tiny_whisper.config(**(values or {}))
    return speech_model_of(config, tiny_whisper.generation_config(**changes), tokenizer)


def test_a_checkpoint_of_today_says_it_all() -> None:
    model = read()
    assert (model.start_id, model.end_id) == (IDS["<|startoftranscript|>"], IDS["<|endoftext|>"])
    assert (model.no_timestamps_id, model.first_timestamp_id) == (IDS["<|notimestamps|>"], IDS["<|0.00|>"])
    assert (model.previous_id, model.no_speech_id) == (IDS["<|startofprev|>"], IDS["<|nospeech|>"])
    assert model.language_ids == {code: IDS[f"<|{code}|>"] for code in tiny_whisper.LANGUAGES}
    assert model.task_ids == {"transcribe": IDS["<|transcribe|>"], "translate": IDS["<|translate|>"]}
    assert model.is_multilingual and model.has_alignment_heads and model.default_language is None
    assert (model.max_initial_timestamp_index, model.max_prompt_tokens) == (50, 223)
    assert (model.num_positions, model.num_mels, model.samples_per_window) == (1500, 8, 480_000)


@pytest.mark.parametrize("no_speech", ["<|nospeech|>", "<|nocaptions|>"])
@pytest.mark.parametrize("has_timestamps", [True, False])
def test_what_a_fine_tune_leaves_out_is_found_in_the_tokenizer(no_speech: str, has_timestamps: bool) -> None:
    tokenizer = tiny_whisper.tokenizer(no_speech=no_speech, has_timestamps=has_timestamps)
    nothing = dict.fromkeys((
        "no_timestamps_token_id", "prev_sot_token_id", "is_multilingual", "lang_to_id", "task_to_id",
        "suppress_tokens", "begin_suppress_tokens", "max_initial_timestamp_index", "alignment_heads",
        "decoder_start_token_id", "eos_token_id",
    ))  # fmt: skip
    model, whole = read(tokenizer, **nothing), read()
    for name in ("start_id", "end_id", "no_timestamps_id", "first_timestamp_id", "previous_id", "no_speech_id"):
        assert getattr(model, name) == getattr(whole, name), name
    assert (model.language_ids, model.task_ids) == (whole.language_ids, whole.task_ids)
    assert model.suppressed_ids == model.suppressed_first_ids == ()
    assert model.max_initial_timestamp_index is None and not model.has_alignment_heads


def test_a_tokenizer_without_a_token_for_silence_has_it_where_generate_looks() -> None:
    assert read(tiny_whisper.tokenizer(no_speech="<|other|>")).no_speech_id == IDS["<|notimestamps|>"] - 1


def test_models_of_english_alone_have_no_languages_though_their_tokenizers_do() -> None:
    model = read(is_multilingual=False)
    assert not model.is_multilingual and model.language_ids == model.task_ids == {}
    # The originals' vocabulary is one token smaller, and early checkpoints say nothing else.
    old = read(values={"vocab_size": 51_864}, is_multilingual=None, lang_to_id=None, task_to_id=None)
    assert not old.is_multilingual
    assert read(values={"vocab_size": 51_865}, is_multilingual=None, lang_to_id=None, task_to_id=None).is_multilingual


def test_several_end_tokens_begin_with_the_usual_one() -> None:
    assert read(eos_token_id=[IDS["<|endoftext|>"], 5]).end_id == IDS["<|endoftext|>"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"language": "malay"}, "ms"),
        ({"language": "ms"}, "ms"),
        ({"language": "<|ms|>"}, "ms"),
        ({"language": "klingon"}, None),
        ({"forced_decoder_ids": [[1, IDS["<|de|>"]], [2, IDS["<|transcribe|>"]]]}, "de"),
        ({"forced_decoder_ids": [[1, None], [2, IDS["<|transcribe|>"]]]}, None),
        ({"forced_decoder_ids": [[2, IDS["<|de|>"]]]}, None),
    ],
)
def test_a_fine_tune_of_one_language_speaks_it_unless_told_otherwise(changes: Any, expected: str | None) -> None:
    assert read(**changes).default_language == expected


def test_languages_are_known_by_code_and_name() -> None:
    model = read()
    assert [model.language_code(name) for name in ("de", "DE", " German ", "castilian", "fr", "french", "")] == [
        "de", "de", "de", "es", None, None, None,
    ]  # fmt: skip


def test_another_models_tokenizer_is_told_apart() -> None:
    with pytest.raises(NotASpeechModel, match=r"no token <\|notimestamps\|>"):
        read(vocabularies.byte_level(), no_timestamps_token_id=None, decoder_start_token_id=None)
