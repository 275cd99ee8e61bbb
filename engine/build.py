"""From a loaded model to an engine around it: the lane it takes, and the memory its sequences will live in.

Knows nothing of steps or requests.
Called by runtime/model_loading.py on the engine thread.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from engine.build_paged import build_paged
from engine.compile.encoder import CompiledEncoder, compile_encoder
from engine.compile.skeleton import SourceShape
from engine.compile.steps import compile_steps, sizes_of
from engine.compile.trial import TrialSetting
from engine.config import EngineConfig
from engine.engine import Engine, Lane
from engine.graphs.recorder import Recorder, recorder_for
from engine.graphs.slot_scene import SlotScene
from engine.graphs.steps import GraphedSteps
from engine.kv.budget import StoreUse, budget_within
from engine.kv.cross import CrossManager
from engine.kv.encoder_decoder import EncoderDecoderKV
from engine.kv.manager import KVManager
from engine.kv.pool import CrossOp, ResizeArena, SlotPool, size_classes
from engine.kv.slots import LayerShape, SlotStorage, bytes_by_device
from engine.kv.states import StateManager
from engine.model.encoder import PlainEncoder
from engine.model.loader import LoadedModel, Progress
from engine.model.paged_attention import kernel_for
from engine.model.runner import FlatRunner, SoloRunner
from engine.model.selfcheck import LaneChoice, choose_lane, measure_solo
from engine.model.seq2seq import Seq2SeqRunner
from engine.model.seq2seq_check import Seq2SeqParts, try_flat
from engine.preparation import Preparation
from engine.sampling.sampler import Sampler
from engine.static_cache import Store, announce_static

logger = logging.getLogger(__name__)

SMALLEST_SLOT = 128  # tokens; sequences below this length share one arena


@torch.inference_mode()
def build_engine(loaded: LoadedModel, config: EngineConfig, progress: Progress) -> Engine:
    """Choose the model's lane by trying and build the engine around it.

    Raises:
        ValueError: the KV budget holds not even one token, or not the static cache that was asked for.
    """
    progress("checking how this model can be batched", None)
    sampler = Sampler(
        loaded.vocab_size, loaded.eos_token_ids, loaded.device, is_deferring=True if config.is_overlapped else None
    )
    if loaded.family == "decoder":
        choice = choose_lane(loaded.model, loaded.device)
        logger.info("lane %s: %s", choice.lane, choice.reason)
        return (
            _build_flat(loaded, config, choice, sampler)
            if choice.lane == "flat"
            else _build_solo(loaded, config, choice.reason, sampler)
        )
    parts = try_flat(
        loaded.model, loaded.device, num_positions=config.max_model_len, is_speech=loaded.family == "speech"
    )
    if isinstance(parts, str):
        logger.info("lane solo: %s", parts)
        return _build_solo(loaded, config, parts, sampler)
    logger.info("lane seq2seq: %s", parts.reason)
    return _build_seq2seq(loaded, config, parts, sampler)


def _build_solo(loaded: LoadedModel, config: EngineConfig, reason: str, sampler: Sampler) -> Engine:
    if config.is_static_cache:
        raise ValueError(f"--static-cache True: this model keeps a cache of its own for each sequence: {reason}")
    if config.compile is not None:
        raise ValueError(f"--torch-compile True: this model is stepped sequence by sequence, as it is: {reason}")
    if config.kv_limits is not None and config.kv_budget_bytes is None:
        # Which layer keeps what is the model's own business: as if all of it were on the device with the least room.
        config = replace(config, kv_budget_bytes=min(config.kv_limits.values()))
    runner = SoloRunner(loaded.model, loaded.device)
    sizes = measure_solo(runner, loaded.vocab_size, has_encoder=config.max_source_len is not None)
    states = StateManager(
        bytes_fixed=sizes.fixed,
        bytes_per_token=sizes.per_token,
        bytes_per_position=sizes.per_position,
        budget_bytes=config.kv_budget_bytes,
        max_model_len=config.max_model_len,
    )
    lane = Lane("solo", reason, sizes.per_token, sizes.fixed, "caches")
    return Engine(config, lane, runner, states, sampler)


def _build_flat(loaded: LoadedModel, config: EngineConfig, choice: LaneChoice, sampler: Sampler) -> Engine:
    config = _within_limits(config, loaded, (choice.shapes, config.max_model_len))
    kernel = kernel_for(loaded.device)
    recorder = _recorder_for(config, loaded)
    paged = None if kernel is None else build_paged(loaded, config, choice, sampler, kernel, recorder)
    if paged is not None:
        return paged
    _say_no_graphs(config, "they read KV in pages")
    storage = SlotStorage(choice.shapes, loaded.device)
    store = Store("decoder", storage.bytes_per_token, config.max_model_len)
    (pool,) = _pools(config, [store], is_static=config.is_static_cache)
    kv = KVManager(pool, is_prefix_caching=config.is_prefix_caching)
    runner = FlatRunner(loaded.model, storage, kv.slot_of, loaded.device)
    runner.apply(pool.preallocate() if config.is_static_cache else ())
    compiled = None
    if config.compile is not None and config.compile.has_code:
        setting = TrialSetting(choice.shapes, loaded.vocab_size, loaded.device)
        runner.program = compiled = compile_steps(runner.program, setting, config.compile, config.max_num_seqs)
    return Engine(config, Lane("flat", choice.reason, storage.bytes_per_token), runner, kv, sampler, compiled)


def _build_seq2seq(loaded: LoadedModel, config: EngineConfig, parts: Seq2SeqParts, sampler: Sampler) -> Engine:
    longest_source = config.max_source_len
    assert longest_source is not None  # every encoder-decoder has one
    own_store, cross_store = (parts.shapes, config.max_model_len), (parts.cross_shapes, longest_source)
    config = _within_limits(config, loaded, own_store, cross_store)
    per_token, per_position = (sum(s.bytes_per_token for s in shapes) for shapes in (parts.shapes, parts.cross_shapes))
    stores = [
        Store("decoder", per_token, config.max_model_len),
        Store("encoder", per_position, longest_source),
    ]
    recorder = _recorder_within(config, loaded, stores)
    pool, cross_pool = _pools(config, stores, is_static=config.is_static_cache or recorder is not None)
    cross = CrossManager(cross_pool, is_caching=config.is_prefix_caching)
    own = KVManager(pool, is_prefix_caching=config.is_prefix_caching)
    kv = EncoderDecoderKV(own, cross, positions_per_token=per_position / per_token)
    # Graphs hold addresses: what they read is allocated now, with a slot for rows that belong to nobody.
    fixed = [None if recorder is None else ResizeArena(s.longest, (), config.max_num_seqs + 1) for s in stores]
    storage = SlotStorage(parts.shapes, loaded.device, fixed[0])
    cross_storage = SlotStorage(parts.cross_shapes, loaded.device, fixed[1])
    runner = Seq2SeqRunner(
        parts.decoder,
        parts.encoder,
        storage=storage,
        cross_storage=cross_storage,
        slot_of=own.slot_of,
        cross=cross,
        alignment_heads=loaded.alignment_heads,
        device=loaded.device,
    )
    if pool.is_static:
        runner.apply([*pool.preallocate(), *map(CrossOp, cross_pool.preallocate())])
    compiled = _prepare_seq2seq(config, loaded, parts, runner, recorder)
    encoder = _prepare_encoder(config, loaded, parts, compiled)
    return Engine(config, Lane("seq2seq", parts.reason, per_token), runner, kv, sampler, compiled, encoder)


def _prepare_encoder(
    config: EngineConfig, loaded: LoadedModel, parts: Seq2SeqParts, steps: Preparation | None
) -> CompiledEncoder | None:
    """What compiles the encoder when the steps are done with, where that is wanted."""
    if config.compile is None or not config.compile.has_code:
        return None
    program, source = PlainEncoder(loaded.model.get_encoder()), source_shape(loaded, config.max_source_len)
    num_steps = len(sizes_of(config.compile, config.max_num_seqs))
    parts.encoder.program = compiled = compile_encoder(
        program, source, config.compile, config.max_num_seqs, lambda: steps is None or steps.num_decided >= num_steps
    )
    return compiled


def source_shape(loaded: LoadedModel, max_length: int | None) -> SourceShape:
    """What an encoder-decoder's encoder is given of one source; `max_length` is of a text."""
    config, device = loaded.model.config, str(loaded.device)
    if loaded.family == "speech":
        return SourceShape((config.num_mel_bins, 2 * config.max_source_positions), loaded.dtype, device)
    return SourceShape((), torch.int64, device, max_length, loaded.vocab_size)


