"""The tokens of a step between the moment the device was told to choose them and the moment the host reads them.

Knows nothing of how tokens are chosen.
Made by engine/sampling/sampler.py's launch, collected by engine/flight.py.

A negative id says on the device what Python would else have to ask it row by row: the row is not finite, or its filters
keep more tokens than were looked at. Rows of the second kind, few and rare, are chosen again when they are read.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.errors import NonFiniteLogits, ServerError
from engine.sampling.filters import UNDECIDED
from engine.sampling.logprobs import TokenValues
from engine.sequence import Sequence, TokenLogprobs
from engine.transfer import Download, upload

NOT_FINITE = -1
"""In the place of a token id: nothing can be chosen from this row."""


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """The next token of each row.

    Args:
        token_ids: one id a row; 0, and not to be used, where `errors` is set.
        logprobs: an entry a row, None where not asked for or failed.
        errors: an entry a row, None where the row went well.
        revised: rows whose token is another than PendingTokens.token_ids has.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    errors: list[ServerError | None]
    revised: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class KeptLogits:
    """Copies of the logits of rows that may have to be chosen again.

    Args:
        rows: S indices into the part's rows.
        logits: [S, V], as the model gave them: its own tensor may be overwritten by the next step.
    """

    rows: list[int]
    logits: Tensor


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a step.

    Args:
        sequences: one a row.
        token_ids: [S] int64 on the device; NOT_FINITE or UNDECIDED where there is no token.
        asking: rows that want logprobs, and how many alternatives each.
        values: of the rows in `asking`; None when there are none.
        kept: of the rows that may be undecided; None when there are none.
        error: why these rows fail before anything is computed; then there is one row.
    """

    sequences: Rows[Sequence]
    token_ids: Tensor
    asking: Rows[tuple[int, int]] = ()
    values: TokenValues | None = None
    kept: KeptLogits | None = None
    error: ServerError | None = None


Choose = Callable[[Tensor, Rows[Sequence]], SampledTokens]


class PendingTokens:
    """A step's tokens, chosen on the device and on their way.

    Args:
        parts: of the step's rows, in order.
        choose_again: from logits [S, V] and their sequences, exactly, at the price of waiting.
    """

    def __init__(self, parts: Rows[Part], choose_again: Choose) -> None:
        self._parts = parts
        self._choose_again = choose_again
        self._download = Download([tensor for part in parts for tensor in _tensors(part)])

    @property
    def token_ids(self) -> Tensor:
        """[R] int64 on the device, to compute the next step from; some valid id where a row has no token yet."""
        return torch.cat([part.token_ids for part in self._parts]).clamp_(min=0)

    @torch.inference_mode()
    def collect(self) -> SampledTokens:
        """Wait for the tokens.

        Tokens that were unknown at the launch must have been appended to their sequences.

        Raises:
            RuntimeError: the device failed at this step or before.
        """
        tensors = iter(self._download.wait())
        result = SampledTokens([], [], [])
        for part in self._parts:
            self._collect_part(part, [next(tensors).tolist() for _ in _tensors(part)], result)
        return result

    def _collect_part(self, part: Part, arrived: list[Any], result: SampledTokens) -> None:
        first = len(result.token_ids)
        token_ids: list[int] = arrived[0]
        result.token_ids.extend(max(token_id, 0) for token_id in token_ids)
        for token_id, sequence in zip(token_ids, part.sequences, strict=True):
            result.errors.append(part.error or (_non_finite(sequence) if token_id == NOT_FINITE else None))
        result.logprobs.extend([None] * len(token_ids))
        if part.values is not None:
            entries = part.values.entries(arrived[1], arrived[2], [num_top for _, num_top in part.asking])
            for (row, _), entry in zip(part.asking, entries, strict=True):
                result.logprobs[first + row] = entry if result.errors[first + row] is None else None
        if part.kept is not None and UNDECIDED in token_ids:
            self._revise(part, part.kept, token_ids, first, result)

    def _revise(self, part: Part, kept: KeptLogits, token_ids: list[int], first: int, result: SampledTokens) -> None:
        places = [place for place, row in enumerate(kept.rows) if token_ids[row] == UNDECIDED]
        rows = [kept.rows[place] for place in places]
        logits = kept.logits.index_select(0, upload(places, torch.int64, kept.logits.device))
        again = self._choose_again(logits, [part.sequences[row] for row in rows])
        for number, row in enumerate(rows):
            result.token_ids[first + row] = again.token_ids[number]
            result.logprobs[first + row] = again.logprobs[number]
            result.errors[first + row] = again.errors[number]
            result.revised.append(first + row)


def _tensors(part: Part) -> list[Tensor]:
    """What of a part the host reads."""
    return [part.token_ids] if part.values is None else [part.token_ids, part.values.values, part.values.top_ids]


def _non_finite(sequence: Sequence) -> NonFiniteLogits:
    position = len(sequence.output_token_ids)
    return NonFiniteLogits(f"no finite logit to choose from, or a NaN or infinite one, at output token {position}")
