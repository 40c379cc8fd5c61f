"""`/collection/NAME?find=...`: the images of a collection, found by terms (data/collection/search.py)."""

import asyncio
import functools
import io
import itertools
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib.path import Path as Polygon
from nicegui import events, ui

from data.collection.collection import Collection
from data.collection.search import Search, quote_value
from data.layouts.corrections import Decision, desk_of
from data.layouts.table import TAG_LISTS, count_values
from utils.errors import UserError
from utils.formats.spelling import split_tags
from utils.io.files import Json
from utils.io.names import to_nfc
from utils.io.safe_text import escape_controls
from viewer.images import Shelf, image_address
from viewer.map import CHART, LEGEND, MOST, THUMBNAIL, place_images
from viewer.parts import (
    COLOURS,
    GREY,
    bind_address,
    bind_choice,
    filtered_table,
    make_columns,
    run_name,
    show_grid,
    show_share,
)
from viewer.review import find_review
from viewer.select import HINT, STYLE, TILE, decide_all, describe_image, take_images
from viewer.site import Site

_SHOWN = 60  # tiles of a page
search_of = functools.lru_cache(maxsize=4)(Search)  # shared by all tabs
_COUNTED = 500  # values in the table
_STYLE = """
.browse { display: grid; gap: 16px; width: 100%; grid-template-columns: minmax(0, 1fr) 380px }
@media (min-width: 900px) { .actions { position: sticky; top: 58px; z-index: 1; padding: 8px 0;
  backdrop-filter: blur(16px) brightness(1.02) } }
.collections { display: grid; gap: 16px }
.trained { display: flex; flex-wrap: wrap; gap: 4px 16px; max-height: 50vh; overflow: auto }
.trained a { overflow-wrap: anywhere; min-width: 0 }
.term { all: unset; display: block; cursor: pointer; overflow-wrap: anywhere }
.term:focus-visible { outline: 2px solid var(--link); outline-offset: 2px }
.muted.mono { overflow-wrap: anywhere }
@media (max-width: 900px) { .browse { grid-template-columns: minmax(0, 1fr) } }
"""
_COLLECTION = """<div><a class="text-weight-medium" :href="'/collection/' + props.row.name">{{ props.row.folder }}</a>
<div class="mono muted">{{ props.row.about }}</div><div class="trained">
<span class="muted">runs: {{ Object.keys(props.row.runs).length }}</span>
<a v-for="(text, address) in props.row.runs" :href="address">{{ text }}</a></div></div>"""
_FACT = """<div class="muted">{{ props.row.id }}</div><div>{{ props.row.text }}</div>"""
_TERM = '<q-td :props="props"><button class="term">{{ props.row.shown }}</button></q-td>'  # its click is its row's


def value_rows(search: Search, rows: np.ndarray, column: str) -> list[Json]:
    """Return the rows of the table of values: images, share, and how many times as frequent as in all images."""
    every = np.arange(len(search.collection))
    usual = search.count(every, column)
    sign = "" if column == "tags" else f"{column}="
    found = []
    for value, images in itertools.islice(search.count(rows, column).items(), _COUNTED):
        share = images / len(rows)
        lift = round(share * len(every) / usual[value], 2)
        shown = {"term": sign + quote_value(value), "shown": escape_controls(value)}
        found.append({**shown, "images": images, "share": f"{share:.1%}", "lift": lift})
    return found


def show_folder(root: str) -> str:
    """Return the name of a collection's folder."""
    return escape_controls(root.rstrip("/").rpartition("/")[2] or root)


def list_collections(shelf: Shelf) -> Iterator[Json]:
    """Yield rows about collections: `name`, `folder`, `about` (root and settings), and the addresses of `runs`."""
    runs = shelf.of_runs()
    for name, config in dict(shelf.configs).items():
        settings = [f"{key}={value}" for key, value in config.index_settings().items() if value]
        about = escape_controls("  ".join([config.root, *settings]))
        trained = [run_name(shelf.runs, run) for run, its in runs.items() if its == name]
        links = {f"/run/{quote(run)}": escape_controls(run.partition("/")[2]) for run in trained}
        yield {"name": name, "folder": show_folder(config.root), "about": about, "runs": links}


