"""Subtitles: times to the millisecond, texts that cannot break a file."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.subtitles import SrtWriter, SubtitleWriter, VttWriter

BOTH = [SrtWriter, VttWriter]


def written(writer: SubtitleWriter, *cues: tuple[float, float, str]) -> str:
    return writer.head() + "".join(writer.cue(*cue) for cue in cues)


def test_srt_is_numbered_with_commas_and_blank_lines() -> None:
    assert written(SrtWriter(), (0, 1.5, " Hello"), (1.5, 3, " there")) == (
        "1\n00:00:00,000 --> 00:00:01,500\nHello\n\n2\n00:00:01,500 --> 00:00:03,000\nthere\n\n"
    )


def test_vtt_begins_with_its_name_and_has_full_stops() -> None:
    assert written(VttWriter(), (0, 1.5, " Hello"), (1.5, 3, " there")) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nHello\n\n00:00:01.500 --> 00:00:03.000\nthere\n\n"
    )


@pytest.mark.parametrize(
    ("seconds", "stamp"),
    [
        (0.0, "00:00:00,000"),
        (0.0004, "00:00:00,000"),
        (0.0006, "00:00:00,001"),
        (0.1 + 0.2, "00:00:00,300"),
        (59.9994, "00:00:59,999"),
        (59.9996, "00:01:00,000"),
        (3599.9996, "01:00:00,000"),
        (3661.001, "01:01:01,001"),
        (359_999.9996, "100:00:00,000"),
    ],
)
def test_times_are_rounded_to_the_millisecond_and_carried(seconds: float, stamp: str) -> None:
    assert SrtWriter().cue(seconds, seconds + 5, "x").splitlines()[1].startswith(f"{stamp} --> ")


@pytest.mark.parametrize("writer", BOTH)
def test_an_empty_transcript_is_an_empty_file_of_its_kind(writer: type[SubtitleWriter]) -> None:
    assert written(writer(), (0, 1, ""), (1, 2, " \n\t ")) == writer().head()


def test_texts_that_show_nothing_take_no_number() -> None:
    lines = written(SrtWriter(), (0, 1, "a"), (1, 2, " "), (2, 3, "b")).splitlines()
    assert (lines[0], lines[2], lines[4], lines[6]) == ("1", "a", "2", "b")


def test_what_a_text_holds_cannot_end_its_cue_or_begin_another() -> None:
    text = "a --> b\n\n00:00:01,000 --> 00:00:02,000\r\n<i>&amp;"
    assert SrtWriter().cue(0, 1, text) == (
        "1\n00:00:00,000 --> 00:00:01,000\na -> b\n00:00:01,000 -> 00:00:02,000\n<i>&amp;\n\n"
    )
    assert VttWriter().cue(0, 1, text) == (
        "00:00:00.000 --> 00:00:01.000\na --&gt; b\n00:00:01,000 --&gt; 00:00:02,000\n&lt;i&gt;&amp;amp;\n\n"
    )


@pytest.mark.parametrize("writer", BOTH)
@given(
    cues=st.lists(
        st.tuples(st.floats(0, 4000), st.floats(0, 4000), st.text(alphabet="ab ->&<\n\r\u2028\x0b", max_size=12))
    )
)
def test_any_cues_make_a_file_that_reads_back(
    writer: type[SubtitleWriter], cues: list[tuple[float, float, str]]
) -> None:
    made = writer()
    text = written(made, *cues)
    blocks = text.removeprefix(made.head()).split("\n\n")
    assert blocks.pop() == ""
    stamp = r"(\d\d):(\d\d):(\d\d)[.,](\d{3})"
    last_start = 0
    for number, block in enumerate(blocks, start=1):
        lines = block.split("\n")
        if writer is SrtWriter:
            assert lines.pop(0) == str(number)
        match = re.fullmatch(f"{stamp} --> {stamp}", lines.pop(0))
        assert match is not None and lines and all(lines)
        assert not any("-->" in line for line in lines)
        h, m, s, ms, *end = map(int, match.groups())
        start_ms = ((h * 60 + m) * 60 + s) * 1000 + ms
        end_ms = ((end[0] * 60 + end[1]) * 60 + end[2]) * 1000 + end[3]
        assert last_start <= start_ms < end_ms
        last_start = start_ms
    assert len(blocks) == sum(1 for *_, said in cues if said.strip())
