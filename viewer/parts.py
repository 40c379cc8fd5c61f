"""Parts of several pages: colours, tables with a choice, and how values are shown."""

import json
import shlex
from asyncio import Lock
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from fastapi import HTTPException
from nicegui import ui
from nicegui.elements.mixins.value_element import ValueElement

from utils.io.files import Json
from utils.io.safe_text import escape_controls
from utils.record.run_index import RunIndex, is_own_run
from utils.record.run_reader import STATES

REFRESH_SEC = 2.0
ACCENT = "#1c6dd0"
GREY = "#868e96"
# The colour of a chart's text, on a light and on a dark page.
TEXT = {":color": "Quasar.Dark.isActive ? '#ced4da' : '#495057'"}
# Of lines: any two differ by 20 or more in CIEDE2000, the first twelve by 22, and each from a light and a dark page.
COLOURS = (
    ACCENT, "#ff780f", "#00b400", "#ff3cb4", "#5a5a4b", "#00b4c3", "#a5a5b4", "#9600d2", "#ff0f3c", "#008769",
    "#c39600", "#b4005a", "#695a78", "#874b00", "#a578ff", "#96a587", "#1ea5ff", "#a57869", "#697800", "#0f6978",
)  # fmt: skip
# A new entry of the history, unless the address says so already.
_SET_PARAMETER = """{{ const url = new URL(location), [name, text] = [{}, {}]
text ? url.searchParams.set(name, text) : url.searchParams.delete(name)
if (url.href != location.href) history.pushState({{}}, "", url) }}"""
_TITLE = """<q-th :props="props" tabindex="0" @keydown.enter="props.sort(props.col)">{{ props.col.label }}</q-th>"""
STATE_COLOURS = dict(zip(STATES, ("primary", "warning", "negative", "negative", "warning", "positive")))


def show_heading(text: str, level: int) -> ui.label:
    """Show a heading of a level, 1 to 6; a page has one of level 1, its title."""
    heading = ui.label(text)
    heading.tag = f"h{level}"
    return heading


def follow_address() -> None:
    """Let the page know when the user goes back or forward among its own addresses (`bind_address`)."""
    ui.run_javascript("addEventListener('popstate', () => emitEvent('address', location.search))")


def bind_address(name: str, show: Callable[[str], Any]) -> Callable[[str], None]:
    """Let a parameter of the page's address say what is shown, so that it has a link, and back goes back.

    show: called with the parameter, "" without one, when the user goes back or forward, and now if there is one.
    Returns a function that writes what is shown now into the address.
    """
    first = ui.context.client.request.query_params.get(name, "")
    ui.on("address", lambda event: show(dict(parse_qsl(event.args[1:])).get(name, "")))
    if first:
        show(first)
    return lambda text: ui.run_javascript(_SET_PARAMETER.format(json.dumps(name), json.dumps(text)))


def bind_value(box: ValueElement, name: str) -> None:
    """Bind a text to a parameter of the page's address."""
    tell = bind_address(name, box.set_value)
    box.on_value_change(lambda event: tell(event.value or ""))


def bind_choice(choice: ValueElement, name: str, values: Collection[str]) -> None:
    """Bind a choice, such as tabs, to a parameter of the page's address; without it, the first of the values counts."""
    first = next(iter(values))
    tell = bind_address(name, lambda text: choice.set_value(text if text in values else first))
    choice.on_value_change(lambda event: tell("" if event.value == first else event.value))


def show_command(words: Sequence[str]) -> None:
    """Show a command, and a button that copies it."""
    code = ui.code(escape_controls(shlex.join(words)), language="bash").classes("w-full")
    code.copy_button.props("aria-label=copy")
    code.markdown.props("tabindex=0")  # keys scroll it


@contextmanager
def show_share(said: ui.label) -> Iterator[Callable[[float], None]]:
    """Let a line say which share of the images is read; gives what is told it, in any thread."""
    shares = [0.0]
    timer = ui.timer(1, lambda: said.set_text(f"Looking at the images: {shares[-1]:.0%}"))
    try:
        yield shares.append
    finally:
        timer.cancel()


def show_grid(name: str, template: str, rows: Sequence[Json] = ()) -> ui.table:
    """Show rows as a grid of a CSS class, each by Quasar's template: double braces show text, never markup."""
    table = ui.table(columns=[], rows=[*rows], pagination=0).classes("w-full")
    table.props(f"grid hide-header hide-bottom card-container-class={name}").add_slot("item", template)
    return table


def make_columns(labels: Mapping[str, str]) -> list[Json]:
    """Return the columns of a table that can be sorted. labels: by the field of a row."""
    shared = {"align": "left", "sortable": True}
    return [{"name": field, "label": label, "field": field, **shared} for field, label in labels.items()]


def sort_by_keys(table: ui.table) -> None:
    """Let Enter in a column's title sort a table, as a click does."""
    table.add_slot("header-cell", _TITLE)


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
    sort_by_keys(table)
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
