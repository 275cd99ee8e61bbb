"""Finds and loads the tokenizer of a model, as the options name it.

Knows nothing of prompts, or of the model that goes with it; transformers is imported only when called.
Called once, by whoever loads the model.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from text.errors import TokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load_tokenizer(
    name: str,
    *,
    tokenizer_type: str = "AutoTokenizer",
    use_fast: bool = True,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Args:
        name: hub id or local directory.
        tokenizer_type: a class of transformers, or a dotted path to one's own.
        use_fast: False asks for the Python implementation, which few tokenizers still have.
        revision: branch, tag or commit on the hub; None for the main branch.
        trust_remote_code: whether Python code that ships with the checkpoint may run.
    Raises:
        TokenizerError: there is no such class, no such tokenizer, or none of the kind asked for.
    """
    loader = _find_class(tokenizer_type)
    given = {"revision": revision} if revision is not None else {}
    try:
        tokenizer = loader.from_pretrained(name, use_fast=use_fast, trust_remote_code=trust_remote_code, **given)
    except Exception as error:  # many kinds: hub, files, missing packages; each ends the start with one line
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TokenizerError(f"the tokenizer of {name} cannot be loaded with {tokenizer_type}: {reason}") from error
    if not use_fast and tokenizer.is_fast:
        raise TokenizerError(
            f"--tokenizer-use-fast False: {type(tokenizer).__name__} has no Python implementation in this version of "
            "transformers; name another class with --tokenizer-type, or leave the option out"
        )
    logger.info("tokenizer %s, %d tokens, %s", type(tokenizer).__name__, len(tokenizer), _kind(tokenizer))
    return tokenizer


def _kind(tokenizer: PreTrainedTokenizerBase) -> str:
    return "fast" if tokenizer.is_fast else "Python"


def _find_class(path: str) -> Any:
    module_name, _, class_name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name or "transformers"), class_name)
    except (ImportError, AttributeError) as error:
        where = f"module {module_name}" if module_name else "transformers"
        raise TokenizerError(f"--tokenizer-type {path}: {where} has no such class ({error})") from error
    if not hasattr(found, "from_pretrained"):
        raise TokenizerError(f"--tokenizer-type {path}: is not a class with from_pretrained")
    return found
