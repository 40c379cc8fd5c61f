"""`/review?run=...`: the images where network and label differ most; decisions go to corrections.jsonl."""

import functools
import itertools
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from nicegui import run as background
from nicegui import ui
from nicegui.events import KeyEventArguments

from data.layouts.corrections import Decision, Decisions, Desk, drop_undone, settle
from data.layouts.table import count_values
from utils.errors import UserError
from utils.formats.spelling import Tag, parse_tag, write_tag
from utils.formats.vocabulary import RATINGS
from utils.io.safe_text import escape_controls
from utils.record.run_index import RunIndex
from utils.record.tables import find_differences, images_root
from viewer.images import Shelf, find_rows, image_address
from viewer.parts import REFRESH_SEC, find_run, page

_desk_of = functools.cache(Desk)  # no reload of a tab loses what could not be saved
_MOST, _CARDS = 10_000, 24  # differences, and those on a screen
_HINT = "← → go · X mark · A mark all shown · Enter accept · R reject · 1-9 choose · U undo"
_BUTTON = "no-caps dense unelevated"
_CARD = """<div :class="props.row.kind" @click="() => $parent.$emit('pick', props.row.id)">
<img :src="props.row.image" alt="" loading="lazy"><div class="ellipsis">{{ props.row.text }}</div>
<div class="muted ellipsis">{{ props.row.verdict }}</div></div>"""
_STYLE = """
.review { display: grid; gap: 16px; grid-template-columns: minmax(0, 1fr); width: 100%; align-items: start }
@media (min-width: 900px) { .review { grid-template-columns: minmax(0, 2fr) minmax(0, 3fr) } }
.cards .q-table__grid-content { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 8px;
  align-content: start }
.card { border: 2px solid transparent; border-radius: 6px; padding: 4px; cursor: pointer; font-size: 13px }
.card img { width: 100%; aspect-ratio: 1; object-fit: contain } .decided img { opacity: .35 }
.marked { background: #1c6dd033 } .here { border-color: #1c6dd0 }
.large { width: 100%; height: min(46vh, 90vw, 420px) }
"""


class Question(NamedTuple):
    """An image of a review. had: its label or tags without decisions; says: what they are for the network.

    by: how far these are apart, 0 to 1; names: the classes, or the tags that differ, for the first keys.
    """

    path: str
    by: float
    had: Any
    says: Any
    names: Sequence[str]


def ask(path: str, by: float, says: str | Mapping[str, bool], had: Any) -> Question:
    """Return the question about a difference. Ratings are no tags; the network's tags are spelled like the others."""
    if isinstance(says, str):
        return Question(path, by, had, says, [name for name in (says, had) if name])
    texts, spaces = {parse_tag(tag).name: tag for tag in had}, any(" " in tag for tag in had)
    names = [texts.get(name) or write_tag(Tag(None, name), spaces=spaces) for name, is_added in says.items()
             if is_added != (name in texts) and name not in RATINGS]  # fmt: skip
    return Question(path, by, had, switch_tags(had, had, names), names)


