"""`/`: every run below the given folders, live."""

from typing import Any
from urllib.parse import quote, urlencode

from nicegui import run as background
from nicegui import ui

from utils.record.figures import show_cell, show_duration, show_name
from utils.record.run_index import RunIndex, RunState
from viewer.parts import ACCENT, REFRESH_SEC, STATE_COLOURS, ago, page, run_name

_SPARK_PX = (96, 24)
_COLUMNS = [
    {"name": "state", "label": "State", "field": "state", "align": "left", "sortable": True},
    {"name": "run", "label": "Run", "field": "run", "align": "left", "sortable": True},
    {"name": "task", "label": "Task", "field": "task", "align": "left", "sortable": True},
    {"name": "model", "label": "Model", "field": "model", "align": "left", "sortable": True},
    {"name": "progress", "label": "Steps", "field": "share", "align": "left", "sortable": True},
    {"name": "best", "label": "Best", "field": "best", "align": "left", "sortable": True},
    {"name": "loss", "label": "Training loss", "field": "spark", "align": "left"},
    {"name": "changed", "label": "Changed", "field": "changed", "align": "left", "sortable": True},
]
# Quasar's templates: double braces show text, never markup.
_SLOTS = {
    "state": '<q-td :props="props"><q-badge :color="props.row.colour">{{ props.row.state }}</q-badge></q-td>',
    "run": '<q-td :props="props"><a :href="props.row.link" class="text-weight-medium">{{ props.row.run }}</a></q-td>',
    "progress": (
        '<q-td :props="props"><q-linear-progress :value="props.row.share" class="q-mb-xs" style="width: 110px" />'
        '<span class="muted">{{ props.row.steps }}</span></q-td>'
    ),
    "best": '<q-td :props="props">{{ props.row.shown }}</q-td>',
    "loss": (
        f'<q-td :props="props"><svg width="{_SPARK_PX[0]}" height="{_SPARK_PX[1]}" aria-hidden="true">'
        f'<polyline :points="props.row.spark" fill="none" stroke="{ACCENT}" stroke-width="1.5" /></svg></q-td>'
    ),
    "changed": '<q-td :props="props">{{ props.row.ago }}</q-td>',
}


def make_row(index: RunIndex, state: RunState) -> dict[str, Any]:
    """Return a run's row of the table."""
    name, total = run_name(index, state.path), state.total
    shown = "" if state.best is None else f"{show_name(state.metric)} {show_cell(round(state.best, 4))}"
    return {
        "name": name,
        "run": name.partition("/")[2] or state.path.name,
        "link": f"/run/{quote(name)}",
        "state": state.state,
        "colour": STATE_COLOURS.get(state.state, "warning"),
        "task": state.task,
        "model": state.model,
        "share": state.step / total if total else 0,
        "steps": f"{state.step:,}"
        + (f" of {total:,}" if total else "")
        + (f", {show_duration(state.left_sec)} left" if state.left_sec else ""),
        "best": state.best,
        "shown": shown,
        "spark": spark_points(state.spark),
        "changed": state.changed,
        "ago": ago(state.changed),
    }


def spark_points(values: tuple[float, ...]) -> str:
    """Return the points of a curve in an SVG of _SPARK_PX."""
    if len(values) < 2:
        return ""
    width, height = _SPARK_PX
    low, high = min(values), max(values)
    scale = (height - 4) / (high - low or 1.0)
    step = width / (len(values) - 1)
    return " ".join(f"{number * step:.1f},{2 + (high - value) * scale:.1f}" for number, value in enumerate(values))


def add_page(index: RunIndex) -> None:
    """Add the page of all runs."""

    @ui.page("/")
    async def show() -> None:
        with page("Runs"):
            with ui.row().classes("items-center no-wrap w-full"):
                find = ui.input(placeholder="filter by name, task, model or state").props("clearable dense outlined")
                find.classes("col").props("aria-label='filter'")
                compare = ui.button("Compare").props("no-caps unelevated")
            table = ui.table(columns=_COLUMNS, rows=[], row_key="name", pagination={"rowsPerPage": 50})
            table.set_selection("multiple")
            compare.bind_enabled_from(table, "selected", backward=lambda rows: len(rows) > 1)
            compare.on_click(
                lambda: ui.navigate.to(f"/compare?{urlencode([('run', row['name']) for row in table.selected])}")
            )
            table.classes("w-full").props("flat bordered")
            for name, template in _SLOTS.items():
                table.add_slot(f"body-cell-{name}", template)
            roots = ", ".join(map(str, index.roots))
            table.add_slot(
                "no-data",
                "<div class='q-pa-md'>No run yet. <span class='mono'>make demo</span> makes some, "
                "<span class='mono'>python view.py runs=FOLDER</span> shows others.</div>",
            )
            ui.label(roots).classes("muted mono")
            find.bind_value_to(table, "filter", forward=lambda text: text or "")

            async def refresh() -> None:
                states = await background.io_bound(index.states)
                rows = [make_row(index, state) for state in states]
                if rows != table.rows:
                    table.rows = rows

            await refresh()
            ui.timer(REFRESH_SEC, refresh)
