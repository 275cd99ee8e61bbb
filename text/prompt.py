"""Turns messages or text into the token ids of a prompt, and refuses what cannot be one.

Knows nothing of sampling, queues or HTTP; errors name the wire field at fault.
Called by api/, off the event loop where text is long: one encoder serves all requests and any thread.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from text.controls import ControlTokens, Marks
from text.encoder import TextEncoder
from text.errors import PromptError, PromptTooLong
from text.length import max_chars_per_token
from text.messages import normalize_messages
from text.template import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Where text may come from strangers. In the others, the application's and the model's own words, added tokens that are
# not special (`<think>`, `<tool_call>`) mean what they mean to the model.
_OUTSIDE_ROLES = ("user", "tool", "function")


class PromptEncoder:
    """Prompts for one model.

    Special-token strings in what a request holds are encoded as their letters; only the template's own are tokens.
    Templates write BOS themselves, so none is added to a rendered conversation; to plain text it is.

    Args:
        tokenizer: of the model, of any kind.
        max_model_len: most tokens of one sequence; of a source, where the text is for an encoder.
        is_source: whether it is.
    Raises:
        TokenizerError: the model's chat template is not valid.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_model_len: int, is_source: bool = False) -> None:
        self._max_model_len = max_model_len
        self._max_chars_per_token = max_chars_per_token(tokenizer)
        self._template = ChatTemplate(tokenizer, is_source=is_source)
        self._controls = _find_controls(tokenizer, self._template)
        self._encoder = TextEncoder(tokenizer, self._controls)
        if not self._template.exists and not is_source:
            logger.warning("the model has no chat template: messages become lines such as `User: ...`")

    @property
    def has_chat_template(self) -> bool:
        """Whether the model brings a template; else messages are written plainly, one a line."""
        return self._template.exists

    def too_long(self, num_chars: int) -> bool:
        """Whether that many characters, as they go to the tokenizer, make more tokens than the context holds.

        True is certain; False is not. Templates may drop part of what messages hold: the text that counts is theirs.
        """
        return self._max_chars_per_token is not None and num_chars > self._max_model_len * self._max_chars_per_token

    def encode_text(self, text: str, *, param: str = "prompt", is_truncated: bool = False) -> list[int]:
        """Ids of plain text, with what the tokenizer puts around one (BOS).

        Args:
            text: no string in it is a control token.
            param: the wire field that errors name.
            is_truncated: whether the caller cuts the ids to fit, so that no text is too long.
        Raises:
            PromptError: it is not valid Unicode, or PromptTooLong.
        """
        _check_unicode(text, param)
        if not is_truncated:
            self._check_length(text, param)
        return self._encoder.encode_text(text)

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
        is_truncated: bool = False,
    ) -> list[int]:
        """Ids of a conversation.

        Args:
            messages: as on the wire; not changed.
            add_generation_prompt: whether the model's turn is opened at the end.
            continue_final_message: whether the last message is left open for the model to go on with.
            tools: as on the wire.
            template_kwargs: more variables for the template.
            is_truncated: whether the caller cuts the ids to fit, so that no conversation is too long.
        Raises:
            PromptError: the messages are not what this model takes, or PromptTooLong.
        """
        if add_generation_prompt and continue_final_message:
            raise PromptError(
                "continue_final_message needs add_generation_prompt to be false", "continue_final_message"
            )
        kwargs = template_kwargs or {}
        self._template.check_kwargs(kwargs)
        marks = Marks(self._controls)
        normal = normalize_messages(messages, self._template.traits(has_tools=bool(tools)))
        try:
            normal = [_mark_message(message, marks) for message in normal]
            tools = marks.mark(tools or None, only_special=True)
            kwargs = marks.mark(kwargs, only_special=True)
        except RecursionError as error:
            raise PromptError(f"the request is {error}", "messages") from error
        text = self._template.render(
            normal,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            kwargs=kwargs,
        )
        _check_unicode(text, "messages")
        if not is_truncated:
            self._check_length(text, "messages")
        if not self.has_chat_template:
            return self._encoder.encode_text("".join(marks.split(text)))
        return self._encoder.encode_rendered(text, marks)

    def _check_length(self, text: str, param: str) -> None:
        if not self.too_long(len(text)):
            return
        min_num_tokens = -(-len(text) // (self._max_chars_per_token or 1))
        raise PromptTooLong(
            f"this model's context holds {self._max_model_len} tokens; the text of {len(text)} characters makes at "
            f"least {min_num_tokens}",
            param,
            min_num_tokens=min_num_tokens,
        )


def _mark_message(message: dict[str, Any], marks: Marks) -> dict[str, Any]:
    only_special = message["role"] not in _OUTSIDE_ROLES
    marked: dict[str, Any] = marks.mark({**message, "role": ""}, only_special=only_special)
    return {**marked, "role": message["role"]}


def _find_controls(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> ControlTokens:
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    written = template.literal_text
    others = {token.content for token in added if token.content in written} - special
    return ControlTokens(special, others)


def _check_unicode(text: str, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError("text holds a lone surrogate, which is not a character", param) from error
