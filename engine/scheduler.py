"""What the next step computes: which sequences, which of their tokens, within one token budget.

Knows nothing of tensors, models or sampling; no torch here.
Driven by engine.py: schedule() before a forward, commit() after it.

There is no prefill phase and no decode phase. Every sequence has num_computed_tokens, which chases its num_tokens;
a step schedules some of the difference. One token left to compute is what others call decode, many are prefill, and a
prompt cut over several steps, a reused prefix or a preempted sequence that recomputes need no further idea.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from engine.batch import Batch, Chosen, ScheduledSequence
from engine.config import EngineConfig
from engine.errors import ContextLengthExceeded, InvalidValue, QueueTimeout
from engine.kv.accounting import KVAccounting
from engine.pacing import Pacing
from engine.sequence import FinishReason, Sequence, SequenceOutput, SequenceState, Source

AGEING_S = 5.0  # a sequence that has waited this long counts as one priority step more urgent


class Scheduler:
    """First come, first served within a priority, under a token budget and a KV budget.

    Args:
        config: limits.
        kv: the accounting of KV memory.
        pacing: bounds the prompt tokens of a step while others stream.
        clock: seconds, monotonic.
    """

    def __init__(
        self, config: EngineConfig, kv: KVAccounting, pacing: Pacing, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config
        self.kv = kv
        self.pacing = pacing
        self.clock = clock
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []  # in order of admission
        self.preemptions_total = 0
        self._preempted: list[Sequence] = []
        # Finished sequences that are in flight, by id, and whether their KV can be kept.
        self._leaving: dict[int, bool] = {}

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            ContextLengthExceeded: it can never fit, whatever else runs.
            InvalidValue: it has a source and the model no encoder, or the other way round.
        """
        self._check_source(sequence.source)
        num_prompt = len(sequence.prompt_token_ids)
        if num_prompt >= self.config.max_model_len and sequence.params.max_tokens > 0:
            raise ContextLengthExceeded(
                f"the prompt has {num_prompt} tokens, and this model's context holds {self.config.max_model_len} "
                "tokens, prompt and output together",
                param="prompt",
            )
        num_needed = min(num_prompt + max(1, sequence.params.max_tokens), self.config.max_model_len)
        if not self.kv.can_ever_hold(num_needed):
            raise ContextLengthExceeded(
                f"the prompt's {num_prompt} tokens and max_tokens {sequence.params.max_tokens} need KV memory for "
                f"{num_needed} tokens, which is more than --kv-cache-memory gives this server",
                param="max_tokens",
            )
        self.waiting.append(sequence)

    def _check_source(self, source: Source | None) -> None:
        longest = self.config.max_source_len
        if (source is None) != (longest is None):
            raise InvalidValue(
                "this model reads a source with its encoder" if source is None else "this model has no encoder"
            )
        if source is None or longest is None:
            return
        if source.num_positions > longest:
            raise ContextLengthExceeded(
                f"the prompt has {source.num_positions} tokens, and this model's encoder reads at most {longest}",
                param="prompt",
            )
        if not self.kv.can_ever_encode(source):
            raise ContextLengthExceeded(
                f"the encoder's output of {source.num_positions} positions needs more KV memory than "
                "--kv-cache-memory gives this server",
                param="prompt",
            )

    def abort(self, sequence_id: int) -> Sequence | None:
        """Forget a sequence wherever it stands; None when it is not here."""
        for queue in (self.waiting, self.running):
            for sequence in queue:
                if sequence.sequence_id == sequence_id:
                    self.finish(sequence, can_keep=True)
                    return sequence
        return None

    def finish(self, sequence: Sequence, *, can_keep: bool) -> None:
        """Take a sequence out; `can_keep` False when its KV may be wrong."""
        queue = self.waiting if sequence.state is SequenceState.WAITING else self.running
        queue.remove(sequence)
        sequence.state = SequenceState.FINISHED
        if sequence.num_in_flight:
            # A step that was launched still writes to its memory: nobody else gets it before that has landed.
            self._leaving[sequence.sequence_id] = can_keep
        else:
            self.kv.free(sequence, can_keep=can_keep)

    def launched(self, batch: Batch) -> None:
        """Note that a step is being computed."""
        for item in batch.items:
            item.sequence.num_in_flight += 1

    def landed(self, sequence: Sequence, *, is_sound: bool) -> None:
        """Note that a step of a sequence was computed; `is_sound` False when what it wrote to KV may be wrong."""
        sequence.num_in_flight -= 1
        can_keep = self._leaving.pop(sequence.sequence_id, None)
        if can_keep is None:
            return
        if sequence.num_in_flight:
            self._leaving[sequence.sequence_id] = can_keep and is_sound
        else:
            self.kv.free(sequence, can_keep=can_keep and is_sound)

    def expire(self) -> list[SequenceOutput]:
        """Answer those that waited past their deadline."""
        now = self.clock()
        late = [s for s in self.waiting if s.deadline_s is not None and now > s.deadline_s and not s.num_preemptions]
        outputs = []
        for sequence in late:
            self.finish(sequence, can_keep=True)
            waited = now - sequence.arrival_time_s
            error = QueueTimeout(f"the request waited {waited:.1f} s for a place and none came free", retry_after_s=1.0)
            outputs.append(SequenceOutput(sequence.sequence_id, error=error))
        return outputs

    def schedule(self) -> Batch:
        """Choose the next step's tokens, admitting and preempting as memory allows."""
        self._preempted.clear()
        budget = self.config.max_batch_tokens
        items: list[ScheduledSequence] = []
        # Streams first: each has one token to compute, and their pace is what people see.
        streams = [s for s in self.running if s.num_tokens - s.num_computed_tokens == 1]
        for sequence in streams:
            if budget > 0 and sequence.state is SequenceState.RUNNING and self._make_room(sequence):
                items.append(ScheduledSequence(sequence, sequence.num_computed_tokens, 1, 1))
                budget -= 1
        items = [item for item in items if item.sequence.state is SequenceState.RUNNING]
        num_prompts = len(self.running) - len(items) + len(self.waiting)
        prompt_budget = self.pacing.prompt_tokens(budget, num_streams=len(items), num_prompts=num_prompts)
        in_step = {id(item.sequence) for item in items}
        for sequence in [s for s in self.running if id(s) not in in_step and s not in streams]:
            if prompt_budget <= 0:
                break
            if sequence.state is SequenceState.RUNNING and self._make_room(sequence):
                prompt_budget -= self._append(items, sequence, prompt_budget)
        items = [item for item in items if item.sequence.state is SequenceState.RUNNING]
        num_to_encode = self._admit(items, prompt_budget)
        return Batch(tuple(items), tuple(self._preempted), num_to_encode)

    def commit(self, batch: Batch, chosen: dict[int, Chosen]) -> list[SequenceOutput]:
        """Note a finished forward and its chosen tokens (by sequence id); returns what each sequence gained."""
        outputs = []
        for item in batch.items:
            sequence = item.sequence
            is_sampling = item.is_sampling
            sequence.num_computed_tokens = item.start + item.num_tokens
            self.kv.commit(sequence)
            if is_sampling:
                outputs.append(self._output(sequence, chosen.get(sequence.sequence_id)))
        return outputs

    def _admit(self, items: list[ScheduledSequence], prompt_budget: int) -> int:
        """Let waiting sequences in while the budget lasts; returns the encoder positions that this step computes."""
        num_to_encode = 0
        if not self.waiting:
            return num_to_encode
        now = self.clock()
        self.waiting.sort(key=lambda s: (s.priority - int((now - s.arrival_time_s) / AGEING_S), s.arrival_time_s))
        for sequence in list(self.waiting):
            if prompt_budget <= 0 or len(self.running) >= self.config.max_num_seqs:
                break
            # A source is encoded whole. One always may be, however small the budget: progress is promised.
            more = self.kv.num_to_encode(sequence)
            if num_to_encode and more > prompt_budget:
                break
            if self.kv.is_being_computed(sequence):
                continue  # choices of one prompt, clients of one system prompt: the first computes for all
            if not self.kv.admit(sequence):
                # Strictly in order: letting small ones pass would starve the large.
                break
            self.waiting.remove(sequence)
            sequence.state = SequenceState.RUNNING
            if sequence.scheduled_time_s is None:
                sequence.scheduled_time_s = now
            self.running.append(sequence)
            prompt_budget -= self._append(items, sequence, prompt_budget) + more
            num_to_encode += more
        return num_to_encode

    def _append(self, items: list[ScheduledSequence], sequence: Sequence, budget: int) -> int:
        start = sequence.num_computed_tokens
        left = sequence.num_tokens - start
        if self.kv.is_chunkable:
            num_tokens = min(left, budget)
        else:
            # Whole prompts, and after a preemption the output token by token, as it was made: a recurrent state or a
            # RoPE that grows with length must see the same steps again.
            num_tokens = len(sequence.prompt_token_ids) if start == 0 else 1
        items.append(ScheduledSequence(sequence, start, num_tokens, _num_logits(sequence, start, start + num_tokens)))
        return num_tokens

    def _make_room(self, sequence: Sequence) -> bool:
        """Room for all of a running sequence's tokens, at the cost of the youngest; False when it had to go itself."""
        while not self.kv.ensure(sequence, sequence.num_tokens):
            youngest = max(self.running, key=lambda s: (s.priority, s.arrival_time_s))
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.kv.free(sequence, can_keep=True)
        sequence.state = SequenceState.WAITING
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        sequence.prompt_logprobs.clear()
        sequence.probed = None
        sequence.alignment.clear()
        self.preemptions_total += 1
        self._preempted.append(sequence)
        self.waiting.append(sequence)

    def _is_eos(self, sequence: Sequence, token_id: int) -> bool:
        return token_id in self.config.eos_token_ids and not sequence.params.ignore_eos

    def _output(self, sequence: Sequence, chosen: Chosen | None) -> SequenceOutput:
        """Append the chosen token and say whether the sequence ends; without one, only the prompt was scored."""
        finish_reason: FinishReason | None = None
        stop_token_id: int | None = None
        params = sequence.params
        if chosen is not None:
            token_id = chosen.token_id
            sequence.output_token_ids.append(token_id)
            is_end = token_id in params.stop_token_ids or self._is_eos(sequence, token_id)
            if is_end and len(sequence.output_token_ids) >= params.min_tokens:
                finish_reason, stop_token_id = "stop", token_id
            if sequence.grammar is not None and sequence.grammar.accept(token_id):
                finish_reason = "stop"
                stop_token_id = token_id if token_id in sequence.grammar.end_token_ids else stop_token_id
        has_all = len(sequence.output_token_ids) >= params.max_tokens
        if finish_reason is None and (has_all or sequence.num_tokens >= self.config.max_model_len):
            finish_reason = "length"
        is_first = len(sequence.output_token_ids) <= 1
        if finish_reason is not None:
            self.finish(sequence, can_keep=True)
        with_prompt = is_first and params.num_prompt_logprobs is not None
        return SequenceOutput(
            sequence.sequence_id,
            token_ids=() if chosen is None else (chosen.token_id,),
            logprobs=(chosen.logprobs,) if chosen is not None and chosen.logprobs is not None else None,
            prompt_logprobs=(None, *sequence.prompt_logprobs) if with_prompt else None,
            finish_reason=finish_reason,
            stop_token_id=stop_token_id,
            num_cached_tokens=sequence.num_cached_tokens,
            scheduled_time_s=sequence.scheduled_time_s,
            probed=sequence.probed if is_first else None,
            alignment=sequence.joined_alignment() if params.is_aligning else None,
        )


def _num_logits(sequence: Sequence, start: int, stop: int) -> int:
    """How many of the last of a sequence's tokens [start, stop) want logits."""
    is_sampling = stop == sequence.num_tokens
    params = sequence.params
    if sequence.output_token_ids:
        return int(is_sampling)  # what was asked about the prompt has been told
    if params.num_prompt_logprobs is not None:
        return stop - start
    if params.probe is not None and start <= params.probe.position < stop:
        return stop - params.probe.position
    return int(is_sampling)
