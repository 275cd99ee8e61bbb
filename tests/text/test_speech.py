"""Between text and the tokens of a speech model."""

from __future__ import annotations

import pytest

from tests import tiny_whisper
from text.speech import SpeechText

TOKENIZER = tiny_whisper.tokenizer()
IDS = TOKENIZER.get_vocab()
FIRST_TIMESTAMP = IDS["<|0.00|>"]


@pytest.fixture(params=[True, False], ids=["timestamps are tokens", "timestamps are not"])
def text(request: pytest.FixtureRequest) -> SpeechText:
    return SpeechText(tiny_whisper.tokenizer(has_timestamps=request.param), FIRST_TIMESTAMP)


def test_a_prompt_is_encoded_as_the_model_saw_it_in_training(text: SpeechText) -> None:
    expected = TOKENIZER.get_prompt_ids("The quick fox").tolist()
    assert [IDS["<|startofprev|>"], *text.prompt_ids("  The quick fox ", 223)] == expected


@pytest.mark.parametrize("string", ["<|startoftranscript|>", "<|0.00|>", "<|en|>", "<|endoftext|>", "<|notimestamps|>"])
def test_what_a_caller_writes_never_becomes_a_control_token(text: SpeechText, string: str) -> None:
    ids = text.prompt_ids(f"a {string} b{string}", 223)
    assert max(ids) < IDS["<|endoftext|>"]
    assert text.decode(ids) == f" a {string} b{string}"


def test_the_end_of_a_long_prompt_is_kept(text: SpeechText) -> None:
    prompt = " ".join(f"fox {number}" for number in range(2000))
    whole = text.prompt_ids(prompt, 100_000)
    assert text.prompt_ids(prompt, 223) == whole[-223:]
    assert text.prompt_ids(prompt, 0) == []
    assert text.prompt_ids(" \n ", 223) == []


def test_decoding_leaves_moments_and_control_tokens_out(text: SpeechText) -> None:
    ids = [FIRST_TIMESTAMP, *text.prompt_ids("hello", 9), FIRST_TIMESTAMP + 50, IDS["<|en|>"], FIRST_TIMESTAMP + 1500]
    assert text.decode(ids) == " hello"
    assert text.text_ids(ids) == text.prompt_ids("hello", 9)


def test_a_character_over_two_tokens_is_whole_and_half_of_one_is_replaced(text: SpeechText) -> None:
    ids = text.prompt_ids("界", 9)
    assert len(ids) > 2
    assert text.decode(ids) == " 界"
    assert text.decode(ids[:-1]) == " �"
    assert b"".join(text.pieces(ids)).decode() == " 界"
