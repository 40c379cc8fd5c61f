"""`/collection/NAME?find=...`: the images of a collection, found by terms (data/collection/search.py).

Only the thumbnails near the visible part exist, so a collection may have millions of rows.
"""

import functools
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

import numpy as np
from nicegui import run as background
from nicegui import ui
from PIL import ExifTags, Image

from data.collection.collection import Collection
from data.collection.search import Search, quote_value
from data.images.image_formats import open_image
from data.images.pixels import convert, load_upright
from data.layouts.spelling import parse_tag
from data.layouts.table import TAG_LISTS
from data.stream.source import UnreadableImage
from utils.errors import UserError
from utils.io.safe_text import escape_controls
from utils.vocabulary import category_name
from viewer.images import Shelf, image_address
from viewer.parts import page

_TILE_PX, _LINE_PX = 158, 176  # the least width and the height of a tile, with its gap
_HIGHEST_PX = 16_000_000  # of an element in every browser; beyond it a pixel of the scroll bar is several
_COUNTED = 500  # values in the table
_STYLE = """
.browse { display: grid; gap: 16px; width: 100%; grid-template-columns: minmax(0, 1fr) 340px }
.nicegui-scroll-area .q-scrollarea__content { padding: 0 }
.tiles { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); gap: 8px; padding: 2px }
.tile { height: 168px; padding: 4px; border: 0; border-radius: 6px; font: inherit; color: inherit;
  background: #868e9622 }
.tile img { width: 100%; height: 134px; object-fit: contain; display: block }
.tile span { font-size: 13px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; display: block }
.facts { display: grid; gap: 4px 12px; grid-template-columns: max-content minmax(0, 1fr); overflow-wrap: anywhere }
@media (max-width: 900px) { .browse { grid-template-columns: minmax(0, 1fr) } }
"""
_TILE = """<button class="tile cursor-pointer" :title="props.row.path" @click="$parent.$emit('open', props.row.row)">
<img :src="props.row.src" :alt="props.row.path" /><span>{{ props.row.text }}</span></button>"""

search_of = functools.lru_cache(maxsize=4)(Search)  # shared by all tabs


class Tiles:
    """A grid of thumbnails that scrolls over any number of rows. tile: makes one; choose: called with a tile's row."""

    def __init__(
        self, tile: Callable[[int], dict[str, Any]], choose: Callable[[int], Any], height: str = "72vh"
    ) -> None:
        self._tile, self._rows, self._seen = tile, np.empty(0, np.int64), (0.0, 700.0, 600.0)
        self._area = ui.scroll_area(on_scroll=self._scroll).style(f"height: {height}").props("tabindex=0")
        with self._area, ui.element("div").classes("w-full") as self._space:
            self._table = ui.table(columns=[], rows=[], row_key="row").on("open", lambda event: choose(event.args))
        self._table.props("grid hide-header hide-bottom card-container-class=tiles :rows-per-page-options=[0]")
        self._table.add_slot("item", _TILE)

    def show(self, rows: np.ndarray) -> None:
        """Show other rows, from the first one on."""
        self._rows, self._seen = rows, (0.0, *self._seen[1:])
        self._area.scroll_to(pixels=0)
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
        self._space.style(f"height: {high}px; --columns: {columns}; padding-top: {top - at + first * _LINE_PX:.0f}px")
        self._table.rows = [self._tile(row) for row in self._rows[first * columns : last * columns].tolist()]


def describe_image(shelf: Shelf, name: str, collection: Collection, row: int) -> dict[str, str]:
    """Return what the collection and the file say of an image: columns, tags by category, EXIF, or why not."""
    facts = {"file": str(collection.absolute_path(row))}
    for column, value in collection.table.slice(row, 1).to_pylist()[0].items():
        for text in value or () if column in TAG_LISTS else ():
            key = f"{column}: {category_name(parse_tag(text).category or 0)}"
            facts[key] = f"{facts[key]}, {text}" if key in facts else text
        if value is not None and column not in TAG_LISTS:
            facts[column] = str(value)

    def read(image: Image.Image) -> dict[str, str]:
        exif = {ExifTags.TAGS.get(key, str(key)): str(value)[:200] for key, value in image.getexif().items()}
        found = {"format": image.format, "pixels": f"{image.width} x {image.height}, {image.mode}", **exif}
        convert(load_upright(image), 3, None)  # whether it can be decoded
        return found

    try:
        content, limit = shelf.read(name, collection, row), shelf.config(name).max_pixels
        facts |= open_image(content, facts["path"], limit, read)
    except UnreadableImage as error:
        facts["unreadable"] = error.reason
    return facts


