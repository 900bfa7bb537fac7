"""Tables for a terminal, and numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence

from harness.summary import Summary


def number(value: float) -> str:
    """Three significant digits, without an exponent: 0.123, 4.57, 89.1, 12,345."""
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{digits}f}"


def spread(summary: Summary) -> str:
    """A median with its range: `45.2 (44.8 to 46.0)`."""
    if summary.n == 1:
        return number(summary.median)
    return f"{number(summary.median)} ({number(summary.low)} to {number(summary.high)})"


def render(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first one is aligned left, the others right."""
    table = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(row[place]) for row in table) for place in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *cells]).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(table[0]), rule, *map(line, table[1:])])
