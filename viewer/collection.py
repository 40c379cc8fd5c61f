"""`/collection/NAME?find=...`: the images of a collection, found by terms (data/collection/search.py)."""

import asyncio
import functools
import io
import itertools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from nicegui import events, ui

from data.collection.collection import Collection
from data.collection.search import Search, quote_value
from data.layouts.corrections import Decision, desk_of
from data.layouts.table import TAG_LISTS, count_values, has_value
from data.stream.source import UnreadableImage
from utils.formats.spelling import split_tags
from utils.io.files import Json
from utils.io.names import to_nfc
from utils.io.safe_text import escape_controls
from viewer.images import Shelf, image_address
from viewer.map import MOST, find_like, map_images
from viewer.parts import (
    COLOURS,
    Chooser,
    Part,
    Sheet,
    bind_address,
    bind_choice,
    name_tab,
    show_fault,
    show_folder,
    show_share,
    show_status,
)
from viewer.review import find_review
from viewer.select import decide_all, describe_image, take_images
from viewer.site import Page

_SHOWN = 60  # tiles, until the browser says how many it has room for
search_of = functools.lru_cache(maxsize=4)(Search)  # shared by all tabs
_COUNTED = 500  # values in the table
_CHANGES = {  # by the title of a button: a field, and its new value from the old value and the typed text
    "Relabel": ("label", lambda was, text: to_nfc(text.strip()) or was),
    "Add tags": ("tags", lambda had, text: [*dict.fromkeys([*had, *split_tags(text)])]),
    "Take tags away": ("tags", lambda had, text: [tag for tag in had if tag not in split_tags(text)]),
    "Leave out": ("weight", lambda was, text: 0.0),
    "Take in": ("weight", lambda was, text: was or 1.0),
}


def value_rows(search: Search, rows: np.ndarray, column: str) -> list[Json]:
    """Return the rows of the table of values: images, share, and how many times as frequent as in all images."""
    every = np.arange(len(search.collection))
    usual = search.count(every, column)
    sign = "" if column == "tags" else f"{column}="
    lines = []
    for value, images in itertools.islice(search.count(rows, column).items(), _COUNTED):
        share = images / len(rows)
        lift = round(share * len(every) / usual[value], 2)
        row = {"term": sign + quote_value(value), "shown": escape_controls(value), "images": images}
        lines.append(row | {"share": f"{share:.1%}", "lift": lift})
    return lines


class CollectionPage(Page):
    """The images of a collection, and their map."""

    addresses = ["/collection/{collection}", "/map"]

    async def show(self, collection: str) -> None:
        """Show a collection, by its name."""
        shelf = self.site.shelf
        root = shelf.config(collection).root
        with self.site.page(show_folder(root)):
            wait = ui.spinner(size="lg")
            await ui.context.client.connected()
            with show_fault(show_status().classes("text-negative")):
                browser = Browser(shelf, collection, await asyncio.to_thread(shelf.open, collection, again=True))
                labels = browser.collection.table["label"]
                without = int((~has_value(labels)).sum())
                review = await asyncio.to_thread(find_review, shelf.runs, root)
                Ways(name=collection, root=root, images=len(labels), without=without, review=review)
                for finding in sorted(browser.collection.findings, reverse=True):
                    ui.label(escape_controls(finding.line))
                place = ui.column().classes("w-full")
                await browser.build()
                if ui.context.client.page.path == "/map":
                    with place:
                        await show_map(browser)
            wait.delete()


class Ways(Part, component="vue/ways.vue"):
    """What a collection has, and where it leads."""


class Finder(Part, component="vue/finder.vue"):
    """A search, by words or by a picture, with the searches that are kept; and what can be done with marked images."""


class FactList(Part, component="vue/facts.vue"):
    """Names and their values."""


class Tiles(Part, component="vue/tiles.vue"):
    """A grid of any number of images of a collection. The server sends the images in view."""

    def __init__(self, browser: "Browser", rows: np.ndarray) -> None:
        super().__init__(turn=0)
        self._tile = browser.tile
        self._first = 0
        self._count = _SHOWN
        self.on("look", self._look)
        self.on("open", lambda event: browser.open(event.args))
        self.on("mark", lambda event: browser.switch(*event.args))
        self.show(rows)

    def show(self, rows: np.ndarray) -> None:
        """Show other rows, from the first one on."""
        self._rows = rows
        self._first = 0
        self.props.update(total=len(rows), turn=self.props["turn"] + 1)
        self.draw()

    def draw(self) -> None:
        """Show the rows in view as they are now."""
        rows = self._rows[self._first : self._first + self._count].tolist()
        self.props.update(first=self._first, tiles=[self._tile(row) for row in rows])

    def _look(self, event: events.GenericEventArguments) -> None:
        self._first, self._count = event.args
        self.draw()


