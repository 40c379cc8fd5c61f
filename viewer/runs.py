"""`/`: every run below the given folders, live."""

import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any
from urllib.parse import quote, urlencode

from nicegui import app, ui
from nicegui import run as background

from utils.io.safe_text import escape_controls, safe_lines
from utils.record.figures import show_cell, show_duration, show_name
from utils.record.run_index import RunIndex, RunState
from utils.record.run_reader import STATES
from utils.record.sweep_table import sweep_table
from viewer.parts import ACCENT, REFRESH_SEC, STATE_COLOURS, ago, run_name
from viewer.site import Site

_SPARK_PX = (96, 24)
_NAMES = {
    "state": "State", "run": "Run", "task": "Task", "model": "Model", "share": "Steps", "best": "Best",
    "spark": "Training loss", "changed": "Changed",
}  # fmt: skip
_COLUMNS = [
    {"name": name, "label": label, "field": name, "align": "left", "sortable": name != "spark"}
    for name, label in _NAMES.items()
]
# Pinned runs stay first.
_SORT = """(rows, by, down) => rows.slice().sort((a, b) =>
    b.pinned - a.pinned || (a[by] < b[by] ? -1 : a[by] > b[by] ? 1 : 0) * (down ? -1 : 1))"""
# Quasar's templates: double braces show text, never markup.
_SLOTS = {
    "state": '<q-td :props="props"><q-badge :color="props.row.colour">{{ props.row.state }}</q-badge></q-td>',
    "run": """<q-td :props="props"><q-btn flat round dense size="sm" :aria-label="'pin ' + props.row.run"
        :aria-pressed="props.row.pinned" :icon="props.row.pinned ? 'star' : 'star_border'"
        @click="$parent.$emit('toggle', ['pinned', props.row.path])" />
        <a v-if="props.row.link" :href="props.row.link" class="text-weight-medium">{{ props.row.run }}</a>
        <details v-else class="inline-block" :open="props.row.unfolded">
        <summary @click.prevent="$parent.$emit('toggle', ['unfolded', props.row.path])">{{ props.row.run }}</summary>
        <pre class="mono">{{ props.row.ranking }}</pre><div v-for="job in props.row.jobs"><q-badge :color="job.colour">
        {{ job.state }}</q-badge> <a :href="job.link">{{ job.run }}</a> {{ job.shown }}</div></details></q-td>""",
    "share": (
        '<q-td :props="props"><q-linear-progress :value="props.row.share" class="q-mb-xs" style="width: 110px" />'
        '<span class="muted">{{ props.row.steps }}</span></q-td>'
    ),
    "best": '<q-td :props="props">{{ props.row.shown }}</q-td>',
    "spark": (
        f'<q-td :props="props"><svg width="{_SPARK_PX[0]}" height="{_SPARK_PX[1]}" aria-hidden="true">'
        f'<polyline :points="props.row.spark" fill="none" stroke="{ACCENT}" stroke-width="1.5" /></svg></q-td>'
    ),
    "changed": '<q-td :props="props">{{ props.row.ago }}</q-td>',
}


def make_row(index: RunIndex, state: RunState) -> dict[str, Any]:
    """Return a run's row of the table."""
    name = run_name(index, state.path)
    shown = "" if state.best is None else f"{show_name(state.metric)} {show_cell(round(state.best, 4))}"
    row = {key: getattr(state, key) for key in ("state", "task", "model", "best", "changed")}
    row |= {"name": name, "path": str(state.path), "link": f"/run/{quote(name)}", "jobs": [name]}
    row["run"] = state.path.name if name.endswith("/.") else name.partition("/")[2]
    row |= {"colour": STATE_COLOURS[state.state], "shown": shown, "spark": spark_points(state.spark)}
    return row | _progress_of(state) | {"ago": ago(state.changed)}


def _progress_of(state: RunState) -> dict[str, Any]:
    """Return the share of a run's steps, and them as text."""
    share = int(state.state == "finished")
    steps = f"{state.step:,}"
    if state.total:
        share = state.step / state.total
        steps += f" of {state.total:,}"
    if state.left_sec:
        steps += f", {show_duration(state.left_sec)} left"
    return {"share": share, "steps": steps}


