"""Compiled encoders give what the eager ones give, for the numbers of sources that they were made for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.compile.encoder import CompiledEncoder, compile_encoder
from engine.compile.skeleton import SourceShape
from engine.compile.tried import Call
from engine.config import CompileConfig
from engine.engine import Engine
from engine.model.encoder import EncoderInputs, PlainEncoder
from engine.model.linear import packed_form
from tests import zoo_seq2seq as zoo
from tests.engine import test_exact_seq2seq as seq2seq
from tests.engine.compile.inline import compile_here, encode_here, settle
from tests.engine.harness import drive, tokens
from tests.int4_weights import CAN_COMPILE, native_kernels
from tests.zoo import prompt


def encoder_of(engine: Engine) -> CompiledEncoder:
    assert engine.compiled_encoder is not None
    return engine.compiled_encoder


def decide(engine: Engine, num_sizes: int) -> None:
    """Until steps and encoder are decided."""
    settle(engine, 1)
    while encoder_of(engine).num_decided < num_sizes:
        assert engine.has_work()
        engine.step()


def compiled(name: str, directory: Path, sizes: tuple[int, ...]) -> Engine:
    return seq2seq.engine_of(name, max_num_seqs=4, compile=CompileConfig(directory, sizes=sizes))


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_an_encoder_decoder_gives_the_tokens_of_generate(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_here(monkeypatch)
    calls = encode_here(monkeypatch)
    engine = compiled(name, tmp_path, (1, 2))
    assert not encoder_of(engine)._may_start()  # one thing is compiled at a time
    settle(engine, 2)
    decide(engine, 2)
    assert engine.stats().compiled_encoder_batch_sizes == (1, 2)
    calls.clear()
    if name == "whisper":
        sources = [seq2seq.speech(number) for number in range(3)]
        expected = [
            seq2seq.generate_speech(seq2seq.model_of(name), n, [zoo.START_ID], seq2seq.NUM_TOKENS) for n in range(3)
        ]
    else:
        ids = [prompt(length, seed=length) for length in (12, 9, 1)]  # the last has no graph
        sources = [seq2seq.text(found) for found in ids]
        expected = [zoo.generate(seq2seq.model_of(name), found, seq2seq.NUM_TOKENS) for found in ids]
    # Two at once, and one later.
    outputs = drive(engine, [seq2seq.sequence(n, source) for n, source in enumerate(sources[:2])], stagger=1)
    outputs |= drive(engine, [seq2seq.sequence(2, sources[2])])
    assert [tokens(outputs[n]) for n in range(3)] == expected
    num_calls = 3 if name == "whisper" else 2
    assert sum(shape[0] for shape in calls) == num_calls


def text_encoder(directory: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[CompiledEncoder, list[tuple[int, ...]]]:
    calls = encode_here(monkeypatch)
    model = seq2seq.model_of("t5")
    source = SourceShape((), torch.int64, "cpu", 32, model.config.vocab_size)
    program = PlainEncoder(model.get_encoder())
    return compile_encoder(program, source, CompileConfig(directory), 2, lambda: True), calls


@pytest.mark.skipif(not CAN_COMPILE, reason="no compiler, or no AVX512-BF16")
def test_texts_of_any_length_go_through_one_graph_of_packed_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = encode_here(monkeypatch)
    model = seq2seq.model_of("t5").to(torch.bfloat16)
    for parent in list(model.get_encoder().modules()):
        for name, child in parent.named_children():
            if type(child) is torch.nn.Linear:
                packed = packed_form(child)
                packed.use_native(native_kernels(), 16)
                setattr(parent, name, packed)
    source = SourceShape((), torch.int64, "cpu", 32, model.config.vocab_size)
    encoder = compile_encoder(PlainEncoder(model.get_encoder()), source, CompileConfig(tmp_path), 1, lambda: True)
    run_trials(encoder)
    assert encoder.sizes == (1,)
    calls.clear()
    with torch.inference_mode():
        for length in (15, 17, 32):  # few rows are our own kernel's, where a step is eager
            encoder.run(EncoderInputs(torch.ones((1, length), dtype=torch.int64), torch.ones((1, length)).long()))
    assert calls == [(1, 15), (1, 17), (1, 32)]


def run_trials(encoder: CompiledEncoder) -> None:
    with torch.inference_mode():
        while encoder.has_work():
            encoder.advance()


def test_only_lengths_and_numbers_that_code_was_made_for_are_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, calls = text_encoder(tmp_path, monkeypatch)
    run_trials(encoder)
    assert encoder.sizes == (1, 2)
    calls.clear()
    with torch.inference_mode():
        for shape in ((1, 2), (2, 32), (1, 33), (3, 8), (1, 1)):
            ids = torch.ones(shape, dtype=torch.int64)
            inputs = EncoderInputs(ids, torch.ones_like(ids))
            torch.testing.assert_close(encoder.run(inputs), encoder._eager.run(inputs), rtol=1e-4, atol=1e-4)
    assert calls == [(1, 2), (2, 32)]


@pytest.mark.parametrize("fault", ["wrong", "slower", "later"])
def test_an_encoder_that_is_wrong_slower_or_fails_makes_way(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encoder, _ = text_encoder(tmp_path, monkeypatch)
    load, is_broken = encoder._load, False

    def change(package: Any) -> Call:
        call = load(package)

        def changed(values: list[torch.Tensor]) -> Any:
            if is_broken:
                raise RuntimeError("no")
            return [call(values)[0] * (1.1 if fault == "wrong" else 1.0)]

        return changed

    encoder._load = change
    if fault == "slower":
        encoder._measure = lambda program, _: float(program is not encoder._eager)
    run_trials(encoder)
    assert encoder.num_decided == 2 and encoder.sizes == ((1, 2) if fault == "later" else ())
    is_broken = True
    ids = torch.ones((2, 5), dtype=torch.int64)
    inputs = EncoderInputs(ids, torch.ones_like(ids))
    with torch.inference_mode():
        assert torch.equal(encoder.run(inputs), encoder._eager.run(inputs))
    assert encoder.sizes == ((1,) if fault == "later" else ())
    assert "stay eager" in caplog.text or fault != "wrong"
