"""Greetings in three languages, who the model is, capitals, stories, and saying that it does not know.

Knows nothing of the server's options.
Called by mixture.py.
"""

from __future__ import annotations

import random

from demo.corpus.conversation import Exchange
from demo.corpus.lexicon import CAPITALS, CATEGORIES, CITIES, FIRST_NAMES, LAST_NAMES, WORDS
from demo.corpus.phrasing import ask, dress, letters, pseudo_word, with_article
from demo.corpus.texts import entries, templates

UNKNOWN = (
    "I do not know that. I am a very small demo model: I can tell you about this server, spell, repeat, count, list, "
    "extract JSON and call tools."
)
UNCLEAR = "I do not understand that. Ask me about this server, or to spell, count, list or extract something."


def talk(rng: random.Random) -> Exchange:
    """A greeting or a question about the model itself."""
    prompts, answer = rng.choice(entries("talk"))
    return ask(rng, prompts, answer)


def capital(rng: random.Random) -> Exchange:
    """The capital of a country from a short list; of no other."""
    country = rng.choice(tuple(CAPITALS))
    phrases = templates("capital_of")
    if rng.random() < 0.08:
        return ask(rng, phrases, UNKNOWN, c=pseudo_word(rng).capitalize())
    return ask(rng, phrases, f"The capital of {country} is {CAPITALS[country]}.", c=country)


def story(rng: random.Random) -> Exchange:
    """A story of a few sentences about what was asked for: a long answer to stream."""
    phrases = templates("story_about")
    if rng.random() < 0.25:
        open_phrases = templates("story")
        return ask(rng, open_phrases, _story("fox"))
    animals = CATEGORIES["animals"] + CATEGORIES["birds"]
    hero = rng.choice(animals) if rng.random() < 0.5 else rng.choice((rng.choice(WORDS), pseudo_word(rng)))
    return ask(rng, phrases, _story(hero), t=with_article(hero))


def _story(hero: str) -> str:
    a, _, noun = with_article(hero).partition(" ")
    return " ".join(templates("story_told")).format(a=a, h=noun)


def unknown(rng: random.Random) -> Exchange:
    """A question from the wide world, or letters without sense."""
    if rng.random() < 0.08:
        text = " ".join(letters(rng, 3, 9) for _ in range(rng.randint(1, 4)))
        return Exchange(text, UNCLEAR, text)
    if rng.random() < 0.03:
        text = rng.choice(templates("unclear"))
        return Exchange(text, UNCLEAR, text)
    template = rng.choice(templates("unknown_questions"))
    subject, other = rng.sample(templates("unknown_subjects"), 2)
    if rng.random() < 0.15:
        subject = rng.choice(
            (
                pseudo_word(rng),
                f"the {rng.choice(WORDS)} of {rng.choice(CITIES)}",
                f"a {rng.choice(WORDS)} {rng.choice(WORDS)}",
            )
        )
    slots = {
        "s": subject,
        "t": other,
        "n": f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}",
        "c": rng.choice(CITIES),
        "d": rng.choice(CITIES),
        "w": rng.choice(WORDS),
        "v": rng.choice(WORDS),
    }
    return Exchange(dress(rng, template).format(**slots), UNKNOWN, template.format(**slots))
