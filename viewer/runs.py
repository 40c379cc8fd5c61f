"""`/runs`: every run below the given folders, live."""

import asyncio
import functools
import itertools
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import mean
from urllib.parse import quote

from nicegui import ui
from nicegui.events import GenericEventArguments

from utils.config.recipe import flatten
from utils.errors import UserError
from utils.io.files import Json
from utils.io.safe_text import escape_controls, safe_lines
from utils.record.figures import show_cell, show_duration, show_name
from utils.record.run_index import RunIndex, RunState
from utils.record.run_reader import STATES, RunReader
from utils.record.sweep_table import sweep_table
from viewer.parts import REFRESH_SEC, Part, run_name
from viewer.queue import TRAININGS, Queue, folder_of
from viewer.site import Page

_ROOT = "data.root"  # rows are grouped by it
_LOOK_SEC = 1.0  # between two looks at the runs that are read so far


def count_digits(ends: Sequence[float] | None) -> int:
    """Return the digits after the point that a figure's 95 % interval carries: two of its half up to 35, else one."""
    width = ends[1] - ends[0] if ends else 0.0
    return max(0, math.ceil(-math.log10(width / 7.1))) if width > 0 else 4


@functools.lru_cache(maxsize=50_000)
def _read_digits(path: Path, changed: float) -> int:
    """Return the digits of a run's best figure. changed: when a file of the run did."""
    return count_digits((RunReader(path).result or {}).get("interval"))


def make_row(index: RunIndex, state: RunState) -> Json:
    """Return a run's row of the table."""
    name = run_name(index, state.path)
    digits = _read_digits(state.path, state.changed)
    shown = "" if state.best is None else f"{show_name(state.metric)} {show_cell(round(state.best, digits))}"
    row = {key: getattr(state, key) for key in ("state", "task", "model", "best", "changed", "spark")}
    row |= {"name": name, "path": str(state.path), "link": f"/run/{quote(name)}", "shown": shown}
    row["run"] = state.path.name if name.endswith("/.") else name.partition("/")[2]
    row["share"] = state.step / state.total if state.total else int(state.state == "finished")
    of = f" of {state.total:,}" if state.total else ""
    left = f", {show_duration(state.left_sec)} left" if state.left_sec else ""
    return row | {"steps": f"{state.step:,}{of}{left}"}


def read_settings(path: Path) -> dict[str, str]:
    """Return the settings of a run as texts by key."""
    with suppress(OSError, UserError):  # deleted meanwhile, or damaged
        return {key: escape_controls(show_cell(value)) for key, value in flatten(RunReader(path).config).items()}
    return {}


@functools.lru_cache(maxsize=50_000)
def _choose_settings(path: Path, changed: float, keys: Sequence[str]) -> list[str]:
    """Return the settings `keys` of a run. changed: when a file of the run did."""
    return [*map(read_settings(path).get, keys)]


def make_rows(index: RunIndex, states: list[RunState], keys: Sequence[str]) -> list[Json]:
    """Return rows with the settings `keys`, and those of a sweep's runs side by side. A sweep is one row."""
    groups = {}
    for state in states:
        groups.setdefault(state.path.parent if state.job else state.path, []).append(state)
    rows = []
    for path, jobs in groups.items():
        row = _fold(index, path, jobs) if jobs[0].job else make_row(index, jobs[0])
        values = zip(*[_choose_settings(job.path, job.changed, keys) for job in jobs])
        texts = [", ".join(filter(None, dict.fromkeys(each))) for each in values]
        rows.append(row | {"settings": dict(zip(keys, texts))})
    return rows


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
        row = {"name": name, "path": str(folder), "run": folder.name, "link": "/", "state": state, "share": 0}
        row |= {"steps": "reading the images, planning", "changed": 0, "settings": {}}
        new.append(row | {"spark": [], "shown": ""})
    return [*new, *rows]


class RunTable(Part, component="vue/runs.vue"):
    """All runs: filtered, sorted, compared, pinned."""


class RunsPage(Page):
    """All runs, live."""

    addresses = ["/runs"]

    async def show(self) -> None:
        """Show the table."""
        with self.site.page("Runs"):
            self._rows = []
            self._keys = (_ROOT,)
            self._table = RunTable(rows=[], status="reading the runs", known=[])
            self._table.on("columns", self._choose).on("list", self._list)
            ui.label(", ".join(map(str, self.site.index.roots))).classes("muted mono lines")
            ui.timer(REFRESH_SEC, self._refresh)

    async def _refresh(self) -> None:
        index = self.site.index
        reading = asyncio.ensure_future(asyncio.to_thread(index.states))
        while not (await asyncio.wait([reading], timeout=_LOOK_SEC))[0] and self._table.props["status"]:
            known = index.known()
            rows = await asyncio.to_thread(make_rows, index, known, self._keys)
            self._table.props.update(rows=rows, status=f"reading {index.total:,} runs; {len(known):,} so far")
        rows = await asyncio.to_thread(make_rows, index, await reading, self._keys)
        rows = await asyncio.to_thread(add_queued, self.site.queue, rows)
        if rows != self._rows or self._table.props["status"]:
            self._rows = rows
            self._table.props.update(rows=rows, status="")

    async def _choose(self, event: GenericEventArguments) -> None:
        """Add the columns of settings that the person has chosen; the browser keeps them."""
        self._keys = (_ROOT, *event.args)
        await self._refresh()

    async def _list(self) -> None:
        """List the settings that can be columns, those that differ first."""
        states = self.site.index.known()
        settings = await asyncio.to_thread(lambda: [read_settings(state.path) for state in states])
        keys = {key: len({each.get(key) for each in settings}) for key in itertools.chain(*settings)}
        self._table.props["known"] = sorted(keys, key=lambda key: (keys[key] == 1, key))
