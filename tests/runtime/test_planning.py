"""Dry runs against real loads of the same options."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from config import Settings, StartupError
from engine.kv.encoder_decoder import EncoderDecoderKV
from engine.kv.pool import SlotPool
from engine.model.int4.linear import Int4Linear
from engine.units import size
from runtime import planning
from runtime.checkpoint import HeadersOutOfReach
from runtime.model_loading import load_model_stack
from runtime.planning import dry_run
from tests.checkpoints import write_checkpoint
from tests.engine.model.drawings import real
from tests.runtime.hub import hub_of
from tests.zoo import make

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), max_position_embeddings=3000)


def settings_of(checkpoint: Path | str, **options: Any) -> Settings:
    return Settings(**{"hf_model": str(checkpoint), "accelerator_type": "cpu", "torch_dtype": "float32", **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"torch_dtype": "bfloat16", "max_model_len": 700, "kv_cache_memory": 2**20},
        {"torch_dtype": "auto", "static_cache": True, "continuous_batching_batch_size": 3},
    ],
)
def test_a_dry_run_says_what_a_load_then_does(options: dict[str, Any], checkpoint: Path) -> None:
    settings = settings_of(checkpoint, **options)
    found = dry_run(settings)
    stack = load_model_stack(settings, lambda _doing, _share: None)
    info = stack.info
    assert (found.architecture, found.dtype, found.device) == (info.architecture, info.dtype, info.device)
    assert found.kv is not None
    assert (found.kv.lane, found.kv.bytes_per_token) == (info.lane, info.kv_bytes_per_token)
    assert found.demand.max_model_len == info.max_model_len
    assert found.weights.num_parameters == info.num_parameters
    assert found.stored is not None
    assert found.stored.num_bytes == (checkpoint / "model.safetensors").stat().st_size // 4 * 4 - _header(checkpoint)
    # What is free moves while other programs run.
    assert found.plan.kv_budget_bytes == pytest.approx(info.kv_budget_bytes, rel=0.3)
    config = stack.engine.config  # type: ignore[attr-defined]
    assert (found.demand.max_num_seqs, found.demand.num_step_tokens) == (config.max_num_seqs, config.max_batch_tokens)
    pool: SlotPool = stack.engine.kv.pool  # type: ignore[attr-defined]
    if settings.static_cache:
        (length,) = found.plan.lengths
        assert length.batch_bytes == pool.num_tokens_allocated * info.kv_bytes_per_token
    elif settings.kv_cache_memory:
        assert found.plan.longest == pool.capacities[-1]


def _header(checkpoint: Path) -> int:
    with (checkpoint / "model.safetensors").open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


@pytest.mark.parametrize(
    "options",
    [
        {"torch_dtype": "float16"},
        {"max_model_len": 3001},
        {"static_cache": True, "static_cache_decoder_max_length": 5000},
        {"revision": "main"},
        {"model_type": "NoSuchModel"},
        {"hf_model": "some/model-that-is-not-here"},
    ],
)
def test_what_a_load_refuses_a_dry_run_refuses_in_the_same_words(options: dict[str, Any], checkpoint: Path) -> None:
    settings = settings_of(**{"checkpoint": checkpoint, **options})
    with pytest.raises(StartupError) as planned:
        dry_run(settings)
    with pytest.raises(StartupError) as loaded:
        load_model_stack(settings, lambda _doing, _share: None)
    assert str(planned.value) == str(loaded.value)


def test_a_static_cache_for_a_model_with_caches_of_its_own_is_refused_as_at_load(tmp_path: Path) -> None:
    model, _ = make("mamba")
    model.save_pretrained(tmp_path)
    with pytest.raises(StartupError, match=r"--static-cache True: this model keeps a cache of its own .*linear"):
        dry_run(settings_of(tmp_path, static_cache=True))
    found = dry_run(settings_of(tmp_path))
    assert found.kv is not None and (found.kv.lane, found.kv.is_certain) == ("solo", True)
    assert found.kv.bytes_fixed > 1000 and found.kv.bytes_per_token <= 8  # some versions keep a mask of ones
    assert found.plan.fits and found.plan.longest == found.demand.max_model_len


def test_memory_that_is_not_there_is_a_plan_that_does_not_fit_and_no_mistake(checkpoint: Path) -> None:
    found = dry_run(settings_of(checkpoint, kv_cache_memory=2**60))
    assert not found.plan.fits and "--kv-cache-memory" in found.plan.problems[0]


def test_a_checkpoint_without_safetensors_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    with pytest.raises(StartupError, match=r"has neither model\.safetensors nor"):
        dry_run(settings_of(tmp_path))


def test_headers_out_of_reach_leave_a_plan_from_the_config(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_source: str, _revision: str | None) -> Any:
        raise HeadersOutOfReach("ConnectionError: no route")

    whole = dry_run(settings_of(checkpoint))
    monkeypatch.setattr(planning, "read_stored_weights", fail)
    found = dry_run(settings_of(checkpoint))
    assert (found.stored, found.why_not_stored) == (None, "ConnectionError: no route")
    assert found.weights == whole.weights


def test_of_a_model_on_the_hub_no_more_than_headers_are_fetched(checkpoint: Path, tmp_path: Path) -> None:
    environ = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "TEMP") if name in os.environ}
    with hub_of("some/model", checkpoint) as hub:
        # Another process, because the hub's address is read once.
        done = subprocess.run(
            [sys.executable, "main.py", "plan", "--hf-model", "some/model", "--accelerator-type", "cpu"],
            cwd=ROOT, env=environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stored = dry_run(settings_of(checkpoint)).stored
    assert stored is not None
    assert f"on disk       {size(stored.num_bytes)} in 1 file: float32" in done.stdout
    assert set(hub.sent) >= {"config.json", "model.safetensors"}
    assert hub.sent["model.safetensors"] < stored.num_bytes
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_quantised_checkpoint_is_named_and_counted_unpacked(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    found = dry_run(settings_of(tmp_path))
    assert found.quantised_by == "fp8"
    assert found.weights.parameters == dry_run(settings_of(checkpoint)).weights.parameters


def test_int4_weights_are_told_as_they_are_loaded(checkpoint: Path, tmp_path: Path) -> None:
    settings = settings_of(
        checkpoint,
        torch_dtype="bfloat16",
        hqq=True,
        hqq_group_size=32,
        hqq_report=True,
        cache_dir=str(tmp_path),
    )
    found, plain = dry_run(settings), dry_run(settings_of(checkpoint, torch_dtype="bfloat16"))
    stack = load_model_stack(settings, lambda _doing, _share: None)
    layers = [m for m in stack.engine.runner.model.modules() if isinstance(m, Int4Linear)]  # type: ignore[attr-defined]
    assert found.weights.num_quantised == len(layers) > 0
    assert found.weights.by_dtype["int4"] == sum(layer.num_bytes for layer in layers)
    assert found.weights.parameters < plain.weights.parameters
    # The plain weights come first, for the report.
    assert found.demand.loading_bytes == plain.weights.parameters
    assert found.demand.scratch_bytes > 0 == plain.demand.scratch_bytes


@pytest.mark.parametrize("options", [{}, {"static_cache": True, "continuous_batching_batch_size": 2}])
@pytest.mark.parametrize("model", ["demo-t5", "demo-whisper"])
def test_an_encoder_decoder_is_told_as_it_is_loaded(model: str, options: dict[str, Any]) -> None:
    settings = settings_of(model, kv_cache_memory=None if options else 2**24, **options)
    found = dry_run(settings)
    stack = load_model_stack(settings, lambda _doing, _share: None)
    info = stack.info
    assert (found.architecture, found.demand.max_model_len) == (info.architecture, info.max_model_len)
    assert found.demand.max_source_len == info.max_source_len
    assert found.kv is not None and (found.kv.lane, found.kv.bytes_per_token) == (info.lane, info.kv_bytes_per_token)
    kv: EncoderDecoderKV = stack.engine.kv  # type: ignore[attr-defined]
    if options:
        (length,) = found.plan.lengths
        per_position = found.kv.bytes_per_source_position
        allocated = kv.own.pool.num_tokens_allocated * info.kv_bytes_per_token
        assert length.batch_bytes == allocated + kv.cross.pool.num_tokens_allocated * per_position
    else:
        assert found.plan.longest == kv.own.pool.capacities[-1]
        assert found.plan.longest_source == kv.cross.pool.capacities[-1]


def test_a_speech_model_s_sources_are_all_of_one_length(tmp_path: Path) -> None:
    model = real("whisper")
    model.save_pretrained(tmp_path)
    found = dry_run(settings_of(tmp_path))
    assert found.architecture == "WhisperForConditionalGeneration"
    assert found.weights.parameters == sum(p.nbytes for p in model.parameters())
    assert (found.demand.max_model_len, found.demand.max_source_len) == (model.config.max_target_positions, 60)
    (length,) = found.plan.lengths
    assert length.num_source_positions == 60
