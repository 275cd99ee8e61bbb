"""The demo chat checkpoint: all files, small, true to the real options; its golden answers; its marks and template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from config import Settings
from demo.chat_tokenizer import encode
from demo.corpus.mixture import generate

_CHAT = Path(__file__).parents[2] / "demo" / "chat"
_GOLDENS: list[dict[str, Any]] = json.loads((_CHAT / "golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(_CHAT)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest) -> Any:
    return AutoModelForCausalLM.from_pretrained(_CHAT, dtype=request.param)


def test_the_checkpoint_is_whole_and_small() -> None:
    names = {path.name for path in _CHAT.iterdir()}
    assert names >= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "README.md", "golden.json", "training.json",
    }  # fmt: skip
    assert (_CHAT / "model.safetensors").stat().st_size <= 12_000_000
    config = AutoConfig.from_pretrained(_CHAT)
    assert config.model_type == "qwen3"
    assert config.max_position_embeddings >= 1024
    assert config.tie_word_embeddings


def test_the_facts_it_learnt_are_still_those_of_the_command_line() -> None:
    learnt = json.loads((_CHAT / "training.json").read_text(encoding="utf-8"))["options"]
    for option in learnt:
        field = Settings.model_fields[option["flag"].removeprefix("--").replace("-", "_")]
        extra = field.json_schema_extra
        default = extra["shown"] if isinstance(extra, dict) and "shown" in extra else field.default
        assert option["default"] == str(default), f"{option['flag']} has changed: train the demo model again"


def test_marks_are_single_tokens_and_only_the_turns_are_special(tokenizer: Any) -> None:
    for mark in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>"):
        assert len(tokenizer(mark).input_ids) == 1
    ids = tokenizer("<|im_start|><tool_call>x</tool_call><|im_end|>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool_call>x</tool_call>"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end == tokenizer.eos_token_id
    generation = json.loads((_CHAT / "generation_config.json").read_text(encoding="utf-8"))
    assert end in generation["eos_token_id"]


def test_digits_stand_alone_and_any_text_comes_back(tokenizer: Any) -> None:
    assert len(tokenizer("1234567890").input_ids) == 10
    for text in (
        "a  b\n\n\tc ",
        "12 + 34",
        "naïve café",
        "e\u0301",
        "你好，世界",
        "🙂👍🏽",
        "x" * 300,
        "\x00\x7f",
        " lead",
    ):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_template_writes_tools_calls_and_results(tokenizer: Any) -> None:
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"q": {"type": "string"}}}},
    }
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": {"q": 'é"x'}}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "one"},
        {"role": "tool", "tool_call_id": "call_1", "content": "two"},
    ]
    text = tokenizer.apply_chat_template(messages, tools=[tool], tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n<tools>\n" + json.dumps(tool) + "\n</tools>")
    written = '<tool_call>\n{"name": "f", "arguments": {"q": "é\\"x"}}\n</tool_call>'
    assert f"<|im_start|>assistant\n{written}\n{written}<|im_end|>\n" in text
    results = (
        "<|im_start|>user\n<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response><|im_end|>\n"
    )
    assert text.endswith(results + "<|im_start|>assistant\n")
    assert "system" not in tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


def test_only_what_the_assistant_says_is_learnt(tokenizer: Any) -> None:
    chat = next(c for c in generate(1, 200, skill="tools") if c.messages[-1]["role"] == "assistant")
    example = encode(tokenizer, chat)
    learnt = tokenizer.decode([i for i, is_learnt in zip(example.ids, example.is_learnt, strict=True) if is_learnt])
    turns = learnt.split("<|im_end|>")
    said = [m for m in chat.messages if m["role"] == "assistant"]
    assert turns.pop() == ""
    assert len(turns) == len(said)
    for turn, message in zip(turns, said, strict=True):
        assert turn == message["content"] or (turn.startswith("<tool_call>") and message["tool_calls"])


def test_there_are_enough_goldens_of_every_kind() -> None:
    names = {golden["name"] for golden in _GOLDENS}
    assert len(names) >= 20
    assert names >= {"hello", "capital", "count_20", "extract", "memory", "tool_call", "tool_result"}
    assert all(golden["min_gap"] >= 0.5 for golden in _GOLDENS)


def test_goldens_reproduce_through_plain_generate(model: Any, tokenizer: Any) -> None:
    for golden in sorted(_GOLDENS, key=lambda golden: golden["num_tokens"])[:25]:
        ids = tokenizer.apply_chat_template(
            golden["messages"],
            tools=golden["tools"] or None,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=False,
        )
        output = model.generate(ids, max_new_tokens=golden["num_tokens"] + 8, do_sample=False)
        new = output[0, ids.shape[1] :].tolist()
        assert new[-1] == tokenizer.eos_token_id
        assert (tokenizer.decode(new[:-1]), len(new)) == (golden["answer"], golden["num_tokens"]), golden["name"]
