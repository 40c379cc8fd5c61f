"""`/run/...`: one run: its curves, pictures, tables, settings and log, live."""

import asyncio
import re
from contextlib import suppress
from functools import partial
from pathlib import Path
from urllib.parse import quote, urlencode

from fastapi import HTTPException
from fastapi.responses import FileResponse
from nicegui import app, ui

from utils.config.recipe import flatten
from utils.io.safe_text import escape_controls
from utils.record.report import STEPS
from utils.record.run_index import RunIndex, find_runs, is_inside, is_own_run
from utils.record.run_reader import RunReader
from viewer.curves import show_curves
from viewer.overview import command_of, show_overview
from viewer.parts import (
    REFRESH_SEC,
    bind_choice,
    filtered_table,
    find_run,
    make_columns,
    run_name,
    show_command,
)
from viewer.results import show_mistakes, show_tables, show_thresholds
from viewer.site import Site

_LOG_LINES = 2_000
_LOG_BYTES = 200_000
_LEVELS = {0: "all", 1: "warnings and errors", 2: "errors"}
_LEVEL = re.compile(r"\d{4}-\d\d-\d\d \S+ ([A-Z]+) ")
_PICTURES = {".png", ".jpg", ".webp"}
_SEEN = "plots/samples_seen.png"
_NOTHING = "No figures yet: the first are written at the first log step."


def add_page(site: Site) -> None:
    """Add the page of a run, and the route of its pictures."""
    index = site.index

    @app.get("/picture/{name:path}")
    def picture(name: str, file: str) -> FileResponse:
        run = find_run(index, name)
        path = run / file
        with suppress(OSError, ValueError):  # NUL, or too long
            if path.suffix in _PICTURES and is_inside(path, run) and path.is_file():
                return FileResponse(path, headers={"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"})
        raise HTTPException(404, "no such picture")

    @ui.page("/run/{name:path}")
    async def show(name: str) -> None:
        path = find_run(index, name)
        curves = partial(show_curves, lambda: {"": [index.curves(path)]}, _NOTHING)
        tabs = {
            "Overview": partial(show_overview, site, name, path, curves),
            "Pictures": partial(_show_pictures, name, path),
            "Tables": partial(show_tables, path),
            "Thresholds": partial(show_thresholds, path),
        }
        tabs |= {
            "Mistakes": partial(show_mistakes, name, path, site.shelf),
            "Settings": partial(_show_settings, index, path),
            "Log": partial(_show_log, path),
        }
        panels = {}

        async def build(title: str) -> None:
            """Fill a panel when it is first shown."""
            if title in tabs:
                with panels[title]:
                    waits = ui.spinner(size="lg")
                    try:
                        await tabs.pop(title)()
                    except (OSError, ValueError, LookupError) as error:  # deleted, cut, or older
                        ui.label(escape_controls(f"A file of the run cannot be read: {error}"))
                    waits.delete()

        with site.page(escape_controls(path.name)):
            gone = ui.label(f"This run is deleted: {escape_controls(str(path))} is gone.").props("role=alert")
            gone.classes("text-negative").set_visibility(False)
            ui.timer(REFRESH_SEC, lambda: gone.set_visibility(not is_own_run(path)))
            with ui.tabs().props("align=left dense no-caps outside-arrows mobile-arrows").classes("w-full") as bar:
                for title in tabs:
                    ui.tab(title)
            with ui.tab_panels(bar, value="Overview", animated=False).classes("w-full"):
                for title in tabs:
                    panels[title] = ui.tab_panel(title).classes("q-px-none")
            bind_choice(bar, "tab", [*tabs])
            bar.on_value_change(lambda event: build(event.value))  # a tab may be chosen while the first is built
            await ui.context.client.connected()
            await build(bar.value)


