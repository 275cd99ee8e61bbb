"""The model's chat template: what it understands, and rendering it, in transformers' jinja sandbox.

Knows nothing of tokens. A template comes with the model, never with a request.
Called by prompt.py.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from text.errors import PromptError, TokenizerError
from text.messages import TemplateTraits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_PROBE = "probe7081"
_TESTS_NONE = re.compile(r"""content(['"]\])?\s+is\s+(not\s+)?none""", re.IGNORECASE)
# What render_jinja_template or the sandbox give a meaning to; a request must not.
_RESERVED = frozenset(
    (
        *("conversations", "messages", "tools", "chat_template", "return_assistant_tokens_mask"),
        *("continue_final_message", "add_generation_prompt"),
        *("raise_exception", "strftime_now", "namespace", "dict", "range", "lipsum", "cycler", "joiner"),
    )
)


class ChatTemplate:
    """One model's template, or the plain fallback of a model that has none.

    The fallback writes each message as a line of its own, `User: ...`, with `System`, `Assistant` and `Tool` for the
    other roles, and `Assistant:` at the end for the model to go on from. What an encoder reads has no end to go on
    from: there the texts of system messages and one user message follow each other, a line each, just as they are;
    longer conversations are written in lines of `User: ...` as above.

    Args:
        tokenizer: of the model.
        is_source: whether the text is for an encoder.
    Raises:
        TokenizerError: the template is not valid jinja.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, is_source: bool = False) -> None:
        self._is_source = is_source
        self._special_tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        self._sources = _sources(tokenizer.chat_template)
        self._traits = {name: self._find_traits(source) for name, source in self._sources.items()}

    @property
    def exists(self) -> bool:
        """Whether the model has a template."""
        return bool(self._sources)

    @property
    def literal_text(self) -> str:
        """All that the template's sources say, to look for control tokens in."""
        return "\n".join(self._sources.values())

    def traits(self, *, has_tools: bool) -> TemplateTraits:
        """What the template that serves a request understands."""
        return self._traits[self._name(has_tools)] if self.exists else TemplateTraits(knows_tool=True)

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Refuses names that mean something to the renderer.

        Raises:
            PromptError: such a name is among them.
        """
        for name in kwargs:
            if name in _RESERVED or name in self._special_tokens or name.startswith("_"):
                raise PromptError(f"{name!r} cannot be set by a request", "chat_template_kwargs")

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        tools: list[dict[str, Any]] | None,
        kwargs: dict[str, Any],
    ) -> str:
        """The text of a conversation; `messages` must already be what the template understands.

        Raises:
            PromptError: the template refuses the messages, or cannot cope with them.
        """
        if self._is_source and continue_final_message:
            raise PromptError(
                "this model's answer is apart from what it reads: no message can be continued", "messages"
            )
        if not self.exists and self._is_source:
            return _render_source(messages, tools)
        if not self.exists:
            return _render_plain(messages, add_generation_prompt, continue_final_message, tools)
        try:
            return self._render(
                self._sources[self._name(bool(tools))],
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                **kwargs,
            )
        except Exception as error:  # whatever a template raises is about what it was given: the caller's to change
            raise PromptError(
                f"the model's chat template refuses the messages: {_reason(error)}", "messages"
            ) from error

    def _name(self, has_tools: bool) -> str:
        return "tool_use" if has_tools and "tool_use" in self._sources else "default"

    def _render(self, source: str, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, _ = render_jinja_template(
            conversations=[messages], chat_template=source, **(self._special_tokens | kwargs)
        )
        return str(rendered[0])

    def _find_traits(self, source: str) -> TemplateTraits:
        return TemplateTraits(
            knows_developer=_names(source, "developer"),
            knows_tool=_names(source, "tool"),
            wants_parts=not self._shows(source, _PROBE) and self._shows(source, [{"type": "text", "text": _PROBE}]),
            tests_none=bool(_TESTS_NONE.search(source)),
        )

    def _shows(self, source: str, content: Any) -> bool:
        """Whether content of this shape comes out of the template."""
        from jinja2 import TemplateSyntaxError

        try:
            return _PROBE in self._render(source, [{"role": "user", "content": content}])
        except TemplateSyntaxError as error:
            raise TokenizerError(f"the model's chat template is not valid: {error}") from error
        except Exception as error:
            logger.debug("chat template refuses a probe: %s", error)
            return False


def _sources(chat_template: str | dict[str, str] | None) -> dict[str, str]:
    """Templates by name; a single one is the default, and so is the only one of several."""
    if chat_template is None:
        return {}
    if isinstance(chat_template, str):
        return {"default": chat_template}
    if "default" not in chat_template and chat_template:
        return {"default": next(iter(chat_template.values())), **chat_template}
    return dict(chat_template)


def _names(source: str, role: str) -> bool:
    return f"'{role}'" in source or f'"{role}"' in source


def _reason(error: Exception) -> str:
    # transformers appends the whole conversation to some messages, after the first line.
    line = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
    return line.partition("Final message to continue:")[0]


def _render_source(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
    *before, last = messages
    if not tools and last["role"] == "user" and all(message["role"] == "system" for message in before):
        return "\n".join(str(message["content"]) for message in messages)
    return _render_plain(messages, add_generation_prompt=False, continue_final_message=True, tools=tools)


def _render_plain(
    messages: list[dict[str, Any]],
    add_generation_prompt: bool,
    continue_final_message: bool,
    tools: list[dict[str, Any]] | None,
) -> str:
    if tools or any("tool_calls" in message for message in messages):
        raise PromptError("this model has no chat template, so tools cannot be shown to it", "tools")
    text = "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)
    if continue_final_message:
        return text
    return f"{text}\nAssistant:" if add_generation_prompt else f"{text}\n"
