"""How many characters one token can stand for at most, so that over-long text is refused before it is tokenised.

Knows nothing of requests or contexts. Where nothing certain can be said the answer is None: a false refusal is worse
than the time that tokenising takes.
Called by prompt.py, once a tokenizer.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from text.token_bytes import byte_alphabet

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# How many characters of text a normaliser can turn into one, for those that drop none. Canonical composition joins at
# most four (U+1F82); what is not listed may remove characters without bound.
_SHRINKING = {"Prepend": 1, "Lowercase": 1, "ByteLevel": 1, "NFD": 1, "NFKD": 1, "NFC": 4, "NFKC": 4}
_KEEPING_PRE_TOKENIZERS = ("ByteLevel", "Metaspace", "Digits", "UnicodeScripts")


def max_chars_per_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The most characters of raw text that one token can stand for; None where there is no bound."""
    if not tokenizer.is_fast:
        return None
    backend: Tokenizer = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip for token in added):
        return None  # such a token takes any number of spaces beside it
    normalizers = _steps(backend.normalizer, "normalizers")
    pre_tokenizers = _steps(backend.pre_tokenizer, "pretokenizers")
    if not all(_keeps_all(step) for step in pre_tokenizers):
        return None
    if not _has_token_for_everything(backend, normalizers + pre_tokenizers):
        return None
    factor = 1
    for step in normalizers:
        shrinking = _shrinking(step)
        if shrinking is None:
            return None
        factor *= shrinking
    return factor * max(len(piece) for piece in backend.get_vocab(with_added_tokens=True))


def _steps(component: Any, key: str) -> list[dict[str, Any]]:
    """A component's settings, a sequence of components taken apart."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    return list(state[key]) if state["type"] == "Sequence" else [state]


def _shrinking(normalizer: dict[str, Any]) -> int | None:
    if normalizer["type"] == "Replace":
        pattern, content = normalizer["pattern"].get("String"), normalizer["content"]
        return -(-len(pattern) // len(content)) if pattern and content else None
    return _SHRINKING.get(normalizer["type"])


def _keeps_all(pre_tokenizer: dict[str, Any]) -> bool:
    if pre_tokenizer["type"] in ("Split", "Punctuation"):
        return bool(pre_tokenizer["behavior"] != "Removed")
    return pre_tokenizer["type"] in _KEEPING_PRE_TOKENIZERS


def _has_token_for_everything(backend: Tokenizer, steps: list[dict[str, Any]]) -> bool:
    """Whether every character gets a token of its own kind: else unknown ones are dropped, or fused into one."""
    model: Any = backend.model
    kind = type(model).__name__
    if kind == "BPE" and any(step["type"] == "ByteLevel" for step in steps):
        return all(model.token_to_id(char) is not None for char in byte_alphabet())
    if kind == "BPE" and model.byte_fallback:
        return all(model.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256))
    return False
