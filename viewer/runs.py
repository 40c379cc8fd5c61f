"""`/`: every run below the given folders, live."""

import asyncio
import math
import time
from collections.abc import Collection
from pathlib import Path
from statistics import mean
from urllib.parse import quote

from nicegui import app, ui
from nicegui.events import GenericEventArguments

from utils.io.files import Json
from utils.io.safe_text import escape_controls, safe_lines
from utils.record.figures import show_cell, show_duration, show_name
from utils.record.run_index import RunIndex, RunState
from utils.record.run_reader import STATES
from utils.record.sweep_table import sweep_table
from viewer.parts import REFRESH_SEC, STATE_COLOURS, Part, make_columns, run_name
from viewer.queue import TRAININGS, Queue, folder_of
from viewer.site import Page

_NAMES = {
    "state": "State", "run": "Run", "task": "Task", "model": "Model", "share": "Steps", "best": "Best",
    "spark": "Training loss", "changed": "Changed",
}  # fmt: skip
_LOOK_SEC = 1.0  # between two looks at the runs that are read so far


def make_row(index: RunIndex, state: RunState) -> Json:
    """Return a run's row of the table."""
    name = run_name(index, state.path)
    shown = "" if state.best is None else f"{show_name(state.metric)} {show_cell(round(state.best, 4))}"
    row = {key: getattr(state, key) for key in ("state", "task", "model", "best")}
    row |= {"name": name, "path": str(state.path), "link": f"/run/{quote(name)}"}
    row["run"] = state.path.name if name.endswith("/.") else name.partition("/")[2]
    row |= {"colour": STATE_COLOURS[state.state], "shown": shown, "spark": state.spark}
    row["changed"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(state.changed))
    row["share"] = state.step / state.total if state.total else int(state.state == "finished")
    of = f" of {state.total:,}" if state.total else ""
    left = f", {show_duration(state.left_sec)} left" if state.left_sec else ""
    return row | {"steps": f"{state.step:,}{of}{left}"}


def make_rows(index: RunIndex, states: list[RunState], pinned: Collection[str]) -> list[Json]:
    """Return rows; rows with a `pinned` path come first. A sweep is one row, with the figures of the best run."""
    groups = {}
    for state in states:
        groups.setdefault(state.path.parent if state.job else state.path, []).append(state)
    rows = [_fold(index, path, jobs) if jobs[0].job else make_row(index, jobs[0]) for path, jobs in groups.items()]
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
    first = make_row(index, ranked[0]._replace(path=path, state=state, changed=max(state.changed for state in states)))
    return first | {"link": "", "jobs": jobs, "ranking": ranking, "share": share, "steps": steps}


def add_queued(queue: Queue, rows: list[Json]) -> list[Json]:
    """Return rows with the runs that the page has started: they wait, read or plan, and have no folder yet."""
    known = {row["path"]: row for row in rows}
    new = []
    for name, words in queue.entries():
        state = queue.state(name, words)
        if words[0] not in TRAININGS or state not in ("waiting", "running"):
            continue
        folder = folder_of(words)
        state = "starting" if state == "running" else state
        if row := known.get(str(folder)):
            row["state"] = row["state"] if row["state"] == "running" else state
            continue
        row = {"name": name, "path": str(folder), "run": folder.name, "link": "/start", "state": state, "share": 0}
        row |= {"colour": "primary", "steps": "reading the images, planning", "changed": "now", "pinned": False}
        new.append(row | {"spark": [], "shown": ""})
    return [*new, *rows]


class RunTable(Part, component="vue/runs.vue"):
    """All runs: filtered, sorted, compared, pinned."""


class RunsPage(Page):
    """All runs, live."""

    addresses = ["/"]

    async def show(self) -> None:
        """Show the table."""
        with self.site.page("Runs"):
            self._rows = []
            self._table = RunTable(rows=[], columns=make_columns(_NAMES), status="reading the runs")
            self._table.on("pin", self._pin)
            ui.label(", ".join(map(str, self.site.index.roots))).classes("muted mono lines")
            ui.timer(REFRESH_SEC, self._refresh)

    async def _refresh(self) -> None:
        index = self.site.index
        reading = asyncio.ensure_future(asyncio.to_thread(index.states))
        while not (await asyncio.wait([reading], timeout=_LOOK_SEC))[0] and self._table.props["status"]:
            known = index.known()
            rows = await asyncio.to_thread(make_rows, index, known, ())
            self._table.props.update(rows=rows, status=f"reading {index.total:,} runs; {len(known):,} so far")
        rows = make_rows(index, await reading, app.storage.general.get("pinned", []))
        rows = await asyncio.to_thread(add_queued, self.site.queue, rows)
        if rows != self._rows or self._table.props["status"]:
            self._rows = rows
            self._table.props.update(rows=rows, status="")

    async def _pin(self, event: GenericEventArguments) -> None:
        app.storage.general["pinned"] = [*({*app.storage.general.get("pinned", [])} ^ {event.args})]
        await self._refresh()
