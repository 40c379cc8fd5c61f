"""`/run/...`: one run: its curves, pictures, tables, settings and log, live."""

import asyncio
import os
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from fastapi import HTTPException
from fastapi.responses import FileResponse
from nicegui import app, ui

from utils.config.recipe import flatten
from utils.io.safe_text import escape_controls
from utils.record.report import STEPS
from utils.record.run_index import RunIndex, is_inside, is_own_run
from utils.record.run_reader import RunReader
from viewer.overview import Overview, command_of
from viewer.parts import REFRESH_SEC, UNLABELLED, Part, Sheet, bind_choice, find_run, show_command
from viewer.results import Mistakes, Tables
from viewer.site import Page, RunTab

_LOG_BYTES = 100_000  # from its end
_PICTURES = {".png", ".jpg", ".webp"}
_SEEN = "plots/samples_seen.png"


def add_pictures(index: RunIndex) -> None:
    """Add the route of the pictures and exports of runs."""

    @app.get("/picture/{name:path}")
    def picture(name: str, file: str) -> FileResponse:
        run = find_run(index, name)
        path = run / file
        with suppress(OSError, ValueError):  # NUL, or too long
            is_shown = path.suffix in _PICTURES and is_inside(path, run) or is_inside(path, run / "export")
            if is_shown and path.is_file():  # an attachment: a page among a stranger's exports is not opened here
                return FileResponse(path, filename=path.name, headers={"Cache-Control": "no-cache"})
        raise HTTPException(404, "no such picture")


class RunPage(Page):
    """One run. A tab is built when it is first shown."""

    addresses = ["/run/{name:path}"]

    async def show(self, name: str) -> None:
        """Show a run's tabs."""
        self._path = find_run(self.site.index, name)
        self._tabs = {title: kind(self.site, name, self._path) for title, kind in TABS.items()}
        with suppress(OSError, OverflowError, ValueError):  # an odd run: its tabs say so
            if self.site.index.read(self._path).task in UNLABELLED:
                del self._tabs["Mistakes"]
        self._panels = {}
        with self.site.page(escape_controls(self._path.name)):
            gone = ui.label(f"This run is deleted: {escape_controls(str(self._path))} is gone.").props("role=alert")
            gone.classes("text-negative").set_visibility(False)
            ui.timer(REFRESH_SEC, lambda: gone.set_visibility(not is_own_run(self._path)))
            with ui.tabs().props("align=left dense no-caps outside-arrows mobile-arrows").classes("w-full") as bar:
                for title in self._tabs:
                    ui.tab(title)
            with ui.tab_panels(bar, value="Overview", animated=False).classes("w-full"):
                for title in self._tabs:
                    self._panels[title] = ui.tab_panel(title)
            bind_choice(bar, "tab", self._panels)
            bar.on_value_change(lambda event: self._build(event.value))  # also while the first one is built
            await ui.context.client.connected()
            await self._build(bar.value)

    async def _build(self, title: str) -> None:
        if title in self._tabs:
            with self._panels[title]:
                waits = ui.spinner(size="lg")
                try:
                    await self._tabs.pop(title).show()
                except (OSError, ValueError, LookupError) as error:  # deleted, cut, or older
                    ui.label(escape_controls(f"A file of the run cannot be read: {error}"))
                waits.delete()


def find_pictures(run: Path) -> dict[str, dict[int | None, str]]:
    """Return the paths of a run's pictures below it, by name and, of evaluations, step."""
    pictures = {}
    for file in sorted(file for folder in ("plots", "samples") for file in (run / folder).rglob("*")):
        if file.suffix in _PICTURES and is_inside(file, run) and file.name != "curves.png":  # they are live
            inside = file.relative_to(run).as_posix()
            if inside.startswith(f"{STEPS}/"):
                pictures.setdefault(f"plots/{file.name}", {})[int(file.parent.name)] = inside
            else:
                pictures.setdefault(inside, {})[None] = inside
    for by_step in pictures.values():  # the newest picture has a copy with its step
        if len(by_step) > 1:
            by_step.pop(None, None)
    return pictures


class Steps(Part, component="vue/steps.vue"):
    """A picture, with a slider over its steps."""


class Pictures(RunTab):
    """A run's pictures, with a slider over the steps of its evaluations."""

    async def show(self) -> None:
        """Show the pictures, what the network sees first."""
        pictures = await asyncio.to_thread(find_pictures, self.path)
        if _SEEN not in pictures:
            ui.label("This command draws what the network sees, augmented and with labels:").classes("muted")
            show_command([*command_of(self.path), "dry_run=true"])
        if not pictures:
            ui.label("No pictures yet: evaluations make them.").classes("muted")
        if "plots/samples.png" in pictures:
            ui.link("Two steps over each other", f"/samples?run={quote(self.name)}")
        for title in sorted(pictures, key=lambda title: (title != _SEEN, None in pictures[title], title)):
            with ui.card().classes("w-full"):
                Steps(
                    title=escape_controls(title),
                    pictures=[
                        {"step": step, "src": f"/picture/{quote(self.name)}?file={quote(file)}"}
                        for step, file in pictures[title].items()
                    ],
                )


class Settings(RunTab):
    """A run's settings."""

    async def show(self) -> None:
        """Show the settings."""
        settings = flatten(RunReader(self.path).config).items()
        rows = [{"key": escape_controls(key), "value": escape_controls(str(value))} for key, value in settings]
        await Sheet("settings", ["settings"], "key", lambda _: ({"key": "Key", "value": "Value"}, rows)).fill()


class LogLines(Part, component="vue/log.vue"):
    """The end of a log, by level."""


class Log(RunTab):
    """A run's log by level, live."""

    async def show(self) -> None:
        """Show the log."""
        self._lines = LogLines(text="")
        self._follow()
        ui.timer(REFRESH_SEC, self._follow)

    def _follow(self) -> None:
        with suppress(OSError), (self.path / "log.txt").open("rb") as file:  # deleted meanwhile, which the page says
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_BYTES))
            text = file.read().decode(errors="replace")
            if text != self._lines.props["text"]:
                self._lines.props["text"] = text


TABS = {
    "Overview": Overview, "Pictures": Pictures, "Tables": Tables, "Mistakes": Mistakes, "Settings": Settings,
    "Log": Log,
}  # fmt: skip
