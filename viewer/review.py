"""`/review?run=...`: the images where network and label differ most; decisions go to corrections.jsonl."""

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pyarrow.parquet as pq
from nicegui import ui
from nicegui.events import GenericEventArguments

from data.collection.collection import Collection
from data.layouts.corrections import Decision, Decisions, Desk, decide, desk_of, list_kept, settle
from data.layouts.table import count_values
from data.tools.config import report_folder
from utils.errors import UserError
from utils.formats.spelling import RATINGS, Tag, parse_tag, write_tag
from utils.io.files import Json
from utils.io.safe_text import escape_controls
from utils.record.run_index import RunIndex, is_own_run
from utils.record.tables import find_image_table, images_about
from viewer.differences import Difference, find_differences
from viewer.images import Shelf, image_address, rows_of_paths
from viewer.parts import (
    REFRESH_SEC,
    Part,
    bind_address,
    find_run,
    make_card,
    name_tab,
    run_name,
    show_fault,
    show_folder,
    show_status,
)
from viewer.site import Page

_MOST = 10_000  # differences
_SCREEN = 24  # images that are shown together
_AHEAD = 12  # of the next screen: the browser shows them while the server is asked
KEYS = "123456789bcdefghijklmnopqstvwyz"  # of classes or tags; a, r, u and x do something else
_CHOICES = 9  # keys of a review
_ADVICE = "Find wrong labels, a card of Start, judges each image by all others."
_LARGE_PX = 1280
_NEAR_PX = 128


class Picture(Part, component="vue/picture.vue"):
    """A picture that can be enlarged. The screen contains it."""


class Screen(Part, component="vue/screen.vue"):
    """An image with the keys that decide about it, and the images after it."""


class Question(NamedTuple):
    """An image of a review. had: its label or tags without decisions; says: what they are for the network.

    by: how far these are apart, 0 to 1; names: the classes, or the tags that differ, for the first keys. reason: why it
    is asked; near: addresses and labels of the images most like it.
    """

    path: str
    by: float
    had: Any
    says: Any
    names: Sequence[str]
    reason: str = ""
    near: Sequence[tuple[str, str]] = ()


def make_question(path: str, by: float, says: str | Mapping[str, bool], had: Any) -> Question:
    """Return the question about a difference. Ratings are no tags; the network's tags are spelled like the others."""
    if isinstance(says, str):
        return Question(path, by, had, says, [name for name in (says, had) if name])
    texts = {parse_tag(tag).name: tag for tag in had}
    spaces = any(" " in tag for tag in had)
    differing = [name for name, is_added in says.items() if is_added != (name in texts) and name not in RATINGS]
    names = [texts.get(name) or write_tag(Tag(None, name), spaces=spaces) for name in differing]
    return Question(path, by, had, switch_tags(had, had, names), names)


