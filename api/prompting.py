"""From a request's prompt to token ids, off the event loop when that takes long.

Knows nothing of sampling or of answers; the text layer refuses what is too long before it tokenises.
Called by api/chat.py and api/completions.py.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from collections.abc import Sequence as Series
from typing import Any, TypeVar

from api.bounds import check_token_ids
from engine.errors import InvalidValue, UnsupportedParameter
from model_manager import ModelManager
from models import ChatCompletionRequest

T = TypeVar("T")
# Longer than this takes more than a few milliseconds, which every stream of the server would feel.
MAX_INLINE_CHARS = 20_000
# Parts of messages that exist elsewhere, but hold what a text model cannot read.
_MEDIA_PARTS = frozenset({"image_url", "input_image", "input_audio", "audio_url", "file", "input_file", "video_url"})


async def chat_ids(manager: ModelManager, body: ChatCompletionRequest, truncate: int | None) -> list[int]:
    """The ids of a conversation, rendered with the model's template.

    Raises:
        CallerError, PromptError: the model cannot read it.
    """
    is_continued = bool(body.continue_final_message)
    # A message that goes on leaves no room for a new one; only asking for both is a mistake.
    adds_prompt = not is_continued if body.add_generation_prompt is None else body.add_generation_prompt
    _check_media(body)
    messages = [message.model_dump(exclude_unset=True) for message in body.messages]
    encode = functools.partial(
        manager.prompts.encode_chat,
        messages,
        add_generation_prompt=adds_prompt,
        continue_final_message=is_continued,
        template_kwargs=_template_kwargs(body),
        is_truncated=truncate is not None,
    )
    ids = await _encode(encode, _num_chars(messages))
    return _kept(_known(ids, manager, "messages"), "messages", truncate)


async def completion_ids(
    manager: ModelManager, prompts: Series[str | list[int]], truncate: int | None
) -> list[list[int]]:
    """The ids of each prompt of a text completion.

    Raises:
        CallerError, PromptError: one is empty, far too long, or has ids outside the vocabulary.
    """
    vocab_size = manager.info.vocab_size
    encode_text = manager.prompts.encode_text

    def encode() -> list[list[int]]:
        return [encode_text(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]

    for prompt in prompts:
        if not isinstance(prompt, str):
            check_token_ids(prompt, vocab_size, "prompt")
    # Many short texts take as long as a long one.
    all_ids = await _encode(encode, sum(len(prompt) for prompt in prompts if isinstance(prompt, str)))
    return [_kept(_known(ids, manager, "prompt"), "prompt", truncate) for ids in all_ids]


def _template_kwargs(body: ChatCompletionRequest) -> dict[str, Any]:
    """What the template is told besides the messages; the general field wins over those OpenAI has names for."""
    named = {"reasoning_effort": body.reasoning_effort, "verbosity": body.verbosity}
    return {name: value for name, value in named.items() if value is not None} | (body.chat_template_kwargs or {})


def _check_media(body: ChatCompletionRequest) -> None:
    for number, message in enumerate(body.messages):
        parts = message.content if isinstance(message.content, list) else ()
        for position, part in enumerate(parts):
            if part.type in _MEDIA_PARTS:
                path = f"messages[{number}].content[{position}]"
                raise UnsupportedParameter(f"{path} is of type {part.type}: this model reads text only", param=path)


def _num_chars(value: object) -> int:
    """How many characters of text a JSON value holds."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_num_chars, value.values()))
    return sum(map(_num_chars, value)) if isinstance(value, list) else 0


async def _encode(encode: Callable[[], T], num_chars: int) -> T:
    return encode() if num_chars <= MAX_INLINE_CHARS else await asyncio.to_thread(encode)


def _known(ids: list[int], manager: ModelManager, param: str) -> list[int]:
    """The ids, if the model has an embedding for each: some tokenizers are larger than the models they come with."""
    vocab_size = manager.info.vocab_size
    if ids and max(ids) >= vocab_size:
        piece = manager.tokenizer.convert_ids_to_tokens(max(ids))
        raise InvalidValue(
            f"{param} holds {piece!r}, token {max(ids)} of the tokenizer: this model knows only ids below {vocab_size}",
            param=param,
        )
    return ids


def _kept(ids: list[int], param: str, truncate: int | None) -> list[int]:
    if not ids:
        raise InvalidValue(f"{param} has no tokens: there must be at least one", param=param)
    return ids if truncate is None else ids[-truncate:]
