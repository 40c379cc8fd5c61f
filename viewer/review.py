"""`/review?run=...`: the images where network and label differ most; decisions go to corrections.jsonl."""

import functools
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

from nicegui import run as background
from nicegui import ui
from nicegui.events import KeyEventArguments

from data.layouts.corrections import (
    CORRECTIONS,
    Decision,
    Decisions,
    append_corrections,
    read_corrections,
    settle,
)
from data.layouts.spelling import Tag, parse_tag, write_tag
from data.layouts.table import count_values
from utils.errors import UserError
from utils.io.safe_text import escape_controls
from utils.record.run_index import RunIndex
from utils.record.tables import Difference, find_differences
from utils.vocabulary import RATINGS
from viewer.images import Shelf, find_rows, image_address
from viewer.parts import REFRESH_SEC, find_run, page

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


class Desk:
    """The decisions about a collection: those in its file, and those that the file could not take yet."""

    def __init__(self, root: Path) -> None:
        self._root, self._lock, self._waiting = root, Lock(), list[Decision]()
        self._saved, self._version = Decisions(), None

    def sync(self, new: Sequence[Decision] = ()) -> tuple[Decisions, str]:
        """Append decisions, and those that wait; return all of them, and why some wait on."""
        file, fault = self._root / CORRECTIONS, ""
        with self._lock:
            self._waiting += new
            try:
                if self._waiting:
                    append_corrections(self._root, self._waiting)
                    self._waiting.clear()
                version = file.exists() and (file.stat().st_size, file.stat().st_mtime_ns)
                if version != self._version:
                    self._saved, self._version = read_corrections(self._root), version
            except (OSError, UserError) as error:
                fault = f"{len(self._waiting)} decisions wait here and are tried again: {error}"
            decisions = {key: [*lines] for key, lines in self._saved.items()}
            for each in self._waiting:
                decisions.setdefault((each.path, each.field), []).append(each)
        return decisions, fault


_desk_of = functools.cache(Desk)  # no reload of a tab loses what could not be saved


