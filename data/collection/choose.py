"""Choose rows of a collection: those to train on, and small parts for estimates and probes."""

import numpy as np
from numpy import ndarray

from data.collection.collection import Collection
from data.collection.split import hash_paths, rank_by_hash
from utils.contracts import TrainChoice
from utils.errors import UserError
from utils.record.logging import log


def training_rows(collection: Collection, choice: TrainChoice, is_usable: ndarray | None = None) -> ndarray:
    """Return the training rows that a run reads, ascending. is_usable: bool [N], the rows that its task can use.

    Raises UserError if every training image has weight 0, or if `find` finds no training image.
    """
    training = collection.rows("train")
    if len(training) == 0 and (unused := np.count_nonzero(collection.weights() == 0)):
        raise UserError(
            f"data.root: no training image of '{collection.root}' has a weight above 0: {unused:,} have weight "
            "0, as unreadable images do; replace them and write the manifest again (prepare.py job=manifest)"
        )
    rows = training
    if choice.find is not None:
        from data.collection.search import find_rows

        rows = np.intersect1d(training, find_rows(collection, choice.find, "loop.find"))
        if len(rows) == 0 < len(training):
            raise UserError(
                f"loop.find: {choice.find!r} finds none of the {len(training):,} training images; terms are tags, or "
                f"conditions on columns, such as path:{collection.row(int(training[0])).path} (docs/viewer.md)"
            )
    if is_usable is not None:
        rows = rows[is_usable[rows]]
    rows = choose_part(collection, rows, choice)
    if (choice.find, choice.per_class, choice.count) != (None, None, None):
        log.info("loop: %s of %s training images", f"{len(rows):,}", f"{len(training):,}")
    return rows


def choose_part(collection: Collection, rows: ndarray, choice: TrainChoice) -> ndarray:
    """Return `per_class` of the rows, a number or a share of each class, and `count` of these, ascending.

    The paths with the lowest hashes are chosen, so an added image replaces at most one chosen image. Images without a
    label are one class.
    """
    if choice.per_class:
        rows = _lowest(collection, rows, choice.per_class, collection.class_ids(collection.class_names("train")))
    if choice.count:
        rows = _lowest(collection, rows, choice.count, np.zeros(len(collection), int))
    return rows


def _lowest(collection: Collection, rows: ndarray, limit: int | float, classes: ndarray) -> ndarray:
    """Return the `limit` rows of each class, or this share of them, whose paths have the lowest hashes, ascending.

    classes: int [N]. A share, a float, is rounded up.
    """
    rows, ranks, sizes = rank_by_hash(rows, classes, hash_paths(collection.table["path"]))
    most = np.ceil(limit * sizes) if isinstance(limit, float) else limit
    return np.sort(rows[ranks < most])


def spread(rows: ndarray, limit: int) -> ndarray:
    """Return at most `limit` rows, evenly spread."""
    count = min(limit, len(rows))
    return rows[(2 * np.arange(count) + 1) * len(rows) // max(2 * count, 1)]


def choose_probe_rows(class_ids: ndarray, train_rows: ndarray, val_rows: ndarray, most: int) -> tuple[ndarray, ndarray]:
    """Return at most `most` training rows and half as many validation rows for a probe of features.

    Both are evenly spread over the classes. class_ids: [N], for all rows; -1 without a class. Validation rows only have
    classes of the chosen training rows. Both may be empty.
    """

    def pick(rows: ndarray, limit: int) -> ndarray:
        return spread(rows[np.argsort(class_ids[rows], kind="stable")], limit)

    train = pick(train_rows[class_ids[train_rows] >= 0], most)
    val = pick(val_rows[np.isin(class_ids[val_rows], class_ids[train])], (most + 1) // 2)
    return train, val
