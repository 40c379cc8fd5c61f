"""Tables that describe the images of folders: tables of imagefolder, of kohya and of posts.

    metadata.csv      file_name,text,label    paths relative to its folder, which may be any
    meta_cap.json     {"folder/1": {"tags": "1girl, solo", "caption": "a girl"}, ...}
    meta_tags.jsonl   {"image_path": "folder/1.png", "caption": "1girl, solo"} on each line
    meta_ours.jsonl   {"path": "folder/1.png", "tags": "1girl, solo", "rating": "general", "probs": {...}} on each line
    posts.parquet     id or md5, tag_string, rating: the image is the file of that name, in any folder and format

The last four are at the root. A key of kohya's is an image's path, with or without its suffix. A path of another
machine matches by its last parts.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from os.path import basename, dirname, normpath
from pathlib import Path

import pyarrow.parquet as pq

from data.layouts.listed import build_finder
from data.layouts.names import stem_of
from data.layouts.readers import Described, Sidecar
from data.layouts.scan import Folder
from data.layouts.sidecars import (
    decode,
    is_field,
    load_json,
    parse_record,
    parse_text,
    read_lines,
    refuse_link_out,
)  # fmt: skip
from data.layouts.tables import list_rows, read_columns, read_fields
from data.layouts.unused import Unused
from data.layouts.walk import find_one
from utils.errors import UserError, about
from utils.formats.spelling import CATEGORIES, Tag, parse_tag, read_list, split_tags, write_tag
from utils.io.files import Json, readable

_Row = tuple[str, Sidecar]  # after the path that it states


def _find_images(read: Callable[[Folder, Path], list[_Row]], folder: Folder, files: Sequence[str]) -> Described:
    """Return what tables say of images, by path. Raises UserError (`data.root`): a bad table, or two in a folder."""
    find = build_finder(folder.splits, is_whole=True)
    first = {}  # table of each folder
    sidecars = {}
    for name in sorted(files):
        refuse_link_out(folder.root, folder.root / name)
        beside = dirname(name)
        if rows := read(folder, folder.root / name):
            find_one(folder.root, {first.setdefault(beside, name): None, name: None})
        else:
            folder.unused.add("tables that name no image", name)
        for key, record in rows:
            path = find(normpath(f"{beside}/{key}".replace("\\", "/")), "")
            if path is None:
                folder.unused.add("rows of tables without an image", f"{key} in {name}")
            else:
                sidecars[path] = sidecars.get(path, Sidecar()).updated(record)
    return sidecars


def _read_table(folder: Folder, file: Path) -> list[_Row]:
    """Return the metadata in each row of a table, after its path; none without a column of paths."""
    columns = read_fields(file, read_columns(file), folder.choice.columns, folder.unused)
    paths = map(str, columns.pop("path", ()))
    return [*zip(paths, list_rows(columns))]


def _read_entries(folder: Folder, file: Path) -> list[_Row]:
    """Return the entries of kohya's metadata, after their keys; none if the file holds something else."""
    if file.suffix == ".json":
        entries = load_json(decode(file.read_bytes()), repr(str(file)))
    else:
        entries = {str(row.get("path", row.get("image_path", "no path"))): row for _, row in read_lines(file)}
    if not isinstance(entries, dict) or not all(isinstance(record, dict) for record in entries.values()):
        return []
    return [(key, _parse_entry(f"{str(file)!r}, {key!r}", record, folder.unused)) for key, record in entries.items()]


def _parse_entry(where: str, record: Json, unused: Unused) -> Sidecar:
    """Read an entry; without tags, its caption is a list of tags. `probs` of predict.py has the tags' categories."""
    tags = record.get("tags")
    if isinstance(tags, str):
        tags = read_list(tags) or split_tags(tags)
        if isinstance(probs := record.get("probs"), dict):
            tags = [text for tag in tags for text in _add_category(tag, probs)]
    sidecar = parse_record(where, {**record, "tags": tags})
    return sidecar if sidecar.tags is not None else parse_text(where, sidecar.caption or "", unused).updated(sidecar)


def _add_category(text: str, probs: Json) -> list[str]:
    """Return a tag with each category whose probabilities have its name, or as it is."""
    tag = parse_tag(text)
    found = [category for category, names in probs.items() if isinstance(names, dict) and tag.name in names]
    return [write_tag(Tag(CATEGORIES.get(category), tag.name)) for category in found if tag.category is None] or [text]


read_imagefolder = functools.partial(_find_images, _read_table)
read_kohya = functools.partial(_find_images, _read_entries)


def read_posts(folder: Folder, files: Sequence[str]) -> Described:
    """Return the posts with an image, all for training. Raises UserError (`data.root`) for two tables, or no image."""
    file = find_one(folder.root, files)
    refuse_link_out(folder.root, file)
    by_name = {stem_of(basename(path)): path for path in sorted(folder.images)}
    sidecars = {}
    for where, post in _iterate_posts(file):
        path = by_name.get(str(post.get("id"))) or by_name.get(str(post.get("md5")))
        if path and path not in sidecars:
            sidecars[path] = parse_record(where, post)._replace(split="train")
    if not sidecars:
        raise UserError(
            f"data.root: no post of {str(file)!r} has one of the {len(folder.images):,} images; name images by id or "
            "md5"
        )
    folder.unused.add(f"images without a post in {file.name}", *folder.images.keys() - sidecars)
    return sidecars


def _iterate_posts(file: Path) -> Iterator[tuple[str, Json]]:
    """Yield each post with its position, for messages."""
    if file.suffix == ".jsonl":
        yield from read_lines(file)
        return
    with about("data.root"), readable(file, file.suffix), pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(columns=[*filter(is_field, parquet.schema_arrow.names)]):
            yield from ((f"a post of {str(file)!r}", post) for post in batch.to_pylist())
