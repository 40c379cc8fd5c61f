"""The table that every collection becomes: its columns, splits, order and hash.

It has the columns of SCHEMA, and after them what else a manifest has: further columns of numbers, texts or vectors.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from utils.errors import UserError
from utils.record.logging import get_logger

log = get_logger(__name__)

SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # POSIX, relative to the root
        ("size", pa.int64()),  # bytes
        ("sha256", pa.string()),  # null unless prepare.py filled it in
        ("split", pa.string()),
        ("label", pa.string()),
        ("tags", pa.list_(pa.field("item", pa.string()))),
        ("rating", pa.string()),
        ("caption", pa.string()),
        ("weight", pa.float32()),  # of the loss; 0 = not to be trained on
    ]
)
# Columns that prepare.py fills from the files. They follow from the files' content, so they are not in the fingerprint,
# and a manifest made again keeps the runs on it.
MEASURED = {
    **{name: pa.int64() for name in ("width", "height", "orientation", "transparent", "phash", "group")},
    "mode": pa.string(),
}
# Where a packed row's bytes are: a file of the collection, and bytes. They change no fingerprint either.
PLACES = {"shard": pa.string(), "offset": pa.int64(), "length": pa.int64()}
_LARGE = {pa.string(): pa.large_string(), SCHEMA.field("tags").type: pa.large_list(pa.large_string())}
_CHUNK_ROWS = 131_072
_NAMED = 5  # names that a message shows
SPLITS = ("train", "val")
_TEST = "test"  # until `settle_test_split`
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": _TEST}  # as users write it


class Scanned(NamedTuple):
    """What was found in a shard: the rows, as columns by name, and descriptions of what is skipped."""

    rows: list[dict[str, Any]]
    skipped: list[str]


def further_fields(schema: pa.Schema) -> list[pa.Field]:
    """Return the fields of a schema that are not in SCHEMA."""
    return [field for field in schema if field.name not in SCHEMA.names]


def is_packed(schema: pa.Schema) -> bool:
    """Return whether rows are parts of larger files."""
    return all(name in schema.names and schema.field(name).type == kind for name, kind in PLACES.items())


def column_type(found: pa.DataType) -> pa.DataType | None:
    """Return the type in which a further column is kept: int64, float64, text, or a vector of float32; None for others.

    A vector is a list of fixed length.
    """
    if pa.types.is_dictionary(found):
        return column_type(found.value_type)
    if pa.types.is_boolean(found) or pa.types.is_integer(found):
        return pa.int64()
    if pa.types.is_floating(found):
        return pa.float64()
    if pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_string_view(found):
        return pa.string()
    if pa.types.is_fixed_size_list(found) and pa.types.is_floating(found.value_type):
        return pa.list_(pa.float32(), found.list_size)
    return None


def build_table(columns: dict[str, list[Any]]) -> pa.Table:
    """Build a table of SCHEMA, sorted by path, from its columns; one that is absent is null, a weight 1.

    Further columns are of integers.
    """
    count = len(columns["path"])
    defaults = {"weight": [1.0] * count, "tags": [()] * count}
    arrays = [
        pa.array(columns.get(field.name, defaults.get(field.name, [None] * count)), field.type) for field in SCHEMA
    ]
    table = pa.Table.from_arrays(arrays, schema=SCHEMA)
    for name, values in columns.items():
        if name not in SCHEMA.names:
            table = table.append_column(name, pa.array(values, pa.int64()))
    return sort_rows(table)


def sort_rows(table: pa.Table) -> pa.Table:
    """Return a table sorted by path, in chunks of a fixed number of rows.

    By way of 64-bit offsets: Arrow cannot reorder a column whose texts together pass 2 GiB otherwise.
    """
    schema = pa.schema([*SCHEMA, *further_fields(table.schema)])
    wide = table.cast(pa.schema([(field.name, _LARGE.get(field.type, field.type)) for field in schema]))
    wide = wide.combine_chunks()
    order = pc.sort_indices(wide, [("path", "ascending")])
    starts = range(0, max(table.num_rows, 1), _CHUNK_ROWS)
    return pa.concat_tables([wide.take(order[start : start + _CHUNK_ROWS]).cast(schema) for start in starts])


def settle_test_split(table: pa.Table) -> pa.Table:
    """Return a table without the rows of a test split where there are validation rows; else validate on them.

    Nothing here needs a third split, and figures of a run must not come from its test images. Both are logged.
    """
    is_test = pc.equal(table["split"], _TEST)
    count = is_test.to_numpy().sum()
    if count == 0:
        return table
    if "val" in table["split"].unique().to_pylist():
        log.info("data.root: the test split (%s images) is ignored; there is a validation split", f"{count:,}")
        return table.filter(pc.invert(is_test))
    log.info("data.root: the test split (%s images) is used for validation; there is no other", f"{count:,}")
    return replace_column(table, "split", pc.if_else(is_test, "val", table["split"]))


def assign_validation(table: pa.Table, fraction: float, absent: str = "no val/ folder") -> pa.Table:
    """Move a share of the rows to "val" where no row is there yet, stratified by class, and log how many.

    Of a class of n images, round(fraction * n) go (halves up), at least 1 and at most n - 1: those whose paths have the
    lowest hashes. The image of a class of one stays in training, with a warning. An image without a label goes by its
    `id`, if the table has that column: those of the highest id % 1000, 950 and more for 0.05; else if its path's hash
    is in the lowest `fraction` of all hashes. So the choice in a class does not depend on other classes. An added image
    moves at most one other image of its class, and none if it has no label. Images of weight 0, which nothing reads,
    stay in training and do not count. Rows of one `group`, if the table has that column, count as one and go where the
    one of the lowest id, or else path, goes.

    absent: what the log says of the missing split.
    Raises UserError (`data.validation_fraction`) unless 0 <= fraction < 1.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"data.validation_fraction: {fraction} is not allowed; set a number from 0 to below 1")
    if fraction == 0 or "val" in table["split"].unique().to_pylist():
        return table
    names = pc.unique(table["label"]).drop_null()
    labels = pc.index_in(table["label"], value_set=names).fill_null(-1).to_numpy()
    unread = pc.equal(table["weight"], 0.0).fill_null(False).to_numpy()
    ids = _integers(table, "id")
    leads = _find_leads(_integers(table, "group"), ids, unread)
    decides = (leads == np.arange(len(leads))) & ~unread
    class_ids = np.where(decides, labels, -1)
    counts = np.bincount(class_ids[class_ids >= 0], minlength=len(names))
    hashes = _hash_paths(table["path"])
    chosen = hashes < np.uint64(fraction * 2**64)
    chosen = chosen if ids is None else np.where(ids.mask, chosen, ids.data % 1000 >= round(1000 * (1 - fraction)))
    chosen = _choose_of_classes(chosen, hashes, class_ids, counts, fraction) & decides
    chosen = chosen[leads] & ~unread
    rule = "a hash of their path" if ids is None else "id % 1000"
    _log_validation(chosen[~unread], labels[~unread], fraction, absent, rule)
    if single := sorted(names.take(pa.array(np.flatnonzero(counts == 1))).to_pylist()):
        log.warning(
            "data.root: %s with a single image (of weight above 0), which stays in training, so validation lacks the "
            "class; add a second image or remove the class",
            name_classes(single),
        )
    return replace_column(table, "split", pa.array(np.where(chosen, "val", "train"), pa.string()))


