"""Numbers as a person reads them.

Knows nothing of what they count; no torch here.
Called for lines of the log, and by runtime/plan_text.py.
"""

from __future__ import annotations

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def size(num_bytes: int) -> str:
    """Bytes as a person reads them: 1.5 GiB."""
    value, unit = float(num_bytes), 0
    while abs(value) >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{num_bytes} bytes" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"
