"""Tables of users: a spreadsheet, or the train.csv of a competition, whose rows name files of the collection.

    train.csv: id,breed            0021f9ceb3,boston_bull       train/0021f9ceb3.jpg
    labels.csv: filename;klasse    Fotos\\IMG_1.JPG;Käfer       2024/IMG_1.jpg

The column that names most images is the one of paths. A name is found without its ending, and in any folder. Rows
without an image, and images without a row, are counted; they stop nothing.
"""

import functools
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from os.path import commonpath, commonprefix, dirname, join
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import Table

from data.layouts.names import is_image_name, stem_of, suffix_of
from data.layouts.places import describe_splits, find_splits
from data.layouts.readers import TABLES, Described, Sidecar
from data.layouts.scan import Columns, Folder
from data.layouts.table import SHOWN, SPLITS, TARGET, TEST, TYPES
from data.layouts.tables import (
    cast_columns,
    list_labels,
    list_rows,
    name_columns,
    name_field,
    read_columns,
    read_splits,
    type_columns,
    unhead,
)
from data.layouts.unused import ROWS, UNNAMED, UNREADABLE, is_form
from data.layouts.values import read_column
from utils.errors import UserError
from utils.io.names import to_nfc

# Other names of ours mean something else in a user's table, such as weight.
_MAPPED = ("label", TARGET, "tags", "caption", "split")
_DESCRIBES = {"label", "tags", "caption", TARGET}
_NUMBER = re.compile(r"\d+$")
_UPLOADED = re.compile(r".*/upload/(?:\d+/)?[0-9a-f]{6,}-|.*\?d=")  # what Label Studio puts before a name
_FLAGS = {-1, 0, 1}  # the values of columns that say yes or no
_Find = Callable[[str, str], str | None]  # the image of a name, and of the split that it is looked for


class _Listed(NamedTuple):
    """A table of texts, its column of names, and the image of each row, or None. split: the one that its name says."""

    file: Path
    split: str
    table: Table
    key: str
    paths: list[str | None]


def read_listed_images(folder: Folder, files: Sequence[str]) -> Described:
    """Return what tables of the user, one of each split, say of the images that they name; nothing without a table.

    A table that `data.table` does not name is read if neither folders of two classes nor sidecars describe the images.
    Images of a test folder that no row names are kept without a label. Raises UserError (`data.table`, `data.columns`):
    a table that is absent or names no image; several tables of a split.
    """
    chosen = _choose_files(folder, files)
    splits = {}
    for names in (*([file.stem] for file in chosen), [file.stem for file in chosen]):
        splits |= find_splits(names, folder.choice.splits)
    find = build_finder(folder.splits)
    found = [_match(file, splits.get(file.stem, "train"), find, folder) for file in chosen]
    tables = sorted(filter(None, found), key=lambda each: SPLITS.index(each.split))
    columns = {*tables[0].table.column_names} if tables else {}
    tables = [each for each in tables if each.split != TEST or columns <= {*each.table.column_names}]  # it has labels
    if len({each.split for each in tables}) < len(tables):
        lines = [f"{each.file.name} ({', '.join(each.table.column_names[:SHOWN])})" for each in tables]
        raise UserError(
            f"data.table: {len(tables)} tables name images: {'; '.join(lines)}; choose one, as in "
            f"data.table={tables[0].file.name}, or data.table=none to read none"
        )
    read = {each.file: each.file.name for each in tables}
    folder.unused.add_files(*(name for name in files if folder.root / name not in read and name != folder.choice.table))
    folder.unused.said += describe_splits(splits, splits.values(), "tables")
    sidecars = {}
    for each in tables:
        sidecars = _read_rows(each, folder) | sidecars
    return add_waiting(folder, sidecars, " or ".join(read.values())) if tables else {}


def add_waiting(folder: Folder, found: Described, what: str, within: Collection[str] = ()) -> Described:
    """Return what is found of images, and those of the test split and of folders `within`; the others are named."""
    left = folder.images.keys() - found
    waiting = {path for path in left if folder.splits[path] == TEST or dirname(path) in within}
    folder.unused.add(f"{UNNAMED} {what} names", *left - waiting)
    return found | dict.fromkeys(waiting, Sidecar())


