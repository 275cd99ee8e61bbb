"""Texts with facts in them, and the JSON that was asked for: by field names, by a schema, or as a list.

Knows nothing of grammars or of the server.
Called by mixture.py.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from demo.corpus.conversation import Conversation, Exchange
from demo.corpus.lexicon import CATEGORIES, CITIES, COMPANIES, FIRST_NAMES, JOBS, LAST_NAMES, PRODUCTS
from demo.corpus.phrasing import ask, digits, dress, pseudo_word, with_article
from demo.corpus.texts import templates

Record = tuple[str, dict[str, Any]]
_LINE_BREAK = "\n"


def _person_name(rng: random.Random) -> str:
    first = rng.choice(FIRST_NAMES) if rng.random() < 0.6 else pseudo_word(rng).capitalize()
    last = rng.choice(LAST_NAMES) if rng.random() < 0.6 else pseudo_word(rng).capitalize()
    return first if rng.random() < 0.25 else f"{first} {last}"


def _email(rng: random.Random, name: str) -> str:
    local = name.partition(" ")[0].lower() + rng.choice(("", "." + pseudo_word(rng), digits(rng, 1, 2)))
    return f"{local}@{rng.choice(COMPANIES).lower()}.{rng.choice(('com', 'org', 'net'))}"


def _person(rng: random.Random) -> Record:
    """A sentence or two about a person; only what the text says is in the record."""
    name = _person_name(rng)
    record: dict[str, Any] = {"name": name}
    parts = []
    choices: dict[str, tuple[Any, tuple[str, ...]]] = {
        "age": (rng.randint(18, 90), ("is {v} years old", "is {v}", "is a {v}-year-old")),
        "city": (rng.choice(CITIES), ("lives in {v}", "is based in {v}", "comes from {v}")),
        "job": (job := rng.choice(JOBS), (f"works as {with_article(job)}", f"is {with_article(job)}")),
        "company": (rng.choice(COMPANIES), ("works for {v}", "works at {v}", "is employed by {v}")),
        "email": (_email(rng, name), ("can be reached at {v}", "writes from {v}", "uses the address {v}")),
        "phone": (digits(rng, 6, 9), ("has the phone number {v}", "can be called at {v}")),
        "hobby": (rng.choice(CATEGORIES["sports"]), ("likes {v}", "enjoys {v}")),
    }
    for field in rng.sample(tuple(choices), rng.randint(1, 4)):
        value, phrases = choices[field]
        record[field] = value
        parts.append(rng.choice(phrases).format(v=value))
    body = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return f"{name} {body}.", record


def _order(rng: random.Random) -> Record:
    """An order of a thing, so many, at a price."""
    product, quantity = rng.choice(PRODUCTS), rng.randint(2, 60)
    price = rng.randint(1, 999) if rng.random() < 0.6 else rng.randint(100, 99999) / 100
    name, order_id = _person_name(rng), rng.choice(("A", "B", "X", "")) + digits(rng, 3, 6)
    record = {"customer": name, "product": product, "quantity": quantity, "price": price, "order_id": order_id}
    text = rng.choice(
        (
            f"{name} ordered {quantity} {product}s at {price} dollars each. The order number is {order_id}.",
            f"Order {order_id}: {quantity} x {product}, {price} dollars, for {name}.",
            f"Please send {quantity} {product}s to {name}. Price: {price}. Order: {order_id}.",
            f"Order number {order_id} by {name}: {product}, quantity {quantity}, price {price}.",
        )
    )
    return text, record


def _meeting(rng: random.Random) -> Record:
    """A meeting at a time and place."""
    month, day = rng.randint(1, 12), rng.randint(1, 28)
    date, time = (
        f"20{rng.randint(10, 39)}-{month:02}-{day:02}",
        f"{rng.randint(7, 20):02}:{rng.choice(('00', '15', '30', '45'))}",
    )
    title, city, person = (
        f"{rng.choice(('project', 'team', 'sales', 'budget', 'design'))} meeting",
        rng.choice(CITIES),
        _person_name(rng),
    )
    record = {"title": title, "date": date, "time": time, "city": city, "person": person}
    text = rng.choice(
        (
            f"The {title} is on {date} at {time} in {city} with {person}.",
            f"{person} invites you to the {title} in {city} on {date} at {time}.",
            f"On {date} at {time} there is a {title} in {city}, led by {person}.",
        )
    )
    return text, record


def _product(rng: random.Random) -> Record:
    """A thing for sale."""
    product, colour, price = rng.choice(PRODUCTS), rng.choice(CATEGORIES["colours"]), rng.randint(5, 2000)
    brand, stock = rng.choice(COMPANIES), rng.random() < 0.5
    record = {"product": product, "color": colour, "price": price, "brand": brand, "in_stock": stock}
    said = "is in stock" if stock else "is sold out"
    text = rng.choice(
        (
            f"The {colour} {product} by {brand} costs {price} dollars and {said}.",
            f"{brand} sells a {colour} {product} for {price} dollars. It {said}.",
            f"For sale: {colour} {product}, brand {brand}, price {price}. It {said}.",
        )
    )
    return text, record


_KINDS: tuple[Callable[[random.Random], Record], ...] = (_person, _person, _person, _order, _meeting, _product)
_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}


def _wanted(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A text and the part of its record that is asked for, in the order asked; what the text does not say is null."""
    text, record = rng.choice(_KINDS)(rng)
    fields = rng.sample(tuple(record), rng.randint(1, len(record)))
    if rng.random() < 0.5:
        fields = [field for field in record if field in fields]
    wanted = {field: record[field] for field in fields}
    if rng.random() < 0.1 and (
        absent := [f for f in ("age", "city", "email", "phone", "job", "date", "price") if f not in record]
    ):
        wanted[rng.choice(absent)] = None
    return text, wanted


