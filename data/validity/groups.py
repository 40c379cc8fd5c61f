"""Do pictures belong together? Images of one patient, clip, burst or picture are not independent.

A split keeps a group on one side (`data.group`). The evidence, in order: a column with such a name; names that agree up
to a number or a suffix; times of photographs; copies. Pictures confirm names and times: a counter, such as IMG_0001,
groups nothing.
"""

import re
from collections.abc import Iterator
from itertools import chain, compress
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy import ndarray
from PIL import Image
from pyarrow import Table

from data.collection.duplicates import compare, group_duplicates, read_thumbnails
from data.collection.split import lead_rows
from data.images.measure import FileFacts, measure_files
from data.layouts.names import is_remote
from data.layouts.table import PLACES, TYPES
from data.validity.finding import Finding
from utils.errors import UserError

# Names of columns, from what belongs to one being to what many beings share.
_OWNERS = (
    "patient", "subject", "participant", "person", "donor", "individual", "animal_?id", "specimen", "case",
    "user", "eye", "session", "study", "series", "slide", "clip", "video", "sequence", "scene", "track", "burst",
    "site", "hospital",
)  # fmt: skip
_NAMED = r"(.*[^a-z])?({})s?[^a-z]*(id|no|nr|number|name|key|code|uid)?[^a-z]*"
_LEVELS = 4  # of a name's parts
# By kind: the least groups of several images, and the least share of the images in them.
_LEAST = {"columns": (5, 0.1), "names": (5, 0.1), "times": (5, 0.02), "copies": (1, 0.0)}
_LARGEST = 0.25  # share of the images in one group, at most: a split needs others
_TOLD = 0.01  # share of the images in groups, from which a line tells of copies
_SURE = 0.8  # share of neighbours in a group that are nearer than the median of two groups of one class
_LEAST_PAIRS = 5
_MOST = 2_000  # images that are looked at, and their bytes: 5 to 10 s of one core
_MOST_BYTES = 2**26
_RUN = 10  # images in a row, of a longer collection
_BURST_SEC = 3


class Groups(NamedTuple):
    """Groups of images. kind: a value of `data.group`; by: words for a line; keys: a value for each row, or None."""

    kind: str
    by: str
    keys: pa.Array


def list_columns(table: Table) -> Iterator[Groups]:
    """Yield groups by each column with the name of an owner."""
    for owner in _OWNERS:
        for name in table.column_names:
            if name not in TYPES and re.fullmatch(_NAMED.format(owner), name.lower()):
                yield Groups("columns", f"the column {name}", table[name].combine_chunks())


def list_names(table: Table) -> Iterator[Groups]:
    """Yield groups by folders, and by the first parts of names. A key has a number."""
    paths = [PurePath(path) for path in table["path"].to_pylist()]
    yield Groups("names", "folders", _keys([path.parent.name for path in paths]))
    parts = [re.split(r"[-_. ()]+", path.stem) for path in paths]
    for count in range(1, _LEVELS + 1):
        yield Groups("names", "names", _keys(["_".join(each[:count]) for each in parts]))


def _keys(names: list[str]) -> pa.Array:
    keys = pa.array(names)
    return pc.if_else(pc.match_substring_regex(keys, "[0-9]"), keys, None)


