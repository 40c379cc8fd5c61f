"""`/label?collection=...`: labels from nothing. Keys give classes, and a closed form proposes those of other images."""

import asyncio
from collections.abc import Callable
from urllib.parse import quote

import numpy as np
from nicegui import ui

from data.layouts.corrections import Decision, list_kept
from utils.errors import UserError
from utils.io.safe_text import escape_controls
from viewer.images import Shelf, image_address
from viewer.review import KEYS, Question, Review, ReviewPage, open_desk
from viewer.site import Site

_NO_IMAGE = -1  # in place of an image's number: a class
_FOLLOW_SEC = 0.3  # between two looks for new labels


class Labelling(Review):
    """The images of a collection as one tab labels them.

    show: a class whose proposals are shown; else what to label next. To build it takes long; tell: called with the
    share of new images that is read. Raises UserError (`data.root`).
    """

    hint = "← → go · X, click, Shift+click mark · A mark all shown · Enter accept · R no label · U undo · Esc leave"

    def __init__(self, shelf: Shelf, name: str, show: str, tell: Callable[[float], None]) -> None:
        from engine.frozen.propose import read_points, turn

        collection = shelf.open(name, again=True, corrected=False)
        rows = np.concatenate([collection.rows("train"), collection.rows("val")])
        table = collection.table.take(rows)
        labels = table["label"].to_pylist()
        super().__init__(
            [Question(path, 1.0, had, had, ()) for path, had in zip(table["path"].to_pylist(), labels)], []
        )
        self.address = lambda number, px: image_address(name, collection, int(rows[number]), px)
        self.root = collection.root
        self.desk = open_desk(collection)
        self.decisions, _ = self.desk.sync()
        self._first = sorted({*labels} - {None})
        self._show = show
        points, self.says = read_points(collection, shelf.config(name), rows, tell)
        self._points = turn(points)
        self.quality = ""
        self._old = None
        self.order = []
        self.follow()

    def keys(self) -> dict[str, str]:
        """Return the class of each key: those of the collection, then those that were typed. Joined ones keep both."""
        names = self._first
        for line in reversed([*list_kept(self.decisions.get(("", "label"), ()))]):
            names = [line.now if name == line.was else name for name in names]
            names += {line.now}.difference(names)
        return dict(zip(KEYS, names))

    def name(self, new: str, old: str | None) -> list[Decision]:
        """Add a class, or give one another name, also that of another class; return the decisions to save."""
        renamed = {number: new for number, label in self._find_labels().items() if label == old}
        self._old = old
        return self._write({_NO_IMAGE: new, **renamed})

    def _add(self, number: int, now: str | None, verdict: str) -> Decision:
        if number == _NO_IMAGE:
            return self.state("", self._old, now, verdict or "edited")
        return super()._add(number, now, verdict)

    def progress(self) -> str:
        """Return how many images have a label, and how good the proposals are."""
        return f"{len(self._find_labels()):,} of {len(self.questions):,} labelled{self.quality}"

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

        order, classes, probs, self.quality = propose(self._points, self._find_labels())
        offers = zip(self.questions, classes, probs)
        offered = [each._replace(by=1 - by, says=each.had or name) for each, name, by in offers]
        if offered:
            for number in {self.here, *self.marked}:  # Enter takes what is shown
                if says := self.questions[number].says:
                    offered[number] = offered[number]._replace(says=says)
            self.questions = offered
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
        with ui.row():
            self._new = ui.input("A class, then Enter").on("keydown.enter", self._name)
            self._new.on("keydown.esc", js_handler="event => event.target.blur()")
            self._old = ui.select({}, label="in place of", clearable=True).style("min-width: 9em")
        self._links = ui.row()
        self._train = ui.link("Train on these labels", "/start?folder=" + quote(bytes(labelling.root)))
        super().__init__(labelling, labelling.address, labelling.desk)
        ui.timer(_FOLLOW_SEC, self._follow)

    def _draw(self) -> None:
        super()._draw()
        self._train.set_visibility(bool(self._review.quality))
        names = {name: escape_controls(name) for name in self._review.keys().values()}
        if self._old.options != names:
            self._old.set_options(names)
            self._links.clear()
            with self._links:
                ui.link("Next to label", self._base)
                for name, text in names.items():
                    ui.link(f"Proposed: {text}", self._base + quote(name))

    async def _name(self) -> None:
        if new := (self._new.value or "").strip():
            lines = self._review.name(new, self._old.value)
            self._new.value = self._old.value = None
            await self._take(lines)

    async def _follow(self) -> None:
        lines = sum(map(len, self._review.decisions.values()))
        if lines != self._lines:
            self._lines = lines
            await asyncio.to_thread(self._review.follow)
            self._draw()
