"""Times steps of one model driven in one way: sequences of any length at once, without computing their prompts.

Knows nothing of tables, bounds or of the other ways.
Called by benchmarks/gpu.py.
"""

from __future__ import annotations

import gc
import itertools
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from engine.build import build_engine
from engine.compile.paged_trial import NUM_TRIAL_BLOCKS
from engine.config import CompileConfig, EngineConfig
from engine.engine import Engine
from engine.kv.paged import PagedStorage
from engine.kv.prefix import BLOCK_SIZE
from engine.model.loader import LoadedModel
from engine.sequence import SamplingParams, Sequence, SequenceState

logger = logging.getLogger(__name__)

Way = Literal["eager", "graphs", "compiled"]

WARM_UPS = 3
PREFILL_REPEATS = 10


class NotServed(Exception):
    """This way does not do such steps; one line says why."""


@dataclass(frozen=True, slots=True)
class Card:
    """The device, and how to wait for it."""

    device: torch.device
    wait: Callable[[], None] = field(default=torch.cuda.synchronize)

    def median_s(self, work: Callable[[], object], repeats: int) -> float:
        """Seconds that `work` takes, the median of `repeats`."""
        for _ in range(WARM_UPS):
            work()
        times = []
        for _ in range(repeats):
            self.wait()
            started_s = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - started_s)
        return statistics.median(times)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one engine is built for.

    Args:
        sizes: rows of its decode steps.
        num_steps: decode steps that are timed.
        max_context: tokens of the longest sequence before them.
        prefill_tokens: of a prompt.
        kv_budget_bytes: for the KV of all of them.
        cache: where compiled code is kept.
        compile_s: how long compiled code is waited for.
    """

    sizes: tuple[int, ...]
    num_steps: int
    max_context: int
    prefill_tokens: int
    kv_budget_bytes: int
    cache: Path
    compile_s: float

    @property
    def max_model_len(self) -> int:
        """In whole blocks."""
        return max(num_positions(self.max_context, self.num_steps), num_positions(self.prefill_tokens, 0))


def num_positions(context: int, num_steps: int) -> int:
    """KV positions that a sequence of `context` tokens takes while so many steps are timed, in whole blocks."""
    return -(-(context + WARM_UPS + num_steps + 3) // BLOCK_SIZE) * BLOCK_SIZE


class Steps:
    """An engine for one way of stepping, built when it is first needed; to be closed after a failure.

    Args:
        loaded: the model.
        way: eager; captured as graphs around the eager step; or compiled, and captured where the device has graphs.
        limits: of the engine.
        card: the device.
    """

    def __init__(self, loaded: LoadedModel, way: Way, limits: Limits, card: Card) -> None:
        self.way = way
        self._loaded = loaded
        self._limits = limits
        self._card = card
        self._engine: Engine | None = None
        self._refusal: NotServed | None = None
        self._ids = itertools.count()

    def decode_s(self, batch: int, context: int) -> float:
        """Seconds of a step of `batch` sequences that have `context` tokens, each step's tokens read; the median.

        Raises:
            NotServed: this way does not do such steps.
        """
        engine = self._built()
        self._check_is_ready(engine, batch)
        num_tokens = num_positions(context, self._limits.num_steps)
        num_new_tokens = self._limits.num_steps + WARM_UPS + 2
        sequences = [self._sequence(context + 1, num_new_tokens) for _ in range(batch)]
        for sequence in sequences:
            _start_at(engine, sequence, num_tokens)
        engine.runner.apply(engine.kv.take_ops())
        _blank(engine)
        times = []
        for _ in range(WARM_UPS + self._limits.num_steps):
            started_s = time.perf_counter()
            _step(engine, batch)
            times.append(time.perf_counter() - started_s)
        for sequence in sequences:
            engine.abort(sequence.sequence_id)
        while engine.has_work():
            engine.step()  # what was launched ahead
        return statistics.median(times[WARM_UPS:])

    def prefill_s(self) -> float:
        """Seconds from a prompt to its first token, when it is alone; the median."""
        engine = self._built()

        def work() -> None:
            engine.add(self._sequence(self._limits.prefill_tokens, 1))
            _step(engine, 1)

        return self._card.median_s(work, PREFILL_REPEATS)

    def close(self) -> None:
        """Drop the engine and its memory; the next measurement builds another."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        gc.collect()
        if self._card.device.type == "cuda":
            torch.cuda.empty_cache()

    def _built(self) -> Engine:
        if self._refusal is not None:
            raise self._refusal
        if self._engine is None:
            try:
                self._engine = self._build()
            except ValueError as refusal:
                self._refusal = NotServed(str(refusal))
                raise self._refusal from refusal
            self._prepare(self._engine)
        return self._engine

    def _build(self) -> Engine:
        limits, way = self._limits, self.way
        # The engine before left its own attention in the model; a new one's check must compare with the plain one.
        self._loaded.model.set_attn_implementation("sdpa")
        # Compiled steps are captured too where there are graphs, as --torch-compile-mode reduce-overhead has it.
        how = CompileConfig(limits.cache, has_graphs=True, has_code=way == "compiled", sizes=limits.sizes)
        config = EngineConfig(
            max_num_seqs=max(limits.sizes),
            max_batch_tokens=max(*limits.sizes, limits.prefill_tokens),
            max_model_len=limits.max_model_len,
            kv_budget_bytes=limits.kv_budget_bytes,
            is_prefix_caching=False,
            compile=None if way == "eager" else how,
            is_overlapped=self._card.device.type == "cuda",
        )
        return build_engine(self._loaded, config, lambda _what, _share: None)

    def _prepare(self, engine: Engine) -> None:
        """Have everything captured and compiled before anything is timed."""
        compiled = engine.compiled
        if compiled is None:
            return
        end_s = time.monotonic() + self._limits.compile_s
        num_wanted = len(self._limits.sizes) if self.way == "compiled" else 0
        while engine.has_work() or compiled.num_decided < num_wanted:
            if time.monotonic() > end_s:
                logger.warning("%s: not ready after %.0f s, without the rest", self.way, self._limits.compile_s)
                return
            if engine.has_work():
                engine.step()
            else:
                time.sleep(0.05)

    def _check_is_ready(self, engine: Engine, batch: int) -> None:
        if self.way == "eager":
            return
        stats = engine.stats()
        ready = stats.graph_batch_sizes if self.way == "graphs" else stats.compiled_batch_sizes
        if batch not in ready:
            raise NotServed(f"steps of {batch} sequences are not {'captured' if self.way == 'graphs' else 'compiled'}")

    def _sequence(self, num_tokens: int, num_new_tokens: int) -> Sequence:
        number = next(self._ids)
        prompt = [(7 * position + number) % self._loaded.vocab_size for position in range(num_tokens)]
        params = SamplingParams(max_tokens=num_new_tokens, temperature=0.0, ignore_eos=True)
        return Sequence(number, prompt, params, arrival_time_s=time.monotonic())


