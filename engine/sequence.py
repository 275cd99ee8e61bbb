"""One sequence of token ids on its way through the engine: what was asked, what was made, how far it got.

Knows nothing of text, tensors or HTTP; no torch here.
Made by model_manager, advanced by the scheduler and the engine, read back as SequenceOutput.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from engine.errors import ServerError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """What the encoder of an encoder-decoder reads for a sequence: text as ids, or speech as features.

    Args:
        key: equal for two sources whose encoder output is the same and may be shared (a digest, salted by API key).
        num_positions: of the encoder's output, which cross-attention looks at.
        token_ids: of a text; None for speech.
        features: log-mel spectrogram [mel bins, frames], float32; None for text.
    """

    key: bytes
    num_positions: int
    token_ids: tuple[int, ...] | None = None
    features: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class TimestampRules:
    """The grammar of Whisper's timestamp tokens (Radford et al. 2022, and the reference implementation).

    Timestamps come in pairs, never fall, and are chosen whenever all of them together are likelier than any text token.

    Args:
        first_id: of <|0.00|>; every id from here on is a timestamp.
        end_of_text_id: every id below it is text.
        no_timestamps_id: never chosen.
        max_initial_index: the first timestamp is at most this many after <|0.00|>; None for no bound.
    """

    first_id: int
    end_of_text_id: int
    no_timestamps_id: int
    max_initial_index: int | None = None


@dataclass(frozen=True, slots=True)
class TokenRules:
    """Which tokens may be chosen at all; what may not is impossible in its log-probabilities too.

    Args:
        suppressed: never.
        suppressed_first: not as the first output token.
        allowed: only these; None for all.
        timestamps: the grammar of timestamp tokens; None where there are none.
    """

    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()
    allowed: tuple[int, ...] | None = None
    timestamps: TimestampRules | None = None


@dataclass(frozen=True, slots=True)
class PromptProbe:
    """Asks how likely some tokens are after a token of the prompt: Whisper tells silence and language that way.

    Args:
        position: index of the prompt token whose logits are read.
        token_ids: whose probabilities are wanted.
    """

    position: int
    token_ids: tuple[int, ...]


class GrammarState(Protocol):
    """Where one sequence stands in its grammar."""

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Tokens that end the text and are no part of it; allowed where the grammar may end."""

    def fill(self, bits: npt.NDArray[np.uint8]) -> str | None:
        """Write which tokens may follow; returns why none can, when the grammar cannot be followed any further.

        Args:
            bits: [W], W a multiple of 4 and 8 * W at least the vocabulary size: bit i % 8 of byte i // 8 is set where
                token i may follow.
        """

    def accept(self, token_id: int) -> bool:
        """Go on by a token that was allowed; returns whether the text is complete and nothing may follow."""


class TokenGrammar(Protocol):
    """What a text must be like, over one vocabulary; shared by sequences."""

    def start(self) -> GrammarState:
        """The state of a sequence that has no output yet."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens for one sequence; every field is already validated and resolved.

    Args:
        max_tokens: most tokens to generate, >= 1 (0 only to score or to align a prompt).
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
        token_rules: which tokens may be chosen; None for all.
        grammar: what the output must be like; None for anything. It ends the sequence when it is complete and nothing
            may follow, whatever min_tokens and ignore_eos say; while something may, these keep the end from being
            chosen.
        probe: probabilities to tell from the prompt; None for none.
        is_aligning: tell where the alignment heads of a speech model look; only with max_tokens 0.
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
    token_rules: TokenRules | None = None
    grammar: TokenGrammar | None = None
    probe: PromptProbe | None = None
    is_aligning: bool = False

    @property
    def has_penalty(self) -> bool:
        """Whether any of the three penalties is on."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    @property
    def needs_history(self) -> bool:
        """Whether which tokens were chosen so far, and not only how many, decides how the next one is chosen."""
        return self.has_penalty or self.token_rules is not None or self.grammar is not None


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
        probed: probabilities of the probe's tokens, with the first output only, when asked for.
        alignment: float32 [alignment heads, prompt tokens, encoder positions], attention weights of the alignment heads
            over the source, with the first output only, when asked for.
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
    probed: tuple[float, ...] | None = None
    alignment: npt.NDArray[np.float32] | None = None
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
        prompt_token_ids: at least one id, each below the vocabulary size; of an encoder-decoder, the decoder's.
        params: how to choose tokens.
        arrival_time_s: time.monotonic() of its arrival.
        priority: lower runs first among those waiting.
        cache_salt: keys the prefix cache; sequences of different salts never share KV.
        deadline_s: time.monotonic() until which it must have entered its first step, or QueueTimeout; None for never.
        source: what the encoder reads; None for models without one.
    """

    sequence_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_time_s: float
    priority: int = 0
    cache_salt: bytes = b""
    deadline_s: float | None = None
    source: Source | None = None
    # Below: the engine's own; no one else writes them.
    state: SequenceState = SequenceState.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    # After output_token_ids, so a preemption, which keeps these, keeps it.
    grammar: GrammarState | None = field(init=False)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    scheduled_time_s: float | None = None
    num_preemptions: int = 0
    num_in_flight: int = 0  # steps that were launched with it and have not landed
    # What was read of the prompt, until the first output tells it.
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    probed: tuple[float, ...] | None = None
    alignment: list[npt.NDArray[np.float32]] = field(default_factory=list)  # a chunk: [heads, tokens, positions]

    def __post_init__(self) -> None:
        self.grammar = None if self.params.grammar is None else self.params.grammar.start()

    @property
    def kv_salt(self) -> bytes:
        """What its K and V depend on beside its tokens: who asks, and for an encoder-decoder what the encoder read."""
        return self.cache_salt if self.source is None else self.cache_salt + self.source.key

    @property
    def num_tokens(self) -> int:
        """Prompt plus generated tokens so far."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def is_finished(self) -> bool:
        """Whether it has left the scheduler for good."""
        return self.state is SequenceState.FINISHED

    def joined_alignment(self) -> npt.NDArray[np.float32]:
        """The chunks of `alignment` as one: float32 [heads, prompt tokens, source positions]."""
        import numpy as np

        return np.concatenate(self.alignment, axis=1)

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
    compiled_batch_sizes: tuple[int, ...] = ()
    compiled_encoder_batch_sizes: tuple[int, ...] = ()
    graph_batch_sizes: tuple[int, ...] = ()

    @property
    def kv_cache_usage_ratio(self) -> float:
        """Share of the KV budget that is allocated, 0 to 1 (0 when there is no budget)."""
        return self.kv_bytes_allocated / self.kv_budget_bytes if self.kv_budget_bytes else 0.0
