"""The live plots of a run: accuracy, loss, learning rate and momentum. Import it where it is used: see plots.py."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.record.metrics_log import Rows
from utils.record.plots import (
    INK,
    draw_evaluated,
    draw_scheduled,
    draw_training,
    is_steep,
    plt,
    save_figure,
    style_panel,
)

_SIZE = (8.6, 4.8)  # inches
_MARGINS = {"left": 0.085, "right": 0.975, "bottom": 0.125, "top": 0.835}
_HEAD_AT = 0.945  # the title's height
_NAME_LENGTH = 44  # characters of the run's name: more would reach the best value
_LEGEND = {"frameon": False, "fontsize": 9, "borderpad": 0.0, "handlelength": 1.4, "columnspacing": 1.4}
_GREY = "#868e96"


@dataclass(frozen=True)
class Panel:
    """One picture: a figure of train rows and, for those that are evaluated, one of evaluate rows.

    is_lowest_best: which of the evaluated values is the best.
    """

    file: str
    title: str
    trained: str
    evaluated: str | None = None
    is_lowest_best: bool = False


PANELS = (
    Panel("accuracy_live.png", "accuracy", "accuracy", "top1"),
    Panel("loss_live.png", "loss", "loss", "loss", is_lowest_best=True),
    Panel("lr_live.png", "learning rate", "lr"),
    Panel("momentum_live.png", "momentum", "momentum"),
)


def draw_live_plots(rows: Rows, folder: Path, run_name: str) -> list[Path]:
    """Draw the pictures that the rows have figures for into `folder`; returns their paths."""
    drawn = []
    for panel in PANELS:
        figure = draw_panel(panel, rows, run_name)
        if figure is not None:
            drawn.append(folder / panel.file)
            save_figure(figure, drawn[-1])
    return drawn


def draw_panel(panel: Panel, rows: Rows, run_name: str) -> plt.Figure | None:
    """Draw a picture; None where no row has its figures."""
    trained = rows.series(panel.trained, "train")
    evaluated = panel.evaluated is not None and any(
        rows.series(name, "evaluate")[0] for name in (panel.evaluated, f"ema/{panel.evaluated}")
    )
    if not trained[0] and not evaluated:
        return None
    figure, axis = plt.subplots(figsize=_SIZE, gridspec_kw=_MARGINS)
    if panel.evaluated is None:
        draw_scheduled(axis, *trained, panel.title)
    else:
        if trained[0]:
            draw_training(axis, *trained, panel.trained)
        draw_evaluated(axis, rows, panel.evaluated)
        if panel.title == "loss" and is_steep(axis):
            axis.set_yscale("log")
    last_step, steps_per_epoch = rows.rows[-1]["step"], count_steps_per_epoch(rows)
    _limit_values(axis, *([0.0] if panel.trained == "lr" else []))
    style_panel(axis, last_step)
    axis.yaxis.set_major_formatter("{x:.6g}")
    _number_epochs(axis, last_step, steps_per_epoch)
    _add_newest_values(axis)
    _write_head(figure, axis, panel.title, run_name)
    best = find_best(panel, rows)
    if best is not None:
        step, value = best
        text = f"best {value:.4g}: epoch {step / steps_per_epoch:.4g}, step {step:,}"
        ring, place = _mark_best(axis, step, value), (_MARGINS["right"], _HEAD_AT)
        figure.legend([ring], [text], loc="center right", bbox_to_anchor=place, borderaxespad=0.0, **_LEGEND)
    return figure


def count_steps_per_epoch(rows: Rows) -> float:
    """Return how many steps an epoch has, by the newest row of training or evaluation."""
    row = next(row for row in reversed(rows.rows) if row["kind"] in ("train", "evaluate"))
    return row["step"] / row["epoch"]


def _limit_values(axis: plt.Axes, *shown: float) -> None:
    """Fit the axis to the lines, to noise but for its hundredth parts at both ends, and to the values `shown`."""
    values = [*shown]
    for line in axis.lines:
        drawn = np.asarray(line.get_ydata(), dtype=float)
        if axis.get_yscale() == "log":
            drawn = np.log(drawn[drawn > 0])
        if len(drawn):
            values += [*(np.percentile(drawn, (1, 99)) if line.get_alpha() else (drawn.min(), drawn.max()))]
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    low, high = low - margin, high + margin
    axis.set_ylim(*(np.exp((low, high)) if axis.get_yscale() == "log" else (low, high)))


def _number_epochs(axis: plt.Axes, last_step: int, steps_per_epoch: float) -> None:
    """Number the axis of steps by epochs, with the step below each."""
    epochs = plt.MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10]).tick_values(0, last_step / steps_per_epoch)
    epochs = [epoch for epoch in epochs if epoch * steps_per_epoch <= 1.02 * last_step]
    steps = [epoch * steps_per_epoch for epoch in epochs]
    axis.set_xticks(steps, [f"{epoch:g}\n{step:,.0f}" for epoch, step in zip(epochs, steps)])
    axis.annotate(
        "epoch\nstep", (0, 0), (-14, -6.5), xycoords="axes fraction", textcoords="offset points", ha="right", va="top",
        fontsize=9, color=_GREY,
    )  # fmt: skip


def _add_newest_values(axis: plt.Axes) -> None:
    """Add the newest value of each line to its name."""
    for line in axis.lines:
        if not line.get_label().startswith("_"):
            line.set_label(f"{line.get_label()} {line.get_ydata()[-1]:.4g}")


def find_best(panel: Panel, rows: Rows) -> tuple[int, float] | None:
    """Return step and value of the best evaluation: of the average where there is one, as for the best weights."""
    if panel.evaluated is None:
        return None
    steps, values = rows.series(f"ema/{panel.evaluated}", "evaluate")
    if not steps:
        steps, values = rows.series(panel.evaluated, "evaluate")
    if not steps:
        return None
    best = int(np.argmin(values) if panel.is_lowest_best else np.argmax(values))
    return steps[best], values[best]


def _mark_best(axis: plt.Axes, step: int, value: float) -> plt.Line2D:
    """Draw a ring around the best evaluation; returns it."""
    axis.axvline(step, color=_GREY, linewidth=0.9, linestyle=":", zorder=1)
    (ring,) = axis.plot(
        [step], [value], marker="o", markersize=12, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.6,
        linestyle="none", label="_best",
    )  # fmt: skip
    return ring


def _write_head(figure: plt.Figure, axis: plt.Axes, title: str, run_name: str) -> None:
    """Write the title, the run's name and, below them, the names of the lines."""
    head = figure.text(_MARGINS["left"], _HEAD_AT, title, fontsize=13, fontweight="bold", color=INK, va="center")
    short = run_name if len(run_name) <= _NAME_LENGTH else f"{run_name[: _NAME_LENGTH - 1]}…"
    axis.annotate(
        short, (1, 0.5), (9, -1), xycoords=head, textcoords="offset points", va="center", fontsize=9.5, color=_GREY,
        annotation_clip=False, parse_math=False,
    )  # fmt: skip
    count = sum(not line.get_label().startswith("_") for line in axis.lines)
    axis.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=count, borderaxespad=0.3, **_LEGEND)
