"""Brings the messages of a request into the shape that chat templates read.

Knows nothing of tokens; what the template at hand understands is told by TemplateTraits.
Called by prompt.py before a template is rendered.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from text.errors import PromptError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """What a chat template understands.

    Args:
        knows_developer: it has a developer role of its own; else developer becomes system.
        knows_tool: it has a tool role; the older role `function` then becomes tool.
        wants_parts: content must be a list of parts; else a string.
        tests_none: it asks whether content is none; else missing content is an empty string.
    """

    knows_developer: bool = False
    knows_tool: bool = False
    wants_parts: bool = False
    tests_none: bool = False


def normalize_messages(messages: list[dict[str, Any]], traits: TemplateTraits) -> list[dict[str, Any]]:
    """New messages for the template: roles, content, tool calls.

    Args:
        messages: as on the wire; not changed.
        traits: of the template.
    Raises:
        PromptError: no messages, an unknown role, a part that is no text, arguments that are no JSON object.
    """
    if not messages:
        raise PromptError("messages must hold at least one message", "messages")
    return [_normalize(message, f"messages[{index}]", traits) for index, message in enumerate(messages)]


def _normalize(message: dict[str, Any], param: str, traits: TemplateTraits) -> dict[str, Any]:
    # Templates test whether a key is there; a null is how clients say that it is not.
    result = {key: value for key, value in message.items() if value is not None}
    result["role"] = _role(message.get("role"), f"{param}.role", traits)
    if "function_call" in result:
        result.setdefault("tool_calls", [{"type": "function", "function": result["function_call"]}])
        del result["function_call"]
    calls = result.pop("tool_calls", None)
    if calls:
        result["tool_calls"] = [
            _normalize_call(call, f"{param}.tool_calls[{index}]") for index, call in enumerate(calls)
        ]
    content = flatten_content(message.get("content"), f"{param}.content")
    if content is None:
        content = result.pop("refusal", None)
    if traits.wants_parts:
        result["content"] = [] if content is None else [{"type": "text", "text": content}]
    elif content is None and not traits.tests_none:
        result["content"] = ""
    else:
        result["content"] = content
    return result


def _role(role: Any, param: str, traits: TemplateTraits) -> str:
    if role not in ROLES:
        raise PromptError(f"role {role!r} is not one of {', '.join(ROLES)}", param)
    if role == "developer" and not traits.knows_developer:
        return "system"
    if role == "function" and traits.knows_tool:
        return "tool"
    return str(role)


def flatten_content(content: Any, param: str) -> str | None:
    """Content as one string: parts of text are joined as they are, with nothing between them.

    Raises:
        PromptError: it is neither a string nor parts of text.
    """
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise PromptError("content must be a string, null or a list of parts", param)
    return "".join(_part_text(part, f"{param}[{index}]") for index, part in enumerate(content))


def _part_text(part: Any, param: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "refusal"):
        raise PromptError(f"content part of type {kind!r} is not text, and this model takes only text", f"{param}.type")
    text = part.get(kind)
    if not isinstance(text, str):
        raise PromptError(f"content part of type {kind!r} must hold its text under {kind!r}", f"{param}.{kind}")
    return text


def _normalize_call(call: Any, param: str) -> dict[str, Any]:
    """A tool call with its arguments as an object, which is what templates iterate over or print as JSON."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise PromptError("a tool call must hold a function with a name", f"{param}.function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise PromptError(f"arguments are not JSON: {error}", f"{param}.function.arguments") from error
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise PromptError("arguments must be a JSON object", f"{param}.function.arguments")
    kept = {key: value for key, value in call.items() if value is not None}
    return {**kept, "function": {**function, "arguments": arguments}}
