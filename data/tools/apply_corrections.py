"""Write corrections into the sidecars of a folder, or undo that (prepare.py job=apply_corrections)."""

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from data.config import DataConfig
from data.layouts.corrections import Decisions, correct, read_corrections, retag
from data.layouts.folders import read_folder
from data.layouts.manifest import read_sources
from data.layouts.names import CORRECTIONS, UNDO, stem_of, suffix_of
from data.layouts.scan import TableChoice, scan_folder
from data.layouts.sidecars import decode, load_json, parse_record
from data.layouts.table import show_some
from data.layouts.unused import Unused, say_unused
from data.layouts.walk import check_root, find_manifest
from data.tools.config import ApplyCorrections
from utils.errors import UserError
from utils.formats.spelling import join_tags
from utils.io.files import AppendFile, Json, remove_temporary, write_atomically, write_text
from utils.io.journal import open_journal
from utils.record.logging import log

_LACK = "images whose sidecars lack the corrections"
_NOT_READ = f"data.root: sidecars are not read beside {{}}; edit it, or leave {CORRECTIONS}, which is read"
_NO_PLACE = "weights and groups, for which sidecars have no place; corrections.jsonl keeps them"


def apply_corrections(job: ApplyCorrections, data: DataConfig) -> str:
    """Write the sidecars. Raises UserError (`data.root`, `data.corrections`)."""
    root = check_root(data.root)
    with open_journal("data.root", root / UNDO):
        return _restore(root) if job.undo else _apply(root, data.choice())


def _apply(root: Path, choice: TableChoice) -> str:
    file = find_manifest(root)
    decisions = read_corrections(root, left := Unused())
    if file and read_sources(file) is None:
        raise UserError(_NOT_READ.format(file))
    table = _read_rows(root, decisions, choice)
    folder = scan_folder(root, Unused(), choice)
    pairs = zip(table.to_pylist(), correct(table, decisions, left).to_pylist())
    changes = [(row, now) for row, now in pairs if _find_changes(row, now)]
    stems = Counter(stem_of(path) for path in folder.images)
    undo = AppendFile(root / UNDO)
    written = {}
    for row, now in changes:
        path = row["path"]
        stem = stem_of(path)
        own = {suffix_of(name): name for name in reversed(folder.sidecars.get(path, ()))}
        try:
            new = _rewrite({suffix: decode(_read(root, own[suffix])) for suffix in sorted(own)}, row, now)
        except (OSError, ValueError) as error:  # UserError is one
            left.add(_LACK, f"{path} ({error})")
            continue
        for suffix, text in new.items():
            name = own.get(suffix, f"{stem}{suffix}")
            name = name if stems[stem] == 1 else f"{path}{suffix}"  # not that of another image, too
            before = _read(root, name).decode("latin-1") if (root / name).exists() else None
            undo.write(f"\n{json.dumps({'file': name, 'before': before, 'after': text.encode().decode('latin-1')})}\n")
            undo.sync()
            write_text(root / name, text)
        written[path] = now
    undo.close()
    remove_temporary({(root / path).parent for path in written})
    rows = {row["path"]: row for row in _read_rows(root, decisions, choice).to_pylist()}
    absent = [path for path, now in written.items() if _find_changes(rows[path], now)]
    left.add(f"{_LACK}: a table goes before these, or a tag has a comma", *absent)
    left.add(_NO_PLACE, *(path for path, field in decisions if field in ("weight", "group")))
    say_unused(left.describe())
    return f"the corrections of {len(written) - len(absent):,} images are in sidecars; job.undo=true takes them back"


def _read_rows(root: Path, decisions: Decisions, choice: TableChoice) -> pa.Table:
    unused = Unused()
    table = read_folder(scan_folder(root, unused, choice))
    if unused.whole:
        raise UserError(_NOT_READ.format(" ".join([unused.whole, *unused.said[-1:]])))
    return table.filter(pc.is_in(table["path"], pa.array({path for path, _ in decisions}, pa.string())))


def _find_changes(row: Json, now: Json) -> Json:
    return {field: now[field] for field in ("label", "tags") if row[field] != now[field]}


def _rewrite(texts: Mapping[str, str], row: Json, now: Json) -> dict[str, str]:
    """Return the new texts of an image's sidecars, by suffix. texts: before; row, now: their values before and after.

    The sidecar that readers prefer comes last, with all changes at once, so that a killed job can continue.
    """
    record = load_json(texts.get(".json") or "{}", "its .json")
    if not isinstance(record, dict):
        raise UserError("its .json holds no object; remove it")
    fields = _find_changes(row, now)
    new = {}
    if "tags" in fields:
        new = {suffix: retag(text, row["tags"], now["tags"]) for suffix, text in texts.items() if suffix != ".json"}
        new = {suffix: text for suffix, text in new.items() if text != texts[suffix]}
        new = new if texts else {".txt": join_tags(now["tags"], ", ") + "\n"}
        if new and parse_record("", record).tags is None:
            del fields["tags"]
    if fields:
        new[".json"] = json.dumps({**record, **fields}, ensure_ascii=False, indent=2) + "\n"
    return new


def _restore(root: Path) -> str:
    edited = {}
    for line in reversed(_read(root, UNDO).decode().split("\n")):
        with suppress(json.JSONDecodeError):  # blank, or cut off by a kill
            name, before, after = json.loads(line).values()
            now = _read(root, name).decode("latin-1")
            if now == after and before is not None:
                write_atomically(root / name, lambda file, old=before: file.write_bytes(old.encode("latin-1")))
            elif now == after:
                (root / name).unlink()
            edited[name] = now not in (after, before or "")
    remove_temporary({(root / name).parent for name in edited})
    (root / UNDO).unlink(missing_ok=True)
    if kept := [name for name in edited if edited[name]]:
        log.warning("data.root: %s sidecars were edited since and stay: %s", f"{len(kept):,}", show_some(kept))
    return f"{len(edited) - len(kept):,} sidecars are as they were before job=apply_corrections"


def _read(root: Path, name: str) -> bytes:
    """Return the content of a file; empty without it. Raises UserError (`data.root`) for one outside the collection."""
    if not (root / name).resolve().is_relative_to(root.resolve()):
        raise UserError(f"data.root: {str(root / name)!r} leads out of the collection; edit it where it is")
    return (root / name).read_bytes() if (root / name).is_file() else b""
