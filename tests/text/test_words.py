"""Words of a transcript's tokens."""

from __future__ import annotations

import random

import pytest
from transformers.models.whisper.tokenization_whisper import _combine_tokens_into_words

from tests import tiny_whisper
from text.token_bytes import token_bytes_of
from text.words import ends_sentence, split_words


def pieces_of(text: str) -> list[bytes]:
    """Tokens of one to three bytes, cut anywhere."""
    data, pieces = text.encode(), []
    while data:
        length = random.randint(1, 3)
        pieces.append(data[:length])
        data = data[length:]
    return pieces


def words(*pieces: str, is_spaced: bool = True) -> list[str]:
    return [span.text for span in split_words([piece.encode() for piece in pieces], is_spaced=is_spaced)]


def test_words_begin_at_spaces() -> None:
    assert words(" he", "llo", " wor", "ld") == [" hello", " world"]


def test_punctuation_is_part_of_the_word_it_stands_at() -> None:
    assert words(" Well", ",", " “", "he", "”", " said", " (", "twice", ")", "...") == [
        " Well,", " “he”", " said", " (twice)...",
    ]  # fmt: skip
    assert words(" $", "3", ".", "50", " well", "-", "known", " one", " -", " two", "\nthree") == [
        " $3.50", " well-known", " one", " -", " two", "\nthree",
    ]  # fmt: skip


def test_punctuation_is_not_heard() -> None:
    spans = split_words([b" (", b"he", b"llo", b")", b"...", b" 3", b".", b"5", b" -", b" ?!"])
    heard = [(span.text, span.sound_start, span.sound_stop) for span in spans]
    assert heard == [(" (hello)...", 1, 3), (" 3.5", 5, 8), (" -", 8, 9), (" ?!", 9, 10)]


def test_languages_without_spaces_have_a_word_for_each_whole_character() -> None:
    text = "你好，世界"
    spans = split_words([bytes([byte]) for byte in text.encode()], is_spaced=False)
    assert [span.text for span in spans] == ["你", "好，", "世", "界"]
    assert [(span.start, span.stop) for span in spans] == [(0, 3), (3, 9), (9, 12), (12, 15)]


def test_without_spaces_marks_join_the_word_they_open_or_close() -> None:
    assert words(*"「你好」、", " ", *"世（界）", is_spaced=False) == ["「你", "好」、", " 世", "（界）"]
    spans = split_words([piece.encode() for piece in "「你。"], is_spaced=False)
    assert [(span.sound_start, span.sound_stop) for span in spans] == [(1, 2)]


def test_no_tokens_make_no_words_and_tokens_without_text_no_words_of_their_own() -> None:
    assert words() == []
    assert words(" a", "", " b") == [" a", " b"]


def test_bytes_that_are_no_text_are_kept_as_replacement_characters() -> None:
    spans = split_words([b" a", b"\xe4", b"\xbd"])
    assert "".join(span.text for span in spans) == " a�"
    assert spans[-1].stop == 3


@pytest.mark.parametrize("is_spaced", [True, False])
def test_every_token_is_in_one_word_and_the_words_are_the_text(is_spaced: bool) -> None:
    random.seed(5)
    alphabet = [" ", "a", "b", "é", "你", "，", ".", '"', "(", ")", "😀", "-", "!", "\n"]
    for _ in range(300):
        text = "".join(random.choices(alphabet, k=random.randint(0, 20)))
        pieces = pieces_of(text)
        spans = split_words(pieces, is_spaced=is_spaced)
        assert "".join(span.text for span in spans) == text
        assert [index for span in spans for index in range(span.start, span.stop)] == list(range(len(pieces)))
        assert all(span.start <= span.sound_start < span.sound_stop <= span.stop for span in spans)


@pytest.mark.parametrize("is_spaced", [True, False])
def test_words_are_those_of_transformers_where_there_is_no_punctuation(is_spaced: bool) -> None:
    tokenizer = tiny_whisper.tokenizer()
    random.seed(6)
    vocabulary = [" hello", " fox", "jumps", "Grüße", " 你", "好", "界", "😀", " é"]
    raw = token_bytes_of(tokenizer).raw
    language = "english" if is_spaced else "chinese"
    for _ in range(200):
        text = "".join(random.choices(vocabulary, k=random.randint(1, 12)))
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        expected, _, indices = _combine_tokens_into_words(tokenizer, ids, language)
        spans = split_words([raw(i) for i in ids], is_spaced=is_spaced)
        assert [span.text for span in spans] == expected, text
        assert [list(range(span.start, span.stop)) for span in spans] == indices


def test_sentences_end_with_their_marks_closing_quotes_or_not() -> None:
    assert [ends_sentence(word) for word in (" a.", " a.”", ' (a?)"', "。", " a", " a,", "")] == [
        True, True, True, True, False, False, False,
    ]  # fmt: skip
