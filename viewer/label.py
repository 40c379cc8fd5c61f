"""`/label?collection=...`: labels from nothing. Keys give classes, and a closed form proposes those of other images."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import numpy as np
from nicegui import ui

from data.layouts.corrections import desk_of
from utils.errors import UserError
from utils.io.safe_text import escape_controls
from viewer.images import Shelf, image_address
from viewer.review import KEYS, Question, Review, ReviewPage
from viewer.site import Site

_FOLLOW_SEC = 0.3  # between two looks for new labels


class Labelling(Review):
    """The images of a collection as one tab labels them.

    show: a class whose proposals are shown; else what to label next. To build it takes long; tell: called with the
    share of new images that is read. Raises UserError (`data.root`).
    """

    hint = "← → go · X, click, Shift+click mark · A mark all shown · Enter accept · R no label · U undo"

    def __init__(self, shelf: Shelf, name: str, show: str, tell: Callable[[float], None]) -> None:
        from engine.frozen.propose import read_points

        collection = shelf.open(name, again=True, corrected=False)
        rows = np.concatenate([collection.rows("train"), collection.rows("val")])
        table = collection.table.take(rows)
        labels = table["label"].to_pylist()
        super().__init__(
            [Question(path, 1.0, had, had, ()) for path, had in zip(table["path"].to_pylist(), labels)], []
        )
        self.address = lambda number, px: image_address(name, collection, int(rows[number]), px)
        self.desk = desk_of(Path(collection.root))
        self.decisions, _ = self.desk.sync()
        self._first = sorted({*labels} - {None})
        self._show = show
        self._points, self.says = read_points(collection, shelf.config(name), rows, tell)
        self._quality = ""
        self.order = []
        self.follow()

    def keys(self) -> dict[str, str]:
        """Return the class of each key: those of the collection, then those that were typed."""
        typed = (each.now for each in self.decisions.get(("", "label"), ()))
        return dict(zip(KEYS, dict.fromkeys([*self._first, *typed])))

    def progress(self) -> str:
        """Return how many images have a label, and how good the proposals are."""
        return f"{len(self._find_labels()):,} of {len(self.questions):,} labelled{self._quality}"

    def _find_labels(self) -> dict[int, str]:
        labels = {}
        for number, question in enumerate(self.questions):
            last = self.last(number)
            if label := last.now if last else question.had:
                labels[number] = label
        return labels

    def follow(self) -> None:
        """Propose and order by the labels of now; the screen stays. Call it in a thread: it takes up to a second."""
        from engine.frozen.propose import propose

        order, classes, probs, self._quality = propose(self._points, self._find_labels())
        offers = zip(self.questions, classes, probs)
        self.questions = [
            each._replace(by=1 - by, says=each.had or name) for each, name, by in offers
        ] or self.questions
        if self._show:
            alike = [number for number, name in enumerate(classes) if name == self._show]
            order = sorted(alike, key=probs.__getitem__, reverse=True)
        shown = self.order[: self.order.index(self.screen()[-1]) + 1] if self.order else []
        free = [number for number in order if self.last(number) is None and not self.questions[number].had]
        order = [*dict.fromkeys([*shown, *free])] or [0]
        self.here = self.here if shown else order[0]
        self.order = order


def add_page(site: Site) -> None:
    """Add the page."""

    @ui.page("/label")
    async def show(collection: str = "", show: str = "") -> None:
        site.shelf.config(collection)
        with site.page("Label"):
            note = ui.label("Looking at the images").props("role=status")
            await ui.context.client.connected()
            shares = [0.0]
            timer = ui.timer(1, lambda: note.set_text(f"Looking at the images: {shares[-1]:.0%}"))
            try:
                labelling = await asyncio.to_thread(Labelling, site.shelf, collection, show, shares.append)
                note.text = escape_controls(f"Proposals are by {labelling.says}")
                labelling.by = (ui.context.client.tab_id or "")[:8]
                LabelPage(labelling, f"/label?collection={collection}&show=")
            except UserError as error:
                note.text = escape_controls(str(error))
            timer.cancel()


class LabelPage(ReviewPage):
    """The page in one tab: classes are typed, and proposals follow the labels. base: the address before a class."""

    def __init__(self, labelling: Labelling, base: str) -> None:
        self._base = base
        self._lines = 0
        self._new = ui.input("A class, then Enter").on("keydown.enter", self._add)
        self._links = ui.row()
        super().__init__(labelling, labelling.address, labelling.desk)
        ui.timer(_FOLLOW_SEC, self._follow)

    def _draw(self) -> None:
        super()._draw()
        names = self._review.keys()
        if len(names) >= len(self._links.default_slot.children):
            self._links.clear()
            with self._links:
                for name in ("", *names.values()):
                    ui.link(escape_controls(name and f"Proposed: {name}") or "Next to label", self._base + quote(name))

    async def _add(self) -> None:
        name = (self._new.value or "").strip()
        self._new.value = None
        await self._take([self._review.state("", None, name, "edited")] if name else [])

    async def _follow(self) -> None:
        lines = sum(map(len, self._review.decisions.values()))
        if lines != self._lines:
            self._lines = lines
            await asyncio.to_thread(self._review.follow)
            self._draw()
