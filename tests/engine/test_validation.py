"""Nothing that points outside the prompt or the vocabulary passes; the message names field, value and rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engine.errors import InvalidValue
from engine.sequence import PromptProbe, SamplingParams, Sequence, Source, TimestampRules, TokenRules
from engine.validation import check_rules, check_sequence

TIMES = TimestampRules(first_id=90, end_of_text_id=80, no_timestamps_id=89, max_initial_index=50)
RULES = TokenRules((0, 99), (0, 99), (0, 99), TIMES)


def _sequence(params: SamplingParams, source: Source | None = None) -> Sequence:
    return Sequence(0, [1, 2, 3], params, 0.0, source=source)


def test_what_lies_within_bounds_passes() -> None:
    check_rules(RULES, 100)
    check_rules(TokenRules(), 1)
    check_rules(replace(RULES, timestamps=replace(TIMES, max_initial_index=None)), 100)
    for position in (0, 2):
        check_sequence(_sequence(SamplingParams(1, probe=PromptProbe(position, (0, 99)), token_rules=RULES)), 100)
    check_sequence(_sequence(SamplingParams(0, is_aligning=True), Source(b"", 5)), 100)


@pytest.mark.parametrize("token_id", [-1, 100])
@pytest.mark.parametrize("field", ["suppressed", "suppressed_first", "allowed"])
def test_ids_of_rules_are_in_the_vocabulary(field: str, token_id: int) -> None:
    bad: dict[str, Any] = {field: (5, token_id)}
    with pytest.raises(InvalidValue, match=rf"token_rules.{field}: token id {token_id} is outside .* 100") as caught:
        check_sequence(_sequence(SamplingParams(1, token_rules=replace(RULES, **bad))), 100)
    assert caught.value.param == "token_rules"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_id": 100}, "token id 100 is outside the vocabulary of 100"),
        ({"no_timestamps_id": -1}, "token id -1 is outside the vocabulary of 100"),
        ({"end_of_text_id": -5}, "token id -5 is outside the vocabulary of 100"),
        ({"end_of_text_id": 90}, "end_of_text_id 90 must be below first_id 90"),
        ({"max_initial_index": -1}, "max_initial_index -1 must be at least 0"),
    ],
)
def test_timestamps_lie_in_the_vocabulary_after_the_text(changes: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidValue, match=f"token_rules.timestamps: {message}"):
        check_rules(TokenRules(timestamps=replace(TIMES, **changes)), 100)


def test_something_must_be_allowed() -> None:
    with pytest.raises(InvalidValue, match="at least one token"):
        check_rules(TokenRules(allowed=()), 100)


@pytest.mark.parametrize("position", [-1, 3])
def test_a_probe_is_of_the_prompt(position: int) -> None:
    with pytest.raises(InvalidValue, match=f"probe: position {position} is outside the prompt of 3 tokens") as caught:
        check_sequence(_sequence(SamplingParams(1, probe=PromptProbe(position, (1,)))), 100)
    assert caught.value.param == "probe"


@pytest.mark.parametrize("token_id", [-1, 100])
def test_a_probes_ids_are_in_the_vocabulary(token_id: int) -> None:
    with pytest.raises(InvalidValue, match=f"probe.token_ids: token id {token_id} is outside"):
        check_sequence(_sequence(SamplingParams(1, probe=PromptProbe(0, (token_id,)))), 100)


def test_only_a_prompt_with_a_source_is_aligned() -> None:
    with pytest.raises(InvalidValue, match="is_aligning: max_tokens is 1 and must be 0"):
        check_sequence(_sequence(SamplingParams(1, is_aligning=True), Source(b"", 5)), 100)
    with pytest.raises(InvalidValue, match="no source"):
        check_sequence(_sequence(SamplingParams(0, is_aligning=True)), 100)
