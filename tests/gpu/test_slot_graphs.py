"""On a CUDA device: captured steps of encoder-decoders give the tokens of generate().

float32 without TF32, as in test_lanes.py. Which is the faster is not asked here: each graph that is equal serves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationMixin

from engine.build import build_engine
from engine.config import CompileConfig, EngineConfig
from engine.engine import Engine
from engine.model.loader import describe
from engine.model.seq2seq import Seq2SeqRunner
from tests import zoo_seq2seq as zoo
from tests.engine.graphs.twin import Stopwatch
from tests.engine.harness import drive, tokens
from tests.engine.test_exact_seq2seq import LENGTHS, NUM_TOKENS, model_of, sequence, sources, speech, text
from tests.zoo import prompt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SIZES = (1, 2, 4)


@pytest.fixture(autouse=True)
def exact_and_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr("engine.graphs.steps.time_compute", Stopwatch())


def _engine(name: str, directory: Path, **limits: Any) -> Engine:
    how = CompileConfig(directory, has_code=False, has_graphs=True)
    fields = {"max_num_seqs": 4, "max_batch_tokens": 64, "max_model_len": 128, "max_source_len": 128, "compile": how}
    loaded = describe(model_of(name).to("cuda"))
    return build_engine(loaded, EngineConfig(**{**fields, **limits}), lambda _what, _share: None)


@torch.no_grad()
def _generate(model: Any, encoder_input: torch.Tensor, begun: list[int]) -> list[int]:
    # Not WhisperGenerationMixin's: the model's own choice, without rules.
    output = GenerationMixin.generate(
        model.to("cuda"),
        encoder_input.cuda(),
        decoder_input_ids=torch.tensor([begun], device="cuda"),
        attention_mask=None if encoder_input.is_floating_point() else torch.ones_like(encoder_input).cuda(),
        do_sample=False,
        max_new_tokens=NUM_TOKENS,
    )
    ids: list[int] = output[0, len(begun) :].tolist()
    return ids


def _addresses(engine: Engine) -> list[int]:
    runner = engine.runner
    assert isinstance(runner, Seq2SeqRunner)
    arenas = [arena for storage in (runner.storage, runner.cross_storage) for arena in storage.arenas.values()]
    return [tensor.data_ptr() for arena in arenas for tensor in (*arena.keys, *arena.values)]


@pytest.mark.parametrize("is_overlapped", [False, True])
@pytest.mark.parametrize("name", ["t5", "umt5", "bart", "m2m_100", "whisper"])
def test_tokens_are_those_of_generate_as_sequences_come_and_go(name: str, is_overlapped: bool, tmp_path: Path) -> None:
    is_speech = name == "whisper"
    inputs = [
        torch.from_numpy(zoo.features(seed=n))[None] if is_speech else torch.tensor([ids])
        for n, ids in enumerate(sources())
    ]
    starts = [[zoo.START_ID], *(prompt(3 + 5 * n, seed=n) for n in range(1, len(LENGTHS)))]
    expected = [_generate(model_of(name), each, begun) for each, begun in zip(inputs, starts, strict=True)]
    engine = _engine(name, tmp_path, is_overlapped=is_overlapped)
    before = _addresses(engine)
    for stagger in (3, 1):  # the first time while steps are captured
        batch = [sequence(n, speech(n) if is_speech else text(ids), starts[n]) for n, ids in enumerate(sources())]
        outputs = drive(engine, batch, stagger=stagger)
        assert [tokens(outputs[n]) for n in range(len(LENGTHS))] == expected
        engine.on_idle()
    assert engine.stats().graph_batch_sizes == SIZES and _addresses(engine) == before
    engine.close()


def test_a_model_that_makes_constants_in_its_steps_is_right_whether_it_can_be_captured_or_not(tmp_path: Path) -> None:
    engine = _engine("t5gemma", tmp_path)
    expected = [_generate(model_of("t5gemma"), torch.tensor([ids]), [zoo.START_ID]) for ids in sources()[:4]]
    for _ in range(2):
        outputs = drive(engine, [sequence(n, text(ids)) for n, ids in enumerate(sources()[:4])])
        assert [tokens(outputs[n]) for n in range(4)] == expected
    engine.close()
