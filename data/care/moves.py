"""Move files of a collection into a trash folder, so that a killed job can be finished and any job undone.

    line = move_out(work, {"a/1.png": "too few tags: 2"})
    line = undo(work, ".atelier/filter-20261124-132201-000000.jsonl")

A journal has one JSON line for each file, written before anything is moved: `from` and `to`, relative to the journal's
folder, `reason`, and `replaces` where a new file takes the place of the old one. While files are still to be moved its
name ends in `.part`.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.care.work import Work
from data.manifest import find_manifest
from data.manifest_formats import PARQUET, read_parquet
from data.scan import is_image_name, list_folder
from data.tags.sidecars import list_sidecars
from utils.errors import UserError
from utils.io.files import link_or_copy, output_errors, write_atomically, write_text
from utils.record.logging import get_logger
from utils.record.progress import track

log = get_logger(__name__)

TRASH = ".atelier"  # in a collection; scans ignore its name
_PART, _UNDONE = ".part", ".undone"


class Move(NamedTuple):
    """A file, its place in the trash, and why; `replaces`: another file takes its place."""

    source: Path
    target: Path
    reason: str
    replaces: bool


def move_out(work: Work, reasons: Mapping[str, str]) -> str:
    """Move images and their sidecars into the trash and drop their rows from the manifest; or list them.

    reasons: by path. Returns a line for the log. Raises UserError (`data.root`, `report`, `trash`).
    """
    manifest = find_parquet(work.root)
    files = add_sidecars(work.root, reasons)
    listing = work.list_files(files)
    if not work.apply:
        return f"{len(files):,} files would be moved ({listing}); set apply=true to move them"
    if not files:
        return "no file to move"
    rows = {} if manifest is None else {PARQUET: f"without the rows of {len(reasons):,} images"}
    journal, moves = plan_moves(work, {**rows, **files}, replaced=rows)
    with output_errors("trash", journal.parent):
        part = journal.with_name(journal.name + _PART)
        write_journal(part, moves)
        _finish(part, moves)
    return f"{len(files):,} files moved; prepare.py job=undo source={journal} brings them back"


def finish_interrupted(work: Work) -> None:
    """Finish what killed jobs have begun to move."""
    for part in sorted(_trash_of(work).glob(f"*.jsonl{_PART}")):
        log.info("%s: a job was interrupted; its moves are finished first", part.name)
        with output_errors("trash", part.parent):
            _finish(part, _read_journal(part, work.root))


def undo(work: Work, source: str | None) -> str:
    """Bring back the files of a journal; one whose place is taken stays in the trash, with a warning.

    Raises UserError (`source`) for a file that is no journal of this collection, and where a later job is not undone.
    """
    file = Path(source or "").expanduser()
    if source is None or not file.is_file():
        raise UserError(
            f"source: {source!r} is no file; job=undo needs the journal of a job, {TRASH}/<job>-<time>.jsonl"
        )
    moves = _read_journal(file, work.root)
    later = [other.name for other in file.parent.glob("*.jsonl") if _time_of(other) > _time_of(file)]
    if later:
        raise UserError(f"source: {max(later)!r} was written after {file.name!r}; undo it first")
    taken = []
    with output_errors("data.root", work.root):
        for move in track(moves[::-1], len(moves), "moving files back"):
            if os.path.lexists(move.source) and not move.replaces:
                taken.append(move.source)
            elif os.path.lexists(move.target):
                _move(move.target, move.source)
        if not taken:
            os.replace(file, f"{file}{_UNDONE}")
    for path in taken:
        log.warning("%s is there already; the file in the trash stays", path)
    return f"{len(moves) - len(taken):,} of {len(moves):,} files are back"


def add_sidecars(root: Path, reasons: Mapping[str, str]) -> dict[str, str]:
    """Return images and, after each, its sidecars, with the image's reason; not a sidecar of an image that stays."""
    found: dict[str, str] = {}
    by_folder: dict[str, list[str]] = {}
    for path in reasons:
        folder, slash, _ = path.rpartition("/")
        by_folder.setdefault(folder + slash, []).append(path)
    for folder, paths in by_folder.items():
        names = {entry.name for entry in list_folder(root / folder)}
        staying = (name for name in names if is_image_name(name) and folder + name not in reasons)
        kept = {file for name in staying for file in list_sidecars(name, names)}
        for path in paths:
            own = [name for name in list_sidecars(path.removeprefix(folder), names) if name not in kept]
            found |= dict.fromkeys((path, *(folder + name for name in own)), reasons[path])
    return found


