"""The tools of the training chats: a few well-known ones under several names, and endless invented ones.

Knows nothing of chats or templates.
Called by tool_chats.py.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from demo.corpus.lexicon import CATEGORIES, CITIES, COMPANIES, FIRST_NAMES, PRODUCTS, WORDS
from demo.corpus.phrasing import digits, pseudo_word
from demo.corpus.texts import read, templates


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument: the names it may have, its JSON type, and the kind of value that fills it."""

    names: tuple[str, ...]
    type: str
    kind: str


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool before its names are chosen.

    `requests` and `replies` name arguments by place, {0}, {1}, ..., and results by key.
    """

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    requests: tuple[str, ...]
    reply: str
    results: Mapping[str, str] = field(default_factory=dict)


def value_of(rng: random.Random, kind: str) -> Any:
    """A value for an argument or a result."""
    match kind:
        case "city":
            return rng.choice(CITIES) if rng.random() < 0.7 else pseudo_word(rng).capitalize()
        case "person":
            return rng.choice(FIRST_NAMES) if rng.random() < 0.7 else pseudo_word(rng).capitalize()
        case "word":
            return rng.choice(WORDS) if rng.random() < 0.6 else pseudo_word(rng)
        case "words":
            return " ".join(value_of(rng, "word") for _ in range(rng.randint(1, 3)))
        case "small":
            return rng.randint(1, 60)
        case "number":
            return rng.randint(1, 10 ** rng.randint(1, 5))
        case "sum":
            return f"{rng.randint(1, 9999)} {rng.choice('+-*/')} {rng.randint(1, 999)}"
        case "symbol":
            return "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.randint(3, 4)))
        case "id":
            return rng.choice(("", "A", "B", "X-", "ORD-")) + digits(rng, 3, 6)
        case "currency":
            return rng.choice(("USD", "EUR", "MYR", "GBP", "JPY", "SGD", "CHF", "CNY"))
        case "language":
            return rng.choice(("French", "German", "Spanish", "Malay", "Chinese", "Italian", "Japanese"))
        case "date":
            return f"20{rng.randint(20, 35)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
        case "time":
            return f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
        case "sky":
            return rng.choice(("sunny", "cloudy", "rainy", "windy", "foggy", "snowy", "clear", "stormy"))
        case "state":
            return rng.choice(("shipped", "delivered", "pending", "cancelled", "lost", "packed"))
        case "product":
            return rng.choice(PRODUCTS)
        case "room":
            return rng.choice(("kitchen", "bedroom", "office", "garage", "hall", "garden"))
        case "company":
            return rng.choice(COMPANIES)
        case "colour":
            return rng.choice(CATEGORIES["colours"])
        case _:
            raise ValueError(f"no values of kind {kind}")


@cache
def known() -> tuple[Tool, ...]:
    """The well-known tools."""
    return tuple(
        Tool(
            tuple(tool["names"]),
            tuple(tool["descriptions"]),
            tuple(Parameter(tuple(p["names"]), p["type"], p["kind"]) for p in tool["parameters"]),
            tuple(tool["requests"]),
            tool["reply"],
            tool["results"],
        )
        for tool in read("tools")["tools"]
    )


_KINDS = (
    ("string", "word"),
    ("string", "city"),
    ("string", "person"),
    ("integer", "small"),
    ("number", "number"),
    ("string", "id"),
    ("string", "colour"),
)


def invented(rng: random.Random) -> Tool:
    """A tool nobody has seen, asked for by its own words: what teaches to read the list instead of remembering it."""
    verb = rng.choice(templates("tool_verbs"))
    noun = rng.choice((*PRODUCTS, *WORDS)) if rng.random() < 0.7 else pseudo_word(rng)
    names: Sequence[str] = rng.sample(
        (*WORDS[:80], "name", "city", "level", "code", "id", "size", "color", "amount", "mode"), rng.randint(1, 3)
    )
    kinds = [rng.choice(_KINDS) for _ in names]
    parameters = tuple(Parameter((name,), *kind) for name, kind in zip(names, kinds, strict=True))
    clause = rng.choice((" and ", ", ")).join(f"{name} {{{i}}}" for i, name in enumerate(names))
    requests = (
        f"{verb} the {noun} with {clause}.",
        f"{verb} {noun}: {clause}",
        f"I want to {verb} the {noun}, {clause}.",
        f"{verb} a {noun} with {clause}",
    )
    key, kind = rng.choice((("status", "state"), ("value", "number"), ("result", "word"), ("code", "id")))
    description = rng.choice((f"{verb} the {noun}", f"{verb.capitalize()} a {noun}", f"Used to {verb} the {noun}"))
    name = rng.choice((f"{verb}_{noun}", f"{verb}_the_{noun}", f"{noun}_{verb}", verb + noun.capitalize()))
    return Tool((name,), (description,), parameters, requests, f"The {noun}: {key} is {{{key}}}.", {key: kind})
