"""Live curves of one run, or of several."""

import asyncio
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from nicegui import ui

from utils.io.files import Json
from utils.io.safe_text import escape_controls
from utils.record.curves import Curves, Series, thin
from utils.record.figures import GROUPS, group_of, list_curves, title_curve
from viewer.parts import COLOURS, GREY, REFRESH_SEC, TEXT

_POINTS = 2_000  # of a curve
_HIDDEN = {"lineStyle": {"opacity": 0}, "symbol": "none", "tooltip": {"show": False}, "stackStrategy": "all"}
_BAND = _HIDDEN, _HIDDEN | {"areaStyle": {"opacity": 0.2}}  # the second is stacked on the first
_MARKED = 40  # points, at most, of a curve whose points are marked


def chart_options(
    curves: dict[str, list[Curves]], figure: str, smoothing: float, *, logarithmic: bool, by_time: bool = False
) -> Json | None:
    """Return the ECharts options of a figure: training and evaluation of each group of runs; None if no run has it.

    A group has a line of its means, in a band from its least to its greatest value.

    by_time: over minutes of training, instead of steps.
    """
    lines = []
    is_alone = len(curves) == 1
    for number, (name, its) in enumerate(curves.items()):
        prefix = "" if is_alone else f"{name} "
        for kind, words in (("train", "training"), ("evaluate", "validation")):
            series = [run.series(kind, figure) for run in its]
            series = [each for each in series if np.isfinite(each[1]).any()]
            if not series:
                continue
            steps, values = join(series)
            across = its[0].minutes(steps) if by_time else steps
            is_noisy = kind == "train" and group_of(figure) == 0  # a rate and a memory are read as they are
            colour = COLOURS[(kind == "evaluate") if is_alone else number % len(COLOURS)]
            style = {"width": 2, "type": "solid" if is_alone or kind == "train" else "dashed"}
            for look, line in zip(({"lineStyle": style, "stack": ""}, *_BAND), values):
                points = to_points(*thin(across, smooth(line, smoothing if is_noisy else 0.0), _POINTS))
                lines.append(draw_line(prefix + words, colour, points) | {"stack": f"{name} {kind}"} | look)
    x_axis = {"min": "dataMin", "max": "dataMax"} | ({"name": "minutes of training"} if by_time else {})
    return plot(lines, x_axis, logarithmic=logarithmic) if lines else None


def join(series: Sequence[Series]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the steps [N] of some runs, and their means; of several runs also the least values, and the spreads.

    Between its steps a run counts by interpolation, and before and after them by its first and last value.
    """
    steps = np.unique(np.concatenate([its for its, _ in series]))
    if len(series) > 1:
        steps = steps[:: len(steps) // _POINTS + 1]  # equal ones for least values and spreads
    rows = [np.interp(steps, *each) for each in series]
    values = [reduce(rows, axis=0) for reduce in (np.mean, np.min, np.ptp)]
    return steps, values if len(rows) > 1 else rows


def to_points(across: np.ndarray, values: np.ndarray) -> list[list[float | None]]:
    """Return points for ECharts. A value that is not known leaves a gap."""
    return [[x, y if y == y else None] for x, y in zip(across.tolist(), values.tolist())]


def draw_line(name: str, colour: str, points: list[list[float | None]]) -> Json:
    """Return the ECharts options of a line; few points are marked."""
    look = {"showSymbol": len(points) <= _MARKED, "symbolSize": 6, "animation": False}
    return {"type": "line", "name": name, "color": colour, "data": points, **look}


def plot(lines: list[Json], x_axis: Json, *, logarithmic: bool = False) -> Json:
    """Return the ECharts options of lines."""
    faint = {"lineStyle": {"color": GREY, "opacity": 0.25}}
    x_usual = {"type": "value", "axisLabel": TEXT, "splitLine": {"show": False}, "nameLocation": "middle"}
    x_axis = {**x_usual, "nameGap": 24, "nameTextStyle": TEXT, **x_axis}
    y_axis = {"type": "log" if logarithmic else "value", "scale": True, "axisLabel": TEXT, "splitLine": faint}
    return {
        "grid": {"left": 56, "right": 16, "top": 36, "bottom": 40 if "name" in x_axis else 28},
        "legend": {"top": 4, "right": 8, "textStyle": TEXT, "pageTextStyle": TEXT, "itemHeight": 8, "type": "scroll"},
        "tooltip": {"trigger": "axis", "confine": True, "renderMode": "richText", "order": "valueDesc"},
        "xAxis": x_axis,
        "yAxis": y_axis,
        "series": lines,
    }


async def show_curves(read: Callable[[], dict[str, list[Curves]]], nothing: str) -> None:
    """Show a chart of each figure, and draw them anew as runs go on. read: the figures of groups of runs, by name."""
    charts = dict[str, ui.echart]()
    titles = set[int]()
    drawn = []
    with ui.row():
        smoothing = ui.slider(min=0, max=0.99, step=0.01, value=0.6).props("label aria-label=smoothing").classes("w-40")
        ui.label("smoothing").classes("muted")
        logarithmic = ui.switch("logarithmic")
        by_time = ui.switch("by time")
        empty = ui.label(nothing).classes("muted")
    grid = ui.element("div").classes("w-full charts")

    async def draw() -> None:
        curves = await asyncio.to_thread(read)
        runs = [*itertools.chain(*curves.values())]
        state = [*(run.size for run in runs), smoothing.value, logarithmic.value, by_time.value]
        if state == drawn:
            return
        drawn[:] = state
        figures = list_curves(*({name for run in runs for name in run.names(kind)} for kind in ("evaluate", "train")))
        empty.set_visibility(not figures)
        for figure in figures:
            options = chart_options(
                curves, figure, smoothing.value, logarithmic=logarithmic.value, by_time=by_time.value
            )
            if options is None:
                continue
            if figure not in charts:
                group = group_of(figure)
                with grid:
                    if group not in titles:
                        titles.add(group)
                        heading = ui.label([*GROUPS][group]).classes("text-subtitle1")
                        heading.style(f"grid-column: 1 / -1; order: {2 * group}")
                    with ui.card().style(f"order: {2 * group + 1}"):
                        ui.label(escape_controls(title_curve(figure))).classes("text-weight-medium")
                        charts[figure] = ui.echart(options).classes("chart")
            else:
                redraw(charts[figure], options)

    for control in (smoothing, logarithmic, by_time):
        control.on_value_change(draw)
    await draw()
    ui.timer(REFRESH_SEC, draw)


def redraw(chart: ui.echart, options: Json) -> None:
    """Give a chart other options."""
    if chart.options != options:
        chart.options.clear()
        chart.options.update(options)
        chart.update()


def smooth(values: np.ndarray, weight: float) -> np.ndarray:
    """Return the exponential moving average [N] without its bias at the start; weight 0: the values. NaN is skipped."""
    from scipy.signal import lfilter

    is_known = np.isfinite(values)
    total = lfilter([1], [1, -weight], np.where(is_known, values, 0.0))
    count = lfilter([1], [1, -weight], is_known.astype(float))
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
