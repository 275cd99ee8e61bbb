"""Stop strings: what is let through, what is held, and that cutting the text differently changes nothing."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from text.stop import StopMatcher

texts = st.text(alphabet="abc", max_size=40)
stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=4)


def run(stop: list[str], pieces: list[str], *, include_stop: bool = False) -> tuple[str, str | None]:
    matcher = StopMatcher(stop, include_stop=include_stop)
    text = "".join(matcher.push(piece) for piece in pieces)
    return text + matcher.flush(), matcher.matched


def expected(stop: list[str], text: str, *, include_stop: bool = False) -> tuple[str, str | None]:
    """The plain definition: the first end of a stop string, the longest of those that end there."""
    for end in range(len(text) + 1):
        ending = [string for string in stop if text[:end].endswith(string)]
        if ending:
            matched = max(ending, key=len)
            return text[: end if include_stop else end - len(matched)], matched
    return text, None


def cut(text: str, places: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[start:end] for start, end in pairwise(edges)]


@given(stop=stops, text=texts, places=st.lists(st.integers(0, 100)), include_stop=st.booleans())
def test_any_cut_of_the_text_gives_what_the_plain_definition_gives(
    stop: list[str], text: str, places: list[int], include_stop: bool
) -> None:
    assert run(stop, cut(text, places), include_stop=include_stop) == expected(stop, text, include_stop=include_stop)


@given(stop=stops, text=texts)
def test_only_what_may_begin_a_stop_string_is_held(stop: list[str], text: str) -> None:
    matcher = StopMatcher(stop)
    out = ""
    for index, char in enumerate(text):
        out += matcher.push(char)
        if matcher.matched is not None:
            return
        held = text[: index + 1].removeprefix(out)
        assert out + held == text[: index + 1]
        assert held == "" or any(string.startswith(held) for string in stop)
        longest = max(len(s[:n]) for s in stop for n in range(len(s)) if text[: index + 1].endswith(s[:n]))
        assert len(held) == longest


def test_the_stop_string_is_cut_unless_it_is_asked_for() -> None:
    assert run(["END"], ["the E", "N", "D of it"]) == ("the ", "END")
    assert run(["END"], ["the E", "N", "D of it"], include_stop=True) == ("the END", "END")


def test_nothing_comes_after_a_stop_string() -> None:
    matcher = StopMatcher(["."])
    assert matcher.push("one. two") == "one"
    assert matcher.push("three") == ""
    assert matcher.flush() == ""


def test_a_beginning_that_comes_to_nothing_is_given_out() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("hi\n\nUs") == "hi"
    assert matcher.push("eless") == "\n\nUseless"
    assert matcher.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["a", ""])


def test_time_is_linear_even_where_the_text_keeps_nearly_matching() -> None:
    matcher = StopMatcher(["a" * 20_000 + "b"])
    start = time.perf_counter()
    for _ in range(50):
        matcher.push("a" * 1000)
    assert time.perf_counter() - start < 5
    assert matcher.matched is None
