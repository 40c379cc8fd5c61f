"""The picture of a learning-rate range test. Import it where it is used: matplotlib takes 0.3 s."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from utils.record.plots import BLUE, GREEN, INK, ORANGE, plt, save_figure, style_axes

_COLORS = {"steepest": ORANGE, "minimum_half": INK, "minimum_tenth": GREEN, "valley": "#862e9c"}
_NAMES = {
    "steepest": "steepest descent", "minimum_half": "minimum / 2", "minimum_tenth": "minimum / 10", "valley": "valley",
}  # fmt: skip


def plot_range_test(
    rates: Sequence[float],
    losses: tuple[Sequence[float], Sequence[float]],
    suggestions: Mapping[str, float],
    taken: str | None,
    title: str,
    path: Path,
) -> None:
    """Draw a range test: losses (raw, smoothed) over rates, every suggestion, and the method that is taken.

    The axis of losses ends a little above where the test began: what diverges beyond says nothing more.
    """
    raw, smoothed = losses
    figure, axis = plt.subplots(figsize=(8.4, 4.8))
    axis.plot(rates, raw, color=BLUE, linewidth=0.8, alpha=0.35, label="loss")
    axis.plot(rates, smoothed, color=BLUE, linewidth=2.0, label="smoothed")
    axis.set_ylim(*_limits(raw, smoothed, has_answer=bool(suggestions)))
    for name, rate in suggestions.items():
        is_taken = name == taken
        axis.axvline(
            rate, color=_COLORS[name], linewidth=2.2 if is_taken else 1.2, linestyle="-" if is_taken else "--",
            label=f"{_NAMES[name]}: {rate:.2g}{'  (taken)' if is_taken else ''}",
        )  # fmt: skip
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}" if rates[-1] < 30 * rates[0] else "")
    axis.set_xlabel("learning rate", color=INK)
    axis.set_ylabel("training loss", color=INK)
    axis.set_title(title, loc="left", fontsize=11, color=INK, parse_math=False)
    style_axes(axis)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9.5)
    figure.tight_layout()
    save_figure(figure, path)


def _limits(raw: Sequence[float], smoothed: Sequence[float], *, has_answer: bool) -> tuple[float, float]:
    """Return the ends of the axis of losses: what the sweep began with, its noise, and its fall.

    Without an answer also half as much again above the start, which shows a divergence as one.
    """
    start = raw[: max(1, len(raw) // 4)]
    low, high = min(*smoothed, *np.percentile(raw, [2])), float(np.percentile(start, 98))
    if not has_answer:
        high = min(max(*raw, high), 1.5 * high if high > 0 else 0.5 * high)
    margin = 0.08 * (high - low)
    return low - margin, high + margin
