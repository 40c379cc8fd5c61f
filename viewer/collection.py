"""`/collection/NAME?find=...`: the images of a collection, found by terms (data/collection/search.py).

Only the thumbnails near the visible part exist, so a collection may have millions of rows.
"""

import asyncio
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
from nicegui import ui
from PIL import ExifTags

from data.collection.collection import Collection
from data.collection.search import Search, quote_value
from data.images.convert import convert, load_upright
from data.images.open import open_image
from data.layouts.table import TAG_LISTS
from data.stream.source import UnreadableImage
from utils.errors import UserError
from utils.formats.spelling import parse_tag
from utils.formats.vocabulary import category_name
from utils.io.files import Json
from utils.io.safe_text import escape_controls
from viewer.images import Shelf, image_address
from viewer.parts import filtered_table, make_columns, run_name
from viewer.site import Site

_TILE_PX = 158  # the least width of a tile, with its gap
_LINE_PX = 176  # its height
_HIGHEST_PX = 16_000_000  # of an element in every browser; beyond it a pixel of the scroll bar is several
_COUNTED = 500  # values in the table
_STYLE = """
.browse { display: grid; gap: 16px; width: 100%; grid-template-columns: minmax(0, 1fr) 340px }
.nicegui-scroll-area .q-scrollarea__content { padding: 0 }
.thumbs { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); gap: 8px; padding: 2px }
.tile { height: 168px; padding: 4px; border: 0; border-radius: 6px; font: inherit; color: inherit;
  background: #868e9622 }
.tile img { width: 100%; height: 134px; object-fit: contain; display: block }
.tile span { font-size: 13px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; display: block }
.facts { display: grid; align-content: start; gap: 4px 12px;
  grid-template-columns: fit-content(35%) minmax(0, 1fr); overflow-wrap: anywhere }
.trained { gap: 4px 16px; max-height: 96px; overflow: auto }
.muted.mono { overflow-wrap: anywhere }
@media (max-width: 900px) { .browse { grid-template-columns: minmax(0, 1fr) } }
"""
_TILE = """<button class="tile cursor-pointer" :title="props.row.path" @click="$parent.$emit('open', props.row.row)">
<img :src="props.row.src" :alt="props.row.path" /><span>{{ props.row.text }}</span></button>"""

search_of = functools.lru_cache(maxsize=4)(Search)  # shared by all tabs


