"""`/review?run=...`: the images where network and label differ most; decisions go to corrections.jsonl."""

import asyncio
import itertools
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pyarrow.parquet as pq
from nicegui import ui
from nicegui.events import GenericEventArguments

from data.collection.collection import Collection
from data.layouts.corrections import Decision, Decisions, Desk, decide, desk_of, settle
from data.layouts.table import count_values
from utils.errors import UserError
from utils.formats.spelling import RATINGS, Tag, parse_tag, write_tag
from utils.io.files import Json
from utils.io.safe_text import escape_controls
from utils.record.run_index import RunIndex, is_own_run
from utils.record.tables import LABELS, find_image_table, images_about
from viewer.differences import Difference, find_differences
from viewer.images import Shelf, image_address, rows_of_paths
from viewer.parts import (
    REFRESH_SEC,
    Cards,
    Part,
    bind_address,
    find_run,
    make_card,
    name_tab,
    run_name,
    show_fault,
    show_status,
)
from viewer.site import Page

_MOST = 10_000  # differences
_CARDS = 24  # on a screen
_BUTTONS = [
    {"key": "Enter", "text": "Accept", "chosen": True},
    {"key": "r", "text": "Reject", "chosen": True},
    {"key": "u", "text": "Undo", "chosen": True},
]
KEYS = "123456789bcdefghijklmnopqstvwyz"  # of classes or tags; a, r, u and x do something else
_CHOICES = 9  # keys of a review
_NEAR_PX = 128
_STYLE = """
.review { display: grid; gap: 16px; grid-template-columns: minmax(0, 1fr); width: 100%; align-items: start }
@media (min-width: 900px) { .review { grid-template-columns: minmax(0, 2fr) minmax(0, 3fr) } }
"""


class Picture(Part, component="vue/picture.vue"):
    """A large picture, and the keys of its page."""


