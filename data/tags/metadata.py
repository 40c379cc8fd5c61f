"""kohya's metadata at the root of a collection: `meta_cap.json` and the like, or JSONL of its tagger or predict.py.

    meta_cap.json     {"folder/1": {"tags": "1girl, solo", "caption": "a girl"}, ...}
    meta_tags.jsonl   {"image_path": "folder/1.png", "caption": "1girl, solo"} on each line
    meta_ours.jsonl   {"path": "folder/1.png", "tags": "1girl, solo", "rating": "general"} on each line

A key is an image's path, with or without its suffix; one from elsewhere counts by its last parts.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data.tags.records import Sidecar, parse_record, parse_text
from data.tags.sidecars import read_objects, refuse_link_out
from utils.errors import UserError
from utils.record.logging import get_logger

log = get_logger(__name__)

_Entries = list[tuple[str, dict[str, Any]]]


def read_metadata(root: Path, paths: Sequence[str]) -> dict[str, Sidecar]:
    """Return what the metadata at the root states of images, by path; {} where there is none.

    paths: those of the collection's images. Logs how many entries are of none of them.
    Raises UserError (`data.root`) naming the file where it is broken or a link out of the root, where two files are
    metadata, and where two entries are of one image.
    """
    found = {}
    for file in sorted(root.glob("meta_*")):
        if file.suffix in (".json", ".jsonl") and (entries := _read_entries(root, file)):
            found[file] = entries
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise UserError(f"data.root: {str(root)!r} holds both {names}; keep the one that is right")
    return {path: sidecar for file, entries in found.items() for path, sidecar in _match(file, entries, paths).items()}


def _read_entries(root: Path, file: Path) -> _Entries:
    """Return the keys and records of a file; none, with a warning, where it is something else."""
    refuse_link_out(root, file, repr(str(file)))
    lines = file.suffix == ".jsonl"
    objects = read_objects(file, lines)
    of_lines = [(record.get("image_path", record.get("path")), record) for record in objects]
    entries = of_lines if lines else list(objects[0].items())
    if entries and all(isinstance(key, str) and isinstance(record, dict) for key, record in entries):
        return entries
    log.warning("data.root: %r is named like kohya's metadata, but has no entry per image; it is ignored", file.name)
    return []


def _match(file: Path, entries: _Entries, paths: Iterable[str]) -> dict[str, Sidecar]:
    """Return the entries' content by the path of their image."""
    by_key = {os.path.splitext(path)[0]: path for path in paths} | {path: path for path in paths}
    keys, missing, sidecars = {}, [], {}
    for key, record in entries:
        parts = key.replace("\\", "/").split("/")
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        path = next((by_key[end] for end in ends if end in by_key), None)
        if path is None:
            missing.append(key)
        elif path in keys:
            raise UserError(f"data.root: {str(file)!r}: {keys[path]!r} and {key!r} both name {path!r}; keep one")
        else:
            keys[path] = key
            sidecars[path] = _read_entry(f"{str(file)!r}, {key!r}", record)
    first = f"; the others, such as {missing[0]!r}, are ignored" if missing else ""
    log.info("%s: %s of %s entries are of images here%s", file.name, f"{len(sidecars):,}", f"{len(entries):,}", first)
    return sidecars


def _read_entry(where: str, record: dict[str, Any]) -> Sidecar:
    """Read an entry; its tags are separated by commas, and come from the caption where it has no other."""
    tags = record.get("tags")
    if isinstance(tags, str):
        tags = list(parse_text(tags).tags)
    sidecar = parse_record(where, {**record, "tags": tags})
    return sidecar if sidecar.tags is not None else parse_text(sidecar.caption or "").updated(sidecar)
