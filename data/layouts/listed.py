"""Tables of users: a spreadsheet, or the train.csv of a competition, whose rows name files of the collection.

    train.csv: id,breed            0021f9ceb3,boston_bull       train/0021f9ceb3.jpg
    labels.csv: filename;klasse    Fotos\\IMG_1.JPG;Käfer       2024/IMG_1.jpg

The column that names most images is the one of paths. A name is found without its ending, and in any folder. Rows
without an image, and images without a row, are counted and listed in a file; they stop nothing.
"""

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from data.layouts.manifest import cast_columns, read_splits
from data.layouts.names import is_image_name, is_passed_over, is_table
from data.layouts.places import read_split
from data.layouts.table import SHOWN, TEST, TYPES, build_table
from data.layouts.tables import TableChoice, is_text, list_labels, name_columns, name_field, read_columns
from data.layouts.unused import ROWS, UNNAMED, Unused, is_form
from utils.errors import UserError
from utils.io.names import to_nfc

_ENDINGS = (".csv", ".tsv")  # of tables that are looked for
_MAPPED = ("label", "tags", "caption", "split")  # other names of ours mean something else in a user's table: weight
_FLAGS = {-1, 0, 1}  # the values of columns that say yes or no
_WAITING = pa.schema([("path", pa.string()), ("split", pa.string())])
_Splits = Mapping[str, str | None]  # of images by path


class _Listed(NamedTuple):
    """A table, its column of names, and the image of each row, or None."""

    file: Path
    table: pa.Table
    key: str
    paths: list[str | None]


def read_listed_images(
    root: Path, images: Mapping[str, int], splits: _Splits, choice: TableChoice, unused: Unused
) -> pa.Table | None:
    """Return the images that a table of the user names, with its columns; None without such a table.

    images: their sizes in bytes by path. splits: those of their folders. Images of a test folder that no row names
    are kept without a label. Raises UserError (`data.table`, `data.columns`): a table that is absent or names no image;
    several tables.
    """
    files = _find_files(root, choice)
    find = build_finder(splits if files else {})
    tables = [_match(file, find, splits, choice, unused) for file in files]
    tables = [each for each in tables if each is not None]
    tables = [each for each in tables if read_split(each.file.stem) != TEST] or tables  # these have no label
    if len(tables) > 1:
        lines = [f"{each.file.name} ({', '.join(each.table.column_names[:SHOWN])})" for each in tables]
        raise UserError(
            f"data.table: {len(tables)} tables name images: {'; '.join(lines)}; choose one, as in "
            f"data.table={tables[0].file.name}, or data.table=none to read none"
        )
    if not tables:
        return None
    name = tables[0].file.name
    rows = _read_rows(tables[0], splits, choice, unused)
    left = splits.keys() - rows["path"].to_pylist()
    waiting = [path for path in left if splits[path] == TEST]
    unused.remove(name)
    unused.add(f"{UNNAMED} {name} names", *left.difference(waiting))
    others = pa.Table.from_pylist([{"path": path, "split": TEST} for path in waiting], _WAITING)
    table = pa.concat_tables([rows, others], promote_options="default")
    sizes = [images[path] for path in table["path"].to_pylist()]
    return build_table(table, size=sizes)


def build_finder(splits: _Splits) -> Callable[[str, str], str | None]:
    """Return a function that finds the image of a name: with or without its ending, in any folder."""
    images: dict[str, list[str]] = {}
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


def _find_files(root: Path, choice: TableChoice) -> list[Path]:
    """Return the stated table, or those at the root that may be one. Raises UserError (`data.table`)."""
    if choice.table == "auto":
        files = (file for file in sorted(root.iterdir()) if file.suffix.lower() in _ENDINGS)
        return [file for file in files if not any(test(file.name) for test in (is_table, is_passed_over, is_form))]
    if choice.table == "none":
        return []
    places = (root / choice.table, Path(choice.table).expanduser())
    if (file := next(filter(Path.is_file, places), None)) is None:
        raise UserError(f"data.table: {choice.table!r} is no file in {str(root)!r} or in {str(Path.cwd())!r}")
    return [file]


