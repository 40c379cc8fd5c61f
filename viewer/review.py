"""`/review?run=...`: the images where network and label differ most; decisions go to corrections.jsonl."""

import asyncio
import functools
import itertools
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pyarrow.parquet as pq
from nicegui import ui
from nicegui.events import KeyEventArguments

from data.collection.collection import Collection
from data.layouts.corrections import Decision, Decisions, Desk, decide, desk_of, settle
from data.layouts.table import count_values
from utils.errors import UserError
from utils.formats.spelling import Tag, parse_tag, write_tag
from utils.formats.vocabulary import RATINGS
from utils.io.files import Json
from utils.io.safe_text import escape_controls
from utils.record.run_index import RunIndex, is_own_run
from utils.record.tables import LABELS, Difference, find_differences, find_images, images_about
from viewer.images import Shelf, find_rows, image_address
from viewer.parts import REFRESH_SEC, bind_address, find_run, run_name, show_grid
from viewer.site import Site

_MOST = 10_000  # differences
_CARDS = 24  # those on a screen
_BUTTONS = {"Accept": "Enter", "Reject": "r", "Undo": "u"}  # and their keys
KEYS = "123456789bcdefghijklmnopqstvwyz"  # of classes or tags; a, r, u and x do something else
_CHOICES = 9  # those that a review uses
_NEAR_PX = 128
# A key is for the page only while none of these has the focus.
_FOCUSABLE = ["a", "button", "div", "input", "select", "summary", "textarea"]
_CARD = """<div class="card" :class="props.row.kinds"
 @click="event => $parent.$emit('pick', [props.row.id, event.shiftKey])">
<img :src="props.row.image" alt="" loading="lazy"><div class="ellipsis">{{ props.row.text }}</div>
<div class="muted ellipsis">{{ props.row.verdict }}</div></div>"""
_NEAR = (
    """<div><img :src="props.row.src" :alt="props.row.label"><div class="ellipsis">{{ props.row.label }}</div></div>"""
)
# The first class that is found is chosen by Enter; once the list is closed, keys are for the page again.
_FIRST = "() => setTimeout(() => getElement({}).$refs.qRef.setOptionIndex(0), 50)"
_LEAVE = "() => setTimeout(() => document.activeElement.blur(), 50)"
_STYLE = """
.links { display: flex; flex-wrap: wrap; gap: 8px }
.near { display: grid; gap: 8px; grid-template-columns: repeat(auto-fill, minmax(88px, 1fr)); font-size: 13px }
.near:not(:empty)::before { content: "The images most like it, with their labels"; grid-column: 1 / -1 }
.near img { height: 88px; width: 100%; object-fit: contain; display: block }
.review { display: grid; gap: 16px; grid-template-columns: minmax(0, 1fr); width: 100%; align-items: start }
@media (min-width: 900px) { .review { grid-template-columns: minmax(0, 2fr) minmax(0, 3fr) } }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 8px;
  align-content: start }
.card { border: 2px solid transparent; border-radius: 6px; padding: 4px; cursor: pointer; font-size: 13px }
.card img { width: 100%; aspect-ratio: 1; object-fit: contain } .decided img { opacity: .35 }
.marked { background: #1c6dd033 } .here { border-color: #1c6dd0 }
.large { width: 100%; height: min(46vh, 90vw, 420px) }
"""


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


def ask(path: str, by: float, says: str | Mapping[str, bool], had: Any) -> Question:
    """Return the question about a difference. Ratings are no tags; the network's tags are spelled like the others."""
    if isinstance(says, str):
        return Question(path, by, had, says, [name for name in (says, had) if name])
    texts = {parse_tag(tag).name: tag for tag in had}
    spaces = any(" " in tag for tag in had)
    differing = [name for name, is_added in says.items() if is_added != (name in texts) and name not in RATINGS]
    names = [texts.get(name) or write_tag(Tag(None, name), spaces=spaces) for name in differing]
    return Question(path, by, had, switch_tags(had, had, names), names)


