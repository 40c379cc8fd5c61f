"""A plain text table."""

from collections.abc import Mapping, Sequence
from typing import Any


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of equal length as text with left-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows)


def show_cell(value: Any) -> str:
    """Format a table's value for people: fractions with four digits, None as an empty text."""
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) > 1 else f"{value:.4g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def show_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows with equal keys, at least one, as an aligned table with a header."""
    return align_columns([list(rows[0]), *([show_cell(value) for value in row.values()] for row in rows)])