def find_parquet(root: Path) -> Path | None:
    """Return the root's manifest.parquet, None without a manifest. Raises UserError (`data.root`) for another one."""
    manifest = find_manifest(root)
    if manifest is not None and manifest.name != PARQUET:
        raise UserError(
            f"data.root: {str(manifest)!r} would name files that are gone; only a {PARQUET} loses rows here, so "
            "write it as Parquet (pandas or pyarrow do)"
        )
    return manifest


def copy_rows(manifest: Path, target: Path, paths: Iterable[str], *, keep: bool) -> None:
    """Write the rows of a Parquet manifest that name some paths (keep), or all the others."""
    table = read_parquet(manifest)
    named = pc.is_in(table["path"], value_set=pa.array(list(paths), pa.string()))
    table = table.filter(named if keep else pc.invert(named))
    write_atomically(target, lambda file: pq.write_table(table, file, compression="zstd"))


def plan_moves(work: Work, reasons: Mapping[str, str], replaced: Iterable[str]) -> tuple[Path, list[Move]]:
    """Return a new journal's path, and the move of each file of the collection into the folder beside it."""
    root, taken = Path(os.path.realpath(work.root)), set(replaced)
    place = _trash_of(work) / f"{work.job}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    moves = [Move(root / path, place / path, reason, path in taken) for path, reason in reasons.items()]
    return place.with_suffix(".jsonl"), moves


def write_journal(file: Path, moves: Sequence[Move]) -> None:
    """Write a journal, atomically."""
    lines = []
    for move in moves:
        places = {"from": os.path.relpath(move.source, file.parent), "to": os.path.relpath(move.target, file.parent)}
        lines.append(json.dumps({**places, "reason": move.reason, "replaces": move.replaces}, ensure_ascii=False))
    write_text(file, "".join(line + "\n" for line in lines))


def _read_journal(file: Path, root: Path) -> list[Move]:
    """Read a journal. Raises UserError (`source`) where it is none, or leads out of the collection or the trash."""
    folder, inside, moves = Path(os.path.realpath(file.parent)), os.path.realpath(root), []
    try:
        for record in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            source, target = (Path(os.path.normpath(folder / record[key])) for key in ("from", "to"))
            moves.append(Move(source, target, record["reason"], record["replaces"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"source: {str(file)!r} is no journal of a job ({error!r}); give the one in {TRASH}/"
        ) from error
    if stray := [m for m in moves if not (m.source.is_relative_to(inside) and m.target.is_relative_to(folder))]:
        raise UserError(
            f"source: {str(file)!r} names {str(stray[0].source)!r}, and data.root is {inside!r}; set data.root to the "
            "collection that the journal is of"
        )
    return moves


def _finish(part: Path, moves: Sequence[Move]) -> None:
    """Move what is not moved yet, and give the journal its name."""
    for move in track(moves, len(moves), "moving files"):
        if move.replaces:
            if not move.target.exists():
                link_or_copy(move.source, move.target)
            gone = [other.source.relative_to(move.source.parent).as_posix() for other in moves if other is not move]
            copy_rows(move.target, move.source, gone, keep=False)
        elif os.path.lexists(move.source):
            _move(move.source, move.target)
    os.replace(part, part.with_suffix(""))


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(source, target)


def _trash_of(work: Work) -> Path:
    """Return the folder of journals, without links in its path, so that relative paths hold."""
    return Path(os.path.realpath(work.trash))


def _time_of(journal: Path) -> str:
    return journal.name.partition("-")[2]