def look(table: Table, root: str, is_whole: bool) -> tuple[ndarray, list[FileFacts]]:
    """Return the rows of images that can be read, and their facts; of a long collection without `is_whole`, of some."""
    if is_remote(root) or PLACES.keys() <= {*table.column_names}:
        return np.arange(0), []
    rows = np.arange(len(table))
    most = min(_MOST, _MOST_BYTES * len(table) // max(pc.sum(table["size"]).as_py() or 0, 1))
    if len(table) > most and not is_whole:
        starts = np.linspace(0, len(table) - _RUN, max(most // _RUN, _RUN)).astype(np.int64)
        rows = np.unique(starts.clip(0)[:, None] + np.arange(_RUN))
    facts = measure_files(Path(root).expanduser(), table["path"].take(rows).to_pylist(), Image.MAX_IMAGE_PIXELS)
    is_drawn = [fact.thumbnail is not None for fact in facts]
    return rows[is_drawn], [*compress(facts, is_drawn)]


def list_pictures(rows: ndarray, facts: list[FileFacts], count: int) -> Iterator[Groups]:
    """Yield groups by the times of photographs and by copies, of `count` rows. rows, facts: from `look`."""
    for kind, find in ("times", _find_bursts), ("copies", _find_copies):
        keys = np.full(count, -1)
        keys[rows] = find(facts)
        yield Groups(kind, kind, pa.array(keys, mask=keys < 0))


def _find_bursts(facts: list[FileFacts]) -> ndarray:
    times = np.array([fact.taken or -1 for fact in facts], np.int64)
    order = np.argsort(times)
    bursts = np.empty(len(times), np.int64)
    bursts[order] = np.cumsum(np.diff(times[order], prepend=0) > _BURST_SEC)
    return np.where(times < 0, -1, bursts)


def _find_copies(facts: list[FileFacts]) -> ndarray:
    return group_duplicates([fact.thumbnail for fact in facts])


def is_sound(leads: ndarray, labels: ndarray, kind: str) -> bool:
    """Return whether groups have several images, and each class has enough of them for both sides of a split.

    leads: the first row of each row's group; labels: numbers from 0 on; both [N].
    """
    least, share = _LEAST[kind]
    sizes = np.bincount(leads)
    several = sizes[sizes > 1]
    is_lead = leads == np.arange(len(leads))
    of_class = np.bincount(labels[is_lead], minlength=labels.max() + 1)
    can_split = (of_class >= np.bincount(labels).clip(max=2)).all()
    is_wide = several.sum() >= share * len(leads) and several.max(initial=0) <= _LARGEST * len(leads)
    return len(several) >= least and is_wide and can_split


def is_confirmed(leads: ndarray, labels: ndarray, pictures: ndarray) -> bool:
    """Return whether pictures of a group are more alike than pictures of two groups of one class; all of a sample."""
    groups = np.argsort(leads, kind="stable")
    mixed = np.random.default_rng(0).permutation(len(leads))
    mixed = mixed[np.argsort(labels[mixed], kind="stable")]
    within, between = (compare(pictures[order[:-1]], pictures[order[1:]]) for order in (groups, mixed))
    within = within[np.diff(leads[groups]) == 0]
    between = between[(np.diff(labels[mixed]) == 0) & (np.diff(leads[mixed]) != 0)]
    return min(len(within), len(between)) >= _LEAST_PAIRS and (within < np.median(between)).mean() >= _SURE


def group_rows(table: Table, root: str, kind: str, findings: list[Finding]) -> pa.Array | None:
    """Return the group of each row by `data.group`, or None; add findings.

    Raises UserError (`data.group`) if nothing tells groups of the stated kind.
    """
    labels = pc.index_in(table["label"], value_set=pc.unique(table["label"])).to_numpy()
    rows, facts = look(table, root, kind in ("times", "copies"))
    pictures = read_thumbnails([fact.thumbnail for fact in facts])
    for groups in chain(list_columns(table), list_names(table), list_pictures(rows, facts, len(table))):
        leads = lead_rows(pa.table({"group": groups.keys}))
        sizes = np.bincount(leads)[leads]
        images = (sizes > 1).sum()
        if kind == "auto":
            sees = groups.kind in ("columns", "copies") or is_confirmed(leads[rows], labels[rows], pictures)
            if not is_sound(leads, labels, groups.kind) or not sees:
                continue
        elif kind != groups.kind or not images:
            continue
        example = groups.keys[sizes.argmax()]
        by = f"{images:,} images belong together, in {len(np.unique(leads[sizes > 1])):,} groups by {groups.by}"
        if images >= _TOLD * len(table):
            findings.append(Finding(0.2, "data.group", f"{by}, such as {example}; a split keeps a group on one side"))
        return pa.array(leads, mask=sizes == 1)
    if kind != "auto":
        raise UserError(f"data.group: {kind}, but {kind} tell no groups of {root!r}; set auto or none")
    return None
