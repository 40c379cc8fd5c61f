"""`/try`: what a network says of an image that is dropped, chosen or pasted, and a collection's images most like it."""

import asyncio
from typing import NamedTuple

from fastapi import HTTPException
from nicegui import events, ui

from data.stream.source import UnreadableImage
from utils.errors import UserError
from utils.formats.thresholds import CATEGORY_PROFILES, PER_TAG
from utils.io.safe_text import escape_controls
from viewer.collection import list_collections
from viewer.images import Shelf
from viewer.networks import Answer, Bar
from viewer.site import Site

# Quasar's own header has a button without a name, and an input in it.
_CHOOSE = """<q-btn flat icon="add" label="Drop, paste or choose an image" @click="props.pickFiles" />
<span class="hidden"><q-uploader-add-trigger /></span>"""
MAX_BYTES = 64 * 2**20  # of an upload
_PASTE = "document.onpaste = event => getElement({}).$refs.qRef.addFiles(event.clipboardData?.files)"


class Question(NamedTuple):
    """What a network is asked: weights and profile as they are chosen, an image's bytes and its name."""

    weights: str
    profile: str
    content: bytes
    name: str


def list_choices(shelf: Shelf) -> tuple[dict[str, str | None], dict[str, str]]:
    """Return runs and their weight files, each with the name of its collection, and titles of collections by name."""
    own = dict[str, str | None]()
    for run, collection in shelf.of_runs().items():
        for file in (run, *run.glob("weights/*.safetensors"), *run.glob("export*/**/*.onnx")):
            if str(file) == escape_controls(str(file)):
                own[str(file)] = collection
    return own, {name: f"{title}: {about}" for name, title, about, _ in list_collections(shelf)}


def add_page(site: Site) -> None:
    """Add the page."""

    @ui.page("/try")
    async def show() -> None:
        own, collections = await asyncio.to_thread(list_choices, site.shelf)
        with site.page("Try an image"):
            TryPage(site, own, collections)


class TryPage:
    """The page in one tab. own: weight files of runs, with their collections; collections: titles by name."""

    def __init__(self, site: Site, own: dict[str, str | None], collections: dict[str, str]) -> None:
        self._site = site
        self._own = own
        self._image: tuple[bytes, str] | None = None
        self._build_choices()
        self._build_upload()
        self._message = ui.label("No image yet." if own else "No run yet: type the path of a weight file.")
        self._message.props("role=status").classes("muted").style("overflow-wrap: anywhere; min-height: 24px")
        self._result = ui.element("div").classes("w-full charts items-start")
        self._build_search(collections)
        self._alike = ui.element("div").classes("w-full alike")

    def _build_choices(self) -> None:
        first = next(iter(self._own), None)
        with ui.row():
            label = "Run, weight file, or folder with a WD tagger"
            weights = ui.select([*self._own], label=label, value=first, with_input=True, new_value_mode="add-unique")
            self._weights = weights.props("aria-label=weights").classes("col").style("min-width: 260px")
            profiles = [PER_TAG, *CATEGORY_PROFILES]
            self._profile = ui.select(profiles, label="Thresholds", value=PER_TAG)
            self._profile.style("min-width: 160px")
        for choice in (self._weights, self._profile):
            choice.on_value_change(self._ask)

    def _build_upload(self) -> None:
        upload = ui.upload(auto_upload=True, on_upload=self._take)
        upload.add_slot("header", _CHOOSE)
        upload.on_rejected(self._refuse).on("failed", self._refuse, args=[]).on("uploaded", upload.reset, args=[])
        upload.props(f"flat bordered max-file-size={MAX_BYTES}").classes("w-full")
        ui.run_javascript(_PASTE.format(upload.id))

    def _build_search(self, collections: dict[str, str]) -> None:
        with ui.row():
            self._collection = ui.select(collections, label="Collection", value=self._own.get(self._weights.value))
            self._collection.classes("col")
            self._search = ui.button("Find its nearest images", on_click=self._find)
            self._progress = ui.linear_progress(0, show_value=False).style("width: 120px").props("aria-label=compared")
            self._stop = ui.button("Stop", on_click=lambda: self._stop.set_visibility(False)).props("flat")
            self._stop.visible = False

    def _refuse(self) -> None:
        self._message.set_text(f"not taken: choose a file of at most {MAX_BYTES >> 20} MiB")

    def _question(self) -> Question | None:
        """Return the question as it is chosen now; None without a network or an image."""
        if self._image is None or not self._weights.value:
            return None
        return Question(self._weights.value, self._profile.value, *self._image)

    async def _take(self, upload: events.UploadEventArguments) -> None:
        self._image = await upload.file.read(), escape_controls(upload.file.name)
        await self._ask()

    async def _ask(self) -> None:
        self._collection.value = self._own.get(self._weights.value) or self._collection.value
        question = self._question()
        if question is None:
            return
        answer = None
        self._stop.visible = False  # a search for another image
        self._message.text = "computing; the first answer of a network takes seconds"
        said = "a defect: see the terminal"
        try:
            answer = await asyncio.to_thread(self._site.networks.ask, *question)
            said = answer.facts
        except (UserError, UnreadableImage) as error:
            said = str(error)
        finally:  # nothing if another question was asked meanwhile, or the tab was closed
            if question == self._question() and not self._result.is_deleted:
                self._message.text = escape_controls(said)
                self._result.clear()
                self._alike.clear()
                if answer:
                    with self._result:
                        _show_answer(answer)

    async def _find(self) -> None:
        question = self._question()
        if question is None or not self._collection.value:
            ui.notify("choose a network, an image and a collection")
            return
        shelf = self._site.shelf
        image = question.content, question.name
        steps = self._site.networks.nearest(question.weights, shelf, self._collection.value, *image)
        found = []
        self._search.disable()
        self._stop.set_visibility(True)
        try:
            while self._stop.visible and not self._stop.is_deleted:
                step = await asyncio.to_thread(next, steps, None)
                if step is None:
                    break
                self._progress.value, found = step
        except (UserError, UnreadableImage, HTTPException) as error:
            self._message.text = escape_controls(str(error))
        finally:
            self._stop.set_visibility(False)
            self._search.enable()
            await asyncio.to_thread(steps.close)
        self._alike.clear()
        with self._alike:
            for address, text in found:
                ui.image(address).tooltip(escape_controls(text)).props["alt"] = escape_controls(text)


def _show_answer(answer: Answer) -> None:
    with ui.card():
        ui.image(answer.seen).props("alt='the image'").classes("seen")
        if answer.caption:
            ui.label(escape_controls(answer.caption)).classes("mono").style("overflow-wrap: anywhere")
            ui.button("Copy caption", on_click=lambda: ui.clipboard.write(answer.caption)).props("flat")
    for category, bars in answer.bars.items():
        with ui.card().classes("no-wrap").style("gap: 4px"):
            ui.label(escape_controls(category)).classes("text-weight-medium")
            for bar in bars:
                _show_bar(bar)


def _show_bar(bar: Bar) -> None:
    with ui.row().classes(f"bar w-full no-wrap {'text-weight-medium' if bar.is_chosen else 'muted'}") as row:
        least = -1 if bar.least is None else min(bar.least, 2)
        row.style(f"--prob: {bar.prob:.1%}; --least: {least:.1%}")
        ui.label(escape_controls(bar.name)).classes("col ellipsis")
        limit = "" if bar.least is None else f" {'≥' if bar.is_chosen else '<'} {bar.least:.2f}"
        ui.label(f"{bar.prob:.3f}{limit}").classes("mono")
