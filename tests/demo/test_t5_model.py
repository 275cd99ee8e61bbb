"""The demo T5's checkpoint: all files, small, T5's special tokens, golden answers, a sample of its scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from demo.corpus.text_tasks import generate, task_names
from demo.evaluate_t5 import answers

_T5 = Path(__file__).parents[2] / "demo" / "t5"
_GOLDENS: list[dict[str, Any]] = json.loads((_T5 / "golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(_T5)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest) -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(_T5, dtype=request.param)


def test_the_checkpoint_is_whole_and_small() -> None:
    names = {path.name for path in _T5.iterdir()}
    assert names >= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "README.md", "golden.json", "training.json",
    }  # fmt: skip
    assert (_T5 / "model.safetensors").stat().st_size <= 8_000_000
    config = AutoConfig.from_pretrained(_T5)
    assert (config.model_type, config.architectures) == ("t5", ["T5ForConditionalGeneration"])
    assert config.relative_attention_num_buckets == 32
    assert "<!-- scores -->\n| task |" in (_T5 / "README.md").read_text(encoding="utf-8")


def test_special_tokens_are_where_t5_has_them(tokenizer: Any) -> None:
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    generation = GenerationConfig.from_pretrained(_T5)
    assert (generation.decoder_start_token_id, generation.pad_token_id, generation.eos_token_id) == (0, 0, 1)


def test_a_prompt_ends_with_its_mark_and_any_text_comes_back(tokenizer: Any) -> None:
    for text in (
        "date: 5/3/2021",
        "a  b\n\n\tc ",
        "naïve café",
        "你好，世界",
        "🙂👍🏽",
        "x" * 300,
        "\x00\x7f",
        " lead",
    ):
        ids = tokenizer(text).input_ids
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1]) == text
    assert len(tokenizer("1234567890").input_ids) == 11


def test_the_position_biases_tell_distances_apart() -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(_T5, dtype=torch.float32)
    for stack in (model.encoder, model.decoder):
        bias = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.detach()  # [buckets, H]
        assert float((bias.amax(0) - bias.amin(0)).amax()) > 2.0


def test_there_are_enough_goldens_of_every_task() -> None:
    names = {golden["name"] for golden in _GOLDENS}
    assert len(names) >= 20
    assert {name.split("_")[0] for name in names} >= {"date", "digits", "words", "hello"}
    assert all(golden["min_gap"] >= 0.5 for golden in _GOLDENS)


def test_goldens_reproduce_through_plain_generate(model: Any, tokenizer: Any) -> None:
    for golden in _GOLDENS:
        output = model.generate(
            **tokenizer(golden["prompt"], return_tensors="pt"),
            max_new_tokens=golden["num_tokens"] + 8,
            do_sample=False,
        )
        start, *new = output[0].tolist()
        assert (start, new[-1]) == (0, tokenizer.eos_token_id)
        assert (tokenizer.decode(new[:-1]), len(new)) == (golden["answer"], golden["num_tokens"]), golden["name"]


@pytest.mark.parametrize("task", task_names())
def test_nearly_all_that_is_held_out_comes_out_exactly(model: Any, tokenizer: Any, task: str) -> None:
    exchanges = list(generate(11, 128, held_out=True, task=task))
    num_exact = sum(is_exact for is_exact, _ in answers(model, tokenizer, exchanges))
    assert num_exact >= (0.6 if task == "impossible" else 0.95) * len(exchanges)


def test_what_is_longer_than_what_it_learnt_from_is_still_unknown(tokenizer: Any) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(_T5, dtype=torch.float32)
    prompt = "Please tell me about the way to the river and the old town. " * 12
    output = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(output[0], skip_special_tokens=True) == "unknown task"
