"""Lists of things: so many of a category, or the whole of a known series, numbered or in a line.

Knows nothing of the server or of tools.
Called by mixture.py.
"""

from __future__ import annotations

import random

from demo.corpus.conversation import Exchange
from demo.corpus.lexicon import CATEGORIES, NUMBER_WORDS, SERIES, WORDS
from demo.corpus.phrasing import ask, pseudo_word
from demo.corpus.texts import templates

_IN_LINE = (" in one line", " separated by commas", ", comma separated", " on one line")


def things(rng: random.Random) -> Exchange:
    """`List three fruits` -> a numbered list; `... in one line` -> with commas."""
    category = rng.choice(tuple(CATEGORIES))
    items = CATEGORIES[category]
    number = rng.randint(2, len(items))
    in_line = rng.random() < 0.35
    phrases = templates("things")
    phrases = tuple(t + (rng.choice(_IN_LINE) if in_line else "") + "." for t in phrases)
    spelled = rng.choice((str(number), NUMBER_WORDS[number]))
    chosen = items[:number]
    answer = ", ".join(chosen) if in_line else _numbered(chosen)
    named = category.replace("colours", rng.choice(("colours", "colors")))
    exchange = ask(rng, phrases, answer, is_order=True, n=spelled, c=named)
    return Exchange(exchange.prompt, answer, f"{category} {number} {in_line}")


def first_of(rng: random.Random) -> Exchange:
    """The first so many of a list that the prompt brings: a number to be read, not remembered."""
    items = [rng.choice(WORDS) if rng.random() < 0.7 else pseudo_word(rng) for _ in range(rng.randint(3, 10))]
    number = rng.randint(1, len(items) - 1)
    is_numbered = rng.random() < 0.4
    suffix = " (numbered)" if is_numbered else ""
    chosen = tuple(items[:number])
    answer = _numbered(chosen) if is_numbered else ", ".join(chosen)
    phrases = tuple(phrase + suffix for phrase in templates("first_of"))
    return ask(rng, phrases, answer, n=rng.choice((str(number), NUMBER_WORDS[number])), c=", ".join(items))


def series(rng: random.Random) -> Exchange:
    """A series everyone knows, whole."""
    name = rng.choice(tuple(SERIES))
    in_line = name in ("letters of the alphabet", "vowels") or rng.random() < 0.4
    phrases = templates("series")
    suffix = rng.choice(_IN_LINE) if in_line and name not in ("letters of the alphabet", "vowels") else ""
    answer = ", ".join(SERIES[name]) if in_line else _numbered(SERIES[name])
    named = (
        rng.choice(("alphabet", name))
        if name == "letters of the alphabet"
        else name.replace("colours", rng.choice(("colours", "colors")))
    )
    return ask(rng, tuple(t + suffix + "." for t in phrases), answer, is_order=True, c=named)


def _numbered(items: tuple[str, ...]) -> str:
    return "\n".join(f"{i}. {item}" for i, item in enumerate(items, start=1))
