"""The step: schedule, launch, land, commit; and what happens to a step that fails.

Knows nothing of text, HTTP or asyncio; runs on one thread, the engine thread, that model_manager owns.
Built by engine/build.py from a loaded model; driven through add, abort and step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from engine.batch import Batch
from engine.compile.encoder import CompiledEncoder
from engine.config import EngineConfig
from engine.errors import ServerError, StepFailed
from engine.flight import Flight, Landing, take_off
from engine.kv.accounting import KVAccounting
from engine.model.runner import Runner
from engine.pacing import Pacing
from engine.pipeline import Pipeline
from engine.preparation import Preparation
from engine.profiling import StepProfiler
from engine.sampling.sampler import Sampler
from engine.scheduler import Scheduler
from engine.sequence import EngineStats, Sequence, SequenceOutput
from engine.validation import check_sequence

logger = logging.getLogger(__name__)

KEPT_TOKENS_WHEN_IDLE = 8_192  # KV of ended sequences that an idle server keeps for their prefixes


@dataclass(frozen=True, slots=True)
class Lane:
    """How the model is driven, what a token of KV costs, and where KV is: slots, pages, or the model's own caches."""

    name: str
    reason: str
    kv_bytes_per_token: int
    kv_bytes_fixed: int = 0
    kv_layout: Literal["slots", "pages", "caches"] = "slots"


