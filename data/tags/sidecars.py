"""The files beside an image: `x.txt`, `x.caption` and `x.json`, or with the image's whole name, `x.jpg.txt`."""

import os
import stat
from pathlib import Path
from typing import Any

from data.tags.records import Sidecar, parse_json, parse_record, parse_text
from utils.errors import UserError

SUFFIXES = (".txt", ".caption", ".json")
_MAX_BYTES = 16 * 2**20


def read_sidecars(root: Path, folder: Path, name: str, names: set[str]) -> Sidecar:
    """Read the sidecars of the image `name` in a folder of the collection `root` whose file names are `names`.

    The JSON file takes precedence over the text file, `x.jpg.txt` over `x.txt`, and for captions `x.caption` over both.
    Raises UserError (`data.root`) naming the sidecar where it cannot be read.
    """
    found: dict[str, Path] = {}
    for file in list_sidecars(name, names):
        if (suffix := os.path.splitext(file)[1]) not in found:
            _check_sidecar(root, folder / file, folder / name)
            found[suffix] = folder / file
    sidecar = Sidecar()
    for suffix in (".caption", ".txt"):
        if suffix in found:
            text = parse_text(read_text(found[suffix]), one_per_line=found[suffix].name == f"{name}.txt")
            sidecar = text._replace(caption=sidecar.caption or text.caption)
    if (file := found.get(".json")) is None:
        return sidecar
    return sidecar.updated(parse_record(f"the sidecar {str(file)!r}", read_objects(file, lines=False)[0]))


def list_sidecars(name: str, names: set[str]) -> list[str]:
    """Return those of a folder's file names that are sidecars of the image `name`; `x.jpg.txt` before `x.txt`."""
    stems = dict.fromkeys((name, os.path.splitext(name)[0]))
    return [stem + suffix for suffix in SUFFIXES for stem in stems if stem + suffix in names]


def _check_sidecar(root: Path, file: Path, image: Path) -> None:
    """Raise UserError for a sidecar that is not a file, is too large, or is a link out of the collection."""
    try:
        status = file.stat()
    except OSError as error:
        raise UserError(f"data.root: the sidecar {str(file)!r} cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
        raise UserError(
            f"data.root: the sidecar {str(file)!r} is not a file of at most {_MAX_BYTES:,} bytes; remove it"
        )
    refuse_link_out(root, file, f"the sidecar {str(file)!r}", os.path.dirname(os.path.realpath(image)))


def refuse_link_out(root: Path, file: Path, what: str, beside: str | None = None) -> None:
    """Raise UserError for a link out of the collection, else any text file of this machine could become a caption.

    A link may lead into the collection, or to a file in the folder `beside`: that of the image's own target, as in a
    folder of links to pairs.
    """
    if not file.is_symlink():
        return
    target, real = os.path.realpath(file), os.path.realpath(root)
    if os.path.dirname(target) != beside and not target.startswith(real.rstrip("/") + "/"):
        raise UserError(
            f"data.root: {what} is a link out of the collection, to {target!r}; put the file in its place, or remove "
            "the link"
        )


def read_text(file: Path) -> str:
    """Read a text as UTF-8, with or without a byte order mark. Raises UserError (`data.root`) that names the file."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"data.root: the file {str(file)!r} is not UTF-8 ({error}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"data.root: the file {str(file)!r} cannot be read ({error.strerror})") from error


def read_objects(file: Path, lines: bool) -> list[dict[str, Any]]:
    """Read the JSON objects of a file: one, or with `lines` one on each line. Raises UserError that names the file."""
    text = read_text(file)
    texts = [line for line in text.split("\n") if line.strip()] if lines else [text]
    found = []
    for number, part in enumerate(texts):
        where = f"{str(file)!r}, object {number}," if lines else repr(str(file))
        try:
            found.append(parse_json(part))
        except ValueError as error:
            raise UserError(f"data.root: {where} is broken JSON ({error}); fix or remove it") from error
        if not isinstance(found[-1], dict):
            raise UserError(
                f"data.root: {where} holds a JSON {type(found[-1]).__name__}; an object with "
                "tags, rating or caption is allowed"
            )
    return found