def _prepare_seq2seq(
    config: EngineConfig, loaded: LoadedModel, parts: Seq2SeqParts, runner: Seq2SeqRunner, recorder: Recorder | None
) -> Preparation | None:
    """What compiles and captures the runner's steps, as far as that is wanted."""
    if config.compile is None:
        return None
    decoder, compiled = parts.decoder, None
    if config.compile.has_code:
        setting = TrialSetting(
            parts.shapes, loaded.vocab_size, loaded.device, parts.cross_shapes, decoder.marker, decoder.biases
        )
        runner.program = compiled = compile_steps(decoder, setting, config.compile, config.max_num_seqs)
    if recorder is None:
        return compiled
    scene = SlotScene(runner.storage, runner.cross_storage, decoder, loaded.vocab_size, loaded.device)
    sizes = [n for n in sizes_of(config.compile, config.max_num_seqs) if n <= config.max_num_seqs]
    graphed = runner.captured = GraphedSteps(decoder, scene, sizes, recorder, compiled)
    return graphed


def _recorder_for(config: EngineConfig, loaded: LoadedModel) -> Recorder | None:
    """What captures steps, where they are to be captured and can be."""
    return recorder_for(loaded.device) if config.compile is not None and config.compile.has_graphs else None


def _recorder_within(config: EngineConfig, loaded: LoadedModel, stores: list[Store]) -> Recorder | None:
    """The same, where the budget also holds slots of the full length that never move, and one more of each."""
    recorder = _recorder_for(config, loaded)
    if recorder is None or config.kv_budget_bytes is None:
        return recorder
    num_slots = config.max_num_seqs + 1
    num_bytes = num_slots * sum(store.bytes_per_sequence for store in stores)
    if num_bytes <= config.kv_budget_bytes:
        return recorder
    _say_no_graphs(
        config,
        f"they read slots that never move: {num_slots} of {' and '.join(str(s.longest) for s in stores)} positions "
        f"would take {num_bytes} bytes, and {config.kv_budget_bytes} are free for it",
    )
    return None


