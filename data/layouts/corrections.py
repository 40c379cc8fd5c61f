"""What reviewers decided about labels and tags: `corrections.jsonl` at the root of a collection.

    {"path": "a/1.png", "field": "label", "was": "a", "now": "b", "verdict": "accepted", "by": "3f2a", "at": "2026-..."}

Lines are only appended, by any number of processes. The last line about an image counts, if the collection's value is
`was` or `now` of one of its lines. The verdict `undone` goes back to what counted before.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError, model_validator

from data.layouts.names import CORRECTIONS
from data.layouts.sidecars import refuse_link_out
from data.layouts.table import show_some, take_rows
from data.layouts.unused import Unused
from data.layouts.walk import COPY
from utils.config.schema import Strict
from utils.errors import UserError
from utils.formats.spelling import join_tags, split_tags
from utils.io.files import file_lock, output_errors
from utils.io.memo import file_version
from utils.io.names import Names
from utils.record.logging import get_logger

log = get_logger(__name__)

_PATIENCE_SEC = 10  # for another process that appends a line


class Decision(Strict):
    """A decision about an image. was: what the collection said; by: a tab of the page; at: the time."""

    path: str
    field: Literal["label", "tags"]
    was: str | list[str] | None
    now: str | list[str] | None
    verdict: Literal["accepted", "rejected", "edited", "undone"]
    by: str
    at: str

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if any(isinstance(value, list) != (self.field == "tags") for value in (self.was, self.now)):
            raise ValueError("was, now: tags are lists, and a label is a text or null")
        return self


Decisions = dict[tuple[str, str], list[Decision]]  # by path and field, the latest last


def read_corrections(root: Path) -> Decisions:
    """Return the decisions. Warns of lines that are cut off. Raises UserError (`data.corrections`)."""
    file = root / CORRECTIONS
    found = Decisions()
    cut = []
    refuse_link_out(root, file)
    for number, line in enumerate(file.read_bytes().split(b"\n") if file.is_file() else (), start=1):
        try:
            decision = Decision.model_validate_json(line or b" ")
        except ValidationError as error:
            first = error.errors()[0]
            if first["type"] != "json_invalid":
                fault = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
                raise UserError(f"data.corrections: {str(file)!r}, line {number}: {fault}; fix the line") from None
            cut += [str(number)] if line.strip() else []
            continue
        found.setdefault((decision.path, decision.field), []).append(decision)
    if cut:
        log.warning("data.corrections: %s: what is left of line %s is not read", file, show_some(cut))
    return found


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
    """The decisions about a collection: those in its file, and those that wait to be written. Thread-safe."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = Lock()
        self._waiting = list[Decision]()
        self._saved = Decisions()
        self._version = None

    def sync(self, new: Sequence[Decision] = ()) -> tuple[Decisions, str]:
        """Append decisions, and those that wait; return all of them, and why some wait on."""
        file = self._root / CORRECTIONS
        fault = ""
        with self._lock:
            self._waiting += new
            try:
                if self._waiting:
                    append_corrections(self._root, self._waiting)
                    self._waiting.clear()
                version = file_version(file)
                if version is None or version != self._version:
                    self._saved = read_corrections(self._root)
                    self._version = version
            except (OSError, UserError) as error:
                fault = f"{len(self._waiting)} decisions wait here and are tried again: {error}"
            decisions = {key: [*lines] for key, lines in self._saved.items()}
            for each in self._waiting:
                decisions.setdefault((each.path, each.field), []).append(each)
        return decisions, fault


def settle(value: Any, stack: Sequence[Decision]) -> Decision | None:
    """Return the decision that counts: the last one, if `value` is `was` or `now` of any of them."""
    return stack[-1] if any(value in (each.was, each.now) for each in stack) else None


def retag(text: str, before: Sequence[str], now: Sequence[str]) -> str:
    """Return a text with other tags. Lines of one tag each stay so; lines that are no tags stay as they are."""
    lines = text.split("\n")
    added = [tag for tag in now if tag not in before]
    split = [[line.strip()] if line.strip() in before else split_tags(line) for line in lines]
    ours = [number for number, tags in enumerate(split) if tags and {*tags} <= {*before}]
    separator = "\n" if len(ours) > 1 and all(len(split[number]) == 1 for number in ours) else ", "
    for number in ours:
        kept = [tag for tag in split[number] if tag in now]
        lines[number] = join_tags([*kept, *(added if separator == ", " or number == ours[-1] else ())], separator)
    return "\n".join(lines)


def correct(table: pa.Table, decisions: Decisions, unused: Unused) -> pa.Table:
    """Return a collection's table with the decisions; a caption that has the tags follows them.

    Those about other images, or about images with another label or other tags now, are added to `unused`.
    """
    known = Names(set(table["path"].to_pylist()))
    decisions = {(known.find(path) or path, field): stack for (path, field), stack in decisions.items()}
    paths = list(dict.fromkeys(path for path, _ in decisions))
    rows = pc.index_in(pa.array(paths, pa.string()), value_set=table["path"].combine_chunks())
    absent = {path for path, row in zip(paths, rows.to_pylist()) if row is None}
    unused.add("corrections of images that the collection has not", *absent)
    rows = rows.drop_null().to_numpy()
    changed = table.take(rows).to_pylist()
    for row in changed:
        for field in ("label", "tags"):
            before = row[field]
            stack = decisions.get((row["path"], field), ())
            if last := settle(before, stack):
                row[field] = last.now
            elif stack and stack[-1].now != stack[-1].was:
                unused.add("corrections of images whose label or tags were changed since", row["path"])
            if field == "tags" and row["tags"] != before and row["caption"]:
                row["caption"] = retag(row["caption"], before, row["tags"])
    order = np.arange(len(table))
    order[rows] = len(table) + np.arange(len(rows))
    joined = pa.concat_tables([table, pa.Table.from_pylist(changed, table.schema)])
    return take_rows(joined, pa.array(order)) if changed else table