def find_pictures(run: Path) -> dict[str, dict[int | None, str]]:
    """Return the paths of a run's pictures below it, by name and, of evaluations, step."""
    found = {}
    for file in sorted(file for folder in ("plots", "samples") for file in (run / folder).rglob("*")):
        if file.suffix in _PICTURES and is_inside(file, run) and file.name != "curves.png":  # they are live
            inside = file.relative_to(run).as_posix()
            if inside.startswith(f"{STEPS}/"):
                found.setdefault(f"plots/{file.name}", {})[int(file.parent.name)] = inside
            else:
                found.setdefault(inside, {})[None] = inside
    for by_step in found.values():  # the newest is also among the kept ones
        if len(by_step) > 1:
            by_step.pop(None, None)
    return found


async def _show_pictures(name: str, path: Path) -> None:
    pictures = await asyncio.to_thread(find_pictures, path)
    if _SEEN not in pictures:
        ui.label("This command draws what the network sees, augmented and with labels:").classes("muted")
        show_command([*command_of(path), "dry_run=true"])
    if not pictures:
        ui.label("No pictures yet: evaluations make them.").classes("muted")
    if "plots/samples.png" in pictures:
        ui.link("Two steps over each other, and which is better", f"/samples?run={quote(name)}")
    for title in sorted(pictures, key=lambda title: (title != _SEEN, None in pictures[title], title)):
        with ui.card().classes("w-full"):
            _show_picture(name, title, pictures[title])


def _show_picture(name: str, title: str, by_step: dict[int | None, str]) -> None:
    """Show a picture, and a slider over its steps."""
    steps = [*by_step]
    last = len(steps) - 1
    with ui.row():
        said = ui.label().classes("mono")
        if last > 0:
            slider = ui.slider(min=0, max=last, step=1, value=last).props("aria-label=step")
            slider.classes("col").style("min-width: 160px; max-width: 480px")
            slider.on_value_change(lambda event: draw(event.value))
    shown = ui.image().style("max-width: 1200px")
    shown.props["alt"] = title

    def draw(number: int) -> None:
        step = steps[number]
        said.set_text(escape_controls(title) + ("" if step is None else f", step {step}"))
        shown.set_source(f"/picture/{quote(name)}?file={quote(by_step[step])}")

    draw(last)


async def _show_settings(index: RunIndex, path: Path) -> None:
    settings = flatten(RunReader(path).config).items()
    alone = "compare with"
    names = [run_name(index, other) for other in find_runs(index.roots) if other != path]

    async def fill(table: ui.table, other: str) -> None:
        if other != alone:
            ui.navigate.to(f"/compare?{urlencode([('run', run_name(index, path)), ('run', other)])}")
        table.columns = make_columns({"key": "Key", "value": "Value"})
        table.rows = [{"key": escape_controls(key), "value": escape_controls(str(value))} for key, value in settings]

    await filtered_table([alone, *names], alone, "key", fill)


async def _show_log(path: Path) -> None:
    least = ui.toggle(_LEVELS, value=0).props("no-caps unelevated dense padding='2px 12px'")
    log = ui.log(max_lines=_LOG_LINES).classes("w-full mono").style("height: 70vh")
    read = LogReader(path / "log.txt")

    def follow() -> None:
        for level, line in read.new_lines():
            log.push(line, classes=f"level-{level}")

    follow()
    ui.timer(REFRESH_SEC, follow)
    least.on_value_change(lambda event: log.classes(remove="from-0 from-1 from-2", add=f"from-{event.value}"))


class LogReader:
    """The lines of a log with their levels (keys of _LEVELS), read as it grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._end = 0
        self._level = 0

    def new_lines(self) -> list[tuple[int, str]]:
        """Return the lines since the last call; at first, the last _LOG_LINES. A log that is gone has none."""
        try:
            with self._path.open("rb") as file:
                self._end = self._end or max(0, self._path.stat().st_size - _LOG_BYTES)
                file.seek(self._end)
                text = file.read()
        except OSError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._end += len(whole)
        lines = []
        for line in whole.decode("utf-8", errors="replace").splitlines()[-_LOG_LINES:]:
            if found := _LEVEL.match(line):  # a traceback has the level of its first line
                self._level = {"WARNING": 1, "ERROR": 2}.get(found[1], 0)
            lines.append((self._level, line))
        return lines
