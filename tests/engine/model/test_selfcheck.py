"""The load-time check sends a model that the flat lane would serve wrongly to the solo lane."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.model import selfcheck
from engine.model.runner import SoloRunner
from engine.model.selfcheck import choose_lane, measure_solo
from tests.engine.harness import tiny_model

DEVICE = torch.device("cpu")


@torch.inference_mode()
def _choose(model: Any) -> selfcheck.LaneChoice:
    return choose_lane(model, DEVICE)


def test_a_model_that_ignores_position_ids_is_found_out() -> None:
    model = tiny_model("llama")
    rotary = model.model.rotary_emb
    plain = rotary.forward

    def by_order(states: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return plain(states, position_ids=torch.arange(position_ids.shape[1])[None])

    rotary.forward = by_order
    choice = _choose(model)
    assert choice.lane == "solo"
    assert "differ" in choice.reason


def test_a_model_that_mixes_tokens_outside_attention_is_found_out() -> None:
    model = tiny_model("qwen2")
    mlp = model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda states: plain(states + states.cumsum(dim=1) * 0.1)
    assert _choose(model).lane == "solo"


def test_a_window_that_attention_is_not_told_of_is_found_out() -> None:
    model = tiny_model("mistral")
    for layer in model.model.layers:
        layer.self_attn.forward = _without_window(layer.self_attn.forward)
    choice = _choose(model)
    assert choice.lane == "solo"


def _without_window(forward: Any) -> Any:
    module = forward.__self__
    config = type(module.config)(**{**module.config.to_dict(), "sliding_window": None})

    def call(*args: Any, **kwargs: Any) -> Any:
        kept, module.config = module.config, config
        config._attn_implementation = kept._attn_implementation
        try:
            return forward(*args, **kwargs)
        finally:
            module.config = kept

    return call


@pytest.mark.parametrize(
    ("name", "words"), [("phi3_longrope", "longrope"), ("llama_dynamic", "dynamic"), ("jamba", "layers include")]
)
def test_what_a_short_trial_cannot_see_is_read_from_the_config(name: str, words: str) -> None:
    choice = _choose(tiny_model(name))
    assert choice.lane == "solo"
    assert words in choice.reason


def test_a_solo_model_keeps_its_own_attention() -> None:
    model = tiny_model("falcon")
    before = model.config._attn_implementation
    assert _choose(model).lane == "solo"
    assert model.config._attn_implementation == before


@torch.inference_mode()
def test_the_cost_of_a_models_own_cache_is_measured() -> None:
    sizes = measure_solo(SoloRunner(tiny_model("bloom"), DEVICE), 256)
    assert sizes.per_token == 2 * 2 * 4 * 16 * 4  # layers, K and V, heads, head size, float32
    sizes = measure_solo(SoloRunner(tiny_model("mamba"), DEVICE), 256)
    assert sizes.per_token == 0 and sizes.fixed > 0
