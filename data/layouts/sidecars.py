"""Sidecars, files with metadata beside an image: `x.txt`, `x.caption`, `x.json`, or `x.jpg.txt` etc."""

import json
import os
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from data.layouts.names import SUFFIXES, is_metadata, is_sidecar
from data.layouts.records import FIELDS, Sidecar, decode, find_encoding, is_field, parse_record, parse_text
from data.layouts.table import hash_table
from data.layouts.unused import Unused
from utils.errors import UserError, about
from utils.io.files import readable, write_text

FAULT = "sidecar_fault"  # a column; see `Sidecar`

TEXT_SUFFIXES = (".cls", *SUFFIXES)  # a later one takes precedence
_MAX_BYTES = 16 * 2**20


def read_sidecars(root: Path, image: str, files: Sequence[str], unused: Unused) -> Sidecar:
    """Read the sidecars of an image; of several with one suffix, the first. All paths are relative to the root."""
    texts = {os.path.splitext(file)[1].lower(): str(root / file) for file in reversed(files)}
    beside = os.path.dirname(os.path.realpath(root / image))

    def read(path: str) -> bytes:
        refuse_link_out(root, file := Path(path), beside)
        if not file.is_file() or file.stat().st_size > _MAX_BYTES:
            raise UserError(f"data.root: {path!r} is not a file of at most {_MAX_BYTES:,} bytes; remove it")
        return file.read_bytes()

    return read_texts(str(root / image), texts, read, unused)


def read_texts(image: str, texts: Mapping[str, str], read: Callable[[str], bytes], unused: Unused) -> Sidecar:
    """Read the texts of an image: their names by suffix (TEXT_SUFFIXES). `.caption` gives the caption.

    What cannot be read is a fault of the result.
    """
    sidecar = Sidecar()
    for suffix in filter(texts.get, TEXT_SUFFIXES):
        try:
            text = decode(read(name := texts[suffix]))
            if suffix == ".json":
                record, found = load_json(text, repr(name)) if text.strip() else {"tags": None}, Sidecar()
                if isinstance(record, dict) and any(map(is_field, record)):
                    found = parse_record(repr(name), record)
                else:
                    unused.add("JSON files without tags, rating, caption, label or id", name)
            elif suffix == ".cls":
                found = Sidecar(label=text.strip() or None)
            else:
                found = parse_text(name, text, unused, one_per_line=f"{image}.txt".lower() == name.lower())
                found = found._replace(caption=sidecar.caption or found.caption)
        except (OSError, ValueError) as error:  # UserError is one
            fault = str(error) if isinstance(error, UserError) else f"{name!r} cannot be read ({error})"
            found = Sidecar(sidecar_fault=f"file: {fault.removeprefix('data.root: ')}")
        sidecar = sidecar.updated(found)
    return sidecar


def pair_sidecars(folder: str, images: Iterable[str], names: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the sidecars of each image of a folder, `x.jpg.txt` before `x.txt`, and those of none of them, by path.

    folder: its path with a final slash. images, names: the names of its images, and of all its files.
    """
    pairs: dict[str, list[str]] = {}
    orphans: list[str] = []
    files = sorted((name for name in names if is_sidecar(folder + name)), key=lambda name: (-len(name), name))
    owners: dict[str, list[str]] = {}
    for image in images if files else ():
        for owner in (image, os.path.splitext(image)[0]):
            owners.setdefault(owner, []).append(image)
    for name in files:
        found = owners.get(os.path.splitext(name)[0], ())
        for image in found:
            pairs.setdefault(folder + image, []).append(folder + name)
        if not found and not is_metadata(folder + name):
            orphans.append(folder + name)
    return pairs, sorted(orphans)


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


def read_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the JSON object of each line, after its position for messages. Raises UserError (`data.root`)."""
    with about("data.root"), readable(file, file.suffix):
        with open(file, "rb") as content:
            encoding = find_encoding(content.read(2))
        with open(file, encoding=encoding) as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{str(file)!r}, line {number},"
                if line.strip():
                    if not isinstance(record := load_json(line, where), dict):
                        raise UserError(f"data.root: {where} holds {reprlib.repr(record)}; an object is allowed")
                    yield where, record


def load_json(text: str, where: str) -> Any:
    """Parse JSON. Raises UserError (`data.root`) with its position, also for text that UTF-8 cannot encode."""
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise UserError(f"data.root: {where} is broken JSON ({error}); fix or remove it") from error


def list_faults(
    table: pa.Table, cache: Path, unused: Unused, on_bad: Literal["stop", "skip"], fields: Sequence[str] = FIELDS
) -> pa.Table:
    """Write the images with a bad sidecar into a file of `cache`; return the table without the column of faults.

    With `stop`, it raises UserError for faults of `fields`; without fields, the column stays for later readers.
    """
    if FAULT not in table.column_names:
        return table
    faulty = table.select(["path", FAULT]).filter(pc.is_valid(table[FAULT])).to_pylist()
    file = cache / f"bad_sidecars_{hash_table(table)}.jsonl"
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in faulty))
    unused.add(f"bad sidecars, all listed in {file}", *(row[FAULT] for row in faulty))
    if on_bad == "stop":
        if not fields:
            return table
        refuse_faults((row[FAULT] for row in faulty), file, *fields)
    return table.drop_columns(FAULT)


def refuse_faults(faults: Iterable[str], listing: Path, *fields: str) -> None:
    """Raise UserError (`data.on_bad_sidecar`) if one of the column's values is about `fields`, which are read."""
    lines = [line for fault in faults for line in fault.split("\n") if line.split(":")[0] in (*fields, "file")]
    if lines:
        raise UserError(
            f"data.on_bad_sidecar: stop, and {len(lines):,} sidecars cannot be read, such as {lines[0]} ({listing} "
            "lists all); fix or remove them, or set data.on_bad_sidecar=skip to do without what they say"
        )