def _match(
    file: Path, find: Callable[[str, str], str | None], splits: _Splits, choice: TableChoice, unused: Unused
) -> _Listed | None:
    """Return a table with the column that names most images; None if it names at most half of its rows or images.

    Raises UserError (`data.table`) if it is the stated one, and cannot be read or names none.
    """
    try:
        table = read_columns(file, "data.table")
    except UserError as error:
        if choice.table != "auto":
            raise
        unused.add("tables that cannot be read", f"{file.name} ({error})")
        return None
    split = read_split(file.stem) or "train"
    names = [name for name in dict.fromkeys(table.column_names) if name]
    table = table.select([table.column_names.index(name) for name in names])
    found = {}
    for name in names:
        if choice.columns.get("path") in (None, name):
            found[name] = [find(str(value), split) for value in table[name].to_pylist()]
    counts = {name: len({*paths} - {None}) for name, paths in found.items()}
    key = max(counts, key=lambda name: (counts[name], name_field(name) == "path"), default="")
    count = counts.get(key, 0)
    if choice.table == "auto":
        is_other = 2 * count <= min(len(table), len(splits)) or {"path", "error"} <= {*names}  # of predict.py
        return None if is_other else _Listed(file, table, key, found[key])
    if not count:
        raise UserError(
            f"data.table: no column of {str(file)!r} names one of the {len(splits):,} images, such as "
            f"{min(splits)!r}; it has {', '.join(names)}; name the right one: data.columns={{path: NAME}}"
        )
    return _Listed(file, table, key, found[key])


def _read_rows(each: _Listed, splits: _Splits, choice: TableChoice, unused: Unused) -> pa.Table:
    """Return the rows that name an image, one for each, with our columns; say what is read as what."""
    name = each.file.name
    values = [*map(str, each.table[each.key].to_pylist())]
    first: dict[str, int] = {}
    for row, path in enumerate(each.paths):
        if path is None:
            unused.add(f"{ROWS} {name} without an image", values[row])
        elif first.setdefault(path, row) != row:
            unused.add(f"{ROWS} {name} that name an image again", values[row])
    table = each.table.take([*first.values()])
    names, flags = _choose_columns(table.drop_columns([each.key]), choice, unused)
    said = [f"{ours}: {theirs}" for theirs, ours in names.items() if ours in _MAPPED]
    columns = dict(cast_columns(each.file, table, names, unused))
    if flags:
        field, columns[field] = _read_flags(table.select(flags))
        said.append(f"{field}: the {len(flags)} columns of 0 and 1")
    columns["path"] = pa.array(first)
    own = read_splits(each.file, columns["split"], "")
    by_name = read_split(each.file.stem) or "train"
    columns["split"] = pa.array([mine or splits[path] or by_name for mine, path in zip(own, first)])
    if classes := pc.count_distinct(columns["label"]).as_py():
        said.append(f"{classes:,} classes")
    folder = os.path.join(os.path.commonpath([os.path.dirname(path) for path in first]), "")
    count = sum(path.startswith(folder) for path in splits)
    endings = sorted({os.path.splitext(path)[1] for path, row in first.items() if not is_image_name(values[row])})
    where = [f"column {each.key} names {len(first):,} of {count:,} files{f' in {folder}' if folder else ''}"]
    where += [f"with {', '.join(endings)}"] if endings else []
    unused.said.append(f"{name}: {', '.join(where)}; {', '.join(said) or 'no label'}")
    return pa.table(columns)


def _choose_columns(table: pa.Table, choice: TableChoice, unused: Unused) -> tuple[dict[str, str], list[str]]:
    """Return our name of each column, and the columns of yes and no that are labels or tags together.

    By name; without label, tags and caption the flags, or the one column that may be a label, texts first.
    """
    stated = {ours: theirs for ours, theirs in choice.columns.items() if ours != "path"}
    names = name_columns(table, stated)
    odd = [name for name, ours in names.items() if ours in TYPES and ours not in (*_MAPPED, *stated)]
    unused.add("columns of tables with a name of ours (data.columns={weight: NAME} takes one)", *odd)
    others = [name for name, ours in names.items() if ours not in TYPES]
    flags: list[str] = []
    if not {"label", "tags", "caption"} & {*names.values()}:
        flags = [
            name
            for name in others
            if not pa.types.is_nested(table[name].type) and _FLAGS.issuperset(table[name].drop_null().to_pylist())
        ]
        possible = [*list_labels(table, others)]
        texts = [name for name in possible if is_text(table[name].type)] or possible
        if len(flags) < 2:
            flags = []
            names |= dict.fromkeys(texts, "label") if len(texts) == 1 else {}
    return {name: ours for name, ours in names.items() if name not in (*odd, *flags)}, flags


def _read_flags(flags: pa.Table) -> tuple[str, pa.Array]:
    """Return the label of each row, if each has one flag, else its tags; and which of both it is."""
    tags = [[name for name, value in row.items() if value and value > 0] for row in flags.to_pylist()]
    if all(len(each) == 1 for each in tags):
        return "label", pa.array([each[0] for each in tags])
    return "tags", pa.array(tags, TYPES["tags"])
