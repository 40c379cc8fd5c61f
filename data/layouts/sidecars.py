"""Sidecars, files with metadata beside an image: `x.txt`, `x.caption`, `x.json`, or `x.jpg.txt` etc."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.layouts.records import Sidecar, parse_json, parse_record, parse_text
from utils.errors import UserError

SUFFIXES = (".txt", ".caption", ".json")
_MAX_BYTES = 16 * 2**20


def read_sidecars(root: Path, folder: Path, name: str, names: set[str]) -> Sidecar:
    """Read the sidecars of the image `name` in `folder`, which contains the files `names`.

    The JSON file takes precedence over the text file, `x.jpg.txt` over `x.txt`, and for captions `x.caption` over
    `x.txt`. Raises UserError (`data.root`) with the name of a sidecar that cannot be read.
    """
    by_suffix: dict[str, Path] = {}
    for file in list_sidecars(name, names):
        by_suffix.setdefault(os.path.splitext(file)[1], folder / file)
    beside = os.path.dirname(os.path.realpath(folder / name)) if by_suffix else None
    for file in by_suffix.values():
        refuse_link_out(root, file, beside)
        if not file.is_file() or file.stat().st_size > _MAX_BYTES:
            raise UserError(f"data.root: {str(file)!r} is not a file of at most {_MAX_BYTES:,} bytes; remove it")
    sidecar = Sidecar()
    for suffix in (".caption", ".txt"):
        if suffix in by_suffix:
            text = parse_text(read_text(by_suffix[suffix]), one_per_line=by_suffix[suffix].name == f"{name}.txt")
            sidecar = text._replace(caption=sidecar.caption or text.caption)
    if (file := by_suffix.get(".json")) is None:
        return sidecar
    return sidecar.updated(parse_record(repr(str(file)), parse_object(read_text(file), repr(str(file)))))


def list_sidecars(name: str, names: set[str]) -> list[str]:
    """Return the sidecars of the image `name` among the file names of its folder; `x.jpg.txt` before `x.txt`."""
    stems = dict.fromkeys((name, os.path.splitext(name)[0]))
    return [stem + suffix for suffix in SUFFIXES for stem in stems if stem + suffix in names]


def list_orphans(folder: str, images: set[str], names: set[str]) -> list[str]:
    """Return the sidecars of none of the `images` of a folder (with a final slash), among its file names, by path."""
    files = [name for name in names - images if name.endswith(SUFFIXES) and (folder or not name.startswith("meta_"))]
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
    """Read a UTF-8 file, with or without a byte order mark. Raises UserError (`data.root`) with the file name."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"data.root: the file {str(file)!r} is not UTF-8 ({error}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"data.root: the file {str(file)!r} cannot be read ({error.strerror})") from error


def read_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the JSON object of each line, after its position for messages. Raises UserError (`data.root`)."""
    try:
        with open(file, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{str(file)!r}, line {number},"
                if line.strip():
                    yield where, parse_object(line, where)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.root: {str(file)!r} cannot be read ({error}); repair it or make it again") from error


def parse_object(text: str, where: str) -> dict[str, Any]:
    """Parse a JSON object. Raises UserError (`data.root`) with its position."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise UserError(f"data.root: {where} is broken JSON ({error}); fix or remove it") from error
    if not isinstance(value, dict):
        raise UserError(f"data.root: {where} holds a JSON {type(value).__name__}; an object with tags is allowed")
    return value