class Tiles:
    """A grid of thumbnails that scrolls over any number of rows. tile: makes one; choose: called with a tile's row."""

    def __init__(self, tile: Callable[[int], Json], choose: Callable[[int], Any], height: str = "72vh") -> None:
        self._tile = tile
        self._rows = np.empty(0, np.int64)
        self._seen = (0.0, 700.0, 600.0)
        self._drawn: tuple[list[int], str] | None = None
        self._area = ui.scroll_area(on_scroll=self._scroll).style(f"height: {height}").props("tabindex=0")
        with self._area, ui.element("div").classes("w-full") as self._space:
            self._table = ui.table(columns=[], rows=[], row_key="row").on("open", lambda event: choose(event.args))
        self._table.props("grid hide-header hide-bottom card-container-class=thumbs :rows-per-page-options=[0]")
        self._table.add_slot("item", _TILE)

    def show(self, rows: np.ndarray) -> None:
        """Show other rows, from the first one on."""
        self._rows = rows
        self._seen = (0.0, *self._seen[1:])
        self._area.scroll_to(pixels=0)
        self._drawn = None
        self._draw()

    def _scroll(self, event: Any) -> None:
        self._seen = event.vertical_position, event.vertical_container_size, event.horizontal_container_size
        self._draw()

    def _draw(self) -> None:
        top, view, width = self._seen
        columns = max(2, int(width // _TILE_PX))
        whole = -(-len(self._rows) // columns) * _LINE_PX
        high = min(whole, _HIGHEST_PX)
        at = top * max(whole - view, 0) / max(high - view, 1)  # if the bar had the whole height
        first = max(0, int(at // _LINE_PX) - 2)
        last = first + int(view // _LINE_PX) + 6
        style = f"height: {high}px; --columns: {columns}; padding-top: {top - at + first * _LINE_PX:.0f}px"
        rows = self._rows[first * columns : last * columns].tolist()
        if (rows, style) == self._drawn:  # the page makes tiles anew, and a tile with the focus loses it
            return
        self._drawn = rows, style
        self._space.style(style)
        self._table.rows = [self._tile(row) for row in rows]


def describe_image(shelf: Shelf, name: str, collection: Collection, row: int) -> dict[str, str]:
    """Return what the collection and the file say of an image: columns, tags by category, EXIF, or why not."""
    facts = {"file": f"{collection.root}/{collection.row(row).path}"}
    for column, value in collection.table.slice(row, 1).to_pylist()[0].items():
        for text in value or () if column in TAG_LISTS else ():
            key = f"{column}: {category_name(parse_tag(text).category or 0)}"
            facts[key] = f"{facts[key]}, {text}" if key in facts else text
        if value is not None and column not in TAG_LISTS:
            facts[column] = str(value)
    try:
        content = shelf.read(name, collection, row)
        with open_image(content, facts["path"], shelf.config(name).max_pixels) as image:
            facts |= {"format": image.format, "pixels": f"{image.width} x {image.height}, {image.mode}"}
            facts |= {ExifTags.TAGS.get(key, str(key)): str(value)[:200] for key, value in image.getexif().items()}
            convert(load_upright(image), 3, None)  # whether it can be decoded
    except UnreadableImage as error:
        facts["unreadable"] = error.reason
    return facts


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


def list_collections(shelf: Shelf) -> Iterator[tuple[str, str, str, list[str]]]:
    """Yield names of collections, of their folders, their roots with settings, and the names of runs."""
    runs = shelf.of_runs()
    for name, config in dict(shelf.configs).items():
        settings = [f"{key}={value}" for key, value in config.index_settings().items() if value]
        trained = [run_name(shelf.runs, run) for run, its in runs.items() if its == name]
        yield name, show_folder(config.root), escape_controls("  ".join([config.root, *settings])), trained


def add_page(site: Site) -> None:
    """Add the page of a collection, and the list of all."""
    shelf = site.shelf

    @ui.page("/collection")
    async def show_all() -> None:
        with site.page("Collections"):
            ui.add_css(_STYLE)
            rows = await asyncio.to_thread(lambda: list(list_collections(shelf)))
            for name, title, about, runs in rows:
                with ui.column().classes("gap-1 w-full"):
                    ui.link(title, f"/collection/{name}").classes("text-weight-medium")
                    ui.label(about).classes("mono muted")
                    with ui.row().classes("trained"):
                        ui.label(f"runs: {len(runs)}").classes("muted")
                        for run in runs:
                            ui.link(escape_controls(run.partition("/")[2]), f"/run/{quote(run)}")
            if not rows:
                ui.label("No collection yet: python view.py data.root=PATH shows one, and so does a run.")

    @ui.page("/collection/{name}")
    async def show(name: str, find: str = "") -> None:
        root = shelf.config(name).root
        with site.page(show_folder(root)):
            ui.add_css(_STYLE)
            ui.label(escape_controls(root)).classes("mono muted")
            wait = ui.spinner(size="lg")
            await ui.context.client.connected()
            try:
                collection = await asyncio.to_thread(shelf.open, name, again=True)
            except UserError as error:
                ui.label(escape_controls(str(error))).classes("text-negative")
            else:
                await _Browser(shelf, name, search_of(collection)).build(find)
            wait.delete()


class _Browser:
    """The page of a collection: its images that some terms find, and what is counted in them."""

    def __init__(self, shelf: Shelf, name: str, search: Search) -> None:
        self._shelf = shelf
        self._name = name
        self._search = search
        self._collection = search.collection
        self._found = np.empty(0, np.int64)
        self._lock = asyncio.Lock()

    async def build(self, text: str) -> None:
        """Build the page for some terms."""
        with ui.row(wrap=False):
            self._terms = ui.input(
                value=text, placeholder='1girl -hat character:* split=val caption:"red house" copies>1'
            )
            self._terms.props("aria-label=find").classes("col")
            self._terms.on("keydown.enter", self._find)
            ui.button("Find", on_click=self._find)
        self._said = ui.label()
        names = ["tags", "label", "split", "rating"]
        if self._collection.table["label"].null_count < len(self._collection):
            names.sort(key="label".__ne__)  # it comes first
        with ui.element("div").classes("browse"):
            self._tiles = Tiles(self._tile, self._open)
            with ui.element("div"):
                self._count = await filtered_table(names, "count", "term", self._fill)
        self._box = ui.dialog().props("full-width")
        await self._find()

    def _tile(self, row: int) -> Json:
        view = self._collection.row(row)
        src = image_address(self._name, self._collection, row)
        path = escape_controls(view.path)
        text = escape_controls(view.label or view.path.rpartition("/")[2])
        return {"row": row, "src": src, "path": path, "text": text}

    async def _add(self, term: str) -> None:
        self._terms.set_value(f"{self._terms.value or ''} {term}".strip())
        await self._find()

    async def _find(self) -> None:
        async with self._lock:  # the last search stays, also if one before it takes longer
            text = self._terms.value or ""
            try:
                self._found = await asyncio.to_thread(self._search.find, text)
            except UserError as error:
                self._said.set_text(escape_controls(str(error)))
                return
            advice = "" if len(self._found) else ": remove a term, or write -TERM for images without it"
            self._said.set_text(f"{len(self._found):,} of {len(self._collection):,} images{advice}")
            ui.navigate.history.replace(f"/collection/{self._name}?{urlencode({'find': text})}")
            self._tiles.show(self._found)
            await self._count()

    async def _fill(self, table: ui.table, column: str) -> None:
        if not table.columns:
            table.on("rowClick", lambda event: self._add(event.args[1]["term"]))
        table.columns = make_columns({"shown": column, "images": "count", "share": "share", "lift": "x usual"})
        table.rows = await asyncio.to_thread(value_rows, self._search, self._found, column)

    async def _open(self, row: int) -> None:
        facts = await asyncio.to_thread(describe_image, self._shelf, self._name, self._collection, row)
        self._box.clear()
        with self._box, ui.card().classes("w-full") as card, ui.element("div").classes("charts w-full"):
            shown = ui.image(image_address(self._name, self._collection, row, 1024))
            shown.style("height: min(60vh, 90vw)")
            with ui.element("div").classes("facts"):
                for key, value in facts.items():
                    ui.label(escape_controls(key)).classes("muted")
                    ui.label(escape_controls(value))
        self._box.open()
        leads = await asyncio.to_thread(self._search.leads)
        copies = np.flatnonzero(leads == leads[row])
        if len(copies) > 1 and not card.is_deleted:
            with card:
                ui.label(f"{len(copies):,} equal or similar images").classes("text-weight-medium")
                Tiles(self._tile, self._open, "184px").show(copies)
