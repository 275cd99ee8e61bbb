"""Chooses the next token of every row of a step, and tells the log-probabilities that were asked for.

Knows nothing of text, KV or scheduling; a row's result depends on its own logits, parameters and history, never on
its neighbours. Called by engine/flight.py, once a step: launch() tells the device what to choose, and what it returns
is collected when the host needs to know.

    raw logits ─ finite? ─ token rules ─ logprobs ─ bias, penalties, grammar, min_tokens ─┬─ greedy: argmax
                                                                                           ├─ plain: temperature,
                                                                                           │  draw from the softmax
                                                                                           └─ filtered: temperature,
                                                                                              top_k, top_p, min_p, draw
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
from engine.sampling.filters import (
    NUM_CANDIDATES_DEFERRED,
    FilterRows,
    is_decided_by,
    sample_dense,
    sample_filtered,
)
from engine.sampling.logprobs import RawLogprobs, TokenValues
from engine.sampling.pending import NOT_FINITE, KeptLogits, Part, PendingTokens, SampledTokens
from engine.sampling.processors import LogitsProcessors, is_unprocessed
from engine.sampling.rules import RuleBook
from engine.sequence import SamplingParams, Sequence, TokenLogprobs
from engine.transfer import Download, upload

logger = logging.getLogger(__name__)

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would overflow, and the draw would be the argmax."""

_CPU_WORKSPACE_BYTES = 32 << 20
_GPU_WORKSPACE_BYTES = 256 << 20


def is_greedy(params: SamplingParams) -> bool:
    """Whether the likeliest token is always chosen; of equal ones, the lowest id, as argmax does."""
    return params.temperature < GREEDY_BELOW or params.top_k == 1


