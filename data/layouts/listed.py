"""Tables of users: a spreadsheet, or the train.csv of a competition, whose rows name files of the collection.

    train.csv: id,breed            0021f9ceb3,boston_bull       train/0021f9ceb3.jpg
    labels.csv: filename;klasse    Fotos\\IMG_1.JPG;Käfer       2024/IMG_1.jpg

The column that names most files is the one of paths. A name is found without its ending, and in any folder. Rows that
match no file, and files that no row names, are counted and listed in a file; they stop nothing.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.layouts.manifest import cast_columns, read_splits
from data.layouts.names import CORRECTIONS, MANIFESTS, UNDO, is_image_name, is_passed_over, is_table
from data.layouts.places import read_split
from data.layouts.table import TAG_LISTS, TEST, TYPES, build_table, show_some
from data.layouts.tables import Columns, TableChoice, is_text, list_labels, name_columns, name_field, read_columns
from data.layouts.unused import ROWS, UNNAMED, Unused, is_form
from data.layouts.walk import list_folder
from utils.errors import UserError
from utils.io.names import to_nfc

_ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")  # of tables that are looked for
_MAPPED = ("label", "tags", "caption", "split")  # other names of ours mean something else in a user's table: weight
_FLAGS = ({0, 1}, {-1, 1}, {0}, {1})  # the values of columns that say yes or no


class Listed(NamedTuple):
    """A table, its column of names, and the file of each row, or None. split: that its own name says."""

    file: Path
    table: pa.Table
    key: str
    paths: list[str | None]
    split: str | None


class Finder:
    """Find images by the names that tables give them."""

    def __init__(self, places: Mapping[str, str | None]) -> None:
        """Keep the images. places: their splits by path."""
        self.places = places
        self._images: dict[str, list[str]] = {}
        for path in places:
            name = _fold(os.path.basename(path))
            for key in {name, os.path.splitext(name)[0]}:
                self._images.setdefault(key, []).append(path)

    def find(self, name: str) -> list[str]:
        """Return the images of a name: with or without ending, those that share the most folders with it."""
        parts = name.strip().replace("\\", "/").strip("/").split("/")
        last = _fold(parts[-1])
        found = self._images.get(last, [])
        if not found and is_image_name(last):
            found = self._images.get(os.path.splitext(last)[0], [])
        if len(found) < 2:
            return found
        ranks = [_compare(parts, path.split("/")) for path in found]
        return [path for path, rank in zip(found, ranks) if rank == max(ranks)]

    def choose(self, found: Sequence[Sequence[str]], split: str | None) -> list[str | None]:
        """Return one image of each list, in the split and the folder that most have; None if they are in one folder."""
        counts = Counter(os.path.dirname(path) for paths in found for path in paths)

        def rank(path: str) -> tuple[bool, int, bool]:
            own = self.places[path]
            return own == split, counts[os.path.dirname(path)], own == "train"

        chosen: list[str | None] = []
        for paths in found:
            best = max(map(rank, paths), default=None)
            of_best = [path for path in paths if rank(path) == best]
            chosen.append(of_best[0] if len(of_best) == 1 else None)
        return chosen


def _fold(name: str) -> str:
    return to_nfc(name).casefold()


def _compare(parts: Sequence[str], others: Sequence[str]) -> tuple[int, bool]:
    """Return how many folders two paths share from their ends, and whether their last names are equal."""
    return len(os.path.commonprefix([parts[-2::-1], others[-2::-1]])), parts[-1] == others[-1]


def read_listed_images(
    root: Path, images: Mapping[str, int], splits: Mapping[str, str | None], choice: TableChoice, unused: Unused
) -> pa.Table | None:
    """Return the images that a table of the user names, with its columns; None without such a table.

    images: their sizes in bytes by path. splits: those of their folders. Images of a test folder that no row names
    are kept without a label. Raises UserError (`data.table`, `data.columns`): a table that is absent or names no file;
    several tables.
    """
    finder = Finder(splits)
    tables = find_tables(root, finder, choice, unused)
    if not choice.table:
        tables = _choose_tables(tables)
    if not tables:
        return None
    parts = [_read_rows(each, finder, choice.columns, unused) for each in tables]
    common = set.intersection(*({*part.schema} for part in parts))  # test.csv has no label
    parts = [
        part.select([field.name for field in part.schema if field.name in TYPES or field in common]) for part in parts
    ]
    named = {path for part in parts for path in part["path"].to_pylist()}
    waiting = [path for path, split in splits.items() if split == TEST and path not in named]
    left = (path for path, split in splits.items() if split != TEST and path not in named)
    unused.add(f"{UNNAMED} {' and '.join(each.file.name for each in tables)} names", *left)
    unused.remove(*(each.file.name for each in tables if each.file.parent == root))
    parts.append(
        pa.table({"path": pa.array(waiting, pa.string()), "split": pa.array([TEST] * len(waiting), pa.string())})
    )
    table = pa.concat_tables(parts, promote_options="default")
    sizes = [images[path] for path in table["path"].to_pylist()]
    return build_table({**dict(zip(table.column_names, table.columns)), "size": sizes})


def find_tables(root: Path, finder: Finder, choice: TableChoice, unused: Unused) -> list[Listed]:
    """Return the tables that name images. Raises UserError (`data.table`) if the stated one names none."""
    files = _find_files(root, choice)
    tables = [found for file in files if (found := _match(file, finder, choice, unused)) is not None]
    if choice.table and not tables:
        raise UserError(
            f"data.table: no column of {str(files[0])!r} names one of the {len(finder.places):,} images, such as "
            f"{min(finder.places)!r}; name the right column: data.columns={{path: NAME}}"
        )
    return tables


def _find_files(root: Path, choice: TableChoice) -> list[Path]:
    """Return the stated table, or those at the root that may be one. Raises UserError (`data.table`)."""
    if choice.table:
        places = (root / choice.table, Path(choice.table).expanduser())
        if (file := next(filter(Path.is_file, places), None)) is None:
            raise UserError(f"data.table: {choice.table!r} is no file in {str(root)!r} or in {str(Path.cwd())!r}")
        return [file]
    if choice.table is False:
        return []
    names = sorted(entry.name for entry in list_folder(root) if entry.name.lower().endswith(_ENDINGS))
    others = (*MANIFESTS, CORRECTIONS, UNDO)
    return [
        root / name for name in names if not (name in others or is_table(name) or is_passed_over(name) or is_form(name))
    ]


def _match(file: Path, finder: Finder, choice: TableChoice, unused: Unused) -> Listed | None:
    """Return a table with the column that names most images; None if it names fewer than half of its rows or images."""
    if file.suffix.lower() == ".parquet" and any(map(_holds_bytes, pq.read_schema(file).types)):
        return None
    try:
        table = read_columns(file, "data.table", is_ours=False)
    except UserError as error:
        if choice.table:
            raise
        unused.add("tables that cannot be read", f"{file.name} ({error})")
        return None
    names = [name for name in dict.fromkeys(table.column_names) if name]
    if not choice.table and {"path", "error"} <= {*names}:  # of predict.py
        return None
    table = table.select([table.column_names.index(name) for name in names])
    if (stated := choice.columns.get("path")) is not None:
        names = [*name_columns(table, {"path": stated})][:1]
    found: dict[str, dict[str, list[str]]] = {}
    for name in names:
        if is_text(table[name].type) or pa.types.is_integer(table[name].type):
            values = pc.unique(table[name].drop_null()).cast(pa.string()).to_pylist()
            found[name] = {value: paths for value in values if (paths := finder.find(value))}
    if not found:
        return None
    key = max(found, key=lambda name: (len(found[name]), name_field(name) == "path"))
    values = table[key].cast(pa.string()).to_pylist()
    if not found[key] or (not choice.table and 2 * len(found[key]) < min(len({*values}), len(finder.places))):
        return None
    split = read_split(file.stem)
    paths = finder.choose([found[key].get(value, ()) for value in values], split)
    return Listed(file, table, key, paths, split)


def _holds_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _choose_tables(tables: list[Listed]) -> list[Listed]:
    """Return the one table that names images, or one for each split. Raises UserError (`data.table`) for others."""
    of_splits = [each for each in tables if each.split is not None]
    if len(tables) == 1 or (len(of_splits) == len(tables) == len({each.split for each in tables})):
        return tables
    if not tables:
        return []
    lines = [f"{each.file.name} ({', '.join(each.table.column_names[:6])})" for each in tables]
    raise UserError(
        f"data.table: {len(tables)} tables name images: {'; '.join(lines)}; choose one, as in "
        f"data.table={tables[0].file.name}, or data.table=false to read none"
    )


def _read_rows(each: Listed, finder: Finder, stated: Columns, unused: Unused) -> pa.Table:
    """Return the rows that name an image, one for each, with our columns; say what is read as what."""
    name = each.file.name
    values = each.table[each.key].cast(pa.string()).to_pylist()
    first: dict[str, int] = {}
    again = []
    for row, path in enumerate(each.paths):
        if path is None:
            unused.add(f"{ROWS} {name} without an image", f"{values[row]}")
        elif first.setdefault(path, row) != row:
            again.append(row)
    table = each.table.take([*first.values()])
    names, flags = _choose_columns(each, table, stated, unused)
    said = [f"{ours}: {theirs}" for theirs, ours in names.items() if ours in _MAPPED]
    columns = dict(
        cast_columns(each.file, _split_tags(table, names), names, Unused() if each.split == TEST else unused)
    )
    if flags:
        field, columns_of = _read_flags(table, flags)
        columns[field] = columns_of
        said.append(f"{field}: the columns {show_some(flags)}")
    if "tags" in names.values() and again:
        _add_tags(columns, first, each, names)
    elif again:
        label = next((theirs for theirs, ours in names.items() if ours == "label"), each.key)
        labels = each.table[label].to_pylist()
        for row in again:
            differs = labels[row] != labels[first[each.paths[row]]]
            other = f", with another label; data.columns={{tags: {label}}} reads all as tags" if differs else ""
            unused.add(f"{ROWS} {name} that name an image again{other}", f"{values[row]}")
    columns["path"] = pa.array(first)
    own = read_splits(each.file, columns["split"], None)
    columns["split"] = pa.array(
        [mine or finder.places[path] or each.split or "train" for mine, path in zip(own.to_pylist(), first)],
        pa.string(),
    )
    labels = pc.count_distinct(columns["label"]).as_py()
    said += [f"{labels:,} classes"] if labels else []
    unused.said.append(f"{_describe_files(each, first, values, finder)}; {', '.join(said) or 'no label'}")
    return pa.table({name: column for name, column in columns.items() if column.null_count < len(first)})


def _describe_files(each: Listed, first: Mapping[str, int], values: Sequence[str], finder: Finder) -> str:
    """Return which column names which files: `train.csv: column id names 20 of 20 files in train/, with .jpg`."""
    folder = os.path.commonpath([os.path.dirname(path) for path in first])
    count = sum(path.startswith(os.path.join(folder, "")) for path in finder.places) if folder else len(finder.places)
    endings = Counter(os.path.splitext(path)[1] for path, row in first.items() if not is_image_name(values[row]))
    ending = f", with {show_some([*endings])}" if endings else ""
    where = f" in {folder}/" if folder else ""
    return f"{each.file.name}: column {each.key} names {len(first):,} of {count:,} files{where}{ending}"


def _choose_columns(
    each: Listed, table: pa.Table, stated: Columns, unused: Unused
) -> tuple[dict[str, str], Sequence[str]]:
    """Return our name of each column, and the columns of yes and no that are labels or tags together.

    By name; without label, tags and caption the flags, or the one column that may be a label, texts first.
    """
    single = {ours: theirs for ours, theirs in stated.items() if len(theirs) == 1 and ours != "path"}
    names = name_columns(table.drop_columns([each.key]), single)
    odd = [name for name, ours in names.items() if ours in TYPES and ours not in (*_MAPPED, *stated)]
    unused.add("columns of tables with a name of ours (data.columns={weight: NAME} takes one)", *odd)
    names = {name: ours for name, ours in names.items() if name not in odd}
    others = [name for name, ours in names.items() if ours not in TYPES]
    flags = next((theirs for theirs in stated.values() if len(theirs) > 1), [])
    if not flags and not {"label", "tags", "caption"} & {*names.values()} and each.split != TEST:
        flags = [name for name in others if _are_flags(table[name])]
        possible = list_labels(table, others)
        texts = [name for name in possible if is_text(table[name].type)]
        only = texts or [*possible]
        if len(flags) < 2 and len(only) == 1:
            names[only[0]] = "label"
    flags = flags if len(flags) > 1 else []
    return {name: ours for name, ours in names.items() if name not in flags}, flags


def _are_flags(column: pa.ChunkedArray) -> bool:
    is_number = (
        pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type)
    )
    return is_number and {*pc.unique(column.drop_null()).to_pylist()} in _FLAGS


def _read_flags(table: pa.Table, flags: Sequence[str]) -> tuple[str, pa.Array]:
    """Return the label of each row, if each has one flag, else its tags; and which of both it is."""
    is_set = np.stack([table[name].cast(pa.float64()).fill_null(0).to_numpy() > 0 for name in flags], axis=1)
    if (is_set.sum(axis=1) == 1).all():
        return "label", pa.array([flags[number] for number in is_set.argmax(axis=1)], pa.string())
    tags = [[flags[number] for number in np.flatnonzero(row)] for row in is_set]
    return "tags", pa.array(tags, TYPES["tags"])


def _split_tags(table: pa.Table, names: Mapping[str, str]) -> pa.Table:
    """Return a table whose texts of several tags are lists: split at commas, semicolons, bars, or recurring words."""
    for name in (name for name, ours in names.items() if ours in TAG_LISTS):
        lists = table[name].to_pylist()
        if any(isinstance(value, list) and len(value) > 1 for value in lists):
            continue
        texts = [value[0] if isinstance(value, list) and value else value for value in lists]
        texts = [str(text or "") for text in texts]
        separator = next((mark for mark in ",;|" if any(mark in text for text in texts)), None)
        if separator is None and len({word for text in texts for word in text.split()}) > len({*texts}):
            separator = ","  # names of several words
        split = [[tag.strip() for tag in text.split(separator) if tag.strip()] for text in texts]
        table = table.set_column(table.column_names.index(name), name, pa.array(split, TYPES["tags"]))
    return table


def _add_tags(columns: dict[str, pa.Array], first: Mapping[str, int], each: Listed, names: Mapping[str, str]) -> None:
    """Join the tags of all rows of an image."""
    tags: dict[str, dict[str, None]] = {path: {} for path in first}
    column = next(theirs for theirs, ours in names.items() if ours == "tags")
    every = _split_tags(each.table, names)[column].to_pylist()
    for path, more in zip(each.paths, every):
        if path is not None:
            tags[path] |= dict.fromkeys(more or ())
    columns["tags"] = pa.array([[*each] for each in tags.values()], TYPES["tags"])