def switch_tags(had: Sequence[str], tags: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the tags with some added or taken away; those that the image had stay in its order."""
    kept = {*tags}.symmetric_difference(names)
    return [tag for tag in dict.fromkeys([*had, *tags, *names]) if tag in kept]


class Review:
    """The questions in one tab. here: the shown one; marked: others that a key is for, too; by: the tab."""

    def __init__(self, questions: Sequence[Question], classes: Sequence[str] = ()) -> None:
        self.questions, self.classes = questions, classes
        self.field = "tags" if isinstance(questions[0].had, list) else "label"
        self.decisions, self.here, self.marked, self.by = Decisions(), 0, set[int](), ""

    def _stack(self, number: int) -> list[Decision]:
        return self.decisions.get((self.questions[number].path, self.field), [])

    def last(self, number: int) -> Decision | None:
        """Return the decision about an image that counts."""
        had = self.questions[number].had
        last = settle(had, self._stack(number))
        return last if last and (last.verdict != "undone" or last.now != had) else None

    def next(self) -> int:
        """Return the next image without a decision, or the shown one if there is none."""
        order = itertools.chain(range(self.here, len(self.questions)), range(self.here))
        return next((each for each in order if self.last(each) is None), self.here)

    def shown(self, number: int) -> Any:
        """Return what was decided about an image, or else what the network says."""
        last = self.last(number)
        return last.now if last else self.questions[number].says

    def choices(self) -> dict[str, bool]:
        """Return the classes or tags of the keys 1 to 9 for the shown image, and whether it has them as it is shown."""
        value = self.shown(self.here)
        names = dict.fromkeys([*self.questions[self.here].names, *self.classes])
        return {name: name in value if self.field == "tags" else name == value for name in [*names][:9]}

    def card(self, number: int, image: str) -> dict[str, Any]:
        """Return what a small image shows: what its label becomes, or which tags are added and taken away."""
        last, had, value = self.last(number), self.questions[number].had, self.shown(number)
        text = f"{had} → {value}" if value != had else str(had)
        if self.field == "tags":
            changed = {*had}.symmetric_difference(value)
            text = " ".join(f"{'−' if tag in had else '+'}{tag}" for tag in [*had, *value] if tag in changed)
        verdict = f"{last.verdict} by {last.by}" if last else f"{self.questions[number].by:.3f}"
        kinds = {"card": True, "here": number == self.here, "marked": number in self.marked, "decided": last}
        texts = {"text": escape_controls(text), "verdict": escape_controls(verdict)}
        return {"id": number, "image": image, **texts, "kind": " ".join(kind for kind in kinds if kinds[kind])}

    def press(self, key: str) -> list[Decision]:
        """Do what a key means; return the decisions to save."""
        first, targets, choices = self.here // _CARDS * _CARDS, sorted(self.marked) or [self.here], [*self.choices()]
        if key in ("ArrowLeft", "ArrowRight"):
            self.here = min(max(self.here + (1 if key == "ArrowRight" else -1), 0), len(self.questions) - 1)
        elif key == "x":
            self.marked ^= {self.here}
        elif key == "a":
            self.marked |= {*range(len(self.questions))[first : first + _CARDS]}
        elif key == "Enter":
            return self._decide({each: self.questions[each].says for each in targets if self.last(each) is None})
        elif key == "r":
            return self._decide({each: self.questions[each].had for each in targets})
        elif key == "u":
            return self._undo()
        elif key.isdecimal() and 0 < int(key) <= len(choices):
            return self.choose(choices[int(key) - 1])
        return []

    def choose(self, name: str) -> list[Decision]:
        """Give a class to the marked images, or to the shown one; or give the shown one a tag, or take it away."""
        if self.field == "label":
            return self._decide(dict.fromkeys(sorted(self.marked) or [self.here], name))
        return self._write({self.here: switch_tags(self.questions[self.here].had, self.shown(self.here), [name])})

    def _decide(self, values: Mapping[int, Any]) -> list[Decision]:
        """Return decisions, and show the next image without one."""
        lines = self._write(values)
        self.marked.clear()
        self.here = self.next()
        return lines

    def _undo(self) -> list[Decision]:
        """Return the lines that go back behind this tab's last decisions, and show their first image."""
        stacks = {each: drop_undone(self._stack(each)) for each in range(len(self.questions)) if self.last(each)}
        own = {each: stack for each, stack in stacks.items() if stack and stack[-1].by == self.by}
        newest = max((stack[-1].at for stack in own.values()), default="")
        values = {each: (stack[-2].now if stack[1:] else stack[-1].was)
                  for each, stack in own.items() if stack[-1].at == newest}  # fmt: skip
        self.here = min(values, default=self.here)
        return self._write(values, "undone")

    def _write(self, values: Mapping[int, Any], verdict: str | None = None) -> list[Decision]:
        at, lines = datetime.now(UTC).isoformat(timespec="microseconds"), []
        for number, now in values.items():
            path, _, was, says, _ = self.questions[number]
            kind = verdict or ("rejected" if now == was else "accepted" if now == says else "edited")
            lines.append(Decision(path=path, field=self.field, was=was, now=now, verdict=kind, by=self.by, at=at))
            self.decisions.setdefault((path, self.field), []).append(lines[-1])
        return lines


def open_review(shelf: Shelf, run: Path) -> tuple[Review, Callable[[int, int], str], Desk]:
    """Return the differences of a run in images of its collection, their addresses by number and px, and the decisions.

    Raises UserError if there is none, with the command that finds them, or if the collection is no folder.
    """
    name, found = shelf.of_run(run), find_differences(run, _MOST)
    command = shlex.join(["python", "evaluate.py", f"run_dir={run}", "split=all", "per_image=true"])
    nothing = UserError(f"No image is known where network and label differ. This looks for them: {command}")
    if name is None or not found:
        raise nothing
    collection, root = shelf.open(name, again=True, corrected=False), images_root(run)
    if not isinstance(collection.root, Path):
        raise UserError(f"data.root: {collection.root} is no folder, so no correction can be kept beside it")
    if root != str(collection.root):
        raise UserError(f"The table of images is about {root or 'an unknown folder'}, not {collection.root}: {command}")
    desk, field = _desk_of(collection.root), "label" if isinstance(found[0][2], str) else "tags"
    (decisions, _), column = desk.sync(), collection.table[field]
    rows = zip(found, find_rows(collection, [path for path, _, _ in found]).tolist())
    asked = [(ask(*each, column[row].as_py()), row) for each, row in rows if row >= 0]
    asked = [(each, row) for each, row in asked if each.says != each.had or (each.path, field) in decisions]
    if not asked:
        raise nothing
    review = Review([each for each, _ in asked], [*count_values(collection.table["label"])] if field == "label" else [])
    review.decisions = decisions
    review.here = review.next()
    return review, lambda number, px: image_address(name, collection, asked[number][1], px), desk


def add_page(index: RunIndex, shelf: Shelf) -> None:
    """Add the page."""

    @ui.page("/review")
    async def show(run: str = "") -> None:
        path = find_run(index, run)
        with page(f"Review {escape_controls(path.name)}"):
            ui.add_css(_STYLE)
            note = ui.label("Looking for images where network and label differ").style("overflow-wrap: anywhere")
            await ui.context.client.connected()
            try:
                review, address, desk = await background.io_bound(open_review, shelf, path)
            except (OSError, ValueError) as error:
                note.text = escape_controls(str(error))
                return
            note.delete()
            review.by = (ui.context.client.tab_id or "")[:8]
            _show(review, address, desk)


def _show(review: Review, address: Callable[[int, int], str], desk: Desk) -> None:
    newest = 0
    with ui.row().classes("items-center w-full"):
        for title, key in (("Accept", "Enter"), ("Reject", "r"), ("Undo", "u")):
            ui.button(title, on_click=lambda _, key=key: press(key)).props(f"{_BUTTON} padding='4px 12px'")
        progress = ui.label()
    waiting = ui.label().classes("text-negative")
    ui.label(_HINT).classes("muted")
    with ui.element("div").classes("review"):
        with ui.column().classes("w-full"):
            picture, title = ui.image().props("fit=contain no-spinner no-transition").classes("large"), ui.label()
            title.classes("mono").style("overflow-wrap: anywhere")
            chips = ui.row()
            if review.field == "label":
                other = ui.select(review.classes, label="another class", with_input=True).props("dense outlined")
                other.classes("w-full").on_value_change(lambda event: event.value and choose(event.value))
        cards = ui.table(columns=[], rows=[], row_key="id", pagination=0).classes("w-full cards")
        cards.props("grid hide-header hide-pagination").add_slot("item", _CARD)

    async def save(lines: Sequence[Decision] = ()) -> None:
        nonlocal newest
        newest = number = newest + 1
        decisions, fault = await background.io_bound(desk.sync, lines)
        waiting.text = escape_controls(fault)
        if number == newest and decisions != review.decisions:  # an older answer lacks the latest keys
            review.decisions = decisions
            draw()

    async def take(lines: Sequence[Decision]) -> None:
        draw()
        await save(lines)

    async def press(key: str) -> None:
        ui.run_javascript("document.activeElement?.blur()")  # keys are not for the button that was clicked
        await take(review.press(key))

    async def choose(name: str) -> None:
        other.value = None
        await take(review.choose(name))

    async def on_key(event: KeyEventArguments) -> None:
        if event.action.keydown and not (event.modifiers.ctrl or event.modifiers.alt or event.modifiers.meta):
            await press(event.key.name.lower() if len(event.key.name) == 1 else event.key.name)

    def show(number: int) -> None:
        review.here = number
        draw()

    def draw() -> None:
        first, numbers = review.here // _CARDS * _CARDS, range(len(review.questions))
        cards.rows = [review.card(each, address(each, 256)) for each in numbers[first : first + _CARDS]]
        decided = sum(review.last(each) is not None for each in numbers)
        progress.text = f"{decided:,} of {len(numbers):,} decided"
        picture.source = address(review.here, 1024)
        title.text = f"{escape_controls(review.questions[review.here].path)}: {cards.rows[review.here - first]['text']}"
        chips.clear()
        with chips:
            for number, (name, is_on) in enumerate(review.choices().items(), start=1):
                chip = ui.button(f"{number} {escape_controls(name)}", on_click=lambda _, key=str(number): press(key))
                chip.props(f"{_BUTTON} padding='2px 8px'" + ("" if is_on else " outline"))

    cards.on("pick", lambda event: show(event.args))
    ui.keyboard(on_key)
    draw()
    ui.timer(REFRESH_SEC, save)
