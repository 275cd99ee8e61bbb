"""Messages as templates get them: roles, parts, tool calls, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.text.test_prompt import encoder_of, user
from tests.text.vocabularies import byte_level
from text.errors import PromptError
from text.prompt import PromptEncoder


def shown(messages: list[dict[str, Any]], template: str, **arguments: Any) -> str:
    tokenizer = byte_level(template)
    encoder = PromptEncoder(tokenizer, max_model_len=1000)
    return str(tokenizer.decode(encoder.encode_chat(messages, **arguments)))


ROLES = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"


def test_a_developer_is_a_system_unless_the_template_knows_developers() -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert shown(messages, ROLES) == "system=x;"
    assert shown(messages, ROLES + "{% if messages[0].role == 'developer' %}!{% endif %}") == "developer=x;!"


def test_a_function_is_a_tool_where_the_template_knows_tools() -> None:
    messages = [{"role": "function", "name": "f", "content": "x"}]
    assert shown(messages, ROLES) == "function=x;"
    assert shown(messages, ROLES + "{% if messages[0].role == 'tool' %}!{% endif %}") == "tool=x;!"


def test_an_unknown_role_is_named() -> None:
    with pytest.raises(PromptError, match="'robot' is not one of") as caught:
        shown([*user("a"), {"role": "robot", "content": "x"}], ROLES)
    assert caught.value.param == "messages[1].role"


def test_parts_are_joined_as_they_are_and_null_is_empty() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}, {"type": "text", "text": " c"}]
    assert shown([{"role": "user", "content": parts}, {"role": "assistant", "content": None}], ROLES) == (
        "user=ab c;assistant=;"
    )


def test_a_part_that_is_no_text_is_named() -> None:
    part = {"type": "image_url", "image_url": {"url": "x"}}
    with pytest.raises(PromptError, match="'image_url' is not text") as caught:
        shown(user([{"type": "text", "text": "a"}, part]), ROLES)
    assert caught.value.param == "messages[0].content[1].type"


@pytest.mark.parametrize("content", [3, {"a": 1}, [{"type": "text"}], [{"type": "text", "text": 1}], [None]])
def test_content_of_another_shape_is_refused(content: Any) -> None:
    with pytest.raises(PromptError, match="content"):
        shown(user(content), ROLES)


def test_a_template_that_wants_parts_gets_parts() -> None:
    parts = "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}"
    assert shown(user("abc"), parts) == "[abc]"
    assert shown(user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), parts) == "[ab]"


def test_missing_content_is_none_where_the_template_asks_for_none() -> None:
    template = (
        "{% for m in messages %}{% if m['content'] is none %}none{% else %}{{ m.content }}{% endif %};{% endfor %}"
    )
    assert shown([*user("a"), {"role": "assistant", "content": None}], template) == "a;none;"


def test_arguments_of_a_tool_call_are_an_object_in_the_template() -> None:
    template = (
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.name }}:{{ c.function.arguments.city }}"
        "{% endfor %}{{ m.tool_call_id }}{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Köln"}'}}
    assistant = {"role": "assistant", "content": None, "tool_calls": [call]}
    answer = {"role": "tool", "tool_call_id": "call_1", "content": "x"}
    assert shown([*user("a"), assistant, answer], template) == "f:Kölncall_1"
    older = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"city": "Bonn"}'}}
    assert shown([*user("a"), older], template) == "f:Bonn"


@pytest.mark.parametrize("arguments", ["{", "[1]", "3", 7])
def test_arguments_that_are_no_json_object_are_refused(arguments: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(PromptError, match="arguments") as caught:
        shown([*user("a"), {"role": "assistant", "tool_calls": [call]}], ROLES)
    assert caught.value.param == "messages[1].tool_calls[0].function.arguments"


def test_empty_tool_calls_and_nulls_are_as_if_not_there() -> None:
    template = "{% for m in messages %}{{ 'tool_calls' in m }}{{ 'name' in m }}{% endfor %}"
    assert shown([{"role": "user", "content": "a", "tool_calls": [], "name": None}], template) == "FalseFalse"


def test_no_messages_are_refused() -> None:
    with pytest.raises(PromptError, match="at least one message"):
        encoder_of("byte-level").encode_chat([])


def test_the_messages_of_the_request_are_not_changed() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [*user([{"type": "text", "text": "a"}]), {"role": "assistant", "content": None, "tool_calls": [call]}]
    before = copy.deepcopy(messages)
    encoder_of("byte-level").encode_chat(messages)
    assert messages == before
