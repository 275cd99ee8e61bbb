"""Turns token ids into text as they come, never half a character.

Knows nothing of stop strings, or of why a sequence ends; the text is what follows the prompt, spaces included.
Called by output.py, once a token: this is on the path of every streamed token, so it is measured in microseconds.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from text.token_bytes import TokenBytes, token_bytes_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
# Enough of the prompt to know how a piece is joined to what precedes it: one token would do, were none of them empty.
_NUM_CONTEXT_TOKENS = 6
# A character is at most four byte tokens. Beyond twice that the bytes are no UTF-8, and holding them any longer would
# only make each step slower than the one before (tokenizers' own DecodeStream took 300 us a token after 4,000).
_MAX_HELD_TOKENS = 8


class Detokenizer(Protocol):
    """Text from tokens, one at a time."""

    num_complete: int
    """How many of the tokens pushed so far have all their text out."""

    def push(self, token_id: int) -> str:
        """Takes a token; returns the text that is now whole."""

    def flush(self) -> str:
        """The rest, when nothing follows: an unfinished character becomes U+FFFD, as in decode()."""


def make_detokenizer(
    tokenizer: PreTrainedTokenizerBase, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool = True
) -> Detokenizer:
    """The detokenizer that suits a tokenizer, set at the end of the prompt.

    The joined text of all tokens equals `tokenizer.decode(token_ids, skip_special_tokens=...,
    clean_up_tokenization_spaces=False)` but for two things: a space that joins the first token to the prompt is kept,
    and where bytes that are no UTF-8 come after text was given out, what was given out stays.
    """
    pieces = token_bytes_of(tokenizer)
    if pieces.is_byte_level:
        return ByteDetokenizer(pieces, prompt_token_ids, skip_special_tokens=skip_special_tokens)
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer

        def decode(token_ids: list[int]) -> str:
            return str(backend.decode(token_ids, skip_special_tokens=skip_special_tokens))
    else:

        def decode(token_ids: list[int]) -> str:
            # Clean-up of spaces would change text that is already out.
            return str(
                tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
            )

    skipped = pieces.special_ids if skip_special_tokens else frozenset()
    return WindowDetokenizer(decode, prompt_token_ids, skipped_ids=skipped)


class ByteDetokenizer:
    """For byte-level vocabularies: each token's bytes through an incremental UTF-8 decoder.

    Args:
        pieces: the bytes of each token.
        prompt_token_ids: what came before; a character left unfinished there is finished here.
        skip_special_tokens: whether special tokens have no text.
    """

    __slots__ = ("_num_pushed", "_pending", "_raw", "_skipped_ids", "num_complete")

    def __init__(self, pieces: TokenBytes, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._raw = pieces.raw
        self._skipped_ids = pieces.special_ids if skip_special_tokens else frozenset()
        self._num_pushed = 0
        self.num_complete = 0
        self._pending = b""
        for token_id in prompt_token_ids[-_NUM_CONTEXT_TOKENS:]:
            self.push(token_id)
        self._num_pushed = self.num_complete = 0

    def push(self, token_id: int) -> str:
        """See Detokenizer."""
        self._num_pushed += 1
        if token_id in self._skipped_ids:
            if not self._pending:
                self.num_complete = self._num_pushed
            return ""
        raw = self._raw(token_id)
        data = self._pending + raw
        text, num_used = codecs.utf_8_decode(data, "replace", False)
        self._pending = pending = data[num_used:]
        if not pending:
            self.num_complete = self._num_pushed
        elif len(pending) <= len(raw):  # what is unfinished began in this token, so those before it are out
            self.num_complete = self._num_pushed - 1
        return text

    def flush(self) -> str:
        """See Detokenizer."""
        text, self._pending = self._pending.decode(errors="replace"), b""
        self.num_complete = self._num_pushed
        return text


class WindowDetokenizer:
    """For every other vocabulary: decodes the last few tokens with and without the new one, and gives the difference.

    Args:
        decode: token ids to text.
        prompt_token_ids: what came before; the end of it is the first context.
        skipped_ids: tokens without text.
    """

    __slots__ = ("_context_text", "_decode", "_ids", "_num_context", "_num_pushed", "_skipped_ids", "num_complete")

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        prompt_token_ids: Sequence[int],
        *,
        skipped_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._decode = decode
        self._skipped_ids = skipped_ids
        # Context first, then what is held.
        self._ids = [i for i in prompt_token_ids[-_NUM_CONTEXT_TOKENS:] if i not in skipped_ids]
        self._num_context = len(self._ids)
        self._context_text = decode(self._ids) if self._ids else ""
        self._num_pushed = 0
        self.num_complete = 0

    def push(self, token_id: int) -> str:
        """See Detokenizer."""
        self._num_pushed += 1
        num_held = len(self._ids) - self._num_context
        if token_id in self._skipped_ids:
            if not num_held:
                self.num_complete = self._num_pushed
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        # Nothing new may mean a character begun: some tokenizers in Python leave out unfinished ones.
        is_unfinished = text.endswith(REPLACEMENT) or len(text) <= len(self._context_text)
        if is_unfinished and num_held < _MAX_HELD_TOKENS:
            return ""
        return self._give_out(text)

    def flush(self) -> str:
        """See Detokenizer."""
        return self._give_out(self._decode(self._ids)) if len(self._ids) > self._num_context else ""

    def _give_out(self, text: str) -> str:
        """The new part of the window's text; what was held becomes the context."""
        new = text[len(self._context_text) :]
        self.num_complete = self._num_pushed
        if not new:  # tokens without text are no context for the next
            del self._ids[self._num_context :]
            return ""
        del self._ids[: self._num_context]
        self._num_context = len(self._ids)
        self._context_text = self._decode(self._ids)
        return new
