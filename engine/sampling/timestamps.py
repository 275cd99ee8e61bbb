"""Whisper's grammar of timestamp tokens over a batch of logits: pairs, never falling, and likelier together than text.

Knows nothing of the other rules, of drawing or of log-probabilities.
Called by engine/sampling/rules.py, after every other rule: the last clause weighs what those left.

A vocabulary is text, then the end-of-text token and other special ones, then the timestamps. Text is most of it, and
all the grammar needs of it is its largest logit, which the block maxima tell: only the blocks from the end of the text
on, the tail, are read and written, and a row's text is written only when it is forbidden.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.sampling.candidates import block_maxima
from engine.sampling.draw import BLOCK
from engine.sequence import TimestampRules
from engine.transfer import upload


@dataclass(frozen=True, slots=True)
class Choice:
    """What may follow: ids from `text_from` on below the timestamps, and timestamps [first, stop)."""

    text_from: int
    first: int
    stop: int


def choice_after(output_token_ids: Rows[int], rules: TimestampRules, stop: int) -> Choice:
    """Return what the tokens made so far leave to choose from.

    Args:
        output_token_ids: all of the sequence's, the latest last.
        rules: the grammar.
        stop: past the last timestamp.
    """
    if not output_token_ids:
        highest = stop if rules.max_initial_index is None else rules.first_id + rules.max_initial_index + 1
        return Choice(rules.first_id, rules.first_id, min(stop, highest))
    last = output_token_ids[-1]
    if last < rules.first_id:
        # Backwards: a segment's first timestamp is a sentence away, its text may be hundreds of tokens.
        latest = next((i for i in reversed(output_token_ids) if i >= rules.first_id), rules.first_id - 1)
        return Choice(0, latest + 1, stop)
    if len(output_token_ids) == 1 or output_token_ids[-2] >= rules.first_id:
        return Choice(0, stop, stop)  # a pair, or the very first: text must follow
    return Choice(rules.end_of_text_id, last, stop)  # the end of a segment: its pair begins the next, or nothing does


def forbid_read(logits: Tensor, index: Tensor, is_forbidden: Tensor) -> None:
    """Set those of the rows `index` [S] of `logits` [R, N] to -inf that `is_forbidden` [S, 1] says, and touch no other.

    Which they are must be read first: on the CPU that costs nothing.
    """
    logits.index_fill_(0, index[is_forbidden[:, 0]], float("-inf"))


def forbid_unread(logits: Tensor, index: Tensor, is_forbidden: Tensor) -> None:
    """The same without reading which: all of the rows are written, and a NaN would stay one."""
    minus_infinity = torch.where(is_forbidden, float("-inf"), 0.0)
    logits.index_add_(0, index, minus_infinity.expand(-1, logits.shape[1]))


class TimestampGrammar:
    """One TimestampRules over logits of one width.

    Args:
        rules: whose ids are in the vocabulary, the end of the text before the timestamps.
        width: Vp, of the padded logits.
        device: where they are.
        is_deferring: whether reading from the device would make the host wait.
    """

    def __init__(self, rules: TimestampRules, width: int, device: torch.device, *, is_deferring: bool) -> None:
        self._rules = rules
        self._forbid = forbid_unread if is_deferring else forbid_read
        self._width = width
        self._num_body_blocks = rules.end_of_text_id // BLOCK
        self._tail = self._num_body_blocks * BLOCK
        self._tail_ids = torch.arange(self._tail, width, device=device)

    def apply(self, logits: Tensor, maxima: Tensor, index: Tensor, histories: Rows[Rows[int]]) -> None:
        """Forbid what the grammar forbids; a NaN or infinite logit stays, for the row to fail by.

        Args:
            logits: [R, Vp] float32, padding -inf; changed in place.
            maxima: [R, Vp / BLOCK], block_maxima(logits); changed in place, so that it stays that.
            index: [S] int64, the rows that follow this grammar.
            histories: the output tokens of those S rows.
        """
        choices = [choice_after(history, self._rules, self._width) for history in histories]
        bounds = upload([[c.text_from, c.first, c.stop] for c in choices], torch.int64, logits.device)
        text_from, first, stop = bounds[:, :, None].unbind(1)  # [S, 1] each
        times = self._rules.first_id
        ids = self._tail_ids
        is_forbidden = (ids < text_from) | ((ids >= times) & (ids < first)) | (ids >= stop)
        tail = logits[:, self._tail :].index_select(0, index)  # [S, Vp - tail]
        # Subtracted, not written over: NaN and infinity become NaN, not an innocent -inf.
        tail = torch.where(is_forbidden, tail - float("inf"), tail)
        others, timestamps = tail[:, : times - self._tail], tail[:, times - self._tail :]
        body = self._largest_of_body(maxima, index)  # [S, 1]
        is_textless = text_from > 0
        largest_other = torch.maximum(
            torch.where(is_textless, body - float("inf"), body), others.amax(-1, keepdim=True)
        )
        # log(sum(exp)) by a softmax, whose bits do not depend on how many rows there are. False where there is a NaN.
        together = timestamps.amax(-1, keepdim=True) - torch.softmax(timestamps, -1).amax(-1, keepdim=True).log()
        is_time = together > largest_other
        others.masked_fill_(is_time, float("-inf"))
        logits[:, self._tail :].index_copy_(0, index, tail)
        maxima[:, self._num_body_blocks :].index_copy_(0, index, block_maxima(tail))
        is_without_text = is_time | (is_textless & (body < float("inf")))
        self._forbid(logits[:, : self._tail], index, is_without_text)
        self._forbid(maxima[:, : self._num_body_blocks], index, is_without_text)

    def _largest_of_body(self, maxima: Tensor, index: Tensor) -> Tensor:
        """The largest logit before the tail: [S, 1], NaN where there is one."""
        if self._num_body_blocks == 0:
            return torch.full((index.shape[0], 1), float("-inf"), device=maxima.device)
        return maxima[:, : self._num_body_blocks].index_select(0, index).amax(-1, keepdim=True)