class Browser:
    """The page of a collection in one tab: images that some terms find, and what is decided on the marked ones.

    rows: of the images that are shown; marked: paths.
    """

    def __init__(self, shelf: Shelf, name: str, collection: Collection) -> None:
        self.shelf = shelf
        self.name = name
        self.collection = collection
        self.rows = np.empty(0, np.int64)
        self.marked = set[str]()
        self._is_chosen = False  # what is found, from outside, so that decisions leave it on the screen
        self._last = 0  # the row that was marked last
        self._done: list[list[Decision]] = []
        self._lock = asyncio.Lock()

    async def build(self) -> None:
        """Build the page for the terms in its address."""
        column = self.collection.table["label"]
        names = ["tags", "label", "split", "rating"]
        labels = count_values(column)
        if labels:
            names.sort(key="label".__ne__)  # it comes first
        self._finder = Finder(name=self.name, text="", marked=0, done=0, labels=[*map(escape_controls, labels)])
        self._finder.on("find", lambda event: self._go(event.args)).on("act", self._act)
        with self._finder:
            upload = ui.upload(auto_upload=True, on_upload=self._find_like).props("flat accept=image/*")
        upload.on("uploaded", upload.reset, args=[])
        with upload.add_slot("header"):
            Chooser(label="Find by a picture")
        with self._finder.add_slot("says"):
            self._status = show_status()
        self._box = ui.dialog().props("full-width aria-label='an image'")
        self._tell = bind_address("find", self._go)
        self._tell_image = bind_address("image", self._go_to)
        self._box.on_value_change(lambda event: event.value or self._tell_image(""))
        with ui.element("div").classes("browse"):
            self._tiles = Tiles(self, self.rows)
            self._counts = Sheet("count", names, "term", self._count)
            self._counts.on("pick", lambda event: self._go(f"{self._finder.props['text']} {event.args}".strip()))
        await self._find()

    def _go(self, text: str) -> None:
        self._finder.props["text"] = text
        ui.timer(0, self._find, once=True)

    def _go_to(self, text: str) -> None:
        """Open the image of a row, or close the dialog."""
        if text.isdecimal() and int(text) < len(self.collection):
            ui.timer(0, functools.partial(self.open, int(text)), once=True)
        else:
            self._box.close()

    async def _act(self, event: events.GenericEventArguments) -> None:
        """Do what a button says."""
        title, text = event.args
        if title in _CHANGES:
            await self._decide(*_CHANGES[title], text)
        elif (done := _ACTS[title](self)) is not None:
            await done

    def tile(self, row: int) -> Json:
        """Return what a small image shows."""
        view = self.collection.row(row)
        src = image_address(self.name, self.collection, row)
        path = escape_controls(view.path)
        text = escape_controls(view.label or view.path.rpartition("/")[2])
        text = text if view.weight else f"left out: {text}"
        return {"id": row, "src": src, "path": path, "text": text, "marked": view.path in self.marked}

    def mark(self, rows: np.ndarray) -> None:
        """Mark rows, too."""
        self.marked |= {*self.collection.table["path"].take(rows).to_pylist()}
        self._say()

    def switch(self, row: int, is_shift: bool) -> None:
        """Mark a row or take the mark away; with Shift, mark all rows from the last one to this one."""
        ends = np.flatnonzero(np.isin(self.rows, [row, self._last]))
        self._last = row
        if is_shift and len(ends):
            self.mark(self.rows[ends[0] : ends[-1] + 1])
        else:
            self.marked ^= {self.collection.row(row).path}
            self._say()

    def _say(self) -> None:
        self._finder.props["marked"] = len(self.marked)
        self._tiles.draw()

    def _unmark(self) -> None:
        self.marked.clear()
        self._say()

    async def show(self, rows: np.ndarray) -> None:
        """Show rows, from the first one on, and what is counted in them."""
        self.rows = rows
        self._is_chosen = True
        self._status.text = f"{len(rows):,} of {len(self.collection):,} images"
        self._tiles.show(rows)
        await self._counts.fill()

    async def _find(self) -> None:
        async with self._lock:  # the last search stays, also if one before it takes longer
            text = self._finder.props["text"]
            with show_fault(self._status):
                rows = await asyncio.to_thread(search_of(self.collection).find, text)
                self._tell(text)
                await self.show(rows)
                self._is_chosen = False
                if not len(rows):
                    self._status.text += ": remove a term, or write -TERM for images without it"

    def _count(self, column: str) -> tuple[Json, list[Json]]:
        rows = value_rows(search_of(self.collection), self.rows, column)
        return {"shown": column, "images": "images", "share": "share", "lift": "× usual"}, rows

    async def _find_like(self, event: events.UploadEventArguments) -> None:
        """Show the images most like a picture."""
        content = await event.file.read()
        name = escape_controls(event.file.name)
        with show_fault(self._status, UnreadableImage), show_share(self._status) as tell:
            config = self.shelf.config(self.name)
            rows, says = await asyncio.to_thread(find_like, self.collection, config, (content, name), tell)
            await self.show(rows)
            self._status.text = f"The {len(rows)} images most like {name}, the most similar first, by {says}"

    async def _decide(self, field: str, make: Callable[[Any, str], Any], text: str) -> None:
        change = functools.partial(make, text=text)
        lines = await asyncio.to_thread(decide_all, self.collection, self.marked, field, change, name_tab())
        if lines:
            self._done.append(lines)
        await self._write(lines)

    async def _group(self) -> None:
        number = zlib.crc32(min(self.marked, default="").encode())
        await self._decide("group", lambda was, text: number, "")

    async def _undo(self) -> None:
        lines = self._done.pop() if self._done else []
        await self._write([line.changed({"verdict": "undone", "now": line.was}) for line in lines])

    async def _write(self, lines: list[Decision]) -> None:
        """Write decisions, and show the collection with them."""
        root = self.collection.root
        config = self.shelf.config(self.name)
        message = "Nothing is written: corrections are for one folder here (data.root), and data.corrections=true"
        if config.corrections and not config.concepts and isinstance(root, Path):
            _, fault = await asyncio.to_thread(desk_of(root).sync, lines)
            message = fault or f"{len(lines):,} decisions are in corrections.jsonl"
            self.collection = await asyncio.to_thread(self.shelf.open, self.name, again=True)
        self._finder.props["done"] = len(self._done)
        ui.notify(escape_controls(message, keep="\n"))
        await (self.show(self.rows) if self._is_chosen else self._find())

    async def _save(self) -> None:
        """Let the browser save a manifest of images; `data.table=FILE` takes it."""
        file = io.BytesIO()
        pq.write_table(take_images(self.collection, self._chosen()), file)
        ui.download.content(file.getvalue(), "images.parquet")

    def _list(self) -> None:
        ui.download("\n".join(sorted(self._chosen())).encode(), "images.txt")

    def _chosen(self) -> set[str] | list[str]:
        """Return the paths of the marked images, or of all that are found."""
        return self.marked or self.collection.table["path"].take(self.rows).to_pylist()

    async def open(self, row: int) -> None:
        """Show an image in a dialog."""
        facts = await asyncio.to_thread(describe_image, self.shelf, self.name, self.collection, row)
        self._box.clear()
        with self._box, ui.card().classes("w-full") as card, ui.element("div").classes("look"):
            shown = ui.image(image_address(self.name, self.collection, row, 1024))
            shown.style("height: min(60vh, 90vw)").props["alt"] = escape_controls(facts["path"])
            FactList(facts={escape_controls(key): escape_controls(value) for key, value in facts.items()})
        self._box.open()
        self._tell_image(str(row))
        leads = await asyncio.to_thread(search_of(self.collection).leads)
        copies = np.flatnonzero(leads == leads[row])
        if len(copies) > 1 and not card.is_deleted:
            with card:
                ui.label(f"{len(copies):,} equal or similar images").classes("text-weight-medium")
                Tiles(self, copies)


