"""Sidecars, files with metadata beside an image: `x.txt`, `x.caption`, `x.json`, or `x.jpg.txt` etc."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from data.layouts.records import Sidecar, decode, find_encoding, is_field, parse_json, parse_record, parse_text
from data.layouts.table import hash_table
from data.layouts.unused import Unused
from utils.errors import UserError
from utils.io.files import write_text

FAULT = "sidecar_fault"  # a column; see `Sidecar`

SUFFIXES = (".caption", ".txt", ".json")  # a later one takes precedence
_SPELLINGS = [(suffix, suffix.upper(), f".{suffix[1:].title()}") for suffix in SUFFIXES]
_MAX_BYTES = 16 * 2**20


def read_sidecars(root: Path, folder: Path, name: str, names: set[str], unused: Unused) -> Sidecar:
    """Read the sidecars of the image `name` in `folder`, which contains the files `names`.

    The JSON file takes precedence over the text file, `x.jpg.txt` over `x.txt`, and for captions `x.caption` over
    `x.txt`. What cannot be read is a fault of the result.
    """
    by_suffix: dict[str, Path] = {}
    for file in list_sidecars(name, names):
        by_suffix.setdefault(os.path.splitext(file)[1].lower(), folder / file)
    beside = os.path.dirname(os.path.realpath(folder / name)) if by_suffix else None
    sidecar = Sidecar()
    for suffix, file in by_suffix.items():
        try:
            refuse_link_out(root, file, beside)
            found = _read(file, name, unused)
        except UserError as error:
            found = Sidecar(sidecar_fault=f"file: {str(error).removeprefix('data.root: ')}")
        caption = sidecar.caption if suffix == ".txt" else None
        sidecar = sidecar.updated(found).updated(Sidecar(caption=caption))
    return sidecar


def _read(file: Path, name: str, unused: Unused) -> Sidecar:
    """Read a sidecar of the image `name`. Raises UserError."""
    if not file.is_file() or file.stat().st_size > _MAX_BYTES:
        raise UserError(f"data.root: {str(file)!r} is not a file of at most {_MAX_BYTES:,} bytes; remove it")
    text, (stem, suffix) = read_text(file), os.path.splitext(file.name)
    if suffix.lower() != ".json":
        return parse_text(str(file), text, unused, one_per_line=stem == name and suffix.lower() == ".txt")
    record = load_json(text, repr(str(file))) if text.strip() else {"tags": None}
    if isinstance(record, dict) and any(map(is_field, record)):
        return parse_record(repr(str(file)), record)
    unused.add("JSON files without tags, rating, caption or id", str(file))
    return Sidecar()


def list_sidecars(name: str, names: set[str]) -> list[str]:
    """Return the sidecars of the image `name` among the file names of its folder; `x.jpg.txt` before `x.txt`."""
    stems = dict.fromkeys((name, os.path.splitext(name)[0]))
    files = (stem + suffix for spellings in _SPELLINGS for stem in stems for suffix in spellings)
    return [file for file in files if file in names]


def list_orphans(folder: str, images: set[str], names: set[str]) -> list[str]:
    """Return the sidecars of none of the `images` of a folder (with a final slash), among its file names, by path."""
    files = [name for name in names - images if name.lower().endswith(SUFFIXES)]
    files = [name for name in files if folder or not name.startswith("meta_")]
    owners = images | {os.path.splitext(name)[0] for name in images} if files else images
    return sorted(folder + name for name in files if os.path.splitext(name)[0] not in owners)


def refuse_link_out(root: Path, file: Path, beside: str | None = None) -> None:
    """Raise UserError for a link out of the collection, because any text file could become a caption otherwise.

    A link may lead into the collection, or into the folder `beside`, the target of the image's link: a folder may link
    to images and their sidecars.
    """
    target, real = os.path.realpath(file), os.path.realpath(root)
    if file.is_symlink() and os.path.dirname(target) != beside and not target.startswith(real.rstrip("/") + "/"):
        raise UserError(
            f"data.root: {str(file)!r} is a link out of the collection, to {target!r}; replace it by the file, or "
            "remove the link"
        )


def read_text(file: Path) -> str:
    """Read a text file (see `decode`). Raises UserError (`data.root`) with the file name."""
    try:
        return decode(file.read_bytes())
    except UnicodeDecodeError as error:
        raise UserError(f"data.root: the file {str(file)!r} is not UTF-8 ({error}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"data.root: the file {str(file)!r} cannot be read ({error.strerror})") from error


def read_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the JSON object of each line, after its position for messages. Raises UserError (`data.root`)."""
    try:
        with open(file, "rb") as content:
            encoding = find_encoding(content.read(2))
        with open(file, encoding=encoding) as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{str(file)!r}, line {number},"
                if line.strip():
                    yield where, parse_object(line, where)
    except (OSError, UnicodeError) as error:
        raise UserError(f"data.root: {str(file)!r} cannot be read ({error}); repair it or make it again") from error


def parse_object(text: str, where: str) -> dict[str, Any]:
    """Parse a JSON object. Raises UserError (`data.root`) with its position."""
    if not isinstance(value := load_json(text, where), dict):
        raise UserError(f"data.root: {where} holds a JSON {type(value).__name__}; an object with tags is allowed")
    return value


def load_json(text: str, where: str) -> Any:
    """Parse JSON. Raises UserError (`data.root`) with its position."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"data.root: {where} is broken JSON ({error}); fix or remove it") from error


def list_faults(table: pa.Table, cache: Path, unused: Unused) -> Path | None:
    """Write the images of a collection with a bad sidecar into a file of `cache`, and return it; None without any."""
    if FAULT not in table.column_names:
        return None
    faulty = table.select(["path", FAULT]).filter(pc.is_valid(table[FAULT])).to_pylist()
    file = cache / f"bad_sidecars_{hash_table(table)}.jsonl"
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in faulty))
    unused.add(f"bad sidecars, all listed in {file}", *(row[FAULT] for row in faulty))
    return file


def refuse_faults(faults: Iterable[str], listing: Path, *fields: str) -> None:
    """Raise UserError (`data.on_bad_sidecar`) if one of the column's values is about `fields`, which are read."""
    lines = [line for fault in faults for line in fault.split("\n") if line.split(":")[0] in (*fields, "file")]
    if lines:
        raise UserError(
            f"data.on_bad_sidecar: stop, and {len(lines):,} sidecars cannot be read, such as {lines[0]} ({listing} "
            "lists all); fix or remove them, or set data.on_bad_sidecar=skip to do without what they say"
        )


def without_faults(table: pa.Table, cache: Path, unused: Unused, on_bad_sidecar: Literal["stop", "skip"]) -> pa.Table:
    """Return the table of a reader of all fields; the faults are listed. Raises UserError for them with `stop`."""
    if (listing := list_faults(table, cache, unused)) is None:
        return table
    if on_bad_sidecar == "stop":
        refuse_faults(table[FAULT].drop_null().to_pylist(), listing, "tags", "rating", "caption")
    return table.drop_columns(FAULT)
