"""`/run/...`: one run: its curves, pictures, tables, settings, files and log, live."""

import csv
import html
import itertools
import math
import shlex
from pathlib import Path
from urllib.parse import quote

from fastapi import HTTPException
from fastapi.responses import FileResponse
from nicegui import app, ui

from utils.config.recipe import flatten
from utils.io.safe_text import escape_controls
from utils.record.run_index import RunIndex, find_runs, is_inside
from utils.record.run_reader import RunReader
from viewer.curves import show_curves
from viewer.parts import REFRESH_SEC, find_run, page, run_name

_LOG_LINES, _LOG_BYTES = 2_000, 200_000
_LEVELS = {" WARNING ": "text-orange", " ERROR ": "text-negative"}  # colours of lines
_TABLE_ROWS = 20_000
_PICTURES = {".png", ".jpg", ".webp"}


def add_page(index: RunIndex) -> None:
    """Add the page of a run, and the route of its pictures."""

    @app.get("/picture/{name:path}")
    def picture(name: str, file: str) -> FileResponse:
        run = find_run(index, name)
        path = run / file
        if path.suffix not in _PICTURES or not is_inside(path, run) or not path.is_file():
            raise HTTPException(404, "no such picture")
        return FileResponse(path, headers={"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"})

    @ui.page("/run/{name:path}")
    async def show(name: str) -> None:
        path = find_run(index, name)
        tabs = {
            "Pictures": lambda: _show_pictures(name, path),
            "Tables": lambda: _show_tables(path),
            "Settings": lambda: _show_settings(index, path),
            "Files": lambda: _show_files(path),
            "Log": lambda: _show_log(path),
            "Commands": lambda: _show_commands(path),
        }
        with page(escape_controls(path.name)):
            ui.link("Review the labels", f"/review?run={quote(name)}")
            with ui.tabs().props("align=left dense no-caps").classes("w-full") as bar:
                for title in ("Curves", *tabs):
                    ui.tab(title)
            with ui.tab_panels(bar, value="Curves", animated=False).classes("w-full"):
                with ui.tab_panel("Curves").classes("q-px-none"):
                    nothing = "No figures yet: the first are written at the first log step."
                    await show_curves(lambda: {"": index.curves(path)}, nothing)
                for title, build in tabs.items():
                    with ui.tab_panel(title).classes("q-px-none"):
                        build()


def _show_pictures(name: str, path: Path) -> None:
    files = [file for folder in ("plots", "samples") for file in (path / folder).rglob("*")]
    files = sorted(file for file in files if file.suffix in _PICTURES and is_inside(file, path))
    if not files:
        ui.label("No pictures yet: evaluations make them.").classes("muted")
    for file in files:
        inside = file.relative_to(path).as_posix()
        with ui.card().props("flat bordered").classes("q-pa-sm w-full"):
            ui.label(escape_controls(inside)).classes("mono")
            shown = ui.image(f"/picture/{quote(name)}?file={quote(inside)}&at={file.stat().st_mtime_ns}")
            shown.props(f"fit=contain no-spinner alt='{html.escape(inside)}'").style("max-width: 1200px")


def _show_tables(path: Path) -> None:
    names = sorted(file.name for file in (path / "tables").glob("*.csv") if is_inside(file, path))
    if not names:
        ui.label("No tables yet: evaluations write them.").classes("muted")
        return
    with ui.row().classes("items-center w-full"):
        chosen = ui.select(names, value=names[0]).props("dense outlined aria-label=table")
        find = ui.input(placeholder="filter").props("clearable dense outlined aria-label=filter")
    table = ui.table(columns=[], rows=[], row_key="id").classes("w-full").style("height: 70vh")
    table.props("flat bordered virtual-scroll dense :rows-per-page-options=[0]")
    find.bind_value_to(table, "filter", forward=lambda text: text or "")

    def fill() -> None:
        names, rows = read_table(path / "tables" / chosen.value)
        table.columns = [
            {"name": str(number), "label": name, "field": str(number), "sortable": True, "align": "left"}
            for number, name in enumerate(names)
        ]
        table.rows = [{"id": number, **dict(zip(map(str, range(len(row))), row))} for number, row in enumerate(rows)]

    chosen.on_value_change(fill)
    fill()


