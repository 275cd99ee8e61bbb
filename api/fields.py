"""What is done about fields that are not honoured: refused, or named in `x-ignored-parameters`; none is just dropped.

Knows nothing of the fields that are honoured, which models.py declares.
Called by the routes before anything else is done with a request.
"""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

from api.errors import shown
from engine.errors import CallerError, InvalidValue, UnsupportedParameter
from models import GenerationFields

# What a client may send for each of these without asking for anything; any other value would change the answer.
_REFUSED: dict[str, tuple[object, ...]] = {
    "audio": ({},),
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": ([],),
    "guided_grammar": ("",),
    "guided_json": ({}, ""),
    "guided_regex": ("",),
    "modalities": ([], ["text"]),
    "moderation": ({},),
    "prediction": ({},),
    "response_format": ({}, {"type": "text"}),
    "structured_outputs": ({},),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "web_search_options": (),
}
# Known to OpenAI's clients and without any effect on what this server answers; `False` asks for what happens anyway.
_INERT = frozenset(
    {
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "store",
    }
)
# A header line of more than 8 kB is refused by many proxies.
_MAX_NAMED = 50
_MAX_NAME = 100


def ignored_parameters(body: GenerationFields, *, is_strict: bool) -> tuple[str, ...]:
    """The names of fields that will have no effect.

    Args:
        body: the validated request.
        is_strict: whether a field that nobody knows is an error (--strict-parameters).
    Raises:
        UnsupportedParameter: a field asks for something that this server does not do yet.
        InvalidValue: a field nobody knows, when strict.
    """
    ignored = []
    for name, value in (body.model_extra or {}).items():
        if name in _REFUSED:
            _check_neutral(name, value)
        elif name in _INERT:
            if value not in (None, False):
                ignored.append(name)
        else:
            _check_known(name, is_strict)
            ignored.append(name)
    ignored += _ignored_stream_options(body, is_strict)
    return tuple(ignored)


def _check_neutral(name: str, value: object) -> None:
    is_neutral = value is None or any(value == neutral and type(value) is type(neutral) for neutral in _REFUSED[name])
    if not is_neutral:
        raise UnsupportedParameter(f"{name} is {shown(value)}: this server does not support {name}", param=name)


def _check_known(name: str, is_strict: bool) -> None:
    if is_strict:
        raise InvalidValue(
            f"{shown(name)} is no parameter of this server (--strict-parameters True)", param=name[:_MAX_NAME]
        )


def _ignored_stream_options(body: GenerationFields, is_strict: bool) -> Iterator[str]:
    options = body.stream_options
    if options is None:
        return
    is_asking = options.include_usage is not None or options.include_obfuscation or options.model_extra
    if not body.stream and is_asking:
        raise CallerError("stream_options is given without stream: it needs stream true", param="stream_options")
    if options.include_obfuscation:
        yield "stream_options.include_obfuscation"
    for name in options.model_extra or {}:
        _check_known(f"stream_options.{name}", is_strict)
        yield f"stream_options.{name}"


def ignored_header(ignored: tuple[str, ...]) -> dict[str, str]:
    """The response header that names them, escaped: a caller's name must not become a header of its own."""
    if not ignored:
        return {}
    names = [quote(name[:_MAX_NAME], safe="._-") for name in ignored[:_MAX_NAMED]]
    if len(ignored) > _MAX_NAMED:
        names.append(f"and {len(ignored) - _MAX_NAMED} more")
    return {"x-ignored-parameters": ", ".join(names)}
