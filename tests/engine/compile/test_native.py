"""Compiled code calls our own kernels itself: packed and int4 weights, a tied head and attention, nothing of Python."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from engine.build import build_engine
from engine.compile import steps as steps_module
from engine.compile.compiler import Compiler
from engine.config import CompileConfig, EngineConfig
from engine.engine import Engine
from engine.model import operators
from engine.model.int4 import native
from engine.model.int4.hqq import solve
from engine.model.int4.linear import Int4Linear
from engine.model.int4.native import NativeInt4
from engine.model.int4.packed import Scratch
from engine.model.linear import packed_form
from engine.model.loader import describe
from engine.model.native_kernels import NativeKernels
from engine.model.native_linear import NativeLinear
from tests import zoo
from tests.engine.compile.inline import compile_inline, quick, settle
from tests.engine.harness import drive, greedy, tokens
from tests.int4_weights import CAN_COMPILE, native_kernels

pytestmark = pytest.mark.skipif(not CAN_COMPILE, reason="no compiler, or no AVX512-BF16")

CPU = torch.device("cpu")


def make_model() -> Any:
    """A llama of packed weights, but for those that are int4 and a head that shares the embedding's."""
    config = LlamaConfig(
        vocab_size=zoo.VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
        **zoo.SPECIAL_TOKEN_IDS,
    )  # fmt: skip
    model = zoo.instantiate(config).to(torch.bfloat16)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, native_form(name, child))
    return model


def native_form(name: str, module: nn.Linear) -> nn.Module:
    kernels = native_kernels()
    if name == "lm_head":
        return NativeLinear(nn.Parameter(module.weight, requires_grad=False), kernels)
    if name in ("gate_proj", "down_proj"):
        weight = NativeInt4.with_kernels(kernels)(solve(module.weight.detach().float(), 32))
        return Int4Linear(weight, module.bias, scratch=Scratch(), min_dense_rows=None, device=CPU)
    packed = packed_form(module)
    packed.use_native(kernels, 2)  # and larger buckets by oneDNN
    return packed


def engine_of(model: Any, **more: Any) -> Engine:
    return build_engine(describe(model), EngineConfig(4, 256, 128, **more), lambda _what, _share: None)


def refuse(*_: object, **__: object) -> Any:
    raise AssertionError("a kernel or a twin was called through Python")


def test_graphs_of_all_kernels_compute_what_the_eager_step_does(tmp_path: Path) -> None:
    engine = engine_of(make_model())
    compile_inline(engine, tmp_path, (1, 4))  # for one row all kernels, for four packed weights by oneDNN
    settle(engine, 2)
    assert engine.stats().compiled_batch_sizes == (1, 4)


def test_eager_steps_attend_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(make_model())
    calls: list[tuple[int, int]] = []
    attend = NativeKernels.attend_slots

    def counted(self: NativeKernels, query: torch.Tensor, *more: Any) -> torch.Tensor:
        calls.append((query.shape[2], more[3]))
        return attend(self, query, *more)

    monkeypatch.setattr(NativeKernels, "attend_slots", counted)
    drive(engine, [greedy(0, zoo.prompt(5), 3)])
    assert calls == [(5, 0), (5, 1), *[(1, 0), (1, 1)] * 2]  # of three tokens the first comes from the prompt


def test_compiled_code_calls_the_kernels_without_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps_module, "time_run", quick)
    monkeypatch.setattr(steps_module, "Compiler", partial(Compiler, niceness=0))
    engine = engine_of(make_model(), compile=CompileConfig(tmp_path, sizes=(2,)))
    settle(engine, 1)
    assert engine.stats().compiled_batch_sizes == (2,)  # the trial has found the eager step's logits
    for number in range(2):
        engine.add(greedy(number, zoo.prompt(5 + number), 6))
    outputs = engine.step()  # the prompts
    for name in ("packed_multiply", "int4_multiply", "bf16_multiply", "attend_slots"):
        monkeypatch.setattr(NativeKernels, name, refuse)
    monkeypatch.setattr(operators, "_attend", refuse)
    monkeypatch.setattr("torch.nn.functional.linear", refuse)
    monkeypatch.setattr(native, "dequantise", refuse)
    while engine.has_work():
        outputs += engine.step()
    assert engine.stats().compiled_batch_sizes == (2,)
    for number in range(2):
        assert len(tokens([output for output in outputs if output.sequence_id == number])) == 6
