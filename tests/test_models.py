"""The wire models: strict, but open to fields they do not know."""

from __future__ import annotations

import json
import time
import tracemalloc
from typing import Any

import pytest
from openai.types import chat
from pydantic import ValidationError

from models import ChatCompletionRequest, CompletionRequest

HELLO = {"messages": [{"role": "user", "content": "Hi"}]}


def test_unknown_fields_are_kept_for_others_to_judge() -> None:
    body = ChatCompletionRequest.model_validate({**HELLO, "colour": 1})
    assert body.model_extra == {"colour": 1}


def test_messages_keep_fields_that_templates_may_know() -> None:
    message = {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [{"id": "c"}]}
    body = ChatCompletionRequest.model_validate({"messages": [message]})
    assert body.messages[0].model_dump(exclude_unset=True) == message


def test_every_message_that_openais_client_can_type_is_a_shape_of_ours() -> None:
    messages: list[chat.ChatCompletionMessageParam] = [
        {"role": "developer", "content": [{"type": "text", "text": "x"}]},
        {"role": "system", "content": "x", "name": "n"},
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {
            "role": "assistant",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "x", "tool_call_id": "c"},
        {"role": "function", "content": "x", "name": "f"},
    ]
    body = ChatCompletionRequest.model_validate_json(json.dumps({"messages": messages}))
    assert [message.model_dump(exclude_unset=True) for message in body.messages] == messages


@pytest.mark.parametrize("wrong", [["a", *range(500_000)], [1, *["a"] * 500_000], [[1], *["a"] * 500_000]])
def test_a_long_list_of_mistakes_costs_little(wrong: list[Any]) -> None:
    content = json.dumps({"prompt": wrong})
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(ValidationError) as caught:
            CompletionRequest.model_validate_json(content)
        assert time.perf_counter() - start < 2
        assert tracemalloc.get_traced_memory()[1] < 50 * len(content)
    finally:
        tracemalloc.stop()
    assert caught.value.error_count() == 1
