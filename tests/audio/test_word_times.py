"""Words: from their tokens, without the silence beside them, in order whatever the attention said."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audio.word_times import SegmentWords, TimedWord, time_words


def segment(words: str, start_s: float | None = None, end_s: float | None = None) -> SegmentWords:
    """Words of one token each, separated by |."""
    texts = words.split("|")
    return SegmentWords(texts, [1] * len(texts), start_s, end_s)


def near(seconds: float) -> Any:
    return pytest.approx(seconds)


def edges(*times_s: float) -> list[tuple[float, float]]:
    return list(pairwise(times_s))


def test_a_word_lasts_from_its_first_token_to_its_last() -> None:
    given = SegmentWords([" syl", "lables", " of", " many"], [2, 1, 1, 3])
    (words,) = time_words(edges(0.0, 0.1, 0.2, 0.4, 0.5, 0.6, 0.7, 0.9), [given])
    assert words == [
        TimedWord(" syl", 0.0, 0.2),
        TimedWord("lables", 0.2, 0.4),
        TimedWord(" of", 0.4, 0.5),
        TimedWord(" many", 0.5, 0.9),
    ]


def test_marks_join_the_word_they_stand_at_and_leave_its_times() -> None:
    (words,) = time_words(edges(0, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.2), [segment(' "| Well|,| she|?|"| (| no')])
    assert words == [
        TimedWord(' " Well,', 0.2, 0.3),
        TimedWord(' she?"', 0.5, 0.7),
        TimedWord(" ( no", 1.0, 1.2),
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (".", ["."]),
        (" one| (", [" one", " ("]),
        ("one|...", ["one..."]),
        ("五|。", ["五。"]),
        (" -| five", [" - five"]),
        (" don|'t", [" don", "'t"]),
        (" a| ", [" a"]),
        ("| ", []),
        (" 3|.|5", [" 3.", "5"]),
    ],
)
def test_marks_alone_and_blanks(given: str, expected: list[str]) -> None:
    count = given.count("|") + 1
    (words,) = time_words(edges(*(0.2 * index for index in range(count + 1))), [segment(given)])
    assert [word.text for word in words] == expected


def test_the_silence_after_a_sentence_is_not_part_of_the_next_word() -> None:
    times = edges(0.0, 0.3, 0.6, 0.7, 4.0, 4.3)
    (words,) = time_words(times, [segment(" one| two|.| three| four")])
    assert words[2] == TimedWord(" three", near(3.4), 4.0)  # twice the median, 0.3
    (words,) = time_words(times, [segment(" one| two|,| three| four")])
    assert words[2] == TimedWord(" three", 0.7, 4.0)  # no sentence ended, so it is left


def test_the_first_word_after_a_pause_does_not_begin_in_it() -> None:
    (words,) = time_words(edges(0.0, 5.0, 5.3, 5.6, 5.9), [segment(" one| two| three| four")])
    assert words[0] == TimedWord(" one", near(4.4), 5.0)
    assert words[1].start_s == 5.0


def test_nor_does_the_second_where_both_are_long() -> None:
    (words,) = time_words(edges(0.0, 3.0, 6.0, 6.3, 6.6, 6.9), [segment(" one| two| three| four| five")])
    assert words[0] == TimedWord(" one", near(4.8), near(5.4))
    assert words[1] == TimedWord(" two", near(5.4), 6.0)


def test_a_word_close_to_speech_before_it_is_left() -> None:
    times = edges(0.0, 0.8, 1.1, 1.4, 1.7)
    assert time_words(times, [segment(" one| two| three| four")])[0][0] == TimedWord(" one", 0.0, 0.8)
    earlier = time_words(times, [segment(" one| two| three| four")], previous_end_s=-2.0)
    assert earlier[0][0] == TimedWord(" one", near(0.2), 0.8)


def test_words_do_not_reach_far_beyond_their_segment() -> None:
    times = edges(0.0, 0.9, 1.2, 1.5, 1.8, 2.1, 3.2)
    (words,) = time_words(times, [segment(" one| two| three| four| five| six", 0.7, 2.3)])
    assert words[0] == TimedWord(" one", near(0.6), 0.9)
    assert words[-1] == TimedWord(" six", 2.1, near(2.4))
    (words,) = time_words(times, [segment(" one| two| three| four| five| six", 0.3, 2.9)])
    assert (words[0].start_s, words[-1].end_s) == (0.0, 3.2)  # near enough


def test_segments_keep_their_own_words() -> None:
    first, second = time_words(edges(0, 0.3, 0.6, 0.7, 1.0), [segment(" one| two"), segment(".| three")])
    assert [word.text for word in first] == [" one", " two"]
    assert [word.text for word in second] == [".", " three"]
    assert time_words([], []) == []
    assert time_words([], [SegmentWords([], [])]) == [[]]


@pytest.mark.parametrize("counts", [[1], [1, 2], [2, 0], [3, -1]])
def test_tokens_that_do_not_add_up_are_refused(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="are wanted for 2 tokens"):
        time_words(edges(0, 1, 2), [SegmentWords(["a"] * len(counts), counts)])


@given(data=st.data())
def test_words_never_overlap_nor_run_backwards_and_keep_all_text(data: Any) -> None:
    texts = st.sampled_from([" one", "two", ".", ",", ' "', '"', " (", "?", " ", "..."])
    given = data.draw(st.lists(st.lists(texts, max_size=6), max_size=4))
    steps = data.draw(
        st.lists(
            st.sampled_from([0.0, 0.02, 0.2, 0.4, 1.5, 6.0]),
            min_size=sum(map(len, given)) + 1,
            max_size=sum(map(len, given)) + 1,
        )
    )
    position = 0.0
    times_s = [position := position + step for step in steps]
    bound = st.one_of(st.none(), st.floats(0, 30))
    segments = [SegmentWords(words, [1] * len(words), data.draw(bound), data.draw(bound)) for words in given]
    timed = time_words(edges(*times_s), segments, previous_end_s=data.draw(st.sampled_from([0.0, -5.0])))
    assert len(timed) == len(given)
    end_s = 0.0
    for words, own in zip(given, timed, strict=True):
        kept = "".join(word.text for word in own)
        assert kept == "".join(word for word in words if word.strip())
        for word in own:
            assert end_s <= word.start_s + 1e-9 and word.start_s <= word.end_s + 1e-9
            assert times_s[0] <= word.start_s + 1e-9 and word.end_s <= times_s[-1] + 1e-9
            end_s = word.end_s
