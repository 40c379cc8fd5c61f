"""Tables of users: a spreadsheet, or the train.csv of a competition, whose rows name files of the collection.

    train.csv: id,breed            0021f9ceb3,boston_bull       train/0021f9ceb3.jpg
    labels.csv: filename;klasse    Fotos\\IMG_1.JPG;Käfer       2024/IMG_1.jpg

The column that names most images is the one of paths. A name is found without its ending, and in any folder. Rows
without an image, and images without a row, are counted and listed in a file; they stop nothing.
"""

import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from data.layouts.manifest import cast_columns, read_splits
from data.layouts.names import is_image_name
from data.layouts.places import read_split
from data.layouts.readers import Sidecar
from data.layouts.scan import Folder
from data.layouts.table import SHOWN, TEST, TYPES
from data.layouts.tables import list_labels, name_columns, read_columns
from data.layouts.unused import ROWS, UNNAMED, is_form
from utils.errors import UserError
from utils.io.names import to_nfc

_MAPPED = ("label", "tags", "caption", "split")  # other names of ours mean something else in a user's table: weight
_FLAGS = {-1, 0, 1}  # the values of columns that say yes or no
_Find = Callable[[str, str], str | None]  # the image of a name, and of the split that it is looked for


class _Listed(NamedTuple):
    """A table, its column of names, and the image of each row, or None. split: the one that the table's name says."""

    file: Path
    split: str
    table: pa.Table
    key: str
    paths: list[str | None]


def read_listed_images(folder: Folder, files: Sequence[str]) -> dict[str, Sidecar]:
    """Return what a table of the user says of the images that it names; nothing without such a table.

    A table that `data.table` does not name is read if neither folders of two classes nor sidecars describe the images.
    Images of a test folder that no row names are kept without a label. Raises UserError (`data.table`, `data.columns`):
    a table that is absent or names no image; several tables.
    """
    chosen = _choose_files(folder, files)
    find = build_finder(folder.splits if chosen else {})
    tables = [each for each in (_match(file, find, folder) for file in chosen) if each is not None]
    tables = [each for each in tables if each.split != TEST] or tables  # these have no label
    if len(tables) > 1:
        lines = [f"{each.file.name} ({', '.join(each.table.column_names[:SHOWN])})" for each in tables]
        raise UserError(
            f"data.table: {len(tables)} tables name images: {'; '.join(lines)}; choose one, as in "
            f"data.table={tables[0].file.name}, or data.table=none to read none"
        )
    read = {each.file for each in tables}
    folder.unused.add_files(*(name for name in files if folder.root / name not in read and name != folder.choice.table))
    return _read_rows(tables[0], folder) if tables else {}


def build_finder(splits: Mapping[str, str | None]) -> _Find:
    """Return a function that finds the image of a name: with or without its ending, in any folder."""
    images = {}
    for path in splits:
        images.setdefault(_split_name(path)[0], []).append(path)

    @functools.cache
    def find(name: str, split: str) -> str | None:
        """Return the image that shares the most folders with the name, then its ending, then the split."""
        parts = _split_name(name)
        ending = os.path.splitext(name.lower())[1]
        ranks = {}
        for path in images.get(parts[0], ()):
            shared = len(os.path.commonprefix([parts, _split_name(path)]))
            ranks[path] = (shared, path.lower().endswith(ending), splits[path] == split)
        best = max(ranks.values(), default=None)
        found = [path for path, rank in ranks.items() if rank == best]
        return found[0] if len(found) == 1 else None

    return find


def _split_name(name: str) -> list[str]:
    """Return the name of a file without its ending, and its folders, the last first; all in one spelling."""
    stem = os.path.splitext(name)[0] if is_image_name(name) else name
    return to_nfc(stem).casefold().strip().replace("\\", "/").split("/")[::-1]


def _choose_files(folder: Folder, files: Sequence[str]) -> list[Path]:
    """Return the table that `data.table` states, or tables at the root. Raises UserError (`data.table`)."""
    root = folder.root
    stated = folder.choice.table
    is_described = len({*folder.labels.values()} - {None}) > 1 or 2 * len(folder.sidecars) > len(folder.images)
    if stated == "none" or (stated == "auto" and is_described):  # one folder tells no class
        return []
    if stated == "auto":
        return [root / name for name in files if "/" not in name and not is_form(name)]
    file = next(filter(Path.is_file, (root / stated, Path(stated).expanduser())), None)
    if file is None:
        raise UserError(f"data.table: {stated!r} is no file in {str(root)!r} or in {str(Path.cwd())!r}")
    return [file]


def _match(file: Path, find: _Find, folder: Folder) -> _Listed | None:
    """Return a table with the column that names most images; None if it names at most half of its rows or images.

    Raises UserError (`data.table`) if it is the stated one, and cannot be read or names none.
    """
    choice = folder.choice
    is_stated = choice.table != "auto"
    try:
        table = read_columns(file, "data.table")
    except UserError as error:
        if is_stated:
            raise
        folder.unused.add("tables that cannot be read", f"{file.name} ({error})")
        return None
    split = read_split(file.stem) or "train"
    table = pa.table({name: column for name, column in zip(table.column_names, table.columns) if name})
    found = [(0, "", [])]
    for name in table.column_names:
        if choice.columns.get("path") in (None, name):
            paths = [find(str(value), split) for value in table[name].to_pylist()]
            found.append((len({*paths} - {None}), name, paths))
    count, key, paths = max(found)
    if count if is_stated else 2 * count > min(len(table), len(folder.images)):
        is_prediction = {"path", "error"} <= {*table.column_names}  # of predict.py
        return None if is_prediction and not is_stated else _Listed(file, split, table, key, paths)
    if not is_stated:
        return None
    raise UserError(
        f"data.table: no column of {str(file)!r} names one of the {len(folder.images):,} images, such as "
        f"{min(folder.images)!r}; it has {', '.join(table.column_names)}; name the right one: "
        "data.columns={path: NAME}"
    )