def add_page(site: Site) -> None:
    """Add the page of a collection, and the list of all."""
    shelf = site.shelf

    @ui.page("/collection")
    async def show_all() -> None:
        with site.page("Collections"):
            ui.add_css(_STYLE)
            rows = await asyncio.to_thread(lambda: list(list_collections(shelf)))
            show_grid("collections", _COLLECTION, rows)
            if not rows:
                ui.label("No collection yet: python view.py data.root=PATH shows one, and so does a run.")

    @ui.page("/map")
    @ui.page("/collection/{collection}")
    async def show(collection: str) -> None:
        root = shelf.config(collection).root
        with site.page(show_folder(root)):
            ui.label(escape_controls(root)).classes("mono muted")
            if address := await asyncio.to_thread(find_review, shelf.runs, root):
                ui.link("Review its labels", address)
            ui.link("Label these images", f"/label?collection={collection}")
            ui.link("Tag them", f"/label?collection={collection}&field=tags")
            wait = ui.spinner(size="lg")
            await ui.context.client.connected()
            try:
                browser = Browser(shelf, collection, await asyncio.to_thread(shelf.open, collection, again=True))
                place = ui.column().classes("w-full")
                await browser.build()
                if ui.context.client.page.path == "/map":
                    with place:
                        await show_map(browser)
            except UserError as error:
                ui.label(escape_controls(str(error))).classes("text-negative")
            wait.delete()


