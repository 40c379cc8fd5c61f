"""`/try`: what a network says of an image that is dropped, chosen or pasted, and a collection's images most like it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import HTTPException
from nicegui import events, ui
from nicegui import run as background
from PIL import Image
from starlette.formparsers import MultiPartParser

from data.config import TextConfig
from data.images.bytes import image_key, open_contents
from data.images.open import open_image
from data.stream.source import UnreadableImage
from data.tags.rules import read_text_rules
from data.tools import predictions
from utils.errors import UserError, about
from utils.formats.spelling import join_tags
from utils.formats.thresholds import CATEGORY_PROFILES, MCUT, PER_TAG, thresholds_path
from utils.formats.vocabulary import FILE, category_name
from utils.io.files import ignore_write_errors, readable, sha256_file
from utils.io.safe_text import escape_controls
from utils.record.run_index import is_inside
from viewer.collection import list_collections
from viewer.images import Shelf, image_address
from viewer.parts import page

if TYPE_CHECKING:  # torch is imported when the first network is asked
    from models.predictor import Predictor

MAX_BYTES, _MAX_PIXELS = 64 * 2**20, 100_000_000  # of an upload
_KEPT = 2  # networks in memory
_SHOWN, _NEAREST = 30, 24  # classes or tags; images
_EMBEDDINGS, _AT_ONCE = Path("outputs/cache/embeddings"), 16
_PASTE = "document.onpaste = event => getElement({}).$refs.qRef.addFiles(event.clipboardData?.files)"

Bars = dict[str, list[tuple[str, float, bool, float | None]]]  # by category: name, probability, is chosen, threshold


class Networks:
    """Networks below `roots`, asked as predict.py does. load: reads a predictor; text: how tags become a caption."""

    def __init__(self, roots: Sequence[str], load: Callable[[Path], "Predictor"], text: TextConfig) -> None:
        self.roots, self._text = [Path(root).resolve() for root in roots], text
        self._load, self._lock = lru_cache(_KEPT)(lambda path, changed: load(path)), RLock()

    def find(self, name: str) -> Path:
        """Return the weight file that is named by its path, its run, or its folder with a WD tagger.

        Raises UserError (`weights`) unless it and the files beside it are below the roots, also where links lead.
        """
        from utils.io.weights import find_weights

        is_below = lambda path: any(is_inside(path, root) for root in self.roots)  # noqa: E731
        with about("weights"), readable(Path(name), "weight"):
            if is_below(path := Path(name).resolve()):
                path = find_weights(str(path), "best", onnx_first=True)
            beside = path, thresholds_path(path), path.with_name(FILE)
            if path.suffix not in (".safetensors", ".onnx") or not all(map(is_below, beside)):
                roots = ", ".join(map(str, self.roots))
                raise UserError(f"{path} is no .safetensors or .onnx file below {roots}; view.py runs=FOLDER adds more")
        return path

    def get(self, path: Path) -> "Predictor":
        """Return the predictor of a weight file as it is now. Raises UserError (`weights`)."""
        with about("weights"), self._lock:
            return self._load(path, path.stat().st_mtime_ns)

    def ask(self, weights: str, profile: str, content: bytes, name: str) -> tuple[Bars, str, Image.Image, str]:
        """Return what a network says of an encoded image, the caption, what it sees, and a line about both.

        Raises UnreadableImage, UserError (`weights`, `thresholds`, `profile`).
        """
        path, text, bars = self.find(weights), self._text, Bars()
        predictor = self.get(path)
        with self._lock:  # one image is decoded at a time
            images = _prepare(predictor, content, name)
            values = predictor.predict(images)[0]
        facts = f"{name}, as the network sees it: {images.shape[3]} x {images.shape[2]} pixels"
        with open_image(content, name, _MAX_PIXELS) as image:
            frames = getattr(image, "n_frames", 1)
        facts += f", the first of {frames} frames" if frames > 1 else ""
        output, names, kinds = predictor.output, predictor.names, predictor.categories
        least = np.broadcast_to(predictor.choose_thresholds(path, profile) if output.has_tags else 2.0, len(values))
        if text.exclude and output.has_tags:
            least = np.where(predictions.find_excluded(names, kinds, text.exclude), np.inf, least)
        options = predictor.options(1, least, mcut=profile == MCUT, max_tags=text.max_tags, order=text.order)
        row = output.make_row(values, options)
        if output.has_tags:
            caption = join_tags(predictions.spell_tags(row, text, read_text_rules(text)), text.separator)
        else:
            caption = row.get("class", "")
            facts += "" if names else f"; {len(values)} features from {values.min():.3g} to {values.max():.3g}"
        chosen = {"classes": [caption], "rating": [row.get("rating")], **row.get("probs", {})}
        for place, index in enumerate(np.argsort(-values).tolist() if names else ()):
            kind, tag = category_name(int(kinds[index])) if output.has_tags else "classes", names[index]
            is_chosen, is_rating = tag in chosen.get(kind, ()), kind == "rating"
            if (place < _SHOWN or is_chosen) and (predictor.has_ratings or not is_rating):
                limit = None if is_rating or options.mcut or not output.has_tags else float(least[index])
                bars.setdefault(kind, []).append((tag, float(values[index]), is_chosen, limit))
        return bars, caption, Image.fromarray(images[0].permute(1, 2, 0).numpy().squeeze()), facts

    def nearest(
        self, weights: str, shelf: Shelf, collection: str, content: bytes, name: str
    ) -> Iterator[tuple[float, list[tuple[str, str]]]]:
        """Yield the share of a collection that is embedded; at the end, addresses and texts of the nearest images.

        A file for the network and the collection keeps embeddings, each by the state of its image's file, also if the
        iterator is closed early. Raises UnreadableImage, UserError, HTTPException.
        """

        def embed(content: bytes, name: str) -> np.ndarray:
            with self._lock:
                return predictor.embed(_prepare(predictor, content, name))[0]

        path, opened = self.find(weights), shelf.open(collection, again=True)
        changed, version, predictor = path.stat().st_mtime_ns, sha256_file(path), self.get(path)
        if path.stat().st_mtime_ns != changed:
            raise UserError(f"weights: {path} was written meanwhile; find again")
        contents, vectors = open_contents(opened), dict[str | int, np.ndarray]()
        file = _EMBEDDINGS / f"{path.stem}-{version[:16]}-{collection}.npz"
        with suppress(UserError):  # there is none yet, or it is damaged
            vectors |= predictions.read_embeddings(file, version)
        rows, query = np.flatnonzero(opened.weights()).tolist(), embed(content, name)
        keys = {row: image_key(contents, row, version) or row for row in rows}  # a row: not to be kept
        waiting = [row for row in rows if keys[row] not in vectors]
        try:
            for number, row in enumerate(waiting):
                if number % _AT_ONCE == 0:
                    yield 1 - (len(waiting) - number) / len(rows), []
                with suppress(UnreadableImage):
                    vectors[keys[row]] = embed(shelf.read(collection, opened, row), contents.name_of(row))
        finally:
            kept = {key: vectors[key] for row, key in keys.items() if key in vectors and key != row}
            if waiting and kept:
                lines = zip(kept, predictions.embedding_rows(kept.values()))
                with ignore_write_errors(file), self._lock:
                    predictions.Embeddings(file, version).write_all({"path": key, **line} for key, line in lines)
        if not (found := [row for row in rows if keys[row] in vectors]):
            raise UserError(f"data.root: {opened.root} has no image that can be read")
        best = predictions.rank(found, np.stack([vectors[keys[row]] for row in found]), query, _NEAREST)
        texts = [f"{each['similarity']:.3f}  {contents.name_of(each['path'])}" for each in best]
        yield 1.0, [(image_address(collection, opened, each["path"]), text) for each, text in zip(best, texts)]


def _prepare(predictor: "Predictor", content: bytes, name: str) -> Any:
    from data.open import prepare_image

    return prepare_image(content, name, predictor.preprocessing, max_pixels=_MAX_PIXELS)


def _show_answer(bars: Bars, caption: str, seen: Image.Image) -> None:
    with ui.card().props("flat bordered").classes("q-pa-sm"):
        ui.image(seen).props("fit=contain no-spinner alt='the image'").classes("seen")
        if caption:
            ui.label(escape_controls(caption)).classes("mono").style("overflow-wrap: anywhere")
            ui.button("Copy caption", on_click=lambda: ui.clipboard.write(caption)).props("flat no-caps")
    for category, lines in bars.items():
        with ui.card().props("flat bordered").classes("q-pa-sm no-wrap").style("gap: 4px"):
            ui.label(escape_controls(category)).classes("text-weight-medium")
            for name, prob, is_chosen, least in lines:
                with ui.row().classes(f"bar w-full no-wrap {'text-weight-medium' if is_chosen else 'muted'}") as row:
                    row.style(f"--prob: {prob:.1%}; --least: {-1 if least is None else min(least, 2):.1%}")
                    ui.label(escape_controls(name)).classes("col ellipsis")
                    limit = "" if least is None else f" {'≥' if is_chosen else '<'} {least:.2f}"
                    ui.label(f"{prob:.3f}{limit}").classes("mono")


def add_page(networks: Networks, shelf: Shelf) -> None:
    """Add the page."""
    MultiPartParser.spool_max_size = MAX_BYTES  # uploads stay in memory

    def list_all() -> tuple[dict[str, str | None], dict[str, str]]:
        files = lambda run: (run, *run.glob("weights/*.safetensors"), *run.glob("export*/**/*.onnx"))  # noqa: E731
        names = {str(file): name for run, name in shelf.of_runs().items() for file in files(run)}
        roots = {name: f"{title}: {about}" for name, title, about, _ in list_collections(shelf)}
        return {path: name for path, name in names.items() if path == escape_controls(path)}, roots

    @ui.page("/try")
    async def show() -> None:
        found = await background.io_bound(list_all)
        with page("Try an image"):
            _build(networks, shelf, *found)


def _build(networks: Networks, shelf: Shelf, own: dict[str, str | None], collections: dict[str, str]) -> None:
    image: list[Any] = []  # its bytes and name

    async def take(upload: events.UploadEventArguments) -> None:
        image[:] = await upload.file.read(), escape_controls(upload.file.name)
        await ask()

    async def ask() -> None:
        collection.value = own.get(weights.value) or collection.value
        if not image or not weights.value:
            return
        question, answer = (weights.value, profile.value, *image), None
        stop.visible = False  # a search for another image
        message.text, said = "computing; the first answer of a network takes seconds", "a defect: see the terminal"
        try:
            *answer, said = await background.io_bound(networks.ask, *question)
        except (UserError, UnreadableImage) as error:
            said = str(error)
        finally:  # nothing if another question was asked meanwhile, or the tab was closed
            if question == (weights.value, profile.value, *image) and not result.is_deleted:
                message.text = escape_controls(said)
                result.clear(), alike.clear()
                if answer:
                    with result:
                        _show_answer(*answer)

    async def find() -> None:
        if not image or not weights.value or not collection.value:
            ui.notify("choose a network, an image and a collection")
            return
        steps, found = networks.nearest(weights.value, shelf, collection.value, *image), []
        search.disable(), stop.set_visibility(True)
        try:
            while (step := await background.io_bound(next, steps, None)) and stop.visible and not stop.is_deleted:
                progress.value, found = step
        except (UserError, UnreadableImage, HTTPException) as error:
            message.text = escape_controls(str(error))
        finally:
            stop.set_visibility(False), search.enable()
            await background.io_bound(steps.close)
        alike.clear()
        with alike:
            for address, text in found:
                ui.image(address).props("fit=contain no-spinner").tooltip(escape_controls(text))

    with ui.row().classes("w-full items-center"):
        weights = ui.select(
            [*own], label="Run, weight file, or folder with a WD tagger", value=next(iter(own), None),
            with_input=True, new_value_mode="add-unique", on_change=ask,
        ).props("dense outlined aria-label=weights").classes("col").style("min-width: 260px")  # fmt: skip
        profile = ui.select([PER_TAG, *CATEGORY_PROFILES, MCUT], label="Thresholds", value=PER_TAG, on_change=ask)
        profile.props("dense outlined").style("min-width: 160px")
    upload = ui.upload(label="Drop, paste or choose an image", auto_upload=True, on_upload=take)
    refuse = lambda: message.set_text(f"not taken: choose a file of at most {MAX_BYTES >> 20} MiB")  # noqa: E731
    upload.on_rejected(refuse).on("failed", refuse, args=[]).on("uploaded", upload.reset, args=[])
    upload.props(f"flat bordered max-file-size={MAX_BYTES}").classes("w-full")
    ui.run_javascript(_PASTE.format(upload.id))
    message = ui.label("No image yet." if own else "No run yet: type the path of a weight file.")
    message.props("role=status").classes("muted").style("overflow-wrap: anywhere; min-height: 24px")
    result = ui.element("div").classes("w-full charts items-start")
    with ui.row().classes("w-full items-center"):
        collection = ui.select(collections, label="Collection", value=own.get(weights.value))
        collection.props("dense outlined").classes("col")
        search = ui.button("Find its nearest images", on_click=find).props("unelevated no-caps")
        progress = ui.linear_progress(0, show_value=False).style("width: 120px")
        stop = ui.button("Stop", on_click=lambda: stop.set_visibility(False)).props("flat no-caps")
        stop.visible = False
    alike = ui.element("div").classes("w-full alike")