def _read_rows(each: _Listed, folder: Folder) -> dict[str, Sidecar]:
    """Return the rows that name an image, one for each, and the test images that wait; say what is read as what."""
    name = each.file.name
    unused = folder.unused
    splits = folder.splits
    values = each.table[each.key].to_pylist()
    rows = {}
    for row, path in enumerate(each.paths):
        if path is None:
            unused.add(f"{ROWS} {name} without an image", str(values[row]))
        elif rows.setdefault(path, row) != row:
            unused.add(f"{ROWS} {name} that name an image again", str(values[row]))
    below = os.path.join(os.path.commonpath([*map(os.path.dirname, rows)]), "")
    count = sum(path.startswith(below) for path in splits)
    endings = ", ".join({os.path.splitext(path)[1]: None for path in rows})
    line = f"{name}: column {each.key} names {len(rows):,} of {count:,} files in {below or './'}, with {endings}"
    left = splits.keys() - rows
    waiting = [path for path in left if splits[path] == TEST]
    unused.add(f"{UNNAMED} {name} names", *left.difference(waiting))
    order = [*rows.values()]
    table, names = _choose_columns(each.table.take(order).drop_columns([each.key]), folder)
    read = [f"{ours}: {theirs}" for theirs, ours in names.items() if ours in _MAPPED]
    unused.said += (f"{line}; {', '.join(read) or 'no label'}",)
    columns = cast_columns(each.file, table, names, unused, order)
    stated = read_splits(each.file, columns.pop("split"), "")
    columns = {name: column.to_pylist() for name, column in columns.items() if column.null_count < len(column)}
    sidecars = {path: Sidecar(split=TEST) for path in waiting}
    for row, path in enumerate(rows):
        values = {name: column[row] for name, column in columns.items()}
        known = {name: values.pop(name) for name in Sidecar._fields if name in values}
        sidecars[path] = Sidecar(**known, split=stated[row] or splits[path] or each.split, more=values)
    return sidecars


def _choose_columns(table: pa.Table, folder: Folder) -> tuple[pa.Table, dict[str, str]]:
    """Return the table, its flags as columns of tags, and our name of each column.

    Without label, tags and caption, the only one that may be a label is one.
    """
    stated = {ours: theirs for ours, theirs in folder.choice.columns.items() if ours != "path"}
    names = name_columns(table, stated)
    odd = [name for name, ours in names.items() if ours in TYPES and ours not in (*_MAPPED, *stated)]
    folder.unused.add("columns of tables with a name of ours (data.columns={weight: NAME} takes one)", *odd)
    table, names = _join_flags(table, {name: ours for name, ours in names.items() if name not in odd})
    possible = list_labels(table, names)
    if len(possible) == 1 and not {"tags", "caption"} & {*names.values()}:
        names |= dict.fromkeys(possible, "label")
    return table, names


def _join_flags(table: pa.Table, names: dict[str, str]) -> tuple[pa.Table, dict[str, str]]:
    """Replace columns of yes and no by one of tags, or of the label if each image has one.

    They stay beside a column that is a label or may be one, and beside tags and captions. Beside 0, -1 is uncertain and
    becomes an unknown tag, as CheXpert has it; without any 0, it is no, as CelebA has it.
    """
    flags = [name for name, ours in names.items() if ours not in TYPES and _is_flag(table[name])]
    others = {theirs: ours for theirs, ours in names.items() if theirs not in flags}
    is_described = {"label", "tags", "caption"} & {*others.values()} or list_labels(table, others)
    if len(flags) < 2 or is_described:
        return table, names
    rows = table.select(flags).to_pylist()
    has_no = any(0 in row.values() for row in rows)
    tags = [[name for name in flags if (row[name] or 0) > 0] for row in rows]
    unknown = [[name for name in flags if has_no and row[name] == -1] or None for row in rows]
    counts = {len(each) for each, row in zip(tags, rows) if row[flags[0]] is not None}  # test images wait without
    what = f"the {len(flags)} columns of 0 and 1"
    table = table.drop_columns(flags)
    if counts == {1} and not any(unknown):
        return table.append_column(what, pa.array([next(iter(each), None) for each in tags])), others | {what: "label"}
    uncertain = f"-1 in {what}"
    table = table.append_column(what, pa.array(tags)).append_column(uncertain, pa.array(unknown, TYPES["tags"]))
    return table, others | {what: "tags", uncertain: "unknown_tags"}


def _is_flag(column: pa.ChunkedArray) -> bool:
    is_number = re.match("u?int|double|bool", str(column.type))
    return bool(is_number) and _FLAGS.issuperset(column.drop_null().unique().to_pylist())
