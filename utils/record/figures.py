"""Format figures and tables of text for people."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

INK = "#212529"  # the colour of texts in plots and pictures
COUNTS = ("samples", "support", "tags", "tags_without_positives", "mAP_error")  # figures that measure nothing


def show_name(name: str) -> str:
    """Return a figure's name for people: `top-5` for top5, `average top-1` for ema/top1."""
    name = re.sub(r"^ema/", "average ", name)
    return re.sub(r"\btop(\d+)\b", r"top-\1", name).replace("_", " ").replace("/", " ")


def show_evaluated(name: str) -> str:
    """Return the name of an evaluation's figure: `val loss` for loss."""
    return re.sub(r"\bloss\b", "val loss", show_name(name))


def show_duration(seconds: float | None) -> str:
    """Return a duration as `27:04:05` or `3:05`; dashes for None."""
    if seconds is None:
        return "-:--"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of equal length as text with left-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows)


def show_lines(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Return a title with named lines below it."""
    return "\n".join([title, *(f"  {name:<11} {text}" for name, text in rows)])


def show_cell(value: Any) -> str:
    """Format a table's value for people: fractions with four digits, None as an empty text."""
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) > 1 else f"{value:.4g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def show_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows with equal keys, at least one, as an aligned table with a header."""
    return align_columns([list(rows[0]), *([show_cell(value) for value in row.values()] for row in rows)])


def interval(name: str, figures: Mapping[str, float]) -> tuple[float, float] | None:
    """Return the 95 % interval of an evaluation's figure; None if it has none.

    Of top1, top5, ...: Wilson's, of a share of `samples` independent images. Of mAP: twice 1.96 of its error wide.
    """
    value, images, error = figures[name], figures.get("samples"), figures.get(f"{name}_error")
    if error is not None:
        return max(0.0, value - 1.96 * error), min(1.0, value + 1.96 * error)
    if not images or not re.fullmatch(r"top\d+", name):
        return None
    from scipy.stats import binomtest

    found = binomtest(round(value * images), round(images)).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def show_interval(ends: tuple[float, float] | None) -> str:
    """Return the interval of a figure as text, or nothing."""
    return "" if ends is None else f" (95 % interval: {ends[0]:.4g} to {ends[1]:.4g})"
