"""Percentiles of latencies and tables of results.

Knows nothing of servers; plain numbers in, plain numbers and text out.
Called by the other benchmarks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile of `values` (share 0 to 1); NaN when there are none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1e6) * len(ordered) // 1_000_000) - 1))]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> str:
    """A Markdown table whose columns line up: those in `left` to the left, the others, numbers, to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (width + 2)) if i in left else "-" * (width + 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(header), f"|{'|'.join(rule)}|", *(line(row) for row in rows)])
