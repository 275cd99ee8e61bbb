"""How people write: politeness, careless capitals, typing errors, and letters that mean nothing.

Knows nothing of what is asked.
Called by every skill module.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from demo.corpus.conversation import Exchange

_OPENINGS = (
    "please ",
    "can you ",
    "could you ",
    "could you please ",
    "hey, ",
    "hi, ",
    "ok, now ",
    "now ",
    "I want you to ",
)
_SYLLABLES = tuple(a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou")


def ask(
    rng: random.Random, templates: Sequence[str], answer: str, *, is_order: bool = False, **slots: object
) -> Exchange:
    """An exchange from one of the templates; only the template's own words get typing errors, never a slot.

    Args:
        is_order: whether the templates are imperatives, before which `please` or `can you` may stand.
        slots: what the templates name in braces.
    """
    template = rng.choice(templates)
    key = template.format(**slots)
    return Exchange(dress(rng, template, is_order=is_order).format(**slots), answer, key)


def dress(rng: random.Random, template: str, *, is_order: bool = False) -> str:
    """The template as a person in a hurry, or a polite one, would type it."""
    roll = rng.random()
    if is_order and roll < 0.25:
        template = rng.choice(_OPENINGS) + template[:1].lower() + template[1:]
    elif is_order and roll < 0.35:
        template = template.rstrip(".?!") + ", please" if "\n" not in template and ":" not in template else template
    if rng.random() < 0.2:
        template = _misspell(rng, template)
    if rng.random() < 0.25:
        template = template[:1].lower() + template[1:]
    elif rng.random() < 0.3:
        template = template[:1].upper() + template[1:]
    if rng.random() < 0.25 and template[-1:] in ".?!":
        template = template[:-1]
    elif template[-1:].isalpha() and rng.random() < 0.3:
        template += rng.choice(".!")
    return template


def _misspell(rng: random.Random, template: str) -> str:
    """One or two slips in words of four letters or more, outside the braces."""
    words = [m.span() for m in re.finditer(r"\{[^}]*\}|[A-Za-z]{4,}", template) if template[m.start()] != "{"]
    for start, end in sorted(rng.sample(words, min(len(words), rng.choice((1, 1, 2)))), reverse=True):
        template = template[:start] + _slip(rng, template[start:end]) + template[end:]
    return template


def _slip(rng: random.Random, word: str) -> str:
    """A swap, a letter lost or a letter doubled; the first letter stays."""
    i = rng.randrange(1, len(word) - 1)
    match rng.randrange(3):
        case 0:
            return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
        case 1:
            return word[:i] + word[i + 1 :]
        case _:
            return word[:i] + word[i] + word[i:]


def letters(rng: random.Random, low: int, high: int) -> str:
    """A string of letters that mean nothing: what can only be copied, not remembered."""
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(low, high)))


def pseudo_word(rng: random.Random) -> str:
    """A word that sounds like one: two or three syllables and perhaps a last consonant."""
    return "".join(rng.choices(_SYLLABLES, k=rng.choice((2, 2, 3)))) + rng.choice(("", "", "n", "r", "s", "x"))


def digits(rng: random.Random, low: int, high: int) -> str:
    """A code of so many digits, without a leading zero."""
    return str(rng.randint(1, 9)) + "".join(rng.choices("0123456789", k=rng.randint(low, high) - 1))


def with_article(noun: str) -> str:
    """`a cat`, `an owl`."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun
