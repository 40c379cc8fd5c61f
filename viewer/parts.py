"""Parts of several pages: colours, tables with a choice, and how values are shown."""

import asyncio
import shlex
from asyncio import Lock
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from fastapi import HTTPException
from nicegui import app, ui
from nicegui.elements.mixins.value_element import ValueElement
from nicegui.events import GenericEventArguments

from utils.errors import UserError
from utils.io.files import Json
from utils.io.safe_text import escape_controls
from utils.record.run_index import RunIndex, is_own_run

REFRESH_SEC = 2.0
UNLABELLED = ("autoencoder", "diffusion", "fcmae")  # tasks without a right answer: no mistakes, nothing to try
ACCENT = "#1c6dd0"
# Of lines: any two differ by 20 or more in CIEDE2000, the first twelve by 22, and each from a light and a dark page.
COLOURS = (
    ACCENT, "#ff780f", "#00b400", "#ff3cb4", "#5a5a4b", "#00b4c3", "#a5a5b4", "#9600d2", "#ff0f3c", "#008769",
    "#c39600", "#b4005a", "#695a78", "#874b00", "#a578ff", "#96a587", "#1ea5ff", "#a57869", "#697800", "#0f6978",
)  # fmt: skip


def show_heading(text: str, level: int) -> ui.label:
    """Show a heading of a level, 1 to 6. The title of a page is the only heading of level 1."""
    heading = ui.label(text)
    heading.tag = f"h{level}"
    return heading


def bind_address(name: str, show: Callable[[str], Any]) -> Callable[[str], None]:
    """Let a parameter of the page's address say what is shown, so that it has a link, and back goes back.

    show: called with the parameter, "" without one, when the user goes back or forward, and now if there is one.
    Returns a function that writes what is shown now into the address.
    """
    words = app.storage.client.setdefault("words", dict(ui.context.client.request.query_params))
    words.pop("token", None)

    def follow(event: GenericEventArguments) -> None:
        words[name] = dict(parse_qsl(event.args[1:])).get(name, "")
        show(words[name])

    def tell(text: str) -> None:
        if text != words.get(name, ""):
            words[name] = text
            ui.navigate.history.push("?" + urlencode({key: word for key, word in words.items() if word}))

    ui.on("address", follow)
    if words.get(name):
        show(words[name])
    return tell


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


def show_status(text: str = "") -> ui.label:
    """Show a line that says what the page does. Screen readers read it when it changes."""
    return ui.label(text).props("role=status").style("overflow-wrap: anywhere")


@contextmanager
def show_fault(status: ui.label, *errors: type[Exception]) -> Iterator[None]:
    """Let a line say a UserError, or one of other errors, in place of the page."""
    try:
        yield
    except (UserError, *errors) as error:
        status.text = escape_controls(str(error).removeprefix("data.root: "))  # the folder is on the page


def name_tab() -> str:
    """Return who decides: the person's name, if it is known, and a short name of the browser's tab."""
    return f"{app.storage.client.get('name', '')} {(ui.context.client.tab_id or '')[:8]}".strip()


@contextmanager
def show_share(status: ui.label) -> Iterator[Callable[[float], None]]:
    """Let a line say which share of the images is read; gives the function that is told it, in any thread."""
    shares = [0.0]
    timer = ui.timer(1, lambda: status.set_text(f"Looking at the images: {shares[-1]:.0%}"))
    try:
        yield shares.append
    finally:
        timer.cancel()


class Part(ui.element):
    """A component of viewer/vue/. The first lines of the .vue file state the properties and the events."""

    def __init__(self, **properties: Any) -> None:
        super().__init__()
        self.props.update(properties)


class Chooser(Part, component="vue/chooser.vue"):
    """The head of an uploader."""


class Cards(Part, component="vue/cards.vue"):
    """Small images with lines under them."""


def make_card(address: str | None, alt: str, *lines: str) -> Json:
    """Return a card. address: of the image; alt: the text in its place."""
    return {"src": address, "alt": escape_controls(alt), "lines": [*map(escape_controls, lines)]}


class Sheet(Part, component="vue/sheet.vue"):
    """A table that a person chooses by name.

    read: called in a thread, returns labels of columns by field, and rows; keyed: the field that names a row.
    """

    def __init__(self, label: str, names: Sequence[str], keyed: str, read: Callable[[str], tuple[Json, list]]) -> None:
        choices = [{"value": name, "label": escape_controls(name)} for name in names]
        super().__init__(label=label, names=choices, chosen=names[0], keyed=keyed, columns=[], rows=[])
        self._read = read
        self._lock = Lock()
        self.on("choose", lambda event: self.fill(event.args))

    async def fill(self, name: str = "") -> None:
        """Show the table of a name; without a name, read the shown table again."""
        async with self._lock:  # the last choice stays, also if one before it takes longer
            self.props["chosen"] = name or self.props["chosen"]
            labels, rows = await asyncio.to_thread(self._read, self.props["chosen"])
            shared = {"align": "left", "sortable": True}
            columns = [{"name": field, "label": label, "field": field, **shared} for field, label in labels.items()]
            self.props.update(columns=columns, rows=rows)


def show_folder(root: str) -> str:
    """Return the name of a collection's folder."""
    return escape_controls(root.rstrip("/").rpartition("/")[2] or root)


def run_name(index: RunIndex, path: Path) -> str:
    """Return a run's name on the pages: its path below its root, after the root's number."""
    number = next(number for number, root in enumerate(index.roots) if path.is_relative_to(root))
    return f"{number}/{path.relative_to(index.roots[number]).as_posix()}"


def find_run(index: RunIndex, name: str) -> Path:
    """Return a run's folder by the run's name. Raises HTTPException 404 if no run below the roots has this name."""
    number, _, relative = name.partition("/")
    with suppress(OSError, ValueError, IndexError):  # no number, NUL, or too long
        root = index.roots[int(number)]
        path = (root / relative).resolve()
        if path.is_relative_to(root) and is_own_run(path):
            return path
    raise HTTPException(404, "no such run")
