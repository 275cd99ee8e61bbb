"""Reads single wire fields within their bounds, with messages that name field, value and rule.

Knows nothing of what the values are for, or of how fields depend on each other.
Called by api/params.py and the routes, before anything is allocated.
"""

from __future__ import annotations

import math
from typing import TypeVar

from pydantic import BaseModel

from api.errors import shown
from engine.errors import InvalidValue

MAX_LOGIT_BIAS = 1024
MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 512
MAX_STOP_TOKEN_IDS = 128

T = TypeVar("T")


def either(value: T | None, default: T) -> T:
    """The value, where there is one; 0 and False are values."""
    return default if value is None else value


def integer(body: BaseModel, name: str, least: int, most: int | None = None, *, within: str = "") -> int | None:
    """An integer field in [least, most], or None when it is not given; `within` is the field that holds the body."""
    value: int | None = getattr(body, name)
    if value is not None and (value < least or (most is not None and value > most)):
        rule = f"at least {least}" if most is None else f"from {least} to {most}"
        path = f"{within}.{name}" if within else name
        raise InvalidValue(f"{path} is {shown(value)}: it must be {rule}", param=path)
    return value


def number(body: BaseModel, name: str, least: float, most: float, *, within: str = "") -> float | None:
    """A finite number field in [least, most], or None when it is not given; `within` as for integer."""
    value: float | None = getattr(body, name)
    # Written so that NaN, which compares false with everything, is refused too.
    if value is not None and not least <= value <= most:
        path = f"{within}.{name}" if within else name
        raise InvalidValue(f"{path} is {value}: it must be from {least:g} to {most:g}", param=path)
    return value


def logit_bias(biases: dict[str, float] | None, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """(token id, bias) pairs of a field whose keys are token ids as text, as JSON wants it."""
    if biases is None:
        return ()
    if len(biases) > MAX_LOGIT_BIAS:
        raise InvalidValue(
            f"logit_bias has {len(biases)} entries: at most {MAX_LOGIT_BIAS} are allowed", param="logit_bias"
        )
    by_id = {}
    for key, bias in biases.items():
        # isdecimal also takes other scripts' digits, and int() takes signs, spaces and underscores.
        is_id = key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) < vocab_size
        if not is_id:
            rule = f"keys must be token ids of this model, from 0 to {vocab_size - 1}"
            raise InvalidValue(f"logit_bias has the key {shown(key)}: {rule}", param="logit_bias")
        if not (math.isfinite(bias) and -100 <= bias <= 100):
            raise InvalidValue(f"logit_bias[{key}] is {bias}: it must be from -100 to 100", param="logit_bias")
        by_id[int(key)] = bias
    return tuple(by_id.items())


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    """The strings that end a choice; none for null and []."""
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidValue(f"stop has {len(strings)} strings: at most {MAX_STOP_STRINGS} are allowed", param="stop")
    for string in strings:
        if not 1 <= len(string) <= MAX_STOP_CHARS:
            raise InvalidValue(
                f"stop has {shown(string)}: each must have from 1 to {MAX_STOP_CHARS} characters", param="stop"
            )
    return strings


def stop_token_ids(ids: list[int] | None, vocab_size: int) -> frozenset[int]:
    """The tokens that end a choice, besides the model's own."""
    if ids is None:
        return frozenset()
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidValue(
            f"stop_token_ids has {len(ids)} ids: at most {MAX_STOP_TOKEN_IDS} are allowed", param="stop_token_ids"
        )
    check_token_ids(ids, vocab_size, "stop_token_ids")
    return frozenset(ids)


def check_token_ids(ids: list[int], vocab_size: int, param: str) -> None:
    """Raises InvalidValue unless every id is in the vocabulary; the tensors they index have no other guard."""
    # min and max run at C speed: a prompt may have a million ids.
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise InvalidValue(
            f"{param} has {shown(wrong)}: token ids of this model are from 0 to {vocab_size - 1}", param=param
        )
