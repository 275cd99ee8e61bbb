"""Tells the template's own control tokens from the same strings in what users wrote.

A template marks turns with special tokens; a user who writes `<|im_end|>` means those letters. Each such string in
user-supplied text is replaced by a mark before the template is rendered, and put back, as text, when tokens are made.
Knows nothing of templates or tokenizers beyond the names of added tokens. Called by prompt.py and encoder.py.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from itertools import groupby
from typing import Any

_MAX_DEPTH = 100  # of JSON values; deeper ones would end in Python's recursion limit


class ControlTokens:
    """The strings of a tokenizer that must not be tokens when a user writes them.

    Args:
        special: contents of special tokens.
        template_only: contents of added tokens that are not special, but that the chat template writes.
    """

    def __init__(self, special: Iterable[str], template_only: Iterable[str] = ()) -> None:
        self.special = _distinctive(special)
        self.all = self.special | _distinctive(template_only)
        self._special_pattern = any_of(self.special)
        self._pattern = any_of(self.all)
        self._beginnings = frozenset(string[:end] for string in self.all for end in range(1, len(string)))
        self._longest = max(map(len, self.all), default=0)

    def count(self, text: str) -> int:
        """How many control strings a text holds."""
        return sum(1 for _ in self._pattern.finditer(text))

    def split(self, text: str) -> list[str]:
        """A text cut at its control strings: text, control, text, ..., text."""
        return re.split(f"({self._pattern.pattern})", text)

    def pattern(self, *, only_special: bool) -> re.Pattern[str]:
        """Matches any control string, or only those that are special tokens."""
        return self._special_pattern if only_special else self._pattern

    def num_open_chars(self, text: str) -> int:
        """Length of the longest end of `text` that begins a control string without completing one.

        Two strings that a template writes one after the other must not make a control string together.
        """
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if text[-length:] in self._beginnings:
                return length
        return 0


class Marks:
    """What was taken out of one prompt's user-supplied strings, and how to put it back.

    Args:
        controls: of the tokenizer.
    """

    def __init__(self, controls: ControlTokens) -> None:
        self._controls = controls
        # Letters and digits only, so that trimming, quoting and escaping in a template leave it alone, and random, so
        # that nobody can write one.
        self._nonce = secrets.token_hex(12)
        self._taken: list[str] = []
        self._pattern = re.compile(f"q{self._nonce}x([0-9]+)q", re.IGNORECASE)

    def __bool__(self) -> bool:
        return bool(self._taken)

    def take(self, text: str) -> str:
        """A mark that stands for `text`, whatever it holds."""
        self._taken.append(text)
        return f"q{self._nonce}x{len(self._taken) - 1}q"

    def mark(self, value: Any, *, only_special: bool, depth: int = 0) -> Any:
        """A JSON value with marks in place of control strings; keys of objects too.

        Raises:
            RecursionError: nested deeper than any template needs.
        """
        if isinstance(value, str):
            return self._mark_text(value, only_special=only_special)
        if depth > _MAX_DEPTH:
            raise RecursionError(f"nested more than {_MAX_DEPTH} deep")
        if isinstance(value, dict):
            return {
                self._mark_text(key, only_special=only_special): self.mark(
                    item, only_special=only_special, depth=depth + 1
                )
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.mark(item, only_special=only_special, depth=depth + 1) for item in value]
        return value

    def split(self, text: str) -> list[str]:
        """A rendered text cut at its marks: text, what a mark stands for, text, ..., text."""
        parts = self._pattern.split(text)
        parts[1::2] = [self._taken[int(index)] for index in parts[1::2]]
        return parts

    def _mark_text(self, text: str, *, only_special: bool) -> str:
        end = len(text.rstrip())  # templates trim
        start = end - self._controls.num_open_chars(text[:end])
        pattern = self._controls.pattern(only_special=only_special)
        marked = pattern.sub(lambda found: self.take(found[0]), text[:start])
        return marked + (self.take(text[start:end]) if start < end else "") + text[end:]


def any_of(strings: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the strings, the longest where several begin at one place; nothing when there are none.

    Shared beginnings are written once: a vocabulary may hold a thousand control tokens, and text many a `<`.
    """
    return re.compile(_alternatives(sorted(set(strings))) or "(?!)")


def _alternatives(strings: list[str]) -> str:
    """A pattern for sorted, distinct strings."""
    if len(strings) < 2:
        return re.escape("".join(strings))
    shared = _common_beginning(strings[0], strings[-1])  # sorted: what these share, all share
    if shared:
        rests = [string[len(shared) :] for string in strings]
        is_whole = rests[0] == ""  # one of them ends here; those that go on are tried first
        return re.escape(shared) + f"(?:{_alternatives(rests[is_whole:])})" + ("?" if is_whole else "")
    return "|".join(_alternatives(list(group)) for _, group in groupby(strings, key=lambda string: string[0]))


def _common_beginning(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return one[:length]


def _distinctive(strings: Iterable[str]) -> frozenset[str]:
    """Without what is ordinary text: runs of spaces, which some vocabularies hold as added tokens, and plain words."""
    return frozenset(string for string in strings if not (string.isspace() or string.isalnum() or not string))
