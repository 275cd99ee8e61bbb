"""The text of a sequence, push by push: stop strings, the last token, and which tokens are out."""

from __future__ import annotations

import time
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.text.vocabularies import CORPUS, KINDS, byte_level, sentencepiece
from text.output import TextDelta, TextOutput

TEXT = " ".join(CORPUS)


@cache
def tokenizer_of(kind: str) -> Any:
    return KINDS[kind]()


def run(
    tokenizer: Any, pushes: list[list[int]], *, stop: tuple[str, ...] = (), include_stop: bool = False
) -> tuple[str, TextDelta]:
    output = TextOutput(tokenizer, [], stop=stop, include_stop=include_stop)
    text = ""
    for index, push in enumerate(pushes):
        delta = output.push(push, is_last=index == len(pushes) - 1)
        text += delta.text
        if delta.stop_string is not None:
            return text, delta
    return text, delta


def in_pushes(token_ids: list[int], places: list[int]) -> list[list[int]]:
    edges = sorted({0, len(token_ids), *(place % (len(token_ids) + 1) for place in places)})
    return [token_ids[start:end] for start, end in pairwise(edges)]


@pytest.mark.parametrize("kind", ["byte-level", "llama-first", "wordpiece", "byt5"])
@given(
    places=st.lists(st.integers(0, 1000), max_size=20),
    stop=st.lists(st.sampled_from(["fox", "o", "again.", "世界", "😀", "\n", "zz"]), max_size=3).map(tuple),
    include_stop=st.booleans(),
)
def test_how_tokens_are_grouped_changes_nothing(
    kind: str, places: list[int], stop: tuple[str, ...], include_stop: bool
) -> None:
    tokenizer = tokenizer_of(kind)
    token_ids = tokenizer.encode(TEXT, add_special_tokens=False)
    grouped = run(tokenizer, in_pushes(token_ids, places), stop=stop, include_stop=include_stop)
    at_once = run(tokenizer, [token_ids], stop=stop, include_stop=include_stop)
    assert (grouped[0], grouped[1].stop_string) == (at_once[0], at_once[1].stop_string)
    assert grouped[1].num_tokens == at_once[1].num_tokens


@pytest.mark.parametrize("kind", ["byte-level", "llama-first"])
@pytest.mark.parametrize("stop", [(), ("jumps", "ove"), ("never met",)])
def test_a_token_is_counted_when_its_text_is_out_and_not_before(kind: str, stop: tuple[str, ...]) -> None:
    tokenizer = tokenizer_of(kind)
    token_ids = tokenizer.encode(TEXT, add_special_tokens=False)
    output = TextOutput(tokenizer, [], stop=stop)
    text = ""
    for index, token_id in enumerate(token_ids):
        delta = output.push([token_id], is_last=index == len(token_ids) - 1)
        text += delta.text
        assert delta.num_tokens <= index + 1
        counted = tokenizer.decode(token_ids[: delta.num_tokens])
        if delta.stop_string is not None:
            assert counted.startswith(text)  # the token that was cut in two counts
            assert len(tokenizer.decode(token_ids[: delta.num_tokens - 1])) < len(text)
            return
        assert text.startswith(counted)
    assert delta.num_tokens == len(token_ids)


def test_the_token_that_ended_the_sequence_is_neither_text_nor_counted() -> None:
    tokenizer = byte_level()
    token_ids = [*tokenizer.encode("one", add_special_tokens=False), tokenizer.eos_token_id]
    for stop in ((), ("x",)):
        output = TextOutput(tokenizer, [], stop=stop, skip_special_tokens=False)
        delta = output.push(token_ids, is_last=True, drop_last_token=True)
        assert delta == TextDelta("one", None, len(token_ids) - 1)


def test_what_was_held_comes_with_the_last_push_even_if_it_is_empty() -> None:
    tokenizer = byte_level()
    output = TextOutput(tokenizer, [], stop=("one two",))
    assert output.push(tokenizer.encode("one", add_special_tokens=False)) == TextDelta("", None, 0)
    delta = output.push([], is_last=True)
    assert (delta.text, delta.stop_string) == ("one", None)
    assert delta.num_tokens == len(tokenizer.encode("one", add_special_tokens=False))


def test_a_stop_string_that_an_unfinished_character_completes_is_met_at_the_end() -> None:
    tokenizer = byte_level()
    unfinished = tokenizer.encode("漢", add_special_tokens=False)[:1]
    output = TextOutput(tokenizer, [], stop=("\ufffd",))
    assert output.push(unfinished) == TextDelta("", None, 0)
    assert output.push([], is_last=True).stop_string == "\ufffd"


def test_nothing_follows_a_stop_string() -> None:
    tokenizer = byte_level()
    output = TextOutput(tokenizer, [], stop=("two",))
    first = output.push(tokenizer.encode("one two three", add_special_tokens=False))
    assert (first.text, first.stop_string) == ("one ", "two")
    late = tokenizer.encode("four", add_special_tokens=False)
    assert output.push(late, is_last=True) == TextDelta("", "two", first.num_tokens, num_surplus=len(late))


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("stop", [(), ("never met", "\n\n\n", "###")])
def test_a_token_costs_microseconds(make: Any, stop: tuple[str, ...]) -> None:
    tokenizer = make()
    token_ids = tokenizer.encode(TEXT * 20, add_special_tokens=False)
    best = float("inf")
    for _ in range(3):
        output = TextOutput(tokenizer, [], stop=stop)
        start = time.perf_counter()
        for token_id in token_ids:
            output.push([token_id])
        best = min(best, (time.perf_counter() - start) / len(token_ids))
    assert best < 60e-6  # under 10 us on a quiet machine; the rest is room for a busy one
