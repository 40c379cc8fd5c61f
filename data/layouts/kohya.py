"""Read kohya's metadata at the root of a folder, and rows in its form that predict.py writes.

    meta_cap.json     {"folder/1": {"tags": "1girl, solo", "caption": "a girl"}, ...}
    meta_tags.jsonl   {"image_path": "folder/1.png", "caption": "1girl, solo"} on each line
    meta_ours.jsonl   {"path": "folder/1.png", "tags": "1girl, solo", "rating": "general", "probs": {...}} on each line

A key is an image's path, with or without its suffix. A path of another machine matches by its last parts.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.layouts.manifest import find_one
from data.layouts.names import is_metadata
from data.layouts.records import Sidecar, decode, parse_record, parse_text
from data.layouts.sidecars import load_json, read_lines, refuse_link_out
from data.layouts.unused import Unused
from utils.formats.spelling import Tag, parse_tag, split_tags, write_tag
from utils.formats.vocabulary import CATEGORIES
from utils.record.logging import get_logger

log = get_logger(__name__)


def read_metadata(root: Path, paths: Iterable[str], unused: Unused) -> dict[str, Sidecar]:
    """Return what the metadata file says about the images `paths`, by path; {} if there is no such file.

    Raises UserError (`data.root`) if the file cannot be read, or if there is more than one.
    """
    files = [file for file in sorted(root.glob("meta_*")) if is_metadata(file.name)]
    read = {file: entries for file in files if (entries := _read_entries(root, file))}
    find_one(root, [file.name for file in read])
    by_key = {key: path for path in paths for key in (os.path.splitext(path)[0], path)}
    others = [file.name for file in files if file not in read and file.stem not in by_key]
    unused.add("files with the name of kohya's metadata, but no entry per image", *others)
    sidecars: dict[str, Sidecar] = {}
    for file, entries in read.items():
        for key, record in entries.items():
            parts = key.replace("\\", "/").split("/")
            ends = ("/".join(parts[start:]) for start in range(len(parts)))
            if (path := next((by_key[end] for end in ends if end in by_key), None)) is not None:
                sidecars[path] = _parse_entry(f"{str(file)!r}, {key!r}", record, unused)
            else:
                unused.add(f"entries of {file.name} without an image", key)
        log.info("%s: %s of %s entries match an image", file.name, f"{len(sidecars):,}", f"{len(entries):,}")
    return sidecars


def _read_entries(root: Path, file: Path) -> dict[str, dict[str, Any]]:
    """Return the records of a file by their keys; {} if it holds something else."""
    refuse_link_out(root, file)
    if file.suffix == ".json":
        entries = load_json(decode(file.read_bytes()), repr(str(file)))
    else:
        entries = {record.get("image_path", record.get("path")): record for _, record in read_lines(file)}
    is_kohyas = isinstance(entries, dict) and all(isinstance(key, str) for key in entries)
    return entries if is_kohyas and all(isinstance(record, dict) for record in entries.values()) else {}


def _parse_entry(where: str, record: dict[str, Any], unused: Unused) -> Sidecar:
    """Read an entry; without tags, its caption is a list of tags. `probs` of predict.py has the tags' categories."""
    tags, probs = record.get("tags"), record.get("probs")
    if isinstance(tags, str):
        tags = split_tags(tags)
        if isinstance(probs, dict) and all(isinstance(names, dict) for names in probs.values()):
            tags = [text for tag in tags for text in _add_category(tag, probs)]
    sidecar = parse_record(where, {**record, "tags": tags})
    return sidecar if sidecar.tags is not None else parse_text(where, sidecar.caption or "", unused).updated(sidecar)


def _add_category(text: str, probs: dict[str, dict[str, Any]]) -> list[str]:
    """Return a tag with each category that has its name, or as it is."""
    tag = parse_tag(text)
    found = [category for category, names in probs.items() if tag.category is None and tag.name in names]
    return [write_tag(Tag(CATEGORIES.get(category), tag.name)) for category in found] or [text]
