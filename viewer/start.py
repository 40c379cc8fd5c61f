"""`/`, `/start`: choose a folder or drop pictures, see what is there, train on it; and the queue."""

import asyncio
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from sys import executable
from typing import Annotated, Any
from urllib.parse import quote

import numpy as np
from fastapi import HTTPException, Query, Request
from fastapi.responses import StreamingResponse
from nicegui import app, ui
from nicegui.events import GenericEventArguments

from data.collection.choose import spread
from data.layouts.names import SUFFIXES
from data.layouts.table import has_value
from data.stream.source import UnreadableImage
from data.tools.config import Check, report_folder
from utils.config.help import ROOT
from utils.errors import UserError
from utils.io.files import Json, output_errors
from utils.io.safe_text import escape_controls, safe_lines
from utils.record.run_index import is_own_run
from viewer.images import Shelf, image_address, reduce_image
from viewer.overview import has_left, summarise_run
from viewer.parts import REFRESH_SEC, Part, run_name, show_fault, show_folder, show_status
from viewer.queue import Queue, folder_of
from viewer.runs import make_row
from viewer.site import Page

_LISTED = 500  # folders in one
_LINES = 12  # of a log
_RECENT = 12  # collections, and runs
_THUMBNAILS = 6
_THUMBNAIL_PX = 160
_ONE_PLAN = asyncio.Lock()  # is worked out at a time


def keep_queue_going(queue: Queue) -> None:
    """Let the queue go on as long as the server runs, also while no page is open."""

    async def go_on() -> None:
        with suppress(UserError):  # the page says it
            await asyncio.to_thread(queue.act)

    app.timer(REFRESH_SEC, go_on)


def add_drops(queue: Queue, max_pixels: int) -> None:
    """Add the route that takes a picture of a new collection, or the text beside one, below the folder of runs."""

    @app.post("/drop")
    async def drop(request: Request, folder: str, path: str) -> Json:
        place = f"{queue.runs}/pictures/{folder}"
        file = Path(f"{place}/{path}")  # also for a path that begins with a slash
        content = await request.body()
        if not queue.may_start:
            return {"fault": "view.start: the page writes nothing; it needs view.start=true and view.host=127.0.0.1"}
        if not queue.takes(["train.py", f"data.root={file}"]):
            return {"fault": f"{escape_controls(path)}: a name begins with a point or has odd signs; rename it"}
        try:
            if not path.lower().endswith(SUFFIXES):
                await asyncio.to_thread(reduce_image, content, path, max_pixels, _THUMBNAIL_PX)
            with output_errors("runs", file):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
        except (UnreadableImage, UserError) as error:
            return {"fault": escape_controls(str(error))}
        return {"folder": place}


def add_outlook(queue: Queue) -> None:
    """Add the route that says what a training would do, by its minutes, as a dry run finds out."""

    @app.post("/outlook")
    async def outlook(words: Annotated[list[str], Query()]) -> StreamingResponse:
        if not (queue.may_start and queue.takes(words)):
            raise HTTPException(403, "the page starts nothing, or not this")
        return StreamingResponse(_foresee(queue, words), media_type="text/event-stream")  # sent as it comes


async def _foresee(queue: Queue, words: Sequence[str]) -> AsyncIterator[bytes]:
    """Yield the lines of a dry run up to its plan. It times networks, so it waits until nothing else runs."""
    async with _ONE_PLAN:
        while queue.is_busy():
            yield b"busy\n"
            await asyncio.sleep(REFRESH_SEC)
        process = await asyncio.create_subprocess_exec(executable, *words, "dry_run=true", cwd=ROOT, stderr=PIPE)
        try:
            async for line in process.stderr:
                yield line
                if line.startswith(b"the plan for "):  # all minutes are said
                    break
        finally:  # or the browser does not wait any more
            process.kill()


class Jobs(Part, component="vue/jobs.vue"):
    """The queue of commands."""


class Plans(Part, component="vue/plans.vue"):
    """What can be done with a folder."""


class Home(Part, component="vue/home.vue"):
    """A box for a folder, the folders of the computer, a place for pictures to drop, and what was last worked on."""


