"""Chats with the answer that is expected of the demo model: what tests of the server can rely on.

Knows nothing of the model; whether it answers so, and how surely, is for evaluate_chat.py to find out.
Called by evaluate_chat.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from demo.corpus.conversation import Message
from demo.corpus.texts import read


def _tool(name: str, description: str, **types: str) -> Message:
    """A tool whose arguments, name=type, are all required."""
    properties = {name: {"type": type_} for name, type_ in types.items()}
    parameters = {"type": "object", "properties": properties, "required": list(types)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


@dataclass(frozen=True, slots=True)
class Golden:
    """A name for tests, the chat, and the answer hoped for, as the model writes it."""

    name: str
    messages: tuple[Message, ...]
    answer: str
    tools: tuple[Message, ...] = ()


def goldens() -> Iterator[Golden]:
    """All of them, single questions first."""
    for name, said in read("golden").items():
        yield Golden(name, (_user(said["prompt"]),), said["answer"])
    weather = _tool("get_weather", "Get the weather of a city", city="string")
    add = _tool("add", "Add two numbers", a="number", b="number")
    helpful: Message = {"role": "system", "content": "You are a helpful assistant."}
    yield Golden("hello_system", (helpful, _user("Hello! How are you?")), "I am fine, thank you! How can I help you?")
    yield Golden(
        "own_name",
        ({"role": "system", "content": "You are Clara, a helpful assistant."}, _user("What is your name?")),
        "My name is Clara.",
    )
    told = (_user("Hi! My name is Nadia."), _assistant("Nice to meet you, Nadia!"))
    yield Golden("told_name", told[:1], "Nice to meet you, Nadia!")
    yield Golden("memory", (*told, _user("What is my name?")), "Your name is Nadia.")
    between = (_user("Spell cat."), _assistant("c-a-t"))
    yield Golden("memory_later", (*told, *between, _user("What is my name?")), "Your name is Nadia.")
    asked = _user("What is the weather in Paris?")
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    yield Golden("tool_call", (asked,), call, (weather,))
    yield Golden("tool_choice", (asked,), call, (add, weather))
    added = '<tool_call>\n{"name": "add", "arguments": {"a": 512, "b": 77}}\n</tool_call>'
    yield Golden("tool_numbers", (_user("Add 512 and 77."),), added, (add, weather))
    yield Golden("tool_none", (_user("Hello!"),), "Hello! How can I help you?", (weather,))
    called: dict[str, Any] = {"name": "get_weather", "arguments": {"city": "Paris"}}
    history = (
        asked,
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": called}]},
        {"role": "tool", "content": '{"temperature": 21, "condition": "sunny"}'},
    )
    yield Golden("tool_result", history, "In Paris it is 21 degrees and sunny.", (weather,))


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}
