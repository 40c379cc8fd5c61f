"""The plots of data/care/statistics.py, as [H, W, 3] uint8. Import it where it is used: matplotlib takes 0.3 s."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.record.plots import BLUE, INK, figure_to_image, style_axes

_LONGEST = 28  # characters of a name


def draw_histogram(values: np.ndarray, title: str, label: str, bins: int) -> np.ndarray:
    """Draw how many images have which value."""
    figure, axis = _open(title, 7.2, 3.6)
    axis.hist(values, bins=bins, color=BLUE)
    axis.set_xlabel(label, color=INK)
    axis.set_ylabel("images", color=INK)
    return figure_to_image(figure)


def draw_bars(counts: Mapping[str, int], title: str) -> np.ndarray:
    """Draw a bar for each name, in the given order from the top."""
    figure, axis = _open(title, 7.2, 1.2 + 0.24 * len(counts))
    bars = axis.barh(range(len(counts)), list(counts.values()), color=BLUE)
    axis.bar_label(bars, [f"{count:,}" for count in counts.values()], padding=3, fontsize=8, color=INK)
    axis.set_yticks(range(len(counts)), _shorten(list(counts)), parse_math=False)
    axis.set_ylim(len(counts) - 0.4, -0.6)
    axis.margins(x=0.12)
    axis.set_xlabel("images", color=INK)
    return figure_to_image(figure)


def draw_matrix(counts: np.ndarray, names: Sequence[str], title: str) -> np.ndarray:
    """Draw counts [N, N] as shares of each row's diagonal."""
    side = 2.6 + 0.3 * len(names)
    figure, axis = _open(title, side, side)
    shares = counts / np.maximum(np.diag(counts), 1)[:, None]
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(len(names)), _shorten(names), rotation=90, parse_math=False)
    axis.set_yticks(range(len(names)), _shorten(names), parse_math=False)
    axis.grid(False)
    figure.colorbar(image, ax=axis, shrink=0.6)
    return figure_to_image(figure)


def _open(title: str, width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure and its axes; the sides are in inches."""
    figure = Figure(figsize=(width, height), dpi=110, layout="tight")
    axis = figure.add_subplot()
    style_axes(axis)
    axis.set_title(title, loc="left", fontsize=11, color=INK, parse_math=False)
    return figure, axis


def _shorten(names: Sequence[str]) -> list[str]:
    return [name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…" for name in names]
