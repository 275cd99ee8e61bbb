"""Percentiles are nearest-rank, tables line up."""

from __future__ import annotations

import math

import pytest

from benchmarks.report import percentile, table


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (0.5, 50), (0.99, 99), (0.991, 100), (1.0, 100)])
def test_percentiles_are_values_of_the_sample(share: float, expected: float) -> None:
    assert percentile(list(range(100, 0, -1)), share) == expected


def test_no_values_have_no_percentile() -> None:
    assert math.isnan(percentile([], 0.5))


def test_all_lines_of_a_table_are_equally_long() -> None:
    lines = table(("name", "n"), [("long name", "1"), ("x", "1000")]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1] == "|-----------|-----:|"
    assert lines[3] == "| x         | 1000 |"
