"""Things told and asked for later: a name, a city, a colour, a code; and a name that the system prompt gives.

Knows nothing of what is said in between, which the caller gives.
Called by mixture.py.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from demo.corpus.conversation import Conversation, Exchange, Message
from demo.corpus.lexicon import CATEGORIES, CITIES, FIRST_NAMES, JOBS
from demo.corpus.phrasing import ask, digits, dress, pseudo_word
from demo.corpus.texts import read, templates

OWN_NAME = "I have no name of my own: I am the demo model of this server."


def remember(rng: random.Random, between: Sequence[Exchange]) -> Conversation:
    """Told, perhaps spoken of other things, asked: the answer is in the history, or it was never told."""
    things = read("memory")
    kinds = rng.sample(tuple(things), rng.choice((1, 1, 2, 3)))
    if rng.random() < 0.5 and "name" not in kinds:
        kinds[0] = "name"
    values = {kind: _value(rng, kind) for kind in kinds}
    exchanges = [
        ask(rng, things[kind]["told"], things[kind]["noted"].format(v=values[kind]), v=values[kind]) for kind in kinds
    ]
    exchanges += between
    rng.shuffle(kinds)
    for kind in kinds:
        exchanges.append(ask(rng, things[kind]["asked"], things[kind]["recalled"].format(v=values[kind])))
    if rng.random() < 0.25:
        other = rng.choice([kind for kind in things if kind not in kinds] or ["name"])
        if other not in kinds:
            exchanges.append(ask(rng, things[other]["asked"], things[other]["never_told"]))
    return Conversation("memory", " ".join(values.values()), as_messages(exchanges))


def never_told(rng: random.Random) -> Exchange:
    """Asked for what nobody said."""
    things = read("memory")
    kind = rng.choice(tuple(things))
    return ask(rng, things[kind]["asked"], things[kind]["never_told"])


def told(rng: random.Random) -> Exchange:
    """A name or another thing told, with nothing asked."""
    things = read("memory")
    kind = rng.choice(("name", "name", *things))
    value = _value(rng, kind)
    return ask(rng, things[kind]["told"], things[kind]["noted"].format(v=value), v=value)


def own_name(rng: random.Random) -> Conversation:
    """Asked for its own name: the one in the system prompt, or none."""
    question = ask(rng, templates("your_name"), OWN_NAME)
    if rng.random() < 0.3:
        return Conversation("own_name", question.key, as_messages([question]))
    name = rng.choice(FIRST_NAMES) if rng.random() < 0.5 else pseudo_word(rng).capitalize()
    template = rng.choice(templates("system_name"))
    system: Message = {"role": "system", "content": dress(rng, template).format(n=name)}
    named = Exchange(question.prompt, f"My name is {name}.", question.key)
    return Conversation("own_name", name, (system, *as_messages([named])))


def as_messages(exchanges: Sequence[Exchange]) -> tuple[Message, ...]:
    """User and assistant messages in turn."""
    turns = [[{"role": "user", "content": e.prompt}, {"role": "assistant", "content": e.answer}] for e in exchanges]
    return tuple(message for turn in turns for message in turn)


def _value(rng: random.Random, kind: str) -> str:
    match kind:
        case "name":
            return rng.choice(FIRST_NAMES) if rng.random() < 0.5 else pseudo_word(rng).capitalize()
        case "city":
            return rng.choice(CITIES)
        case "colour":
            return rng.choice(CATEGORIES["colours"])
        case "job":
            return rng.choice([job for job in JOBS if job[0] not in "aeiou"])
        case "code":
            return digits(rng, 3, 6)
        case _:
            return pseudo_word(rng).capitalize()
