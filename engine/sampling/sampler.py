"""Chooses the next token of every row of a step, and tells the log-probabilities that were asked for.

Knows nothing of text, KV or scheduling; a row's result depends on its own logits, parameters and history, never on
its neighbours. Called by engine/engine.py, once a step.

    raw logits ─ finite? ─ token rules ─ logprobs ─ bias, penalties, min_tokens ─┬─ greedy: argmax
                                                                                  ├─ plain: temperature, draw from
                                                                                  │  the softmax
                                                                                  └─ filtered: temperature, top_k,
                                                                                     top_p, min_p, draw
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import NonFiniteLogits, ServerError, StepFailed
from engine.sampling.candidates import best_tokens, block_maxima
from engine.sampling.draw import BLOCK, uniform
from engine.sampling.filters import FilterRows, sample_dense, sample_filtered
from engine.sampling.logprobs import RawLogprobs
from engine.sampling.processors import LogitsProcessors, is_unprocessed
from engine.sampling.rules import RuleBook
from engine.sequence import SamplingParams, Sequence, TokenLogprobs

logger = logging.getLogger(__name__)

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would overflow, and the draw would be the argmax."""

_CPU_WORKSPACE_BYTES = 32 << 20
_GPU_WORKSPACE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """The next token of each row.

    Args:
        token_ids: one id a row; 0, and not to be used, where `errors` is set.
        logprobs: an entry a row, None where not asked for or failed.
        errors: an entry a row, None where the row went well.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    errors: list[ServerError | None]


def is_greedy(params: SamplingParams) -> bool:
    """Whether the likeliest token is always chosen; of equal ones, the lowest id, as argmax does."""
    return params.temperature < GREEDY_BELOW or params.top_k == 1


def _has_filter(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


class Sampler:
    """Samples batches of rows; keeps two float32 workspaces of a chunk of rows each, and what penalties have seen.

    Args:
        vocab_size: V, the width of the logits.
        eos_token_ids: tokens that min_tokens forbids.
        device: where the logits are.
    """

    def __init__(self, vocab_size: int, eos_token_ids: Iterable[int], device: torch.device | str) -> None:
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._processors = LogitsProcessors(vocab_size, eos_token_ids)
        self._width = -(-vocab_size // BLOCK) * BLOCK
        self._rules = RuleBook(vocab_size, self._width, self._device)
        workspace_bytes = _CPU_WORKSPACE_BYTES if self._device.type == "cpu" else _GPU_WORKSPACE_BYTES
        self._max_chunk = max(1, workspace_bytes // (4 * self._width))
        self._logits: Tensor | None = None  # [rows, Vp] float32; columns from V on are -inf, always
        self._scratch: Tensor | None = None  # the same shape

    @property
    def vocab_size(self) -> int:
        """V, which every token id that a sequence names must be below."""
        return self._vocab_size

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Rows[Sequence]) -> SampledTokens:
        """Choose one token per row, the one at position len(output_token_ids) of its sequence.

        Args:
            logits: [R, V] any float dtype, on the sampler's device; not changed.
            rows: the R sequences; only read.

        Returns:
            Tokens, logprobs and errors, one each a row. A row of NaN, or with nothing finite to choose from, gets
            NonFiniteLogits; a row that raises gets that error; their neighbours never notice.

        Raises:
            ValueError: the shape of `logits` is not [len(rows), V].
        """
        if logits.shape != (len(rows), self._vocab_size):
            raise ValueError(f"logits are {tuple(logits.shape)}, not [{len(rows)}, {self._vocab_size}]")
        result = SampledTokens([], [], [])
        for start in range(0, len(rows), self._max_chunk):
            chunk = slice(start, start + self._max_chunk)
            self._sample_or_isolate(logits[chunk], rows[chunk], result)
        return result

    @torch.inference_mode()
    def prompt_logprobs(self, logits: Tensor, next_token_ids: Rows[int], num_top: int) -> list[TokenLogprobs]:
        """Return the log-probability of each prompt token given those before it, and the likeliest others.

        Args:
            logits: [T, V] any float dtype, of T consecutive positions.
            next_token_ids: the T tokens that follow them.
            num_top: how many alternatives, >= 0.

        Returns:
            T entries.

        Raises:
            NonFiniteLogits: some position's logits hold a NaN or nothing finite.
        """
        num_top = min(num_top, self._vocab_size)
        entries: list[TokenLogprobs] = []
        for start in range(0, len(next_token_ids), self._max_chunk):
            part = logits[start : start + self._max_chunk]
            x, scratch = self._load(part)
            maxima = block_maxima(x)
            if not best_tokens(x, maxima)[0].isfinite().all():
                raise NonFiniteLogits("the model gave logits that are not finite for a prompt token")
            raw = RawLogprobs.of(x, maxima, torch.arange(x.shape[0], device=self._device), num_top, scratch)
            chosen = torch.tensor(next_token_ids[start : start + self._max_chunk], dtype=torch.int64)[:, None]
            entries += raw.of_tokens(x, chosen.to(self._device), [num_top] * x.shape[0])
        return entries

    def forget(self, sequence_id: int) -> None:
        """Drop what is kept of a sequence that ended; harmless when nothing is."""
        self._processors.forget(sequence_id)

    @property
    def num_tracked(self) -> int:
        """How many sequences something is kept of."""
        return len(self._processors)

    def release_memory(self) -> None:
        """Give the workspaces back; the next step makes them again."""
        self._logits = self._scratch = None

    def _load(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Copy [R, V] logits into the float32 workspace; return its R rows [R, Vp] and the scratch."""
        num_rows = logits.shape[0]
        if self._logits is None or self._scratch is None or self._logits.shape[0] < num_rows:
            capacity = min(self._max_chunk, (num_rows + 3) // 4 * 4)
            # Kept from step to step: faulting in 10 MB of fresh pages costs more than the arithmetic on them.
            self._logits = torch.full((capacity, self._width), float("-inf"), device=self._device)
            self._scratch = torch.empty_like(self._logits)
        x = self._logits[:num_rows]
        x[:, : self._vocab_size].copy_(logits)
        return x, self._scratch

    def _sample_or_isolate(self, logits: Tensor, rows: Rows[Sequence], result: SampledTokens) -> None:
        """Append a chunk's tokens to `result`; if that raises, go row by row, so that only the guilty one fails."""
        try:
            token_ids, logprobs, errors = self._sample_chunk(logits, rows)
        except Exception as error:
            if len(rows) > 1:
                for i in range(len(rows)):
                    self._sample_or_isolate(logits[i : i + 1], rows[i : i + 1], result)
                return
            token_ids, logprobs, errors = [0], [None], [_as_server_error(error, rows[0])]
        result.token_ids.extend(token_ids)
        result.logprobs.extend(logprobs)
        result.errors.extend(errors)

    def _sample_chunk(
        self, logits: Tensor, rows: Rows[Sequence]
    ) -> tuple[list[int], list[TokenLogprobs | None], list[ServerError | None]]:
        x, scratch = self._load(logits)
        has_rules = any(s.params.token_rules is not None for s in rows)
        maxima = self._rules.apply(x, rows) if has_rules else block_maxima(x)
        asking = [i for i, s in enumerate(rows) if s.params.num_logprobs is not None]
        raw: RawLogprobs | None = None
        if asking:
            num_top = min(max(rows[i].params.num_logprobs or 0 for i in asking), self._vocab_size)
            raw = RawLogprobs.of(x, maxima, torch.tensor(asking).to(self._device), num_top, scratch)
        if not all(map(is_unprocessed, rows)) and self._processors.apply(x, rows):
            maxima = block_maxima(x)
        largest, likeliest = best_tokens(x, maxima)
        is_finite = largest.isfinite()
        drawn = self._draw(x, maxima, likeliest, rows, scratch)
        token_ids: list[int] = torch.where(is_finite, drawn, -1).tolist()
        errors: list[ServerError | None] = [
            _non_finite(s) if t < 0 else None for t, s in zip(token_ids, rows, strict=True)
        ]
        logprobs: list[TokenLogprobs | None] = [None] * len(rows)
        if raw is not None:
            chosen = torch.where(is_finite, drawn, 0).index_select(0, raw.index)[:, None]
            wanted = [min(rows[i].params.num_logprobs or 0, self._vocab_size) for i in asking]
            for i, entry in zip(asking, raw.of_tokens(logits, chosen, wanted), strict=True):
                logprobs[i] = entry if errors[i] is None else None
        return [max(t, 0) for t in token_ids], logprobs, errors

    def _draw(self, x: Tensor, maxima: Tensor, likeliest: Tensor, rows: Rows[Sequence], scratch: Tensor) -> Tensor:
        """Return the token of each row: [R] int64; `likeliest` for the greedy ones."""
        dense: list[int] = []
        filtered: list[int] = []
        for i, sequence in enumerate(rows):
            if not is_greedy(sequence.params):
                (filtered if _has_filter(sequence.params) else dense).append(i)
        if not dense and not filtered:
            return likeliest
        drawn = likeliest.clone()
        if dense:
            group = self._group(dense, rows)
            drawn[group.index] = sample_dense(x, group, scratch)[:, 0]
        if filtered:
            group = self._group(filtered, rows)
            drawn[group.index] = sample_filtered(x, maxima, group, self._vocab_size, scratch)[:, 0]
        return drawn

    def _group(self, index: list[int], rows: Rows[Sequence]) -> FilterRows:
        params = [rows[i].params for i in index]
        uniforms = [uniform(rows[i].params.seed, len(rows[i].output_token_ids)) for i in index]
        return FilterRows.of(index, params, uniforms, self._vocab_size, self._device)


def _non_finite(sequence: Sequence) -> NonFiniteLogits:
    position = len(sequence.output_token_ids)
    return NonFiniteLogits(f"no finite logit to choose from, or a NaN or infinite one, at output token {position}")


def _as_server_error(error: Exception, sequence: Sequence) -> ServerError:
    if isinstance(error, ServerError):
        return error
    logger.error("sampling failed for sequence %s", sequence.sequence_id, exc_info=error)
    return StepFailed(f"choosing the next token failed: {type(error).__name__}")
