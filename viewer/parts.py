"""Parts of several pages: colours, tables with a choice, and how values are shown."""

import shlex
from asyncio import Lock
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from fastapi import HTTPException
from nicegui import ui

from utils.io.files import Json
from utils.io.safe_text import escape_controls
from utils.record.run_index import RunIndex, is_own_run
from utils.record.run_reader import STATES

REFRESH_SEC = 2.0
ACCENT = "#1c6dd0"
GREY = "#868e96"
COLOURS = (ACCENT, "#d9480f", "#2b8a3e", "#862e9c", "#0b7285", "#a61e4d", "#e67700", "#495057")
STATE_COLOURS = dict(zip(STATES, ("primary", "warning", "negative", "negative", "warning", "positive")))


def show_command(words: Sequence[str]) -> None:
    """Show a command, and a button that copies it."""
    ui.code(escape_controls(shlex.join(words)), language="bash").classes("w-full")


def make_columns(labels: Mapping[str, str]) -> list[Json]:
    """Return the columns of a table that can be sorted. labels: by the field of a row."""
    shared = {"align": "left", "sortable": True}
    return [{"name": field, "label": label, "field": field, **shared} for field, label in labels.items()]


async def filtered_table(
    names: list[str], label: str, key: str, fill: Callable[[ui.table, str], Awaitable]
) -> Callable[[], Awaitable]:
    """Show a choice, a filter, and a table that `fill` gives columns and rows for what is chosen.

    Returns the function that fills it again.
    """
    with ui.row():
        chosen = ui.select({name: escape_controls(name) for name in names}, value=names[0])
        chosen.props(f"aria-label='{label}'")
        find = ui.input(placeholder="filter").props("aria-label=filter")
    table = ui.table(columns=[], rows=[], row_key=key).classes("w-full").style("height: 70vh")
    table.props("virtual-scroll dense :rows-per-page-options=[0]")
    find.bind_value_to(table, "filter", forward=lambda text: text or "")
    lock = Lock()

    async def refill() -> None:
        async with lock:  # the last choice stays, also if one before it takes longer
            await fill(table, chosen.value)

    chosen.on_value_change(refill)
    await refill()
    return refill


def run_name(index: RunIndex, path: Path) -> str:
    """Return a run's name on the pages: its path below its root, after the root's number."""
    number = next(number for number, root in enumerate(index.roots) if path.is_relative_to(root))
    return f"{number}/{path.relative_to(index.roots[number]).as_posix()}"


def find_run(index: RunIndex, name: str) -> Path:
    """Return a run's folder by its name. Raises HTTPException 404 for whatever is no run below the roots."""
    number, _, relative = name.partition("/")
    with suppress(OSError, ValueError, IndexError):  # no number, NUL, or too long
        root = index.roots[int(number)]
        path = (root / relative).resolve()
        if path.is_relative_to(root) and is_own_run(path):
            return path
    raise HTTPException(404, "no such run")
