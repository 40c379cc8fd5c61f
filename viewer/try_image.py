"""`/try`: what a network says of an image that is dropped, chosen or pasted, and a collection's images most like it."""

import asyncio
import base64
import io
from urllib.parse import quote

from fastapi import HTTPException
from nicegui import events, ui

from data.collection.search import quote_value
from data.stream.source import UnreadableImage
from utils.errors import UserError
from utils.formats.thresholds import CATEGORY_PROFILES, PER_TAG
from utils.io.files import Json
from utils.io.safe_text import escape_controls
from viewer.collection import list_collections
from viewer.images import Shelf
from viewer.site import Site

# Quasar's own header has a button without a name, and an input in it.
_CHOOSE = """<q-btn flat icon="add" label="Drop, paste or choose images" @click="props.pickFiles" />
<div class="q-px-md q-pb-sm">Is the image in a collection? Its nearest images lead to their places there, where labels
can be changed; 1.000 is the image itself, or a copy. To add a new one, save it in the collection's folder,
labelled as the others are.</div>
<span class="hidden"><q-uploader-add-trigger /></span>"""
MAX_BYTES = 64 * 2**20  # of an upload
_ANSWER = """<q-card flat bordered class="q-pa-sm"><div class="ellipsis" :title="props.row.weights">
{{ props.row.weights }}</div><div class="muted">{{ props.row.facts }}</div>
<template v-if="props.row.seen"><img class="seen" :src="props.row.seen" alt="the image">
<div v-if="props.row.caption" class="mono">{{ props.row.caption }}</div><q-btn v-if="props.row.caption" flat no-caps
  color="primary" label="Copy caption" @click="$parent.$emit('copy', props.row.caption)" /></template>
<template v-for="(bars, category) in props.row.bars"><div class="text-weight-medium">{{ category }}</div>
<div v-for="bar in bars" :class="'bar row no-wrap q-mb-xs ' + (bar.is_chosen ? 'text-weight-medium' : 'muted')"
  :style="{'--prob': 100 * bar.prob + '%', '--least': (bar.least ?? -1) * 100 + '%'}">
<div class="col ellipsis">{{ bar.name }}</div><div class="mono">{{ bar.prob.toFixed(3) }}
{{ bar.least == null ? '' : (bar.is_chosen ? '≥ ' : '< ') + bar.least.toFixed(2) }}</div></div></template></q-card>"""
_PASTE = "document.onpaste = event => getElement({}).$refs.qRef.addFiles(event.clipboardData?.files)"


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
        self._images: list[tuple[bytes, str]] = []
        self._newest = 0  # the number of the last question
        self._build_choices()
        self._build_upload()
        self._message = ui.label("No image yet." if own else "No run yet: type the path of a weight file.")
        self._message.props("role=status").classes("muted").style("overflow-wrap: anywhere; min-height: 24px")
        self._result = ui.table(columns=[], rows=[], pagination=0).classes("w-full")
        self._result.props("grid hide-header hide-bottom card-container-class=answers").add_slot("item", _ANSWER)
        self._result.on("copy", lambda event: ui.clipboard.write(event.args))
        self._build_search(collections)
        self._alike = ui.element("div").classes("w-full alike")

    def _build_choices(self) -> None:
        with ui.row():
            weights = ui.select(
                [*self._own],
                label="Runs, weight files, or folders with a WD tagger",
                value=[*self._own][:1],
                multiple=True,
                with_input=True,
                new_value_mode="add-unique",
            )
            self._weights = weights.props("aria-label=weights use-chips").classes("col").style("min-width: 260px")
            profiles = [PER_TAG, *CATEGORY_PROFILES]
            self._profile = ui.select(profiles, label="Thresholds", value=PER_TAG)
            self._profile.style("min-width: 160px")
        for choice in (self._weights, self._profile):
            choice.on_value_change(self._ask)

    def _build_upload(self) -> None:
        upload = ui.upload(multiple=True, auto_upload=True, on_multi_upload=self._take)
        upload.add_slot("header", _CHOOSE)
        upload.on_rejected(self._refuse).on("failed", self._refuse, args=[]).on("uploaded", upload.reset, args=[])
        upload.props(f"flat bordered max-total-size={MAX_BYTES}").classes("w-full")
        ui.run_javascript(_PASTE.format(upload.id))

    def _build_search(self, collections: dict[str, str]) -> None:
        with ui.row():
            first = next(iter(self._own.values()), None)
            self._collection = ui.select(collections, label="Collection", value=first).classes("col")
            self._search = ui.button("Find its nearest images", on_click=self._find)
            self._stop = ui.button("Stop", on_click=lambda: self._stop.set_visibility(False)).props("flat")
            self._stop.visible = False

    def _refuse(self) -> None:
        self._message.set_text(f"not taken: choose images of at most {MAX_BYTES >> 20} MiB together")

    async def _take(self, upload: events.MultiUploadEventArguments) -> None:
        self._images = [(await file.read(), escape_controls(file.name)) for file in upload.files]
        await self._ask()

    async def _ask(self) -> None:
        """Ask each network about each image; stop when another question is asked, or the tab is closed."""
        self._newest += 1
        number = self._newest
        self._stop.visible = False  # a search for another image
        self._alike.clear()
        rows = []
        for content, name in self._images:
            for weights in self._weights.value:
                self._message.text = f"{name}: computing; the first answer of a network takes seconds"
                answer = await asyncio.to_thread(self._answer, weights, content, name)
                if number != self._newest or self._result.is_deleted:
                    return
                rows.append(answer)
                self._result.rows = [*rows]
                self._message.text = ""

    def _answer(self, weights: str, content: bytes, name: str) -> Json:
        """Return the row of an answer, or of what prevents it."""
        try:
            answer = self._site.networks.ask(weights, self._profile.value, content, name)
        except (UserError, UnreadableImage) as error:
            return {"facts": escape_controls(str(error))}
        answer.seen.save(file := io.BytesIO(), "PNG")
        seen = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        bars = {kind: [bar._asdict() for bar in its] for kind, its in answer.bars.items()}
        return {**answer._asdict(), "weights": weights, "seen": seen, "bars": bars}

    async def _find(self) -> None:
        if not (self._images and self._weights.value and self._collection.value):
            ui.notify("choose a network, an image and a collection")
            return
        name = self._collection.value
        steps = self._site.networks.nearest(self._weights.value[0], self._site.shelf, name, *self._images[0])
        found = []
        self._search.disable()
        self._stop.set_visibility(True)
        try:
            while self._stop.visible and not self._stop.is_deleted:
                step = await asyncio.to_thread(next, steps, None)
                if step is None:
                    break
                share, found = step
                self._message.text = f"{share:.0%} of the collection are compared"
        except (UserError, UnreadableImage, HTTPException) as error:
            self._message.text = escape_controls(str(error))
        finally:
            self._stop.set_visibility(False)
            self._search.enable()
            await asyncio.to_thread(steps.close)
        self._alike.clear()
        with self._alike:
            for address, text in found:
                term = quote(f"path={quote_value(text.partition('  ')[2])}")
                with ui.link(target=f"/collection/{name}?find={term}"):
                    ui.image(address).tooltip(escape_controls(text)).props["alt"] = escape_controls(text)
