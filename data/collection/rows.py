"""Select rows of a collection."""

import fnmatch

import numpy as np

from data.collection.collection import Collection
from utils.errors import UserError
from utils.record.logging import get_logger

log = get_logger(__name__)


def training_rows(collection: Collection, patterns: list[str] | None) -> np.ndarray:
    """Return the training rows whose path matches one of `patterns` (`loop.train_paths`), ascending; None: all rows.

    Raises UserError if every training image has weight 0, or if a pattern matches no training image.
    """
    rows = collection.rows("train")
    if len(rows) == 0 and (unused := np.count_nonzero(collection.weights() == 0)):
        raise UserError(
            f"data.root: no training image of {str(collection.root)!r} has a weight above 0: {unused:,} have weight "
            "0, as unreadable images do; replace them and write the manifest again (prepare.py job=manifest)"
        )
    if patterns is None or len(rows) == 0:
        return rows
    paths = collection.table["path"].take(rows).to_pylist()
    chosen = np.zeros(len(rows), dtype=bool)
    for pattern in patterns:
        matches = np.array([fnmatch.fnmatchcase(path, pattern) for path in paths])
        if not matches.any():
            raise UserError(
                f"loop.train_paths: {pattern!r} matches none of the {len(rows):,} training images; paths look like "
                f"{paths[0]!r} (* also matches /)"
            )
        chosen |= matches
    log.info("loop.train_paths: %s of %s training images", f"{chosen.sum():,}", f"{len(rows):,}")
    return rows[chosen]


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