class Chips(Part, component="vue/chips.vue"):
    """A row of buttons, each with its key; and a field that finds other names."""


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
    """The questions in one tab. here: the shown one; marked: others that a key is for, too; by: the tab.

    order: the numbers of the questions that are shown.
    """

    def __init__(self, questions: Sequence[Question], classes: Sequence[str] = ()) -> None:
        self.questions = questions
        self.classes = classes
        self.field = "tags" if isinstance(questions[0].had, list) else "label"
        self._has_fixed_keys = 0 < len(classes) <= _CHOICES
        self.order = range(len(questions))
        self.decisions = Decisions()
        self.here = 0
        self.marked = set[int]()
        self.by = ""
        self._done = []  # what this page has decided on

    @property
    def hint(self) -> str:
        """What the keys do."""
        keys = "1-3 choose a guess · C another class by its name"
        if self.field == "tags":
            keys = "1-9 switch a tag below the image"
        elif self._has_fixed_keys:
            keys = f"1-{len(self.classes)} choose a class, which keeps its key"
        return f"← → go · X, click, Shift+click mark · A mark all shown · Enter accept · R reject · {keys} · U undo"

    def last(self, number: int) -> Decision | None:
        """Return the decision about an image that counts."""
        path, _, had, *_ = self.questions[number]
        last = settle(had, self.decisions.get((path, self.field), ()))
        return last if last and last.verdict != "undone" else None

    def screen(self) -> Sequence[int]:
        """Return the numbers of the images that are shown together with the shown one."""
        first = self.order.index(self.here) // _CARDS * _CARDS
        return self.order[first : first + _CARDS]

    def next(self) -> int:
        """Return the next image without a decision, or the shown one if there is none."""
        at = self.order.index(self.here)
        further = itertools.chain(self.order[at:], self.order[:at])
        return next((number for number in further if self.last(number) is None), self.here)

    def progress(self) -> str:
        """Return how far the decisions are."""
        count = len(self.questions)
        return f"{sum(self.last(number) is not None for number in range(count)):,} of {count:,} decided"

    def shown(self, number: int) -> Any:
        """Return what was decided about an image, or else what the network says."""
        last = self.last(number)
        return last.now if last else self.questions[number].says

    def keys(self) -> dict[str, str]:
        """Return the class or the tag of each key for the shown image; few classes have the same keys for all."""
        return dict(zip(KEYS[:_CHOICES], self.classes if self._has_fixed_keys else self.questions[self.here].names))

    def choices(self) -> dict[str, bool]:
        """Return the classes or tags that have a key, and whether the shown image has them as it is shown."""
        value = self.shown(self.here)
        return {name: name in value if self.field == "tags" else name == value for name in self.keys().values()}

    def card(self, number: int, image: str) -> Json:
        """Return what a small image shows: what its label becomes, or which tags are added and taken away."""
        last = self.last(number)
        had = self.questions[number].had
        value = self.shown(number)
        text = str(value or "no label") if had in (None, value) else f"{had} → {value}"
        if self.field == "tags":
            changed = {*had}.symmetric_difference(value)
            text = " ".join(f"{'−' if tag in had else '+'}{tag}" for tag in [*had, *value] if tag in changed)
        verdict = f"{last.verdict} by {last.by}" if last else f"doubt {self.questions[number].by:.1%}"
        kinds = {"here": number == self.here, "marked": number in self.marked, "decided": last is not None}
        return make_card(image, "", text, verdict) | {"id": number, "kinds": kinds}

    def press(self, key: str) -> list[Decision]:
        """Do what a key means; return the decisions to save."""
        targets = sorted(self.marked) or [self.here]
        if key in ("ArrowLeft", "ArrowRight"):
            at = self.order.index(self.here) + (1 if key == "ArrowRight" else -1)
            self.here = self.order[min(max(at, 0), len(self.order) - 1)]
        elif key == "x":
            self.marked ^= {self.here}
        elif key == "a":
            self.marked |= {*self.screen()}
        elif key == "Enter":
            says = {number: self.questions[number].says for number in targets if self.last(number) is None}
            return self._decide({number: value for number, value in says.items() if value is not None})
        elif key == "r":
            return self._decide({number: self.questions[number].had for number in targets})
        elif key == "u":
            return self._undo()
        elif name := self.keys().get(key):
            return self.choose(name)
        return []

    def choose(self, name: str) -> list[Decision]:
        """Give a class to the marked images, or to the shown one; or a tag, or take it away if the shown one has it."""
        targets = sorted(self.marked) or [self.here]
        if self.field == "label":
            return self._decide(dict.fromkeys(targets, name))
        had = name in self.shown(self.here)
        alike = [number for number in targets if (name in self.shown(number)) == had]
        tags = {number: switch_tags(self.questions[number].had, self.shown(number), [name]) for number in alike}
        return self._write(tags)

    def pick(self, number: int, is_through: bool) -> None:
        """Show an image of the screen and mark it, or not any more; is_through: mark all from the shown one to it."""
        first, last = sorted(map(self.order.index, (self.here, number)))
        self.marked = self.marked | {*self.order[first : last + 1]} if is_through else self.marked ^ {number}
        self.here = number

    def _decide(self, values: Mapping[int, Any]) -> list[Decision]:
        """Return decisions, and show the next image without one."""
        lines = self._write(values)
        self.marked.clear()
        self.here = self.next()
        return lines

    def _undo(self) -> list[Decision]:
        """Return the lines that take this page's last decisions back, and show their first image."""
        numbers = self._done.pop() if self._done else []
        self.here = min({*numbers} & {*self.order}, default=self.here)
        return [self._add(number, self.questions[number].had, "undone") for number in numbers]

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


def open_review(shelf: Shelf, run: Path) -> tuple[Review, Callable[[int, int], str], Desk, str]:
    """Return the differences of a run in images of its collection, their addresses by number and px, and the decisions.

    The last one is what the order stands on. Raises UserError if there is no difference, with the command that finds
    them, or if the collection is no folder.
    """
    name = shelf.of_run(run)
    command = judge_command("PATH" if name is None else shelf.config(name).root)
    nothing = UserError(f"No image is known where network and label differ. This looks for them: {command}")
    differences = find_differences(run, _MOST)
    if name is None or not differences:
        raise nothing
    collection = shelf.open(name, again=True, corrected=False)
    root = images_about(run, "root")
    desk = open_desk(collection)
    if root != str(collection.root):
        raise UserError(f"The table of images is about {root or 'an unknown folder'}, not {collection.root}: {command}")
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
    return review, address, desk, describe_basis(run, collection)


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
    """Return what orders the images of a review, and how many images the review leaves out."""
    if says := images_about(run, "says"):
        return f"All other images judge each one, by the features of {says}."
    rows = rows_of_paths(collection, pq.read_table(find_image_table(run))["path"].to_pylist())
    trained = np.isin(rows, collection.rows("train")).sum()
    others = np.count_nonzero(collection.weights()) - len(rows)
    return (
        f"{run.name} judges {len(rows):,} images and has trained on {trained:,} of them, so it agrees with their wrong "
        f"labels. {others:,} further images are not judged. This command judges each image by all others: "
        + judge_command(collection.root)
    )


