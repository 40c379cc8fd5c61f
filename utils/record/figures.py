"""Format figures and tables of text for people."""

import re
from collections.abc import Collection, Sequence
from itertools import islice
from typing import Any

import numpy as np

from utils.contracts import Figures
from utils.io.files import Values

INK = "#212529"  # the colour of texts in plots and pictures
BALANCED = "mean_class_accuracy"
ONE_CLASS = "always_one_class"  # the accuracy of always answering the most frequent class
MARGINS = ("mae_margin", "rmse_margin", "r2_margin", "rank_correlation_margin")  # half of 95 % intervals
# Figures that measure no network.
COUNTS = ("samples", "support", "tags", "tags_without_positives", ONE_CLASS, *MARGINS)
# Of curves: the groups, and what the names of their figures match. The last group that matches has the figure.
GROUPS = {
    "Loss and metrics": "",
    "Learning rate and steps": r"(lr|momentum|d|grad_norm|skipped_steps|loss_scale)$",
    "Throughput, memory and data": r"(images_per_sec$|peak_memory_gib$|data/)",
}
_TITLES = {"lr": "learning rate", "d": "d of Prodigy", "images_per_sec": "images per second"}
_WITHOUT_CURVE = {"epoch", "seconds", *COUNTS}


def show_name(name: str) -> str:
    """Return a figure's name for people: `top-5` for top5, `average top-1` for ema/top1."""
    name = re.sub(r"^ema/", "average ", name).replace(BALANCED, "balanced accuracy")
    return re.sub(r"\btop(\d+)\b", r"top-\1", name).replace("_", " ").replace("/", " ")


def title_curve(name: str) -> str:
    """Return the title of a figure's curve."""
    return _TITLES.get(name) or show_name(name)


def group_of(name: str) -> int:
    """Return the number of a figure's group in GROUPS."""
    return max(number for number, names in enumerate(GROUPS.values()) if re.match(names, name))


def list_curves(evaluated: Collection[str], trained: Collection[str]) -> list[str]:
    """Return the figures with a curve by group: the loss, those of evaluations, those of training."""
    order = lambda name: (group_of(name), name != "loss", name not in evaluated, name)  # noqa: E731
    return sorted({*evaluated, *trained} - _WITHOUT_CURVE, key=order)


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
    if isinstance(value, int):
        return f"{value:,}"
    return "" if value is None else str(value)


def show_rows(rows: Sequence[Values]) -> str:
    """Return rows with equal keys, at least one, as an aligned table with a header."""
    return align_columns([list(rows[0]), *([show_cell(value) for value in row.values()] for row in rows)])


def interval(name: str, figures: Figures) -> Sequence[float] | None:
    """Return the 95 % interval of an evaluation's figure; None if it has none.

    Half of it may stand among the figures. Of top1, top5, ...: Wilson's, of a share of `samples` independent images:
    where (x - share)^2 is 1.96^2 times the variance of x. The import of scipy.stats, which has it, takes a second.
    """
    if (margin := figures.get(f"{name}_margin", 0.0)) > 0:
        return [figures[name] - margin, figures[name] + margin]
    images = figures.get("samples")
    if not images or name not in figures or not re.fullmatch(r"top\d+", name):
        return None
    share = figures[name]
    spread = 1.96**2 / images
    return sorted(np.roots([1 + spread, -2 * share - spread, share**2]).tolist())


def show_figure(name: str, figures: Figures) -> str:
    """Return a figure with its interval as text; nothing if it is not among the figures."""
    low, high = interval(name, figures) or (None, None)
    return show_cell(figures.get(name)) + ("" if low is None else f" (95 % interval: {low:.4g} to {high:.4g})")


def show_best(result: Values) -> str:
    """Return the figures of the best weights in result.json: the first, the best one, what is easy, and the marks."""
    figures = result.get("figures", {})
    names = dict.fromkeys([*islice(figures, 1), result.get("metric"), ONE_CLASS])
    shown = [f"{show_evaluated(name)} {show_figure(name, figures)}" for name in names if name in figures]
    shown += [finding["mark"] for finding in result.get("findings", ()) if finding["mark"]]
    return ", ".join(shown)
