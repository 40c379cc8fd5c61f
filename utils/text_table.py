"""A plain text table."""

from collections.abc import Mapping, Sequence
from typing import Any


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of texts, all of one length, as lines with their columns aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows)


def show_cell(value: Any) -> str:
    """Return a value of a table as people read it: four digits of a fraction, nothing for None."""
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) > 1 else f"{value:.4g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def show_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows with equal keys, at least one, as an aligned table below their names."""
    return align_columns([list(rows[0]), *([show_cell(value) for value in row.values()] for row in rows)])
