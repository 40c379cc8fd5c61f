"""The curves of a run, drawn by matplotlib without a display. Import it where it is used: it takes 0.3 s."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from utils.io.files import write_atomically
from utils.record.metrics_log import Rows

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter, MaxNLocator

INK, BLUE, ORANGE, GREEN = "#212529", "#1c6dd0", "#d9480f", "#2b8a3e"
_PANEL_POINTS = 1500
_PANEL_INCHES, _HEAD_INCHES = (5.4, 3.4), 0.4  # width and height of a panel with its labels; height of the title
_SCHEDULED = ("lr", "momentum")
_LAST = (*_SCHEDULED, "images_per_sec")
_TITLES = {"lr": "learning rate", "images_per_sec": "images per second"}


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write and close a figure; close it too where it cannot be written, because pyplot keeps open ones."""
    try:
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    finally:
        plt.close(figure)


def smooth(values: Sequence[float], width: int) -> np.ndarray:
    """Return the mean of each value and its neighbours, `width` in all (an odd number), fewer at the ends."""
    padded = np.ones(width)
    sums, counts = (np.convolve(row, padded, mode="full") for row in (values, np.ones(len(values))))
    inside = slice(width // 2, width // 2 + len(values))
    return sums[inside] / counts[inside]


def thin(steps: Sequence[int], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return at most _PANEL_POINTS points: the least and the greatest of each interval, in order."""
    steps, values = np.asarray(steps), np.asarray(values, dtype=float)
    if len(values) <= _PANEL_POINTS:
        return steps, values
    bounds = np.linspace(0, len(values), _PANEL_POINTS // 2 + 1).astype(int)
    kept = [
        start + part(values[start:end])
        for start, end in zip(bounds[:-1], bounds[1:])
        for part in (np.argmin, np.argmax)
    ]
    kept = np.unique(kept)
    return steps[kept], values[kept]


def draw_training(axis: plt.Axes, steps: list[int], values: list[float], name: str) -> None:
    """Draw a noisy figure of training lightly, and its running mean over it."""
    label = "training, as optimised" if name == "loss" else "training"  # with label smoothing, mixup and the like
    width = 2 * (len(values) // 60) + 1
    if width == 1:
        axis.plot(steps, values, color=BLUE, linewidth=1.5, marker=_lone_marker(values), markersize=5, label=label)
        return
    axis.plot(*thin(steps, values), color=BLUE, linewidth=0.7, alpha=0.3)
    axis.plot(*thin(steps, smooth(values, width)), color=BLUE, linewidth=1.8, label=label)


def draw_scheduled(axis: plt.Axes, steps: list[int], values: list[float], label: str) -> None:
    """Draw a series without noise."""
    axis.plot(*thin(steps, values), color=BLUE, linewidth=1.8, marker=_lone_marker(values), markersize=5, label=label)


def _lone_marker(values: Sequence[float]) -> str | None:
    """Return the marker of a series of one value, of which a line would show nothing."""
    return "o" if len(values) == 1 else None


def draw_evaluated(axis: plt.Axes, metrics: Rows, name: str) -> None:
    """Draw the figures of evaluations, of the weights and of their average."""
    series = (("validation", name, ORANGE, "o"), ("validation, average", f"ema/{name}", GREEN, "D"))
    for label, full, color, marker in series:
        steps, values = metrics.series(full, "evaluate")
        # Few points show as such; many would hide their line.
        size = 5 if len(steps) <= 30 else 0
        axis.plot(
            steps, values, color=color, linewidth=1.4, marker=marker, markersize=size, label=label if steps else None
        )


def is_steep(axis: plt.Axes) -> bool:
    """Return whether only a logarithmic axis shows the low end that a curve falls to, noise aside.

    What rises, such as an accuracy, is read at its high end.
    """
    lines = [np.asarray(line.get_ydata(), dtype=float) for line in axis.lines if line.get_alpha() is None]
    if not any(len(line) > 1 and line[-1] < line[0] for line in lines):
        return False
    values = np.concatenate(lines)
    return bool(values.min() > 0 and values.max() > 30 * values.min())


def style_panel(axis: plt.Axes, last_step: int) -> None:
    """Give a panel over steps 0 to `last_step` its grid, spines and numbers; after its scale is set."""
    if axis.get_yscale() == "linear":
        axis.yaxis.set_major_formatter("{x:.6g}")  # matplotlib's own puts a factor where the title stands
    style_axes(axis)
    axis.set_xlim(0, 1.02 * last_step)


def style_axes(axis: plt.Axes) -> None:
    """Give axes their grid, spines and ticks."""
    axis.tick_params(labelsize=9, colors=INK, length=3)
    axis.grid(color="#dee2e6", linewidth=0.7)
    axis.set_axisbelow(True)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#868e96")


def _finish_panel(axis: plt.Axes, name: str, last_step: int) -> None:
    """Give a panel its title, axes and a legend beside its title, outside the data."""
    axis.set_title(name.replace("_", " "), loc="left", fontsize=11, fontweight="bold", color=INK)
    axis.set_xlabel("step", fontsize=9, color=INK)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    style_panel(axis, last_step)
    labels = [line.get_label() for line in axis.lines if not line.get_label().startswith("_")]
    if len(labels) > 1:
        axis.legend(
            loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(labels), frameon=False, fontsize=8.5,
            borderaxespad=0.2, handlelength=1.2, columnspacing=0.8,
        )  # fmt: skip


def plot_curves(metrics: Rows, path: Path, title: str) -> None:
    """Draw every figure of the run over its steps: loss, then evaluations, then rate and speed."""
    if not metrics.rows:
        return
    evaluated = [name.removeprefix("ema/") for name in metrics.names("evaluate")]
    trained = metrics.names("train")
    # A number of samples or of epochs says nothing as a curve, left-out steps only where there are any.
    hidden = {"epoch", "samples", *_LAST}
    if not any(metrics.series("skipped_steps", "train")[1]):
        hidden.add("skipped_steps")
    names = [name for name in dict.fromkeys([*evaluated, *trained]) if name not in hidden]
    names = sorted(names, key=lambda name: name != "loss") + [name for name in _LAST if name in trained]
    if not names:  # an epoch ended before the first log
        return
    columns = len(names) if len(names) <= 3 else 2 if len(names) == 4 else 3
    rows = -(-len(names) // columns)
    width, height = _PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * rows + _HEAD_INCHES
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    # Margins in inches: matplotlib's layout engines draw everything again to measure it.
    figure.subplots_adjust(
        left=0.75 / width, right=1 - 0.2 / width, bottom=0.55 / height, top=1 - (_HEAD_INCHES + 0.4) / height,
        wspace=0.95 / (_PANEL_INCHES[0] - 0.95), hspace=0.95 / (_PANEL_INCHES[1] - 0.95),
    )  # fmt: skip
    last_step = max(row["step"] for row in metrics.rows)
    figure.text(0.75 / width, 1 - 0.3 / height, title, fontsize=13, color=INK, va="center", parse_math=False)
    for axis, name in zip(axes.flat, names):
        steps, values = metrics.series(name, "train")
        if name in _SCHEDULED:
            draw_scheduled(axis, steps, values, name)
        elif steps:
            draw_training(axis, steps, values, name)
        draw_evaluated(axis, metrics, name)
        if name not in _LAST and is_steep(axis):
            axis.set_yscale("log")
        if name == "images_per_sec":
            axis.set_ylim(0, 1.15 * max(values))
        _finish_panel(axis, _TITLES.get(name, name), last_step)
    for axis in axes.flat[len(names) :]:
        axis.remove()
    save_figure(figure, path)
