"""Reads a multipart/form-data body as it arrives: its fields, and the one file it may bring; all within bounds.

Knows nothing of what the fields mean. The file stays in memory and its name is never looked at: no path is made of it.
Called by api/audio.py.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from api.errors import MAX_SHOWN, BodyTooLarge, WrongMediaType, shown
from engine.errors import CallerError

MEDIA_TYPE = "multipart/form-data"
MAX_PARTS = 64
# Of all fields but the file, names included: api/middleware.py allows as much beside the file.
MAX_FIELD_BYTES = 2**20
MAX_HEADERS = 8
MAX_HEADER_BYTES = 4096
_WITH_BRACKETS = re.compile(r"([^\[\]]+)\[([^\[\]]*)\]")
# What these say is that nothing was encoded; RFC 7578 deprecates the others.
_PLAIN_ENCODINGS = frozenset({b"", b"7bit", b"8bit", b"binary"})


@dataclass(frozen=True, slots=True)
class Form:
    """What a form holds.

    Args:
        fields: name and text of each field, in order; names may come twice.
        file: the bytes of the file; None when there is none.
    """

    fields: tuple[tuple[str, str], ...]
    # Not in its repr, which asyncio makes of results now and then: 25 MB take most of a second.
    file: bytes | None = field(repr=False)


async def read_form(request: Request, *, file_field: str, max_file_bytes: int, option: str) -> Form:
    """Reads the body to its end.

    Args:
        request: whose body has not been read.
        file_field: the name of the part that is the file.
        max_file_bytes: of it.
        option: the command line option that says so, for the message.
    Raises:
        CallerError: the body is no form, or has too many or too large parts; nothing is read beyond that point.
        ClientDisconnect: the client has gone.
    """
    content_type = request.headers.get("content-type", "")
    media_type, parameters = parse_options_header(content_type)
    if media_type != MEDIA_TYPE.encode():
        raise WrongMediaType(f"Content-Type is {shown(media_type.decode('latin-1'))}: it must be {MEDIA_TYPE}")
    reader = _Reader(file_field, max_file_bytes, option)
    try:
        parser = MultipartParser(
            _boundary(parameters), reader.callbacks(), max_header_count=MAX_HEADERS, max_header_size=MAX_HEADER_BYTES
        )
        async with aclosing(request.stream()) as chunks:
            await _feed(parser, chunks)
    except FormParserError as error:
        raise CallerError(f"the body is no valid {MEDIA_TYPE}: {error}") from None
    return reader.form()


def _boundary(parameters: dict[bytes, bytes]) -> bytes:
    boundary = parameters.get(b"boundary", b"")
    if not boundary:
        raise CallerError(f"Content-Type is {MEDIA_TYPE} without a boundary: it must name one")
    return boundary


async def _feed(parser: MultipartParser, chunks: AsyncIterable[bytes]) -> None:
    async for chunk in chunks:
        parser.write(chunk)


class _Part:
    """One part on its way: its headers, then its content."""

    def __init__(self) -> None:
        self.headers: dict[bytes, bytes] = {}
        self.name = ""
        self.is_file = False
        self.chunks: list[bytes] = []
        self.num_bytes = 0

    @property
    def param(self) -> str:
        """The name as an error names it."""
        return self.name[:MAX_SHOWN]


class _Reader:
    """Collects what the parser finds, and refuses what is too much as soon as it is."""

    def __init__(self, file_field: str, max_file_bytes: int, option: str) -> None:
        self._file_field = file_field
        self._max_file_bytes = max_file_bytes
        self._option = option
        self._fields: list[tuple[str, str]] = []
        self._file: bytes | None = None
        self._num_parts = 0
        self._num_field_bytes = 0
        self._is_over = False
        self._part = _Part()
        self._header_name = bytearray()
        self._header_value = bytearray()

    def callbacks(self) -> Any:
        """By the parser's names for them."""
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": lambda data, start, end: self._header_name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._take,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def form(self) -> Form:
        """The whole, once the body has ended."""
        if not self._is_over:
            raise CallerError(f"the body is no valid {MEDIA_TYPE}: it ends before its last boundary")
        return Form(tuple(self._fields), self._file)

    def _begin_part(self) -> None:
        self._part = _Part()
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise CallerError(f"the form has more than {MAX_PARTS} parts: no more are allowed")

    def _end_header(self) -> None:
        self._part.headers[bytes(self._header_name).lower()] = bytes(self._header_value).strip()
        self._header_name.clear()
        self._header_value.clear()

    def _end_headers(self) -> None:
        part = self._part
        kind, parameters = parse_options_header(part.headers.get(b"content-disposition", b"").decode("latin-1"))
        name = parameters.get(b"name")
        if kind != b"form-data" or name is None:
            raise CallerError(f"part {self._num_parts} of the form has no Content-Disposition: form-data with a name")
        part.name = name.decode(errors="replace")
        part.is_file = part.name == self._file_field
        self._num_field_bytes += len(name)
        if part.headers.get(b"content-transfer-encoding", b"").lower() not in _PLAIN_ENCODINGS:
            raise CallerError(
                f"{shown(part.name)} has a Content-Transfer-Encoding: it must be sent as it is", param=part.param
            )
        if part.is_file and self._file is not None:
            raise CallerError(f"{self._file_field} is given twice: one file is allowed", param=part.param)
        if not part.is_file and b"filename" in parameters:
            raise CallerError(f"{shown(part.name)} is a file: only {self._file_field} may be", param=part.param)

    def _take(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        part.num_bytes += end - start
        if part.is_file and part.num_bytes > self._max_file_bytes:
            raise BodyTooLarge(
                f"{self._file_field} has more than {self._max_file_bytes} bytes ({self._option})", param=part.param
            )
        if not part.is_file and self._num_field_bytes + part.num_bytes > MAX_FIELD_BYTES:
            raise BodyTooLarge(
                f"the fields beside {self._file_field} have more than {MAX_FIELD_BYTES} bytes: no more are allowed",
                param=part.param,
            )
        part.chunks.append(data[start:end])

    def _end_part(self) -> None:
        part = self._part
        content = b"".join(part.chunks)
        part.chunks.clear()
        if part.is_file:
            self._file = content
            return
        self._num_field_bytes += len(content)
        try:
            self._fields.append((part.name, content.decode()))
        except UnicodeDecodeError:
            raise CallerError(f"{shown(part.name)} is not valid UTF-8: fields must be", param=part.param) from None

    def _end(self) -> None:
        self._is_over = True


def unfold(fields: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Fields by name, with the arrays and objects that forms spell with brackets.

    `a[]`, or a name that comes again, is a list; `a[b]` is one entry of an object. Any other name stands as it is.
    Raises:
        CallerError: a name is used in ways that do not fit together, or an entry comes twice.
    """
    values: dict[str, Any] = {}
    for name, text in fields:
        match = _WITH_BRACKETS.fullmatch(name)
        base, key = match.groups() if match else (name, None)
        present: Any = values.setdefault(base, {}) if key else values.get(base)
        if isinstance(present, dict) != bool(key) or (key and key in present):
            raise CallerError(
                f"{shown(base)} is given more than once, in ways that do not fit together", param=base[:MAX_SHOWN]
            )
        if key:
            present[key] = text
        elif isinstance(present, list):
            present.append(text)
        elif present is None:
            values[base] = text if key is None else [text]
        else:
            values[base] = [present, text]
    return values
