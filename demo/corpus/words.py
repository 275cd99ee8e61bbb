"""Spelling, repeating, letters: answers that are made from the prompt, letter by letter.

Knows nothing of the server or of tools.
Called by mixture.py.
"""

from __future__ import annotations

import random

from demo.corpus.conversation import Exchange
from demo.corpus.lexicon import CITIES, FIRST_NAMES, WORDS
from demo.corpus.phrasing import ask, digits, letters, pseudo_word
from demo.corpus.texts import templates


def some_word(rng: random.Random) -> str:
    """A word, a name, something like a word, or bare letters."""
    roll = rng.random()
    if roll < 0.5:
        return rng.choice(WORDS)
    if roll < 0.6:
        return rng.choice(FIRST_NAMES + CITIES[:40])
    return pseudo_word(rng) if roll < 0.8 else letters(rng, 3, 8)


def spell(rng: random.Random) -> Exchange:
    """`Spell cat` -> `c-a-t`."""
    word = some_word(rng)
    phrases = templates("spell")
    return ask(rng, phrases, "-".join(word), is_order=True, w=word)


def letter_question(rng: random.Random) -> Exchange:
    """How many letters, the first or last letter: counted aloud, so that the count is right."""
    word = some_word(rng)
    kind = rng.randrange(3)
    if kind == 0:
        counted = ", ".join(f"{i} {c}" for i, c in enumerate(word, start=1))
        phrases = templates("count_letters")
        return ask(rng, phrases, f"{counted}: {len(word)} letters.", w=word)
    which, letter = ("first", word[0]) if kind == 1 else ("last", word[-1])
    phrases = templates("which_letter")
    return ask(rng, phrases, f"{'-'.join(word)}: the {which} letter is {letter}.", n=which, w=word)


def reverse(rng: random.Random) -> Exchange:
    """A word backwards, spelled first."""
    word = some_word(rng)[:8]
    phrases = templates("reverse")
    return ask(rng, phrases, f"{'-'.join(word)} backwards is {'-'.join(word[::-1])}.", is_order=True, w=word)


def some_text(rng: random.Random) -> str:
    """Something to say again: letters, words, numbers, or all of them."""
    roll = rng.random()
    if roll < 0.3:
        return " ".join(letters(rng, 2, 8) for _ in range(rng.choice((1, 1, 2, 3, 4))))
    if roll < 0.65:
        text = " ".join(rng.choice(WORDS) if rng.random() < 0.8 else some_word(rng) for _ in range(rng.randint(1, 10)))
        if rng.random() < 0.4:
            text = text[0].upper() + text[1:] + rng.choice((".", "!", "?", ""))
        return text
    if roll < 0.75:
        return digits(rng, 1, 8)
    if roll < 0.85:
        return " ".join(
            rng.choice((digits(rng, 1, 4), some_word(rng), some_word(rng).upper())) for _ in range(rng.randint(2, 6))
        )
    if roll < 0.9:
        return rng.choice(
            ("OK", "ok", "yes", "no", "Hello, world!", "Hello World", "test", "pong", "ready", "done", "I am here.")
        )
    return "".join(rng.choices("你好谢再见我是人大小天水火山日月中国", k=rng.randint(1, 5)))


def repeat(rng: random.Random) -> Exchange:
    """The text again, exactly, once or a few times."""
    text = some_text(rng)
    if rng.random() < 0.2:
        times = rng.randint(2, 4)
        word = " ".join(text.split()[:2])
        named = rng.choice((str(times), ("two", "three", "four")[times - 2]))
        phrases = templates("repeat_times")
        return ask(rng, phrases, " ".join([word] * times), is_order=True, t=word, n=named)
    phrases = templates("repeat")
    template = rng.choice(phrases)
    # A full stop of politeness after the text would be a part of what is to be repeated.
    exchange = ask(rng, ("",), text)
    head, _, tail = template.partition("{t}")
    if rng.random() < 0.25:
        head = rng.choice(("Please ", "Can you ", "please ", "Now ")) + head[0].lower() + head[1:]
    return Exchange(head + text + tail, text, template.format(t=text) + exchange.key)
