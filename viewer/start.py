"""`/start`: choose a folder, see what it has, train on it; and the queue of what was started."""

import asyncio
import re
from collections.abc import Mapping
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
from utils.io.safe_text import escape_controls, safe_lines
from utils.record.figures import show_best
from utils.record.run_index import is_own_run
from utils.record.run_reader import RunReader
from utils.record.tables import LABELS
from viewer.parts import REFRESH_SEC, Links, Part, run_name, show_fault, show_status
from viewer.queue import Queue, folder_of
from viewer.runs import make_row
from viewer.site import Page

# Words of a command; vue/plans.vue fills {minutes}, {base}, {trigger} and the time in {run}.
_COMMANDS = {
    "Train": "train.py data.root={root} loop.minutes={minutes} run_dir={run}",
    "Train a tagger": "train.py task=tagging data.root={root} loop.minutes={minutes} run_dir={run}",
    "Find wrong labels": "prepare.py job=labels data.root={root} job.report={care}",
    "Teach SDXL your pictures": "finetune_sdxl.py experiment=sdxl/lora model.path={base} data.root={root} "
    "data.trigger={trigger} loop.minutes={minutes} run_dir={run}",
}
_LISTED = 500  # folders in one
_LINES = 12  # of a log


def keep_queue_going(queue: Queue) -> None:
    """Let the queue go on as long as the server runs, also while no page is open."""

    async def go_on() -> None:
        with suppress(UserError):  # the page says it
            await asyncio.to_thread(queue.act)

    app.timer(REFRESH_SEC, go_on)


class Jobs(Part, component="vue/jobs.vue"):
    """The queue of what was started."""


class Plans(Part, component="vue/plans.vue"):
    """What can be done with a folder."""


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
                path = Path(folder or browse or queue.roots[-1])
                queue.check(["train.py", f"data.root={path}"])
                with ui.element("form").props("action=/start").classes("w-full row"):
                    typed = ui.input("Folder with images: type, paste or drop its path", value=str(path))
                    typed.props("name=folder").classes("col")
                    ui.button("Open").props("type=submit outline")
                below = await asyncio.to_thread(lambda: sorted(path.glob("[!.]*/"))[:_LISTED])
                links = {"other folders": path.parent}
                if not folder:
                    links = {safe_lines(str(link)): link for link in (*queue.roots, path.parent)}
                    links |= {safe_lines(f"{link.name}/"): link for link in below}
                Links(links={"/start?browse=" + quote(bytes(link)): text for text, link in links.items()})
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
            folder = folder_of(words)
            job = {
                "id": name,
                "state": queue.state(name, words),
                "words": words,
                "link": self._find_page(folder, name),
            }
            job["lines"] = safe_lines("\n".join(queue.lines(name)[-_LINES:]))
            if is_own_run(folder):
                job |= make_row(self.site.index, self.site.index.read(folder)) | {"state": job["state"]}
                job["best"] = escape_controls(show_best(RunReader(folder).result or {})) or job["shown"]
            jobs.append(job)
        return jobs

    def _find_page(self, folder: Path, name: str) -> str:
        """Return the address of what a command has written: a run, or the labels that look wrong."""
        index = self.site.index
        if is_own_run(folder):
            return f"/run/{quote(run_name(index, folder))}"
        files = [file for file in folder.glob(f"*/{LABELS}") if file.stat().st_mtime_ns > int(name)]
        return f"/review?run={quote(run_name(index, files[0].parents[1]))}" if files else ""

    async def _look_into(self, folder: Path) -> None:
        """Show what a folder has, and what can be done with it. Raises UserError for one that cannot be read."""
        shelf = self.site.shelf
        name = shelf.add(self.site.data.changed({"root": str(folder)}))
        status = show_status("Reading the folder").classes("lines")
        await ui.context.client.connected()
        collection = await asyncio.to_thread(shelf.open, name, again=True)
        status.text = "Reading every file"
        slug = re.sub(r"\W+", "_", folder.name)[:60]
        runs = self.site.queue.runs
        # Two folders may have equal names.
        values = {"root": str(folder), "care": f"{runs}/{slug}-care-{name}", "run": f"{runs}/{slug}-{{time}}"}
        plans = list_plans(collection, name, values)
        Plans(plans=plans).on("start", lambda event: self._refresh("", "Add", event.args))
        check = Check(name="check", verify=True, report=values["care"])
        report = await asyncio.to_thread(check.run, shelf.config(name))
        findings = [finding.line for finding in sorted(collection.findings, reverse=True)]
        status.text = safe_lines("\n".join([report, *findings, *collection.unused]))


def list_plans(collection: Collection, name: str, values: Mapping[str, str]) -> list[Json]:
    """Return what can be done with a collection, and why something cannot: the rows of vue/plans.vue."""
    has_label = has_value(collection.table["label"])
    classes = len(collection.class_names("train"))
    every = len(has_label)
    without = int((~has_label).sum())
    reason = "" if classes > 1 else "It needs labels of two classes: label some images first."
    says = {
        "Train": f"{classes:,} classes, {every - without:,} images with a label.",
        "Find wrong labels": "Judges each label by all other images. Nothing is changed.",
    }
    if has_value(collection.table["tags"]).any():
        says["Train a tagger"] = "A probability for each tag of the images."
    if classes < 2:
        says["Teach SDXL your pictures"] = (
            f"{every:,} pictures of one thing or one style, which SDXL then draws (a LoRA)."
        )
    label = {"title": "Label", "says": f"{without:,} of {every:,} images have no label yet.", "reason": ""}
    plans = [label | {"link": f"/label?collection={name}", "look": f"/collection/{name}"}]
    for title, text in says.items():
        words = [re.sub(r"\{(root|care|run)\}", lambda key: values[key[1]], word) for word in _COMMANDS[title].split()]
        plan = {"title": title, "says": text, "words": words}
        plans.append(plan | {"reason": reason if title in ("Train", "Find wrong labels") else ""})
    return plans
