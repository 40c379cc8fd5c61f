"""Plot the curves of a run with matplotlib, and define the style of all plots.

Import it inside functions: matplotlib takes 0.3 s to import.
"""

import io
import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from PIL import Image

from utils.io.files import write_atomically
from utils.record.curves import Curves, Series
from utils.record.figures import list_curves, title_curve
from utils.record.metrics_log import Row

BLUE = "#1c6dd0"
ORANGE = "#d9480f"
GREEN = "#2b8a3e"
_STYLE = {
    "figure.dpi": 110, "savefig.dpi": 110, "font.size": 9, "text.parse_math": False, "axes.titlelocation": "left",
    "axes.grid": True, "axes.axisbelow": True, "axes.formatter.useoffset": False, "grid.color": "#dee2e6",
    "axes.prop_cycle": matplotlib.cycler(color=[BLUE, ORANGE, GREEN, "#862e9c", "#0b7285", "#a61e4d"]),
}  # fmt: skip
# Characters are drawn by the first of these fonts that has them; the first two come with matplotlib.
_FONTS = ("DejaVu Sans", "STIXGeneral", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Noto Sans Symbols2")
warnings.filterwarnings("ignore", "Glyph ")  # that none of them has: it is drawn as a box, and each would be a line
_TRAINED_AS = {"top1": "accuracy"}  # {figure of evaluation: figure of training} in one panel


def style() -> AbstractContextManager[None]:
    """Return the matplotlib context for all plots."""
    found = fontManager.get_font_names()
    return matplotlib.rc_context({**_STYLE, "font.family": [name for name in _FONTS if name in found]})


def figure_to_image(figure: Figure) -> np.ndarray:
    """Render a figure as [H, W, 3] uint8."""
    content = io.BytesIO()
    figure.savefig(content, format="png", bbox_inches="tight", pad_inches=0.2, pil_kwargs={"compress_level": 1})
    return np.asarray(Image.open(content).convert("RGB"))


def _save(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


@style()
def plot_range_test(
    rates: Sequence[float], losses: tuple[Sequence[float], Sequence[float]], taken: float | None, title: str, path: Path
) -> None:
    """Plot a range test: losses (raw, smoothed) over learning rates, and the chosen rate.

    The loss axis ends a little above the first losses: the divergence beyond carries no information.
    """
    raw, smoothed = losses
    figure = Figure(figsize=(8.4, 4.8), layout="tight")
    axis = figure.add_subplot(title=title, xlabel="learning rate", ylabel="training loss", xscale="log")
    axis.plot(rates, raw, color=BLUE, alpha=0.35, label="loss")
    axis.plot(rates, smoothed, color=BLUE, label="mean of neighbours")
    if taken is not None:
        axis.axvline(taken, color=ORANGE, label=f"taken: {taken:.2g}")
    axis.set_ylim(min(smoothed), 1.1 * max(raw[: len(raw) // 4 + 1]))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.legend()
    _save(figure, path)


@style()
def plot_curves(rows: Sequence[Row], path: Path, title: str) -> None:
    """Plot every figure of a run over its steps; none if an epoch ended before the first log."""
    curves = Curves(path)  # of these rows, without a file
    for row in rows:
        curves.add(row)
    evaluated = _names(curves, "evaluate")
    hidden = {_TRAINED_AS[name] for name in evaluated if name in _TRAINED_AS}
    panels = list_curves(evaluated, _names(curves, "train") - hidden)
    if not panels:
        return
    columns = min(len(panels), 3)
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.4 * columns, 3.4 * lines), layout="tight")
    figure.suptitle(title)
    for number, name in enumerate(panels, start=1):
        axis = figure.add_subplot(lines, columns, number, title=title_curve(name), xlabel="step")
        _plot(axis, "training", curves.series("train", _TRAINED_AS.get(name, name)), BLUE)
        _plot(axis, "validation", curves.series("evaluate", name), ORANGE)
        _plot(axis, "average", curves.series("evaluate", f"ema/{name}"), GREEN)
        axis.legend()
    _save(figure, path)


def _names(curves: Curves, kind: str) -> set[str]:
    """Return the names of figures in one kind of rows; a figure of the averaged weights has the plain name."""
    return {name.removeprefix("ema/") for name in curves.names(kind) if not name.startswith("data/")}


def _plot(axis: Axes, label: str, curve: Series, color: str) -> None:
    """Plot steps and values with the newest value in the legend; one value is a point."""
    steps, values = curve
    if len(values):
        axis.plot(steps, values, "o-" if len(values) < 30 else "-", color=color, label=f"{label} {values[-1]:.4g}")
