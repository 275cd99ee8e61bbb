"""One sequence of token ids on its way through the engine: what was asked, what was made, how far it got.

Knows nothing of text, tensors or HTTP; no torch here.
Made by model_manager, advanced by the scheduler and the engine, read back as SequenceOutput.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Literal

from engine.errors import ServerError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens for one sequence; every field is already validated and resolved.

    Args:
        max_tokens: most tokens to generate, >= 1 (0 only with `prompt_logprobs`, to score a prompt).
        temperature: >= 0; 0 is greedy.
        top_p: (0, 1]; 1 is off.
        top_k: >= 0; 0 is off.
        min_p: [0, 1]; 0 is off. Tokens less likely than min_p times the likeliest are dropped.
        frequency_penalty, presence_penalty: [-2, 2], OpenAI's formula over the generated tokens.
        repetition_penalty: > 0; 1 is off. CTRL's formula over prompt and generated tokens.
        logit_bias: (token id, bias in [-100, 100]) pairs, added to the raw logits.
        seed: 64-bit; the same seed gives the same tokens whatever shares the batch.
        min_tokens: EOS and stop tokens cannot be chosen before this many tokens.
        ignore_eos: the model's EOS does not end the sequence (stop_token_ids still do).
        stop_token_ids: more tokens that end the sequence.
        num_logprobs: None for none, else how many alternatives beside the chosen token's logprob (0-20).
        num_prompt_logprobs: the same for each prompt token after the first (`echo` with logprobs).
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of one chosen token under the model (before temperature and filters), and the likeliest others.

    `top` holds (token id, logprob), likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """What one engine step made of one sequence.

    Args:
        sequence_id: the Sequence it belongs to.
        token_ids: new tokens, usually one; an EOS or stop token is included, as the last.
        logprobs: one entry a token in `token_ids`, when asked for.
        prompt_logprobs: one entry a prompt token (the first is None), with the first output only, when asked for.
        finish_reason: set on the last output of a sequence that ended well.
        stop_token_id: the EOS or stop token that ended it, which is not text.
        num_cached_tokens: prompt tokens that were not recomputed thanks to prefix reuse.
        scheduled_time_s: time.monotonic() at which the sequence first entered a step.
        error: set on the last output of a sequence that failed; then token_ids is empty.
    """

    sequence_id: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    scheduled_time_s: float | None = None
    error: ServerError | None = None

    @property
    def is_last(self) -> bool:
        """Whether nothing follows for this sequence."""
        return self.finish_reason is not None or self.error is not None


class SequenceState(enum.Enum):
    """Where a sequence stands in the scheduler."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's sequence; everything it owns hangs here.

    Args:
        sequence_id: unique in the process.
        prompt_token_ids: at least one id, each below the vocabulary size.
        params: how to choose tokens.
        arrival_time_s: time.monotonic() of its arrival.
        priority: lower runs first among those waiting.
        cache_salt: keys the prefix cache; sequences of different salts never share KV.
        deadline_s: time.monotonic() until which it must have entered its first step, or QueueTimeout; None for never.
    """

    sequence_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_time_s: float
    priority: int = 0
    cache_salt: bytes = b""
    deadline_s: float | None = None
    # Below: the engine's own; no one else writes them.
    state: SequenceState = SequenceState.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    scheduled_time_s: float | None = None
    num_preemptions: int = 0
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Prompt plus generated tokens so far."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def is_finished(self) -> bool:
        """Whether it has left the scheduler for good."""
        return self.state is SequenceState.FINISHED

    def token_slice(self, start: int, stop: int) -> list[int]:
        """Token ids [start, stop) of prompt followed by output."""
        prompt = self.prompt_token_ids
        num_prompt = len(prompt)
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : stop - num_prompt]
        if stop <= num_prompt:
            return prompt[start:stop]
        return prompt[start:] + self.output_token_ids[: stop - num_prompt]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters and gauges of the engine at one moment; `_total` values only grow."""

    num_running: int = 0
    num_waiting: int = 0
    kv_tokens_used: int = 0
    kv_tokens_allocated: int = 0
    kv_bytes_allocated: int = 0
    kv_budget_bytes: int = 0
    prefix_cache_queries_total: int = 0
    prefix_cache_hits_total: int = 0
    preemptions_total: int = 0
    steps_total: int = 0
    step_tokens_total: int = 0
    last_step_tokens: int = 0

    @property
    def kv_cache_usage_ratio(self) -> float:
        """Share of the KV budget that is allocated, 0 to 1 (0 when there is no budget)."""
        return self.kv_bytes_allocated / self.kv_budget_bytes if self.kv_budget_bytes else 0.0
