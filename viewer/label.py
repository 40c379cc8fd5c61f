"""`/label?collection=...`: labels from nothing. Keys give classes; a closed form proposes classes of other images.

With `&field=tags`, keys add tags and take them away.
"""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
from nicegui import ui

from data.layouts.corrections import Decision, list_kept
from data.layouts.table import count_values
from utils.io.safe_text import escape_controls
from viewer.images import Shelf, image_address
from viewer.parts import Links, name_tab, show_fault, show_share, show_status
from viewer.review import KEYS, Question, Review, Reviewer, open_desk, switch_tags
from viewer.site import Page

_NO_IMAGE = -1  # in place of an image's number: a class
_KEPT = {"label": len(KEYS), "tags": 12}  # keys for what the collection has; the others are for new tags
_FOLLOW_SEC = 0.3  # between two looks for new labels


class Labelling(Review):
    """The images of a collection as one tab labels them.

    field: label, or tags; show: a class or a tag whose proposals are shown; else what to label next. To build it takes
    long; tell: called with the share of new images that is read. Raises UserError (`data.root`).
    """

    hint = "← → go · X, click, Shift+click mark · A mark all shown · Enter accept · R as it was · U undo · Esc leave"

    def __init__(self, shelf: Shelf, name: str, field: str, show: str, tell: Callable[[float], None]) -> None:
        from engine.frozen.propose import read_points, turn

        collection = shelf.open(name, again=True, corrected=False)
        rows = np.concatenate([collection.rows("train"), collection.rows("val")])
        table = collection.table.take(rows)
        given = table[field]
        super().__init__(
            [Question(path, 1.0, had, had, ()) for path, had in zip(table["path"].to_pylist(), given.to_pylist())]
        )
        self.address = lambda number, px: image_address(name, collection, int(rows[number]), px)
        self.root = collection.root
        self.desk = open_desk(collection)
        self.decisions, _ = self.desk.sync()
        self._first = sorted([*count_values(given)][: _KEPT[field]])
        self._show = show
        points, self.says = read_points(collection, shelf.config(name), rows, tell)
        self._points = turn(points)
        self.quality = ""
        self._old = None
        self.order = []
        self.follow()

    def keys(self) -> dict[str, str]:
        """Return the class or tag of each key: names of the collection, then new names. A joined class has two keys."""
        names = self._first
        kept = itertools.chain.from_iterable(map(list_kept, self.decisions.values()))
        for line in sorted(kept, key=lambda line: line.at):
            if line.field == self.field:
                names = [line.now if name == line.was and not line.path else name for name in names]
                new = line.now if self.field == "tags" else [line.now]
                names = [*names, *(name for name in new if name and name not in names)]
        return dict(zip(KEYS, names))

    def name(self, new: str, old: str | None) -> list[Decision]:
        """Add a class, or give one another name, also that of another class; return the decisions to save.

        A tag is given to the shown image, or to those that are marked.
        """
        if self.field == "tags":
            return self.choose(new)
        renamed = {number: new for number, label in self._find_labels().items() if label == old}
        self._old = old
        return self._write({_NO_IMAGE: new, **renamed})

    def _add(self, number: int, now: Any, verdict: str) -> Decision:
        if number == _NO_IMAGE:
            return self.state("", self._old, now, verdict or "edited")
        return super()._add(number, now, verdict)

    def progress(self) -> str:
        """Return how many images have a label, and how good the proposals are."""
        return f"{len(self._find_labels()):,} of {len(self.questions):,} labelled{self.quality}"

    def _find_labels(self) -> dict[int, Any]:
        labels = {}
        for number, question in enumerate(self.questions):
            last = self.last(number)
            label = last.now if last else question.had
            if label or last and label is not None:  # somebody has seen that it has no tag
                labels[number] = label
        return labels

    def follow(self) -> None:
        """Propose and order by the current labels. The screen stays. Call this in a thread: it takes up to a second."""
        from engine.frozen.propose import propose

        labels = self._find_labels()
        if self.field == "tags":
            labels = {number: self._show in tags for number, tags in labels.items()}
        order, classes, probs, self.quality = propose(self._points, labels)
        offers = zip(self.questions, classes, probs)
        offered = [question._replace(by=1 - by, says=self._say(question.had, name)) for question, name, by in offers]
        if offered:
            for number in {self.here, *self.marked}:  # Enter takes what is shown
                if says := self.questions[number].says:
                    offered[number] = offered[number]._replace(says=says)
            self.questions = offered
        if self._show:
            new = [number for number, question in enumerate(offered) if question.says != question.had]
            order = [number for number in new if self.field == "tags" or offered[number].says == self._show]
            order.sort(key=lambda number: offered[number].by)
        elif self.field == "tags":
            order = [*order, *range(len(self.questions))]
        shown = self.order[: self.order.index(self.screen()[-1]) + 1] if self.order else []
        order = [*dict.fromkeys([*shown, *(number for number in order if self.last(number) is None)])] or [0]
        self.here = self.here if shown else order[0]
        self.order = order

    def _say(self, had: Any, answer: Any) -> Any:
        """Return what is proposed. answer: the class of the image, or whether it has the tag that is shown."""
        if self.field == "label":
            return had or answer
        return switch_tags(had, had, [self._show] if answer != (self._show in had) else [])


class LabelPage(Page):
    """Labels or tags from nothing."""

    addresses = ["/label"]

    async def show(self, collection: str = "", field: Literal["label", "tags"] = "label", show: str = "") -> None:
        """Show a collection, by its name. show: a class or a tag; the page shows the images that it is proposed for."""
        shelf = self.site.shelf
        shelf.config(collection)
        with self.site.page("Label"):
            note = show_status("Looking at the images")
            await ui.context.client.connected()
            with show_fault(note):
                with show_share(note) as tell:
                    labelling = await asyncio.to_thread(Labelling, shelf, collection, field, show, tell)
                note.text = escape_controls(f"Proposals are by {labelling.says}")
                labelling.by = name_tab()
                Labeller(labelling, f"/label?collection={collection}&field={field}&show=")


class Labeller(Reviewer):
    """The page in one tab: classes are typed, and proposals follow the labels. base: the address before a class."""

    def __init__(self, labelling: Labelling, base: str) -> None:
        self._base = base
        self._lines = 0
        with ui.row():
            title = "A class, then Enter" if labelling.field == "label" else "A tag, then Enter"
            self._new = ui.input(title).on("keydown.enter", self._name)
            self._new.on("keydown.esc", js_handler="event => event.target.blur()")
            self._old = ui.select({}, label="in place of", clearable=True).style("min-width: 9em")
            self._old.set_visibility(labelling.field == "label")
        ui.link("Next to label", base)
        self._links = Links()
        self._train = ui.link("Train on these labels", "/start?folder=" + quote(bytes(labelling.root)))
        super().__init__(labelling, labelling.address, labelling.desk)
        ui.timer(_FOLLOW_SEC, self._follow)

    def _draw(self) -> None:
        super()._draw()
        self._train.set_visibility(bool(self._review.quality))
        names = {name: escape_controls(name) for name in self._review.keys().values()}
        if self._old.options != names:
            self._old.set_options(names)
            self._links.props["links"] = {self._base + quote(name): f"Proposed: {text}" for name, text in names.items()}

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
