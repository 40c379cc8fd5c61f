"""Do pictures belong together? Images of one patient, clip, burst or picture are not independent.

A split keeps a group on one side (`data.group`). The evidence, in order: columns; names that agree up to a number or a
suffix; times of photographs; copies. Pictures confirm all but copies and columns with the name of an owner: a counter,
such as IMG_0001, groups nothing.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy import ndarray
from PIL import Image
from pyarrow import Table

from data.collection.duplicates import compare, draw_thumbnail, group_duplicates, read_thumbnails
from data.collection.split import lead_rows
from data.images.measure import FileFacts, measure_files
from data.layouts.table import TYPES
from data.validity.finding import Finding
from data.validity.shortcuts import find_shortcuts, name_nearest
from utils.errors import UserError

# What tells groups without a look at the pictures.
_SURE = re.compile(
    "copies|column .*(patient|subject|participant|person|donor|individual|animal_?id|specimen|case|user|eye|session|"
    "study|series|slide|clip|video|sequence|scene|track|burst)",
    re.IGNORECASE,
)
# Starts of a path that are a key, from wide groups to narrow ones: a folder /, and parts of a name.
_STARTS = ("/", "{0}", "{1}", "{2}", "/{0}", "/{1}", "/{2}")
_PARTS = "[^-_. ()/]+(?:[-_. ()]+[^-_. ()/]+){"
_LARGEST = 0.25  # share of the images in one group, at most: a split needs others
_LARGE_PX = 1_792  # the height, of which 8 px become one at the usual 224 px
_TOLD = 0.25  # share of the images in groups, from which a line tells of them
_ALIKE = 0.8  # share of neighbours in a group that are nearer than the median of others of their class
_LEAST_PAIRS = 5
_MOST = 2_000  # images that are decoded, and their bytes: 5 to 10 s of one core
_MOST_BYTES = 2**26
_MOST_READ = 20_000  # files that are read for their times and for equal ones, and their bytes: 5 to 10 s
_MOST_BYTES_READ = 2**32
_RUN = 10  # images in a row, of a longer collection
_BURST_SEC = 3
_BLANK = draw_thumbnail(np.zeros((16, 16), np.uint8))  # of an image that cannot be read


def list_keys(table: Table, facts: list[FileFacts]) -> Iterator[tuple[str, pa.ChunkedArray]]:
    """Yield what may tell groups, and a value for each row or null. facts: of all images, if they were read."""
    names = [f"column {name}" for name in table.column_names if name not in TYPES]
    for name in sorted(names, key=lambda name: not _SURE.match(name)):
        yield name, table[name.removeprefix("column ")]
    for start in _STARTS:
        start = start.replace("/", "[^/]+/").replace("{", _PARTS)
        keys = pc.replace_substring_regex(table["path"], f"^(?:.*/)?({start})[^/]*$", r"\1")
        yield "names", pc.if_else(pc.match_substring_regex(keys, "[0-9]"), keys, None)
    if len(facts) == len(table):
        times = np.array([fact.taken or 0 for fact in facts])
        bursts = np.cumsum(np.diff(np.sort(times), prepend=0) > _BURST_SEC)[np.argsort(np.argsort(times))]
        yield "times", pa.chunked_array([pa.array(bursts, mask=times == 0)])
        yield "copies", pa.chunked_array([group_duplicates([fact.thumbnail or _BLANK for fact in facts])])
        yield "copies", pa.chunked_array([[fact.sha256 for fact in facts]])


def is_sound(leads: ndarray, labels: ndarray) -> bool:
    """Return whether there is a group of several images, and enough groups of each class for both sides of a split.

    leads: the first row of each row's group; labels: numbers from 0 on; both [N].
    """
    groups = np.bincount(labels[np.unique(leads)], minlength=labels.max() + 1)
    can_split = (groups >= np.bincount(labels).clip(max=2)).all()
    return can_split and 1 < np.bincount(leads).max() <= _LARGEST * len(leads)


def is_confirmed(leads: ndarray, labels: ndarray, pictures: ndarray) -> bool:
    """Return whether pictures of a group are more alike than pictures of a class; all of a sample."""
    mixed = np.random.default_rng(0).permutation(len(leads))
    orders = np.argsort(leads, kind="stable"), np.lexsort((mixed, labels))
    near, far = (compare(pictures[order[:-1]], pictures[order[1:]]) for order in orders)
    near = near[np.diff(leads[orders[0]]) == 0]
    return len(near) >= _LEAST_PAIRS and (near < np.median(far)).mean() >= _ALIKE


def list_contrary(labels: ndarray, facts: list[FileFacts]) -> list[Finding]:
    """Return a finding if equal files have several labels. labels: numbers from 1 on, 0 for none, [N]."""
    first = labels[lead_rows(pa.table({"group": [fact.sha256 for fact in facts]}))]
    count = ((labels != first) & (labels * first > 0)).sum()
    line = f"{count:,} of the images equal an image with another label; prepare.py job=check lists them"
    return [Finding(0.6, "data.root", line)] if count else []


def group_rows(table: Table, root: str, kind: str) -> tuple[pa.Array | None, list[Finding]]:
    """Return the group of each row by `data.group`, or None, and findings.

    Raises UserError (`data.group`) if nothing tells groups of the stated kind.
    """
    labels = pc.index_in(table["label"], value_set=pc.unique(table["label"]).drop_null()).fill_null(-1).to_numpy() + 1
    step = np.ceil(len(table) / min(_MOST, _MOST_BYTES / (pc.mean(table["size"]).as_py() or 1)))
    step = 1 if kind in ("times", "copies") else step
    rows = np.flatnonzero(np.arange(len(table)) // _RUN % step == 0)
    paths = table["path"].to_numpy()
    measure = partial(measure_files, Path(root).expanduser(), max_pixels=Image.MAX_IMAGE_PIXELS)
    facts = measure(paths=paths[rows])
    every = facts
    is_short = len(table) <= _MOST_READ and (pc.sum(table["size"]).as_py() or 0) <= _MOST_BYTES_READ
    if len(facts) < len(table) and is_short:
        every = measure(paths=paths, decodes=False)
    pictures = read_thumbnails([fact.thumbnail or _BLANK for fact in facts])
    findings = list_contrary(labels if len(every) == len(table) else labels[rows], every)
    height = int(np.median([fact.height or 0 for fact in facts]))
    if height >= _LARGE_PX:
        line = f"the images are {height} px high: trained at 224 px, detail below {height // 224} px is lost"
        findings.append(Finding(0.1, "augment.image_size_hw", line))
    for words, keys in list_keys(table, every):
        leads = lead_rows(pa.table({"group": keys}))
        if kind not in ("auto", words) or not is_sound(leads, labels):
            continue
        if kind == words or _SURE.match(words) or is_confirmed(leads[rows], labels[rows], pictures):
            is_one = np.bincount(leads)[leads] > 1
            groups = pa.array(leads, mask=~is_one)
            if is_one.mean() < _TOLD:
                return groups, findings
            line = f"{is_one.sum():,} images belong together, in {len(np.unique(leads[is_one])):,} groups by {words}"
            if labels.any():
                line += f"; the nearest tells the class: by pictures {name_nearest(pictures, labels[rows], rows):.2f}"
                line += f", by {words} {name_nearest(pictures, labels[rows], leads[rows]):.2f}"
            findings.append(Finding(0.2, "data.group", line))
            return groups, findings
    if kind != "auto":
        raise UserError(f"data.group: {kind}, but {kind} tell no groups of {root!r} for a split; set auto or none")
    return None, findings + find_shortcuts(facts, table["label"].take(rows).fill_null("").to_numpy())
