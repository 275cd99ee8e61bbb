"""Beam search over HTTP: generate's sequences, for decoders and encoder-decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from tests import zoo_seq2seq
from tests.e2e.serving_tiny import TinyServer, serve, serve_tiny, utf8_tokenizer
from tests.engine.harness import tiny_model
from tests.zoo import prompt

NUM_TOKENS = 12


def expected(model: Any, ids: list[int], num_prompt: int, **options: Any) -> list[list[int]]:
    output = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        num_return_sequences=options["num_beams"],
        **options,
    )
    return [row[num_prompt:] for row in output.tolist()]


def ask(server: TinyServer, ids: list[int], **fields: Any) -> list[list[int]]:
    with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
        answer = client.completions.create(
            model="model",
            prompt=ids,
            max_tokens=NUM_TOKENS,
            n=fields["num_beams"],
            extra_body={"return_token_ids": True, "ignore_eos": True, **fields},
        )
    return [list(choice.token_ids) for choice in answer.choices]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_a_decoder_gives_generates_sequences(name: str, checkpoints: Path) -> None:
    with serve_tiny(name, checkpoints) as server:
        for seed, length in enumerate((3, 40)):
            ids = prompt(length, seed=seed)
            for options in ({"num_beams": 2}, {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True}):
                assert ask(server, ids, **options) == expected(tiny_model(name), ids, length, **options)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_gives_generates_sequences(name: str, tmp_path: Path) -> None:
    model = zoo_seq2seq.make(name)
    model.save_pretrained(tmp_path)
    utf8_tokenizer().save_pretrained(tmp_path)
    with serve(str(tmp_path), max_model_len=128) as server:
        for seed, length in enumerate((5, 30)):
            ids = prompt(length, seed=seed)
            assert ask(server, ids, num_beams=3) == expected(model, ids, 1, num_beams=3)
