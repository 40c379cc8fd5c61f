"""Live curves of one run or of several, and `/compare?run=...&run=...`, which overlays runs."""

from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
from fastapi import Query
from nicegui import run as background
from nicegui import ui

from utils.io.safe_text import escape_controls
from utils.record.curves import Curves, smooth, thin
from utils.record.figures import show_name
from utils.record.run_index import RunIndex
from viewer.parts import COLOURS, GREY, REFRESH_SEC, find_run, page

_POINTS = 2_000  # of a curve
_HIDDEN = {"epoch", "samples", "support", "tags", "seconds"}


def chart_options(
    curves: dict[str, Curves], figure: str, smoothing: float, *, logarithmic: bool
) -> dict[str, Any] | None:
    """Return the ECharts options of a figure: training and evaluation of each run; None if no run has it."""
    lines = []
    for number, (name, its) in enumerate(curves.items()):
        prefix = f"{name} " if len(curves) > 1 else ""
        for kind, words in (("train", "training"), ("evaluate", "validation")):
            steps, values = its.series(kind, figure)
            if not np.isfinite(values).any():
                continue
            values = smooth(values, smoothing if kind == "train" else 0.0)
            steps, values = thin(steps, values, _POINTS)
            points = [[step, value if value == value else None] for step, value in zip(steps.tolist(), values.tolist())]
            is_alone = len(curves) == 1
            colour = COLOURS[(kind == "evaluate") if is_alone else number % len(COLOURS)]
            style = {"width": 2, "type": "solid" if is_alone or kind == "train" else "dashed"}
            lines.append({
                "name": prefix + words, "type": "line", "data": points, "color": colour, "lineStyle": style,
                "showSymbol": len(points) <= 40, "symbolSize": 5, "animation": False,
            })  # fmt: skip
    if not lines:
        return None
    text, faint = {"color": GREY}, {"lineStyle": {"color": GREY, "opacity": 0.25}}
    return {
        "grid": {"left": 56, "right": 16, "top": 36, "bottom": 28},
        "legend": {"top": 4, "right": 8, "textStyle": text, "itemHeight": 8, "type": "scroll"},
        "tooltip": {"trigger": "axis", "confine": True, "renderMode": "richText", "order": "valueDesc"},
        "xAxis": {"type": "value", "min": "dataMin", "max": "dataMax", "axisLabel": text, "splitLine": {"show": False}},
        "yAxis": {
            "type": "log" if logarithmic else "value", "scale": True, "axisLabel": text, "splitLine": faint,
        },
        "series": lines,
    }  # fmt: skip


def list_figures(curves: dict[str, Curves]) -> list[str]:
    """Return the figures of some runs: the loss, those of evaluations, those of training, and the loader's."""
    evaluated = {name for its in curves.values() for name in its.names("evaluate")}
    names = evaluated | {name for its in curves.values() for name in its.names("train")}
    order = lambda name: (name != "loss", name not in evaluated, name.startswith("data/"), name)  # noqa: E731
    return sorted(names - _HIDDEN, key=order)


async def show_curves(read: Callable[[], dict[str, Curves]], nothing: str) -> None:
    """Show a chart of each figure, and draw them anew as the runs go on. read: the figures of runs, by name."""
    charts, drawn = dict[str, ui.echart](), []
    with ui.row().classes("items-center w-full"):
        smoothing = ui.slider(min=0, max=0.99, step=0.01, value=0.6).props("label aria-label=smoothing").classes("w-40")
        ui.label("smoothing").classes("muted")
        logarithmic = ui.switch("logarithmic")
        empty = ui.label(nothing).classes("muted")
    grid = ui.element("div").classes("w-full charts")

    async def draw() -> None:
        curves = await background.io_bound(read)
        state = [*(its.size for its in curves.values()), smoothing.value, logarithmic.value]
        if state == drawn:
            return
        drawn[:] = state
        figures = list_figures(curves)
        empty.set_visibility(not figures)
        for figure in figures:
            options = chart_options(curves, figure, smoothing.value, logarithmic=logarithmic.value)
            if options is None:
                continue
            if figure not in charts:
                with grid, ui.card().props("flat bordered").classes("q-pa-sm"):
                    ui.label(escape_controls(show_name(figure))).classes("text-weight-medium")
                    charts[figure] = ui.echart(options).classes("chart")
            elif charts[figure].options != options:
                charts[figure].options.clear()
                charts[figure].options.update(options)
                charts[figure].update()

    await draw()
    smoothing.on_value_change(draw)
    logarithmic.on_value_change(draw)
    ui.timer(REFRESH_SEC, draw)


def add_page(index: RunIndex) -> None:
    """Add the page that compares runs."""

    @ui.page("/compare")
    async def show(run: Annotated[list[str], Query()] = ()) -> None:
        paths = {escape_controls(name.partition("/")[2] or name): find_run(index, name) for name in run}
        with page("Compare runs"):
            await show_curves(
                lambda: {name: index.curves(path) for name, path in paths.items()},
                "No figures: mark runs in the table of runs and choose Compare.",
            )
