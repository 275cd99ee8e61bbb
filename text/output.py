"""The text of one sequence as its tokens come: detokenise, stop at stop strings, say which tokens are out.

Knows nothing of choices, chunks or log-probabilities; those go out by the count of tokens it gives.
Made by api/ for each sequence, and fed what each engine step brings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from text.detokenizer import make_detokenizer
from text.stop import StopMatcher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What a push added.

    Args:
        text: new text, whole characters, no part of a stop string.
        stop_string: the stop string that was met; nothing follows it.
        num_tokens: of all tokens pushed so far, how many have their text out.
        num_surplus: how many of the tokens just pushed came after the one that completed the stop string.
    """

    text: str
    stop_string: str | None
    num_tokens: int
    num_surplus: int = 0


class TextOutput:
    """One sequence's text.

    Args:
        tokenizer: of the model.
        prompt_token_ids: what the text follows.
        stop: strings that end the text.
        include_stop: whether the text keeps the string that ended it.
        skip_special_tokens: whether special tokens have no text.
    """

    __slots__ = ("_detokenizer", "_last_end", "_matcher", "_num_chars", "_num_chars_out", "_num_out", "_token_ends")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_token_ids: Sequence[int],
        *,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._detokenizer = make_detokenizer(tokenizer, prompt_token_ids, skip_special_tokens=skip_special_tokens)
        self._matcher = StopMatcher(stop, include_stop=include_stop) if stop else None
        self._num_chars = 0
        self._num_chars_out = 0
        self._num_out = 0
        # Where the text of each token ends that is not out yet, in characters from the beginning.
        self._token_ends: deque[int] = deque()
        self._last_end = 0

    def push(self, token_ids: Sequence[int], *, is_last: bool = False, drop_last_token: bool = False) -> TextDelta:
        """Takes new tokens.

        Args:
            token_ids: in order; may be empty when `is_last`.
            is_last: nothing follows, so nothing is held back any more.
            drop_last_token: the last of `token_ids` ended the sequence and is not text; it is not counted either.
        Returns:
            The text this adds. After a stop string was met, pushes add nothing.
        """
        if drop_last_token:
            token_ids = token_ids[:-1]
        if self._matcher is not None:
            return self._push_matched(token_ids, self._matcher, is_last)
        push = self._detokenizer.push
        text = push(token_ids[0]) if len(token_ids) == 1 else "".join([push(token_id) for token_id in token_ids])
        if is_last:
            text += self._detokenizer.flush()
        return TextDelta(text, None, self._detokenizer.num_complete)

    def _push_matched(self, token_ids: Sequence[int], matcher: StopMatcher, is_last: bool) -> TextDelta:
        text = ""
        num_surplus = 0
        for token_id in token_ids:
            if matcher.matched is None:
                text += self._through(matcher, self._detokenizer.push(token_id))
            else:
                num_surplus += 1
        if is_last and matcher.matched is None:
            text += self._through(matcher, self._detokenizer.flush())
            text += matcher.flush()
        self._num_chars_out += len(text)
        self._count_tokens_out(has_stopped=matcher.matched is not None)
        return TextDelta(text, matcher.matched, self._num_out, num_surplus)

    def _through(self, matcher: StopMatcher, piece: str) -> str:
        """A piece through the matcher; notes where the tokens that it completes end."""
        self._num_chars += len(piece)
        num_known = self._num_out + len(self._token_ends)
        self._token_ends.extend([self._num_chars] * (self._detokenizer.num_complete - num_known))
        return matcher.push(piece)

    def _count_tokens_out(self, *, has_stopped: bool) -> None:
        ends = self._token_ends
        while ends and ends[0] <= self._num_chars_out:
            self._last_end = ends.popleft()
            self._num_out += 1
        if has_stopped:
            # The token that a stop string cut in two: part of it is text, and nothing brings the rest.
            self._num_out += self._last_end < self._num_chars_out
            self._last_end = self._num_chars_out
            ends.clear()