def judge_command(root: Path | str) -> str:
    """Return the command that judges each image of a collection by all other images."""
    return shlex.join(["python", "prepare.py", "job=labels", f"data.root={root}"])


def find_review(index: RunIndex, root: str) -> str | None:
    """Return the address of the review of a folder by job=labels, if that has looked at it."""
    files = itertools.chain.from_iterable(parent.glob(f"*/labels/{LABELS}") for parent in index.roots)
    runs = [file.parents[1] for file in files]
    names = [run_name(index, run) for run in runs if is_own_run(run) and images_about(run, "root") == root]
    return f"/review?run={quote(names[0])}" if names else None


class ReviewPage(Page):
    """The review of a run."""

    addresses = ["/review"]

    async def show(self, run: str = "") -> None:
        """Show the review of a run, by its name."""
        path = find_run(self.site.index, run)
        with self.site.page(f"Review {escape_controls(path.name)}"):
            note = show_status("Looking for images where network and label differ")
            await ui.context.client.connected()
            with show_fault(note, OSError, ValueError):
                review, address, desk, basis = await asyncio.to_thread(open_review, self.site.shelf, path)
                note.text = escape_controls(basis)
                review.by = name_tab()
                Reviewer(review, address, desk)


class Reviewer:
    """The review in one tab: buttons and keys, the shown image with its choices, and small images beside it."""

    def __init__(self, review: Review, address: Callable[[int, int], str], desk: Desk) -> None:
        ui.add_css(_STYLE)
        self._review = review
        self._address = address
        self._desk = desk
        self._newest = 0  # the number of the last request to the desk
        with ui.row():
            Chips(chips=_BUTTONS).on("press", self._on_key)
            self._progress = ui.label()
        self._waiting = ui.label().classes("text-negative lines")
        ui.label(review.hint).classes("muted")
        with ui.element("div").classes("review"):
            with ui.column().classes("w-full"):
                self._picture = Picture().on("key", self._on_key)
                names = review.classes if len(review.classes) > _CHOICES else []
                self._chips = Chips(names=names).classes("w-full").on("press", self._on_key).on("choose", self._choose)
                self._reason = ui.label().style("overflow-wrap: anywhere")
                self._near = Cards(look="near")
            self._cards = Cards(look="choice").on("pick", self._pick)
        self._tell = bind_address("image", self._go_to)
        self._draw()
        ui.timer(REFRESH_SEC, self._save)

    def _draw(self) -> None:
        review = self._review
        shown = review.questions[review.here]
        numbers = review.screen()
        cards = [review.card(number, self._address(number, 256)) for number in numbers]
        self._cards.props["cards"] = cards
        self._progress.text = review.progress()
        self._tell(shown.path)
        title = f"{escape_controls(shown.path)}: {cards[numbers.index(review.here)]['lines'][0]}"
        self._picture.props.update(src=self._address(review.here, 1024), title=title)
        self._reason.text = escape_controls(shown.reason)
        self._near.props["cards"] = [make_card(address, label, label) for address, label in shown.near]
        choices = review.choices()
        self._chips.props["chips"] = [
            {"key": key, "text": f"{key} {escape_controls(name)}", "chosen": choices[name]}
            for key, name in review.keys().items()
        ]

    def _go_to(self, path: str) -> None:
        """Show an image by its path, if it is in the order."""
        numbers = {self._review.questions[number].path: number for number in self._review.order}
        self._review.here = numbers.get(path, self._review.here)
        ui.timer(0, self._draw, once=True)

    def _pick(self, event: GenericEventArguments) -> None:
        self._review.pick(*event.args)
        self._draw()

    async def _save(self, lines: Sequence[Decision] = ()) -> None:
        self._newest += 1
        number = self._newest
        decisions, fault = await asyncio.to_thread(self._desk.sync, lines)
        self._waiting.text = escape_controls(fault, keep="\n")
        if number == self._newest and decisions != self._review.decisions:  # an older answer lacks the latest keys
            self._review.decisions = decisions
            self._draw()

    async def _take(self, lines: Sequence[Decision]) -> None:
        self._draw()
        await self._save(lines)

    async def _choose(self, event: GenericEventArguments) -> None:
        await self._take(self._review.choose(event.args))

    async def _on_key(self, event: GenericEventArguments) -> None:
        if event.args == "c":
            self._chips.run_method("find")
        await self._take(self._review.press(event.args))
