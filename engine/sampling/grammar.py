"""Makes impossible what the grammars of a step's rows forbid, for all of them together.

Knows nothing of what grammars say or how they are written: each tells its row's tokens as bits.
Called by engine/sampling/processors.py, for steps in which some row has a grammar.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.errors import InvalidValue
from engine.sequence import Sequence
from engine.transfer import upload

Bits = npt.NDArray[np.uint8]


def is_held(sequence: Sequence) -> bool:
    """Whether min_tokens still keeps `sequence` from ending."""
    return len(sequence.output_token_ids) < sequence.params.min_tokens


class GrammarMasks:
    """Applies grammars to batches of logits; keeps one small table on the logits' device."""

    def __init__(self) -> None:
        self._penalties: Tensor | None = None

    def apply(self, logits: Tensor, rows: Rows[tuple[int, Sequence]]) -> None:
        """Set what grammars forbid to -inf; other rows keep every bit.

        A NaN or infinite logit is never hidden: it stays, or becomes NaN, and its row fails by it.

        Args:
            logits: [R, Vp] float32, Vp a multiple of 32, padding -inf; changed in place.
            rows: row numbers and their sequences, which have grammars.

        Raises:
            InvalidValue: a grammar cannot be followed any further.
        """
        width = logits.shape[1]
        bits = np.zeros((len(rows), width // 8), dtype=np.uint8)
        for row_bits, (_, sequence) in zip(bits, rows, strict=True):
            fill_bits(row_bits, sequence)
        # Eight tokens a byte: what each of the 256 bytes adds to eight logits. Added, not written over, see above.
        penalties = self._table(logits.device).index_select(0, upload(bits.reshape(-1), torch.int32, logits.device))
        index = upload([row for row, _ in rows], torch.int64, logits.device)
        logits.index_add_(0, index, penalties.view(len(rows), width))

    def _table(self, device: torch.device) -> Tensor:
        """[256, 8] float32: 0 where a bit is set, -inf where it is not."""
        if self._penalties is None:
            is_set = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
            self._penalties = torch.from_numpy(np.where(is_set, 0.0, -np.inf).astype(np.float32)).to(device)
        return self._penalties


def fill_bits(bits: Bits, sequence: Sequence) -> None:
    """Write which tokens may follow in a sequence that has a grammar.

    While something else may follow, min_tokens and ignore_eos keep it from ending.

    Args:
        bits: [W] zeros, 8 * W at least the vocabulary size; changed in place.
        sequence: only read.

    Raises:
        InvalidValue: nothing may follow.
    """
    grammar = sequence.grammar
    assert grammar is not None  # the caller chose those that have one
    reason = grammar.fill(bits)
    if reason is not None:
        position = len(sequence.output_token_ids)
        raise InvalidValue(f"the grammar cannot be followed any further at output token {position}: {reason}")
    params = sequence.params
    if is_held(sequence):
        _clear(bits, grammar.end_token_ids | params.stop_token_ids)
    elif params.ignore_eos:
        _clear(bits, grammar.end_token_ids - params.stop_token_ids)


def _clear(bits: Bits, token_ids: Iterable[int]) -> None:
    """Forbid tokens, unless nothing else is left."""
    kept = [(token_id, bits[token_id >> 3]) for token_id in token_ids if token_id >> 3 < len(bits)]
    for token_id, _ in kept:
        bits[token_id >> 3] &= ~np.uint8(1 << (token_id & 7))
    if not bits.any():
        for token_id, byte in reversed(kept):
            bits[token_id >> 3] = byte