def kv_budget_bytes(num_bytes: int, bytes_per_token: int) -> int:
    """With what captured steps keep for themselves."""
    return num_bytes + NUM_TRIAL_BLOCKS * BLOCK_SIZE * bytes_per_token


def _start_at(engine: Engine, sequence: Sequence, num_tokens: int) -> None:
    """Let a sequence run as if all of its prompt but the last token were computed, with room for `num_tokens`."""
    if not engine.kv.admit(sequence) or not engine.kv.ensure(sequence, num_tokens):
        raise RuntimeError(f"no KV memory for {num_tokens} tokens of sequence {sequence.sequence_id}")
    sequence.num_computed_tokens = len(sequence.prompt_token_ids) - 1
    engine.kv.commit(sequence)
    sequence.state = SequenceState.RUNNING
    engine.scheduler.running.append(sequence)


@torch.inference_mode()
def _blank(engine: Engine) -> None:
    """Put zeros where KV was never computed: they cost what values cost, and are no NaN."""
    storage = getattr(engine.runner, "storage", None)
    if isinstance(storage, PagedStorage):
        for tensor in (*storage.keys, *storage.values):
            tensor.zero_()


def _step(engine: Engine, num_expected: int) -> None:
    outputs = engine.step()
    failed = [output.error for output in outputs if output.error is not None]
    if failed:
        raise failed[0]
    if len(outputs) != num_expected:
        raise RuntimeError(f"the step gave {len(outputs)} tokens, not {num_expected}")
