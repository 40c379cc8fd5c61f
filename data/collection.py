"""A collection: a user's images, indexed once into an Arrow file that every process memory-maps and shares.

index = index_collection("photos", validation_fraction=0.1, cache=Path("outputs/cache"))
collection = open_collection("photos", index)
collection.row(0).caption, collection.rows("val"), collection.class_names("train")
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.recognise import recognise
from data.remote import is_remote
from data.scan import check_root
from data.split import assign_validation
from data.table import MEASURED, PLACES, SCHEMA, SPLITS, count_values, hash_table, show_some
from utils.errors import UserError
from utils.io.files import write_atomically
from utils.io.memo import files_key
from utils.record.logging import get_logger

log = get_logger(__name__)

_FINGERPRINT = b"fingerprint"
_INDEX = 2  # of what an index has: another number makes all of them again


class Row:
    """A row whose columns are read on access, which costs a microsecond or two each."""

    __slots__ = ("_columns", "_index")

    def __init__(self, columns: Mapping[str, pa.ChunkedArray], index: int) -> None:
        """Keep where the row is."""
        self._columns, self._index = columns, index

    def __getattr__(self, name: str) -> Any:
        """Return a column's value; tags as a tuple. Raises AttributeError where there is no such column."""
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
        self._columns: dict[str, pa.ChunkedArray] = {}

    @property
    def table(self) -> pa.Table:
        """The whole table, memory-mapped: its pages are shared between processes and read when touched."""
        if self._table is None:
            self._table = _map_index(self.arrow)
        return self._table

    @functools.cached_property
    def is_packed(self) -> bool:
        """Whether rows are parts of larger files, which the columns of `data.table.PLACES` say."""
        return PLACES.keys() <= set(self.table.column_names)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the mapped table out."""
        return {**self.__dict__, "_table": None, "_columns": {}}

    def __len__(self) -> int:
        """Return the number of rows, both splits together."""
        return self._length

    def row(self, i: int) -> Row:
        """Return row i, 0 <= i < N, without reading it yet."""
        if not self._columns:  # a table makes a column anew at each access
            self._columns = dict(zip(self.table.column_names, self.table.columns))
        return Row(self._columns, i)

    def absolute_path(self, i: int) -> Path:
        """Return the file of row i."""
        return Path(self.root) / self.row(i).path

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
        assert split in SPLITS, split
        return self.table[name].filter(pc.equal(self.table["split"], split))


def index_collection(root: str, *, validation_fraction: float, cache: Path) -> Path:
    """Read a collection by the layout it has, and return its index: an uncompressed Arrow IPC file in `cache`.

    The index of an unchanged manifest, and of unchanged shards, is taken as it is; a file that is gone since is
    reported when it is read. A folder is read anew at each call. An index that came with a collection is never read.
    Raises UserError (`data.root`).
    """
    layout = recognise(root, cache)
    target = cache / f"{files_key(layout.files, _INDEX, validation_fraction)}.arrow" if layout.files else None
    if target is not None and target.is_file():
        log.debug("data.root: %s is unchanged, and its index is there", layout.files[0])
        return target
    table = assign_validation(layout.read(), validation_fraction)
    fingerprint = hash_table(table)
    target = target or cache / f"{fingerprint}.arrow"
    if not target.is_file():
        table = table.replace_schema_metadata({_FINGERPRINT: fingerprint.encode()})
        write_atomically(target, lambda file: _write_index(file, table))
    return target


def open_collection(root: str, arrow: Path) -> Collection:
    """Open a collection by its root and the index that `index_collection` returned.

    Raises UserError (`data.root`) where the root is gone or the index is damaged.
    """
    folder = root if is_remote(root) else check_root(root)
    table = _map_index(arrow)
    return Collection(folder, Path(arrow), table.schema.metadata[_FINGERPRINT].decode(), table.num_rows)


def check_classes(collection: Collection, allow_missing: bool) -> list[str]:
    """Return the class names of the training split, sorted, after checking them against the validation split.

    Raises UserError (`data.root`): fewer than two classes; a validation class that training lacks; a training class
    without a validation image, unless `allow_missing`.
    """
    root = str(collection.root)
    train, val = collection.class_names("train"), collection.class_names("val")
    known = show_some(list(map(repr, train)))
    if len(train) < 2:
        raise UserError(
            f"data.root: {root!r} has {len(train)} classes in its training split ({known}); classification "
            "needs two. Set data.root to the folder whose sub-folders are the classes (or train/ and val/ with the "
            "classes in them), or name the images in a manifest.csv there, with the columns path and label"
        )
    if unknown := sorted(set(val) - set(train)):
        raise UserError(
            f"data.root: {root!r} has classes in its validation split only: {show_some(list(map(repr, unknown)))} "
            f"(in training: {known}); add training images of them, rename them as in training, or remove them"
        )
    missing = sorted(set(train) - set(val))
    if missing and not allow_missing:
        advice = "task.allow_missing_classes=true" if val else "data.validation_fraction"
        raise UserError(
            f"data.root: {root!r} has classes without a validation image: {show_some(list(map(repr, missing)))}; add a "
            f"val/ folder with images of every class, or, with two images or more of each, set {advice}"
        )
    return train


def _write_index(file: Path, table: pa.Table) -> None:
    """Write a table as an Arrow IPC file, uncompressed, so that it can be mapped."""
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _map_index(arrow: Path) -> pa.Table:
    """Map an index. Raises UserError where it is absent, damaged or of another schema."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(arrow))).read_all()
        assert pa.schema(list(table.schema)[: len(SCHEMA)]).equals(SCHEMA)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"data.root: the index {str(arrow)!r} cannot be read ({error}); delete it, and it will be made again"
        ) from error
    return table
