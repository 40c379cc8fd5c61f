"""The split and the class that images have by their folders, and the split that a name says.

A split may be any folder with one of the words of `datasets`: `train`, `train_images`, `images/val`, `x/Training`. As
there, the folders are read by words; here only if all images are in such folders.

Source: huggingface/datasets:src/datasets/data_files.py, SPLIT_KEYWORDS.
"""

import functools
import itertools
import os
import re
import sys
from collections.abc import Sequence

from data.layouts.table import SPLIT_NAMES, TEST

_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_SPLITS = {**SPLIT_NAMES, "pred": TEST}  # of folders and files
_SPLIT = "|".join(_SPLITS)
# Words beside the one of a split that name no class, alone or joined as in `trainset`.
_FILLER = "images?|imgs?|pictures|pics|photos|data|set|split|full|jpe?gs?|png|resized|samples|folder"
_WORDS = re.compile(rf"(?<![^\W\d_])({_SPLIT})(?:{_FILLER})?(?![^\W\d_])", re.I)
_NO_CLASS = re.compile(rf"(?:{_SPLIT}|{_FILLER}|[\W\d_])+", re.I)
_DEEPEST = 3  # folders above a split, as in `name/name/images/train`


@functools.cache
def read_split(name: str) -> str | None:
    """Return the split that the words of a name say: train, val or test; None for none, or for several."""
    found = {_SPLITS[word.lower()] for word in _WORDS.findall(_CAMEL.sub(" ", name))}
    return found.pop() if len(found) == 1 else None


def place_images(paths: Sequence[str]) -> tuple[list[str | None], list[str | None]]:
    """Return the split and the label of each path by its folders; None where they say none."""
    folders = [re.split(r"[/\\]", path)[:-1] for path in paths]  # a zip of Windows may have backslashes
    depth = _find_depth(folders)
    outer = [next(filter(read_split, parts[depth:][:1]), "") for parts in folders]
    inner = [parts[depth:][1:] if name else parts for parts, name in zip(folders, outer)]
    for name in {*outer}:
        rows = [row for row, own in enumerate(outer) if own == name]
        # Folders around all images of a split are no classes if they are `images`, or named as the split's.
        wrapper = re.compile(rf"(?:{_FILLER})+|{re.escape(name)}", re.I)
        shared = os.path.commonprefix([inner[row] for row in rows])
        count = len([*itertools.takewhile(wrapper.fullmatch, shared)])
        for row in rows:
            inner[row] = inner[row][count:]
    if not any(inner) and len({tuple(parts[:depth]) for parts in folders}) > 1:  # cat/train/, dog/train/
        inner = [parts[:depth][-1:] for parts in folders]
    return [*map(read_split, outer)], [parts[0] if parts else None for parts in inner]


def _find_depth(folders: Sequence[Sequence[str]]) -> int:
    """Return how many folders are above those of splits; more than there are without splits.

    At the root, one folder whose name says only a split is enough. Other folders beside it are refused.
    """
    first = {parts[0] for parts in folders if parts}
    if (
        any(read_split(name) and _NO_CLASS.fullmatch(name) for name in first)
        or len({*map(read_split, first)} - {None}) > 1
    ):
        return 0
    for depth in range(_DEEPEST):
        names = {parts[depth] if len(parts) > depth else "" for parts in folders}
        if all(map(read_split, names)):
            return depth
    return sys.maxsize


def lacks_labels(splits: Sequence[str | None], labels: Sequence[str | None]) -> list[bool]:
    """Return for each image whether its label is missing: another one of train or val has one. Test needs no labels."""
    is_needed = any(label for split, label in zip(splits, labels) if split != TEST)
    return [is_needed and label is None and split != TEST for split, label in zip(splits, labels)]
