"""Write corrections into the sidecars of a folder, and take that back (prepare.py job=apply_corrections)."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from data.config import DataConfig
from data.layouts.corrections import Decisions, correct, read_corrections, retag
from data.layouts.folders import read_folder, scan_folder
from data.layouts.manifest import find_manifest, scanned_at
from data.layouts.names import CORRECTIONS, POSTS, UNDO
from data.layouts.sidecars import decode, load_json, parse_record
from data.layouts.table import show_some
from data.layouts.tables import TableChoice, find_one
from data.layouts.unused import Unused, say_unused
from data.layouts.walk import check_root
from data.tools.tool import Tool
from utils.errors import UserError
from utils.formats.spelling import join_tags
from utils.io.files import AppendFile, write_atomically, write_text
from utils.io.journal import open_journal
from utils.record.logging import get_logger

log = get_logger(__name__)


class ApplyCorrections(Tool):
    """Write what corrections.jsonl says into sidecars. undo: write back what they were.

    UNDO has a line for each sidecar: its bytes before (none: no file) and after.

    A label becomes that of `x.json`, which goes before the folder's name; tags stay in the file that has them.
    """

    name: Literal["apply_corrections"]
    undo: bool

    def run(self, data: DataConfig) -> str:
        """Write the sidecars. Raises UserError (`data.root`, `job.undo`)."""
        root = check_root(data.root)
        with open_journal("data.root", root / UNDO):
            return _restore(root) if self.undo else _apply(root, data.choice())


def _apply(root: Path, choice: TableChoice) -> str:
    file = find_manifest(root)
    decisions = read_corrections(root)
    if file is None or scanned_at(file) is not None:
        file = find_one(root, POSTS)
    if file is not None:
        raise UserError(
            f"data.root: sidecars are not read beside {file}; edit it, or leave {CORRECTIONS}, which is read"
        )
    table = _read_rows(root, decisions, choice)
    images, sidecars, _ = scan_folder(root, Unused())
    pairs = zip(table.to_pylist(), correct(table, decisions, left := Unused()).to_pylist())
    changes = [(row, now, field) for row, now in pairs for field in ("label", "tags") if row[field] != now[field]]
    say_unused(left.describe())
    stems = Counter(os.path.splitext(path)[0] for path in images)
    undo = AppendFile(root / UNDO)
    for row, now, field in changes:
        path = row["path"]
        own = sidecars.get(row["path"], ())
        stem = os.path.splitext(row["path"])[0]
        texts = {os.path.splitext(name)[1].lower(): decode(_read(root, name)) for name in reversed(own)}
        for suffix, text in _rewrite(path, texts, row["tags"], field, now[field]).items():
            name = next((name for name in own if name.lower().endswith(suffix)), f"{stem}{suffix}")
            name = name if stems[stem] == 1 else f"{path}{suffix}"  # not that of another image, too
            before = _read(root, name).decode("latin-1") if (root / name).exists() else None
            undo.write(f"\n{json.dumps({'file': name, 'before': before, 'after': text.encode().decode('latin-1')})}\n")
            undo.sync()
            write_text(root / name, text)
    undo.close()
    rows = {row["path"]: row for row in _read_rows(root, decisions, choice).to_pylist()}
    if kept := [row["path"] for row, now, field in changes if rows[row["path"]][field] != now[field]]:
        log.warning("data.root: a table of metadata goes before the sidecars of %s; edit it", show_some(kept))
    return f"{len(changes) - len(kept):,} labels and lists of tags are in sidecars; job.undo=true takes them back"


def _read_rows(root: Path, decisions: Decisions, choice: TableChoice) -> pa.Table:
    unused = Unused()
    table = read_folder(root, unused, choice)
    if unused.said:
        raise UserError(
            f"data.table: sidecars are not read beside a table ({unused.said[0]}); edit it, or leave {CORRECTIONS}, "
            "which is read"
        )
    return table.filter(pc.is_in(table["path"], pa.array({path for path, _ in decisions}, pa.string())))


def _rewrite(path: str, texts: Mapping[str, str], tags: list[str], field: str, value: Any) -> dict[str, str]:
    """Return the texts of the sidecars that change, by suffix. texts: of all of an image; tags: that it has."""
    record = load_json(texts.get(".json") or "{}", repr(f"{path}: .json"))
    if not isinstance(record, dict):
        raise UserError(f"data.root: the .json of {path!r} holds no object; remove it")
    of_tags = (".caption", ".txt") if field == "tags" else ()
    new = {suffix: retag(texts[suffix], tags, value) for suffix in of_tags if suffix in texts}
    new = {suffix: text for suffix, text in new.items() if text != texts[suffix]}
    if field == "label" or parse_record("", record).tags is not None or (texts and not new):
        new[".json"] = json.dumps({**record, field: value}, ensure_ascii=False, indent=2) + "\n"
    return new or {".txt": join_tags(value, ", ") + "\n"}


def _restore(root: Path) -> str:
    lines = _read(root, UNDO).decode().split("\n")
    kept = []
    if not any(lines):
        raise UserError(f"job.undo: true, but there is no {root / UNDO}: nothing was applied")
    for text in reversed(lines):
        with suppress(json.JSONDecodeError):  # blank, or cut off by a kill
            name, before, after = (json.loads(text)[key] for key in ("file", "before", "after"))
            now = _read(root, name).decode("latin-1")
            if now == after and before is not None:
                write_atomically(root / name, lambda file, old=before: file.write_bytes(old.encode("latin-1")))
            elif now == after:
                (root / name).unlink()
            elif now != (before or ""):
                kept.append(name)
    (root / UNDO).unlink()
    if kept:
        log.warning("data.root: %s sidecars were edited since and stay: %s", f"{len(kept):,}", show_some(kept))
    return "sidecars are as they were before job=apply_corrections"


def _read(root: Path, name: str) -> bytes:
    """Return the content of a file; none without it. Raises UserError (`data.root`) for one outside the collection."""
    if not (root / name).resolve().is_relative_to(root.resolve()):
        raise UserError(f"data.root: {str(root / name)!r} leads out of the collection; edit it where it is")
    return (root / name).read_bytes() if (root / name).is_file() else b""
