"""--device-map: one device where that does, several where it must be, refused where another option forbids it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from config import Settings, StartupError
from engine.model.blueprint import WeightBytes
from engine.sequence import SamplingParams, Sequence
from runtime import engine_limits, placing, planning
from runtime.model_loading import load_model_stack
from runtime.placing import choose_placement, weight_rooms
from runtime.plan_text import plan_text
from runtime.planning import dry_run
from serving import describe
from tests.checkpoints import write_checkpoint
from tests.zoo import generate

GIB = 2**30
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"num_hidden_layers": 4, "max_position_embeddings": 512}
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), **changes)


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cuda:0": 10 * GIB, "cuda:1": 20 * GIB, "cpu": 40 * GIB}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(placing, "free_bytes_on", free.__getitem__)


def weights_of(num_bytes: int) -> WeightBytes:
    return WeightBytes({"bfloat16": num_bytes}, buffers=0, packed_head=0, num_parameters=num_bytes // 2)


def memory_for(checkpoint: Path, share: float, monkeypatch: pytest.MonkeyPatch) -> int:
    """Let main memory have room for a share of the weights; returns how much room."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    room = int(sum(p.nbytes for p in model.parameters()) * share)
    free = int(room / (1 - placing.KEPT_SHARE)) + 1
    monkeypatch.setattr(placing, "free_bytes_on", lambda _device: free)
    return room


def settings_of(checkpoint: Path, cache: Path, **options: Any) -> Settings:
    given = {"accelerator_type": "cpu", "torch_dtype": "float32", "device_map": "auto", "cache_dir": str(cache)}
    return Settings(**{"hf_model": str(checkpoint), **given, **options})


def ignore(_doing: str, _share: float | None) -> None:
    pass


@pytest.mark.usefixtures("two_cards")
def test_each_card_keeps_room_for_kv_and_activations() -> None:
    assert weight_rooms(Settings(device_map="auto"), "cuda") == {0: 8 * GIB, 1: 16 * GIB, "cpu": 36 * GIB}
    asked = weight_rooms(Settings(device_map="auto", kv_cache_memory=4 * GIB), "cuda")
    assert asked == {0: 7 * GIB, 1: 16 * GIB, "cpu": 36 * GIB}
    assert weight_rooms(Settings(device_map="auto"), "cpu") == {"cpu": 32 * GIB}


@pytest.mark.usefixtures("two_cards")
@pytest.mark.parametrize(
    ("strategy", "device", "size", "is_spread"),
    [
        ("auto", "cuda", 8 * GIB, False),
        ("auto", "cuda", 9 * GIB, True),
        ("sequential", "cuda", 8 * GIB, False),
        ("balanced", "cuda", 8 * GIB, True),
        ("balanced_low_0", "cuda", 8 * GIB, True),
        ("balanced", "cpu", 8 * GIB, False),  # there is nothing to balance
        ("auto", "cpu", 33 * GIB, True),
    ],
)
def test_a_model_is_spread_when_one_device_is_too_small(strategy: str, device: str, size: int, is_spread: bool) -> None:
    placement = choose_placement(Settings(device_map=strategy), device, weights_of(size))
    assert (placement is not None) == is_spread
    if placement is not None:
        assert placement.strategy == strategy
        assert set(placement.max_memory) == ({0, 1, "cpu"} if device == "cuda" else {"cpu"})
    assert choose_placement(Settings(), device, weights_of(size)) is None


@pytest.mark.usefixtures("two_cards")
@pytest.mark.parametrize("option", ["hqq", "torch_compile"])
def test_what_needs_one_device_is_served_there_and_refused_elsewhere(option: str) -> None:
    settings = Settings(**{"device_map": "auto", option: True})
    assert choose_placement(settings, "cuda", weights_of(8 * GIB)) is None
    flag = f"--{option.replace('_', '-')} True"
    with pytest.raises(StartupError, match=f"{flag}: needs a model on one device, and --device-map auto has to spread"):
        choose_placement(settings, "cuda", weights_of(9 * GIB))
    with pytest.raises(StartupError, match=f"{flag}: .*its size is not known"):
        choose_placement(settings, "cuda", None)


def test_apple_gpus_are_not_spread_from() -> None:
    with pytest.raises(StartupError, match="--device-map auto: should be with --accelerator-type cuda or cpu, not mps"):
        placing.check_device_map(Settings(device_map="auto"), "mps")


@pytest.mark.parametrize("options", [{}, {"static_cache": True, "static_cache_decoder_max_length": 64}])
def test_a_model_larger_than_memory_is_served_from_the_disk(
    options: dict[str, Any], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = memory_for(checkpoint, 0.7, monkeypatch)
    settings = settings_of(checkpoint, tmp_path, **options)
    stack = load_model_stack(settings, ignore)
    info = stack.info
    assert set(info.placement) == {"cpu", "disk"} and 0 < info.placement["cpu"] <= room
    assert (info.device, info.lane) == ("cpu", "flat")
    assert info.kv_budget_bytes > 0
    assert " on cpu (0.0 GiB on cpu, 0.0 GiB on disk), lane flat" in describe(info, "")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    prompt = stack.prompts.encode_text("hello")
    stack.engine.add(Sequence(0, prompt, SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True), 0.0))
    tokens: list[int] = []
    while stack.engine.has_work():
        tokens += [token for output in stack.engine.step() for token in output.token_ids]
    assert tokens == generate(model, prompt, 12)


def test_where_everything_fits_it_is_as_without(checkpoint: Path, tmp_path: Path) -> None:
    stack = load_model_stack(settings_of(checkpoint, tmp_path), ignore)
    assert stack.info.placement == {}
    assert not any("_hf_hook" in vars(m) for m in stack.engine.runner.model.modules())  # type: ignore[attr-defined]
    assert not (tmp_path / "offload").exists()


def test_kv_memory_that_is_not_there_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory_for(checkpoint, 0.7, monkeypatch)
    monkeypatch.setattr(engine_limits, "free_bytes_on", lambda _device: 10**6)
    with pytest.raises(StartupError, match="--kv-cache-memory 2000000: 2000000 bytes of it would be on cpu, where "):
        load_model_stack(settings_of(checkpoint, tmp_path, kv_cache_memory=2_000_000), ignore)


def test_a_plan_says_what_would_be_where(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(checkpoint, tmp_path)
    found = dry_run(settings)
    assert found.placement is None
    assert "auto: everything fits on one device" in plan_text(found)
    room = memory_for(checkpoint, 0.7, monkeypatch)
    found = dry_run(settings)
    info = load_model_stack(settings, ignore).info
    assert found.placement is not None and found.placement.bytes_by_place == info.placement
    assert found.demand.resident_bytes <= room
    assert found.plan.fits and found.plan.kv_budget_bytes == pytest.approx(info.kv_budget_bytes, rel=0.3)
    text = plan_text(found)
    assert "on disk, fetched in each step: as slow as that takes" in text
    monkeypatch.setattr(planning, "free_bytes_on", lambda _device: 1000)
    assert not dry_run(settings).plan.fits


def test_the_start_ends_with_exit_code_2_for_another_map() -> None:
    command = [sys.executable, "main.py", "plan", "--hf-model", "demo", "--device-map", "cuda:1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "--device-map cuda:1: should be 'auto', 'balanced', 'balanced_low_0' or 'sequential'" in run.stderr
