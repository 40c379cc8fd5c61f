"""A collection: a user's images, indexed once into an Arrow file that all processes memory-map and share.

index = index_collection("photos", validation_fraction=0.1, cache=Path("outputs/cache"))
collection = Collection("photos", index)
collection.row(0).caption, collection.rows("val"), collection.class_names("train")
"""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy import ndarray

from data.collection.concepts import CONCEPT, count_positions
from data.collection.index import CONCEPT_LIST, FACTS, map_index
from data.collection.split import FINGERPRINTS, lead_rows
from data.layouts.names import is_remote
from data.layouts.table import MEASURED, SPLITS, TARGET, count_values, has_value, is_packed, show_some
from data.layouts.unused import FAULT, refuse_faults
from data.layouts.values import read_label
from data.validity.finding import Finding
from utils.errors import UserError
from utils.record.figures import show_rows
from utils.record.logging import log

_FRACTION = re.compile(r"-?\d*\.\d+|\d+")
_MARGIN = " " * 14  # of a table on the start screen


class Row:
    """A row whose columns are read on access, in 1 or 2 microseconds each."""

    __slots__ = ("_columns", "_index")

    def __init__(self, columns: Mapping[str, pa.ChunkedArray], index: int) -> None:
        """Keep the columns and the index, without reading."""
        self._columns = columns
        self._index = index

    def __getattr__(self, name: str) -> Any:
        """Return a column's value; tags as a tuple. Raises AttributeError for an unknown column."""
        try:
            value = self._columns[name][self._index].as_py()
        except KeyError:
            raise AttributeError(f"a row has {', '.join(self._columns)}, not {name}") from None
        return tuple(value) if name == "tags" else value


class Collection:
    """The rows of an index, sorted by path. The file is memory-mapped: processes share the pages that they read.

    fingerprint: a hash of the columns, stored in the index. seen: a hash of the rows that training may read, without
    the test split. findings: what files and tables say about the figures of a run (data/validity/).
    is_packed: whether rows are byte ranges of shards, in the columns `data.layouts.table.PLACES`. concepts:
    `data.concepts`; empty without. unused: lines about files that no reader uses.
    """

    def __init__(self, root: str, arrow: Path) -> None:
        """Map the index; root: a folder or a URL."""
        self.root = root if is_remote(root) else Path(root)
        self.arrow = arrow
        self.table = map_index(arrow)
        assert self.table is not None, arrow
        facts = json.loads(self.table.schema.metadata[FACTS])
        self.fingerprint: str = facts["fingerprint"]
        self.seen: str = facts["seen"]
        self.findings = [Finding(*values) for values in facts["findings"]]
        self.concepts = CONCEPT_LIST.validate_python(facts["concepts"])
        self.possible_labels: list[str] = facts["possible_labels"]
        self.unused: list[str] = facts["unused"]
        self.is_packed = is_packed(self.table)
        self._columns = dict(zip(self.table.column_names, self.table.columns))  # a table rebuilds them at each access

    def __len__(self) -> int:
        """Return the number of rows in all splits."""
        return self.table.num_rows

    def row(self, i: int) -> Row:
        """Return row i, 0 <= i < N, without reading it yet."""
        return Row(self._columns, i)

    def absolute_path(self, i: int) -> Path:
        """Return the file of row i."""
        return Path(self.root) / self.row(i).path

    def rows(self, split: str) -> ndarray:
        """Return the row indices of a split (train, val or test), int64 [n], ascending, without rows of weight 0."""
        assert split in SPLITS, split
        return np.flatnonzero(pc.equal(self.table["split"], split).to_numpy() & (self.weights() > 0)).astype(np.int64)

    def folder_of(self, rows: ndarray) -> str:
        """Return the deepest folder with the files of some rows; of shards, the root."""
        if self.is_packed:
            return str(self.root)
        return os.path.commonpath([self.absolute_path(row).parent for row in rows.tolist()])

    def class_names(self, split: str) -> list[str]:
        """Return the distinct labels of a split, sorted, without rows of weight 0."""
        return sorted(count_values(self.table["label"].take(self.rows(split))))

    def class_ids(self, names: Sequence[str]) -> ndarray:
        """Return the position of each row's label in `names`, int64 [N]; -1 for other labels and rows without one."""
        ids = pc.index_in(self.table["label"], value_set=pa.array(map(_as_read, names), pa.string()))
        return ids.fill_null(-1).to_numpy().astype(np.int64)

    def weights(self) -> ndarray:
        """Return the weight of each row, float32 [N]; 0 excludes it from all splits."""
        return self.table["weight"].to_numpy()

    def concept_ids(self) -> ndarray:
        """Return the index of each row's concept, int64 [N]; 0 without concepts."""
        return self._columns[CONCEPT].to_numpy() if self.concepts else np.zeros(len(self), np.int64)

    def leads(self, rows: ndarray) -> ndarray:
        """Return the first of `rows` with an equal or similar image, or the row itself, int64 [N], for all rows."""
        leads = np.arange(len(self))
        known = [name for name in FINGERPRINTS if name in self._columns]
        leads[rows] = rows[lead_rows(self.table.select(["path", *known]).take(rows), FINGERPRINTS)]
        return leads

    def column(self, name: str) -> ndarray:
        """Return an extra column of the manifest, [N]; missing numbers are NaN.

        Raises UserError (`data.root`) if the collection has no such column.
        """
        if name not in self._columns:
            how = " (prepare.py job=manifest fills it)" if name in MEASURED else ""
            raise UserError(
                f"data.root: '{self.root}' has no column {name!r}; add it to the manifest{how}. "
                "'data.columns={target: NAME}' takes a column of numbers for task=regression"
            )
        return self._columns[name].to_numpy()

    def refuse_faults(self, *fields: str, rows: ndarray | None = None) -> None:
        """Raise UserError (`data.on_bad_sidecar`) if `rows`, or all, have unreadable fields: tags, rating, caption."""
        if FAULT in self._columns:
            faults = self._columns[FAULT] if rows is None else self._columns[FAULT].take(rows)
            refuse_faults(faults.drop_null().to_pylist(), *fields)