def _integers(table: pa.Table, name: str) -> np.ma.MaskedArray | None:
    """Return a further column of integers, absent ones masked; None where the table has none of that name and type."""
    if name not in table.column_names or not pa.types.is_integer(table.schema.field(name).type):
        return None
    return np.ma.array(table[name].fill_null(0).to_numpy(), mask=pc.is_null(table[name]).to_numpy())


def _find_leads(groups: np.ma.MaskedArray | None, ids: np.ma.MaskedArray | None, unread: np.ndarray) -> np.ndarray:
    """Return the row of each row's group that decides for it, int64 [N]: of those read that of the lowest id, or path.

    A row without a group decides for itself. unread: bool [N], of rows in the order of their paths.
    """
    leads = np.arange(len(unread))
    if groups is None:
        return leads
    members = np.flatnonzero(~groups.mask)
    ids = leads if ids is None else ids.filled(np.iinfo(np.int64).max)
    order = members[np.lexsort((members, ids[members], unread[members], groups.data[members]))]
    starts = np.diff(groups.data[order], prepend=groups.data[order[:1]] - 1) != 0
    leads[order] = order[starts][np.cumsum(starts) - 1]
    return leads


def _choose_of_classes(
    chosen: np.ndarray, hashes: np.ndarray, class_ids: np.ndarray, counts: np.ndarray, fraction: float
) -> np.ndarray:
    """Return which rows `assign_validation` moves, bool [N]: of each class a share, of the others those `chosen`.

    hashes: uint64 [N]. class_ids: [N], -1 for no label. counts: [K], the images of each class.
    """
    share = np.clip(np.floor(fraction * counts + 0.5), 1, np.maximum(counts - 1, 1))
    share = np.where(counts >= 2, share, 0)
    order = np.lexsort((hashes, class_ids))[len(class_ids) - counts.sum() :]  # the labelled rows, by class and hash
    place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)  # of each within its class
    chosen = chosen.copy()
    chosen[order] = place < np.repeat(share, counts)
    return chosen


