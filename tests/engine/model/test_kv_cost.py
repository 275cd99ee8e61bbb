"""What a sequence takes, told without weights, against engines and caches of real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.build import build_engine
from engine.config import EngineConfig
from engine.model import kv_cost
from engine.model.kv_cost import NotMeasurable, measure_kv
from engine.model.loader import describe
from engine.model.runner import SoloRunner
from engine.model.selfcheck import measure_solo
from tests.engine.harness import engine_for
from tests.engine.model.drawings import drawn, real
from tests.zoo import SLIDING_WINDOW, VOCAB_SIZE

FLAT = ("llama", "qwen3", "gemma2", "mistral", "deepseek_v3", "mixtral", "gpt2")
SOLO = ("bloom", "falcon", "mamba", "lfm2", "qwen3_next", "jamba", "rwkv", "phi3_longrope")


@pytest.mark.parametrize("name", [*FLAT, *SOLO])
def test_lane_and_bytes_are_what_the_engine_reports(name: str) -> None:
    cost = measure_kv(drawn(name))
    lane = engine_for(name).lane
    assert cost.lane == lane.name == ("flat" if name in FLAT else "solo")
    assert (cost.bytes_per_token, cost.bytes_fixed) == (lane.kv_bytes_per_token, lane.kv_bytes_fixed)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_half_precision_takes_half(name: str) -> None:
    assert 2 * measure_kv(drawn(name, torch.bfloat16)).bytes_per_token == measure_kv(drawn(name)).bytes_per_token
    config = EngineConfig(max_num_seqs=2, max_batch_tokens=64, max_model_len=64)
    engine = build_engine(describe(real(name, torch.bfloat16)), config, lambda _doing, _share: None)
    assert engine.lane.kv_bytes_per_token == measure_kv(drawn(name, torch.bfloat16)).bytes_per_token


def test_it_says_what_only_the_check_at_load_can_decide() -> None:
    assert not measure_kv(drawn("llama")).is_certain
    longrope = measure_kv(drawn("phi3_longrope"))
    assert longrope.is_certain and "longrope" in longrope.reason
    bloom = measure_kv(drawn("bloom"))  # found by trying, but nothing that values could change
    assert bloom.is_certain and "position_ids" in bloom.reason


def test_windows_are_told_with_the_number_of_their_layers() -> None:
    assert measure_kv(drawn("llama")).windows is None
    assert measure_kv(drawn("mistral")).windows == (2, SLIDING_WINDOW)
    assert measure_kv(drawn("gemma2")).windows == (2, SLIDING_WINDOW)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
@torch.no_grad()
def test_encoder_decoders_own_and_cross_keys_are_those_of_a_real_forward(name: str) -> None:
    cost = measure_kv(drawn(name))
    model = real(name)
    num_source, num_target = (60 if name == "whisper" else 13), 7
    source: dict[str, Any] = {"input_ids": torch.full((1, num_source), 3)}
    if name == "whisper":
        source = {"input_features": torch.zeros(1, 20, 2 * num_source)}
    cache = model(**source, decoder_input_ids=torch.full((1, num_target), 3), use_cache=True).past_key_values
    own = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.self_attention_cache.layers)
    cross = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.cross_attention_cache.layers)
    assert (cost.lane, cost.is_certain, cost.bytes_fixed) == ("seq2seq", False, 0)
    assert cost.bytes_per_token * num_target == own
    assert cost.bytes_per_source_position * num_source == cross
    config = EngineConfig(max_num_seqs=2, max_batch_tokens=64, max_model_len=64, max_source_len=60)
    lane = build_engine(describe(model), config, lambda _doing, _share: None).lane
    assert (cost.lane, cost.bytes_per_token) == (lane.name, lane.kv_bytes_per_token)


def test_an_encoder_decoder_that_is_not_for_the_flat_lane_is_told_so_before_it_is_loaded() -> None:
    cost = measure_kv(drawn("bigbird_pegasus"))
    model = real("bigbird_pegasus")
    config = EngineConfig(max_num_seqs=2, max_batch_tokens=64, max_model_len=64, max_source_len=64)
    lane = build_engine(describe(model), config, lambda _doing, _share: None).lane
    assert (cost.lane, cost.is_certain, cost.reason) == ("solo", True, lane.reason)
    assert (cost.bytes_per_token, cost.bytes_fixed) == (lane.kv_bytes_per_token, lane.kv_bytes_fixed)


def test_a_flat_trial_that_fails_without_values_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_model: Any, _device: torch.device) -> Any:
        raise RuntimeError("a value was needed")

    monkeypatch.setattr(kv_cost, "record_shapes", fail)
    cost = measure_kv(drawn("llama"))
    assert (cost.lane, cost.is_certain) == ("solo", False)
    model = real("llama")
    sizes = measure_solo(SoloRunner(model, model.device), VOCAB_SIZE)
    assert (cost.bytes_fixed, cost.bytes_per_token) == (sizes.fixed, sizes.per_token)


def test_a_model_that_depends_on_values_is_refused_with_the_reason() -> None:
    model = drawn("bloom")
    model.transformer.h[0].register_forward_pre_hook(lambda *_: torch.zeros(3).numpy())
    with pytest.raises(NotMeasurable, match="Error: "):
        measure_kv(model)
