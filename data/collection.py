"""A collection: a user's images, indexed once into an Arrow file that every process memory-maps and shares.

index = index_collection("photos", validation_fraction=0.1, cache=Path("outputs/cache"))
collection = open_collection("photos", index)
collection.row(0).caption, collection.rows("val"), collection.class_names("train")
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.manifest import find_manifest, read_manifest
from data.scan import check_root, scan_folder
from data.table import SCHEMA, SPLITS, assign_validation, count_values, hash_table
from utils.errors import UserError
from utils.io.files import write_atomically

_FINGERPRINT = b"fingerprint"
_NAMED = 5  # classes that a message names


class Row(NamedTuple):
    """One image of a collection; `path` is POSIX and relative to the root."""

    path: str
    label: str | None
    tags: tuple[str, ...]
    rating: str | None
    caption: str | None
    weight: float


class RowView:
    """A row whose columns are read on access, which costs a few microseconds each."""

    __slots__ = ("_index", "_table")

    def __init__(self, table: pa.Table, index: int) -> None:
        """Keep where the row is."""
        self._table, self._index = table, index

    def __getattr__(self, name: str) -> Any:
        """Return a column's value, as `Row` has it. Raises AttributeError where there is no such column."""
        if name not in Row._fields:
            raise AttributeError(f"a row has {', '.join(Row._fields)}, not {name}")
        value = self._table[name][self._index].as_py()
        return tuple(value) if name == "tags" else value


class Collection:
    """The rows of an index, sorted by path; `open_collection` makes one.

    Pickled by its two paths: a worker maps the file itself when it first reads. `fingerprint` is the hash of every
    column, which the index carries.
    """

    def __init__(self, root: Path, arrow: Path, fingerprint: str, length: int) -> None:
        """Keep the paths; the file is mapped at the first access."""
        self.root, self.arrow, self.fingerprint = root, arrow, fingerprint
        self._length = length
        self._table: pa.Table | None = None

    @property
    def table(self) -> pa.Table:
        """The whole table, memory-mapped: its pages are shared between processes and read when touched."""
        if self._table is None:
            self._table = _map_index(self.arrow)
        return self._table

    def __getstate__(self) -> dict[str, Any]:
        """Leave the mapped table out."""
        return {**self.__dict__, "_table": None}

    def __len__(self) -> int:
        """Return the number of rows, both splits together."""
        return self._length

    def row(self, i: int) -> Row:
        """Return row i, 0 <= i < N. Raises IndexError beyond."""
        view = self.view(i)
        return Row(*[getattr(view, name) for name in Row._fields])

    def view(self, i: int) -> RowView:
        """Return row i without reading it yet."""
        return RowView(self.table, i)

    def absolute_path(self, i: int) -> Path:
        """Return the file of row i."""
        return self.root / self.table["path"][i].as_py()

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

    def tag_counts(self, split: str) -> dict[str, int]:
        """Return how many images of a split carry each tag: the most frequent first, then by name."""
        return count_values(self._column("tags", split))

    def _column(self, name: str, split: str) -> pa.ChunkedArray:
        """Return a column's values in one split."""
        assert split in SPLITS, split
        return self.table[name].filter(pc.equal(self.table["split"], split))


def index_collection(root: str, *, validation_fraction: float, cache: Path) -> Path:
    """Read a collection, check it, and return its index: an uncompressed Arrow IPC file named by the content's hash.

    A manifest at the root takes precedence over the folder's layout. Where no row is in the validation split,
    `validation_fraction` of them are moved there by a hash of the path. The index is kept in `cache`, outside the
    collection, so that an index that came with a collection is never read.

    Raises UserError (`data.root`, `data.validation_fraction`) as `read_manifest` and `scan_folder` do.
    """
    folder = check_root(root)
    manifest = find_manifest(folder)
    table = scan_folder(folder) if manifest is None else read_manifest(folder, manifest)
    table = assign_validation(table, validation_fraction)
    fingerprint = hash_table(table)
    target = cache / f"{fingerprint}.arrow"
    if not target.is_file():
        table = table.replace_schema_metadata({_FINGERPRINT: fingerprint.encode()})
        write_atomically(target, lambda file: _write_index(file, table))
    return target


def open_collection(root: str, arrow: Path) -> Collection:
    """Open a collection by its root and the index that `index_collection` returned.

    Raises UserError (`data.root`) where the root is gone or the index is damaged.
    """
    folder = check_root(root)
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
            "folder whose sub-folders are the classes (or train/ and val/ with the classes in them), or give the "
            "manifest a label column"
        )
    unknown = sorted(set(val) - set(train))
    if unknown:
        raise UserError(
            f"data.root: {_name_classes(unknown)} of {root!r} in the validation split only; add training images of "
            "them, rename them as in training, or set a smaller data.validation_fraction if it chose them"
        )
    missing = sorted(set(train) - set(val))
    if missing and not allow_missing:
        raise UserError(
            f"data.root: {_name_classes(missing)} of {root!r} without a validation image; add images of them, or set "
            "task.allow_missing_classes=true"
        )
    return train


def _name_classes(names: list[str]) -> str:
    """Return the number of classes and the first few names."""
    shown = ", ".join(map(repr, names[:_NAMED])) + (", ..." if len(names) > _NAMED else "")
    return f"{len(names)} {'class' if len(names) == 1 else 'classes'} ({shown})"


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
    if not table.schema.equals(SCHEMA):
        raise UserError(f"data.root: the index {str(arrow)!r} is of another version; delete it: it will be made again")
    return table
