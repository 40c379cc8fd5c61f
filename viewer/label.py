"""`/label?collection=...`: labels from nothing. Keys give classes; a closed form proposes classes of other images.

With `&field=tags`, keys add tags and take them away.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from nicegui import ui

from data.config import DataConfig
from data.layouts.corrections import Decision, list_kept
from data.layouts.table import count_values
from utils.io.files import Json
from utils.record.run_index import RunIndex
from viewer.images import Shelf, image_address
from viewer.parts import show_fault, show_status
from viewer.review import KEYS, Question, Review, Reviewer, find_review, open_desk, switch_tags
from viewer.site import Page

_DISPUTED = "\n"  # in place of a class whose proposals are shown: the images about which people disagree
_NO_IMAGE = -1  # in place of an image's number: a class
_KEPT = {"label": len(KEYS), "tags": 12}  # keys for what the collection has; the others are for new tags
_FOLLOW_SEC = 0.3  # between two looks for new labels


class Labelling(Review):
    """The images of a collection as one tab labels them.

    field: label, or tags; show: a class or a tag whose proposals are shown, or _DISPUTED; else what to label next.
    points: of the images that are read, else None. Raises UserError (`data.root`).
    """

    hint = "1-9 and letters give a class · Enter accept · R as it was · + a new class"

    def __init__(self, shelf: Shelf, name: str, field: str, show: str) -> None:
        collection = shelf.open(name, again=True, corrected=False)
        rows = np.concatenate([collection.rows("train"), collection.rows("val")])
        table = collection.table.take(rows)
        given = table[field]
        super().__init__(
            [Question(path, 1.0, had, had, ()) for path, had in zip(table["path"].to_pylist(), given.to_pylist())]
        )
        self.address = lambda number, px: image_address(name, collection, int(rows[number]), px)
        self.collection = collection
        self._rows = rows
        self.decisions, _ = open_desk(collection).sync()
        self._first = sorted([*count_values(given)][: _KEPT[field]])
        self._show = show
        self.points = None
        self.quality = ""
        self.order = []
        self._every = np.random.default_rng(0).permutation(len(rows)).tolist()

    def read(self, config: DataConfig, tell: Callable[[float], None]) -> None:
        """Read the images. tell: called with the share of new images that is read."""
        from engine.frozen.propose import read_points, turn

        points, says = read_points(self.collection, config, self._rows, tell)
        self.about = f"Proposals are by {says}."
        if self._show:
            self.order = [self.here]
        self.points = turn(points)

    def names(self) -> Sequence[str]:
        """Return what has a key: names of the collection, then new names. A joined class has two keys."""
        names = self._first
        kept = itertools.chain.from_iterable(map(list_kept, self.decisions.values()))
        for line in sorted(kept, key=lambda line: line.at):
            if line.field == self.field:
                names = [line.now if name == line.was and not line.path else name for name in names]
                new = [tag for tag in line.now if tag not in line.was] if self.field == "tags" else [line.now]
                names = [*names, *(name for name in new if name and name not in names)]
        return names[: len(KEYS)]

    def name(self, new: str, old: str | None) -> list[Decision]:
        """Add a class, or give one another name, also that of another class; return the decisions to save."""
        renamed = {number: new for number, label in self._find_labels().items() if label == old}
        self._old = old
        return self._write({_NO_IMAGE: new, **renamed})

    def _add(self, number: int, now: Any, verdict: str) -> Decision:
        if number == _NO_IMAGE:
            return self.state("", self._old, now, verdict or "edited")
        return super()._add(number, now, verdict)

    def progress(self) -> tuple[int, int, str]:
        """Return how many images have a label, how many there are, and how good the proposals are."""
        labels = self._find_labels().values()
        self.counts = Counter(labels if self.field == "label" else itertools.chain.from_iterable(labels))
        every = len(self.questions)
        return len(labels), every, f"{len(labels):,} of {every:,} labelled{self.quality}"

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
        labels = self._find_labels()
        is_disputed = self._show == _DISPUTED
        order = self._every if self.points is None or is_disputed else self._propose(labels)
        if self.field == "tags" and not self._show:
            order = [*order, *self._every]
        new = [number for number in order if (self.votes(number) if is_disputed else self.last(number) is None)]
        if self.field == "label" and not self._show:
            new = [number for number in new if number not in labels]
        shown = self.order[: self.order.index(self.window()[-1]) + 1] if self.order else []
        order = [*dict.fromkeys([*shown, *new])] or self._every
        self.here = self.here if shown else order[0]
        self.order = order

    def _propose(self, labels: dict[int, Any]) -> list[int]:
        """Propose a class, or the tag that is shown, for all images; return the order to label or to check them in."""
        from engine.frozen.propose import propose

        if self.field == "tags":
            labels = {number: self._show in tags for number, tags in labels.items()}
        order, classes, probs, self.quality = propose(self.points, labels)
        offers = zip(self.questions, classes, probs)
        offered = [question._replace(by=1 - by, says=self._say(question.had, name)) for question, name, by in offers]
        self.questions = offered or self.questions
        if self._show:
            new = [number for number, question in enumerate(offered) if question.says != question.had]
            order = [number for number in new if self.field == "tags" or offered[number].says == self._show]
            order.sort(key=lambda number: offered[number].by)
        return order

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
        config = shelf.config(collection)
        with self.site.page("Label"):
            note = show_status("Listing the images")
            await ui.context.client.connected()
            with show_fault(note):
                labelling = await asyncio.to_thread(Labelling, shelf, collection, field, show)
                await asyncio.to_thread(labelling.follow)
                labeller = Labeller(labelling, shelf.runs, f"/label?collection={collection}&field={field}&show=", show)
                note.text = ""
                await asyncio.to_thread(labelling.read, config, labeller.tell)  # the first images are shown meanwhile


class Labeller(Reviewer):
    """The page in one tab: classes are typed, and proposals follow the labels. base: the address before a class."""

    def __init__(self, labelling: Labelling, runs: RunIndex, base: str, show: str) -> None:
        self._seen = (0, False)
        self._share = 0.0
        super().__init__(labelling, labelling.address, labelling.collection)
        check = find_review(runs, str(labelling.collection.root))
        self._screen.props.update(base=base, show=show, check=check, reading=0)
        ui.timer(_FOLLOW_SEC, self._follow)

    def tell(self, share: float) -> None:
        """Let the page say which share of the images is read."""
        self._share = share

    def _answer(self, said: Json) -> list[Decision]:
        if name := said["name"]:
            return self._review.name(*name)
        return super()._answer(said)

    async def _follow(self) -> None:
        seen = sum(map(len, self._review.decisions.values())), self._review.points is not None
        self._screen.props["reading"] = 1 if self._review.points is not None else self._share
        if seen != self._seen:
            self._seen = seen
            await asyncio.to_thread(self._review.follow)
            self._draw()