def count_values(search: Search, rows: np.ndarray, column: str) -> list[dict[str, Any]]:
    """Return the rows of the table of values: images, share, and how many times as frequent as in all images."""
    usual = dict(search.count(np.arange(len(search.collection)), column))
    return [
        {
            "value": value, "shown": escape_controls(value), "images": images, "share": f"{images / len(rows):.1%}",
            "lift": round(images / len(rows) * len(search.collection) / usual[value], 2),
        }
        for value, images in search.count(rows, column)[:_COUNTED]
    ]  # fmt: skip


def add_page(shelf: Shelf) -> None:
    """Add the page of a collection, and the list of all."""

    @ui.page("/collection")
    async def show_all() -> None:
        with page("Collections"):
            configs = await background.io_bound(shelf.configs)
            for name, config in configs.items():
                ui.link(escape_controls(config.root), f"/collection/{name}").classes("mono")
            if not configs:
                ui.label("No collection yet: python view.py data.root=PATH shows one, and so does a run.")

    @ui.page("/collection/{name}")
    async def show(name: str, find: str = "") -> None:
        with page(escape_controls(shelf.config(name).root)):
            ui.add_css(_STYLE)
            wait = ui.spinner(size="lg")
            await ui.context.client.connected()
            try:
                collection = await background.io_bound(shelf.open, name, again=True)
            except UserError as error:
                ui.label(escape_controls(str(error))).classes("text-negative")
            else:
                await _browse(shelf, name, search_of(collection), find)
            wait.delete()


async def _browse(shelf: Shelf, name: str, search: Search, text: str) -> None:
    collection, found = search.collection, np.empty(0, np.int64)
    counted = "label" if collection.table["label"].null_count < len(collection) else "tags"

    def tile(row: int) -> dict[str, Any]:
        view = collection.row(row)
        path, text = escape_controls(view.path), escape_controls(view.label or view.path.rpartition("/")[2])
        return {"row": row, "src": image_address(name, collection, row), "path": path, "text": text}

    async def apply() -> None:
        nonlocal found
        try:
            found = await background.io_bound(search.find, terms.value or "")
        except UserError as error:
            said.set_text(escape_controls(str(error)))
            return
        said.set_text(f"{len(found):,} of {len(collection):,} images")
        ui.navigate.history.replace(f"/collection/{name}?{urlencode({'find': terms.value or ''})}")
        tiles.show(found)
        await count()

    async def count() -> None:
        table.rows = await background.io_bound(count_values, search, found, column.value)

    async def add(term: str) -> None:
        terms.set_value(f"{terms.value or ''} {term}".strip())
        await apply()

    async def open_row(row: int) -> None:
        facts = await background.io_bound(describe_image, shelf, name, collection, row)
        box.clear()
        with box, ui.card().classes("w-full") as card, ui.element("div").classes("charts w-full"):
            shown = ui.image(image_address(name, collection, row, 1024)).props("fit=contain no-spinner")
            shown.style("height: min(60vh, 90vw)")
            with ui.element("div").classes("facts").style("align-content: start"):
                for key, value in facts.items():
                    ui.label(escape_controls(key)).classes("muted")
                    ui.label(escape_controls(value))
        box.open()
        copies = await background.io_bound(lambda: np.flatnonzero(search.leads() == search.leads()[row]))
        if len(copies) > 1 and not card.is_deleted:
            with card:
                ui.label(f"{len(copies):,} equal or similar images").classes("text-weight-medium")
                Tiles(tile, open_row, "184px").show(copies)

    with ui.row().classes("items-center no-wrap w-full"):
        terms = ui.input(value=text, placeholder='1girl -hat character:* split=val caption:"red house" width>=512')
        terms.props("clearable dense outlined aria-label=find").classes("col").on("keydown.enter", apply)
        ui.button("Find", on_click=apply).props("no-caps unelevated")
    with ui.row().classes("items-center").style("gap: 4px"):
        said = ui.label().classes("muted")
        terms_of = {"split": "=val", "copies": ">1", "reason": ":unreadable", "weight": "=0"}
        for term in (f"{column}{rest}" for column, rest in terms_of.items() if column in search.columns):
            ui.button(term, on_click=lambda _, term=term: add(term)).props("flat dense no-caps")
    with ui.element("div").classes("browse"):
        tiles = Tiles(tile, open_row)
        with ui.element("div"):
            column = ui.select(["tags", "label", "split", "rating"], value=counted, on_change=count)
            column.props("dense outlined aria-label=count")
            names = {"shown": "Value", "images": "Images", "share": "Share", "lift": "x usual"}
            columns = [
                {"name": key, "label": label, "field": key, "sortable": True, "align": "left"}
                for key, label in names.items()
            ]
            table = ui.table(columns=columns, rows=[], row_key="value").classes("w-full").style("height: 64vh")
            table.props("flat bordered dense virtual-scroll :rows-per-page-options=[0]")
            table.on(
                "rowClick",
                lambda event: add(
                    ("" if column.value == "tags" else f"{column.value}=") + quote_value(event.args[1]["value"])
                ),
            )
    box = ui.dialog().props("full-width")
    await apply()
