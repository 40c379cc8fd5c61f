"""What all pages share: the runs, the collections, the networks, and the frame of a page."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import HTTPException, Request, Response
from nicegui import Client, app, ui

from data.config import DataConfig
from utils.record.run_index import RunIndex
from viewer.images import Shelf
from viewer.networks import Networks
from viewer.parts import ACCENT, Part, show_heading
from viewer.queue import Queue

PATIENCE_SEC = 30.0  # for a page, and for a tab that does not answer: a machine that trains may be slow
_COLOURS = {"primary": ACCENT, "positive": "#237a35", "warning": "#a35200", "negative": "#c92a2a"}


def set_looks() -> None:
    """Set how elements look on all pages."""
    app.config.quasar_config["loadingBar"] = {"skipHijack": True}  # it has no name, and says nothing
    looks = {
        ui.button: "no-caps outline",
        ui.card: "flat bordered",
        ui.image: "fit=contain no-spinner",
        ui.input: "dense outlined clearable",
        ui.select: "dense outlined options-dense",
    }
    for element, look in looks.items():
        element.default_props(look)
    ui.card.default_classes("q-pa-sm")
    ui.row.default_classes("items-center w-full")


@dataclass
class Site:
    """The parts that pages use. data: the settings of a collection, for any root; list_prompts: of a run's pictures."""

    index: RunIndex
    shelf: Shelf
    networks: Networks
    queue: Queue
    data: DataConfig
    list_prompts: Callable[[Path], Sequence[Any]]

    @contextmanager
    def page(self, title: str) -> Iterator[None]:
        """Frame a page: links to the other pages, and the heading. vue/frame.vue has the style."""
        ui.colors(**_COLOURS)
        ui.page_title(f"{title} - Atelier")
        with ui.header(wrap=False).classes("items-center gap-3"):
            Frame().on("sign", lambda event: app.storage.client.update(name=event.args[:40]))
        ui.skip_link(target=ui.context.client.content)
        show_heading(title, 1)
        yield

    def add(self, page: "type[Page]") -> None:
        """Serve a page at its addresses."""

        @functools.wraps(page(self).show)
        async def show(**words: Any) -> None:
            await page(self).show(**words)

        for address in page.addresses:
            ui.page(address, response_timeout=PATIENCE_SEC)(show)


class Page:
    """A page in one tab: each tab has an object of its own.

    addresses: where it is; show: a method of each page, which builds it and takes the parameters of the address.
    """

    addresses: Sequence[str] = ()

    def __init__(self, site: Site) -> None:
        self.site = site


@dataclass
class RunTab:
    """A tab of a run's page. name: the run's, in addresses; show: a method of each tab, which builds it."""

    site: Site
    name: str
    path: Path


class Frame(Part, component="vue/frame.vue"):
    """Links to the pages, the person's name, dark or light, and what the browser tells the page about itself."""


def add_missing_page(site: Site) -> None:
    """Let addresses that lead nowhere answer 404 in the frame of a page."""

    @app.exception_handler(404)
    async def show(request: Request, error: HTTPException) -> Response:
        with Client(ui.page(""), request=request) as client, site.page("Nothing is here"):
            ui.label(error.detail)
        return client.build_response(request, 404)