def switch_tags(had: Sequence[str], tags: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the tags with some added or taken away; those that the image had stay in its order."""
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
        self.order: Sequence[int] = range(len(questions))
        self.decisions = Decisions()
        self.here = 0
        self.marked = set[int]()
        self.by = ""
        self._done: list[list[int]] = []  # what this page has decided on

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
        return next((each for each in further if self.last(each) is None), self.here)

    def progress(self) -> str:
        """Return how far the decisions are."""
        count = len(self.questions)
        decided = sum(self.last(each) is not None for each in range(count))
        return f"{decided:,} of {count:,} decided"

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
        names = self.keys().values()
        return {name: name in value if self.field == "tags" else name == value for name in names}

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
        texts = {"text": escape_controls(text), "verdict": escape_controls(verdict)}
        return {"id": number, "image": image, **texts, "kinds": kinds}

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
            says = {each: self.questions[each].says for each in targets if self.last(each) is None}
            return self._decide({each: value for each, value in says.items() if value is not None})
        elif key == "r":
            return self._decide({each: self.questions[each].had for each in targets})
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
        alike = [each for each in targets if (name in self.shown(each)) == had]
        return self._write({each: switch_tags(self.questions[each].had, self.shown(each), [name]) for each in alike})

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
    found = find_differences(run, _MOST)
    if name is None or not found:
        raise nothing
    collection = shelf.open(name, again=True, corrected=False)
    root = images_about(run, "root")
    desk = open_desk(collection)
    if root != str(collection.root):
        raise UserError(f"The table of images is about {root or 'an unknown folder'}, not {collection.root}: {command}")
    field = "label" if isinstance(found[0].says, str) else "tags"
    decisions, _ = desk.sync()
    values = collection.table[field]
    paths = [*{path: None for each in found for path in (each.path, *each.near)}]
    rows = {path: row for path, row in zip(paths, find_rows(collection, paths).tolist()) if row >= 0}
    given = {path: values[row].as_py() for path, row in rows.items()}
    near = {path: (image_address(name, collection, row, _NEAR_PX), str(given[path])) for path, row in rows.items()}
    asked = [_explain(ask(*each[:3], given[each.path]), each, near) for each in found if each.path in rows]
    asked = [each for each in asked if each.says != each.had or (each.path, field) in decisions]
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
        raise UserError(f"data.root: {collection.root} is no folder, so no correction can be kept beside it")
    return desk_of(collection.root)


def _explain(question: Question, found: Difference, near: Mapping[str, tuple[str, str]]) -> Question:
    """Return a question with its reason, if that is known. near: addresses and labels of images by path."""
    if not found.guesses:
        return question
    guesses = ", ".join(f"{name} {prob:.1%}" for name, prob in found.guesses.items())
    reason = f"given: {question.had} (right: {1 - found.by:.1%}) · guessed: {guesses}"
    nearest = [near[path] for path in found.near if path in near]
    return question._replace(names=[*found.guesses], reason=reason, near=nearest)


def describe_basis(run: Path, collection: Collection) -> str:
    """Return what the order of a review stands on, and how many images have no part in it."""
    if says := images_about(run, "says"):
        return f"All other images judge each one, by the features of {says}."
    rows = find_rows(collection, pq.read_table(find_images(run))["path"].to_pylist())
    trained = np.isin(rows, collection.rows("train")).sum()
    others = np.count_nonzero(collection.weights()) - len(rows)
    return (
        f"{run.name} judges {len(rows):,} images and has trained on {trained:,} of them, whose wrong labels it agrees "
        f"with; {others:,} others have no part here. This judges each image by all others: "
        + judge_command(collection.root)
    )


def judge_command(root: Path | str) -> str:
    """Return the command that lets each image of a collection be judged by all others."""
    return shlex.join(["python", "prepare.py", "job=labels", f"data.root={root}"])


def find_review(index: RunIndex, root: str) -> str | None:
    """Return the address of the review of a folder by job=labels, if that has looked at it."""
    found = [file.parents[1] for parent in index.roots for file in parent.glob(f"*/labels/{LABELS}")]
    names = [run_name(index, run) for run in found if is_own_run(run) and images_about(run, "root") == root]
    return f"/review?run={quote(names[0])}" if names else None


def add_page(site: Site) -> None:
    """Add the page."""

    @ui.page("/review")
    async def show(run: str = "") -> None:
        path = find_run(site.index, run)
        with site.page(f"Review {escape_controls(path.name)}"):
            note = ui.label("Looking for images where network and label differ").style("overflow-wrap: anywhere")
            await ui.context.client.connected()
            try:
                review, address, desk, basis = await asyncio.to_thread(open_review, site.shelf, path)
            except (OSError, ValueError) as error:
                note.text = escape_controls(str(error))
                return
            note.text = escape_controls(basis)
            review.by = (ui.context.client.tab_id or "")[:8]
            ReviewPage(review, address, desk)


class ReviewPage:
    """The review in one tab: buttons and keys, the shown image with its choices, and small images beside it."""

    def __init__(self, review: Review, address: Callable[[int, int], str], desk: Desk) -> None:
        ui.add_css(_STYLE)
        self._review = review
        self._address = address
        self._desk = desk
        self._newest = 0  # the number of the last request to the desk
        with ui.row():
            for title, key in _BUTTONS.items():
                self._add_button(key).set_text(title)
            self._progress = ui.label()
        self._waiting = ui.label().classes("text-negative").style("white-space: pre-line; overflow-wrap: anywhere")
        ui.label(review.hint).classes("muted")
        with ui.element("div").classes("review"):
            with ui.column().classes("w-full"):
                self._build_image()
            self._cards = show_grid("cards", _CARD).on("pick", lambda event: self._pick(*event.args))
        ui.keyboard(self._on_key, ignore=_FOCUSABLE)
        self._tell = bind_address("image", self._go_to)
        self._draw()
        ui.timer(REFRESH_SEC, self._save)

    def _add_button(self, key: str) -> ui.button:
        """Add a button that does what a key does. A click leaves the focus where it was, so that keys go on acting."""
        button = ui.button(on_click=functools.partial(self._press, key))
        button.props("dense padding='4px 12px'")
        return button.on("mousedown.prevent", js_handler="() => {}")

    def _build_image(self) -> None:
        self._picture = ui.image().props("no-transition alt='the image'").classes("large")
        self._title = ui.label().classes("mono").style("overflow-wrap: anywhere")
        with ui.row():
            self._chips = {key: self._add_button(key) for key in KEYS}
        self._reason = ui.label().style("overflow-wrap: anywhere")
        self._near = show_grid("near", _NEAR)
        self._other = None
        if len(self._review.classes) > _CHOICES:
            other = ui.select(self._review.classes, label="another class", with_input=True).classes("w-full")
            other.on("input-value", js_handler=_FIRST.format(other.id))
            for event in ("popup-hide", "keydown.esc"):
                other.on(event, js_handler=_LEAVE)
            other.on_value_change(lambda event: event.value and self._choose(event.value))
            self._other = other

    def _draw(self) -> None:
        review = self._review
        numbers = review.screen()
        self._cards.rows = [review.card(each, self._address(each, 256)) for each in numbers]
        self._progress.text = review.progress()
        self._tell(review.questions[review.here].path)
        self._picture.source = self._address(review.here, 1024)
        text = self._cards.rows[numbers.index(review.here)]["text"]
        self._title.text = f"{escape_controls(review.questions[review.here].path)}: {text}"
        self._reason.text = escape_controls(review.questions[review.here].reason)
        near = review.questions[review.here].near
        self._near.rows = [{"src": address, "label": escape_controls(label)} for address, label in near]
        names = review.keys()
        choices = review.choices()
        for key, chip in self._chips.items():  # the same elements, so that one keeps the focus
            chip.set_visibility(key in names)
            if key in names:
                chip.set_text(f"{key} {escape_controls(names[key])}")
                chip.props(remove="outline") if choices[names[key]] else chip.props("outline")

    def _go_to(self, path: str) -> None:
        """Show an image by its path, if it is in the order."""
        numbers = {self._review.questions[number].path: number for number in self._review.order}
        self._review.here = numbers.get(path, self._review.here)
        ui.timer(0, self._draw, once=True)

    def _pick(self, number: int, is_through: bool) -> None:
        self._review.pick(number, is_through)
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

    async def _press(self, key: str) -> None:
        await self._take(self._review.press(key))

    async def _choose(self, name: str) -> None:
        self._other.value = None
        await self._take(self._review.choose(name))

    async def _on_key(self, event: KeyEventArguments) -> None:
        if event.action.keydown and not (event.modifiers.ctrl or event.modifiers.alt or event.modifiers.meta):
            key = event.key.name.lower() if len(event.key.name) == 1 else event.key.name
            if key == "c" and self._other is not None:
                self._other.run_method("focus")
            await self._press(key)