class Tiles:
    """Pages of thumbnails of any number of rows."""

    def __init__(self, browser: "Browser") -> None:
        self._tile = browser.tile
        self._rows = browser.found
        self._pages = ui.pagination(1, 1, direction_links=True, on_change=self.draw).props("max-pages=6")
        self._table = show_grid("thumbs", TILE).on("open", lambda event: browser.open(event.args))
        self._table.on("mark", lambda event: browser.switch(*event.args))

    def show(self, rows: np.ndarray) -> None:
        """Show other rows, from the first one on."""
        self._rows = rows
        self._pages.max = max(1, -(-len(rows) // _SHOWN))
        self._pages.value = 1
        self.draw()

    def draw(self) -> None:
        """Show the rows of the page as they are now."""
        first = (self._pages.value - 1) * _SHOWN
        self._table.rows = [self._tile(row) for row in self._rows[first : first + _SHOWN].tolist()]


class Browser:
    """The page of a collection in one tab: images that some terms find, and what is decided on the marked ones.

    found: rows; marked: paths.
    """

    def __init__(self, shelf: Shelf, name: str, collection: Collection) -> None:
        self.shelf = shelf
        self.name = name
        self.collection = collection
        self.found = np.empty(0, np.int64)
        self.marked = set[str]()
        self._is_chosen = False  # what is found, from outside, so that decisions leave it on the screen
        self._last = 0  # the row that was marked last
        self._done: list[list[Decision]] = []
        self._lock = asyncio.Lock()

    async def build(self) -> None:
        """Build the page for the terms in its address."""
        ui.add_css(STYLE + _STYLE)
        with ui.row(wrap=False):
            self._terms = ui.input(placeholder='1girl -hat character:* split=val caption:"red house" copies>1')
            self._terms.props("aria-label=find").classes("col")
            self._terms.on("keydown.enter", self._find)
            ui.button("Find", on_click=self._find)
            ui.link("Map", f"/map?collection={self.name}")
        self._said = ui.label().props("role=status")
        names = ["tags", "label", "split", "rating"]
        labels = count_values(self.collection.table["label"])
        if labels:
            names.sort(key="label".__ne__)  # it comes first
        self._box = ui.dialog().props("full-width aria-label='an image'")
        self._tell = bind_address("find", self._go)
        self._tell_image = bind_address("image", self._go_to)
        self._box.on_value_change(lambda event: event.value or self._tell_image(""))
        with ui.element("div").classes("browse"):
            with ui.element("div"):
                with ui.row().classes("gap-2 actions"):
                    self._build_bar([*labels])
                self._tiles = Tiles(self)
            with ui.element("div"):
                async with self._lock:  # a search waits until all is built
                    self._count = await filtered_table(names, "count", "term", self._fill)
        await self._find()

    def _go(self, text: str) -> None:
        self._terms.value = text
        ui.timer(0, self._find, once=True)

    def _go_to(self, text: str) -> None:
        """Open the image of a row, or close the dialog."""
        if text.isdecimal() and int(text) < len(self.collection):
            ui.timer(0, functools.partial(self.open, int(text)), once=True)
        else:
            self._box.close()

    def _build_bar(self, labels: list[str]) -> None:
        text = ui.input(placeholder="a label, or tags", autocomplete=labels).props("aria-label='a label, or tags'")
        words = lambda: split_tags(text.value or "")  # noqa: E731
        changes = {"Relabel": ("label", lambda was: to_nfc((text.value or "").strip()) or was)}
        changes["Add tags"] = "tags", lambda had: [*dict.fromkeys([*had, *words()])]
        changes["Take tags away"] = "tags", lambda had: [tag for tag in had if tag not in words()]
        changes["Leave out"] = "weight", lambda was: 0.0
        changes["Take in"] = "weight", lambda was: was or 1.0
        ui.button("Mark all found", on_click=lambda: self.mark(self.found))
        ui.button("Unmark all", on_click=lambda: self.marked.clear() or self._say())
        for title, change in changes.items():
            ui.button(title, on_click=functools.partial(self._decide, *change))
        ui.button("Group", on_click=self._group)
        ui.button("Undo", on_click=self._undo)
        ui.button("Save manifest", on_click=self._save)
        ui.button("Save list", on_click=lambda: ui.download("\n".join(sorted(self.marked)).encode(), "marked.txt"))
        self._marks = ui.label().props("role=status")
        ui.label(HINT).classes("muted")

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
        """Mark a row or take its mark away; with Shift, mark all from the last one to it."""
        ends = np.flatnonzero(np.isin(self.found, [row, self._last]))
        self._last = row
        if is_shift and len(ends):
            self.mark(self.found[ends[0] : ends[-1] + 1])
        else:
            self.marked ^= {self.collection.row(row).path}
            self._say()

    def _say(self) -> None:
        self._marks.text = f"{len(self.marked):,} marked"
        self._tiles.draw()

    async def show(self, rows: np.ndarray) -> None:
        """Show rows, from the first one on, and what is counted in them."""
        self.found = rows
        self._is_chosen = True
        self._said.text = f"{len(rows):,} of {len(self.collection):,} images"
        self._tiles.show(rows)
        await self._count()

    async def _find(self) -> None:
        async with self._lock:  # the last search stays, also if one before it takes longer
            text = self._terms.value or ""
            try:
                found = await asyncio.to_thread(search_of(self.collection).find, text)
            except UserError as error:
                self._said.set_text(escape_controls(str(error)))
                return
            self._tell(text)
            await self.show(found)
            self._is_chosen = False
            if not len(found):
                self._said.text += ": remove a term, or write -TERM for images without it"

    async def _fill(self, table: ui.table, column: str) -> None:
        if not table.columns:
            table.add_slot("body-cell-shown", _TERM)
            table.on("rowClick", lambda event: self._go(f"{self._terms.value or ''} {event.args[1]['term']}".strip()))
        table.columns = make_columns({"shown": column, "images": "count", "share": "share", "lift": "x usual"})
        table.rows = await asyncio.to_thread(value_rows, search_of(self.collection), self.found, column)

    async def _decide(self, field: str, change: Callable[[Any], Any]) -> None:
        by = (ui.context.client.tab_id or "")[:8]
        lines = await asyncio.to_thread(decide_all, self.collection, self.marked, field, change, by)
        if lines:
            self._done.append(lines)
        await self._write(lines)

    async def _group(self) -> None:
        number = zlib.crc32(min(self.marked, default="").encode())
        await self._decide("group", lambda was: number)

    async def _undo(self) -> None:
        lines = self._done.pop() if self._done else []
        await self._write([line.model_copy(update={"verdict": "undone", "now": line.was}) for line in lines])

    async def _write(self, lines: list[Decision]) -> None:
        """Write decisions, and show the collection with them."""
        root = self.collection.root
        config = self.shelf.config(self.name)
        said = "Nothing is written: corrections are for one folder here (data.root), and data.corrections=true"
        if config.corrections and not config.concepts and isinstance(root, Path):
            _, fault = await asyncio.to_thread(desk_of(root).sync, lines)
            said = fault or f"{len(lines):,} decisions are in corrections.jsonl"
            self.collection = await asyncio.to_thread(self.shelf.open, self.name, again=True)
        ui.notify(escape_controls(said, keep="\n"))
        await (self.show(self.found) if self._is_chosen else self._find())

    async def _save(self) -> None:
        """Let the browser save a manifest of the marked images; `data.table=FILE` takes it."""
        file = io.BytesIO()
        pq.write_table(take_images(self.collection, self.marked), file)
        ui.download.content(file.getvalue(), "marked.parquet")

    async def open(self, row: int) -> None:
        """Show an image in a dialog."""
        facts = await asyncio.to_thread(describe_image, self.shelf, self.name, self.collection, row)
        self._box.clear()
        with self._box, ui.card().classes("w-full") as card, ui.element("div").classes("charts w-full"):
            shown = ui.image(image_address(self.name, self.collection, row, 1024))
            shown.style("height: min(60vh, 90vw)").props["alt"] = escape_controls(facts["path"])
            texts = [{"id": escape_controls(key), "text": escape_controls(value)} for key, value in facts.items()]
            show_grid("facts", _FACT, texts)
        self._box.open()
        self._tell_image(str(row))
        leads = await asyncio.to_thread(search_of(self.collection).leads)
        copies = np.flatnonzero(leads == leads[row])
        if len(copies) > 1 and not card.is_deleted:
            with card:
                ui.label(f"{len(copies):,} equal or similar images").classes("text-weight-medium")
                Tiles(self).show(copies)


async def show_map(browser: Browser) -> None:
    """Show the map of a collection, when its images are read. Raises UserError (`data.root`)."""
    from data.collection.choose import spread
    from engine.frozen.propose import read_points

    table = browser.collection.table
    said = ui.label("Looking at the images").props("role=status")
    rows = spread(np.arange(len(table)), MOST)
    config = browser.shelf.config(browser.name)
    with show_share(said) as tell:
        points, says = await asyncio.to_thread(read_points, browser.collection, config, rows, tell)
    said.text = "Placing the images"
    places = await asyncio.to_thread(place_images, points.numpy())
    said.text = escape_controls(f"{len(rows):,} of {len(table):,} images, by {says}")

    def draw() -> None:
        """Draw the images with the values that the collection has now: numbers, or the most frequent texts."""
        column = browser.collection.table[colour.value].take(rows)
        values = column.to_pylist()
        legend = pc.min_max(column).as_py()
        if isinstance(legend["max"], str | None):
            codes = dict(zip(count_values(column), range(len(COLOURS))))
            values = [codes.get(value, -1) for value in values]
            pieces = [{"value": code, "label": name, "color": COLOURS[code]} for name, code in codes.items()]
            legend = {"pieces": [*pieces, {"value": -1, "label": "other", "color": GREY}]}
        points = [*zip(*places.T.tolist(), rows, values)]
        tip = {":formatter": THUMBNAIL % (browser.name, browser.collection.fingerprint)}
        series = [{"type": "scatter", "symbolSize": 6, "data": points}]
        chart.options.update(visualMap=LEGEND | legend, tooltip=tip, series=series)

    async def choose(event: events.GenericEventArguments) -> None:
        """Show and mark the images in a lasso."""
        for area in event.args["areas"]:
            chosen = rows[Polygon(area["coordRange"]).contains_points(places)]
            await browser.show(chosen)
            browser.mark(chosen)

    names = [name for name in ("label", "split", *table.column_names[8:]) if name not in TAG_LISTS]
    colour = ui.select(names, value="label", label="colour").classes("w-40").on_value_change(draw)
    chart = ui.echart({**CHART}).style("height: 60vh").props("role=img aria-label='map of the images'")
    chart.on("chart:brushEnd", choose, ["areas"])
    bind_choice(colour, "colour", names)
    draw()