def _has_filter(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


@dataclass(frozen=True, slots=True)
class _Drawing:
    """What tokens are drawn from: logits [R, Vp] after every processor, their block maxima, and how to draw."""

    logits: Tensor
    maxima: Tensor
    scratch: Tensor
    rows: Rows[Sequence]
    num_unknown: int
    is_deferring: bool


class Sampler:
    """Samples batches of rows; keeps two float32 workspaces of a chunk of rows each, and what penalties have seen.

    Args:
        vocab_size: V, the width of the logits.
        eos_token_ids: tokens that min_tokens forbids.
        device: where the logits are.
        is_deferring: whether launch() leaves to collect() what it would have to read from the device: whose filters
            keep more tokens than were looked at. No row's token depends on it. None for where reading means waiting.
    """

    def __init__(
        self,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        device: torch.device | str,
        *,
        is_deferring: bool | None = None,
    ) -> None:
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._is_deferring = self._device.type != "cpu" if is_deferring is None else is_deferring
        self._processors = LogitsProcessors(vocab_size, eos_token_ids)
        self._width = -(-vocab_size // BLOCK) * BLOCK
        self._rules = RuleBook(vocab_size, self._width, self._device, is_deferring=self._is_deferring)
        workspace_bytes = _CPU_WORKSPACE_BYTES if self._device.type == "cpu" else _GPU_WORKSPACE_BYTES
        self._max_chunk = max(1, workspace_bytes // (4 * self._width))
        self._logits: Tensor | None = None  # [rows, Vp] float32; columns from V on are -inf, always
        self._scratch: Tensor | None = None  # the same shape

    @property
    def vocab_size(self) -> int:
        """V, which every token id that a sequence names must be below."""
        return self._vocab_size

    def sample(self, logits: Tensor, rows: Rows[Sequence]) -> SampledTokens:
        """Choose one token per row, as launch() does, and wait for them."""
        return self.launch(logits, rows).collect()

    @torch.inference_mode()
    def launch(self, logits: Tensor, rows: Rows[Sequence], *, num_unknown: int = 0) -> PendingTokens:
        """Have one token per row chosen, the one at position len(output_token_ids) + num_unknown of its sequence.

        Args:
            logits: [R, V] any float dtype, on the sampler's device; not changed, and free when this returns.
            rows: the R sequences; only read.
            num_unknown: how many tokens of each were chosen that its sequence does not have yet; other than 0 only
                where no row's SamplingParams.needs_history.

        Returns:
            What collects to tokens, logprobs and errors, one each a row. A row of NaN, or with nothing finite to choose
            from, gets NonFiniteLogits; a row that raises gets that error; their neighbours never notice.

        Raises:
            ValueError: the shape of `logits` is not [len(rows), V].
        """
        if logits.shape != (len(rows), self._vocab_size):
            raise ValueError(f"logits are {tuple(logits.shape)}, not [{len(rows)}, {self._vocab_size}]")
        return self._launch(logits, rows, num_unknown, self._is_deferring)

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
        wanted: list[Tensor] = []
        for start in range(0, len(next_token_ids), self._max_chunk):
            part = logits[start : start + self._max_chunk]
            x, scratch = self._load(part)
            maxima = block_maxima(x)
            raw = RawLogprobs.of(x, maxima, torch.arange(x.shape[0], device=self._device), num_top, scratch)
            chosen = upload(next_token_ids[start : start + self._max_chunk], torch.int64, self._device)[:, None]
            answers = raw.of_tokens(x, chosen)
            wanted += [best_tokens(x, maxima)[0].isfinite().all(), answers.values, answers.top_ids]
        arrived = [tensor.tolist() for tensor in Download(wanted).wait()]
        if not all(arrived[::3]):
            raise NonFiniteLogits("the model gave logits that are not finite for a prompt token")
        entries: list[TokenLogprobs] = []
        for values, top_ids in zip(arrived[1::3], arrived[2::3], strict=True):
            entries += TokenValues.entries(values, top_ids, [num_top] * len(values))
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

    def _launch(self, logits: Tensor, rows: Rows[Sequence], num_unknown: int, is_deferring: bool) -> PendingTokens:
        parts: list[Part] = []
        for start in range(0, len(rows), self._max_chunk):
            chunk = slice(start, start + self._max_chunk)
            parts += self._launch_or_isolate(logits[chunk], rows[chunk], num_unknown, is_deferring)
        return PendingTokens(parts, self._choose_now)

    def _choose_now(self, logits: Tensor, rows: Rows[Sequence]) -> SampledTokens:
        """Choose for rows that launch() left undecided."""
        return self._launch(logits, rows, 0, False).collect()

    def _launch_or_isolate(
        self, logits: Tensor, rows: Rows[Sequence], num_unknown: int, is_deferring: bool
    ) -> list[Part]:
        """Launch a chunk; if that raises, go row by row, so that only the guilty one fails."""
        try:
            return [self._launch_chunk(logits, rows, num_unknown, is_deferring)]
        except Exception as error:
            if len(rows) == 1:
                nothing = torch.full((1,), NOT_FINITE, dtype=torch.int64, device=self._device)
                return [Part(rows, nothing, error=_as_server_error(error, rows[0]))]
            alone = [(logits[i : i + 1], rows[i : i + 1]) for i in range(len(rows))]
            return [part for one in alone for part in self._launch_or_isolate(*one, num_unknown, is_deferring)]

    def _launch_chunk(self, logits: Tensor, rows: Rows[Sequence], num_unknown: int, is_deferring: bool) -> Part:
        x, scratch = self._load(logits)
        has_rules = any(s.params.token_rules is not None for s in rows)
        maxima = self._rules.apply(x, rows) if has_rules else block_maxima(x)
        asking = [
            (i, min(s.params.num_logprobs, self._vocab_size))
            for i, s in enumerate(rows)
            if s.params.num_logprobs is not None
        ]
        raw: RawLogprobs | None = None
        if asking:
            index = upload([i for i, _ in asking], torch.int64, self._device)
            raw = RawLogprobs.of(x, maxima, index, max(num_top for _, num_top in asking), scratch)
        if not all(map(is_unprocessed, rows)) and self._processors.apply(x, rows):
            maxima = block_maxima(x)
        largest, likeliest = best_tokens(x, maxima)
        drawing = _Drawing(x, maxima, scratch, rows, num_unknown, is_deferring)
        token_ids = torch.where(largest.isfinite(), self._draw(drawing, likeliest), NOT_FINITE)
        values: TokenValues | None = None
        if raw is not None:
            values = raw.of_tokens(logits, token_ids.clamp(min=0).index_select(0, raw.index)[:, None])
        return Part(rows, token_ids, asking, values, self._keep(logits, rows) if is_deferring else None)

    def _keep(self, logits: Tensor, rows: Rows[Sequence]) -> KeptLogits | None:
        """Copy the rows that may turn out to be undecided."""
        unsure = [
            i
            for i, s in enumerate(rows)
            if not is_greedy(s.params)
            and _has_filter(s.params)
            and not is_decided_by(NUM_CANDIDATES_DEFERRED, s.params, self._vocab_size)
        ]
        if not unsure:
            return None
        return KeptLogits(unsure, logits.index_select(0, upload(unsure, torch.int64, self._device)))

    def _draw(self, drawing: _Drawing, likeliest: Tensor) -> Tensor:
        """Return the token of each row: [R] int64; `likeliest` for the greedy ones, UNDECIDED where it was put off."""
        dense: list[int] = []
        filtered: list[int] = []
        for i, sequence in enumerate(drawing.rows):
            if not is_greedy(sequence.params):
                (filtered if _has_filter(sequence.params) else dense).append(i)
        if not dense and not filtered:
            return likeliest
        drawn = likeliest.clone()
        if dense:
            group = self._group(dense, drawing)
            drawn[group.index] = sample_dense(drawing.logits, group, drawing.scratch)[:, 0]
        if filtered:
            group = self._group(filtered, drawing)
            drawn[group.index] = sample_filtered(
                drawing.logits, drawing.maxima, group, self._vocab_size, drawing.scratch,
                is_deferring=drawing.is_deferring,
            )[:, 0]  # fmt: skip
        return drawn

    def _group(self, index: list[int], drawing: _Drawing) -> FilterRows:
        rows = [drawing.rows[i] for i in index]
        uniforms = [uniform(s.params.seed, len(s.output_token_ids) + drawing.num_unknown) for s in rows]
        return FilterRows.of(index, [s.params for s in rows], uniforms, self._vocab_size, self._device)


def _as_server_error(error: Exception, sequence: Sequence) -> ServerError:
    if isinstance(error, ServerError):
        return error
    logger.error("sampling failed for sequence %s", sequence.sequence_id, exc_info=error)
    return StepFailed(f"choosing the next token failed: {type(error).__name__}")
