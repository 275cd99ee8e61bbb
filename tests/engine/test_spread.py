"""A model that lies on several devices, or in part on the disk, gives the tokens that it gives on one.

There are no such devices here: some are pretended (tests/engine/pretend_devices.py), the disk is real.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate.big_modeling
import pytest
import torch
from accelerate import dispatch_model
from transformers import AutoConfig, GenerationMixin

from engine.batch import Batch, ScheduledSequence
from engine.build import build_engine
from engine.build_paged import build_paged
from engine.config import EngineConfig
from engine.engine import Engine
from engine.kv.paged import PagedStorage
from engine.kv.pool import ResizeArena, Slot
from engine.kv.slots import LayerShape, SlotStorage
from engine.model.blueprint import draw
from engine.model.inputs import FlatInputs, build_inputs
from engine.model.loader import LoadedModel, LoadRequest, describe, load_model
from engine.model.packed_linear import PackedLinear
from engine.model.paged_attention import attend_blocks
from engine.model.placement import DISK, PlacementRequest, infer_map, placement_by
from engine.model.selfcheck import choose_lane
from engine.sampling.sampler import Sampler
from engine.sequence import Sequence, Source
from tests import zoo, zoo_seq2seq
from tests.engine.harness import drive, greedy, tokens
from tests.engine.pretend_devices import pretend, pretended_devices

# accelerate's maps name parameters and buffers that belong to no module but the model, and it wonders at that.
pytestmark = pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")

LENGTHS = (5, 40, 90, 3)
NUM_TOKENS = 16
DECODERS = ("llama", "mistral", "gemma2", "gpt2", "bloom", "mamba")
SOLO = ("bloom", "mamba")
ENCODER_DECODERS = ("t5", "bart", "m2m_100", "whisper")
FACTORIES = {"whisper": "AutoModelForSpeechSeq2Seq"} | dict.fromkeys([*zoo_seq2seq.FAMILIES], "AutoModelForSeq2SeqLM")

_made: dict[str, tuple[Any, list[list[int]]]] = {}


def _lane(name: str) -> str:
    return "seq2seq" if name in ENCODER_DECODERS else "solo" if name in SOLO else "flat"


def _sequences(name: str) -> list[Sequence]:
    if name in DECODERS or name == "qwen3_moe":
        return [greedy(n, zoo.prompt(length, seed=n), NUM_TOKENS) for n, length in enumerate(LENGTHS)]
    sources = [Source(str(n).encode(), n, tuple(zoo.prompt(n, seed=n))) for n in LENGTHS]
    if name == "whisper":
        length = zoo_seq2seq.NUM_SOURCE_POSITIONS
        sources = [Source(str(n).encode(), length, features=zoo_seq2seq.features(seed=n)) for n in LENGTHS]
    start = [zoo_seq2seq.START_ID, 9, 30]
    return [greedy(n, start, NUM_TOKENS, source=source) for n, source in enumerate(sources)]


@torch.no_grad()
def _generated(model: Any, sequence: Sequence) -> list[int]:
    source = sequence.source
    if source is None:
        return zoo.generate(model, list(sequence.prompt_token_ids), NUM_TOKENS)
    if source.token_ids is not None:
        return zoo_seq2seq.generate(model, list(source.token_ids), NUM_TOKENS, prompt=list(sequence.prompt_token_ids))
    prompt = torch.tensor([sequence.prompt_token_ids])
    output = GenerationMixin.generate(
        model,
        torch.from_numpy(source.features)[None],
        decoder_input_ids=prompt,
        do_sample=False,
        max_new_tokens=NUM_TOKENS,
    )
    found: list[int] = output[0, prompt.shape[1] :].tolist()
    return found


def _make(name: str) -> tuple[Any, list[list[int]]]:
    """A fresh model, and what generate() says of it on one device."""
    if name not in _made:
        if name == "whisper":
            model: Any = zoo_seq2seq.make_whisper()
        else:
            model = zoo_seq2seq.make(name) if name in zoo_seq2seq.FAMILIES else zoo.make(name)[0]
        reference = copy.deepcopy(model)
        _made[name] = model, [_generated(reference, sequence) for sequence in _sequences(name)]
    model, expected = _made[name]
    assert len({tuple(row) for row in expected}) == len(LENGTHS)
    return copy.deepcopy(model), expected


def _engine(loaded: LoadedModel, **limits: Any) -> Engine:
    source_len = None if loaded.family == "decoder" else 128
    fields = {"max_num_seqs": 8, "max_batch_tokens": 48, "max_model_len": 128, "max_source_len": source_len, **limits}
    return build_engine(loaded, EngineConfig(**fields), lambda _what, _share: None)


def _load(model: Any, name: str, directory: Path, *, share: float, dtype: str = "float32") -> LoadedModel:
    """Saved and loaded with main memory for a share of its weights, the rest left on the disk."""
    model.save_pretrained(directory / "checkpoint")
    weights = sum(p.nbytes for p in model.parameters())
    blocks = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    # accelerate keeps room for the largest block beside what stays.
    room = int(weights * share) + max(sum(p.nbytes for p in block.parameters()) for block in blocks)
    request = LoadRequest(
        str(directory / "checkpoint"),
        FACTORIES.get(name, "AutoModelForCausalLM"),
        dtype,
        placement=PlacementRequest("auto", {"cpu": room}, directory / "offloaded"),
    )
    return load_model(request, lambda _what, _share: None)


@pytest.mark.parametrize("name", [*DECODERS, "qwen3_moe", *ENCODER_DECODERS])
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_weights_on_the_disk_give_generates_tokens(name: str, share: float, tmp_path: Path) -> None:
    model, expected = _make(name)
    loaded = _load(model, name, tmp_path, share=share)
    placement = loaded.placement
    assert placement is not None and placement.fetched[DISK] > 0
    assert (placement.resident["cpu"] > 0) == (share > 0)
    assert sum(placement.bytes_by_place.values()) == sum(p.nbytes for p in model.parameters())
    assert any(p.is_meta for p in loaded.model.parameters())
    engine = _engine(loaded)
    assert engine.lane.name == _lane(name)
    outputs = drive(engine, _sequences(name))
    assert [tokens(outputs[n]) for n in range(len(LENGTHS))] == expected


def test_static_slots_serve_weights_on_the_disk(tmp_path: Path) -> None:
    model, expected = _make("llama")
    engine = _engine(_load(model, "llama", tmp_path, share=0.4), is_static_cache=True)
    outputs = drive(engine, _sequences("llama"))
    assert [tokens(outputs[n]) for n in range(len(LENGTHS))] == expected


def test_only_weights_that_stay_in_memory_are_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.model.linear._MAX_SLOWDOWN", 1e9)  # however small they are
    model, _ = _make("gemma2")
    loaded = _load(model.bfloat16(), "gemma2", tmp_path, share=0.4, dtype="bfloat16")
    packed = [m for m in loaded.model.modules() if isinstance(m, PackedLinear)]
    hooked = [m for m in loaded.model.modules() if "_hf_hook" in vars(m) and m is not loaded.model]
    waiting = [m for m in loaded.model.modules() if any(p.is_meta for p in m.parameters(recurse=False))]
    assert waiting
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        assert packed
    # A hook that moves nothing is gone.
    assert all(m._hf_hook.offload for m in hooked)
    assert {id(m) for m in waiting} <= {id(m) for m in hooked}


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # It asks the driver what links the cards have.
    monkeypatch.setattr(accelerate.big_modeling, "check_cuda_p2p_ib_support", lambda: True)
    with pretended_devices():
        yield


def _spread(model: Any) -> Any:
    """The blocks on two devices in turn, the head on another than the embedding where they are not one."""
    blocks = [n for n, m in model.named_modules() if type(m).__name__ in model._no_split_modules]
    device_map: dict[str, torch.device] = {}

    def place(name: str, module: torch.nn.Module) -> None:
        if name in blocks:
            device_map[name] = pretend((blocks.index(name) + 1) % 2)
        elif any(block.startswith(f"{name}.") or not name for block in blocks):
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            device_map.update({f"{name}.{n}" if name else n: pretend(0) for n, _ in own})
            for child_name, child in module.named_children():
                place(f"{name}.{child_name}" if name else child_name, child)
        else:
            is_own_head = "head" in name and not model.config.tie_word_embeddings
            device_map[name] = pretend(1 if is_own_head else 0)

    place("", model)
    return dispatch_model(model, device_map, main_device=pretend(0))


@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_layers_on_two_devices_give_generates_tokens(name: str) -> None:
    model, expected = _make(name)
    loaded = describe(_spread(model))
    assert loaded.placement is not None and loaded.device == pretend(0)
    assert set(loaded.placement.devices) == {"meta:0", "meta:1"}
    engine = _engine(loaded, kv_limits={"meta:0": 10**9, "meta:1": 10**8})
    assert engine.lane.name == _lane(name)
    outputs = drive(engine, _sequences(name))
    assert [tokens(outputs[n]) for n in range(len(LENGTHS))] == expected
    assert engine.lane.kv_layout == ("caches" if engine.lane.name == "solo" else "slots")
    if engine.lane.name != "solo":
        storage: SlotStorage = engine.runner.storage  # type: ignore[attr-defined]
        keys = next(iter(storage.arenas.values())).keys
        assert [key.device for key in keys] == [shape.device for shape in storage.shapes]
        assert {key.device for key in keys} == {pretend(0), pretend(1)}


@pytest.mark.usefixtures("two_devices")
def test_pages_on_two_devices_give_generates_tokens() -> None:
    model, expected = _make("gemma2")
    loaded = describe(_spread(model))
    config = EngineConfig(max_num_seqs=8, max_batch_tokens=48, max_model_len=128)
    sampler = Sampler(loaded.vocab_size, loaded.eos_token_ids, loaded.device)
    engine = build_paged(loaded, config, choose_lane(loaded.model, loaded.device), sampler, attend_blocks)
    assert engine is not None
    outputs = drive(engine, _sequences("gemma2"))
    assert [tokens(outputs[n]) for n in range(len(LENGTHS))] == expected
    storage: PagedStorage = engine.runner.storage  # type: ignore[attr-defined]
    assert [keys.device for keys in storage.keys] == [pretend(1), pretend(0)] * 2


@pytest.mark.usefixtures("two_devices")
def test_inputs_that_stay_on_one_device_are_noticed_and_the_solo_lane_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlatInputs, "on", lambda inputs, _device: inputs)
    model, expected = _make("llama")
    engine = _engine(describe(_spread(model)))
    assert engine.lane.name == "solo" and "expected all tensors on one device" in engine.lane.reason
    outputs = drive(engine, _sequences("llama"))
    assert [tokens(outputs[n]) for n in range(len(LENGTHS))] == expected


def test_a_steps_inputs_are_copied_once_for_each_device() -> None:
    storage = SlotStorage([LayerShape(1, 4, 4, torch.float32)], torch.device("cpu"))
    storage.apply([ResizeArena(32, (), 2)])
    items = (ScheduledSequence(greedy(0, [1, 2, 3], 4), 2, 1, 1), ScheduledSequence(greedy(1, [1, 2, 3], 4), 0, 3, 1))
    slots = (Slot(32, 0), Slot(32, 1))
    inputs = build_inputs(Batch(items), lambda s: slots[s.sequence_id], storage, torch.device("cpu"))
    assert inputs.on(torch.device("cpu")) is inputs
    meta = torch.device("meta")
    copy = inputs.on(meta)
    assert inputs.on(meta) is copy
    assert {t.device for t in (copy.input_ids, copy.position_ids, copy.logit_rows)} == {meta}
    group, chunk = copy.groups[0], copy.chunks[0]
    assert {group.slots_tensor.device, group.positions.device, group.lengths_tensor.device} == {meta}
    assert group.rows_to_write(1).device == chunk.mask(None, 0, 3).device == meta
    assert inputs.groups[0].rows_to_write(1).device == torch.device("cpu")


def test_a_plan_of_a_drawn_model_is_what_loading_does(tmp_path: Path) -> None:
    model, _ = _make("gemma2")
    loaded = _load(model, "gemma2", tmp_path, share=0.4)
    request = LoadRequest(str(tmp_path / "checkpoint"))
    drawn = draw(request, AutoConfig.from_pretrained(request.name), torch.float32)
    weights = sum(p.nbytes for p in model.parameters())
    block = max(sum(p.nbytes for p in layer.parameters()) for layer in model.model.layers)
    device_map = infer_map(drawn, PlacementRequest("auto", {"cpu": int(weights * 0.4) + block}))
    assert device_map == loaded.model.hf_device_map
    assert placement_by(drawn, device_map) == loaded.placement


def test_two_cards_main_memory_and_the_disk_are_told_apart() -> None:
    model, _ = _make("gemma2")
    places: dict[str, int | str] = {"model.embed_tokens": 0, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 1}
    layers: tuple[int | str, ...] = (0, 1, "cpu", DISK)
    places |= {f"model.layers.{n}": place for n, place in enumerate(layers)}
    placement = placement_by(model, places)
    assert placement is not None
    block = sum(p.nbytes for p in model.model.layers[0].parameters())
    assert placement.devices == ("cuda:0", "cuda:1") and placement.device == torch.device("cuda:0")
    assert placement.resident["cuda:0"] == block + model.model.embed_tokens.weight.nbytes
    assert placement.fetched == {"cpu": block, DISK: block}
    assert placement.largest_fetched == max(p.nbytes for p in model.model.layers[0].parameters())
    assert str(placement).startswith(
        "185.0 KiB on cuda:0; 185.2 KiB on cuda:1; 121.0 KiB on cpu, fetched in each step;"
    )
    assert placement_by(model, {"": 0}) is None and placement_by(model, {"": "cpu"}) is None
