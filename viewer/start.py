"""`/start`: choose a folder, see what it has, train on it; and the queue of what was started."""

import asyncio
import re
import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from nicegui import app, ui

from data.layouts.table import has_value
from utils.errors import UserError
from utils.io.files import Json
from utils.io.safe_text import safe_lines
from utils.record.run_index import is_own_run
from viewer.parts import REFRESH_SEC, make_columns, run_name
from viewer.site import Site

_SLOT = """<q-td :props="props">
<q-badge :color="{running: 'primary', failed: 'negative', dead: 'negative', finished: 'positive'}[props.row.state]
 || 'grey-8'">{{ props.row.state }}</q-badge>
<component :is="props.row.link ? 'a' : 'span'" :href="props.row.link" class="q-mx-sm text-primary">
 {{ props.row.words[0] }} {{ props.row.words.at(-1).split('/').at(-1) }}</component>
<q-btn v-for="act in {waiting: ['To the front', 'Remove'], running: ['Stop'], stopping: ['Stop'], finished: ['Remove']}[
 props.row.state] || ['Start again', 'Remove']" flat dense no-caps color="primary"
 :label="props.row.state == 'stopping' ? 'Stop without saving' : act" :aria-label="act + ': ' + props.row.words.at(-1)"
 @click="$parent.$emit('act', [props.row.id, act])" />
<div class="mono" style="white-space: pre-wrap; overflow-wrap: anywhere">{{ props.row.said }}</div>
<a v-if="props.row.said.includes('labels.parquet')" href="/review?run=0/care/labels">Review them</a></q-td>"""
_COMMANDS = {
    "Classify": "train.py data.root={root} loop.minutes={minutes} run_dir={run}",
    "Tag": "train.py task=tagging data.root={root} loop.minutes={minutes} run_dir={run}",
    "LoRA": "finetune_sdxl.py experiment=sdxl/lora model.path={base} data.root={root} data.trigger={trigger} "
    "loop.minutes={minutes} run_dir={run}",
    "Find wrong labels": "prepare.py job=labels data.root={root} job.report={care}",
}
_FIELDS = {
    "minutes": "Minutes",
    "base": "LoRA: file or folder of SDXL",
    "trigger": "LoRA: words for it, such as sks dog; or null",
}
_LISTED = 500  # folders in one
_SAID = 4  # lines of a log


def show_queue(site: Site) -> Callable:
    """Show the queue, live. Returns what acts on it, as `Queue.act` does, and shows it again."""
    said = ui.label().classes("text-negative").props("role=status")
    table = ui.table(columns=make_columns({"id": "Queue"}), rows=[], row_key="id").classes("w-full")
    table.add_slot("body-cell-id", _SLOT)

    def read(*act: str) -> list[Json]:
        rows = []
        for name, words in site.queue.act(*act):
            folder = Path(words[-1].split("=", 1)[1])
            said = safe_lines("\n".join(site.queue.lines(name)[-_SAID:]))
            link = f"/run/{quote(run_name(site.index, folder))}" if is_own_run(folder) else ""
            rows.append(
                {"id": name, "state": site.queue.state(name, folder), "words": words, "said": said, "link": link}
            )
        return rows

    async def refresh(*act: str) -> None:
        try:
            table.rows = await asyncio.to_thread(read, *act)
            said.text = ""
        except UserError as error:
            said.text = safe_lines(str(error))

    table.on("act", lambda event: refresh(*event.args))
    ui.timer(REFRESH_SEC, refresh)
    return refresh


def add_page(site: Site) -> None:
    """Add the page. The queue goes on as long as the server runs, also while no page is open."""

    async def go_on() -> None:
        with suppress(UserError):  # the page says it
            await asyncio.to_thread(site.queue.act)

    app.timer(REFRESH_SEC, go_on)

    @ui.page("/start")
    async def show(folder: str = "", browse: str = str(site.queue.roots[0])) -> None:
        with site.page("Start"):
            refresh = show_queue(site)
            try:
                path = Path(folder or browse)
                site.queue.check(["train.py", f"data.root={path}"])
                with ui.element("form").props("action=/start").classes("w-full row"):
                    typed = ui.input("Folder with images: type, paste or drop its path", value=str(path))
                    typed.props("name=folder").classes("col")
                    ui.button("Look into it").props("type=submit")
                below = await asyncio.to_thread(lambda: sorted(path.glob("[!.]*/"))[:_LISTED])
                with ui.row().classes("gap-x-4 gap-y-1"):
                    for other in (*site.queue.roots, path.parent, *below):
                        ui.link(safe_lines(str(other)), "/start?browse=" + quote(bytes(other)))
                if folder:
                    await look_into(site, path, refresh)
            except UserError as error:
                ui.label(safe_lines(str(error))).classes("text-negative")


async def look_into(site: Site, folder: Path, refresh: Callable) -> None:
    """Show what a folder has, and what trains on it. Raises UserError for one that cannot be read."""
    name = site.shelf.add(site.data.model_copy(update={"root": str(folder)}))
    said = ui.label("Reading the folder").style("white-space: pre-wrap; overflow-wrap: anywhere").props("role=status")
    await ui.context.client.connected()
    collection = await asyncio.to_thread(site.shelf.open, name, again=True)
    said.text = f"{len(collection):,} images; reading every file"
    kinds = ["LoRA"]
    if has_value(collection.table["tags"]).any():
        kinds.append("Tag")
    if len(collection.class_names("train")) > 1:
        kinds += ["Find wrong labels", "Classify"]
    care = site.queue.runs / "care"
    values = {"root": folder, "care": care, "minutes": "10", "base": "", "trigger": "null"}
    words = []

    def update() -> None:
        slug = re.sub(r"\W+", "_", folder.name)[:60]
        values["run"] = site.queue.runs / time.strftime(f"{slug}-%y%m%d-%H%M%S")
        words[:] = [text.format(**values) for text in _COMMANDS[kind.value].split()]
        shown.content = shlex.join(["python", *words])

    ui.label("To classify, it needs labels of two classes; to tag, tags.")
    with ui.row():
        ui.link("Label the images", f"/label?collection={name}")
        ui.link("Look at them", f"/collection/{name}")
    with ui.row():
        kind = ui.toggle(kinds, value=kinds[-1], on_change=update)
        for field, label in _FIELDS.items():
            ui.input(label).bind_value(values, field).on_value_change(update)
    shown = ui.code(language="bash")
    shown.copy_button.props("aria-label=copy")
    ui.button("Start", on_click=lambda: refresh("", "Add", [*words])).on_click(update)
    update()

    def check() -> str:
        from data.tools.config import Check

        return Check(name="check", verify=True, report=str(care / name)).run(site.shelf.config(name))

    said.text = safe_lines("\n".join([await asyncio.to_thread(check), *collection.unused]))
