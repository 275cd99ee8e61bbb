"""The corpus of the demo T5: a task's prefix and its input as the prompt, the one right answer, held-out items.

Knows nothing of tokenizers or torch: the same seed gives the same exchanges anywhere.
Called by the scripts that train and score the model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Literal

from demo.corpus import words
from demo.corpus.conversation import Exchange, is_held_out
from demo.corpus.dates import NOT_A_DATE, as_written, impossible_date, some_date
from demo.corpus.lexicon import CITIES, FIRST_NAMES, WORDS
from demo.corpus.number_words import LARGEST, NOT_A_NUMBER, OUT_OF_RANGE, PLAIN, in_words, some_manner, some_number
from demo.corpus.texts import read, templates

UNKNOWN = "unknown task"
Level = Literal[0, 1, 2]
_Task = Callable[[random.Random, Level], Exchange]
# Everybody meets these first; kept out of the scores by being learnt always.
_ALWAYS_LEARNT_BELOW = 100
_OTHER_PREFIXES = (
    "translate English to German", "translate English to French", "summarize", "question", "time", "month", "year",
    "number", "count", "sum", "spell", "answer", "text", "day", "sst2 sentence", "title",
)  # fmt: skip


def generate(
    seed: int, num_exchanges: int, *, held_out: bool = False, task: str | None = None, level: Level = 2
) -> Iterator[Exchange]:
    """So many exchanges of the training part, or of the part kept from it.

    Args:
        seed: the same seed gives the same exchanges, in the same order.
        held_out: exchanges whose key is held out, instead of those whose key is not: a date is held out in every form,
            a number in both directions.
        task: only this one, named as in `task_names`.
        level: 0 for one form of short inputs, 1 for some more, 2 for all.
    """
    rng = random.Random(seed)
    made = 0
    shares = {name: share for name, (share, _) in _TASKS.items() if level == 2 or name != "impossible"}
    while made < num_exchanges:
        name = task or rng.choices(tuple(shares), tuple(shares.values()))[0]
        exchange = _TASKS[name][1](rng, level)
        if _is_held_out(exchange.key) == held_out:
            made += 1
            yield exchange


def task_names() -> tuple[str, ...]:
    """Every task that `generate` can be asked for alone."""
    return tuple(_TASKS)


def _is_held_out(key: str) -> bool:
    is_small = key.isdigit() and int(key) < _ALWAYS_LEARNT_BELOW
    return not is_small and is_held_out(key)


def _date(rng: random.Random, level: Level) -> Exchange:
    """`date: March 5th, 2021` -> `2021-03-05`."""
    date = some_date(rng)
    return Exchange(_prompt(rng, "date", as_written(rng, date, level), level), date.iso(), date.iso())


def _impossible(rng: random.Random, level: Level) -> Exchange:
    """`date: April 31, 2021` -> `not a date`."""
    date = impossible_date(rng)
    return Exchange(_prompt(rng, "date", as_written(rng, date), level), NOT_A_DATE, date.iso())


def _digits(rng: random.Random, level: Level) -> Exchange:
    """`digits: two hundred and five` -> `205`."""
    number = some_number(rng, _max_digits(level))
    text = in_words(number, some_manner(rng) if level else PLAIN)
    return Exchange(_prompt(rng, "digits", text, level), str(number), str(number))


def _words(rng: random.Random, level: Level) -> Exchange:
    """`words: 205` -> `two hundred and five`, with or without a comma in the number."""
    number = some_number(rng, _max_digits(level))
    text = f"{number:,}" if level and rng.random() < 0.25 else str(number)
    return Exchange(_prompt(rng, "words", text, level), in_words(number), str(number))


def _unknown(rng: random.Random, level: Level) -> Exchange:
    """Anything without a known prefix."""
    roll = rng.random()
    if roll < 0.25:
        text = rng.choice(tuple(_questions()))
    elif roll < 0.5:
        text = words.some_text(rng)
    elif roll < 0.75:
        text = _content(rng)
    else:
        prefix = rng.choice(_OTHER_PREFIXES) if rng.random() < 0.5 else rng.choice(WORDS)
        text = f"{prefix}: {rng.choice((_content, words.some_text))(rng)}"
    if level == 2 and rng.random() < 0.25:
        more = (rng.choice((words.some_text, _content))(rng) for _ in range(rng.randint(1, 5)))
        text = rng.choice((" ", " ", "\n", ". ")).join((text, *more))
    if text.lower().startswith(("date", "digits", "words")):
        return _unknown(rng, level)
    return Exchange(_cased(rng, text) if level else text, UNKNOWN, "unknown " + text)


def _unusable(rng: random.Random, level: Level) -> Exchange:
    """A known prefix before something that it is not for, or a number beyond the largest."""
    prefix = rng.choice(("date", "digits", "words"))
    if prefix != "date" and rng.random() < 0.5:
        number = rng.randint(LARGEST + 1, 10 ** rng.randint(7, 10) - 1)
        millions = in_words(rng.randint(1, 999), some_manner(rng)) + rng.choice((" million", " million", " billion"))
        rest = rng.choice(("", " " + in_words(some_number(rng))))
        plain = f"{number:,}" if rng.random() < 0.5 else str(number)
        text, answer = (millions + rest if prefix == "digits" else plain), OUT_OF_RANGE
    else:
        answer = NOT_A_DATE if prefix == "date" else NOT_A_NUMBER
        text = rng.choice(tuple(_questions())) if rng.random() < 0.3 else _some_words(rng, 20 if level == 2 else 6)
    return Exchange(_prompt(rng, prefix, text, level), answer, f"{prefix} {text}")


def _content(rng: random.Random) -> str:
    """What a known prefix stands before, alone."""
    return rng.choice(
        (as_written(rng, some_date(rng)), in_words(some_number(rng), some_manner(rng)), str(some_number(rng)))
    )


def _some_words(rng: random.Random, most: int) -> str:
    num_words = rng.randint(1, 6) if rng.random() < 0.8 else rng.randint(1, most)
    return " ".join(rng.choice(rng.choice((WORDS, WORDS, CITIES, FIRST_NAMES))) for _ in range(num_words))


def _questions() -> tuple[str, ...]:
    """What people ask a chat model."""
    talk = (prompt for entry in read("talk")["entries"] for prompt in entry["prompts"])
    return (*talk, *(template for template in templates("sum") if "{" not in template))


def _prompt(rng: random.Random, prefix: str, text: str, level: Level = 2) -> str:
    """The prefix and what follows; now and then in capitals or small letters, or without the space between."""
    if level == 0:
        return f"{prefix}: {text}"
    roll = rng.random()
    if roll < 0.08:
        return f"{rng.choice((prefix.capitalize(), prefix.capitalize(), prefix.upper()))}: {_cased(rng, text)}"
    return f"{prefix}:{'' if roll < 0.12 else ' '}{_cased(rng, text)}"


def _cased(rng: random.Random, text: str) -> str:
    roll = rng.random()
    return text.lower() if roll < 0.12 else text.upper() if roll < 0.2 else text.capitalize() if roll < 0.26 else text


def _max_digits(level: Level) -> int:
    return (3, 4, 6)[level]


_TASKS: dict[str, tuple[float, _Task]] = {
    "date": (33, _date),
    "digits": (26, _digits),
    "words": (24, _words),
    "unknown": (8, _unknown),
    "unusable": (5, _unusable),
    "impossible": (4, _impossible),
}
