"""Changes logits before temperature: logit_bias, the three penalties, grammars and min_tokens; but for grammars, only
those of the tokens concerned.

Knows nothing of drawing, filters or log-probabilities.
Called by engine/sampling/sampler.py, which tells it when a sequence is gone.

What a sequence has seen is kept here, by sequence id, and advanced by the tokens that are new: recounting 4,000 ids
for each row and step costs 100 microseconds a row. It is a cache: dropped at any time, it is made again from the
sequence's own lists.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from collections.abc import Sequence as Rows

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.errors import InvalidValue
from engine.sampling.grammar import GrammarMasks, is_held
from engine.sequence import SamplingParams, Sequence
from engine.transfer import upload


def is_unprocessed(sequence: Sequence) -> bool:
    """Whether the next token of `sequence` is chosen from the model's own logits."""
    params = sequence.params
    if sequence.grammar is not None:
        return False
    return not (params.logit_bias or is_held(sequence) or params.has_penalty)


class _SeenTokens:
    """The distinct tokens that penalties of one sequence concern, and how often each was generated.

    Prompt tokens are in it (with a count of 0) only when there is a repetition penalty: the other two are about
    output alone.
    """

    __slots__ = ("_counts", "_ids", "_num_counted", "_size", "_slot_of", "_vocab_size")

    def __init__(self, sequence: Sequence, vocab_size: int) -> None:
        prompt = sequence.prompt_token_ids if sequence.params.repetition_penalty != 1.0 else ()
        distinct = [token_id for token_id in dict.fromkeys(prompt) if token_id < vocab_size]
        self._vocab_size = vocab_size
        self._slot_of = {token_id: slot for slot, token_id in enumerate(distinct)}
        self._size = len(distinct)
        self._ids = np.empty(max(64, 2 * self._size), dtype=np.int64)
        self._ids[: self._size] = distinct
        self._counts = np.zeros(self._ids.shape[0], dtype=np.float32)
        self._num_counted = 0

    def advance(self, output_token_ids: list[int]) -> None:
        """Count the output tokens that were not counted yet."""
        for token_id in output_token_ids[self._num_counted :]:
            slot = self._slot_of.get(token_id)
            if slot is None:
                slot = self._append(token_id)
            self._counts[slot] += 1.0
        self._num_counted = len(output_token_ids)

    def _append(self, token_id: int) -> int:
        slot = self._size
        if slot == self._ids.shape[0]:
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token_id
        self._slot_of[token_id] = slot
        self._size += 1
        return slot

    @property
    def token_ids(self) -> npt.NDArray[np.int64]:
        """[N] distinct token ids."""
        return self._ids[: self._size]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        """[N] how often each of `token_ids` was generated."""
        return self._counts[: self._size]


class LogitsProcessors:
    """Applies what sequences ask for to a batch of logits; holds what their penalties have seen."""

    def __init__(self, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._seen: dict[int, _SeenTokens] = {}
        self._masks = GrammarMasks()

    def __len__(self) -> int:
        """How many sequences are tracked."""
        return len(self._seen)

    def forget(self, sequence_id: int) -> None:
        """Drop what is known of a sequence, if anything is."""
        self._seen.pop(sequence_id, None)

    def apply(self, logits: Tensor, rows: Rows[Sequence]) -> bool:
        """Apply bias, then repetition, frequency and presence penalties, then grammars and min_tokens.

        Args:
            logits: [R, Vp] float32, changed in place.
            rows: the R sequences.

        Returns:
            Whether anything was changed.

        Raises:
            InvalidValue: a bias names a token outside the vocabulary, or a grammar cannot be followed any further.
        """
        biased = [(row, s) for row, s in enumerate(rows) if s.params.logit_bias]
        penalised = [(row, s) for row, s in enumerate(rows) if s.params.has_penalty]
        constrained = [(row, s) for row, s in enumerate(rows) if s.grammar is not None]
        # A grammar decides by itself when its text may end.
        held = [(row, s) for row, s in enumerate(rows) if s.grammar is None and is_held(s)]
        if biased:
            self._add_bias(logits, biased)
        if penalised:
            self._penalise(logits, penalised)
        if constrained:
            self._masks.apply(logits, constrained)
        if held:
            self._forbid_end(logits, held)
        return bool(biased or penalised or constrained or held)

    def _add_bias(self, logits: Tensor, rows: Rows[tuple[int, Sequence]]) -> None:
        width = logits.shape[1]
        positions: list[int] = []
        values: list[float] = []
        for row, sequence in rows:
            for token_id, bias in sequence.params.logit_bias:
                if not 0 <= token_id < self._vocab_size:
                    # Unchecked it would be added to a neighbour's logits.
                    rule = f"outside the vocabulary of {self._vocab_size}"
                    raise InvalidValue(f"logit_bias: token id {token_id} is {rule}", param="logit_bias")
                positions.append(row * width + token_id)
                values.append(bias)
        flat = logits.view(-1)
        flat.index_add_(0, upload(positions, torch.int64, flat.device), upload(values, torch.float32, flat.device))

    def _penalise(self, logits: Tensor, rows: Rows[tuple[int, Sequence]]) -> None:
        width = logits.shape[1]
        seen = [self._seen_by(sequence) for _, sequence in rows]
        sizes = [s.token_ids.shape[0] for s in seen]
        if not any(sizes):
            return
        flat = logits.view(-1)
        offsets = np.repeat(np.array([row * width for row, _ in rows], dtype=np.int64), sizes)
        positions = upload(np.concatenate([s.token_ids for s in seen]) + offsets, torch.int64, flat.device)
        counts = upload(np.concatenate([s.counts for s in seen]), torch.float32, flat.device)
        params = [s.params for _, s in rows]
        by_row = np.array([(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params], np.float32)
        repetition, frequency, presence = upload(np.repeat(by_row, sizes, axis=0).T, torch.float32, flat.device)
        values = flat.gather(0, positions)
        values = torch.where(values < 0, values * repetition, values / repetition)
        values -= counts * frequency + (counts > 0) * presence
        flat.scatter_(0, positions, values)

    def _seen_by(self, sequence: Sequence) -> _SeenTokens:
        seen = self._seen.get(sequence.sequence_id)
        if seen is None:
            seen = self._seen[sequence.sequence_id] = _SeenTokens(sequence, self._vocab_size)
        seen.advance(sequence.output_token_ids)
        return seen

    def _forbid_end(self, logits: Tensor, rows: Rows[tuple[int, Sequence]]) -> None:
        width = logits.shape[1]
        positions = [
            row * width + token_id
            for row, sequence in rows
            for token_id in self._ending_ids(sequence.params)
            if 0 <= token_id < self._vocab_size
        ]
        flat = logits.view(-1)
        flat.index_fill_(0, upload(positions, torch.int64, flat.device), float("-inf"))

    def _ending_ids(self, params: SamplingParams) -> Collection[int]:
        return params.stop_token_ids if params.ignore_eos else self._eos_token_ids | params.stop_token_ids