def build_finder(splits: Mapping[str, str | None], *, is_whole: bool = False) -> _Find:
    """Return a function that finds the image of a name: with or without its ending, in any folder.

    A bare number finds the only image whose name ends with it: `7` is `img_007.png`.
    is_whole: a name has all folders of its image, perhaps below others.
    """

    images = {}
    for path in splits:
        stem = _split_name(path)[0]
        for key in {stem, *map(_shorten, _NUMBER.findall(stem))}:
            images.setdefault(key, []).append(path)

    @functools.cache
    def find(name: str, split: str) -> str | None:
        """Return the image that shares the most folders with the name, then its ending, the split, and its case."""
        parts = _split_name(name)
        ending = suffix_of(name)
        ranks = {}
        for path in images.get(parts[0]) or images.get(_shorten(parts[0]), ()):
            own = _split_name(path)
            shared = len(commonprefix([parts, own]))
            if shared == len(own) or not is_whole:
                ranks[path] = (shared, path.lower().endswith(ending), splits[path] == split, name in path)
        best = max(ranks.values(), default=None)
        found = [path for path, rank in ranks.items() if rank == best]
        return found[0] if len(found) == 1 else None

    return find


def _split_name(name: str) -> list[str]:
    """Return the name of a file without its ending, and its folders, the last first; all in one spelling."""
    name = _UPLOADED.sub("", name.strip())
    stem = stem_of(name) if is_image_name(name) else name
    return to_nfc(stem).casefold().replace("\\", "/").split("/")[::-1]


def _shorten(stem: str) -> str:
    """Return a number without the zeros that spreadsheets drop or add, such as `007` and `7.0`; others as they are."""
    return re.sub(r"^0*(\d+?)(\.0+)?$", r"\1", stem)


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


def _match(file: Path, split: str, find: _Find, folder: Folder) -> _Listed | None:
    """Return a table with the column that names most images; None if it names at most half of its rows or images.

    Raises UserError (`data.table`) if it is the stated one, and cannot be read or names none.
    """
    choice = folder.choice
    is_stated = choice.table != "auto"
    try:
        table = read_columns(file, "data.table", is_typed=False)
    except UserError as error:
        if is_stated:
            raise
        folder.unused.add(UNREADABLE, f"{file.name} ({error})")
        return None
    count, _, key, paths = _find_key(table, split, find, choice.columns)
    if name_field(key) == key and find(key, TEST):
        table = unhead(table)
        count, _, key, paths = _find_key(table, split, find, choice.columns)
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


def _find_key(table: Table, split: str, find: _Find, stated: Columns) -> tuple[int, bool, str, list[str | None]]:
    """Return the column that names most images: their count, whether its name is a usual one, its name, the images."""
    found = []
    for name in table.column_names:
        texts = ["" if value is None else str(value) for value in table[name].to_pylist()]
        paths = [find(text, split) for text in texts if stated.get("path") in (None, name)]
        found.append((len({*paths} - {None}), name_field(name) == "path", name, paths))
    return max(found, key=operator.itemgetter(0, 1))


def _read_rows(each: _Listed, folder: Folder) -> Described:
    """Return the rows that name an image, one for each; say what is read as what."""
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
    below = join(commonpath([*map(dirname, rows)]), "")
    count = sum(path.startswith(below) for path in splits)
    order = [*rows.values()]
    example = f"{values[order[0]]} for {next(iter(rows)).removeprefix(below)}"
    line = f"{name}: column {each.key} names {len(rows):,} of {count:,} files in {below or './'}, such as {example}"
    table, names = _choose_columns(type_columns(each.table.take(order).drop_columns([each.key])), folder)
    read = [f"{ours}: {theirs}" for theirs, ours in names.items() if ours in _MAPPED]
    unused.said += (f"{line}; {', '.join(read) or 'no label'}",)
    columns = cast_columns(each.file, table, names, unused, order)
    stated = read_splits(each.file, columns.pop("split"), "", folder.choice, unused)
    columns = {name: column for name, column in columns.items() if column.null_count < len(column)}
    settled = [split or splits[path] or each.split for split, path in zip(stated, rows)]
    return dict(zip(rows, list_rows({**columns, "split": pa.array(settled)})))


