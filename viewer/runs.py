"""`/`: every run below the given folders, live."""

import asyncio
import math
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from statistics import mean
from urllib.parse import quote, urlencode

import numpy as np
from nicegui import app, ui

from utils.io.files import Json
from utils.io.safe_text import escape_controls, safe_lines
from utils.record.figures import show_cell, show_duration, show_name
from utils.record.run_index import RunIndex, RunState
from utils.record.run_reader import STATES
from utils.record.sweep_table import sweep_table
from viewer.parts import ACCENT, REFRESH_SEC, STATE_COLOURS, bind_value, make_columns, run_name, sort_by_keys
from viewer.site import Site

_SPARK_PX = (96, 24)
_NAMES = {
    "state": "State", "run": "Run", "task": "Task", "model": "Model", "share": "Steps", "best": "Best",
    "spark": "Training loss", "changed": "Changed",
}  # fmt: skip
# Pinned runs stay first.
_SORT = """(rows, by, down) => rows.slice().sort((a, b) =>
    b.pinned - a.pinned || (a[by] < b[by] ? -1 : a[by] > b[by] ? 1 : 0) * (down ? -1 : 1))"""
# Each word must be found in a row.
_FIND = """(rows, words) => rows.filter(row => words.toLowerCase().split(/\\s+/).every(
    word => `${row.name} ${row.task} ${row.model} ${row.state} ${row.steps} ${row.shown} ${row.ranking}`
        .toLowerCase().includes(word)))"""
_LOOK_SEC = 1.0  # between two looks at the runs that are read so far
_STYLE = """
.runs td:nth-child(3) { overflow-wrap: anywhere; min-width: 180px }
@media (max-width: 800px) {
  .runs .q-table, .runs thead, .runs tbody { display: block }
  .runs .q-table :is(tr, th, td) { height: auto; width: auto; border: 0; padding: 4px 6px }
  .runs .q-table tr { display: flex; flex-wrap: wrap; align-items: center; border-bottom: 1px solid #868e9655 }
  .runs td:nth-child(3) { flex: 1 0 60% }
}
"""
# Quasar's templates: double braces show text, never markup.
_SLOTS = {
    "header-selection": '<q-checkbox v-model="props.selected" aria-label="all runs" />',
    "body-selection": '<q-checkbox v-model="props.selected" :aria-label="props.row.run" />',
    "state": '<q-td :props="props"><q-badge :color="props.row.colour">{{ props.row.state }}</q-badge></q-td>',
    "run": """<q-td :props="props"><q-btn flat round dense size="sm" :aria-label="'pin ' + props.row.run"
        :aria-pressed="props.row.pinned" :icon="props.row.pinned ? 'star' : 'star_border'"
        @click="$parent.$emit('pin', props.row.path)" />
        <a v-if="props.row.link" :href="props.row.link" class="text-weight-medium">{{ props.row.run }}</a>
        <details v-else class="inline-block" :open="props.expand">
        <summary @click.prevent="props.expand = !props.expand">{{ props.row.run }}</summary>
        <pre class="mono">{{ props.row.ranking }}</pre><div v-for="job in props.row.jobs"><q-badge :color="job.colour">
        {{ job.state }}</q-badge> <a :href="job.link">{{ job.run }}</a> {{ job.shown }}</div></details></q-td>""",
    "share": (
        '<q-td :props="props"><q-linear-progress :value="props.row.share" class="q-mb-xs" style="width: 110px"'
        " :aria-label=\"'steps of ' + props.row.run\" />"
        '<span class="muted">{{ props.row.steps }}</span></q-td>'
    ),
    "best": '<q-td :props="props">{{ props.row.shown }}</q-td>',
    "spark": (
        f'<q-td :props="props"><svg width="{_SPARK_PX[0]}" height="{_SPARK_PX[1]}" aria-hidden="true">'
        f'<polyline :points="props.row.spark" fill="none" stroke="{ACCENT}" stroke-width="1.5" /></svg></q-td>'
    ),
}


