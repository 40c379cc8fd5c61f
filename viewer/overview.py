"""The first tab of a run: state, best figure, plan, next commands, worst images and curves."""

import asyncio
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from nicegui import ui
from nicegui.events import GenericEventArguments

from utils.io.files import Json
from utils.io.safe_text import escape_controls
from utils.record import tables
from utils.record.figures import BALANCED, ONE_CLASS, interval, show_name
from utils.record.run_index import RunIndex
from utils.record.run_reader import RunReader
from viewer.curves import show_curves
from viewer.parts import REFRESH_SEC, UNLABELLED, Part, run_name, show_folder, show_heading
from viewer.queue import Queue
from viewer.results import describe_prediction, show_images
from viewer.runs import count_digits, make_row
from viewer.site import RunTab

_WORST = 10  # images
_PLAN = re.compile(r"the plan for .*\n(?:  .*\n)+|^  by class .*", re.MULTILINE)
_TRAINED = re.compile(r"^  collection .*: ([\d,]+ training and [\d,]+ validation)", re.MULTILINE)
_NEXT = re.compile(r"^  next +(.*)", re.MULTILINE)
# What a word of a command leaves in a run's folder.
_LEAVES = {
    "evaluate.py": "tables/images*.parquet",
    "prepare.py": f"*/{tables.LABELS}",
    "calibrate=true": "weights/*_thresholds.csv", "format=onnx": "export/*.onnx", "format=wd14": "export/wd14/*",
}  # fmt: skip
_NOTHING = "No figures yet: the first are written at the first log step."
_LOG_BYTES = 200_000  # from the start of the log, with the plan, and from the end


def summarise_run(index: RunIndex, path: Path) -> Json:
    """Return what vue/front.vue shows of a run while it goes on: its row of the table, and its figures so far."""
    state = index.read(path)
    result = RunReader(path).result or {}
    figures = result.get("figures", {})
    names = dict.fromkeys([result.get("metric"), "top1", BALANCED])
    shown = []
    for name in filter(figures.__contains__, names):
        ends = interval(name, figures)
        figure = {"name": show_name(name), "value": figures[name], "interval": ends}
        shown.append(figure | {"digits": count_digits(ends)})
    row = {"figures": shown, "easy": figures.get(ONE_CLASS), "images": figures.get("samples")}
    row["answers"] = state.task not in UNLABELLED
    row["findings"] = [escape_controls(finding["line"]) for finding in result.get("findings", ())]
    return make_row(index, state) | row | {"minutes": index.curves(path).minutes(np.array([state.step]))[0].item()}


def read_advice(path: Path) -> tuple[str, str, list[list[str]]]:
    """Return what a run has logged for people: its plan with the rates of classes, its images, and next commands."""
    log = path / "log.txt"
    with log.open("rb") as file:
        text = file.read(_LOG_BYTES)
        file.seek(max(file.tell(), log.stat().st_size - _LOG_BYTES))
        text = (text + b"\n" + file.read()).decode(errors="replace")
    return (
        "\n".join(_PLAN.findall(text)),
        "".join(_TRAINED.findall(text)[-1:]),
        [shlex.split(line.replace("evaluate.py", "evaluate.py per_image=true")) for line in _NEXT.findall(text)],
    )


def has_left(path: Path, words: Sequence[str], since: int = 0) -> bool:
    """Return whether a command has left its files in a run's folder since a time, in nanoseconds since 1970."""
    patterns = [*filter(None, map(_LEAVES.get, words))]
    is_new = lambda file: file.stat().st_mtime_ns >= since  # noqa: E731
    return bool(patterns) and all(any(map(is_new, path.glob(pattern))) for pattern in patterns)


def describe_next(queue: Queue, path: Path, words: Sequence[str]) -> Json:
    """Return a command about a run, whether it is done, and whether the page may start it."""
    is_done = has_left(path, words)
    command = escape_controls(shlex.join(words))
    files = [*path.glob("export/**/*.*")] if is_done and "export.py" in words else []
    files.sort(key=lambda file: -file.stat().st_size)  # the network comes first
    step = {"words": words, "command": command, "done": is_done, "may": queue.may_start and queue.takes(words[1:])}
    return step | {"files": [str(file.relative_to(path)) for file in files]}


def command_of(path: Path) -> list[str]:
    """Return the command of a run, which goes on with it."""
    reader = RunReader(path)
    return ["python", f"{reader.config.get('script', 'finetune')}.py", *sorted(reader.settings), f"run_dir={path}"]


class Front(Part, component="vue/front.vue"):
    """A run's figures, what comes next, and its plan."""


class Overview(RunTab):
    """The front of a run; its figures and its curves follow the run."""

    async def show(self) -> None:
        """Show the front."""
        index = self.site.index
        plan, trained, commands = await asyncio.to_thread(read_advice, self.path)
        if RunReader(self.path).state in ("stopped", "dead", "failed"):
            commands = [command_of(self.path)]
        nexts = [describe_next(self.site.queue, self.path, command) for command in commands]
        self._front = Front(
            run=None, collection=None, others=[], plan=escape_controls(plan, keep="\n"), nexts=nexts, trained=trained
        ).on("start", self._start)
        await self._refresh()
        ui.timer(REFRESH_SEC, self._refresh)
        if collection := await asyncio.to_thread(self.site.shelf.of_run, self.path):
            folder = show_folder(self.site.shelf.config(collection).root)
            self._front.props["collection"] = {"name": folder, "link": f"/collection/{collection}"}
        if images := await asyncio.to_thread(tables.worst_images, self.path, _WORST, (), describe_prediction):
            show_heading("The worst mistakes", 2)
            await show_images(self.path, self.site.shelf, images)
        await show_curves(lambda: {"": [index.curves(self.path)]}, _NOTHING)
        runs = (await asyncio.to_thread(self.site.shelf.of_runs)).items()  # last: it reads all runs
        others = [run for run, name in runs if name and name == collection and run != self.path]
        self._front.props["others"] = [run_name(index, run) for run in others]

    async def _start(self, event: GenericEventArguments) -> None:
        """Put the words of a button's command into the queue, and show that."""
        await asyncio.to_thread(self.site.queue.act, "", "Add", event.args[1:])
        ui.navigate.to("/")

    async def _refresh(self) -> None:
        with suppress(OSError, ValueError):  # deleted meanwhile, which the page says
            self._front.props["run"] = await asyncio.to_thread(summarise_run, self.site.index, self.path)