class Review:
    """The differences in one tab. here: the shown image; marked: others that a key is for, too.

    had: what each image has without decisions. changes: the tags that the network would add or take away.
    """

    def __init__(self, found: Sequence[Difference], had: Sequence[Any], classes: Sequence[str] = ()) -> None:
        self.found, self.had, self.classes = found, had, classes
        self.changes = [_find_changes(each, value) for each, value in zip(found, had)]
        self.field = "tags" if had and isinstance(had[0], list) else "label"
        self.decisions, self.here, self.marked, self.by = Decisions(), 0, set[int](), ""

    def last(self, number: int) -> Decision | None:
        """Return the decision about an image that counts."""
        stack = self.decisions.get((self.found[number].path, self.field), [])
        value, applies = settle(self.had[number], stack)
        return stack[-1] if applies and (stack[-1].verdict != "undone" or value != self.had[number]) else None

    def suggestion(self, number: int) -> Any:
        """Return what the network says of an image."""
        return self.found[number].label or self._switch(number, self.had[number], self.changes[number])

    def shown(self, number: int) -> Any:
        """Return what was decided about an image, or else what the network says."""
        last = self.last(number)
        return last.now if last else self.suggestion(number)

    def _switch(self, number: int, tags: Sequence[str], changed: Iterable[str]) -> list[str]:
        """Return the tags with some added or taken away, in the image's order."""
        texts = {*tags}.symmetric_difference(changed)
        return [tag for tag in dict.fromkeys([*self.had[number], *tags, *changed]) if tag in texts]

    def choices(self) -> dict[str, bool]:
        """Return the classes or tags of the keys 1 to 9 for the shown image, and whether it has them as it is shown."""
        value, names = self.shown(self.here), self.changes[self.here]
        if self.field == "label":
            value, names = [value], dict.fromkeys([self.found[self.here].label, self.had[self.here], *self.classes])
        return {name: name in value for name in [*names][:9]}

    def card(self, number: int, image: str) -> dict[str, Any]:
        """Return what a small image shows: what its label becomes, or which tags are added and taken away."""
        last, had, value = self.last(number), self.had[number], self.shown(number)
        text = f"{had} → {value}" if value != had else str(had)
        if self.field == "tags":
            signs = {**{tag: "−" for tag in had if tag not in value}, **{tag: "+" for tag in value if tag not in had}}
            text = " ".join(f"{sign}{tag}" for tag, sign in signs.items())
        verdict = f"{last.verdict} by {last.by}" if last else f"{self.found[number].by:.3f}"
        kinds = {"card": True, "here": number == self.here, "marked": number in self.marked, "decided": last}
        texts = {"text": escape_controls(text), "verdict": escape_controls(verdict)}
        return {"id": number, "image": image, **texts, "kind": " ".join(kind for kind in kinds if kinds[kind])}

    def press(self, key: str) -> list[Decision]:
        """Do what a key means; return the decisions to save."""
        first, targets, choices = self.here // _CARDS * _CARDS, sorted(self.marked) or [self.here], [*self.choices()]
        if key in ("ArrowLeft", "ArrowRight"):
            self.here = min(max(self.here + (1 if key == "ArrowRight" else -1), 0), len(self.found) - 1)
        elif key == "x":
            self.marked ^= {self.here}
        elif key == "a":
            self.marked |= {*range(len(self.found))[first : first + _CARDS]}
        elif key == "Enter":
            return self._decide({each: self.suggestion(each) for each in targets if self.last(each) is None})
        elif key == "r":
            return self._decide({each: self.had[each] for each in targets})
        elif key == "u":
            return self._undo()
        elif key.isdecimal() and 0 < int(key) <= len(choices):
            return self.choose(choices[int(key) - 1])
        return []

    def choose(self, name: str) -> list[Decision]:
        """Give a class to the marked images, or to the shown one; or give the shown one a tag, or take it away."""
        if self.field == "label":
            return self._decide(dict.fromkeys(sorted(self.marked) or [self.here], name))
        return self._write({self.here: self._switch(self.here, self.shown(self.here), [name])})

    def _decide(self, values: Mapping[int, Any]) -> list[Decision]:
        """Return decisions, and show the next image without one."""
        lines, order = self._write(values), [*range(self.here, len(self.found)), *range(self.here)]
        self.marked.clear()
        self.here = next((each for each in order if self.last(each) is None), self.here)
        return lines

    def _undo(self) -> list[Decision]:
        """Return the lines that go back behind this tab's last decisions, and show their first image."""
        last = {each: self.last(each) for each in range(len(self.found))}
        own = {each: line.at for each, line in last.items() if line and line.by == self.by and line.verdict != "undone"}
        values = {}
        for number in (each for each, at in own.items() if at == max(own.values())):
            *before, line = self.decisions[self.found[number].path, self.field]
            values[number] = before[-1].now if before else line.was
        self.here = min(values, default=self.here)
        return self._write(values, "undone")

    def _write(self, values: Mapping[int, Any], verdict: str | None = None) -> list[Decision]:
        at, lines = datetime.now(UTC).isoformat(timespec="microseconds"), []
        for number, now in values.items():
            path, was, field = self.found[number].path, self.had[number], self.field
            kind = "rejected" if now == was else "accepted" if now == self.suggestion(number) else "edited"
            lines.append(Decision(path=path, field=field, was=was, now=now, verdict=verdict or kind, by=self.by, at=at))
            self.decisions.setdefault((path, field), []).append(lines[-1])
        return lines