class StartPage(Page):
    """The first page, and the page of a folder with a card for each command. Both show the queue."""

    addresses = ["/", "/start"]

    async def show(self, folder: str = "") -> None:
        """Show what was last worked on; or what can be done with a folder."""
        queue = self.site.queue
        with self.site.page(safe_lines(Path(folder).name) or "Your pictures"):
            self._fault = show_status().classes("text-negative")
            places = [str(root) for root in queue.roots if root != ROOT]  # its folders are the program's
            self._home = Home(places=places, folder=folder, below=[], collections=[], runs=[], drops=queue.may_start)
            with self._home.on("browse", self._browse):
                self._jobs = Jobs(jobs=[]).on("act", lambda event: self._refresh(*event.args))
            if queue.may_start:
                ui.timer(REFRESH_SEC, self._refresh)
            await ui.context.client.connected()
            status = show_status("Reading the folder" if folder else "").classes("lines muted")
            with show_fault(status):
                await (self._look_into(folder, status) if folder else self._list_recent())

    async def _browse(self, event: GenericEventArguments) -> None:
        """Let the page list the folders in a folder."""
        with show_fault(self._fault, OSError):
            path = Path(event.args)
            self.site.queue.check(["train.py", f"data.root={path}"])
            below = await asyncio.to_thread(lambda: sorted(path.glob("[!.]*/"))[:_LISTED])
            names = [link.name for link in below if link.name.isprintable()]
            self._home.props.update(folder=str(path), below=names)

    async def _list_recent(self) -> None:
        """Show the collections and the runs that were last worked on."""
        shelf = self.site.shelf
        opened = [shelf.add(self.site.data.changed({"root": root})) for root in list_opened()]
        await asyncio.to_thread(shelf.of_runs)
        names = {}
        for name in [*opened, *shelf.configs]:
            names.setdefault(shelf.configs[name].root, name)
        for name in [*names.values()][:_RECENT]:
            with suppress(UserError):  # it is gone
                card = await asyncio.to_thread(describe, shelf, name)
                self._home.props["collections"] = [*self._home.props["collections"], card]
        index = self.site.index
        states = await asyncio.to_thread(index.states)
        self._home.props["runs"] = [make_row(index, state) for state in states[:_RECENT]]

    async def _refresh(self, *act: Any) -> None:
        """Show the queue, when `Queue.act` has done what a button says."""
        with show_fault(self._fault):
            self._jobs.props["jobs"] = await asyncio.to_thread(self._read_jobs, *act)
            self._fault.text = ""

    def _read_jobs(self, *act: Any) -> list[Json]:
        jobs = []
        queue = self.site.queue
        for name, words in queue.act(*act):
            folder = folder_of(words)
            lines = safe_lines("\n".join(queue.lines(name)[-_LINES:]))
            job = {"id": name, "state": queue.state(name, words), "words": words, "lines": lines}
            job["left"] = has_left(folder, words, int(name))
            if job["left"] and words[0] == "prepare.py":
                job["link"] = f"/review?run={quote(run_name(self.site.index, folder / 'labels'))}"
            if is_own_run(folder):
                job |= summarise_run(self.site.index, folder) | {"state": job["state"]}
            jobs.append(job)
        return jobs

    async def _look_into(self, root: str, status: ui.label) -> None:
        """Show what a folder has, and what can be done with it. Raises UserError for one that cannot be read."""
        shelf = self.site.shelf
        self.site.queue.check(["train.py", f"data.root={root}"])
        name = shelf.add(self.site.data.changed({"root": root}))
        collection = await asyncio.to_thread(shelf.open, name, again=True)
        status.text = "Reading every file"
        app.storage.general["folders"] = [*dict.fromkeys([root, *list_opened()])][:_RECENT]
        care = report_folder(str(self.site.queue.runs), root)
        about = describe(shelf, name) | {"care": care, "run": care.replace("/care/", "/").rpartition("-")[0]}
        Plans(about=about).on("start", lambda event: self._refresh("", "Add", event.args))
        check = Check(name="check", verify=True, report=care)
        report = await asyncio.to_thread(check.run, shelf.config(name))
        counts = report.removeprefix(f"{root}: ").rpartition("; ")[0]  # without the path of the report
        status.text = safe_lines("\n".join([counts, *collection.unused]))


def list_opened() -> list[str]:
    """Return the folders that were opened on this page, the last one first."""
    return app.storage.general.get("folders", [])


def describe(shelf: Shelf, name: str) -> Json:
    """Return the numbers and some images of a collection. Raises UserError for a collection that is not read."""
    root = shelf.config(name).root
    collection = shelf.open(name)
    rows = spread(np.arange(len(collection)), _THUMBNAILS).tolist()
    labelled, tagged = (int(has_value(collection.table[column]).sum()) for column in ("label", "tags"))
    card = {"name": name, "title": show_folder(root), "folder": root, "images": len(collection), "tagged": tagged}
    card |= {"without": len(collection) - labelled, "classes": len(collection.class_names("train"))}
    card["thumbs"] = [image_address(name, collection, row, _THUMBNAIL_PX) for row in rows]
    return card | {"findings": [finding.line for finding in sorted(collection.findings, reverse=True)]}
