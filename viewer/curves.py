"""Live curves of one run or of several, and `/compare?run=...&run=...`, which overlays runs."""

import asyncio
from collections.abc import Callable
from typing import Annotated

import numpy as np
from fastapi import HTTPException, Query
from nicegui import ui

from utils.io.files import Json
from utils.io.safe_text import escape_controls
from utils.record.curves import Curves, smooth, thin
from utils.record.figures import GROUPS, group_of, list_curves, title_curve
from utils.record.run_index import find_runs
from viewer.parts import COLOURS, GREY, REFRESH_SEC, run_name
from viewer.site import Site

_POINTS = 2_000  # of a curve
_MARKED = 40  # points, at most, of a curve whose points are marked


def chart_options(
    curves: dict[str, Curves], figure: str, smoothing: float, *, logarithmic: bool, by_time: bool = False
) -> Json | None:
    """Return the ECharts options of a figure: training and evaluation of each run; None if no run has it.

    by_time: over minutes of training, instead of steps.
    """
    lines = []
    for number, (name, its) in enumerate(curves.items()):
        prefix = f"{name} " if len(curves) > 1 else ""
        for kind, words in (("train", "training"), ("evaluate", "validation")):
            steps, values = its.series(kind, figure)
            if not np.isfinite(values).any():
                continue
            is_noisy = kind == "train" and group_of(figure) == 0  # a rate and a memory are read as they are
            values = smooth(values, smoothing if is_noisy else 0.0)
            steps, values = thin(steps, values, _POINTS)
            points = to_points(its.minutes(steps) if by_time else steps, values)
            is_alone = len(curves) == 1
            colour = COLOURS[(kind == "evaluate") if is_alone else number % len(COLOURS)]
            style = {"width": 2, "type": "solid" if is_alone or kind == "train" else "dashed"}
            lines.append(draw_line(prefix + words, colour, points) | {"lineStyle": style})
    x_axis = {"min": "dataMin", "max": "dataMax"} | ({"name": "minutes of training"} if by_time else {})
    return plot(lines, x_axis, logarithmic=logarithmic) if lines else None


def to_points(across: np.ndarray, values: np.ndarray) -> list[list[float | None]]:
    """Return points for ECharts. A value that is not known leaves a gap."""
    return [[x, y if y == y else None] for x, y in zip(across.tolist(), values.tolist())]


def draw_line(name: str, colour: str, points: list[list[float | None]]) -> Json:
    """Return the ECharts options of a line; few points are marked."""
    look = {"showSymbol": len(points) <= _MARKED, "symbolSize": 6, "animation": False}
    return {"type": "line", "name": name, "color": colour, "data": points, **look}


def plot(lines: list[Json], x_axis: Json, *, logarithmic: bool = False) -> Json:
    """Return the ECharts options of lines."""
    text = {"color": GREY}
    faint = {"lineStyle": {"color": GREY, "opacity": 0.25}}
    x_usual = {"type": "value", "axisLabel": text, "splitLine": {"show": False}, "nameLocation": "middle"}
    x_axis = {**x_usual, "nameGap": 24, "nameTextStyle": text, **x_axis}
    y_axis = {"type": "log" if logarithmic else "value", "scale": True, "axisLabel": text, "splitLine": faint}
    return {
        "grid": {"left": 56, "right": 16, "top": 36, "bottom": 40 if "name" in x_axis else 28},
        "legend": {"top": 4, "right": 8, "textStyle": text, "itemHeight": 8, "type": "scroll"},
        "tooltip": {"trigger": "axis", "confine": True, "renderMode": "richText", "order": "valueDesc"},
        "xAxis": x_axis,
        "yAxis": y_axis,
        "series": lines,
    }


def list_figures(curves: dict[str, Curves]) -> list[str]:
    """Return the figures of some runs that have a curve, in their order."""
    evaluated = {name for its in curves.values() for name in its.names("evaluate")}
    trained = {name for its in curves.values() for name in its.names("train")}
    return list_curves(evaluated, trained)


async def show_curves(read: Callable[[], dict[str, Curves]], nothing: str) -> None:
    """Show a chart of each figure, and draw them anew as the runs go on. read: the figures of runs, by name."""
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
        state = [*(its.size for its in curves.values()), smoothing.value, logarithmic.value, by_time.value]
        if state == drawn:
            return
        drawn[:] = state
        figures = list_figures(curves)
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

    await draw()
    for control in (smoothing, logarithmic, by_time):
        control.on_value_change(draw)
    ui.timer(REFRESH_SEC, draw)


def redraw(chart: ui.echart, options: Json) -> None:
    """Give a chart other options."""
    if chart.options != options:
        chart.options.clear()
        chart.options.update(options)
        chart.update()


def add_page(site: Site) -> None:
    """Add the page that compares runs: those that are named, and all in a folder of runs, such as a sweep."""

    index = site.index

    @ui.page("/compare")
    async def show(run: Annotated[list[str], Query()] = ()) -> None:
        wanted = tuple(f"{name.rstrip('/')}/" for name in run)
        every = await asyncio.to_thread(lambda: {run_name(index, path): path for path in find_runs(index.roots)})
        named = {name: path for name, path in every.items() if f"{name}/".startswith(wanted)}
        if wanted and not named:
            raise HTTPException(404, "no such run")
        with site.page("Compare runs"):
            await show_curves(
                lambda: {escape_controls(name): index.curves(path) for name, path in named.items()},
                "No figures: mark runs in the table of runs and choose Compare.",
            )