def make_rows(index: RunIndex, states: list[RunState], **marked: Collection[str]) -> list[dict[str, Any]]:
    """Return rows, `pinned` ones first. A sweep is one row, with its best run's figures. marked: paths, by mark."""
    groups: dict[Path, list[RunState]] = {}
    for state in states:
        groups.setdefault(state.path.parent if state.job else state.path, []).append(state)
    rows = [_fold(index, path, its) if its[0].job else make_row(index, its[0]) for path, its in groups.items()]
    rows = [row | {name: row["path"] in paths for name, paths in marked.items()} for row in rows]
    return sorted(rows, key=lambda row: not row["pinned"])


def _fold(index: RunIndex, path: Path, states: list[RunState]) -> dict[str, Any]:
    sign = 1 if any(state.job.result["is_lowest_best"] for state in states if state.job.result) else -1
    ranked = sorted(states, key=lambda state: math.inf if state.best is None else sign * state.best)
    jobs = [{**make_row(index, state), "run": escape_controls(state.path.name)} for state in ranked]
    state = min((job["state"] for job in jobs), key=STATES.index)
    share = mean(job["share"] for job in jobs)
    steps = f"{sum(job['state'] == 'finished' for job in jobs)} of {len(jobs)} runs"
    ranking = safe_lines(sweep_table([state.job for state in states]))
    first = make_row(index, replace(ranked[0], path=path, state=state, changed=max(each.changed for each in states)))
    return first | {"link": "", "jobs": jobs, "ranking": ranking, "share": share, "steps": steps}


def spark_points(values: tuple[float, ...]) -> str:
    """Return the points of a curve in an SVG of _SPARK_PX."""
    if len(values) < 2:
        return ""
    width, height = _SPARK_PX
    high = max(values)
    scale = (height - 4) / (high - min(values) or 1.0)
    step = width / (len(values) - 1)
    return " ".join(f"{number * step:.1f},{2 + (high - value) * scale:.1f}" for number, value in enumerate(values))


def add_page(site: Site) -> None:
    """Add the page of all runs."""

    @ui.page("/")
    async def show() -> None:
        with site.page("Runs"):
            with ui.row().classes("items-center no-wrap w-full"):
                find = ui.input(placeholder="filter by name, task, model or state").props("clearable dense outlined")
                find.classes("col").props("aria-label='filter'")
                compare = ui.button("Compare").props("no-caps unelevated")
            table = ui.table(columns=_COLUMNS, rows=[], row_key="name", pagination={"rowsPerPage": 50})
            table.set_selection("multiple")
            compare.bind_enabled_from(table, "selected", backward=lambda its: sum(len(row["jobs"]) for row in its) > 1)
            compare.on_click(
                lambda: ui.navigate.to(f"/compare?{urlencode([('run', row['name']) for row in table.selected])}")
            )
            table.classes("w-full").props("flat bordered loading").props[":sort-method"] = _SORT
            for name, template in _SLOTS.items():
                table.add_slot(f"body-cell-{name}", template)
            table.add_slot(
                "no-data",
                "<div class='q-pa-md'>No run yet. <span class='mono'>make demo</span> makes some, "
                "<span class='mono'>python view.py runs=FOLDER</span> shows others.</div>",
            )
            ui.label(", ".join(map(str, site.index.roots))).classes("muted mono")
            find.bind_value_to(table, "filter", forward=lambda text: text or "")

            async def refresh() -> None:
                marked = {name: app.storage.general.get(name, []) for name in ("pinned", "unfolded")}
                rows = make_rows(site.index, await background.io_bound(site.index.states), **marked)
                if rows != table.rows or table.props.get("loading"):
                    names = {row["name"] for row in table.selected}
                    table.rows = rows
                    table.selected = [row for row in rows if row["name"] in names]
                    table.props(remove="loading")

            async def toggle(name: str, path: str) -> None:
                kept = app.storage.general.get(name, [])
                app.storage.general[name] = [other for other in kept if other != path] + [path] * (path not in kept)
                await refresh()

            table.on("toggle", lambda event: toggle(*event.args))
            ui.timer(0, lambda: find.bind_value(app.storage.tab, "filter"), once=True)
            ui.timer(REFRESH_SEC, refresh)
