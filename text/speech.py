"""Text of a speech model's tokens and tokens of text, where timestamps and control tokens are never text.

Knows nothing of audio, windows or engines; of the model only where its timestamp tokens begin.
Called by runtime/, from several threads at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from text.controls import ControlTokens
from text.encoder import TextEncoder
from text.token_bytes import token_bytes_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Only the end of a prompt counts, some hundred tokens; no token of a speech vocabulary has as many characters as this
# leaves to each of them.
_MAX_PROMPT_CHARS = 65_536


class SpeechText:
    """Between text and the tokens of one speech model.

    Args:
        tokenizer: of the model.
        first_timestamp_id: this and every id above it is a moment, whether the tokenizer has a token for it or not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, first_timestamp_id: int) -> None:
        added = tokenizer.added_tokens_decoder.values()
        # Timestamps are added tokens that are not called special, and as dangerous in a prompt as those that are.
        controls = {token.content for token in added} | set(tokenizer.all_special_tokens)
        self._encoder = TextEncoder(tokenizer, ControlTokens(controls))
        self._pieces = token_bytes_of(tokenizer)
        self._first_timestamp_id = first_timestamp_id

    def prompt_ids(self, prompt: str, max_tokens: int) -> list[int]:
        """The end of a prompt, at most `max_tokens` of it; strings of control tokens in it are encoded as letters.

        A word that begins a text is written like one within it, with a space before it.
        """
        text = prompt.strip()[-_MAX_PROMPT_CHARS:]
        ids = self._encoder.encode_bare(f" {text}") if text else []
        return ids[max(len(ids) - max_tokens, 0) :]

    def text_ids(self, token_ids: Iterable[int]) -> list[int]:
        """Those of the tokens that stand for text."""
        special_ids, first_timestamp_id = self._pieces.special_ids, self._first_timestamp_id
        return [i for i in token_ids if i < first_timestamp_id and i not in special_ids]

    def pieces(self, text_ids: Iterable[int]) -> list[bytes]:
        """The bytes of each token of text; an id that no token has stands for none."""
        return [self._pieces.raw(token_id) for token_id in text_ids]

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of tokens of any kind."""
        return b"".join(self.pieces(self.text_ids(token_ids))).decode(errors="replace")
