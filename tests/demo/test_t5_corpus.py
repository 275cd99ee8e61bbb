"""The corpus of the demo T5: repeatable, torch-free, right by other means, nothing held out in training."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from demo.corpus.dates import MONTHS, NOT_A_DATE, Date, as_written, some_date
from demo.corpus.number_words import LARGEST, Manner, in_words, ordinal, ordinal_in_words
from demo.corpus.text_tasks import UNKNOWN, generate, task_names

_ROOT = Path(__file__).parents[2]
_WORDS = {in_words(n): n for n in range(100)}


def _read(text: str) -> int:
    """The number that the words say, by adding up from the left."""
    total = current = 0
    for word in text.replace("-", " ").replace(",", "").split():
        match word:
            case "and":
                pass
            case "a":
                current += 1
            case "hundred":
                current *= 100
            case "thousand":
                total, current = total + current * 1000, 0
            case _:
                current += _WORDS[word]
    return total + current


def test_the_same_seed_gives_the_same_exchanges_and_another_seed_others() -> None:
    first = list(generate(5, 300))
    assert first == list(generate(5, 300))
    assert first != list(generate(6, 300))


def test_the_generator_needs_no_torch() -> None:
    code = (
        "import sys; from demo.corpus.text_tasks import generate; list(generate(1, 50)); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("task", task_names())
def test_what_is_held_out_is_never_learnt_in_any_form(task: str) -> None:
    held_out = {exchange.key for exchange in generate(1, 400, held_out=True, task=task)}
    learnt = {exchange.key for level in (0, 1, 2) for exchange in generate(2, 4000, level=level)}
    assert len(held_out) >= 20
    assert not held_out & learnt


def test_small_numbers_are_always_learnt() -> None:
    assert min(int(exchange.key) for exchange in generate(1, 300, held_out=True, task="words")) >= 100


def test_numbers_in_words_say_the_number_in_every_manner() -> None:
    manners = (
        Manner(),
        Manner(joint=" ", one="a"),
        Manner(hyphen=" ", comma=", "),
        Manner(is_by_hundreds=True),
        Manner(is_by_hundreds=True, joint=" "),
    )
    rng = random.Random(1)
    for number in (*range(2200), *(rng.randint(0, LARGEST) for _ in range(2000)), LARGEST):
        for manner in manners:
            assert _read(in_words(number, manner)) == number, manner


def test_the_plain_manner_is_british() -> None:
    assert in_words(205) == "two hundred and five"
    assert in_words(100_001) == "one hundred thousand and one"
    assert in_words(42_117) == "forty-two thousand one hundred and seventeen"
    with pytest.raises(ValueError, match="number 1000000"):
        in_words(LARGEST + 1)


def test_ordinals_are_spelt_as_people_spell_them() -> None:
    in_digits = " ".join(ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 22, 23, 30))
    assert in_digits == "1st 2nd 3rd 4th 11th 12th 13th 21st 22nd 23rd 30th"
    spelt = " ".join(ordinal_in_words(n) for n in (1, 5, 8, 9, 12, 20, 21, 30))
    assert spelt == "first fifth eighth ninth twelfth twentieth twenty-first thirtieth"


def test_every_real_date_is_one_of_the_calendar() -> None:
    rng = random.Random(2)
    for _ in range(3000):
        made = some_date(rng)
        assert date.fromisoformat(made.iso()) == date(made.year, made.month, made.day)


def test_a_written_date_holds_its_year_and_its_day() -> None:
    rng = random.Random(3)
    for _ in range(3000):
        made = some_date(rng)
        text = as_written(rng, made).lower()
        assert f"{made.year % 100:02}" in text
        ways = (str(made.day), ordinal_in_words(made.day), ordinal_in_words(made.day, hyphen=" "))
        assert any(way in text for way in ways)
        assert MONTHS[made.month - 1][:3].lower() in text or re.search(rf"\b0?{made.month}\b|\d{{8}}", text)


def test_numbers_alone_are_day_first_unless_a_year_begins_them() -> None:
    rng = random.Random(4)
    texts = {as_written(rng, Date(2021, 3, 5)) for _ in range(4000)}
    assert {"5/3/2021", "05/03/2021", "5/3/21", "2021-03-05", "2021/3/5", "20210305", "5.3.2021"} <= texts
    assert not {"3/5/2021", "03/05/2021", "3/5/21", "2021-05-03"} & texts


def test_a_year_in_short_is_only_written_where_the_rule_gives_it_back() -> None:
    rng = random.Random(5)
    for year, short in ((1950, True), (2049, True), (1949, False), (2050, False), (1850, False)):
        texts = [as_written(rng, Date(year, 12, 25), level=1) for _ in range(300)]
        assert any(str(year) not in text for text in texts) == short


def test_impossible_dates_and_only_they_are_refused() -> None:
    for task in ("date", "impossible"):
        for exchange in generate(6, 1000, task=task):
            assert Date(*map(int, exchange.key.split("-"))).is_real() == (task == "date")
            assert exchange.answer == (exchange.key if task == "date" else NOT_A_DATE)


def test_unknown_tasks_have_no_known_prefix() -> None:
    for exchange in generate(7, 2000, task="unknown"):
        assert exchange.answer == UNKNOWN
        assert not exchange.prompt.lower().startswith(("date:", "digits:", "words:"))
