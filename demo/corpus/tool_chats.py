"""Chats with tools in them: one call, two at once, none, a result put into words, an error passed on.

Knows nothing of how a template writes a call.
Called by mixture.py.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from demo.corpus.conversation import Conversation, Exchange, Message
from demo.corpus.memory import as_messages
from demo.corpus.phrasing import dress
from demo.corpus.tool_catalog import Tool, invented, known, value_of


@dataclass(frozen=True, slots=True)
class _Offer:
    """A tool with its names chosen for one chat."""

    tool: Tool
    name: str
    argument_names: tuple[str, ...]
    schema: Message


def _offer(rng: random.Random, tool: Tool) -> _Offer:
    name = rng.choice(tool.names)
    names = tuple(rng.choice(parameter.names) for parameter in tool.parameters)
    if len(set(names)) < len(names):
        names = tuple(parameter.names[0] for parameter in tool.parameters)
    properties: dict[str, Any] = {n: {"type": p.type} for n, p in zip(names, tool.parameters, strict=True)}
    if rng.random() < 0.4:
        for n in names:
            properties[n]["description"] = f"the {n.replace('_', ' ')}"
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if rng.random() < 0.8:
        parameters["required"] = list(names)
    function: dict[str, Any] = {"name": name, "description": rng.choice(tool.descriptions), "parameters": parameters}
    if rng.random() < 0.1:
        del function["description"]
    return _Offer(tool, name, names, {"type": "function", "function": function})


def tool_chat(rng: random.Random, other: Exchange) -> Conversation:
    """One chat with one to four tools; `other` is asked when no tool fits."""
    offers: list[_Offer] = []
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        offer = _offer(rng, rng.choice(known()) if rng.random() < 0.55 else invented(rng))
        if all(offer.tool.requests[0] != o.tool.requests[0] and offer.name != o.name for o in offers):
            offers.append(offer)
    schemas = tuple(offer.schema for offer in offers)
    if rng.random() < 0.15:
        return Conversation("tool_none", other.key + offers[0].name, as_messages([other]), schemas)
    messages, key = _called(rng, rng.choice(offers))
    if rng.random() < 0.15:
        second, _ = _called(rng, rng.choice(offers))
        messages += second
    elif rng.random() < 0.15:
        messages += list(as_messages([other]))
    return Conversation("tools", key, tuple(messages), schemas)


def _called(rng: random.Random, offer: _Offer) -> tuple[list[Message], str]:
    """A request, its call or calls, their results, the answer in words."""
    tool = offer.tool
    num_calls = 2 if len(tool.parameters) == 1 and rng.random() < 0.12 else 1
    values = [[value_of(rng, p.kind) for p in tool.parameters] for _ in range(num_calls)]
    template = rng.choice(tool.requests)
    first = [f"{a} and {b}" if num_calls == 2 else str(a) for a, b in zip(values[0], values[-1], strict=True)]
    prompt = dress(rng, template).format(*first)
    calls = [_call(offer, arguments) for arguments in values]
    messages: list[Message] = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    said = []
    for arguments in values:
        result, answer = _result(rng, offer, arguments)
        messages.append({"role": "tool", "content": result})
        said.append(answer)
    messages.append({"role": "assistant", "content": " ".join(said)})
    return messages, template.format(*first)


def _call(offer: _Offer, values: list[Any]) -> Message:
    arguments = dict(zip(offer.argument_names, values, strict=True))
    return {"type": "function", "function": {"name": offer.name, "arguments": arguments}}


def _result(rng: random.Random, offer: _Offer, values: list[Any]) -> tuple[str, str]:
    """What the tool returned, and what the model says of it."""
    roll = rng.random()
    if roll < 0.08:
        reason = value_of(rng, "words")
        return json.dumps({"error": reason}), f"The tool {offer.name} failed: {reason}."
    if roll < 0.3:
        text = str(value_of(rng, rng.choice(("words", "number", "sky", "state", "time"))))
        return text, f"The tool {offer.name} says: {text}"
    results = {key: value_of(rng, kind) for key, kind in offer.tool.results.items()}
    return json.dumps(results), offer.tool.reply.format(*values, **results)
