"""On a CUDA device, both lanes give the tokens of generate() there, chunked, preempted and with prefix reuse.

float32 without TF32, so that the order of operations is all that differs between the two.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.model.loader import describe
from tests import zoo
from tests.engine.harness import drive, greedy, tiny_model, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

LENGTHS = (5, 40, 90, 3, 70, 1, 64, 33)


def _prompts() -> list[list[int]]:
    return [zoo.prompt(length, seed=number) for number, length in enumerate(LENGTHS)]


def _reference(name: str, prompt: list[int]) -> list[int]:
    input_ids = torch.tensor([prompt], device="cuda")
    output = tiny_model(name).cuda().generate(input_ids, do_sample=False, max_new_tokens=20)
    ids: list[int] = output[0, len(prompt) :].tolist()
    return ids


def _engine(name: str, **limits: Any) -> Engine:
    config = EngineConfig(**{"max_num_seqs": 8, "max_batch_tokens": 256, "max_model_len": 256, **limits})
    return build_engine(describe(tiny_model(name).cuda()), config, lambda _what, _share: None)


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "gemma2", "gemma3_text", "gpt_oss", "deepseek_v3", "gpt2", "bloom"]
)
@pytest.mark.parametrize("max_batch_tokens", [256, 12])
def test_tokens_are_those_of_generate(name: str, max_batch_tokens: int) -> None:
    expected = [_reference(name, prompt) for prompt in _prompts()]
    engine = _engine(name, max_batch_tokens=max_batch_tokens)
    for _ in range(2):  # the second time with every prefix computed
        outputs = drive(engine, [greedy(n, prompt, 20) for n, prompt in enumerate(_prompts())])
        assert [tokens(outputs[n]) for n in range(len(LENGTHS))] == expected
