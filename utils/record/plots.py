"""The curves of a run, drawn by matplotlib without a display. Import it where it is used: it takes 0.3 s."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from utils.io.files import write_atomically
from utils.record.figures import show_name
from utils.record.metrics_log import Rows

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

INK, BLUE, ORANGE, GREEN = "#212529", "#1c6dd0", "#d9480f", "#2b8a3e"
_PANEL_POINTS = 1500
_PANEL_INCHES, _HEAD_INCHES = (5.4, 3.4), 0.4  # width and height of a panel with its labels; height of the title
_SCHEDULED = ("lr", "momentum")
_COUNTS = ("samples", "support", "tags", "tags_without_positives")
_LAST = (*_SCHEDULED, "images_per_sec")
_TITLES = {"lr": "learning rate", "images_per_sec": "images per second"}
_TRAINED_AS = {"top1": "accuracy"}  # figures of evaluation and of training that share a panel


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write and close a figure; close it too where it cannot be written, because pyplot keeps open ones."""
    try:
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    finally:
        plt.close(figure)


def open_square(title: str, x_label: str, y_label: str) -> tuple[Figure, plt.Axes]:
    """Return a figure and its axes of shares, 0 to 1 both; it is not pyplot's, so nothing must close it."""
    figure = Figure(figsize=(6.4, 6.0), dpi=110, layout="tight")
    axis = figure.add_subplot(xlim=(0, 1), ylim=(0, 1.01))
    axis.set_title(title, loc="left", fontsize=11, color=INK, parse_math=False)
    axis.set_xlabel(x_label, color=INK)
    axis.set_ylabel(y_label, color=INK)
    style_axes(axis)
    return figure, axis


def figure_to_image(figure: Figure) -> np.ndarray:
    """Return a figure as [H, W, 3] uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


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
    label = "as optimised" if name == "loss" else "training"  # with label smoothing, mixup and the like
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
    series = (("validation", name, ORANGE, "o"), ("average", f"ema/{name}", GREEN, "D"))
    for label, full, color, marker in series:
        steps, values = metrics.series(full, "evaluate")
        size = 5 if len(steps) <= 30 else 0  # few points show as such; many would hide their line
        if steps:
            axis.plot(steps, values, color=color, linewidth=1.4, marker=marker, markersize=size, label=label)


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


def _finish_panel(axis: plt.Axes, name: str, last_step: int, steps_per_epoch: float) -> None:
    """Give a panel its title, axes and, beside its title, a legend with the newest values."""
    axis.set_title(name, loc="left", fontsize=11, fontweight="bold", color=INK)
    style_panel(axis, last_step)
    epochs = MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]).tick_values(0, last_step / steps_per_epoch)
    places = [epoch * steps_per_epoch for epoch in epochs if 0 <= epoch * steps_per_epoch <= 1.02 * last_step]
    number = EngFormatter(sep="")
    axis.set_xticks(places, [f"{place / steps_per_epoch:g}\n{number(round(place))}" for place in places])
    axis.set_xlabel("epoch, step", fontsize=9, color=INK)
    named = [line for line in axis.lines if not line.get_label().startswith("_")]
    for line in named:
        line.set_label(f"{line.get_label()} {line.get_ydata()[-1]:.4g}")
    axis.legend(
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(named), frameon=False, fontsize=8.5,
        borderaxespad=0.2, handlelength=1.2, columnspacing=0.8,
    )  # fmt: skip


def plot_range_test(
    rates: Sequence[float], losses: tuple[Sequence[float], Sequence[float]], taken: float | None, title: str, path: Path
) -> None:
    """Draw a range test: losses (raw, smoothed) over rates, and the rate that is taken.

    The axis of losses ends a little above where the test began: what diverges beyond says nothing more.
    """
    raw, smoothed = losses
    figure, axis = plt.subplots(figsize=(8.4, 4.8))
    axis.plot(rates, raw, color=BLUE, linewidth=0.8, alpha=0.35, label="loss")
    axis.plot(rates, smoothed, color=BLUE, linewidth=2.0, label="mean of neighbours")
    if taken is not None:
        axis.axvline(taken, color=ORANGE, linewidth=2.0, label=f"taken: {taken:.2g}")
    low, high = min(smoothed), float(np.percentile(raw[: len(raw) // 4 or 1], 98))
    high = max(high, min(max(raw), high + 0.5 * abs(high))) if taken is None else high
    margin = 0.08 * (high - low) or 0.1
    axis.set_ylim(low - margin, high + margin)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("learning rate", color=INK)
    axis.set_ylabel("training loss", color=INK)
    axis.set_title(title, loc="left", fontsize=11, color=INK, parse_math=False)
    style_axes(axis)
    axis.legend(frameon=False, fontsize=9.5)
    figure.tight_layout()
    save_figure(figure, path)


def _panels(metrics: Rows) -> list[tuple[str, str]]:
    """Return (figure of training, figure of evaluation) of each panel: loss, evaluations, the rest, rate and speed."""
    evaluated = list(dict.fromkeys(name.removeprefix("ema/") for name in metrics.names("evaluate")))
    trained = metrics.names("train")
    # A number of samples, tags or epochs says nothing as a curve, left-out steps only where there are any.
    hidden = {"epoch", *_COUNTS, *_LAST, *(_TRAINED_AS[name] for name in evaluated if name in _TRAINED_AS)}
    if not any(metrics.series("skipped_steps", "train")[1]):
        hidden.add("skipped_steps")
    names = [name for name in dict.fromkeys([*evaluated, *trained]) if name not in hidden and name[:5] != "data/"]
    names = sorted(names, key=lambda name: name != "loss") + [name for name in _LAST if name in trained]
    return [(_TRAINED_AS.get(name, name), name) for name in names]


def plot_curves(metrics: Rows, path: Path, title: str) -> None:
    """Draw every figure of the run over its steps, while it trains and at its end."""
    panels = _panels(metrics)
    if not panels:  # an epoch ended before the first log
        return
    columns = len(panels) if len(panels) <= 3 else 2 if len(panels) == 4 else 3
    rows = -(-len(panels) // columns)
    width, height = _PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * rows + _HEAD_INCHES
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    # Margins in inches: matplotlib's layout engines draw everything again to measure it.
    figure.subplots_adjust(
        left=0.75 / width, right=1 - 0.2 / width, bottom=0.65 / height, top=1 - (_HEAD_INCHES + 0.4) / height,
        wspace=0.95 / (_PANEL_INCHES[0] - 0.95), hspace=1.05 / (_PANEL_INCHES[1] - 1.05),
    )  # fmt: skip
    last = next(row for row in reversed(metrics.rows) if row["kind"] in ("train", "evaluate"))  # which has the epoch
    figure.text(0.75 / width, 1 - 0.3 / height, title, fontsize=13, color=INK, va="center", parse_math=False)
    for axis, (trained, evaluated) in zip(axes.flat, panels):
        steps, values = metrics.series(trained, "train")
        if trained in _SCHEDULED:
            draw_scheduled(axis, steps, values, trained)
        elif steps:
            draw_training(axis, steps, values, trained)
        draw_evaluated(axis, metrics, evaluated)
        if trained not in _LAST and is_steep(axis):
            axis.set_yscale("log")
        if trained == "images_per_sec":
            axis.set_ylim(0, 1.15 * max(values))
        _finish_panel(axis, _TITLES.get(evaluated, show_name(evaluated)), last["step"], last["step"] / last["epoch"])
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    save_figure(figure, path)