def _say_no_graphs(config: EngineConfig, reason: str) -> None:
    if config.compile is not None and config.compile.has_graphs:
        logger.warning("--torch-compile True: no CUDA graphs are captured, %s", reason)


def _within_limits(
    config: EngineConfig, loaded: LoadedModel, *stores: tuple[tuple[LayerShape, ...], int]
) -> EngineConfig:
    """Of a model that is spread, the config with a budget of which no device has to hold more than it can."""
    if config.kv_limits is None:
        return config
    uses = [StoreUse(bytes_by_device(shapes, loaded.device), longest) for shapes, longest in stores]
    return replace(config, kv_budget_bytes=budget_within(config.kv_budget_bytes, config.kv_limits, uses))


def _pools(config: EngineConfig, stores: list[Store], *, is_static: bool) -> list[SlotPool]:
    """A pool for each store, within one budget: each gets the share that its longest sequences would take."""
    if is_static:
        return _static_pools(config, stores)
    total = sum(store.bytes_per_sequence for store in stores)
    pools = []
    for store in stores:
        budget = None
        if config.kv_budget_bytes is not None:
            budget = config.kv_budget_bytes * store.bytes_per_sequence // total // store.bytes_per_position
            if budget < 1:
                raise ValueError(
                    f"--kv-cache-memory {config.kv_budget_bytes}: one {store.name} position of this model takes "
                    f"{store.bytes_per_position} bytes"
                )
        longest = store.longest if budget is None else min(store.longest, budget)
        # Twice the running ones: as many ended sequences may be kept for their prefixes.
        capacities = size_classes(min(SMALLEST_SLOT, longest), longest)
        pools.append(SlotPool(capacities, max_slots=2 * config.max_num_seqs, budget_tokens=budget))
    return pools


def _static_pools(config: EngineConfig, stores: list[Store]) -> list[SlotPool]:
    """One slot of the full length for each sequence of a step, to be allocated now."""
    num_slots = config.max_num_seqs
    announce_static(stores, num_slots, config.kv_budget_bytes)
    return [
        SlotPool((store.longest,), max_slots=num_slots, budget_tokens=store.longest * num_slots, is_static=True)
        for store in stores
    ]