def switch_tags(had: Sequence[str], tags: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the tags with some names added or taken away. Tags that the image had before stay in their order."""
    kept = {*tags}.symmetric_difference(names)
    return [tag for tag in dict.fromkeys([*had, *tags, *names]) if tag in kept]


def _judge(now: Any, was: Any, says: Any) -> str:
    if now == was:
        return "rejected"
    return "accepted" if now == says else "edited"


class Review:
    """The questions in one tab. here: the shown one; order: the numbers of those that are shown; by: the tab.

    counts: images by name; about: how the order came about.
    """

    hint = "1-9 give a class, or add a tag and take it away · Enter accept · R keep the label · C a class by its name"

    def __init__(self, questions: Sequence[Question], classes: Sequence[str] = ()) -> None:
        self.questions = questions
        self.classes = classes
        self.field = "tags" if isinstance(questions[0].had, list) else "label"
        self.counts = dict[str, int]()
        self.about = ""
        self.order = range(len(questions))
        self.decisions = Decisions()
        self.here = 0
        self.by = ""
        self._numbers = {question.path: number for number, question in enumerate(questions)}
        self._done = []  # what this page has decided on

    def names(self) -> Sequence[str] | None:
        """Return the classes or tags that have a key, if all images have the same."""
        return self.classes if 0 < len(self.classes) <= _CHOICES else None

    def last(self, number: int) -> Decision | None:
        """Return the decision about an image that counts."""
        path, _, had, *_ = self.questions[number]
        last = settle(had, self.decisions.get((path, self.field), ()))
        return last if last and last.verdict != "undone" else None

    def window(self) -> Sequence[int]:
        """Return the images that the browser has: those that are shown together, and the first ones after them."""
        first = self.order.index(self.here) // _SCREEN * _SCREEN
        return self.order[first : first + _SCREEN + _AHEAD]

    def next(self) -> int:
        """Return the next image without a decision, or the shown one if there is none."""
        at = self.order.index(self.here)
        further = itertools.chain(self.order[at:], self.order[:at])
        return next((number for number in further if self.last(number) is None), self.here)

    def progress(self) -> tuple[int, int, str]:
        """Return how many decisions there are, how many there can be, and both in words."""
        every = len(self.questions)
        count = sum(self.last(number) is not None for number in range(every))
        return count, every, f"{count:,} of {every:,} decided"

    def card(self, number: int) -> Json:
        """Return what the browser is told of an image. now: what is decided."""
        question = self.questions[number]._asdict()
        last = self.last(number)
        near = [make_card(address, label, label) for address, label in question["near"]]
        said = {"now": last.now, "verdict": last.verdict, "who": last.by} if last else {"verdict": None}
        return question | {"near": near, "votes": self.votes(number)} | said

    def votes(self, number: int) -> dict[str, Any]:
        """Return what each person with a name says of an image, if they differ."""
        lines = self.decisions.get((self.questions[number].path, self.field), ())
        last = {line.by.rpartition(" ")[0]: line.now for line in reversed([*list_kept(lines)])}
        last.pop("", None)
        return last if len({*map(str, last.values())}) > 1 else {}

    def decide(self, values: Mapping[str, Any]) -> list[Decision]:
        """Decide on the values of images, by path; return the decisions to save."""
        known = {self._numbers[path]: value for path, value in values.items() if path in self._numbers}
        return self._write(known)

    def undo(self) -> list[Decision]:
        """Return the lines that take this tab's last decisions back, and show their first image.

        A tab that is loaded again goes on with the last decision about an image that it has signed before.
        """
        numbers = self._done.pop() if self._done else self._find_last()
        self.here = min({*numbers} & {*self.order}, default=self.here)
        return [self._add(number, self.questions[number].had, "undone") for number in numbers]

    def _find_last(self) -> list[int]:
        lines = (self.decisions.get((path, self.field), ()) for path in self._numbers)
        own = [line for line in itertools.chain.from_iterable(map(list_kept, lines)) if line.by == self.by]
        return [self._numbers[line.path] for line in sorted(own, key=lambda line: line.at)[-1:]]

    def go(self, path: str | None) -> None:
        """Show an image, if it is in the order; None: the next one without a decision."""
        number = self.next() if path is None else self._numbers.get(path)
        self.here = number if number in self.order else self.here

    def _write(self, values: Mapping[int, Any]) -> list[Decision]:
        if values:
            self._done.append([*values])
        return [self._add(number, now, "") for number, now in values.items()]

    def _add(self, number: int, now: Any, verdict: str) -> Decision:
        path, _, was, says, *_ = self.questions[number]
        return self.state(path, was, now, verdict or _judge(now, was, says))

    def state(self, path: str, was: Any, now: Any, verdict: str) -> Decision:
        """Decide on an image, or on a name (without a path), and return the line to save."""
        line = decide(path, self.field, was, now, verdict, self.by)
        self.decisions.setdefault((path, self.field), []).append(line)
        return line


def open_review(shelf: Shelf, run: Path) -> tuple[Review, Callable[[int, int], str], Collection]:
    """Return the differences of a run in images of its collection, their addresses by number and px, and that.

    Raises UserError if there is no difference, or if the collection is no folder.
    """
    name = shelf.of_run(run)
    nothing = UserError(f"No image is known where network and label differ. {_ADVICE}")
    differences = find_differences(run, _MOST)
    if name is None or not differences:
        raise nothing
    collection = shelf.open(name, again=True, corrected=False)
    root = images_about(run, "root")
    desk = open_desk(collection)
    if root != str(collection.root):
        raise UserError(f"The run's images are in {root or 'an unknown folder'}, not {collection.root}. {_ADVICE}")
    field = "label" if isinstance(differences[0].says, str) else "tags"
    decisions, _ = desk.sync()
    values = collection.table[field]
    paths = [*dict.fromkeys(itertools.chain.from_iterable((one.path, *one.near) for one in differences))]
    rows = {path: row for path, row in zip(paths, rows_of_paths(collection, paths).tolist()) if row >= 0}
    given = {path: values[row].as_py() for path, row in rows.items()}
    near = {path: (image_address(name, collection, row, _NEAR_PX), str(given[path])) for path, row in rows.items()}
    asked = [_explain(make_question(*one[:3], given[one.path]), one, near) for one in differences if one.path in rows]
    asked = [one for one in asked if one.says != one.had or (one.path, field) in decisions]
    if not asked:
        raise nothing
    review = Review(asked, sorted(count_values(values)) if field == "label" else [])
    review.decisions = decisions
    review.here = review.next()
    address = lambda number, px: image_address(name, collection, rows[asked[number].path], px)  # noqa: E731
    review.about = describe_basis(run, collection)
    return review, address, collection


def open_desk(collection: Collection) -> Desk:
    """Return the decisions about a collection. Raises UserError (`data.root`) if it is no folder."""
    if not isinstance(collection.root, Path):
        raise UserError(f"data.root: {collection.root} is no folder, so it has no place for corrections.jsonl")
    return desk_of(collection.root)


def _explain(question: Question, difference: Difference, near: Mapping[str, tuple[str, str]]) -> Question:
    """Return a question with the reason, if it is known. near: addresses and labels of images by path."""
    if not difference.guesses:
        return question
    guesses = ", ".join(f"{name} {prob:.1%}" for name, prob in difference.guesses.items())
    reason = f"given: {question.had} (right: {1 - difference.by:.1%}) · guessed: {guesses}"
    nearest = [near[path] for path in difference.near if path in near]
    return question._replace(names=[*difference.guesses], reason=reason, near=nearest)


def describe_basis(run: Path, collection: Collection) -> str:
    """Return what orders the images of a review."""
    if says := images_about(run, "says"):
        return f"All other images judge each one, by the features of {says}."
    rows = rows_of_paths(collection, pq.read_table(find_image_table(run))["path"].to_pylist())
    trained = np.isin(rows, collection.rows("train")).sum()
    return (
        f"{run.name} judges {len(rows):,} images and has trained on {trained:,} of them, so it agrees with their wrong "
        f"labels. {_ADVICE}"
    )


def find_review(index: RunIndex, root: str) -> str | None:
    """Return the address of the review of a folder by job=labels, if that has looked at it."""
    found = [Path(report_folder(str(parent), root), "labels") for parent in index.roots]
    return next((f"/review?run={quote(run_name(index, run))}" for run in found if is_own_run(run)), None)


class ReviewPage(Page):
    """The review of a run."""

    addresses = ["/review"]

    async def show(self, run: str = "") -> None:
        """Show the review of a run, by its name."""
        path = find_run(self.site.index, run)
        name = self.site.shelf.of_run(path)
        with self.site.page(f"Review {show_folder(self.site.shelf.config(name).root if name else run)}"):
            note = show_status("Looking for images where network and label differ")
            await ui.context.client.connected()
            with show_fault(note, OSError, ValueError):
                opened = await asyncio.to_thread(open_review, self.site.shelf, path)
                note.text = ""
                Reviewer(*opened)


class Reviewer:
    """The page in one tab. The browser moves on by itself, and says what it has decided; the answer has more images.

    address: of an image, by number and px.
    """

    def __init__(self, review: Review, address: Callable[[int, int], str], collection: Collection) -> None:
        self._review = review
        self._address = address
        self._desk = open_desk(collection)
        self._heard = 0  # the number of the last message of the browser
        self._newest = 0  # the number of the last request to the desk
        self._lock = asyncio.Lock()
        self._screen = Screen(field=review.field, keys=KEYS, together=_SCREEN, hint=review.hint)
        pool = review.classes if len(review.classes) > _CHOICES else []
        train = "/start?folder=" + quote(bytes(collection.root))
        self._screen.props.update(title=show_folder(str(collection.root)), pool=pool, train=train, fault="")
        self._screen.on("say", self._hear)
        self._tell = bind_address("image", self._go_to)
        self._draw()
        ui.timer(REFRESH_SEC, self._save)

    def _draw(self) -> None:
        review = self._review
        cards = []
        for number in review.window():
            large = self._address(number, _LARGE_PX)
            cards.append(review.card(number) | {"src": self._address(number, 256), "large": large})
        shown = {"cards": cards, "names": review.names(), "counts": review.counts, "progress": review.progress()}
        shown["about"] = escape_controls(review.about)
        here = review.questions[review.here].path
        self._screen.props.update(shown, here=here, heard=self._heard)
        self._tell(here)

    def _go_to(self, path: str) -> None:
        self._review.go(path)
        ui.timer(0, self._draw, once=True)

    async def _hear(self, event: GenericEventArguments) -> None:
        """Do what the browser says: messages that it has had no answer to, also those that are done already."""
        lines = []
        for said in event.args:
            if said["number"] > self._heard:
                self._heard = said["number"]
                self._review.by = name_tab()
                lines += self._answer(said)
                if not said["undo"]:
                    self._review.go(said["here"])
        self._draw()
        await self._save(lines)

    def _answer(self, said: Json) -> list[Decision]:
        return self._review.undo() if said["undo"] else self._review.decide(said["values"])

    async def _save(self, lines: Sequence[Decision] = ()) -> None:
        self._newest += 1
        number = self._newest
        async with self._lock:  # lines are written in the order of the keys
            decisions, fault = await asyncio.to_thread(self._desk.sync, lines)
        self._screen.props["fault"] = escape_controls(fault, keep="\n")
        if number == self._newest and decisions != self._review.decisions:  # an older answer lacks the latest keys
            self._review.decisions = decisions
            self._draw()