def _find_changes(found: Difference, had: Any) -> dict[str, None]:
    """Return the texts of the tags that the network would add, spelled like the others, and of those to take away.

    Ratings are no tags, and implied tags have no text.
    """
    texts = {parse_tag(tag).name: tag for tag in had} if found.tags else {}
    spaces, changes = any(" " in tag for tag in texts.values()), {}
    for name, is_added, _ in found.tags:
        if is_added != (name in texts) and name not in RATINGS:
            changes[texts.get(name) or write_tag(Tag(None, name), spaces=spaces)] = None
    return changes


def open_review(shelf: Shelf, run: Path) -> tuple[Review, Callable[[int, int], str], Desk]:
    """Return the differences of a run in images of its collection, their addresses by number and px, and the decisions.

    Raises UserError if there is none, with the command that finds them, or if the collection is no folder.
    """
    (root, found), name = find_differences(run), shelf.of_run(run)
    command = shlex.join(["python", "evaluate.py", f"run_dir={run}", "split=all", "per_image=true"])
    nothing = UserError(f"No image is known where network and label differ. This looks for them: {command}")
    if name is None or not found:
        raise nothing
    collection = shelf.open(name, again=True, corrected=False)
    if not isinstance(collection.root, Path):
        raise UserError(f"data.root: {collection.root} is no folder, so no correction can be kept beside it")
    if root != str(collection.root):
        raise UserError(f"The table of images is about {root or 'an unknown folder'}, not {collection.root}: {command}")
    desk, field = _desk_of(collection.root), "label" if found[0].label else "tags"
    (decisions, _), column, kept = desk.sync(), collection.table[field], []
    found = found[:_MOST]
    for each, row in zip(found, find_rows(collection, [each.path for each in found]).tolist()):
        had = column[row].as_py() if row >= 0 else None
        if row >= 0 and ((each.path, field) in decisions or each.label not in (None, had) or _find_changes(each, had)):
            kept.append((each, had, row))
    if not kept:
        raise nothing
    found, had, rows = zip(*kept)
    review = Review(found, had, list(count_values(collection.table["label"])))
    review.decisions = decisions
    review.here = next((each for each in range(len(found)) if review.last(each) is None), 0)
    return review, lambda number, px: image_address(name, collection, rows[number], px), desk


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
    drawn: list[Any] = []
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
        review.decisions, fault = await background.io_bound(desk.sync, lines)
        waiting.text = escape_controls(fault)
        draw()

    async def press(key: str) -> None:
        ui.run_javascript("document.activeElement?.blur()")  # keys are not for the button that was clicked
        await save(review.press(key))

    async def choose(name: str) -> None:
        other.value = None
        await save(review.choose(name))

    async def on_key(event: KeyEventArguments) -> None:
        if event.action.keydown and not (event.modifiers.ctrl or event.modifiers.alt or event.modifiers.meta):
            await press(event.key.name.lower() if len(event.key.name) == 1 else event.key.name)

    def show(number: int) -> None:
        review.here = number
        draw()

    def draw() -> None:
        if drawn == (state := [review.here, {*review.marked}, review.decisions]):
            return
        drawn[:], first, numbers = state, review.here // _CARDS * _CARDS, range(len(review.found))
        cards.rows = [review.card(each, address(each, 256)) for each in numbers[first : first + _CARDS]]
        decided = sum(review.last(each) is not None for each in numbers)
        progress.text = f"{decided:,} of {len(numbers):,} decided"
        picture.source = address(review.here, 1024)
        title.text = f"{escape_controls(review.found[review.here].path)}: {cards.rows[review.here - first]['text']}"
        chips.clear()
        with chips:
            for number, (name, is_on) in enumerate(review.choices().items(), start=1):
                chip = ui.button(f"{number} {escape_controls(name)}", on_click=lambda _, key=str(number): press(key))
                chip.props(f"{_BUTTON} padding='2px 8px'" + ("" if is_on else " outline"))

    cards.on("pick", lambda event: show(event.args))
    ui.keyboard(on_key)
    draw()
    ui.timer(REFRESH_SEC, save)
