"""Forms in pieces: what they hold, and how much of it is too much."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api import multipart
from api.errors import BodyTooLarge, WrongMediaType
from api.multipart import Form, read_form, unfold
from engine.errors import CallerError

BOUNDARY = "xBOUNDARYx"
END = f"--{BOUNDARY}--\r\n".encode()


def part(content: bytes, *headers: str) -> bytes:
    head = "".join(f"{header}\r\n" for header in headers)
    return f"--{BOUNDARY}\r\n{head}\r\n".encode() + content + b"\r\n"


def field(name: str, content: bytes = b"x", *more: str) -> bytes:
    return part(content, f'Content-Disposition: form-data; name="{name}"', *more)


def upload(content: bytes, filename: str = "a.wav") -> bytes:
    disposition = f'Content-Disposition: form-data; name="file"; filename="{filename}"'
    return part(content, disposition, "Content-Type: audio/wav")


def read(
    *pieces: bytes, content_type: str = f"multipart/form-data; boundary={BOUNDARY}", max_file_bytes: int = 1000
) -> Form:
    """What is read of a body that comes in these pieces."""

    async def stream() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    request: Any = SimpleNamespace(headers={"content-type": content_type}, stream=stream)
    return asyncio.run(read_form(request, file_field="file", max_file_bytes=max_file_bytes, option="--max"))


def test_fields_come_in_order_and_the_file_apart() -> None:
    form = read(field("a", "Grüße".encode()) + upload(b"RIFF\r\n--x") + field("a[]", b"") + END)
    assert form.fields == (("a", "Grüße"), ("a[]", "")) and form.file == b"RIFF\r\n--x"


def test_a_form_may_have_no_file_or_an_empty_one() -> None:
    assert read(END) == Form((), None)
    assert read(upload(b""), END).file == b""


def test_a_file_is_known_by_the_name_of_its_field_and_never_by_its_own() -> None:
    for filename in ("../../etc/passwd", "", "\\\\host\\share", "a\x00b", "世.wav"):
        assert read(upload(b"x", filename), END).file == b"x"
    assert read(field("file", b"\xff\xfe"), END).file == b"\xff\xfe"


def test_names_and_boundaries_may_be_quoted() -> None:
    body = field("a;b") + END
    assert read(body, content_type=f'Multipart/Form-Data; charset=utf-8; boundary="{BOUNDARY}"').fields == (
        ("a;b", "x"),
    )


@given(data=st.data(), content=st.binary(max_size=60), text=st.text(max_size=20))
def test_any_pieces_give_the_same(data: st.DataObject, content: bytes, text: str) -> None:
    content = content + data.draw(st.sampled_from([b"", b"\r\n", b"\r\n--", f"\r\n--{BOUNDARY[:-1]}".encode(), b"\r"]))
    body = field("prompt", text.encode()) + upload(content) + END + data.draw(st.binary(max_size=9))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=12)))
    pieces = [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    assert read(*pieces) == read(body) == Form((("prompt", text),), content)


@pytest.mark.parametrize(
    ("pieces", "rule"),
    [
        ([], "ends before its last boundary"),
        ([b"hello"], "no valid multipart/form-data"),
        ([b"\r\n" * 1000], "ends before its last boundary"),
        ([field("a")], "ends before its last boundary"),
        ([b"--other\r\n\r\n"], "no valid multipart/form-data"),
        ([part(b"x")], "part 1 of the form has no Content-Disposition"),
        ([part(b"x", "Content-Disposition: form-data")], "has no Content-Disposition"),
        ([part(b"x", 'Content-Disposition: attachment; name="a"')], "has no Content-Disposition"),
        ([part(b"x", "no header")], "no valid multipart/form-data"),
        ([part(b"x", "X: " + "y" * 5000)], "Maximum header size exceeded"),
        ([part(b"x", "y" * 5000 + ": z")], "Maximum header size exceeded"),
        ([b"--" + BOUNDARY.encode() + b"\r\nX: ", *[b"y" * 1000] * 10], "Maximum header size exceeded"),
        ([part(b"x", *["X: y"] * 100)], "Maximum header count exceeded"),
        ([field("a") * 10_000, END], "more than 64 parts"),
        ([upload(b"x"), upload(b"y"), END], "file is given twice"),
        ([field("file"), upload(b"y"), END], "file is given twice"),
        ([upload(b"x").replace(b'"file"', b'"image"'), END], "only file may be"),
        ([field("a", b"\xff"), END], '"a" is not valid UTF-8'),
        ([field("a", b"eA==", "Content-Transfer-Encoding: base64"), END], "Content-Transfer-Encoding"),
    ],
)
def test_what_is_no_form_is_refused_and_says_why(pieces: list[bytes], rule: str) -> None:
    with pytest.raises(CallerError) as caught:
        read(*pieces)
    assert rule in str(caught.value) and len(str(caught.value)) < 300
    assert not isinstance(caught.value, BodyTooLarge)


def test_encodings_that_encode_nothing_are_taken() -> None:
    assert read(field("a", b"x", "Content-Transfer-Encoding: 8bit"), END).fields == (("a", "x"),)


@pytest.mark.parametrize(
    "content_type", ["", "application/json", "multipart/mixed; boundary=x", "application/x-www-form-urlencoded"]
)
def test_other_types_of_body_are_refused_unread(content_type: str) -> None:
    with pytest.raises(WrongMediaType, match="must be multipart/form-data"):
        read(b"never looked at", content_type=content_type)


@pytest.mark.parametrize("parameters", ["", "; boundary=", "; boundary", "; charset=utf-8", "; boundary=" + "x" * 300])
def test_a_boundary_is_needed(parameters: str) -> None:
    with pytest.raises(CallerError, match=r"(?i)boundary"):
        read(END, content_type=f"multipart/form-data{parameters}")


def test_the_file_is_counted_while_it_is_read() -> None:
    assert read(upload(b"x" * 1000), END).file == b"x" * 1000
    with pytest.raises(BodyTooLarge, match=r"file has more than 1000 bytes \(--max\)") as caught:
        read(upload(b"x" * 1001), END)
    assert caught.value.param == "file"
    num_read = 0

    async def stream() -> AsyncIterator[bytes]:
        nonlocal num_read
        yield upload(b"")[:-2]
        while True:
            num_read += 100
            yield b"y" * 100

    request: Any = SimpleNamespace(headers={"content-type": f"multipart/form-data; boundary={BOUNDARY}"}, stream=stream)
    with pytest.raises(BodyTooLarge):
        asyncio.run(read_form(request, file_field="file", max_file_bytes=1000, option="--max"))
    assert num_read <= 1200


def test_the_other_fields_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multipart, "MAX_FIELD_BYTES", 100)
    assert len(read(field("a", b"x" * 49), field("b", b"y" * 49), upload(b"z" * 500), END).fields) == 2
    with pytest.raises(BodyTooLarge, match="beside file have more than 100 bytes"):
        read(field("a", b"x" * 49), field("b", b"y" * 50), END)


def test_whatever_a_file_holds_it_is_read_quickly() -> None:
    size = 2_000_000
    near = f"\r\n--{BOUNDARY[:-1]}y".encode()
    for content in (b"\r" * size, b"\r\n" * (size // 2), near * (size // len(near)), bytes(size)):
        body = upload(content) + END
        start = time.process_time()
        form = read(*(body[i : i + 65536] for i in range(0, len(body), 65536)), max_file_bytes=size)
        assert form.file == content and time.process_time() - start < 1


def test_brackets_make_lists_and_objects() -> None:
    fields = [
        ("a[]", "1"),
        ("a[]", "2"),
        ("b", "x"),
        ("c[k]", "v"),
        ("c[l]", "w"),
        ("d", "1"),
        ("d", "2"),
        ("d[]", "3"),
    ]
    assert unfold(fields) == {"a": ["1", "2"], "b": "x", "c": {"k": "v", "l": "w"}, "d": ["1", "2", "3"]}
    odd = ["e[x][y]", "[]", "f[", "[g]", "h]", ""]
    assert unfold((name, "1") for name in odd) == dict.fromkeys(odd, "1")


@pytest.mark.parametrize("names", [("a", "a[k]"), ("a[k]", "a"), ("a[k]", "a[k]"), ("a[k]", "a[]"), ("a[]", "a[k]")])
def test_names_that_do_not_fit_together_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(CallerError, match='"a" is given more than once') as caught:
        unfold((name, "1") for name in names)
    assert caught.value.param == "a"
