"""What each token of a vocabulary stands for, as bytes, so that pieces rejoin into the text they came from.

Knows nothing of sequences or of what is special to a prompt; a token is judged alone.
Called by the detokenizer, and by api/ for log-probabilities.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "\u2581"  # sentencepiece writes a space so


class TokenBytes:
    """The vocabulary of one tokenizer, token by token; filled in as tokens are asked for.

    Args:
        tokenizer: of any kind.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._decoder = _decoder_facts(tokenizer)
        self._to_bytes = _piece_reader(tokenizer, self._decoder)
        self._raw: dict[int, bytes] = {}
        added = tokenizer.added_tokens_decoder
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        if not tokenizer.is_fast:
            # Tokenizers in Python call special what they name (bos_token, ...), whatever the flag of the entry says.
            self.special_ids |= frozenset(tokenizer.all_special_ids)

    @property
    def is_byte_level(self) -> bool:
        """Whether text is the bytes of its tokens in a row, each token alone: the usual byte-level BPE."""
        return self._decoder == ["ByteLevel"]

    @cached_property
    def word_id(self) -> int | None:
        """A token that is a space and more; None where there is none."""
        ids = (i for i in range(len(self._tokenizer)) if i not in self.special_ids)
        return next((i for i in ids if len(raw := self.raw(i)) > 1 and raw[0] == 0x20 and raw.strip().isalnum()), None)

    def raw(self, token_id: int) -> bytes:
        """The bytes of one token; empty for an id that no token has (padded vocabularies)."""
        found = self._raw.get(token_id)
        if found is None:
            found = self._raw[token_id] = self._read(token_id)
        return found

    def token(self, token_id: int) -> str:
        """A readable piece: its text, or `bytes:\\xe6\\xbc` where it is part of a character."""
        raw = self.raw(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _read(self, token_id: int) -> bytes:
        if not 0 <= token_id < 2**31:
            return b""
        try:
            piece = self._tokenizer.convert_ids_to_tokens(token_id)
        except (IndexError, KeyError, ValueError):  # tokenizers in Python raise for ids beyond their vocabulary
            return b""
        return self._to_bytes(piece) if isinstance(piece, str) else b""


# A memo of a pure function, so that each of many short outputs need not build what its vocabulary already has.
@lru_cache(maxsize=4)
def token_bytes_of(tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
    """The TokenBytes of a tokenizer, made once."""
    return TokenBytes(tokenizer)


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """The character by which byte-level BPE writes each byte: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}


def _decoder_facts(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """The decoder's steps, first to last: a name, or (name, its settings) where settings matter."""
    if not tokenizer.is_fast or tokenizer.backend_tokenizer.decoder is None:
        return []
    state = json.loads(tokenizer.backend_tokenizer.decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    with_settings = ("WordPiece", "BPEDecoder", "Replace")
    return [(step["type"], step) if step["type"] in with_settings else step["type"] for step in steps]


def _piece_reader(tokenizer: PreTrainedTokenizerBase, decoder: list[Any]) -> Callable[[str], bytes]:
    settings = {step[0]: step[1] for step in decoder if isinstance(step, tuple)}
    if "ByteLevel" in decoder or hasattr(tokenizer, "byte_decoder"):
        return _read_byte_level
    if "WordPiece" in settings:
        # After another word: alone, a piece would lose the space before it.
        return lambda piece: str(tokenizer.backend_tokenizer.decoder.decode(["a", piece])).removeprefix("a").encode()
    if "BPEDecoder" in settings:
        suffix = str(settings["BPEDecoder"]["suffix"])
        return lambda piece: (piece.removesuffix(suffix) + " " if piece.endswith(suffix) else piece).encode()
    if decoder or _has_space_mark(tokenizer):
        return _read_sentencepiece
    return lambda piece: str(tokenizer.convert_tokens_to_string([piece])).encode(errors="replace") or _read_lone(piece)


def _read_lone(piece: str) -> bytes:
    """A byte that is no character by itself: vocabularies of bytes in Python write it as the character so numbered."""
    return bytes([ord(piece)]) if len(piece) == 1 and 0x80 <= ord(piece) <= 0xFF else b""


def _has_space_mark(tokenizer: PreTrainedTokenizerBase) -> bool:
    return _SPACE_MARK in tokenizer.get_vocab()


def _read_byte_level(piece: str) -> bytes:
    alphabet = byte_alphabet()
    try:
        return bytes([alphabet[char] for char in piece])
    except KeyError:  # an added token, written as it is
        return piece.encode()


def _read_sentencepiece(piece: str) -> bytes:
    if byte := _BYTE_PIECE.fullmatch(piece):
        return bytes([int(byte[1], 16)])
    return piece.replace(_SPACE_MARK, " ").encode()
