"""`/start`: choose a folder, see what it has, train on it; and the queue of what was started."""

import asyncio
import re
import shlex
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nicegui import app, ui

from data.collection.collection import Collection
from data.layouts.table import has_value
from data.tools.config import Check
from utils.errors import UserError
from utils.io.files import Json
from utils.io.safe_text import safe_lines
from utils.record.run_index import is_own_run
from utils.record.tables import LABELS
from viewer.parts import REFRESH_SEC, Links, Part, run_name, show_fault, show_status
from viewer.queue import Queue
from viewer.site import Page

_COMMANDS = {
    "Classify": "train.py data.root={root} loop.minutes={minutes} run_dir={run}",
    "Tag": "train.py task=tagging data.root={root} loop.minutes={minutes} run_dir={run}",
    "LoRA": "finetune_sdxl.py experiment=sdxl/lora model.path={base} data.root={root} data.trigger={trigger} "
    "loop.minutes={minutes} run_dir={run}",
    "Find wrong labels": "prepare.py job=labels data.root={root} job.report={care}",
}
_FIELDS = {  # by the word of a command that they fill
    "minutes": ("Minutes", "10"),
    "base": ("File or folder of SDXL", ""),
    "trigger": ("Words for what it learns, such as sks dog; or none", ""),
}
_LISTED = 500  # folders in one
_LINES = 4  # of a log


def keep_queue_going(queue: Queue) -> None:
    """Let the queue go on as long as the server runs, also while no page is open."""

    async def go_on() -> None:
        with suppress(UserError):  # the page says it
            await asyncio.to_thread(queue.act)

    app.timer(REFRESH_SEC, go_on)


class Jobs(Part, component="vue/jobs.vue"):
    """The queue of what was started."""


class StartPage(Page):
    """A folder, what trains on it, and the queue."""

    addresses = ["/start"]

    async def show(self, folder: str = "", browse: str = "") -> None:
        """Show the queue; and a folder, or the folders below `browse`."""
        queue = self.site.queue
        with self.site.page("Start"):
            self._fault = show_status().classes("text-negative")
            self._jobs = Jobs(jobs=[]).on("act", lambda event: self._refresh(*event.args))
            ui.timer(REFRESH_SEC, self._refresh)
            with show_fault(show_status().classes("text-negative")):
                path = Path(folder or browse or queue.roots[0])
                queue.check(["train.py", f"data.root={path}"])
                with ui.element("form").props("action=/start").classes("w-full row"):
                    typed = ui.input("Folder with images: type, paste or drop its path", value=str(path))
                    typed.props("name=folder").classes("col")
                    ui.button("Look into it").props("type=submit")
                below = await asyncio.to_thread(lambda: sorted(path.glob("[!.]*/"))[:_LISTED])
                links = (*queue.roots, path.parent, *below)
                Links(links={"/start?browse=" + quote(bytes(link)): safe_lines(str(link)) for link in links})
                if folder:
                    await self._look_into(path)

    async def _refresh(self, *act: Any) -> None:
        """Show the queue, when `Queue.act` has done what a button says."""
        with show_fault(self._fault):
            self._jobs.props["jobs"] = await asyncio.to_thread(self._read_jobs, *act)
            self._fault.text = ""

    def _read_jobs(self, *act: Any) -> list[Json]:
        jobs = []
        queue = self.site.queue
        for name, words in queue.act(*act):
            folder = Path(words[-1].split("=", 1)[1])
            link = self._find_page(folder)
            lines = safe_lines("\n".join(queue.lines(name)[-_LINES:]))
            jobs.append({"id": name, "state": queue.state(name, folder), "words": words, "lines": lines, "link": link})
        return jobs

    def _find_page(self, folder: Path) -> str:
        """Return the address of what a command has written: a run, or the labels that look wrong."""
        index = self.site.index
        if is_own_run(folder):
            return f"/run/{quote(run_name(index, folder))}"
        runs = [file.parents[1] for file in folder.glob(f"*/{LABELS}")]
        return f"/review?run={quote(run_name(index, runs[0]))}" if runs else ""

    async def _look_into(self, folder: Path) -> None:
        """Show what a folder has, and what trains on it. Raises UserError for one that cannot be read."""
        shelf = self.site.shelf
        name = shelf.add(self.site.data.changed({"root": str(folder)}))
        status = show_status("Reading the folder").classes("lines")
        await ui.context.client.connected()
        collection = await asyncio.to_thread(shelf.open, name, again=True)
        status.text = f"{len(collection):,} images; reading every file"
        with ui.row():
            ui.link("Label the images", f"/label?collection={name}")
            ui.link("Look at them", f"/collection/{name}")
        care = self.site.queue.runs / f"{_slug(folder)}-care-{name}"  # two folders may have equal names
        kinds = list_kinds(collection)
        if "Classify" not in kinds:
            ui.label("It has no labels of two classes yet: label some images, then a network can learn them.")
        self._show_command(folder, care, kinds)
        check = Check(name="check", verify=True, report=str(care))
        report = await asyncio.to_thread(check.run, shelf.config(name))
        findings = [finding.line for finding in sorted(collection.findings, reverse=True)]
        status.text = safe_lines("\n".join([report, *findings, *collection.unused]))

    def _show_command(self, folder: Path, care: Path, kinds: list[str]) -> None:
        """Show a command of a kind, and what adds it to the queue."""
        runs = self.site.queue.runs
        values = {"root": folder, "care": care, **{field: first for field, (_, first) in _FIELDS.items()}}
        inputs = {}
        words = []

        def update() -> None:
            values["run"] = runs / time.strftime(f"{_slug(folder)}-%y%m%d-%H%M%S")
            filled = [text.format(**values) for text in _COMMANDS[kind.value].split()]
            words[:] = [word for word in filled if not word.endswith("=")]
            shown.content = shlex.join(["python", *words])
            for field, box in inputs.items():
                box.set_visibility(f"{{{field}}}" in _COMMANDS[kind.value])

        with ui.row():
            kind = ui.toggle(kinds, value=kinds[-1], on_change=update)
            for field, (label, _) in _FIELDS.items():
                inputs[field] = ui.input(label).bind_value(values, field).on_value_change(update)
        shown = ui.code(language="bash")
        shown.copy_button.props("aria-label=copy")
        ui.button("Start", on_click=lambda: self._refresh("", "Add", [*words])).on_click(update)
        update()


def _slug(folder: Path) -> str:
    return re.sub(r"\W+", "_", folder.name)[:60]


def list_kinds(collection: Collection) -> list[str]:
    """Return what can be trained on a collection (keys of _COMMANDS), the best guess last."""
    kinds = ["LoRA"]
    if has_value(collection.table["tags"]).any():
        kinds.append("Tag")
    if len(collection.class_names("train")) > 1:
        kinds += ["Find wrong labels", "Classify"]
    return kinds