def read_table(path: Path) -> tuple[list[str], list[list[float | str]]]:
    """Return the names of a CSV file's columns, and its first _TABLE_ROWS rows, numbers as numbers."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        names, *rows = list(itertools.islice(csv.reader(file), _TABLE_ROWS + 1)) or [[]]
    return [escape_controls(name) for name in names], [[_to_cell(cell) for cell in row] for row in rows]


def _to_cell(text: str) -> float | str:
    try:
        value = float(text)
    except ValueError:
        return escape_controls(text)
    return round(value, 6) if math.isfinite(value) else text


def _read_settings(path: Path) -> dict[str, str]:
    values = flatten(RunReader(path).config)
    return {escape_controls(key): escape_controls(str(value)) for key, value in values.items()}


def _show_settings(index: RunIndex, path: Path) -> None:
    settings, alone = _read_settings(path), "compare with"
    others = {run_name(index, other): other for other in find_runs(index.roots) if other != path}
    with ui.row().classes("items-center w-full"):
        chosen = ui.select([alone, *others], value=alone).props(
            "dense outlined options-dense aria-label='compare with'"
        )
        find = ui.input(placeholder="filter").props("clearable dense outlined aria-label=filter")
    table = ui.table(columns=[], rows=[], row_key="key").classes("w-full").style("height: 70vh")
    table.props("flat bordered virtual-scroll dense wrap-cells :rows-per-page-options=[0]")
    find.bind_value_to(table, "filter", forward=lambda text: text or "")

    def fill() -> None:
        columns = [("key", "Key"), ("value", "This run")]
        rows = [{"key": key, "value": value} for key, value in settings.items()]
        if chosen.value != alone:
            other = _read_settings(others[chosen.value])
            columns.append(("other", chosen.value))
            keys = (key for key in {**settings, **other} if settings.get(key) != other.get(key))
            rows = [{"key": key, "value": settings.get(key, ""), "other": other.get(key, "")} for key in keys]
        table.columns = [
            {"name": name, "label": label, "field": name, "align": "left", "sortable": True} for name, label in columns
        ]
        table.rows = rows

    chosen.on_value_change(fill)
    fill()


def _show_files(path: Path) -> None:
    folders = [file for file in (path / "checkpoints").glob("*") if file.is_dir()]
    rows = []
    for file in (*sorted((path / "weights").glob("*.safetensors")), *sorted(folders)):
        parts = [part for part in file.rglob("*") if part.is_file()] if file.is_dir() else [file]
        size = sum(part.lstat().st_size for part in parts) / 2**20
        rows.append({"file": escape_controls(file.relative_to(path).as_posix()), "size": f"{size:,.1f} MiB"})
    if not rows:
        ui.label("No weights yet: the first checkpoint writes them.").classes("muted")
        return
    columns = [{"name": name, "label": name, "field": name, "align": "left"} for name in ("file", "size")]
    ui.table(columns=columns, rows=rows, row_key="file").props("flat bordered dense").classes("w-full")


def _show_log(path: Path) -> None:
    log, read = ui.log(max_lines=_LOG_LINES).classes("w-full mono").style("height: 70vh"), LogReader(path / "log.txt")

    def follow() -> None:
        for line in read.new_lines():
            log.push(line, classes=next((colour for word, colour in _LEVELS.items() if word in line), ""))

    follow()
    ui.timer(REFRESH_SEC, follow)


class LogReader:
    """The lines of a log, read as it grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._end = path, 0

    def new_lines(self) -> list[str]:
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
        return whole.decode("utf-8", errors="replace").splitlines()[-_LOG_LINES:]


def _show_commands(path: Path) -> None:
    reader = RunReader(path)
    settings = sorted(reader.settings)
    commands = {
        "Go on": shlex.join(["python", f"{reader.config.get('script', 'finetune')}.py", *settings, f"run_dir={path}"]),
        "Evaluate": shlex.join(["python", "evaluate.py", f"run_dir={path}"]),
        "Predict": shlex.join(["python", "predict.py", f"weights={path}", "input=FOLDER", "output=predictions.jsonl"]),
        "Export": shlex.join(["python", "export.py", "format=onnx", f"run_dir={path}"]),
    }
    for title, command in commands.items():
        ui.label(title).classes("text-weight-medium q-mt-sm")
        with ui.row().classes("items-center no-wrap w-full"):
            ui.label(escape_controls(command)).classes("mono col").style("overflow-wrap: anywhere")
            copy = ui.button(icon="content_copy", on_click=lambda _, text=command: ui.clipboard.write(text))
            copy.props(f"flat round dense aria-label='copy the command: {title}'")
