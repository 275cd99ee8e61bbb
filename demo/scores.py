"""Scores of held-out items: what is counted, and how it gets into a model's card.

Knows nothing of models or corpora.
Called by the evaluating scripts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Below this gap between the two likeliest tokens another kernel or number format may choose the other one.
MIN_GAP = 0.5
# Of the held-out items; training draws its seeds elsewhere.
HELD_OUT_SEED = 7_777_777


@dataclass(frozen=True, slots=True)
class Score:
    """Answers of one skill: how many there were, how many came out exactly as expected, how surely."""

    skill: str
    num_answers: int
    num_exact: int
    num_sure: int


def count(skill: str, answers: Iterable[tuple[bool, float]]) -> Score:
    """The score of answers, each whether it is exact and its least gap."""
    counted = list(answers)
    num_sure = sum(is_exact and gap >= MIN_GAP for is_exact, gap in counted)
    return Score(skill, len(counted), sum(is_exact for is_exact, _ in counted), num_sure)


def table(scores: Sequence[Score], *, heading: str = "skill", num_decimals: int = 0) -> str:
    """The scores in Markdown."""
    rows = [
        f"| {s.skill} | {s.num_answers} | {s.num_exact / s.num_answers:.{num_decimals}%} "
        f"| {s.num_sure / s.num_answers:.{num_decimals}%} |"
        for s in scores
    ]
    return "\n".join((f"| {heading} | answers | exact | exact, gap >= 0.5 |", "|---|---|---|---|", *rows))


def write_into_card(card: Path, text: str) -> None:
    """Puts the text between the card's two marks, instead of what is there."""
    marked = re.sub(
        r"(?<=<!-- scores -->\n).*(?=<!-- /scores -->)",
        lambda _: text + "\n",
        card.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    card.write_text(marked, encoding="utf-8")