def _choose_columns(table: Table, folder: Folder) -> tuple[Table, dict[str, str]]:
    """Return the table, its flags as columns of tags, and our name of each column.

    Without label, tags and caption, the only one that may be a label is one.
    """
    stated = _ask(table, folder) | {ours: theirs for ours, theirs in folder.choice.columns.items() if ours != "path"}
    names = name_columns(table, stated)
    odd = [name for name, ours in names.items() if ours in TYPES and ours not in (*_MAPPED, *stated)]
    folder.unused.add("columns of tables with a name of ours (data.columns={weight: NAME} takes one)", *odd)
    table, names = _join_flags(table, {name: ours for name, ours in names.items() if name not in odd})
    possible = list_labels(table, names)
    if len(possible) == 1 and not _DESCRIBES & {*names.values()}:
        names |= {name: _field_of(table[name]) for name in possible}
    return table, names


def _ask(table: Table, folder: Folder) -> dict[str, str]:
    """Return the target, the column that the form of a competition's answer has, by our name.

    If the form has a column for each value of a column, this is the label, or has tags if a text has several values.
    """
    file = next(filter(is_form, folder.files[TABLES]), None)
    form = {*read_columns(folder.root / file).column_names[1:]} if file else ()
    for name in table.column_names if form else ():
        column = table[name]
        if {name} == form:
            return {_field_of(column): name}
        if column.type == pa.string() and form.issuperset(
            pc.list_flatten(read_column("tags", table, name, column)).to_pylist()
        ):
            return {"label" if form.issuperset(column.to_pylist()) else "tags": name}
    return {}


def _field_of(column: pa.ChunkedArray) -> str:
    """Return `label`, or TARGET for numbers of more values than stars and grades have."""
    return TARGET if re.match("u?int|double", str(column.type)) and len(column.unique()) > 20 else "label"


def _join_flags(table: Table, names: dict[str, str]) -> tuple[Table, dict[str, str]]:
    """Replace columns of yes and no by one of tags, or of the label if each image has one.

    They stay beside a column that is a label or may be one, and beside tags and captions. Beside 0, -1 is uncertain and
    becomes an unknown tag, as CheXpert has it; without any 0, it is no, as CelebA has it.
    """
    flags = [name for name, ours in names.items() if ours not in TYPES and _is_flag(table[name])]
    others = {theirs: ours for theirs, ours in names.items() if theirs not in flags}
    is_described = _DESCRIBES & {*others.values()} or list_labels(table, others)
    if len(flags) < 2 or is_described:
        return table, names
    rows = table.select(flags).to_pylist()
    tags, absent, unknown = ([[name for name in flags if row[name] == value] for row in rows] for value in (1, 0, -1))
    unknown = [each or None for each in unknown] if any(absent) else [None] * len(rows)
    counts = {len(each) for each, row in zip(tags, rows) if row[flags[0]] is not None}  # test images wait without
    what = f"the {len(flags)} columns of 0 and 1"
    uncertain = f"-1 in {what}"
    is_label = counts == {1} and not any(unknown)
    values = [next(iter(each), None) for each in tags] if is_label else tags
    table = table.drop_columns(flags).append_column(what, pa.array(values))
    table = table.append_column(uncertain, pa.array(unknown, TYPES["tags"]))
    return table, others | {what: "label" if is_label else "tags", uncertain: "unknown_tags"}


def _is_flag(column: pa.ChunkedArray) -> bool:
    is_nested = pa.types.is_nested(column.type)
    return not is_nested and _FLAGS.issuperset(column.drop_null().unique().to_pylist())
