"""The bound on characters per token: never a false refusal."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.text.vocabularies import KINDS, byte_level, sentencepiece
from text.length import max_chars_per_token
from text.prompt import PromptEncoder

BOUNDED = ["byte-level", "llama-first", "llama-always", "llama-legacy", "composing"]


def composing() -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("ab", "a")])
    return tokenizer


@cache
def tokenizer_of(kind: str) -> Any:
    return composing() if kind == "composing" else KINDS[kind]()


@pytest.mark.parametrize("kind", BOUNDED)
@given(text=st.text(max_size=200) | st.text(alphabet=" \t\nabǘ̈ᾂ가", max_size=200))
@example("ᾂ" * 20)
@example("\u03b1\u0313\u0300\u0345" * 20)
@example("ab" * 50)
def test_no_text_makes_fewer_tokens_than_the_bound_says(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    bound = max_chars_per_token(tokenizer)
    assert bound is not None
    assert len(tokenizer.encode(text, add_special_tokens=False)) * bound >= len(text)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(BOUNDED)))
def test_where_text_may_vanish_or_fuse_nothing_is_claimed(kind: str) -> None:
    assert max_chars_per_token(KINDS[kind]()) is None


def test_a_token_that_takes_the_spaces_beside_it_leaves_no_bound() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", rstrip=True)]})
    assert max_chars_per_token(tokenizer) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda backend: setattr(backend, "normalizer", normalizers.Strip()),
        lambda backend: setattr(backend, "normalizer", normalizers.Replace(Regex(" +"), " ")),
        lambda backend: setattr(backend, "normalizer", normalizers.Replace("a", "")),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.WhitespaceSplit()),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Split(" ", "removed")),
    ],
)
def test_what_drops_text_leaves_no_bound(change: Any) -> None:
    tokenizer = sentencepiece()
    change(tokenizer.backend_tokenizer)
    assert max_chars_per_token(tokenizer) is None


def test_a_vocabulary_that_lacks_bytes_leaves_no_bound() -> None:
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    assert max_chars_per_token(PreTrainedTokenizerFast(tokenizer_object=backend)) is None


def test_text_is_too_long_only_beyond_the_bound() -> None:
    tokenizer = byte_level()
    bound = max_chars_per_token(tokenizer)
    assert bound is not None
    encoder = PromptEncoder(tokenizer, max_model_len=100)
    assert not encoder.too_long(100 * bound)
    assert encoder.too_long(100 * bound + 1)
    assert not PromptEncoder(KINDS["unigram"](), max_model_len=1).too_long(10**9)