def make_row(index: RunIndex, state: RunState) -> Json:
    """Return a run's row of the table."""
    name = run_name(index, state.path)
    shown = "" if state.best is None else f"{show_name(state.metric)} {show_cell(round(state.best, 4))}"
    row = {key: getattr(state, key) for key in ("state", "task", "model", "best")}
    row |= {"name": name, "path": str(state.path), "link": f"/run/{quote(name)}"}
    row["run"] = state.path.name if name.endswith("/.") else name.partition("/")[2]
    row |= {"colour": STATE_COLOURS[state.state], "shown": shown, "spark": spark_points(state.spark)}
    row["changed"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(state.changed))
    return row | _progress_of(state)


def _progress_of(state: RunState) -> Json:
    """Return the share of a run's steps, and them as text."""
    share = int(state.state == "finished")
    steps = f"{state.step:,}"
    if state.total:
        share = state.step / state.total
        steps += f" of {state.total:,}"
    if state.left_sec:
        steps += f", {show_duration(state.left_sec)} left"
    return {"share": share, "steps": steps}


def make_rows(index: RunIndex, states: list[RunState], pinned: Collection[str]) -> list[Json]:
    """Return rows, those with `pinned` paths first. A sweep is one row, with its best run's figures."""
    groups = {}
    for state in states:
        groups.setdefault(state.path.parent if state.job else state.path, []).append(state)
    rows = [_fold(index, path, its) if its[0].job else make_row(index, its[0]) for path, its in groups.items()]
    for row in rows:
        row["pinned"] = row["path"] in pinned
    return sorted(rows, key=lambda row: not row["pinned"])


def _fold(index: RunIndex, path: Path, states: list[RunState]) -> Json:
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
    if not values:
        return ""
    width, height = _SPARK_PX
    across = np.linspace(0, width, len(values))
    down = np.interp(values, [min(values), max(values)], [height - 2, 2])
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down))


def add_page(site: Site) -> None:
    """Add the page of all runs."""

    @ui.page("/")
    async def show() -> None:
        with site.page("Runs"):
            with ui.row(wrap=False):
                find = ui.input(placeholder="name, task, model, state: all words must match").classes("col")
                find.props("aria-label=filter")
                compare = ui.button("Compare")
            table = ui.table(columns=make_columns(_NAMES), rows=[], row_key="name", pagination={"rowsPerPage": 50})
            table.set_selection("multiple")
            compare.bind_enabled_from(table, "selected", backward=bool)
            compare.on_click(
                lambda: ui.navigate.to(f"/compare?{urlencode([('run', row['name']) for row in table.selected])}")
            )
            table.classes("w-full runs").props("loading").props[":sort-method"] = _SORT
            table.props[":filter-method"] = _FIND
            ui.add_css(_STYLE)
            said = ui.label("reading the runs").props("role=status").classes("muted")
            said.bind_visibility_from(said, "text", backward=bool)
            sort_by_keys(table)
            for name, template in _SLOTS.items():
                table.add_slot(name if "-" in name else f"body-cell-{name}", template)
            table.add_slot(
                "no-data",
                "<div class='q-pa-md'>No run yet. <span class='mono'>make demo</span> makes some, "
                "<span class='mono'>python view.py runs=FOLDER</span> shows others.</div>",
            )
            ui.label(", ".join(map(str, site.index.roots))).classes("muted mono").style("overflow-wrap: anywhere")
            bind_value(find, "find")
            find.bind_value_to(table, "filter", forward=lambda text: text or "")

            async def refresh() -> None:
                reading = asyncio.ensure_future(asyncio.to_thread(site.index.states))
                while not (await asyncio.wait([reading], timeout=_LOOK_SEC))[0] and table.props.get("loading"):
                    known = site.index.known()
                    said.text = f"reading {site.index.total:,} runs; {len(known):,} so far"
                    table.rows = await asyncio.to_thread(make_rows, site.index, known, ())
                states = await reading
                rows = make_rows(site.index, states, app.storage.general.get("pinned", []))
                if rows != table.rows or table.props.get("loading"):
                    names = {row["name"] for row in table.selected}
                    table.rows = rows
                    table.selected = [row for row in rows if row["name"] in names]
                    table.props(remove="loading")
                    said.text = ""

            async def pin(path: str) -> None:
                pinned = {*app.storage.general.get("pinned", [])}
                app.storage.general["pinned"] = [*(pinned ^ {path})]
                await refresh()

            table.on("pin", lambda event: pin(event.args))
            ui.timer(REFRESH_SEC, refresh)