def _as_read(name: str) -> str:
    """Return a class name of an earlier run as a reader returns that label today."""
    with suppress(ValueError):
        return read_label(name) or name
    return name


def describe_concepts(collection: Collection, rows: ndarray) -> str:
    """Return the table of a collection's concepts, for its training samples; warn of unused triggers."""
    ids = collection.concept_ids()[rows]
    concepts = collection.concepts
    counts = np.bincount(ids, minlength=len(concepts))
    positions = count_positions(concepts, counts)
    shown = []
    for number, (concept, count, slots) in enumerate(zip(concepts, counts.tolist(), positions.tolist())):
        row = {"images": count, "repeats": slots / max(count, 1), "of a step": f"{slots / positions.sum():.1%}"}
        row |= {"folder": concept.path, "share": concept.share, "prior": "yes" * concept.is_prior or None}
        row |= {"weight": concept.weight, "trigger": concept.trigger, "captions with it": None}
        if concept.trigger:
            captions = collection.table["caption"].take(rows[ids == number])
            named = pc.sum(pc.match_substring(captions, concept.trigger)).as_py() or 0
            row["captions with it"] = named
            if named == 0 < count:
                why = "no caption has %r, so it is not trained; captions.prefix puts it before each"
                log.warning(f"data.concepts.%d.trigger: {why}", number, concept.trigger)
        shown.append(row)
    return show_rows(shown).replace("\n", f"\n{_MARGIN}")


def check_classes(collection: Collection) -> list[str]:
    """Return the sorted class names of the training split, and check those of the validation split.

    Raises UserError (`data.root`): fewer than two classes; a validation class without training images.
    """
    collection.refuse_faults("label")
    root = str(collection.root)
    train = collection.class_names("train")
    rows = collection.rows("train")
    known = show_some([*map(repr, train)])
    unknown = show_some(sorted(map(repr, {*collection.class_names("val")} - {*train})))
    alike = Counter(map(str.casefold, train))
    if double := [name for name in train if alike[name.casefold()] > 1]:
        log.warning("data.root: classes differ in case alone; give them one spelling: %s", show_some(double))
    tagged = has_value(collection.table["tags"].take(rows)).sum()
    if 2 * len(train) > max(len(rows), 40) and all(map(_FRACTION.fullmatch, train)):
        raise UserError(
            f"data.root: the labels are numbers of many values, and no classes: {known}. task=regression "
            "'data.columns={target: NAME}' learns them; for classes, write ranges such as 0-9 into the column"
        )
    if len(train) < 2:
        further = show_some(collection.possible_labels)
        others = further and f", and no column is the label; 'data.columns={{label: NAME}}' takes one of {further}"
        if tests := len(collection.rows("test")):
            others += f", and {tests:,} images in its test split, which is not trained on"
        if TARGET in collection.table.column_names:
            others += ", but numbers, which task=regression learns"
        if tagged and not train:
            others += f", but tags on {tagged:,} images (task=tagging trains a tagger: docs/booru.md)"
        raise UserError(
            f"data.root: {root!r} has {len(train)} classes in its training split ({known or 'no label'}){others}; "
            "classification needs two. Set data.root to a folder with one sub-folder per class (or with train/ and "
            "val/ that contain them), or add a manifest.csv with the columns path and label"
        )
    if unknown:
        raise UserError(
            f"data.root: {root!r} has classes in its validation split only: {unknown} (in training: {known}); add "
            "training images for them, rename them as in training, or remove them"
        )
    return train
