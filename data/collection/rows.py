"""Select rows of a collection."""

import fnmatch

import numpy as np

from data.collection.collection import Collection
from data.collection.split import hash_paths
from utils.contracts import TrainChoice
from utils.errors import UserError
from utils.record.logging import get_logger

log = get_logger(__name__)


def training_rows(collection: Collection, choice: TrainChoice, is_usable: np.ndarray | None = None) -> np.ndarray:
    """Return the training rows that a run reads, ascending. is_usable: bool [N], the rows that its task can use.

    `train_per_class`, a number or a share, and `train_count` choose the paths with the lowest hashes, so an added image
    moves at most one other. Images without a label are one class. Raises UserError if every training image has weight
    0, or if a pattern of `train_paths` matches no training image.
    """
    rows = collection.rows("train")
    if len(rows) == 0 and (unused := np.count_nonzero(collection.weights() == 0)):
        raise UserError(
            f"data.root: no training image of {str(collection.root)!r} has a weight above 0: {unused:,} have weight "
            "0, as unreadable images do; replace them and write the manifest again (prepare.py job=manifest)"
        )
    count = len(rows)
    rows = rows if choice.train_paths is None else _match_paths(collection, rows, choice.train_paths)
    rows = rows if is_usable is None else rows[is_usable[rows]]
    if choice.train_per_class is not None:
        rows = _lowest(collection, rows, choice.train_per_class, collection.class_ids(collection.class_names("train")))
    if choice.train_count is not None:
        rows = _lowest(collection, rows, choice.train_count, np.zeros(len(collection), int))
    if (choice.train_paths, choice.train_per_class, choice.train_count) != (None,) * 3:
        log.info("loop.train_*: %s of %s training images", f"{len(rows):,}", f"{count:,}")
    return rows


def _match_paths(collection: Collection, rows: np.ndarray, patterns: list[str]) -> np.ndarray:
    """Return the rows whose path matches one of `patterns`. Raises UserError (`loop.train_paths`)."""
    paths = collection.table["path"].take(rows).to_pylist()
    chosen = np.zeros(len(rows), dtype=bool)
    for pattern in patterns if paths else ():
        matches = np.array([fnmatch.fnmatchcase(path, pattern) for path in paths])
        if not matches.any():
            raise UserError(
                f"loop.train_paths: {pattern!r} matches none of the {len(rows):,} training images; paths look like "
                f"{paths[0]!r} (* also matches /)"
            )
        chosen |= matches
    return rows[chosen]


def _lowest(collection: Collection, rows: np.ndarray, limit: int | float, classes: np.ndarray) -> np.ndarray:
    """Return the `limit` rows of each class, or this share of them, whose paths have the lowest hashes, ascending.

    classes: int [N]. A share, a float, is rounded up.
    """
    order = rows[np.lexsort((hash_paths(collection.table["path"].take(rows)), classes[rows]))]
    first, end = (np.searchsorted(classes[order], classes[order], side) for side in ("left", "right"))
    most = np.ceil(limit * (end - first)) if isinstance(limit, float) else limit
    return np.sort(order[np.arange(len(order)) - first < most])


def spread(rows: np.ndarray, limit: int) -> np.ndarray:
    """Return at most `limit` rows, evenly spread."""
    return rows[:: max(1, -(-len(rows) // limit))]


def choose_probe_rows(
    class_ids: np.ndarray, train_rows: np.ndarray, val_rows: np.ndarray, train_images: int, val_images: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return training and validation rows for a probe of features, both evenly spread over the classes.

    class_ids: [N], for all rows; -1 without a class. Validation rows only have classes of the chosen training rows.
    Both may be empty.
    """

    def pick(rows: np.ndarray, limit: int) -> np.ndarray:
        return spread(rows[np.argsort(class_ids[rows], kind="stable")], limit)

    train = pick(train_rows[class_ids[train_rows] >= 0], train_images)
    val = pick(val_rows[np.isin(class_ids[val_rows], class_ids[train])], val_images)
    return train, val
