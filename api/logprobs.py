"""Logprobs as chat completions and text completions show them.

Knows nothing of how tokens were chosen or of where the text is cut.
Called by api/chat.py and api/completions.py.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from api.generation import TokenEntry
from engine.sequence import TokenLogprobs
from text.token_bytes import TokenBytes

# JSON has no infinity, and clients add these up.
MIN_LOGPROB = -9999.0


def _finite(logprob: float) -> float:
    # Written so that NaN becomes the floor too.
    return logprob if logprob > MIN_LOGPROB else MIN_LOGPROB


def chat_logprobs(entries: Iterable[TokenEntry], pieces: TokenBytes) -> dict[str, object]:
    """The `logprobs` of a chat choice or of one of its chunks."""
    content = []
    for entry in entries:
        shown = _chat_token(entry.token_id, entry.logprobs.logprob, pieces)
        shown["top_logprobs"] = [_chat_token(token_id, logprob, pieces) for token_id, logprob in entry.logprobs.top]
        content.append(shown)
    return {"content": content, "refusal": None}


def _chat_token(token_id: int, logprob: float, pieces: TokenBytes) -> dict[str, object]:
    return {"token": pieces.token(token_id), "logprob": _finite(logprob), "bytes": list(pieces.raw(token_id))}


class CompletionLogprobs:
    """The `logprobs` of one text choice, chunk after chunk: `text_offset` counts from the choice's first character."""

    def __init__(self, pieces: TokenBytes) -> None:
        self._pieces = pieces
        self._num_chars = 0

    def chunk(self, tokens: Iterable[tuple[int, TokenLogprobs | None]], text: str) -> dict[str, object]:
        """The logprobs of the tokens that `text` is made of; None where there is none, as for a prompt's first token.

        A token that ends within a character begins where that character does; offsets never leave the text.
        """
        names: list[str] = []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        position = 0
        for token_id, given in tokens:
            name = self._pieces.token(token_id)
            names.append(name)
            offsets.append(self._num_chars + min(position, len(text)))
            position += len(decoder.decode(self._pieces.raw(token_id)))
            logprobs.append(None if given is None else _finite(given.logprob))
            tops.append(None if given is None else self._top(name, given))
        self._num_chars += len(text)
        return {"tokens": names, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _top(self, name: str, given: TokenLogprobs) -> dict[str, float]:
        """By text, the likeliest first; the chosen token is always among them."""
        top: dict[str, float] = {}
        for token_id, logprob in given.top:
            top.setdefault(self._pieces.token(token_id), _finite(logprob))
        top.setdefault(name, _finite(given.logprob))
        return top
