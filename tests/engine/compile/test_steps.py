"""Compiled steps give the eager ones' tokens, and whatever is wrong with them the server goes on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine.build import build_engine
from engine.compile.steps import CompiledSteps, bucket_sizes
from engine.compile.tried import Call
from engine.config import CompileConfig, EngineConfig
from engine.engine import Engine
from engine.model.linear import packed_form
from engine.model.loader import describe
from engine.model.packed_linear import PackedLinear
from engine.model.paged_attention import attend_blocks
from engine.model.paged_runner import PagedRunner
from tests import zoo, zoo_seq2seq
from tests.engine import test_exact_seq2seq as seq2seq
from tests.engine.compile.inline import compile_inline, settle
from tests.engine.harness import drive, engine_for, greedy, reference, tiny_model, tokens

LENGTHS = (5, 40, 9, 3, 21)
NUM_TOKENS = 20


def counted(calls: list[int]) -> Any:
    def change(call: Call) -> Call:
        def counting(values: list[torch.Tensor]) -> Any:
            calls.append(values[-1].shape[1])
            return call(values)

        return counting

    return change


def test_buckets_are_powers_of_two_and_the_most() -> None:
    assert [bucket_sizes(n) for n in (1, 2, 3, 20)] == [(1,), (1, 2), (1, 2, 3), (1, 2, 4, 8, 16, 20)]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt_oss", "deepseek_v3"])
def test_a_causal_lm_gives_the_tokens_of_generate_as_sequences_come_and_go(name: str, tmp_path: Path) -> None:
    check_compiled(name, engine_for(name, max_num_seqs=4), tmp_path)


@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_steps_over_pages_are_compiled_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.build.kernel_for", lambda _device: attend_blocks)
    engine = engine_for(name, max_num_seqs=4)
    assert isinstance(engine.runner, PagedRunner)
    check_compiled(name, engine, tmp_path)


def check_compiled(name: str, engine: Engine, directory: Path) -> None:
    """Steps of one and of four rows are compiled, serve, and give the tokens of generate."""
    prompts = [zoo.prompt(length, seed=length) for length in LENGTHS]
    expected = [reference(name, prompt, NUM_TOKENS) for prompt in prompts]
    calls: list[int] = []
    compile_inline(engine, directory, (1, 4), change=counted(calls))
    settle(engine, 2)
    assert engine.stats().compiled_batch_sizes == (1, 4)
    calls.clear()
    outputs = drive(engine, [greedy(n, prompt, NUM_TOKENS) for n, prompt in enumerate(prompts)])
    assert [tokens(outputs[n]) for n in range(len(prompts))] == expected
    assert {1, 4} == set(calls)


@pytest.mark.parametrize("name", ["t5", "umt5", "bart", "whisper"])
def test_a_decoder_gives_the_tokens_of_generate_as_sequences_come_and_go(name: str, tmp_path: Path) -> None:
    is_speech = name == "whisper"
    ids = seq2seq.sources()[:5]
    sources = [seq2seq.speech(n) if is_speech else seq2seq.text(found) for n, found in enumerate(ids)]
    model = seq2seq.model_of(name)
    start = [zoo_seq2seq.START_ID]
    expected = [
        seq2seq.generate_speech(model, n, start, seq2seq.NUM_TOKENS)
        if is_speech
        else zoo_seq2seq.generate(seq2seq.model_of(name), found, seq2seq.NUM_TOKENS)
        for n, found in enumerate(ids)
    ]
    engine = seq2seq.engine_of(name, max_num_seqs=4)
    calls: list[int] = []
    compile_inline(engine, tmp_path, (4,), change=counted(calls))
    settle(engine, 1)
    calls.clear()
    outputs = drive(engine, [seq2seq.sequence(n, source) for n, source in enumerate(sources)], stagger=3)
    assert [tokens(outputs[n]) for n in range(5)] == expected
    assert len(calls) > seq2seq.NUM_TOKENS


def test_packed_linears_stay_packed_and_outside_of_the_graph(tmp_path: Path) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, packed_form(child))
    engine = build_engine(describe(model), EngineConfig(4, 256, 128), lambda _what, _share: None)
    compile_inline(engine, tmp_path, (2,))
    settle(engine, 1)
    assert engine.stats().compiled_batch_sizes == (2,)
    drive(engine, [greedy(0, zoo.prompt(5), 6), greedy(1, zoo.prompt(9), 6)])
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert packed and all(module._packed is not None for module in packed)


def small_engine() -> tuple[Engine, list[int]]:
    return engine_for("llama", max_num_seqs=2), reference("llama", zoo.prompt(5), NUM_TOKENS)


def generated(engine: Engine) -> list[int]:
    return tokens(drive(engine, [greedy(0, zoo.prompt(5), NUM_TOKENS)])[0])


def test_code_that_computes_something_else_never_serves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine, expected = small_engine()
    steps = compile_inline(engine, tmp_path, (1,), change=lambda call: lambda values: [call(values)[0] * 1.1])
    settle(engine, 1)
    assert steps.sizes == () and generated(engine) == expected
    # Found on disk, it was compiled once more before it was given up.
    assert steps._compiler.requested == [1, 1]  # type: ignore[attr-defined]
    assert "stay eager" in caplog.text


def test_code_that_cannot_be_loaded_never_serves(tmp_path: Path) -> None:
    def load(_: Any) -> Call:
        raise RuntimeError("truncated")

    engine, expected = small_engine()
    steps = compile_inline(engine, tmp_path, (1,), load=load)
    settle(engine, 1)
    assert steps.sizes == () and generated(engine) == expected


def test_code_that_is_slower_never_serves(tmp_path: Path) -> None:
    engine, expected = small_engine()
    steps = compile_inline(engine, tmp_path, (1,), measure=lambda program, _: float(program is not steps_of(engine)))
    settle(engine, 1)
    assert steps.sizes == () and generated(engine) == expected


def steps_of(engine: Engine) -> Any:
    assert isinstance(engine.compiled, CompiledSteps)
    return engine.compiled.program


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_code_that_fails_while_it_serves_makes_way_and_no_request_notices(name: str, tmp_path: Path) -> None:
    is_broken = False

    def breaking(call: Call) -> Call:
        def maybe(values: list[torch.Tensor]) -> Any:
            found = call(values)
            if is_broken:
                raise RuntimeError("no")
            return found

        return maybe

    if name == "t5":
        engine = seq2seq.engine_of("t5", max_num_seqs=2)
        sequence = seq2seq.sequence(0, seq2seq.text(seq2seq.sources()[1]))
        expected = zoo_seq2seq.generate(seq2seq.model_of("t5"), seq2seq.sources()[1], seq2seq.NUM_TOKENS)
    else:
        engine, expected = small_engine()
        sequence = greedy(0, zoo.prompt(5), NUM_TOKENS)
    steps = compile_inline(engine, tmp_path, (1,), change=breaking)
    settle(engine, 1)
    assert len(steps.sizes) == 1
    is_broken = True
    assert tokens(drive(engine, [sequence])[0]) == expected
    assert not steps.sizes


def test_a_model_that_is_stepped_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--torch-compile True: this model is stepped sequence by sequence"):
        engine_for("mamba", compile=CompileConfig(tmp_path))


def test_a_model_that_no_other_process_could_have_is_refused(tmp_path: Path) -> None:
    model = copy.deepcopy(tiny_model("llama"))
    model.something = lambda: None
    with pytest.raises(ValueError, match="--torch-compile True: this model cannot be taken apart"):
        build_engine(
            describe(model), EngineConfig(4, 256, 128, compile=CompileConfig(tmp_path)), lambda _what, _share: None
        )
