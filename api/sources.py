"""How a prompt's ids reach the model: as the decoder's own beginning, or as what an encoder reads.

Knows nothing of text or sampling.
Called by api/chat.py and api/completions.py, between prompting and the choices.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence as Series
from dataclasses import dataclass
from typing import Any

from api.errors import shown
from engine.errors import ContextLengthExceeded, InvalidValue, UnsupportedParameter
from engine.sequence import Source, TokenGrammar
from model_manager import ModelInfo, ModelManager
from models import GenerationFields


@dataclass(frozen=True, slots=True)
class ModelPrompt:
    """One prompt, ready for the engine.

    Args:
        token_ids: what the decoder begins with.
        source: what the encoder reads; None where there is no encoder.
        grammar: what must follow; None for anything.
    """

    token_ids: list[int]
    source: Source | None = None
    grammar: TokenGrammar | None = None


def model_prompts(
    manager: ModelManager, body: GenerationFields, prompts: Series[list[int]], *, cache_salt: bytes, param: str
) -> list[ModelPrompt]:
    """The prompts of a request as this model takes them.

    Args:
        manager: the way to the model.
        body: for the fields that encoder-decoders have of their own.
        prompts: token ids of each prompt.
        cache_salt: of the caller's key: encoder output is shared within it only.
        param: the field the prompts came in.
    Raises:
        ContextLengthExceeded: a prompt is longer than the encoder reads.
        UnsupportedParameter, InvalidValue: a field is not for this model, or names no token of it.
    """
    info = manager.info
    if info.max_source_len is None:
        for name in ("forced_bos_token", "source_language"):
            if getattr(body, name) is not None:
                raise UnsupportedParameter(f"{name} is given: {info.name} has no encoder", param=name)
        return [ModelPrompt(ids) for ids in prompts]
    begun = _decoder_prompt(info, manager.tokenizer, body.forced_bos_token)
    made = []
    for ids in prompts:
        if len(ids) > info.max_source_len:
            raise ContextLengthExceeded(
                f"the prompt has {len(ids)} tokens, and the encoder of this model reads at most {info.max_source_len}",
                param=param,
            )
        language = body.source_language
        read = ids if language is None else _in_language(ids, manager.tokenizer, language)
        key = hashlib.sha256(cache_salt + array("q", read).tobytes()).digest()
        made.append(ModelPrompt(begun, Source(key, len(read), tuple(read))))
    return made


def _decoder_prompt(info: ModelInfo, tokenizer: Any, forced: str | int | None) -> list[int]:
    """The start token, then the request's forced token, else the checkpoint's."""
    begun = list(info.decoder_prompt_ids)
    if forced is None:
        return begun
    token_id = forced if isinstance(forced, int) else _token_id(tokenizer, forced)
    if token_id is None or not 0 <= token_id < info.vocab_size:
        raise InvalidValue(
            f"forced_bos_token is {shown(forced)}: it must be a token of this model or its id, from 0 to "
            f"{info.vocab_size - 1}",
            param="forced_bos_token",
        )
    return [begun[0], token_id]


def _in_language(ids: list[int], tokenizer: Any, language: str) -> list[int]:
    """The same text marked as another language: the mark stands at one of its ends (M2M100, NLLB, mBART)."""
    default = getattr(tokenizer, "src_lang", None)
    marked = _token_id(tokenizer, default) if isinstance(default, str) else None
    if marked is None:
        raise UnsupportedParameter("source_language is given: this model marks no languages", param="source_language")
    wanted = _token_id(tokenizer, language)
    if wanted is None:
        raise InvalidValue(
            f"source_language is {shown(language)}: this model has no token for it (its default is {default})",
            param="source_language",
        )
    ends = {0, len(ids) - 1}
    return [wanted if at in ends and token_id == marked else token_id for at, token_id in enumerate(ids)]


def _token_id(tokenizer: Any, token: str) -> int | None:
    """A token's id, by its text or by the language code it stands for."""
    vocabulary = tokenizer.get_vocab()
    return next((vocabulary[name] for name in (token, f"__{token}__", f"<|{token}|>") if name in vocabulary), None)
