"""The census finds what it should: agreement where there is, and a mistake where one is made."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import census_case
from benchmarks.census import as_markdown, run_types
from benchmarks.census_case import CaseResult, run_case
from benchmarks.tiny_configs import tiny_config
from engine.engine import Engine


@pytest.mark.parametrize(("model_type", "lane"), [("starcoder2", "flat"), ("mpt", "solo")])
def test_a_type_is_served_exactly_on_its_lane(model_type: str, lane: str) -> None:
    result = run_case(model_type)
    assert (result.outcome, result.lane) == ("exact", lane)
    assert result.num_distinct is not None
    assert result.num_distinct > 20
    assert result.logprob_difference is not None
    assert result.logprob_difference < 1e-3


def test_a_wrong_engine_is_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Engine.add

    def add_with_a_wrong_prompt(self: Engine, sequence: Any) -> None:
        sequence.prompt_token_ids = [*sequence.prompt_token_ids[:-2], 9, sequence.prompt_token_ids[-1]]
        honest(self, sequence)

    monkeypatch.setattr(Engine, "add", add_with_a_wrong_prompt)
    result = run_case("llama")
    assert result.outcome == "mismatch"
    assert "logit gap" in result.why


def test_an_engine_that_raises_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Engine:
        raise ValueError("no lane")

    monkeypatch.setattr(census_case, "build_engine", broken)
    result = run_case("llama")
    assert result.outcome == "error"
    assert "no lane" in result.why


def test_a_type_that_generate_does_not_run_says_why() -> None:
    result = run_case("musicgen")
    assert result.outcome == "no generate()"
    assert "audio" in result.why


def test_a_child_that_does_not_come_back_is_a_crash_of_one_type() -> None:
    results = list(run_types(["llama"], timeout_s=0.01))
    assert [result.outcome for result in results] == ["crash"]


def test_children_report_every_type() -> None:
    results = list(run_types(["gpt2", "llama"], timeout_s=120))
    assert [(result.model_type, result.outcome) for result in results] == [("gpt2", "exact"), ("llama", "exact")]


def test_the_page_has_totals_and_a_row_a_type() -> None:
    page = as_markdown([CaseResult("b", "exact", lane="flat"), CaseResult("a", "error", why="x | y")])
    assert "2 types" in page
    assert "1 exact, 1 error" in page
    assert page.index("| a ") < page.index("| b ")
    assert "x / y" in page


def test_a_tiny_config_is_tiny_and_keeps_grouped_heads() -> None:
    config = tiny_config("llama")
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (64, 4, 2)
    assert tiny_config("bert").is_decoder
