"""Decisions of reviewers on labels, tags, weights and groups: `corrections.jsonl` at the root of a collection.

    {"path": "a/1.png", "field": "label", "was": "a", "now": "b", "verdict": "accepted", "by": "3f2a", "at": "2026-..."}

A line without a path is about no image: `now` is a class that a user typed, in place of the class `was`.

Lines are only appended, by any number of processes. The last line about an image counts, if the collection's value is
`was` or `now` of one of its lines. The verdict `undone` takes the last line of the same `by` back, and no other's.
"""

import codecs
import functools
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, Literal, Self

import numpy as np
import pyarrow as pa
from pyarrow import Table
from pydantic import AfterValidator, Field, ValidationError, model_validator

from data.layouts.names import CORRECTIONS
from data.layouts.sidecars import find_encoding, refuse_link_out
from data.layouts.table import TYPES, replace_column, take_rows
from data.layouts.unused import Unused, say_unused
from data.layouts.values import read_label, read_tags
from data.layouts.walk import COPY
from utils.config.bounds import between
from utils.config.schema import Strict
from utils.errors import UserError, about
from utils.formats.spelling import join_tags, split_tags
from utils.io.files import file_lock, output_errors, readable
from utils.io.memo import file_version
from utils.io.names import Names
from utils.record.logging import log

_PATIENCE_SEC = 10  # for another process that appends a line
_KINDS = {"label": (str, type(None)), "tags": (list,), "weight": (int, float), "group": (int, type(None))}
_Number = between(int, 0, 2**63 - 1) | Annotated[float, Field(ge=0)]
_Tags = Annotated[list[str], AfterValidator(lambda tags: [*read_tags(tags)])]
_Value = Annotated[str, AfterValidator(read_label)] | _Tags | _Number | None


class Decision(Strict):
    """A decision about an image. was: what the collection said; by: a tab of the page; at: the time.

    A weight of 0 leaves the image out. Images of one group are near-duplicates, which splits keep together.
    """

    path: str
    field: Literal["label", "tags", "weight", "group"]
    was: _Value
    now: _Value
    verdict: Literal["accepted", "rejected", "edited", "undone"]
    by: str
    at: str

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not all(isinstance(value, _KINDS[self.field]) for value in (self.was, self.now)):
            raise ValueError(
                "was, now: tags are lists, a weight is a number, a label a text or null, a group a number or null"
            )
        return self


def decide(path: str, field: str, was: Any, now: Any, verdict: str, by: str) -> Decision:
    """Return a decision of this moment."""
    at = datetime.now(UTC).isoformat()
    return Decision(path=path, field=field, was=was, now=now, verdict=verdict, by=by, at=at)


Decisions = dict[tuple[str, str], list[Decision]]  # by path and field, the latest last


def read_corrections(root: Path, unused: Unused) -> Decisions:
    """Return the decisions; bad lines are added to `unused`. Raises UserError (`data.corrections`)."""
    file = root / CORRECTIONS
    found = Decisions()
    refuse_link_out(root, file)
    with about("data.corrections"), readable(file, "JSONL"):
        content = file.read_bytes() if file.exists() else b""
        if find_encoding(content) == "utf-16":
            raise ValueError("UTF-16; save it as UTF-8")
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            decision = Decision.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            fault = ": ".join([*map(str, first["loc"]), first["msg"]])
            unused.add(f"lines of {CORRECTIONS} that are no decisions", f"{file}, line {number} ({fault})")
            continue
        found.setdefault((decision.path, decision.field), []).append(decision)
    return found


def open_corrections(root: Path, unused: Unused) -> Callable[[Table], Table] | None:
    """Return the function that applies the decisions to the table of the collection; None without any decision.

    Log bad lines, and how many values are decided. unused: for decisions that cannot be applied.
    """
    bad = Unused()
    decisions = read_corrections(root, bad)
    say_unused(bad.describe(), "data.corrections")
    settled = [settle(lines[0].was, lines) for (path, _), lines in decisions.items() if path]
    if decided := sum(each.verdict != "undone" for each in settled):
        log.info(
            "data.corrections: %s decides on %s labels, lists of tags, weights and groups",
            root / CORRECTIONS,
            f"{decided:,}",
        )
    return functools.partial(correct, decisions=decisions, unused=unused) if decisions else None