class Engine:
    """One model, its sequences and their KV.

    Args:
        config: limits.
        lane: for reports.
        runner: the forward.
        kv: the accounting of its memory.
        sampler: chooses tokens from logits.
        compiled: makes the runner's steps faster behind, by compiling or capturing them, where that is wanted.
        compiled_encoder: makes its encoder faster behind, likewise.
    """

    def __init__(
        self,
        config: EngineConfig,
        lane: Lane,
        runner: Runner,
        kv: KVAccounting,
        sampler: Sampler,
        compiled: Preparation | None = None,
        compiled_encoder: CompiledEncoder | None = None,
    ) -> None:
        self.config = config
        self.lane = lane
        self.runner = runner
        self.kv = kv
        self.sampler = sampler
        self.compiled = compiled
        self.compiled_encoder = compiled_encoder
        self.profiler = None if config.profile_directory is None else StepProfiler(config.profile_directory)
        self.pacing = Pacing()
        self.scheduler = Scheduler(config, kv, self.pacing)
        self.pipeline = Pipeline(
            is_on=config.is_overlapped and runner.can_run_ahead,
            scheduler=self.scheduler,
            kv=kv,
            max_model_len=config.max_model_len,
        )
        self._flight: Flight | None = None  # launched before the tokens of the step before it were read
        self._landed_s = 0.0  # when the last step did
        self._steps_total = 0
        self._step_tokens_total = 0
        self._last_step_tokens = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; its outputs come from step().

        Raises:
            CallerError: it can never be served; nothing is queued.
        """
        check_sequence(sequence, self.sampler.vocab_size)
        self.scheduler.add(sequence)

    def abort(self, sequence_id: int) -> None:
        """Drop a sequence and free what it holds; nothing happens when it is not here."""
        sequence = self.scheduler.abort(sequence_id)
        if sequence is not None:
            self._forget(sequence)

    def has_work(self) -> bool:
        """Whether step() has anything to do."""
        has_sequences = bool(self.scheduler.waiting or self.scheduler.running)
        return has_sequences or self._flight is not None or any(part.has_work() for part in self._prepared())

    def wake_with(self, wake: Callable[[], None]) -> None:
        """Call `wake`, on any thread, when has_work becomes true by itself."""
        for part in self._prepared():
            part.wake_with(wake)

    @torch.inference_mode()
    def step(self) -> list[SequenceOutput]:
        """One step for everybody; what each sequence gained, or how it failed.

        A fault of one row ends that sequence, a fault of the forward ends the batch's; the engine lives through both.
        """
        for part in self._prepared():
            part.advance()
        outputs = self.scheduler.expire()
        batch = self.scheduler.schedule() if self._flight is None else self._flight.batch
        with self._profiled(batch):
            flight = self._flight or self._launch(batch)
            self._flight = self._launch_after(flight)
            outputs += self._land(flight)
        return outputs

    def stats(self) -> EngineStats:
        """Counters and gauges now."""
        fixed = self.lane.kv_bytes_fixed * len(self.scheduler.running)
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            kv_tokens_used=self.kv.num_tokens_used,
            kv_tokens_allocated=self.kv.num_tokens_allocated,
            kv_bytes_allocated=self.kv.num_tokens_allocated * self.lane.kv_bytes_per_token + fixed,
            kv_budget_bytes=self.config.kv_budget_bytes or 0,
            prefix_cache_queries_total=self.kv.prefix_queries_total,
            prefix_cache_hits_total=self.kv.prefix_hits_total,
            preemptions_total=self.scheduler.preemptions_total,
            steps_total=self._steps_total,
            step_tokens_total=self._step_tokens_total,
            last_step_tokens=self._last_step_tokens,
            compiled_batch_sizes=() if self.compiled is None else self.compiled.sizes,
            compiled_encoder_batch_sizes=() if self.compiled_encoder is None else self.compiled_encoder.sizes,
            graph_batch_sizes=() if self.compiled is None else self.compiled.graph_sizes,
        )

    def profile_again(self) -> None:
        """Profile a few more steps, where profiling is on; may be called from any thread."""
        if self.profiler is not None:
            self.profiler.again()

    @torch.inference_mode()
    def on_idle(self) -> None:
        """Give memory back that nobody uses, and check that nothing leaked."""
        self.kv.give_back(KEPT_TOKENS_WHEN_IDLE)
        self.runner.apply(self.kv.take_ops())
        self.sampler.release_memory()
        self.kv.check_integrity()

    def close(self) -> None:
        """Drop every sequence and all KV."""
        if self._flight is not None:
            self._ground(self._flight)
            self._flight = None
        for sequence in [*self.scheduler.waiting, *self.scheduler.running]:
            self.scheduler.finish(sequence, can_keep=False)
            self._forget(sequence)
        self.runner.reset()
        for part in self._prepared():
            part.close()

    def _prepared(self) -> list[Preparation | CompiledEncoder]:
        return [part for part in (self.compiled, self.compiled_encoder) if part is not None]

    def _profiled(self, batch: Batch) -> AbstractContextManager[None]:
        return nullcontext() if self.profiler is None or not batch.items else self.profiler.step(batch.kind)

    def _launch(self, batch: Batch, after: Flight | None = None) -> Flight:
        """Have a batch computed; a failure is kept until the flight is to land."""
        for sequence in batch.preempted:
            self.runner.forget(sequence)
        self.scheduler.launched(batch)
        flight = Flight(batch, time.perf_counter())
        try:
            self.runner.apply(self.kv.take_ops())
        except Exception as failure:  # storage and accounting no longer agree: nothing that is in KV can be trusted
            flight.failure, flight.has_lost_storage = failure, True
            return flight
        if batch.items:
            try:
                take_off(flight, self.runner, self.sampler, after)
            except Exception as failure:
                flight.failure = failure
        return flight

    def _launch_after(self, flight: Flight) -> Flight | None:
        """The step after one that has not landed, where it can be known."""
        batch = None if flight.failure is not None else self.pipeline.next_batch(flight.live_items)
        return None if batch is None else self._launch(batch, after=flight)

    def _land(self, flight: Flight) -> list[SequenceOutput]:
        """Wait for a step and commit it; what each of its sequences gained."""
        try:
            landing = flight.collect()
        except Exception as failure:
            self._ground(flight)
            return self._fail_everything(failure) if flight.has_lost_storage else self._fail(flight.batch, failure)
        for item in flight.batch.items:
            self.scheduler.landed(item.sequence, is_sound=item.sequence.sequence_id not in landing.errors)
        if landing.revised and self._flight is not None:
            self._flight.for_nothing = landing.revised
            self.pipeline.pause()
        outputs = self._commit(flight, landing)
        self._observe(flight)
        return outputs

    def _commit(self, flight: Flight, landing: Landing) -> list[SequenceOutput]:
        """Advance those whose row was computed for something; some ended or were aborted after the launch."""
        items = [i for i in landing.items
                 if not i.sequence.is_finished and i.sequence.sequence_id not in flight.for_nothing]  # fmt: skip
        failed = [self._fail_one(item.sequence, landing.errors[item.sequence.sequence_id])
                  for item in items if item.sequence.sequence_id in landing.errors]  # fmt: skip
        good = tuple(item for item in items if not item.sequence.is_finished)
        outputs = self.scheduler.commit(Batch(good), landing.chosen)
        for item in good:
            if item.sequence.is_finished:
                self._forget(item.sequence)
        return outputs + failed

    def _ground(self, flight: Flight) -> None:
        """Note that a step will never land."""
        for item in flight.batch.items:
            self.scheduler.landed(item.sequence, is_sound=False)

    def _fail_one(self, sequence: Sequence, error: ServerError) -> SequenceOutput:
        # Its KV may hold the NaN that made it fail: never shared.
        self.scheduler.finish(sequence, can_keep=False)
        self._forget(sequence)
        return SequenceOutput(sequence.sequence_id, error=error)

    def _fail(self, batch: Batch, failure: Exception) -> list[SequenceOutput]:
        logger.error(
            "a step of %d sequences failed; they are answered with an error", len(batch.items), exc_info=failure
        )
        error = StepFailed(f"the engine step that held this request failed: {type(failure).__name__}")
        return [self._fail_one(i.sequence, error) for i in batch.items if not i.sequence.is_finished]

    def _fail_everything(self, failure: Exception) -> list[SequenceOutput]:
        logger.error("KV storage failed; every running sequence is answered with an error", exc_info=failure)
        error = StepFailed(f"the engine lost its KV storage: {type(failure).__name__}")
        outputs = [self._fail_one(sequence, error) for sequence in list(self.scheduler.running)]
        self.runner.reset()
        self.runner.apply(self.kv.remake())
        return outputs

    def _forget(self, sequence: Sequence) -> None:
        self.runner.forget(sequence)
        self.sampler.forget(sequence.sequence_id)

    def _observe(self, flight: Flight) -> None:
        batch = flight.batch
        if not batch.items:
            return
        # A step that was launched while another ran begins when that one ends.
        started_s, self._landed_s = max(flight.started_s, self._landed_s), time.perf_counter()
        num_streams = sum(1 for item in batch.items if item.num_tokens == 1)
        num_prompt_tokens = batch.num_tokens - num_streams + batch.num_to_encode
        self.pacing.observe(
            num_streams=num_streams, num_prompt_tokens=num_prompt_tokens, duration_s=self._landed_s - started_s
        )
        self._steps_total += 1
        self._step_tokens_total += batch.num_tokens
        self._last_step_tokens = batch.num_tokens
