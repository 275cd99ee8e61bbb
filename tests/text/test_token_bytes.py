"""Tokens as bytes: pieces rejoin into the text."""

from __future__ import annotations

from typing import Any

import pytest

from tests.text.vocabularies import CORPUS, KINDS, byte_level, sentencepiece
from text.token_bytes import TokenBytes, byte_alphabet, token_bytes_of


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [*CORPUS[:3], "one two"])
def test_the_bytes_of_tokens_rejoin_into_their_text(kind: str, text: str) -> None:
    tokenizer: Any = KINDS[kind]()
    pieces = TokenBytes(tokenizer)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    joined = b"".join(pieces.raw(token_id) for token_id in token_ids).decode()
    # The first word's mark of a space stands for nothing: decode() leaves it out.
    assert joined.lstrip() == tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_characters_that_several_tokens_share_rejoin(make: Any) -> None:
    tokenizer = make()
    pieces = TokenBytes(tokenizer)
    token_ids = tokenizer.encode("漢字😀é", add_special_tokens=False)
    assert len(token_ids) > 4
    assert b"".join(map(pieces.raw, token_ids)).decode().strip() == "漢字😀é"


def test_a_byte_token_of_a_sentencepiece_vocabulary_is_that_byte() -> None:
    tokenizer = sentencepiece()
    newline = tokenizer.convert_tokens_to_ids("<0x0A>")
    assert TokenBytes(tokenizer).raw(newline) == b"\n"
    assert TokenBytes(tokenizer).token(newline) == "\n"


def test_a_piece_of_a_character_is_shown_as_its_bytes() -> None:
    tokenizer = byte_level()
    lone = tokenizer.convert_tokens_to_ids("ÿ")
    assert TokenBytes(tokenizer).raw(lone) == b"\xff"
    assert TokenBytes(tokenizer).token(lone) == "bytes:\\xff"


@pytest.mark.parametrize("kind", KINDS)
def test_ids_that_no_token_has_are_empty(kind: str) -> None:
    tokenizer = KINDS[kind]()
    if kind in ("byt5", "words"):
        return  # these give a token for any id
    assert TokenBytes(tokenizer).raw(len(tokenizer) + 5) == b""
    assert TokenBytes(tokenizer).raw(-1) == b""


def test_special_and_added_tokens_are_their_content() -> None:
    tokenizer = byte_level()
    pieces = TokenBytes(tokenizer)
    assert pieces.token(tokenizer.eos_token_id) == "<|im_end|>"
    assert pieces.token(tokenizer.convert_tokens_to_ids("<tool_call>")) == "<tool_call>"
    assert tokenizer.eos_token_id in pieces.special_ids
    assert tokenizer.convert_tokens_to_ids("<tool_call>") not in pieces.special_ids


def test_the_alphabet_of_bytes_is_that_of_the_library() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(byte_alphabet()) == set(ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))
    assert byte_alphabet()["Ġ"] == ord(" ")


def test_one_vocabulary_is_read_once() -> None:
    tokenizer = byte_level()
    assert token_bytes_of(tokenizer) is token_bytes_of(tokenizer)
