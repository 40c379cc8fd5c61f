"""A collection: a user's images, indexed once into an Arrow file that every process memory-maps and shares.

index = index_collection("photos", validation_fraction=0.1, cache=Path("outputs/cache"))
collection = open_collection("photos", index)
collection.row(0).caption, collection.rows("val"), collection.class_names("train")
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.foreign import read_foreign
from data.manifest import find_labels, find_manifest, read_manifest
from data.remote import fetch_manifest, is_remote
from data.scan import check_root
from data.table import (
    MEASURED,
    SCHEMA,
    SPLIT_NAMES,
    SPLITS,
    assign_validation,
    count_values,
    hash_table,
    is_packed,
    name_classes,
    show_some,
)
from data.tags.posts import read_folder
from utils.errors import UserError
from utils.io.files import write_atomically, write_text
from utils.io.memo import files_key
from utils.record.logging import get_logger

log = get_logger(__name__)

_FINGERPRINT = b"fingerprint"
_INDEX = 1  # of what an index has: another number makes all of them again


class Row(NamedTuple):
    """One image of a collection; `path` is POSIX and relative to the root."""

    path: str
    label: str | None
    tags: tuple[str, ...]
    rating: str | None
    caption: str | None
    weight: float


class RowView:
    """A row whose columns are read on access, which costs a microsecond or two each."""

    __slots__ = ("_columns", "_index")

    def __init__(self, columns: Mapping[str, pa.ChunkedArray], index: int) -> None:
        """Keep where the row is."""
        self._columns, self._index = columns, index

    def __getattr__(self, name: str) -> Any:
        """Return a column's value, as `Row` has it. Raises AttributeError where there is no such column."""
        try:
            value = self._columns[name][self._index].as_py()
        except KeyError:
            raise AttributeError(f"a row has {', '.join(self._columns)}, not {name}") from None
        return tuple(value) if name == "tags" else value


class Collection:
    """The rows of an index, sorted by path; `open_collection` makes one.

    Pickled by its two paths: a worker maps the file itself when it first reads. `fingerprint` is the hash of every
    column, which the index carries.
    """

    def __init__(self, root: Path | str, arrow: Path, fingerprint: str, length: int) -> None:
        """Keep the paths, or the URL of the root; the file is mapped at the first access."""
        self.root, self.arrow, self.fingerprint = root, arrow, fingerprint
        self._length = length
        self._table: pa.Table | None = None
        self._columns: dict[str, pa.ChunkedArray] | None = None

    @property
    def table(self) -> pa.Table:
        """The whole table, memory-mapped: its pages are shared between processes and read when touched."""
        if self._table is None:
            self._table = _map_index(self.arrow)
        return self._table

    def __getstate__(self) -> dict[str, Any]:
        """Leave the mapped table out."""
        return {**self.__dict__, "_table": None, "_columns": None}

    def __len__(self) -> int:
        """Return the number of rows, both splits together."""
        return self._length

    def row(self, i: int) -> Row:
        """Return row i, 0 <= i < N. Raises IndexError beyond."""
        view = self.view(i)
        return Row(*[getattr(view, name) for name in Row._fields])

    def view(self, i: int) -> RowView:
        """Return row i without reading it yet."""
        if self._columns is None:  # a table makes a column anew at each access
            self._columns = dict(zip(self.table.column_names, self.table.columns))
        return RowView(self._columns, i)

    def absolute_path(self, i: int) -> Path:
        """Return the file of row i."""
        return Path(self.root) / self.view(i).path

    def rows(self, split: str) -> np.ndarray:
        """Return the row indices of a split (train or val), int64 [n], ascending."""
        assert split in SPLITS, split
        return np.flatnonzero(pc.equal(self.table["split"], split).to_numpy()).astype(np.int64)

    def class_names(self, split: str) -> list[str]:
        """Return the distinct labels of a split, sorted."""
        return sorted(count_values(self._column("label", split)))

    def class_ids(self, names: Sequence[str]) -> np.ndarray:
        """Return every row's position in `names`, int64 [N]; -1 where it has no label or one not among them."""
        ids = pc.index_in(self.table["label"], value_set=pa.array(names, pa.string()))
        return ids.fill_null(-1).to_numpy().astype(np.int64)

    def weights(self) -> np.ndarray:
        """Return every row's weight, float32 [N]; 0 is not trained on."""
        return self.table["weight"].to_numpy()

    def column(self, name: str) -> np.ndarray:
        """Return every row's value in a further column of the manifest, [N] or, of vectors, [N, C].

        Absent numbers are NaN. Raises UserError (`data.root`) where the collection has no such column.
        """
        if name not in self.table.column_names:
            made = " (prepare.py job=manifest fills it)" if name in MEASURED else ""
            raise UserError(f"data.root: {str(self.root)!r} has no column {name!r}; give its manifest one{made}")
        column = self.table[name].combine_chunks()
        if pa.types.is_fixed_size_list(column.type):
            return column.flatten().to_numpy().reshape(len(column), -1)
        return column.to_numpy(zero_copy_only=False)

    def stated_sizes(self) -> np.ndarray | None:
        """Return height and width of every row as the index has them, int64 [N, 2], 0 where absent; None without."""
        if not {"width", "height"} <= set(self.table.column_names):
            return None
        sizes = np.stack([self.column(name) for name in ("height", "width")], axis=1)
        return np.nan_to_num(sizes).astype(np.int64)

    def tag_counts(self, split: str) -> dict[str, int]:
        """Return how many images of a split carry each tag: the most frequent first, then by name."""
        return count_values(self._column("tags", split))

    def _column(self, name: str, split: str) -> pa.ChunkedArray:
        """Return a column's values in one split."""
        assert split in SPLITS, split
        return self.table[name].filter(pc.equal(self.table["split"], split))


