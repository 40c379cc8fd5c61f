"""Tables that describe the images of folders: those of imagefolder, of kohya and of posts.

    metadata.csv      file_name,text,label    paths relative to its folder, which may be any
    meta_cap.json     {"folder/1": {"tags": "1girl, solo", "caption": "a girl"}, ...}
    meta_tags.jsonl   {"image_path": "folder/1.png", "caption": "1girl, solo"} on each line
    meta_ours.jsonl   {"path": "folder/1.png", "tags": "1girl, solo", "rating": "general", "probs": {...}} on each line
    posts.parquet     id or md5, tag_string, rating: the image is the file of that name, in any folder and format

The last four are at the root. A key of kohya's is an image's path, with or without its suffix. A path of another
machine matches by its last parts.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data.layouts.names import TABLES, is_metadata
from data.layouts.sidecars import (
    Sidecar,
    decode,
    is_field,
    load_json,
    parse_record,
    parse_text,
    read_lines,
    refuse_link_out,
)  # fmt: skip
from data.layouts.tables import Columns, find_one, name_columns, name_field, read_columns, read_records
from data.layouts.unused import Unused
from utils.errors import UserError, about
from utils.formats.spelling import Tag, parse_tag, split_tags, write_tag
from utils.formats.vocabulary import CATEGORIES
from utils.io.files import readable
from utils.io.names import Names


def read_tables(
    root: Path, files: Iterable[str], images: Mapping[str, int], unused: Unused, stated: Columns
) -> dict[str, Sidecar]:
    """Return metadata of images by path, from tables of imagefolder: TABLES in any folder. stated: `data.columns`.

    Raises UserError (`data.root`) if one cannot be read, or if a folder has two.
    """
    found = {}
    for name in files:
        file = find_one((root / name).parent, TABLES)
        refuse_link_out(root, file)
        table = read_columns(file)
        names = name_columns(table, stated)
        key = next((column for column, field in names.items() if field == "path"), None)
        if key is None:
            unused.add("tables without a column file_name", name)
            continue
        known = Names(images)
        del names[key]
        for image, record in zip(table[key].to_pylist(), read_records(name, table, unused, names)):
            path = os.path.normpath(os.path.join(os.path.dirname(name), str(image).replace("\\", "/")))
            with about(f"data.root: {name}"):
                path = known.find(path)
            if path is not None:
                found[path] = record
            else:
                unused.add("rows of tables without an image", f"{image} in {name}")
    return found


def read_metadata(root: Path, paths: Iterable[str], unused: Unused) -> dict[str, Sidecar]:
    """Return what the metadata file says about the images `paths`, by path; {} if there is no such file.

    Raises UserError (`data.root`) if the file cannot be read, or if there is more than one.
    """
    by_key = {key: path for path in paths for key in (os.path.splitext(path)[0], path)}
    known = Names(by_key)
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(filter(is_metadata, os.listdir(root))):
        if entries := _read_entries(root, root / name):
            found[name] = entries
        elif os.path.splitext(name)[0] not in by_key:
            unused.add("files with the name of kohya's metadata, but no entry per image", name)
    find_one(root, found)
    sidecars: dict[str, Sidecar] = {}
    for name, entries in found.items():
        for key, record in entries.items():
            parts = key.replace("\\", "/").split("/")
            ends = ("/".join(parts[start:]) for start in range(len(parts)))
            with about(f"data.root: {name}"):
                end = next(filter(None, map(known.find, ends)), None)
            if end is not None:
                sidecars[by_key[end]] = _parse_entry(f"{str(root / name)!r}, {key!r}", record, unused)
            else:
                unused.add(f"entries of {name} without an image", key)
    return sidecars


def _read_entries(root: Path, file: Path) -> dict[str, dict[str, Any]]:
    """Return the records of a file by their keys; {} if it holds something else."""
    refuse_link_out(root, file)
    if file.suffix == ".json":
        entries = load_json(decode(file.read_bytes()), repr(str(file)))
    else:
        entries = {_path_of(record): record for _, record in read_lines(file)}
    is_kohyas = isinstance(entries, dict) and all(isinstance(key, str) for key in entries)
    return entries if is_kohyas and all(isinstance(record, dict) for record in entries.values()) else {}


def _path_of(record: dict[str, Any]) -> Any:
    """Return the path in a row, under any of its names."""
    return next((value for name, value in record.items() if name_field(name) == "path"), None)


def _parse_entry(where: str, record: dict[str, Any], unused: Unused) -> Sidecar:
    """Read an entry; without tags, its caption is a list of tags. `probs` of predict.py has the tags' categories."""
    tags = record.get("tags")
    probs = record.get("probs")
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


def read_posts(root: Path, file: Path, images: Iterable[str], unused: Unused) -> dict[str, Sidecar]:
    """Return the posts with an image, by its path. Raises UserError if no post has one."""
    refuse_link_out(root, file)
    images = sorted(images)
    by_name = {os.path.splitext(os.path.basename(path))[0]: path for path in images}
    sidecars: dict[str, Sidecar] = {}
    for where, post in _iterate_posts(file):
        names = [str(post[name]) for name in ("id", "md5") if post.get(name) is not None]
        path = next((by_name[name] for name in names if name in by_name), None)
        if path is not None and path not in sidecars:
            sidecars[path] = parse_record(where, post)
    if not sidecars:
        raise UserError(
            f"data.root: no post of {str(file)!r} has one of the {len(images):,} images; name images by id or md5"
        )
    unused.add(f"images without a post in {file.name}", *(path for path in images if path not in sidecars))
    return sidecars


def _iterate_posts(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each post with its position, for messages."""
    if file.suffix == ".jsonl":
        yield from read_lines(file)
        return
    with about("data.root"), readable(file, file.suffix), pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(columns=[*filter(is_field, parquet.schema_arrow.names)]):
            yield from ((f"a post of {str(file)!r}", post) for post in batch.to_pylist())
