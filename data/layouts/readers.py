"""The files that describe the images of a folder: one form a line, in order of precedence.

A form is a function of a `Folder` (data/layouts/scan.py) and of the paths of its files in it. It returns the `Sidecar`
of each image that they describe, by path. An earlier line has precedence over a later one. The names of
folders come last. A file beside an image of its name is a sidecar, whatever its form.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from data.layouts.names import OURS, POSTS, SUFFIXES, is_data

TABLES = "tables of the user"
SIDECARS = "sidecars"
ANNOTATIONS = "annotation files"


class Sidecar(NamedTuple):
    """The metadata of an image; None for unknown fields.

    caption: several captions are on a line each. unknown_tags: see data/tags/tag_index.py. sidecar_fault: a line
    `FIELD: REASON` for each field that cannot be read; the field `file` means all of them. more: further columns.
    """

    tags: tuple[str, ...] | None = None
    rating: str | None = None
    caption: str | None = None
    id: int | None = None
    label: str | None = None
    unknown_tags: tuple[str, ...] | None = None
    sidecar_fault: str | None = None
    split: str | None = None
    more: Mapping[str, Any] | None = None

    def updated(self, newer: "Sidecar") -> "Sidecar":
        """Return a copy with the known fields of `newer`, and the faults of both."""
        if newer == Sidecar():  # most images have none
            return self
        known = Sidecar(*(a if b is None else b for a, b in zip(self, newer)))
        faults = filter(None, (self.sidecar_fault, newer.sidecar_fault))
        more = {**(self.more or {}), **(newer.more or {})} or None
        return known._replace(sidecar_fault="\n".join(faults) or None, more=more)


Described = dict[str, Sidecar]  # what files say of images, by path


class Reader(NamedTuple):
    """A form. files: the paths below the root, a pattern for small and capital letters. place: `module:function`.

    is_whole: the images that it describes are the collection, and no later form is read.
    """

    name: str
    files: str
    place: str
    is_whole: bool = False


_POSTS = "|".join(map(re.escape, POSTS))
_BESIDE = "|".join(map(re.escape, SUFFIXES))
_ANNOTATIONS = r".*\.(xml|ya?ml|names|labels)|(.*/)?(_classes|_annotations|Albums/[^/]+)\.csv"
READERS = (
    Reader("posts", _POSTS, "data.layouts.metadata:read_posts", is_whole=True),
    Reader(
        TABLES,
        rf"(?!manifest\.|(.*/)?metadata\.|{_ANNOTATIONS}).*\.[ct]sv",
        "data.layouts.listed:read_listed_images",
        is_whole=True,
    ),
    Reader("metadata of kohya", r"meta_[^/]*\.jsonl?", "data.layouts.metadata:read_kohya"),
    Reader("metadata of imagefolder", r"(.*/)?metadata\.(jsonl|csv|parquet)", "data.layouts.metadata:read_imagefolder"),
    Reader(SIDECARS, rf".*({_BESIDE})", "data.layouts.sidecars:read_beside"),
    Reader(ANNOTATIONS, _ANNOTATIONS, "data.layouts.annotations:read_annotations", is_whole=True),  # and orphans
)
_FORMS = re.compile("|".join(f"(?P<_{row}>{each.files})" for row, each in enumerate(READERS)), re.IGNORECASE)


def find_form(path: str) -> str | None:
    """Return the name of the form of a file, by its path below the root; None if it has none."""
    found = None if path in OURS else _FORMS.fullmatch(path)
    return READERS[int(found.lastgroup[1:])].name if found else None


def is_table(path: str) -> bool:
    """Return whether a file describes images, and is neither a table of the user nor a sidecar."""
    return find_form(path) not in (None, TABLES, SIDECARS)


def has_reader(path: str) -> bool:
    """Return whether a reader takes a file. Tables of the user and annotation files decide by their contents."""
    return is_data(path) or find_form(path) not in (None, TABLES, ANNOTATIONS)
