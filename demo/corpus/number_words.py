"""Numbers in English words and back, up to 999,999: the tasks `digits:` and `words:` of the demo T5.

Knows nothing of tokenizers, templates or torch.
Called by text_tasks.py, and by dates.py for its ordinals.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

LARGEST = 999_999
OUT_OF_RANGE = "out of range"
NOT_A_NUMBER = "not a number"
_UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# Of numbers of one digit, two digits and so on: long ones have more to learn, of short ones there are too few to learn
# the rule from and not the numbers themselves.
_LENGTH_SHARES = (1, 2, 4, 4, 5, 6)
_SHORT_ORDINALS = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
    "twelve": "twelfth",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Manner:
    """How a number is spoken; the defaults are how the model writes it.

    Args:
        joint: what stands between the hundreds and the rest.
        hyphen: what stands between tens and units.
        comma: what stands after the thousands.
        one: the word for the one of `one hundred` and `one thousand` at the beginning.
        is_by_hundreds: whether 1,500 is `fifteen hundred`.
    """

    joint: str = " and "
    hyphen: str = "-"
    comma: str = " "
    one: str = "one"
    is_by_hundreds: bool = False


PLAIN = Manner()


def in_words(number: int, manner: Manner = PLAIN) -> str:
    """`205` -> `two hundred and five`, for 0 to 999,999."""
    if not 0 <= number <= LARGEST:
        raise ValueError(f"number {number}: words are known from 0 to {LARGEST}")
    if manner.is_by_hundreds and 10 < number // 100 < 100 and number // 100 % 10:
        words = _many(number, 100, "hundred", manner)
    elif number < 1000:
        words = _below_thousand(number, manner)
    else:
        words = _many(number, 1000, "thousand", manner)
    is_one_of_many = words.startswith(("one hundred", "one thousand"))
    return manner.one + words.removeprefix("one") if is_one_of_many else words


def _many(number: int, unit: int, name: str, manner: Manner) -> str:
    """So many hundreds or thousands and the rest, if there is one."""
    count, rest = divmod(number, unit)
    between = manner.joint if rest < 100 else manner.comma
    return f"{_below_thousand(count, manner)} {name}" + (between + _below_thousand(rest, manner)) * (rest > 0)


def _below_thousand(number: int, manner: Manner) -> str:
    return _many(number, 100, "hundred", manner) if number >= 100 else _below_hundred(number, manner)


def _below_hundred(number: int, manner: Manner) -> str:
    if number < 20:
        return _UNITS[number]
    tens, units = divmod(number, 10)
    return _TENS[tens - 2] + (manner.hyphen + _UNITS[units]) * (units > 0)


def ordinal_in_words(number: int, hyphen: str = "-") -> str:
    """`21` -> `twenty-first`, for 1 to 99."""
    *head, last = _below_hundred(number, PLAIN).split("-")
    if last in _SHORT_ORDINALS:
        last = _SHORT_ORDINALS[last]
    else:
        last = last[:-1] + "ieth" if last.endswith("y") else last + "th"
    return hyphen.join((*head, last))


def ordinal(number: int) -> str:
    """`21` -> `21st`."""
    suffix = "th" if number // 10 % 10 == 1 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


def some_number(rng: random.Random, max_digits: int = 6) -> int:
    """A number of one to so many digits, zeros among them more often than by chance: they are what is mistaken."""
    num_digits = rng.choices(range(1, max_digits + 1), _LENGTH_SHARES[:max_digits])[0]
    zeros = rng.choice((0.1, 0.1, 0.5))
    digits = ("0" if rng.random() < zeros else rng.choice("0123456789") for _ in range(num_digits - 1))
    return int(rng.choice("123456789") + "".join(digits)) if rng.random() < 0.995 else 0


def some_manner(rng: random.Random) -> Manner:
    """One of the ways in which people say numbers."""
    if rng.random() < 0.4:
        return PLAIN
    return Manner(
        joint=rng.choice((" and ", " ")),
        hyphen=rng.choice(("-", "-", " ")),
        comma=rng.choice((" ", " ", ", ")),
        one=rng.choice(("one", "one", "a")),
        is_by_hundreds=rng.random() < 0.15,
    )
