"""With attention by our own kernels every lane gives the tokens of generate() too, whatever shares the batch."""

from __future__ import annotations

from typing import Any

import pytest

from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.model.loader import describe
from engine.model.native_kernels import NativeKernels
from tests import zoo, zoo_seq2seq
from tests.engine.harness import drive, greedy, reference, tiny_model, tokens
from tests.engine.test_exact_seq2seq import generate_speech, model_of, sequence, speech, text
from tests.int4_weights import CAN_COMPILE, native_kernels

pytestmark = pytest.mark.skipif(not CAN_COMPILE, reason="no compiler, or no AVX512-BF16")

LENGTHS = (5, 40, 90, 3, 70, 1, 64, 33)
NUM_TOKENS = 20


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each kind of attention was asked of the kernels."""
    counts = {"attend_slots": 0, "attend_sources": 0}

    def counted(name: str) -> Any:
        attend = getattr(NativeKernels, name)

        def call(self: NativeKernels, *arguments: Any) -> Any:
            counts[name] += 1
            return attend(self, *arguments)

        return call

    for name in counts:
        monkeypatch.setattr(NativeKernels, name, counted(name))
    return counts


def engine_of(model: Any, **limits: Any) -> Engine:
    """An engine whose model has kernels, in float32: layers that bring them are packed bfloat16 ones."""
    model.native_kernels = native_kernels()
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    decoder.native_kernels = native_kernels()
    return build_engine(describe(model), EngineConfig(max_num_seqs=8, **limits), lambda _what, _share: None)


@pytest.mark.parametrize("max_batch_tokens", [512, 12])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "gpt_oss", "qwen3_moe", "opt"])
def test_decoders_give_the_tokens_of_generate(name: str, max_batch_tokens: int, calls: dict[str, int]) -> None:
    prompts = [zoo.prompt(length, seed=number) for number, length in enumerate(LENGTHS)]
    expected = [reference(name, prompt, NUM_TOKENS) for prompt in prompts]
    engine = engine_of(tiny_model(name), max_batch_tokens=max_batch_tokens, max_model_len=256)
    assert engine.lane.name == "flat", engine.lane.reason
    for _ in range(2):  # the second time with every prefix computed
        outputs = drive(engine, [greedy(n, prompt, NUM_TOKENS) for n, prompt in enumerate(prompts)])
        assert [tokens(outputs[n]) for n in range(8)] == expected
    assert calls["attend_slots"] > 0


@pytest.mark.parametrize("name", ["t5", "bart", "t5gemma"])
def test_encoder_decoders_give_the_tokens_of_generate(name: str, calls: dict[str, int]) -> None:
    sources = [zoo.prompt(length, seed=number) for number, length in enumerate(LENGTHS)]
    expected = [zoo_seq2seq.generate(model_of(name), ids, 28) for ids in sources]
    engine = engine_of(model_of(name), max_batch_tokens=256, max_model_len=128, max_source_len=128)
    assert engine.lane.name == "seq2seq", engine.lane.reason
    outputs = drive(engine, [sequence(n, text(ids)) for n, ids in enumerate(sources)], stagger=3)
    assert [tokens(outputs[n]) for n in range(len(sources))] == expected
    assert (calls["attend_sources"] > 0) == (name != "t5gemma")  # whose scores have a softcap
    assert (calls["attend_slots"] > 0) == (name != "t5")  # whose own attention has a bias


@pytest.mark.parametrize("max_batch_tokens", [256, 8])
def test_whisper_gives_the_tokens_of_generate(max_batch_tokens: int, calls: dict[str, int]) -> None:
    prompts = [zoo.prompt(length, seed=length) for length in (1, 4, 30, 2, 11)]
    expected = [generate_speech(model_of("whisper"), n, ids, 28) for n, ids in enumerate(prompts)]
    engine = engine_of(model_of("whisper"), max_batch_tokens=max_batch_tokens, max_model_len=128, max_source_len=128)
    assert engine.lane.name == "seq2seq", engine.lane.reason
    outputs = drive(engine, [sequence(n, speech(n), ids) for n, ids in enumerate(prompts)], stagger=3)
    assert [tokens(outputs[n]) for n in range(len(prompts))] == expected
    assert calls["attend_slots"] > 0 and calls["attend_sources"] > 0