def _hash_paths(paths: pa.ChunkedArray) -> np.ndarray:
    """Return the first 8 bytes of the SHA-256 of each path, uint64 [N]."""
    digests = b"".join(
        hashlib.sha256(path.encode()).digest()[:8] for chunk in paths.chunks for path in chunk.to_pylist()
    )
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def _log_validation(chosen: np.ndarray, labels: np.ndarray, fraction: float, absent: str, rule: str) -> None:
    """Log how many rows were chosen for validation, and by which rule."""
    classes = len(np.unique(labels[labels >= 0]))
    rules = [f"stratified over {classes} class{'' if classes == 1 else 'es'}"] if classes else []
    rules += [f"those without a label by {rule}"] if (labels < 0).any() else []
    log.info(
        "%s: split off %s of %s images (fraction %s), %s",
        absent, f"{chosen.sum():,}", f"{len(chosen):,}", fraction, ", ".join(rules),
    )  # fmt: skip


def name_classes(names: Sequence[str]) -> str:
    """Return the number of classes and the first few names, for messages."""
    return f"{len(names)} {'class' if len(names) == 1 else 'classes'} ({show_some(list(map(repr, names)))})"


def show_some(texts: Sequence[str]) -> str:
    """Join the first few texts, for messages."""
    return ", ".join(texts[:_NAMED]) + (", ..." if len(texts) > _NAMED else "")


def hash_table(table: pa.Table, *, measured: bool = False) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the columns, the same however the table is cut into chunks.

    measured: with the columns of MEASURED, and with PLACES.
    """
    digest = hashlib.sha256()
    left_out = set() if measured else MEASURED.keys() | (PLACES.keys() if is_packed(table.schema) else set())
    further = [field for field in further_fields(table.schema) if field.name not in left_out]
    for field in (*SCHEMA, *further):
        digest.update(f"{field.name} {field.type} {table.num_rows}\n".encode())
        _hash_column(digest.update, table[field.name])
    return digest.hexdigest()[:16]


def _hash_column(update: Callable[[bytes], None], column: pa.ChunkedArray) -> None:
    """Feed a column's nulls, lengths and values, each in one run over all chunks, to a hash."""
    update(pc.is_null(column).to_numpy().tobytes())
    column = column.drop_null()
    if pa.types.is_fixed_size_list(column.type):
        _hash_column(update, pc.list_flatten(column))
    elif pa.types.is_list(column.type):
        update(pc.list_value_length(column).to_numpy().astype("<i8").tobytes())
        _hash_column(update, pc.list_flatten(column))
    elif pa.types.is_string(column.type):
        update(pc.binary_length(column).to_numpy().astype("<i8").tobytes())
        for chunk in column.chunks:
            _, offsets, data = chunk.buffers()
            ends = np.frombuffer(offsets, np.int32)[[chunk.offset, chunk.offset + len(chunk)]] if len(chunk) else (0, 0)
            update(memoryview(data)[ends[0] : ends[1]] if data is not None else b"")
    else:
        update(column.to_numpy().tobytes())


def count_values(column: pa.ChunkedArray) -> dict[str, int]:
    """Count the values of a column of texts, or of lists of texts: the most frequent first, then by name."""
    flat = pc.list_flatten(column) if pa.types.is_list(column.type) else column.drop_null()
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(flat).to_pylist()}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def replace_column(table: pa.Table, name: str, column: pa.Array | pa.ChunkedArray) -> pa.Table:
    """Return the table with one column exchanged; a new one is added at the end."""
    if name not in table.column_names:
        return table.append_column(name, column)
    return table.set_column(table.column_names.index(name), table.schema.field(name), column)
