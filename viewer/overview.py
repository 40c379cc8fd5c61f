"""The first tab of a run: state, best figure, plan, next commands, worst images and curves."""

import asyncio
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from nicegui import ui

from utils.io.safe_text import escape_controls
from utils.record import tables
from utils.record.figures import show_best
from utils.record.run_index import RunIndex
from utils.record.run_reader import RunReader
from viewer.curves import show_curves
from viewer.parts import REFRESH_SEC, show_command, show_heading
from viewer.queue import Queue
from viewer.results import describe_prediction, show_images
from viewer.runs import make_row
from viewer.site import RunTab

_WORST = 10  # images
_PLAN = re.compile(r"the plan for .*\n(?:  .*\n)+|^  by class .*", re.MULTILINE)
_NEXT = re.compile(r"^  next +(.*)", re.MULTILINE)
# What a word of a command leaves in a run's folder.
_LEAVES = {
    "evaluate.py": "tables/images*.parquet",
    "calibrate=true": "weights/*_thresholds.csv", "format=onnx": "export/*.onnx", "format=wd14": "export/wd14/*",
}  # fmt: skip
_NOTHING = "No figures yet: the first are written at the first log step."
_LOG_BYTES = 200_000  # from the start of the log, with the plan, and from the end


def summarise_run(index: RunIndex, path: Path) -> str:
    """Return lines: a run's state, steps and time left, its best figure with its interval, and its task."""
    row = make_row(index, index.read(path))
    shown = escape_controls(show_best(RunReader(path).result or {}))
    best = row["shown"] and f"best {shown or row['shown']}"
    return f"{row['state']}, step {row['steps']}\n{row['task']}, {row['model']}\n{best}"


def read_advice(path: Path) -> tuple[str, list[list[str]]]:
    """Return what a run has logged for people: its plan, the rates of classes, and the commands that come next."""
    log = path / "log.txt"
    with log.open("rb") as file:
        text = file.read(_LOG_BYTES)
        file.seek(max(file.tell(), log.stat().st_size - _LOG_BYTES))
        text = (text + b"\n" + file.read()).decode(errors="replace")
    return "\n".join(_PLAN.findall(text)), [
        shlex.split(line.replace("evaluate.py", "evaluate.py per_image=true")) for line in _NEXT.findall(text)
    ]


def show_next(queue: Queue, path: Path, words: Sequence[str]) -> None:
    """Show a command about a run, struck out if it is done, and a button that starts it."""
    patterns = [*filter(None, map(_LEAVES.get, words))]
    is_done = patterns and all(any(path.glob(pattern)) for pattern in patterns)

    async def start() -> None:
        await asyncio.to_thread(queue.act, "", "Add", words[1:])
        ui.navigate.to("/start")

    with ui.element("s" if is_done else "section"):
        show_command(words)
    if queue.may_start and queue.takes(words[1:]):
        ui.button("Start", on_click=start)


def command_of(path: Path) -> list[str]:
    """Return the command of a run, which goes on with it."""
    reader = RunReader(path)
    return ["python", f"{reader.config.get('script', 'finetune')}.py", *sorted(reader.settings), f"run_dir={path}"]


class Overview(RunTab):
    """The front of a run; its first lines and its curves follow the run."""

    async def show(self) -> None:
        """Show the front."""
        index = self.site.index
        self._state = ui.label().classes("lines")
        await self._refresh()
        ui.timer(REFRESH_SEC, self._refresh)
        if collection := await asyncio.to_thread(self.site.shelf.of_run, self.path):
            root = self.site.shelf.config(collection).root
            ui.link(f"collection {escape_controls(root)}", f"/collection/{collection}").classes("lines")
        plan, commands = await asyncio.to_thread(read_advice, self.path)
        ui.label(escape_controls(plan, keep="\n")).classes("lines")
        if RunReader(self.path).state in ("stopped", "dead", "failed"):
            commands = [command_of(self.path)]
        if commands:
            show_heading("Next", 2)
        for command in commands:
            show_next(self.site.queue, self.path, command)
        if images := await asyncio.to_thread(tables.worst_images, self.path, _WORST, (), describe_prediction):
            show_heading("The worst images", 2)
            ui.link("all mistakes", f"/run/{quote(self.name)}?tab=Mistakes")
            await show_images(self.path, self.site.shelf, images)
        await show_curves(lambda: {"": [index.curves(self.path)]}, _NOTHING)

    async def _refresh(self) -> None:
        with suppress(OSError, ValueError):  # deleted meanwhile, which the page says
            self._state.text = await asyncio.to_thread(summarise_run, self.site.index, self.path)