def index_collection(root: str, *, validation_fraction: float, cache: Path) -> Path:
    """Read a collection, check it, and return its index: an uncompressed Arrow IPC file named by the content's hash.

    A manifest at the root takes precedence over the folder's layout; a CSV file with labels does where the layout has
    none. A folder without images may have other people's shards (data/foreign.py). Where no row is in the
    validation split, `validation_fraction` of them are moved there as `assign_validation` says. The index is kept in
    `cache`, outside the collection, so that an index that came with a collection is never read. That of an unchanged
    manifest is taken as it is; a file that is gone since is reported when it is read.

    Raises UserError (`data.root`, `data.validation_fraction`) as `read_manifest` and `read_folder` do.
    """
    if is_remote(root):
        folder, manifest = None, fetch_manifest(root, cache)
    else:
        folder = check_root(root)
        manifest = find_manifest(folder)
    made = None if manifest is None else cache / f"{files_key([manifest], _INDEX, validation_fraction)}.txt"
    if made is not None and made.is_file() and (target := cache / made.read_text(encoding="utf-8")).is_file():
        log.debug("data.root: %s is unchanged, and its index is there", manifest)
        return target
    table = read_foreign(folder, cache) if manifest is None else read_manifest(folder, manifest)
    if table is None:
        table = read_folder(folder)
    if manifest is None and not is_packed(table.schema) and (manifest := find_labels(folder, table)) is not None:
        images, table = table.num_rows, read_manifest(folder, manifest)
        log.info("data.root: %s is read as the manifest: %d of %d images", manifest.name, table.num_rows, images)
    table = assign_validation(table, validation_fraction, _describe_absent_split(folder, manifest))
    fingerprint = hash_table(table)
    whole = hash_table(table, measured=True)
    target = cache / (f"{fingerprint}.arrow" if whole == fingerprint else f"{fingerprint}-{whole}.arrow")
    if not target.is_file():
        table = table.replace_schema_metadata({_FINGERPRINT: fingerprint.encode()})
        write_atomically(target, lambda file: _write_index(file, table))
    if made is not None:
        write_text(made, target.name)
    return target


def open_collection(root: str, arrow: Path) -> Collection:
    """Open a collection by its root and the index that `index_collection` returned.

    Raises UserError (`data.root`) where the root is gone or the index is damaged.
    """
    folder = root if is_remote(root) else check_root(root)
    table = _map_index(arrow)
    fingerprint = (table.schema.metadata or {}).get(_FINGERPRINT, b"").decode()
    return Collection(folder, Path(arrow), fingerprint, table.num_rows)


def check_classes(collection: Collection, allow_missing: bool) -> list[str]:
    """Return the class names of the training split, sorted, after checking them against the validation split.

    Raises UserError (`data.root`): fewer than two classes; a validation class that training lacks; a training class
    without a validation image, unless `allow_missing`.
    """
    root = str(collection.root)
    train, val = collection.class_names("train"), collection.class_names("val")
    if len(train) < 2:
        found = f"the class {train[0]!r} alone" if train else "no class"
        raise UserError(
            f"data.root: {root!r} has {found} in its training split; classification needs two. Set data.root to the "
            "folder whose sub-folders are the classes (or train/ and val/ with the classes in them), or name the "
            f"images in a CSV file there, with the columns path and label"
        )
    unknown = sorted(set(val) - set(train))
    if unknown:
        them = "it" if len(unknown) == 1 else "them"
        raise UserError(
            f"data.root: {name_classes(unknown)} of {root!r} in the validation split only (in training: "
            f"{show_some(train)}); add training images of {them}, rename {them} as in training, or remove {them} from "
            "the validation split"
        )
    missing = sorted(set(train) - set(val))
    if missing and not allow_missing:
        raise UserError(
            f"data.root: {name_classes(missing)} of {root!r} without a validation image; {_advise_on(missing, val)}"
        )
    return train


def _advise_on(missing: list[str], val: list[str]) -> str:
    """Say what to do about training classes that lack a validation image. val: the validation classes."""
    if not val:
        return (
            "add a val/ folder with images of every class, or, with two images or more of each class, set "
            "data.validation_fraction above 0"
        )
    them = "it" if len(missing) == 1 else "them"
    return (
        f"add images of {them} (each class needs one for training and one for validation), remove {them}, or set "
        "task.allow_missing_classes=true"
    )


def _describe_absent_split(root: Path | None, manifest: Path | None) -> str:
    """Say where a validation split was looked for, for a collection that has none."""
    if manifest is not None:
        return f"no row of {manifest.name} is in split val"
    empty = [name for name, split in SPLIT_NAMES.items() if split != "train" and (root / name).is_dir()]
    return f"no image in {empty[0]}/" if empty else "no val/ folder"


def _write_index(file: Path, table: pa.Table) -> None:
    """Write a table as an Arrow IPC file, uncompressed, so that it can be mapped."""
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _map_index(arrow: Path) -> pa.Table:
    """Map an index. Raises UserError where it is absent, damaged or of another schema."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(arrow))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"data.root: the index {str(arrow)!r} cannot be read ({error}); delete it, and it will be made again"
        ) from error
    if not pa.schema(list(table.schema)[: len(SCHEMA)]).equals(SCHEMA):
        raise UserError(f"data.root: the index {str(arrow)!r} is of another version; delete it: it will be made again")
    return table
