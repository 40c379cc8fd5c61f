"""Plot the curves of a run with matplotlib, and define the style of all plots.

Import it inside functions: matplotlib takes 0.3 s to import.
"""

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image
from scipy.ndimage import uniform_filter1d

from utils.io.files import write_atomically
from utils.record.figures import INK, list_curves, title_curve
from utils.record.metrics_log import Row, series

BLUE = "#1c6dd0"
ORANGE = "#d9480f"
GREEN = "#2b8a3e"
_STYLE = {
    "figure.dpi": 110, "savefig.dpi": 110, "font.size": 9, "text.color": INK, "text.parse_math": False,
    "axes.titlesize": 11, "axes.titlelocation": "left", "axes.labelcolor": INK, "axes.edgecolor": "#868e96",
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True,
    "axes.formatter.limits": (-9, 9), "axes.formatter.useoffset": False,  # no factor above the axis, beside the title
    "axes.prop_cycle": matplotlib.cycler(color=[BLUE, ORANGE, GREEN, "#862e9c", "#0b7285", "#a61e4d"]),
    "grid.color": "#dee2e6", "grid.linewidth": 0.7, "xtick.color": INK, "ytick.color": INK, "legend.frameon": False,
}  # fmt: skip
_PANEL_INCHES = (5.4, 3.4)  # width and height of a panel with its labels
_HEAD_INCHES = 0.4  # height of the title
_SCHEDULED = ("lr", "d", "momentum")
_TRAINED_AS = {"top1": "accuracy"}  # {figure of evaluation: figure of training} in one panel


def style(families: Sequence[str] = ("DejaVu Sans",)) -> AbstractContextManager[None]:
    """Return the matplotlib context for all plots, with fonts of these families."""
    return matplotlib.rc_context({**_STYLE, "font.family": list(families)})


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
    axis.plot(rates, raw, color=BLUE, linewidth=0.8, alpha=0.35, label="loss")
    axis.plot(rates, smoothed, color=BLUE, linewidth=2.0, label="mean of neighbours")
    if taken is not None:
        axis.axvline(taken, color=ORANGE, linewidth=2.0, label=f"taken: {taken:.2g}")
    low = min(smoothed)
    high = float(np.percentile(raw[: len(raw) // 4 or 1], 98))
    if taken is None:
        high = max(high, min(max(raw), high + 0.5 * abs(high)))
    margin = 0.08 * (high - low) or 0.1
    axis.set_ylim(low - margin, high + margin)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.legend()
    _save(figure, path)


@style()
def plot_learning_curve(images: Sequence[int], errors: np.ndarray, fitted: np.ndarray, title: str, path: Path) -> None:
    """Plot errors, [N], over numbers of images, and the fitted ones. The last is predicted."""
    figure = Figure(figsize=(8.4, 4.8), layout="tight")
    axis = figure.add_subplot(title=title, xlabel="training images", ylabel="error", xscale="log")
    axis.plot(images, fitted, label="fitted")
    axis.plot(images[:-1], errors[:-1], "o", label="measured")
    axis.plot(images[-1:], errors[-1:], "o", label="predicted")
    axis.set_xticks(images, [f"{count:,}" for count in images], minor=False)
    axis.minorticks_off()
    axis.legend()
    _save(figure, path)


@style()
def plot_curves(rows: Sequence[Row], path: Path, title: str) -> None:
    """Plot every figure of a run over its epochs and steps; none if an epoch ended before the first log."""
    panels = _panels(rows)
    if not panels:
        return
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    width = _PANEL_INCHES[0] * columns
    height = _PANEL_INCHES[1] * lines + _HEAD_INCHES
    figure = Figure(figsize=(width, height))
    # Fixed margins in inches: matplotlib's layout engines would draw everything twice.
    top = 1 - (_HEAD_INCHES + 0.4) / height
    figure.subplots_adjust(left=0.75 / width, right=1 - 0.2 / width, bottom=0.65 / height, top=top)
    figure.subplots_adjust(wspace=0.95 / (_PANEL_INCHES[0] - 0.95), hspace=1.05 / (_PANEL_INCHES[1] - 1.05))
    figure.text(0.75 / width, 1 - 0.3 / height, title, fontsize=13, va="center")
    last = next(row for row in reversed(rows) if row["kind"] in ("train", "evaluate"))  # these rows have the epoch
    steps_per_epoch = last["step"] / last["epoch"]
    show_count = EngFormatter(sep="")
    for number, name in enumerate(panels, start=1):
        axis = figure.add_subplot(lines, columns, number, xlim=(0, 1.02 * last["epoch"]))
        axis.set_title(title_curve(name), fontweight="bold")
        _draw_training(axis, rows, _TRAINED_AS.get(name, name), steps_per_epoch)
        _draw_evaluations(axis, rows, name, steps_per_epoch)
        if name == "images_per_sec":
            axis.set_ylim(bottom=0)
        axis.set_xlabel("epoch, step")
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        axis.xaxis.set_major_formatter(lambda epoch, _: f"{epoch:g}\n{show_count(round(epoch * steps_per_epoch))}")
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, fontsize=8, handlelength=1, columnspacing=0.8)
    _save(figure, path)


def _panels(rows: Sequence[Row]) -> list[str]:
    """Return the figures of the panels; an evaluation's panel also has the figure of training that is like it."""
    names = {"train": set(), "evaluate": set()}
    for row in rows:
        if row["kind"] in names:
            names[row["kind"]] |= {name.removeprefix("ema/") for name, value in row.items() if isinstance(value, float)}
    hidden = {_TRAINED_AS[name] for name in names["evaluate"] if name in _TRAINED_AS}
    if not any(series(rows, "skipped_steps", "train")[1]):
        hidden.add("skipped_steps")
    shown = list_curves(names["evaluate"], names["train"] - hidden)
    return [name for name in shown if not name.startswith("data/")]


def _draw_training(axis: Axes, rows: Sequence[Row], name: str, steps_per_epoch: float) -> None:
    """Plot a training figure: its values lightly, and their running mean over a thirtieth of the run."""
    steps, values = series(rows, name, "train")
    label = "as optimised" if name == "loss" else "training"  # with label smoothing, mixup and the like
    width = 2 * (len(values) // 60) + 1
    if name in _SCHEDULED:
        label = name
        width = 1
    if width > 1:
        _plot(axis, steps, values, steps_per_epoch, "_", color=BLUE, linewidth=0.7, alpha=0.3)
        values = uniform_filter1d(np.asarray(values, dtype=float), width, mode="nearest")
    _plot(axis, steps, values, steps_per_epoch, label, color=BLUE, marker="o" if len(values) == 1 else "")


def _draw_evaluations(axis: Axes, rows: Sequence[Row], name: str, steps_per_epoch: float) -> None:
    """Plot an evaluation's figure, of the weights and of their average."""
    for label, its, color, marker in (("validation", name, ORANGE, "o"), ("average", f"ema/{name}", GREEN, "D")):
        steps, values = series(rows, its, "evaluate")
        size = 5 if len(steps) <= 30 else 0  # many markers would hide the line
        _plot(axis, steps, values, steps_per_epoch, label, color=color, marker=marker, markersize=size)


def _plot(
    axis: Axes, steps: Sequence[int], values: Sequence[float], steps_per_epoch: float, label: str, **how: object
) -> None:
    """Plot a series over epochs, with its newest value in the legend."""
    if len(steps):
        axis.plot(np.asarray(steps) / steps_per_epoch, values, label=f"{label} {values[-1]:.4g}", **how)