def by_fields(rng: random.Random) -> Exchange:
    """`Extract name and age as JSON: ...`."""
    text, wanted = _wanted(rng)
    fields = list(wanted)
    named = fields[0] if len(fields) == 1 else ", ".join(fields[:-1]) + " and " + fields[-1]
    phrases = templates("extract_fields")
    return ask(rng, phrases, json.dumps(wanted), f=named, t=text)


def by_schema(rng: random.Random) -> Exchange:
    """A JSON schema and a text, in either order."""
    text, wanted = _wanted(rng)
    schema = _schema(rng, wanted)
    phrases = templates("extract_schema")
    return ask(rng, phrases, json.dumps(wanted), s=schema, t=text)


def by_system_schema(rng: random.Random) -> Conversation:
    """The schema or the fields in the system prompt, the bare text from the user."""
    text, wanted = _wanted(rng)
    if rng.random() < 0.5:
        phrases = templates("system_schema")
        system = dress(rng, rng.choice(phrases)).format(s=_schema(rng, wanted))
    else:
        phrases = templates("system_fields")
        system = dress(rng, rng.choice(phrases)).format(f=", ".join(wanted))
    messages = (
        {"role": "system", "content": system},
        {"role": "user", "content": text},
        {"role": "assistant", "content": json.dumps(wanted)},
    )
    return Conversation("extract_system", text, messages)


def as_list(rng: random.Random) -> Exchange:
    """The things of one kind that a text names, as a JSON array."""
    category = rng.choice(("fruits", "animals", "colours", "vegetables", "sports", "instruments", "tools", "cities"))
    chosen = rng.sample(CITIES if category == "cities" else CATEGORIES[category], rng.randint(2, 5))
    joined = ", ".join(chosen[:-1]) + " and " + chosen[-1]
    person = rng.choice(FIRST_NAMES)
    text = rng.choice(
        (
            f"{person} likes {joined}.",
            f"I talked with {person} about {joined}.",
            f"We saw {joined} today.",
            f"There were {joined} in the book.",
        )
    )
    phrases = templates("extract_list")
    return ask(rng, phrases, json.dumps(chosen), c=category, t=text)


def as_json(rng: random.Random) -> Exchange:
    """Pairs written plainly, turned into an object."""
    keys = rng.sample(
        (
            "name",
            "age",
            "city",
            "color",
            "id",
            "size",
            "title",
            "price",
            "code",
            "level",
            pseudo_word(rng),
            pseudo_word(rng),
        ),
        rng.randint(1, 5),
    )
    values: dict[str, Any] = {
        key: rng.choice((rng.randint(1, 9999), pseudo_word(rng), rng.choice(FIRST_NAMES), True, rng.choice(PRODUCTS)))
        for key in keys
    }
    glue, mark = rng.choice(((", ", " is "), (", ", "="), ("; ", ": "), (_LINE_BREAK, ": "), (", ", " = ")))
    pairs = glue.join(f"{key}{mark}{json.dumps(value) if value is True else value}" for key, value in values.items())
    phrases = templates("pairs_to_json")
    return ask(rng, phrases, json.dumps(values), p=pairs)


def _schema(rng: random.Random, wanted: dict[str, Any]) -> str:
    properties = {
        field: {"type": ["string", "null"] if value is None else "number" if field == "price" else _TYPES[type(value)]}
        for field, value in wanted.items()
    }
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if rng.random() < 0.6:
        schema["required"] = list(wanted)
    if rng.random() < 0.3:
        schema["additionalProperties"] = False
    return json.dumps(schema, indent=rng.choice((None, None, None, 2)))
