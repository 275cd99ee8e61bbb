"""On CUDA devices, a model that is spread over cards and main memory gives the tokens of generate() on one device.

float32 without TF32, so that the order of operations is all that differs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.build import build_engine
from engine.config import EngineConfig
from engine.model.loader import LoadedModel, LoadRequest, load_model
from engine.model.placement import PlacementRequest
from tests import zoo
from tests.engine.harness import drive, greedy, tiny_model, tokens

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules"),
]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

LENGTHS = (5, 40, 90, 3, 70)
NUM_TOKENS = 20


def _load(name: str, directory: Path, rooms: dict[int | str, float], strategy: str) -> LoadedModel:
    """With room on each device for a share of the weights, and for a block that is fetched."""
    model = tiny_model(name)
    model.save_pretrained(directory)
    weights = sum(p.nbytes for p in model.parameters())
    blocks = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
    block = max(sum(p.nbytes for p in m.parameters()) for m in blocks)
    limits = {device: int(weights * share) + (block if device in (0, "cpu") else 0) for device, share in rooms.items()}
    request = LoadRequest(
        str(directory), dtype="float32", device="cuda", placement=PlacementRequest(strategy, limits, directory / "off")
    )
    return load_model(request, lambda _what, _share: None)


def _check(name: str, loaded: LoadedModel, **limits: Any) -> None:
    prompts = [zoo.prompt(length, seed=number) for number, length in enumerate(LENGTHS)]
    reference = tiny_model(name).cuda()
    expected = []
    for prompt in prompts:
        output = reference.generate(torch.tensor([prompt], device="cuda"), do_sample=False, max_new_tokens=NUM_TOKENS)
        expected.append(output[0, len(prompt) :].tolist())
    config = EngineConfig(**{"max_num_seqs": 8, "max_batch_tokens": 64, "max_model_len": 256, **limits})
    engine = build_engine(loaded, config, lambda _what, _share: None)
    assert engine.lane.name == ("solo" if name == "bloom" else "flat")
    outputs = drive(engine, [greedy(n, prompt, NUM_TOKENS) for n, prompt in enumerate(prompts)])
    assert [tokens(outputs[n]) for n in range(len(LENGTHS))] == expected


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_one_card_and_main_memory(name: str, tmp_path: Path) -> None:
    loaded = _load(name, tmp_path, {0: 0.4, "cpu": 4.0}, "auto")
    assert loaded.placement is not None
    assert loaded.placement.devices == ("cuda:0",) and loaded.placement.fetched["cpu"] > 0
    _check(name, loaded)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_one_card_main_memory_and_the_disk(name: str, tmp_path: Path) -> None:
    loaded = _load(name, tmp_path, {0: 0.3, "cpu": 0.0}, "auto")
    assert loaded.placement is not None and loaded.placement.fetched["disk"] > 0
    _check(name, loaded)


@needs_two
@pytest.mark.parametrize("is_static", [False, True])  # pages, and slots
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_two_cards(name: str, is_static: bool, tmp_path: Path) -> None:
    loaded = _load(name, tmp_path, {0: 0.6, 1: 4.0, "cpu": 0.0}, "sequential")
    assert loaded.placement is not None and loaded.placement.devices == ("cuda:0", "cuda:1")
    _check(name, loaded, is_static_cache=is_static)


@needs_two
def test_two_cards_in_the_solo_lane(tmp_path: Path) -> None:
    _check("bloom", _load("bloom", tmp_path, {0: 0.6, 1: 4.0, "cpu": 0.0}, "sequential"))
