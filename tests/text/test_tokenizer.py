"""Loading a tokenizer as the options name it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.text.vocabularies import byt5, byte_level
from text.errors import TokenizerError
from text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def fast_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fast")
    byte_level().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def python_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("python")
    byt5().save_pretrained(path)
    return path


def test_a_directory_is_loaded_with_its_template(fast_dir: Path) -> None:
    tokenizer = load_tokenizer(str(fast_dir))
    assert tokenizer.is_fast
    assert tokenizer.encode("Hello world") == byte_level().encode("Hello world")
    assert tokenizer.chat_template == byte_level().chat_template


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "transformers.PreTrainedTokenizerFast"])
def test_a_class_is_found_by_name_or_dotted_path(fast_dir: Path, name: str) -> None:
    assert load_tokenizer(str(fast_dir), tokenizer_type=name).is_fast


def test_a_tokenizer_in_python_is_loaded(python_dir: Path) -> None:
    tokenizer = load_tokenizer(str(python_dir), tokenizer_type="ByT5Tokenizer", use_fast=False)
    assert not tokenizer.is_fast
    assert tokenizer.decode(tokenizer.encode("é", add_special_tokens=False)) == "é"


def test_a_python_implementation_that_does_not_exist_is_refused(fast_dir: Path) -> None:
    with pytest.raises(TokenizerError, match="--tokenizer-use-fast False"):
        load_tokenizer(str(fast_dir), use_fast=False)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("NoSuchTokenizer", "transformers has no such class"),
        ("no_such_module.Tokenizer", "module no_such_module has no such class"),
        ("pathlib.Path", "is not a class with from_pretrained"),
    ],
)
def test_a_class_that_does_not_exist_is_named(fast_dir: Path, name: str, rule: str) -> None:
    with pytest.raises(TokenizerError, match=rule) as caught:
        load_tokenizer(str(fast_dir), tokenizer_type=name)
    assert name in str(caught.value)


def test_a_directory_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=str(tmp_path)) as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)
