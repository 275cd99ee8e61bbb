"""The flat lane over paged KV: tried against slots on the device itself, then built into an engine.

Knows nothing of steps or requests.
Called by engine/build.py where the device has a kernel for it (CUDA with Triton).
"""

from __future__ import annotations

import logging
from array import array
from typing import TYPE_CHECKING

import torch

from engine.batch import Batch, ScheduledSequence
from engine.compile.paged_trial import NUM_TRIAL_BLOCKS, PagedTrialSetting
from engine.compile.steps import CompiledSteps, compile_steps, sizes_of
from engine.config import CompileConfig, EngineConfig
from engine.engine import Engine, Lane
from engine.graphs.paged_scene import PagedScene
from engine.graphs.recorder import Recorder
from engine.graphs.steps import GraphedSteps
from engine.kv.paged import PagedStorage
from engine.kv.paged_manager import PagedManager, num_blocks_for
from engine.kv.paged_pool import BlockPool
from engine.kv.pool import ResizeArena, Slot
from engine.kv.prefix import BLOCK_SIZE
from engine.kv.slots import SlotStorage
from engine.model.attention import NotFlat
from engine.model.loader import LoadedModel
from engine.model.paged_runner import PagedRunner
from engine.model.runner import FlatRunner, Runner, StepProgram
from engine.model.selfcheck import LaneChoice, judge, row_errors
from engine.sampling.sampler import Sampler
from engine.sequence import SamplingParams, Sequence
from engine.static_cache import Store, announce_static

if TYPE_CHECKING:
    from engine.model.paged_step import PagedAttention

logger = logging.getLogger(__name__)

# (start, tokens) of two prompts, step by step: they end past a block, and meet as chunks and as single tokens.
_TRIAL_STEPS = (
    ((0, 0, 20),),
    ((0, 20, 17), (1, 0, 9)),
    ((0, 37, 1), (1, 9, 26)),
    ((0, 38, 1), (1, 35, 1)),
    ((1, 36, 1), (0, 39, 1)),
)
_TRIAL_TABLES = (array("q", (3, 1)), array("q", (0, 4)))  # not in order: a row that reads another's block must show


def build_paged(
    loaded: LoadedModel,
    config: EngineConfig,
    choice: LaneChoice,
    sampler: Sampler,
    attention: PagedAttention,
    recorder: Recorder | None = None,
) -> Engine | None:
    """An engine over paged KV, or None when the trial does not agree with slots: then slots serve.

    Args:
        loaded: a model that was found flat.
        config: limits.
        choice: what the check of the lane found.
        sampler: of this model.
        attention: the kernel, or its twin.
        recorder: captures decode steps as graphs, where they are to be.

    Raises:
        ValueError: the KV budget holds not even one block, or not the static cache that was asked for; or the model is
            to be compiled and cannot be handed to another process.
    """
    reason = _why_not_paged(loaded, choice, attention)
    if reason is not None:
        logger.warning("KV stays in slots, not in pages: %s", reason)
        return None
    num_spare = 0 if recorder is None else NUM_TRIAL_BLOCKS
    num_blocks = _num_blocks(config, sum(shape.bytes_per_token for shape in choice.shapes), num_spare)
    # Graphs hold addresses: what they read is allocated now, like a static cache, and stays where it is.
    is_fixed = config.is_static_cache or recorder is not None
    storage = PagedStorage(choice.shapes, loaded.device, num_blocks + num_spare if is_fixed else None)
    kv = PagedManager(BlockPool(num_blocks, is_static=is_fixed), is_prefix_caching=config.is_prefix_caching)
    runner = PagedRunner(loaded.model, storage, kv.table_of, attention, loaded.device)
    size = f"{storage.num_bytes / 2**20:.0f} MiB, allocated once" if is_fixed else f"at most {num_blocks} of them"
    logger.info("KV in pages of %d tokens, %s", BLOCK_SIZE, size)
    lane = Lane("flat", choice.reason, storage.bytes_per_token, kv_layout="pages")
    if config.compile is None:
        return Engine(config, lane, runner, kv, sampler)
    eager = runner.program
    compiled = None
    if config.compile.has_code:
        runner.program = compiled = _compile(eager, config, config.compile, loaded, storage, attention)
    if recorder is None:
        return Engine(config, lane, runner, kv, sampler, compiled)
    scene = PagedScene(storage, attention, num_blocks, config.max_model_len, loaded.vocab_size, loaded.device)
    sizes = sizes_of(config.compile, config.max_num_seqs)
    graphed = runner.captured = GraphedSteps(eager, scene, sizes, recorder, compiled)
    return Engine(config, lane, runner, kv, sampler, graphed)