def append_corrections(root: Path, decisions: Sequence[Decision]) -> None:
    """Append decisions: all of them, or none. Raises UserError (`data.corrections`), DiskFull for lack of room."""
    file = root / CORRECTIONS
    text = "".join(f"{each.model_dump_json()}\n" for each in decisions)
    refuse_link_out(root, file)
    refusal = f"data.corrections: another process is writing {file}; try again"
    with (
        output_errors("data.corrections", file, COPY),
        file_lock(file, refusal, _PATIENCE_SEC),
        open(file, "r+b", buffering=0) as lines,
    ):
        before = lines.read()
        is_whole = before.endswith(b"\n") or not before  # a killed process leaves a part of a line
        rest = memoryview((text if is_whole else f"\n{text}").encode())
        try:
            while rest:
                rest = rest[lines.write(rest) :]
            os.fsync(lines.fileno())
        except OSError:
            lines.truncate(len(before))
            raise


class Desk:
    """The decisions about a collection: the lines of the file, and lines that wait to be written. Thread-safe."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = Lock()
        self._waiting = list[Decision]()
        self._saved = Decisions()
        self._unused = Unused()
        self._version = None

    def sync(self, new: Sequence[Decision] = ()) -> tuple[Decisions, str]:
        """Append new and waiting decisions. Return all decisions, and a message about a fault of the file."""
        fault = ""
        with self._lock:
            self._waiting += new
            waiting = [*self._waiting]
            try:
                version = file_version(self._root / CORRECTIONS)
                if version is None or version != self._version:
                    self._unused.clear()
                    self._saved = read_corrections(self._root, self._unused)
                    self._version = version
                if waiting:
                    append_corrections(self._root, waiting)
                    self._waiting.clear()
            except UserError as error:
                fault = str(error)
            if self._waiting:
                fault = f"{len(waiting)} decisions wait here and are tried again: {fault}"
            decisions = {key: [*lines] for key, lines in self._saved.items()}
            for each in waiting:
                decisions.setdefault((each.path, each.field), []).append(each)
            return decisions, "\n".join([fault, *self._unused.describe()]).strip()


desk_of = functools.cache(Desk)  # one for all pages, so that no reload loses what could not be saved


def settle(value: Any, lines: Sequence[Decision]) -> Decision | None:
    """Return the decision that counts, if `value` is `was` or `now` of any; an undone one if all are taken back."""
    if not any(value in (each.was, each.now) for each in lines):
        return None
    return next(list_kept(lines), lines[-1])


def list_kept(lines: Sequence[Decision]) -> Iterator[Decision]:
    """Yield the decisions that are not taken back, the last one first."""
    undone = Counter()
    for each in reversed(lines):
        if each.verdict == "undone":
            undone[each.by] += 1
        elif undone[each.by]:
            undone[each.by] -= 1
        else:
            yield each


def retag(text: str, before: Sequence[str], now: Sequence[str]) -> str:
    """Return a text with other tags, or as it is if it has them. Lines of one tag each, and of no tags, stay such."""
    lines = text.split("\n")
    split = [[line.strip()] if line.strip() in before else split_tags(line) for line in lines]
    added = [tag for tag in now if tag not in {*before, *itertools.chain(*split)}]
    ours = [number for number, tags in enumerate(split) if tags and {*tags} <= {*before}]
    separator = "\n" if len(ours) > 1 and all(len(split[number]) == 1 for number in ours) else ", "
    for number in ours:
        kept = [tag for tag in split[number] if tag in now]
        lines[number] = join_tags([*kept, *(added if separator == ", " or number == ours[-1] else ())], separator)
    return "\n".join(lines)


def correct(table: Table, decisions: Decisions, unused: Unused) -> Table:
    """Return a collection's table with the decisions; a caption that has the tags follows them.

    Decisions about other images, and about images whose label or tags have changed, are added to `unused`.
    """
    if "group" not in table.column_names and any(field == "group" for _, field in decisions):
        table = replace_column(table, "group", pa.nulls(len(table), TYPES["group"]))
    places = {path: number for number, path in enumerate(table["path"].to_pylist())}
    known = Names(places)
    stacks = dict[int, dict[str, list[Decision]]]()  # by row and field
    for (path, field), lines in decisions.items():
        if not path:
            continue
        if (found := known.find(path)) is None:
            unused.add("corrections of images that the collection has not", path)
        else:
            stacks.setdefault(places[found], {})[field] = lines
    rows = np.array([*stacks], int)
    changed = table.take(rows).to_pylist()
    for row, fields in zip(changed, stacks.values()):
        for field, lines in fields.items():
            before = row[field]
            if last := settle(before, lines):
                row[field] = last.now
            elif lines[-1].now != lines[-1].was:
                unused.add("corrections of images whose label, tags, weight or group was changed since", row["path"])
            if field == "tags" and row["tags"] != before and row["caption"]:
                row["caption"] = retag(row["caption"], before, row["tags"])
    order = np.arange(len(table))
    order[rows] = len(table) + np.arange(len(rows))
    joined = pa.concat_tables([table, Table.from_pylist(changed, table.schema)])
    return take_rows(joined, pa.array(order)) if changed else table
