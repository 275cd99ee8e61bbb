"""What is done about fields that are not honoured: refused, or named in `x-ignored-parameters`; none is just dropped.

Knows nothing of the fields that are honoured, which models.py declares.
Called by the routes before anything else is done with a request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from api.errors import shown
from engine.errors import CallerError, InvalidValue, UnsupportedParameter
from models import GenerationFields, TranscriptionBody


@dataclass(frozen=True, slots=True)
class _NotHonoured:
    """Fields that OpenAI's clients know and one kind of endpoint does not honour.

    Args:
        refused: by name, what a client may send without asking for anything; any other value would change the answer.
        inert: those without any effect on what this server answers; `False` asks for what happens anyway.
    """

    refused: Mapping[str, tuple[object, ...]]
    inert: frozenset[str] = frozenset()


_REFUSED_IN_GENERATION: dict[str, tuple[object, ...]] = {
    "audio": ({},),
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": ([], ["text"]),
    "moderation": ({},),
    "prediction": ({},),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "web_search_options": (),
}
_INERT_IN_GENERATION = frozenset(
    {
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "store",
    }
)
_GENERATION = _NotHonoured(_REFUSED_IN_GENERATION, _INERT_IN_GENERATION)
_TRANSCRIPTION = _NotHonoured(
    dict.fromkeys(("include", "keywords", "known_speaker_names", "known_speaker_references", "languages"), ("", [""]))
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
    return (
        *_ignored(body.model_extra, _GENERATION, is_strict),
        *_ignored_stream_options(body, is_strict),
        *_ignored_of_formats(body, is_strict),
    )


def ignored_form_fields(body: TranscriptionBody, *, is_strict: bool) -> tuple[str, ...]:
    """The names of a form's fields that will have no effect; arguments and exceptions as for ignored_parameters."""
    ignored = [*_ignored(body.model_extra, _TRANSCRIPTION, is_strict)]
    if body.chunking_strategy is not None:
        ignored += _unknown("chunking_strategy", body.chunking_strategy.model_extra, is_strict)
    return tuple(ignored)


def _ignored(extra: Mapping[str, Any] | None, known: _NotHonoured, is_strict: bool) -> Iterator[str]:
    for name, value in (extra or {}).items():
        if name in known.refused:
            _check_neutral(name, value, known.refused[name])
        elif name in known.inert:
            if value not in (None, False):
                yield name
        else:
            _check_known(name, is_strict)
            yield name


def _check_neutral(name: str, value: object, neutrals: tuple[object, ...]) -> None:
    is_neutral = value is None or any(value == neutral and type(value) is type(neutral) for neutral in neutrals)
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
    yield from _unknown("stream_options", options.model_extra, is_strict)


def _ignored_of_formats(body: GenerationFields, is_strict: bool) -> Iterator[str]:
    wanted = body.response_format
    if wanted is not None:
        yield from _unknown("response_format", wanted.model_extra, is_strict)
        if wanted.json_schema is not None:
            yield from _unknown("response_format.json_schema", wanted.json_schema.model_extra, is_strict)
    if body.structured_outputs is not None:
        yield from _unknown("structured_outputs", body.structured_outputs.model_extra, is_strict)


def _unknown(field: str, extra: Mapping[str, Any] | None, is_strict: bool) -> Iterator[str]:
    """Names within an object that nobody knows."""
    for name in extra or {}:
        _check_known(f"{field}.{name}", is_strict)
        yield f"{field}.{name}"


def ignored_header(ignored: tuple[str, ...]) -> dict[str, str]:
    """The response header that names them, escaped: a caller's name must not become a header of its own."""
    if not ignored:
        return {}
    names = [quote(name[:_MAX_NAME], safe="._-") for name in ignored[:_MAX_NAMED]]
    if len(ignored) > _MAX_NAMED:
        names.append(f"and {len(ignored) - _MAX_NAMED} more")
    return {"x-ignored-parameters": ", ".join(names)}
