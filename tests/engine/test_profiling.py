"""Profiling looks at a bounded number of steps after a warm-up, again when asked, and never where it is off."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from engine.profiling import PROFILED_STEPS
from tests import zoo
from tests.engine.harness import drive, engine_for, greedy, reference, tokens


def _traces(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.json"))


def _names(kind: str, round_number: int) -> list[str]:
    return [f"{kind}-{round_number}-{number + 1}.json" for number in range(PROFILED_STEPS)]


@pytest.mark.parametrize("is_overlapped", [False, True])
def test_a_few_steps_of_each_kind_are_profiled_once_and_again_when_asked(
    is_overlapped: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    engine = engine_for("llama", max_batch_tokens=16, profile_directory=tmp_path, is_overlapped=is_overlapped)
    prompt = zoo.prompt(150)
    outputs = drive(engine, [greedy(0, prompt, 20)])
    assert tokens(outputs[0]) == reference("llama", prompt, 20)
    assert _traces(tmp_path) == _names("decode", 0) + _names("prefill", 0)
    trace = json.loads((tmp_path / "decode-0-1.json").read_text())
    assert any("scaled_dot_product" in event.get("name", "") for event in trace["traceEvents"])
    tables = [record.getMessage() for record in caplog.records if "the last profiled" in record.getMessage()]
    assert len(tables) == 2 and all("aten::" in table for table in tables)
    engine.profile_again()
    drive(engine, [greedy(1, zoo.prompt(150, seed=1), 20)])
    assert set(_names("decode", 1) + _names("prefill", 1)) <= set(_traces(tmp_path))
    assert len(_traces(tmp_path)) == 4 * PROFILED_STEPS


def test_nothing_is_profiled_unless_asked() -> None:
    engine = engine_for("llama")
    assert engine.profiler is None
    engine.profile_again()
    drive(engine, [greedy(0, zoo.prompt(20), 12)])
