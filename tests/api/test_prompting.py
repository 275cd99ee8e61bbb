"""From prompts to ids that the model has embeddings for."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from api.prompting import chat_ids, completion_ids
from engine.errors import InvalidValue
from models import ChatCompletionRequest
from text.prompt import PromptEncoder


def _manager(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> Any:
    prompts = PromptEncoder(tokenizer, max_model_len=64)
    return SimpleNamespace(prompts=prompts, tokenizer=tokenizer, info=SimpleNamespace(vocab_size=vocab_size))


def test_a_token_that_the_model_does_not_know_is_refused_by_name(tokenizer: PreTrainedTokenizerFast) -> None:
    body = ChatCompletionRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "Hi"}]})
    whole = _manager(tokenizer, len(tokenizer))
    assert max(asyncio.run(chat_ids(whole, body, None))) >= 256  # the template's special tokens
    smaller = _manager(tokenizer, 256)
    with pytest.raises(InvalidValue, match=r"messages holds '<\|im_\w+\|>', token 25\d .* ids below 256"):
        asyncio.run(chat_ids(smaller, body, None))
    assert asyncio.run(completion_ids(smaller, ["Hi"], None)) == [[39, 72]]
