"""Languages by code and by name, as Whisper's own tokenizer calls them."""

from __future__ import annotations

import pytest
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from api.languages import NAMES, code_of, name_of


def test_names_and_codes_are_those_of_the_checkpoints() -> None:
    assert NAMES == LANGUAGES
    for name, code in TO_LANGUAGE_CODE.items():
        assert code_of(name, LANGUAGES) == code
        assert code_of(code, LANGUAGES) == code


@pytest.mark.parametrize("given", ["Haitian Creole", " haitian  CREOLE ", "HT", "haitian"])
def test_case_and_space_do_not_matter(given: str) -> None:
    assert code_of(given, ("ht", "en")) == "ht"


def test_iso_codes_that_whisper_spells_otherwise_are_understood_unless_the_model_knows_them() -> None:
    assert code_of("jv", ("jw",)) == "jw"
    assert code_of("jv", ("jw", "jv")) == "jv"
    assert code_of("nb", ("no",)) == "no"


@pytest.mark.parametrize("given", ["", "xx", "en-US", "klingon", "french"])
def test_what_the_model_does_not_know_has_no_code(given: str) -> None:
    assert code_of(given, ("en", "ms")) is None


def test_names_are_shown_in_english_and_unknown_codes_as_they_are() -> None:
    assert (name_of("ms"), name_of("xx"), name_of(None)) == ("malay", "xx", "")
