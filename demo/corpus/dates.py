"""Dates in the many ways people write them, and their ISO form: the task `date:` of the demo T5.

Knows nothing of tokenizers, templates or torch. The rules where a date could be read in two ways: numbers alone are day
first, unless a year of four digits begins them; a year of two digits is 20xx up to 49 and 19xx from 50.
Called by text_tasks.py.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from demo.corpus.number_words import ordinal, ordinal_in_words

NOT_A_DATE = "not a date"
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_LONGEST = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
# Slots: month, day in some dress, year of four digits or in short; in numbers: d, m (padded or not), y (four digits).
_WRITTEN = (
    "{month} {day}, {year}", "{month} {day}, {year}", "{month} {day} {year}", "{day} {month} {year}",
    "{day} {month} {year}", "{day} {month}, {year}",
)  # fmt: skip
_SPOKEN = (
    "{day} of {month} {year}", "{day} of {month}, {year}", "the {day} of {month} {year}",
    "the {day} of {month}, {year}", "{month} the {day}, {year}", "{month} the {day} {year}",
)  # fmt: skip
_TERSE = ("{d}-{month}-{year}", "{d} {month} {year}", "{month} {d} {year}", "{y} {month} {d}", "{y}-{month}-{d}")
_IN_NUMBERS = ("{d}{s}{m}{s}{year}", "{d}{s}{m}{s}{year}", "{d}{s}{m}{s}{year}", "{y}{s}{m}{s}{d}")


@dataclass(frozen=True, slots=True)
class Date:
    """A day of the calendar, or one that there is not."""

    year: int
    month: int
    day: int

    def is_real(self) -> bool:
        """Whether there is such a day; 29 February counts in every year, for the model does not know leap years."""
        return 1 <= self.month <= 12 and 1 <= self.day <= _LONGEST[self.month - 1]

    def iso(self) -> str:
        """`2021-03-05`."""
        return f"{self.year:04}-{self.month:02}-{self.day:02}"


def some_date(rng: random.Random) -> Date:
    """A real date, mostly of the last and this century."""
    century = rng.choice((1900, 2000, 2000)) if rng.random() < 0.85 else rng.randint(10, 29) * 100
    year = century + rng.randint(0, 99)
    month = rng.randint(1, 12)
    is_leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    return Date(year, month, rng.randint(1, _LONGEST[month - 1] - (month == 2 and not is_leap)))


def impossible_date(rng: random.Random) -> Date:
    """A month or a day that no calendar has, or a 31st where the month has 30 days."""
    date = some_date(rng)
    match rng.randrange(3):
        case 0:
            return Date(date.year, rng.randint(13, 99), date.day)
        case 1:
            return Date(date.year, date.month, rng.randint(32, 99))
        case _:
            month = rng.choice((2, 2, 4, 6, 9, 11))
            return Date(date.year, month, rng.randint(_LONGEST[month - 1] + 1, 31))


def as_written(rng: random.Random, date: Date, level: int = 2) -> str:
    """The date in words and numbers.

    Args:
        level: 0 for one form only (`March 5, 2021`), 1 for those with the month's name, 2 for all.
    """
    if level == 0:
        return f"{MONTHS[date.month - 1]} {date.day}, {date.year}"
    if date.month > 12 or (level > 1 and rng.random() < 0.3):
        text = _in_numbers(rng, date)
    else:
        text = _with_name(rng, date)
    if rng.random() < 0.2:
        text = _weekday(rng) + text
    return text + "." * (rng.random() < 0.04)


def _in_numbers(rng: random.Random, date: Date) -> str:
    if rng.random() < 0.05:
        return f"{date.year:04}{date.month:02}{date.day:02}"
    is_padded = rng.random() < 0.5
    day, month = (f"{n:02}" if is_padded else str(n) for n in (date.day, date.month))
    year = _year(rng, date.year, marks=("",))
    return rng.choice(_IN_NUMBERS).format(d=day, m=month, year=year, y=date.year, s=rng.choice("///--. "))


def _with_name(rng: random.Random, date: Date) -> str:
    padded = f"{date.day:02}" if rng.random() < 0.25 else str(date.day)
    month, year = _month(rng, date.month), _year(rng, date.year, marks=("", "'"))
    roll = rng.random()
    if roll < 0.25:
        return rng.choice(_TERSE).format(d=padded, month=month, year=year, y=date.year)
    in_words = ordinal_in_words(date.day, hyphen=rng.choice(("-", "-", " ")))
    if roll < 0.6:
        day = rng.choice((ordinal(date.day), in_words))
        return rng.choice(_SPOKEN).format(day=day, month=month, year=year)
    day = rng.choice((padded, padded, ordinal(date.day), in_words))
    return rng.choice(_WRITTEN).format(day=day, month=month, year=year)


def _month(rng: random.Random, month: int) -> str:
    name = MONTHS[month - 1]
    if rng.random() < 0.6:
        return name
    short = "Sept" if name == "September" and rng.random() < 0.5 else name[:3]
    return short + "." * (rng.random() < 0.2 and short != name)


def _year(rng: random.Random, year: int, marks: tuple[str, ...]) -> str:
    """Two digits where the rule gives them back."""
    if 1950 <= year <= 2049 and rng.random() < 0.25:
        return rng.choice(marks) + f"{year % 100:02}"
    return str(year)


def _weekday(rng: random.Random) -> str:
    """Any day of the week: what it is plays no part in the answer."""
    name = rng.choice(_DAYS)
    return rng.choice((name + ", ", name + " ", name[:3] + ", ", name[:3] + " ", name[:3] + ". "))
