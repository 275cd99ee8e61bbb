"""On a CUDA device, steps that overlap give the tokens of steps in turn, and launching one waits for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.batch import Batch
from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.flight import Flight
from engine.model.loader import describe
from engine.sequence import SamplingParams, Sequence
from tests import zoo
from tests.engine.harness import drive, tiny_model, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"num_logprobs": 3},
    {"top_k": 9, "temperature": 0.8},
    {"top_p": 0.9, "num_logprobs": 0},
    {"top_p": 0.98, "temperature": 4.0},
    {"logit_bias": ((7, 2.0),), "min_p": 0.05},
    {"stop_token_ids": frozenset(range(0, zoo.VOCAB_SIZE, 20))},
    {"frequency_penalty": 0.5},
]


def _engine(name: str, **limits: Any) -> Engine:
    config = EngineConfig(**{"max_num_seqs": 8, "max_batch_tokens": 256, "max_model_len": 256, **limits})
    return build_engine(describe(tiny_model(name).cuda()), config, lambda _what, _share: None)


def _sequences(kinds: list[dict[str, Any]]) -> list[Sequence]:
    return [
        Sequence(n, zoo.prompt(5 + 9 * n, seed=n), SamplingParams(40, seed=n, **kind), arrival_time_s=0.0)
        for n, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize("is_paged", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_tokens_are_those_of_steps_in_turn(name: str, is_paged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_paged:
        monkeypatch.setattr("engine.build.kernel_for", lambda _device: None)
    for stagger in (1, 7):
        in_turn, overlapped = (
            drive(_engine(name, is_overlapped=is_overlapped), _sequences(KINDS), stagger=stagger)
            for is_overlapped in (False, True)
        )
        for number in range(len(KINDS)):
            assert tokens(overlapped[number]) == tokens(in_turn[number])
            assert overlapped[number][-1].finish_reason == in_turn[number][-1].finish_reason


@pytest.mark.parametrize("is_paged", [True, False])
def test_a_launch_waits_for_nothing(is_paged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_paged:
        monkeypatch.setattr("engine.build.kernel_for", lambda _device: None)
    engine = _engine("llama", is_overlapped=True)
    drive(engine, _sequences(KINDS[:7]))  # kernels are compiled, workspaces made
    launch, num_ahead = engine._launch, 0

    def watched(batch: Batch, after: Flight | None = None) -> Flight:
        nonlocal num_ahead
        num_ahead += after is not None
        torch.cuda.set_sync_debug_mode("error" if after is not None else "default")
        try:
            return launch(batch, after)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(engine, "_launch", watched)
    outputs = drive(engine, _sequences(KINDS[:7]), stagger=1)
    for number in range(7):
        assert tokens(outputs[number])
    assert num_ahead > 10
