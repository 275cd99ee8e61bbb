"""Numbers as a person reads them."""

from __future__ import annotations

import pytest

from engine.units import size


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (2**40 * 5000, "5000.0 TiB")],
)
def test_sizes_are_read_by_people(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text
