"""Live curves of one run, or of several."""

import asyncio
import itertools
from collections.abc import Callable, Sequence

import nicegui.elements.echart  # noqa: F401 (vue/chart.vue imports what it registers)
import numpy as np
from nicegui import ui

from utils.io.files import Json
from utils.io.safe_text import escape_controls
from utils.record.curves import Curves, Series, thin
from utils.record.figures import GROUPS, group_of, list_curves, title_curve
from viewer.parts import COLOURS, REFRESH_SEC, Part

Groups = dict[str, list[Curves]]  # runs that are shown as one, by a name
_POINTS = 2_000  # of a curve
_KINDS = ("train", "evaluate")


class Chart(Part, component="vue/chart.vue"):
    """A chart by ECharts. Other components contain it."""


class LineChart(Part, component="vue/lines.vue"):
    """Lines in one chart. Other components contain it."""


class CurveCharts(Part, component="vue/curves.vue"):
    """A chart of each figure."""


def read_figures(groups: Groups) -> list[Json]:
    """Return what vue/curves.vue shows of runs."""
    names = [{name for run in itertools.chain(*groups.values()) for name in run.names(kind)} for kind in _KINDS]
    figures = []
    for name in list_curves(names[1], names[0]):
        group = group_of(name)
        lines = []  # training and evaluation of each group that has the figure
        for (number, (run, runs)), kind in itertools.product(enumerate(groups.items()), _KINDS):
            known = [one for one in [each.series(kind, name) for each in runs] if np.isfinite(one[1]).any()]
            if known:
                steps, values = join(known)
                across = {"steps": steps.tolist(), "minutes": runs[0].minutes(steps).tolist()}
                values = [row.tolist() for row in values]
                lines.append({"run": run, "number": number, "kind": kind, "values": values, **across})
        texts = {"title": escape_controls(title_curve(name)), "group": [*GROUPS][group]}
        if lines:
            figures.append({**texts, "smooth": group == 0, "lines": lines})  # a rate and a memory are read as they are
    return figures


def join(series: Sequence[Series]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the steps [N] of some runs, and their means; of several runs also the least values, and the spreads.

    Between its steps a run counts by interpolation, and before and after them by its first and last value.
    """
    if len(series) == 1:
        steps, values = thin(*series[0], _POINTS)
        return steps, [values]
    steps = np.unique(np.concatenate([steps for steps, _ in series]))
    steps = steps[:: len(steps) // _POINTS + 1]
    rows = [np.interp(steps, *run) for run in series]
    return steps, [reduce(rows, axis=0) for reduce in (np.mean, np.min, np.ptp)]


async def show_curves(read: Callable[[], Groups], nothing: str) -> None:
    """Show a chart of each figure, and update them while runs go on.

    read: returns the runs; nothing: the text without figures.
    """
    charts = CurveCharts(figures=[], colours=COLOURS, alone=True, nothing=nothing)
    sizes = []

    async def draw() -> None:
        groups = await asyncio.to_thread(read)
        new = [run.size for run in itertools.chain(*groups.values())]
        if new != sizes:
            sizes[:] = new
            charts.props.update(alone=len(groups) == 1, figures=await asyncio.to_thread(read_figures, groups))

    await draw()
    ui.timer(REFRESH_SEC, draw)
