"""Files with what is known of images: beside an image (`x.txt`, `x.caption`, `x.json`, `x.jpg.txt`), and at the root.

At the root may be kohya's metadata, `meta_cap.json` and the like, or JSONL of its tagger or of predict.py:

    meta_cap.json     {"folder/1": {"tags": "1girl, solo", "caption": "a girl"}, ...}
    meta_tags.jsonl   {"image_path": "folder/1.png", "caption": "1girl, solo"} on each line
    meta_ours.jsonl   {"path": "folder/1.png", "tags": "1girl, solo", "rating": "general"} on each line

A key is an image's path, with or without its suffix; one from elsewhere counts by its last parts.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.tags.records import Sidecar, parse_json, parse_record, parse_text
from utils.errors import UserError
from utils.record.logging import get_logger

log = get_logger(__name__)

SUFFIXES = (".txt", ".caption", ".json")
_MAX_BYTES = 16 * 2**20


def read_sidecars(root: Path, folder: Path, name: str, names: set[str]) -> Sidecar:
    """Read the sidecars of the image `name` in a folder of the collection `root` whose file names are `names`.

    The JSON file takes precedence over the text file, `x.jpg.txt` over `x.txt`, and for captions `x.caption` over both.
    Raises UserError (`data.root`) naming the sidecar where it cannot be read.
    """
    found: dict[str, Path] = {}
    for file in list_sidecars(name, names):
        found.setdefault(os.path.splitext(file)[1], folder / file)
    beside = os.path.dirname(os.path.realpath(folder / name)) if found else None
    for file in found.values():
        refuse_link_out(root, file, beside)
        if not file.is_file() or file.stat().st_size > _MAX_BYTES:
            raise UserError(f"data.root: {str(file)!r} is not a file of at most {_MAX_BYTES:,} bytes; remove it")
    sidecar = Sidecar()
    for suffix in (".caption", ".txt"):
        if suffix in found:
            text = parse_text(read_text(found[suffix]), one_per_line=found[suffix].name == f"{name}.txt")
            sidecar = text._replace(caption=sidecar.caption or text.caption)
    if (file := found.get(".json")) is None:
        return sidecar
    return sidecar.updated(parse_record(repr(str(file)), parse_object(read_text(file), repr(str(file)))))


def list_sidecars(name: str, names: set[str]) -> list[str]:
    """Return those of a folder's file names that are sidecars of the image `name`; `x.jpg.txt` before `x.txt`."""
    stems = dict.fromkeys((name, os.path.splitext(name)[0]))
    return [stem + suffix for suffix in SUFFIXES for stem in stems if stem + suffix in names]


def read_metadata(root: Path, paths: Sequence[str]) -> dict[str, Sidecar]:
    """Return what the metadata at the root state of images, by path; {} where there are none.

    paths: those of the collection's images. Logs how many entries are of none of them.
    Raises UserError (`data.root`) naming the file where it cannot be read, and where two files are metadata.
    """
    files = [file for file in sorted(root.glob("meta_*")) if file.suffix in (".json", ".jsonl")]
    found = {file: entries for file in files if (entries := _read_entries(root, file))}
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise UserError(f"data.root: {str(root)!r} holds both {names}; keep the one that is right")
    by_key = {os.path.splitext(path)[0]: path for path in paths} | {path: path for path in paths}
    sidecars: dict[str, Sidecar] = {}
    for file, entries in found.items():
        for key, record in entries.items():
            parts = key.replace("\\", "/").split("/")
            ends = ("/".join(parts[start:]) for start in range(len(parts)))
            if (path := next((by_key[end] for end in ends if end in by_key), None)) is not None:
                sidecars[path] = _parse_entry(f"{str(file)!r}, {key!r}", record)
        log.info("%s: %s of %s entries are of images here", file.name, f"{len(sidecars):,}", f"{len(entries):,}")
    return sidecars


def _read_entries(root: Path, file: Path) -> dict[str, dict[str, Any]]:
    """Return the records of a file by their keys; none, with a warning, where it is something else."""
    refuse_link_out(root, file)
    if file.suffix == ".jsonl":
        entries = {record.get("image_path", record.get("path")): record for _, record in read_lines(file)}
    else:
        entries = parse_object(read_text(file), repr(str(file)))
    if all(isinstance(key, str) and isinstance(record, dict) for key, record in entries.items()):
        return entries
    log.warning("data.root: %r is named like kohya's metadata, but has no entry per image; it is ignored", file.name)
    return {}


def _parse_entry(where: str, record: dict[str, Any]) -> Sidecar:
    """Read an entry; its tags are separated by commas, and come from the caption where it has no other."""
    tags = record.get("tags")
    sidecar = parse_record(where, {**record, "tags": list(parse_text(tags).tags) if isinstance(tags, str) else tags})
    return sidecar if sidecar.tags is not None else parse_text(sidecar.caption or "").updated(sidecar)


def refuse_link_out(root: Path, file: Path, beside: str | None = None) -> None:
    """Raise UserError for a link out of the collection, else any text file of this machine could become a caption.

    A link may lead into the collection, or to a file in the folder `beside`: that of the image's own target, as in a
    folder of links to pairs.
    """
    target, real = os.path.realpath(file), os.path.realpath(root)
    if file.is_symlink() and os.path.dirname(target) != beside and not target.startswith(real.rstrip("/") + "/"):
        raise UserError(
            f"data.root: {str(file)!r} is a link out of the collection, to {target!r}; put the file in its place, or "
            "remove the link"
        )


def read_text(file: Path) -> str:
    """Read a text as UTF-8, with or without a byte order mark. Raises UserError (`data.root`) that names the file."""
    return "".join(_lines(file))


def read_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the JSON object of each line, and its name for messages. Raises UserError (`data.root`)."""
    for number, line in enumerate(_lines(file)):
        if line.strip():
            where = f"{str(file)!r}, line {number},"
            yield where, parse_object(line, where)


def _lines(file: Path) -> Iterator[str]:
    try:
        with open(file, encoding="utf-8-sig", newline="\n") as stream:
            yield from stream
    except UnicodeDecodeError as error:
        raise UserError(f"data.root: the file {str(file)!r} is not UTF-8 ({error}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"data.root: the file {str(file)!r} cannot be read ({error.strerror})") from error


def parse_object(text: str, where: str) -> dict[str, Any]:
    """Parse a JSON object. Raises UserError (`data.root`) that says where it is."""
    try:
        found = parse_json(text)
    except ValueError as error:
        raise UserError(f"data.root: {where} is broken JSON ({error}); fix or remove it") from error
    if not isinstance(found, dict):
        raise UserError(f"data.root: {where} holds a JSON {type(found).__name__}; an object with tags is allowed")
    return found
