"""Drives an engine in-process the way the server's engine thread does, for tests.

Knows nothing of HTTP or text.
Called by the tests of the engine.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence as Ids
from typing import Any

from engine.build import build_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.model.loader import describe
from engine.sequence import SamplingParams, Sequence, SequenceOutput
from tests import zoo

_models: dict[str, Any] = {}


def tiny_model(name: str) -> Any:
    """A fresh copy of the zoo's model, so that no test sees what another left in its modules."""
    if name not in _models:
        _models[name] = zoo.make(name)[0]
    return copy.deepcopy(_models[name])


def reference(name: str, prompt: list[int], num_tokens: int) -> list[int]:
    """What generate() says, from a model that has not generated before."""
    return zoo.generate(tiny_model(name), prompt, num_tokens)


def engine_for(name: str, **limits: Any) -> Engine:
    """An engine over the zoo's model with small limits; keyword arguments are EngineConfig's."""
    config = EngineConfig(**{"max_num_seqs": 8, "max_batch_tokens": 256, "max_model_len": 256, **limits})
    return build_engine(describe(tiny_model(name)), config, lambda _what, _share: None)


def greedy(number: int, prompt: list[int], num_tokens: int, **fields: Any) -> Sequence:
    """A greedy sequence; keyword arguments are the Sequence's."""
    params = fields.pop("params", SamplingParams(max_tokens=num_tokens, temperature=0.0))
    return Sequence(number, prompt, params, **{"arrival_time_s": time.monotonic(), **fields})


def drive(engine: Engine, sequences: Ids[Sequence], *, stagger: int = 2) -> dict[int, list[SequenceOutput]]:
    """Add one sequence every `stagger` steps and step until all are done; checks the accounting after each step."""
    outputs: dict[int, list[SequenceOutput]] = {sequence.sequence_id: [] for sequence in sequences}
    waiting = list(sequences)
    steps = 0
    while waiting or engine.has_work():
        if waiting and steps % stagger == 0:
            engine.add(waiting.pop(0))
        for output in engine.step():
            outputs[output.sequence_id].append(output)
        engine.kv.check_integrity()
        steps += 1
        assert steps < 20_000, "the engine makes no progress"
    return outputs


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    """All tokens of one sequence; raises what it failed with."""
    for output in outputs:
        if output.error is not None:
            raise output.error
    return [token for output in outputs for token in output.token_ids]
