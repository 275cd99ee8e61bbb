"""Chat templates: what they are given, what they may do, and what becomes of those that fail."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from tests.text.test_messages import ROLES, shown
from tests.text.test_prompt import encoder_of, special_ids, user
from tests.text.vocabularies import CHATML, byte_level, sentencepiece
from text.errors import PromptError, TokenizerError
from text.prompt import PromptEncoder


def test_what_a_template_refuses_is_the_callers_to_mend() -> None:
    with pytest.raises(PromptError, match="roles must alternate") as caught:
        encoder_of("llama-first").encode_chat([*user("a"), *user("b")])
    assert caught.value.param == "messages"


@pytest.mark.parametrize("template", ["{{ messages[7].content }}", "{{ 1 + messages[0].content }}", "{{ x.y.z }}"])
def test_what_a_template_cannot_cope_with_is_no_fault_of_the_server(template: str) -> None:
    with pytest.raises(PromptError, match="chat template refuses"):
        shown(user("a"), template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({'role': 'x'}) }}",
        "{% for i in range(10000000) %}{% endfor %}",
    ],
)
def test_templates_run_in_a_sandbox(template: str) -> None:
    with pytest.raises(PromptError, match="chat template refuses"):
        shown(user("a"), template)


def test_a_template_that_is_no_jinja_is_an_error_of_the_model() -> None:
    with pytest.raises(TokenizerError, match="not valid"):
        PromptEncoder(byte_level("{% for %}"), max_model_len=10)


def test_the_last_message_can_be_left_open() -> None:
    messages = [*user("Hi"), {"role": "assistant", "content": "Sure: <|im_end|>"}]
    text = shown(messages, CHATML, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nSure: <|im_end|>")
    with pytest.raises(PromptError, match="add_generation_prompt") as caught:
        shown(messages, CHATML, continue_final_message=True)
    assert caught.value.param == "continue_final_message"


def test_the_models_turn_is_opened_only_when_asked_for() -> None:
    assert shown(user("Hi"), CHATML).endswith("<|im_start|>assistant\n")
    assert shown(user("Hi"), CHATML, add_generation_prompt=False).endswith("<|im_end|>\n")


def test_more_variables_reach_the_template_but_none_that_it_has_already() -> None:
    assert (
        shown(
            user("a"),
            "{{ thinking }}{{ documents[0].text }}",
            template_kwargs={
                "thinking": "on",
                "documents": [{"text": "<|im_end|>"}],
            },
        )
        == "on<|im_end|>"
    )
    for name in ("messages", "chat_template", "tools", "eos_token", "add_generation_prompt", "raise_exception"):
        with pytest.raises(PromptError, match=name) as caught:
            shown(user("a"), ROLES, template_kwargs={name: "x"})
        assert caught.value.param == "chat_template_kwargs"


def test_a_template_of_its_own_for_tools_is_used_with_tools() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = {"default": "plain", "tool_use": "{{ tools[0].function.name }}"}
    encoder = PromptEncoder(tokenizer, max_model_len=1000)
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert tokenizer.decode(encoder.encode_chat(user("a"), tools=tools)) == "f"
    assert tokenizer.decode(encoder.encode_chat(user("a"))) == "plain"


def test_a_model_without_a_template_gets_plain_lines(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = sentencepiece(None)
    with caplog.at_level(logging.WARNING):
        encoder = PromptEncoder(tokenizer, max_model_len=1000)
        assert not encoder.has_chat_template
        messages: list[dict[str, Any]] = [{"role": "system", "content": "Be kind."}, *user("Hi </s>")]
        token_ids = encoder.encode_chat(messages)
        encoder.encode_chat(messages)
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == "System: Be kind.\nUser: Hi </s>\nAssistant:"
    assert special_ids(tokenizer, token_ids) == [tokenizer.bos_token_id]
    assert len([record for record in caplog.records if "no chat template" in record.message]) == 1
    open_ids = encoder.encode_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert tokenizer.decode(open_ids, skip_special_tokens=True).endswith("User: Hi </s>")
    with pytest.raises(PromptError, match="no chat template"):
        encoder.encode_chat(messages, tools=[{"type": "function", "function": {"name": "f"}}])
