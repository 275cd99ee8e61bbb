"""Counting and small sums: counts of any length, sums written out, and a refusal where sums would go wrong.

Knows nothing of the server or of tools.
Called by mixture.py.
"""

from __future__ import annotations

import random

from demo.corpus.conversation import Exchange
from demo.corpus.lexicon import NUMBER_WORDS
from demo.corpus.phrasing import ask
from demo.corpus.texts import templates

BEYOND = (
    "That sum is beyond me. I add and subtract whole numbers below 100 and multiply up to 10 times 10; "
    "give me a calculator as a tool for the rest."
)
TOO_LONG = "That is a long way. I count up to 200 at most."


def _as_text(rng: random.Random, number: int) -> str:
    return NUMBER_WORDS[number] if number <= 12 and rng.random() < 0.2 else str(number)


def count(rng: random.Random) -> Exchange:
    """`Count from 1 to 5` -> `1, 2, 3, 4, 5`, up or down, by steps, in a line or one per line."""
    roll = rng.random()
    if roll < 0.06:
        return ask(
            rng,
            templates("count_too_long"),
            TOO_LONG,
            is_order=True,
            n=rng.choice((300, 400, 500, 1000, 1000, 2000, 5000, 10000, 1000000, rng.randint(250, 9999))),
        )
    start = 1 if roll < 0.5 else rng.randint(0, 90)
    length = rng.choice((3, 5, 10, 10, 20, 20, 30, 50, 50, 100)) if rng.random() < 0.5 else rng.randint(2, 60)
    if rng.random() < 0.02:
        start, length = 1, 200
    end = min(start + length - 1, 200)
    numbers = list(range(start, end + 1))
    per_line = rng.random() < 0.15
    suffix = rng.choice((", one per line", " with one number per line", ", each on its own line")) if per_line else ""
    glue = "\n" if per_line else ", "
    if roll > 0.85:
        numbers.reverse()
        phrases = templates("count_down")
    elif roll > 0.7:
        step = rng.choice((2, 5, 10))
        start = step if rng.random() < 0.7 else 0
        end = start + step * rng.randint(3, 20 if step < 10 else 10)
        numbers = list(range(start, end + 1, step))
        by = {2: ("2s", "twos", "2"), 5: ("5s", "fives", "5"), 10: ("10s", "tens", "10")}[step]
        phrases = tuple(t.replace("{s}", rng.choice(by)) for t in templates("count_by_steps"))
    else:
        phrases = templates("count")
        if start == 1:
            phrases += templates("count_from_one")
    answer = glue.join(map(str, numbers))
    exchange = ask(
        rng,
        tuple(t + suffix + "." for t in phrases),
        answer,
        is_order=True,
        a=_as_text(rng, start),
        b=_as_text(rng, end),
    )
    # Typing errors never touch digits, but the key must not depend on how the numbers are written.
    return Exchange(exchange.prompt, answer, f"count {numbers[0]} {numbers[-1]} {len(numbers)} {glue!r}")


def sums(rng: random.Random) -> Exchange:
    """A small sum with its working, or the refusal of a large one."""
    kind = rng.random()
    if kind < 0.2:
        return _beyond(rng)
    if kind < 0.35:
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        return _sum(rng, a, b, "*", f"{a} * {b} = {a * b}")
    top = 99 if rng.random() < 0.6 else 20
    a, b = rng.randint(0, top), rng.randint(0, top)
    if kind < 0.7:
        return _sum(rng, a, b, "+", _added(a, b))
    a, b = max(a, b), min(a, b)
    return _sum(rng, a, b, "-", _subtracted(a, b))


def _added(a: int, b: int) -> str:
    """Tens and ones apart, so that each step is a sum of two digits."""
    result = f"{a} + {b} = {a + b}"
    if a < 10 and b < 10:
        return result
    ones, tens = a % 10 + b % 10, a // 10 + b // 10
    working = f"Ones: {a % 10} + {b % 10} = {ones}. Tens: {a // 10} + {b // 10} = {tens}."
    return f"{working} {tens}0 + {ones} = {a + b}. So {result}."


def _subtracted(a: int, b: int) -> str:
    """In two steps: first the tens, then the ones."""
    result = f"{a} - {b} = {a - b}"
    if a < 20 or b < 10:
        return result
    middle = a - b // 10 * 10
    return f"{a} - {b // 10}0 = {middle}. {middle} - {b % 10} = {a - b}. So {result}."


def _sum(rng: random.Random, a: int, b: int, sign: str, answer: str) -> Exchange:
    words = {"+": ("plus", "+", "and"), "-": ("minus", "-"), "*": ("times", "*", "x", "multiplied by")}[sign]
    word = rng.choice(words[:2] if sign == "+" else words)
    last = "{a} {o} {b} is" if word[0].isalpha() else "{a}{o}{b}"
    phrases = (*templates("sum"), last)
    if sign == "+":
        phrases += ("Add {a} and {b}.", "What is the sum of {a} and {b}?")
    if sign == "-":
        phrases += ("Subtract {b} from {a}.",)
    exchange = ask(rng, phrases, answer, a=a, b=b, o=word)
    return Exchange(exchange.prompt, answer, f"{a}{sign}{b}")


def _beyond(rng: random.Random) -> Exchange:
    def big() -> int:
        return rng.randint(100, 10 ** rng.randint(3, 7))

    small = rng.randint(2, 99)
    kind = rng.randrange(6)
    if kind < 2:
        a, b = rng.choice(((big(), big()), (big(), small), (small, big())))
        return _sum(rng, a, b, rng.choice("+-*"), BEYOND)
    if kind == 2:
        return _sum(rng, rng.randint(11, 99), rng.randint(11, 99), "*", BEYOND)
    if kind == 3:
        return ask(rng, templates("divide"), BEYOND, a=big(), b=small)
    if kind == 4:
        return ask(rng, templates("advanced_sum"), BEYOND, a=big(), b=small)
    return ask(rng, templates("algebra"), BEYOND, a=big(), b=small)