def _compile(
    program: StepProgram,
    config: EngineConfig,
    how: CompileConfig,
    loaded: LoadedModel,
    storage: PagedStorage,
    attention: PagedAttention,
) -> CompiledSteps:
    setting = PagedTrialSetting(storage.shapes, loaded.vocab_size, config.max_model_len, loaded.device, attention)
    return compile_steps(program, setting, how, config.max_num_seqs)


def _num_blocks(config: EngineConfig, bytes_per_token: int, num_spare: int) -> int:
    """Blocks that sequences are given, beside the spare ones."""
    if config.is_static_cache:
        return _static_blocks(config, bytes_per_token)
    return _max_blocks(config, bytes_per_token, num_spare)


def _static_blocks(config: EngineConfig, bytes_per_token: int) -> int:
    """Whole pages for max_num_seqs sequences of the full length: whoever is admitted never waits for memory."""
    num_blocks = num_blocks_for(config.max_model_len)
    announce_static(
        [Store("decoder", bytes_per_token, num_blocks * BLOCK_SIZE)], config.max_num_seqs, config.kv_budget_bytes
    )
    return num_blocks * config.max_num_seqs


def _max_blocks(config: EngineConfig, bytes_per_token: int, num_spare: int) -> int:
    # Twice the running ones: as many ended sequences may be kept for their prefixes.
    most = 2 * config.max_num_seqs * num_blocks_for(config.max_model_len + 1)
    if config.kv_budget_bytes is None:
        return most
    bytes_per_block = bytes_per_token * BLOCK_SIZE
    if config.kv_budget_bytes < bytes_per_block * (1 + num_spare):
        spare = f", and captured steps need {num_spare} more" if num_spare else ""
        raise ValueError(
            f"--kv-cache-memory {config.kv_budget_bytes}: one page of {BLOCK_SIZE} tokens of this model takes "
            f"{bytes_per_block} bytes{spare}"
        )
    return min(most, config.kv_budget_bytes // bytes_per_block - num_spare)


def _why_not_paged(loaded: LoadedModel, choice: LaneChoice, attention: PagedAttention) -> str | None:
    """Run two prompts in chunks over blocks and over slots; how they differ, or None when they do not."""
    slots = SlotStorage(choice.shapes, loaded.device)
    slots.apply([ResizeArena(2 * BLOCK_SIZE, (), 2)])
    pages = PagedStorage(choice.shapes, loaded.device)
    pages.apply([ResizeArena(BLOCK_SIZE, (), 5)])
    runners = (
        FlatRunner(loaded.model, slots, lambda s: Slot(2 * BLOCK_SIZE, s.sequence_id), loaded.device),
        PagedRunner(loaded.model, pages, lambda s: _TRIAL_TABLES[s.sequence_id], attention, loaded.device),
    )
    generator = torch.Generator().manual_seed(0)
    sequences = [
        Sequence(
            number,
            torch.randint(min(4, loaded.vocab_size - 1), loaded.vocab_size, (40,), generator=generator).tolist(),
            SamplingParams(max_tokens=1),
            arrival_time_s=0.0,
        )
        for number in range(2)
    ]
    errors: list[float] = []
    try:
        for step in _TRIAL_STEPS:
            batch = Batch(tuple(ScheduledSequence(sequences[n], start, count, count) for n, start, count in step))
            wanted, got = (_logits_of(runner, batch) for runner in runners)
            for number, logits in wanted.items():
                errors.extend(row_errors(got[number], logits))
        judge(errors, choice.shapes[0].dtype)
    except NotFlat as refusal:
        return str(refusal)
    except Exception as failure:  # whatever a compiler or a driver says: slots serve
        logger.debug("the trial of paged KV failed", exc_info=failure)
        return f"the trial raised {type(failure).__name__}: {str(failure).split(chr(10))[0][:200]}"
    return None


def _logits_of(runner: Runner, batch: Batch) -> dict[int, torch.Tensor]:
    """A step's logits by sequence: runners put sequences in an order of their own."""
    result = runner.forward(batch)
    parts = torch.split(result.logits, [item.num_logits for item in result.items])
    return {item.sequence.sequence_id: part for item, part in zip(result.items, parts, strict=True)}
