"""The step: schedule, forward, sample, commit; and what happens to a step that fails.

Knows nothing of text, HTTP or asyncio; runs on one thread, the engine thread, that model_manager owns.
Built by engine/build.py from a loaded model; driven through add, abort and step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from engine.compile.steps import CompiledSteps
from engine.config import EngineConfig
from engine.errors import ServerError, StepFailed
from engine.kv.accounting import KVAccounting
from engine.model.runner import Runner, StepLogits
from engine.pacing import Pacing
from engine.profiling import StepProfiler
from engine.prompt_reader import read_prompts
from engine.sampling.sampler import Sampler
from engine.scheduler import Batch, Chosen, Scheduler
from engine.sequence import EngineStats, Sequence, SequenceOutput
from engine.validation import check_sequence

logger = logging.getLogger(__name__)

KEPT_TOKENS_WHEN_IDLE = 8_192  # KV of ended sequences that an idle server keeps for their prefixes


@dataclass(frozen=True, slots=True)
class Lane:
    """How the model is driven, and what a token of KV costs."""

    name: str
    reason: str
    kv_bytes_per_token: int
    kv_bytes_fixed: int = 0


class Engine:
    """One model, its sequences and their KV.

    Args:
        config: limits.
        lane: for reports.
        runner: the forward.
        kv: the accounting of its memory.
        sampler: chooses tokens from logits.
        compiled: the runner's steps, where they are compiled.
    """

    def __init__(
        self,
        config: EngineConfig,
        lane: Lane,
        runner: Runner,
        kv: KVAccounting,
        sampler: Sampler,
        compiled: CompiledSteps | None = None,
    ) -> None:
        self.config = config
        self.lane = lane
        self.runner = runner
        self.kv = kv
        self.sampler = sampler
        self.compiled = compiled
        self.profiler = None if config.profile_directory is None else StepProfiler(config.profile_directory)
        self.pacing = Pacing()
        self.scheduler = Scheduler(config, kv, self.pacing)
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
        return has_sequences or (self.compiled is not None and self.compiled.has_work())

    def wake_with(self, wake: Callable[[], None]) -> None:
        """Call `wake`, on any thread, when has_work becomes true by itself."""
        if self.compiled is not None:
            self.compiled.wake_with(wake)

    @torch.inference_mode()
    def step(self) -> list[SequenceOutput]:
        """One step for everybody; what each sequence gained, or how it failed.

        A fault of one row ends that sequence, a fault of the forward ends the batch's; the engine lives through both.
        """
        if self.compiled is not None:
            self.compiled.advance()
        started = time.perf_counter()
        outputs = self.scheduler.expire()
        batch = self.scheduler.schedule()
        for sequence in batch.preempted:
            self.runner.forget(sequence)
        try:
            self.runner.apply(self.kv.take_ops())
        except Exception as failure:  # storage and accounting no longer agree: nothing that is in KV can be trusted
            return outputs + self._fail_everything(failure)
        if not batch.items:
            return outputs
        try:
            with nullcontext() if self.profiler is None else self.profiler.step(batch.kind):
                outputs += self._compute(batch)
        except Exception as failure:
            outputs += self._fail(batch, failure)
        self._observe(batch, time.perf_counter() - started)
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
        )

    def profile_again(self) -> None:
        """Profile a few more steps, where profiling is on; may be called from any thread."""
        if self.profiler is not None:
            self.profiler.again()

    def on_idle(self) -> None:
        """Give memory back that nobody uses, and check that nothing leaked."""
        self.kv.give_back(KEPT_TOKENS_WHEN_IDLE)
        self.runner.apply(self.kv.take_ops())
        self.sampler.release_memory()
        self.kv.check_integrity()

    def close(self) -> None:
        """Drop every sequence and all KV."""
        for sequence in [*self.scheduler.waiting, *self.scheduler.running]:
            self.scheduler.finish(sequence, can_keep=False)
            self._forget(sequence)
        self.runner.reset()
        if self.compiled is not None:
            self.compiled.close()

    def _compute(self, batch: Batch) -> list[SequenceOutput]:
        result = self.runner.forward(batch)
        chosen, errors = self._sample(result)
        failed = [self._fail_one(item.sequence, errors[item.sequence.sequence_id])
                  for item in result.items if item.sequence.sequence_id in errors]  # fmt: skip
        good = tuple(item for item in result.items if item.sequence.sequence_id not in errors)
        outputs = self.scheduler.commit(Batch(good), chosen)
        for item in good:
            if item.sequence.is_finished:
                self._forget(item.sequence)
        return outputs + failed

    def _sample(self, result: StepLogits) -> tuple[dict[int, Chosen], dict[int, ServerError]]:
        """Choose a token for each sequence whose last known token was computed; errors by sequence id."""
        errors = read_prompts(result.items, result.logits, self.sampler)
        rows: list[int] = []
        sequences: list[Sequence] = []
        first = 0
        for item in result.items:
            last = first + item.num_logits
            if item.is_sampling and item.sequence.params.max_tokens > 0:
                rows.append(last - 1)
                sequences.append(item.sequence)
            first = last
        if not rows:
            return {}, errors
        logits = result.logits
        if rows != list(range(logits.shape[0])):
            logits = logits[torch.tensor(rows, device=logits.device)]
        sampled = self.sampler.sample(logits, sequences)
        chosen: dict[int, Chosen] = {}
        for row, sequence in enumerate(sequences):
            error = sampled.errors[row]
            if error is not None:
                errors[sequence.sequence_id] = error
            else:
                chosen[sequence.sequence_id] = Chosen(sampled.token_ids[row], sampled.logprobs[row])
        return chosen, errors

    def _fail_one(self, sequence: Sequence, error: ServerError) -> SequenceOutput:
        # Its KV may hold the NaN that made it fail: never shared.
        self.scheduler.finish(sequence, can_keep=False)
        self._forget(sequence)
        return SequenceOutput(sequence.sequence_id, error=error)

    def _fail(self, batch: Batch, failure: Exception) -> list[SequenceOutput]:
        logger.exception("a step of %d sequences failed; they are answered with an error", len(batch.items))
        error = StepFailed(f"the engine step that held this request failed: {type(failure).__name__}")
        return [self._fail_one(i.sequence, error) for i in batch.items if not i.sequence.is_finished]

    def _fail_everything(self, failure: Exception) -> list[SequenceOutput]:
        logger.exception("KV storage failed; every running sequence is answered with an error")
        error = StepFailed(f"the engine lost its KV storage: {type(failure).__name__}")
        outputs = [self._fail_one(sequence, error) for sequence in list(self.scheduler.running)]
        self.runner.reset()
        self.runner.apply(self.kv.remake())
        return outputs

    def _forget(self, sequence: Sequence) -> None:
        self.runner.forget(sequence)
        self.sampler.forget(sequence.sequence_id)

    def _observe(self, batch: Batch, duration_s: float) -> None:
        num_streams = sum(1 for item in batch.items if item.num_tokens == 1)
        num_prompt_tokens = batch.num_tokens - num_streams + batch.num_to_encode
        self.pacing.observe(num_streams=num_streams, num_prompt_tokens=num_prompt_tokens, duration_s=duration_s)
        self._steps_total += 1
        self._step_tokens_total += batch.num_tokens
        self._last_step_tokens = batch.num_tokens