_ACTS = {  # by the title of a button of vue/finder.vue
    "Mark all found": lambda browser: browser.mark(browser.rows),
    "Unmark all": Browser._unmark, "Undo": Browser._undo, "Group": Browser._group, "Save manifest": Browser._save,
    "Save list": Browser._list,
}  # fmt: skip


class Atlas(Part, component="vue/atlas.vue"):
    """A map of images."""


async def show_map(browser: Browser) -> None:
    """Show the map of a collection, when its images are read. Raises UserError (`data.root`)."""
    from data.collection.choose import spread
    from engine.frozen.propose import read_points

    collection = browser.collection
    status = show_status("Looking at the images")
    rows = spread(np.arange(len(collection)), MOST)
    with show_share(status) as tell:
        config = browser.shelf.config(browser.name)
        points, says = await asyncio.to_thread(read_points, collection, config, rows, tell)
    status.text = "Placing the images"
    places = await asyncio.to_thread(map_images, points.numpy())
    status.text = escape_controls(f"{len(rows):,} of {len(collection):,} images, by {says}")

    def draw() -> None:
        """Colour the images by the values that the collection has now."""
        atlas.props["values"] = browser.collection.table[colour.value].take(rows).to_pylist()

    async def choose(event: events.GenericEventArguments) -> None:
        """Show and mark the images in a lasso."""
        await browser.show(rows[event.args])
        browser.mark(rows[event.args])

    names = [name for name in ("label", "split", *collection.table.column_names[8:]) if name not in TAG_LISTS]
    colour = ui.select(names, value="label", label="colour").classes("w-40").on_value_change(draw)
    atlas = Atlas(places=places.tolist(), rows=rows.tolist(), colours=COLOURS, values=[])
    atlas.props["address"] = f"/image/{browser.name}/{collection.fingerprint}/"
    atlas.props("role=img aria-label='map of the images'").on("choose", choose)
    bind_choice(colour, "colour", names)
    draw()
