"""The split and the class that images have by their folders, and the splits that names say.

A split is a whole name, such as `train`, `val2017` or `test-00000-of-00001`, as are all names beside it. Beside train,
a name may have further words that name no class, or that all names begin with: `train_images`, `trainset`, `seg_train`.

Source: huggingface/datasets:src/datasets/data_files.py, SPLIT_KEYWORDS. Differs: there, any name with such a word.
"""

import itertools
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from os.path import commonprefix

from data.layouts.table import SPLIT_NAMES, TEST, show_some

Splits = bool | Mapping[str, str]  # `data.splits`: whether names say splits, or the split of each name that says one

_TRAIN = {"train"}
_SPLITS = {**SPLIT_NAMES, "pred": TEST, "trainval": "train"}  # of folders and files
_FILLER = (
    "images?|imgs?|pictures|pics|photos|data|set|split|full|jpe?gs?|png|resized|samples|folder|labels?|annotations?|of"
)
_BESIDE = rf"(?:{_FILLER}|[\W\d_])*"
_SPLIT = re.compile(rf"{_BESIDE}({'|'.join(_SPLITS)}){_BESIDE}", re.I)
_WHOLE = re.compile(rf"(?!eval|pred|trainval)(?:{'|'.join(_SPLITS)})(?:[\W\d_]|of)*", re.I)
_HASH = re.compile(r"-[0-9a-f]{16}\b")  # at the end of shards of the hub
_DEEPEST = 3  # folders above a split, as in `name/name/images/train`


def find_splits(names: Collection[str], splits: Splits = True) -> dict[str, str]:
    """Return the split of each name that says one, train, val or test; nothing if the names are no splits."""
    if not isinstance(splits, bool):
        return {name: splits[name] for name in names if name in splits}
    ours = {name: _HASH.sub("", name) for name in names if splits}
    shared = re.match(r"(.*[\W_])?", commonprefix([*ours.values()]))[0]
    matches = {name: _SPLIT.fullmatch(text) or _SPLIT.fullmatch(text, len(shared)) for name, text in ours.items()}
    found = {name: _SPLITS[match[1].lower()] for name, match in matches.items() if match}
    kinds = {*found.values()}
    is_whole = kinds == _TRAIN or all(map(_WHOLE.fullmatch, map(ours.get, found)))
    return found if kinds > _TRAIN or (is_whole and len(found) == len(ours)) else {}


def describe_splits(names: Iterable[str], splits: Iterable[str | None], what: str) -> tuple[str, ...]:
    """Return a line that states which names are splits; none without any."""
    found = sorted({f"{name} is {split}" for name, split in zip(names, splits) if split})
    return (f"splits by the names of {what}: {show_some(found)} (data.splits=false takes none)",) if found else ()


def place_images(paths: Sequence[str], chosen: Splits) -> tuple[list[str | None], list[str | None], list[str]]:
    """Return the split and the label of each path by its folders, None where they say none; and the split's folder."""
    folders = [re.split(r"[/\\]", path)[:-1] for path in paths]  # a zip of Windows may have backslashes
    depth, splits = _find_depth(folders, chosen)
    outer = [next(filter(splits.get, parts[depth:][:1]), "") for parts in folders]
    inner = [parts[depth:][1:] if splits else parts for parts in folders]
    for name in {*outer}:
        rows = [row for row, own in enumerate(outer) if own == name]
        # Folders around all images of a split are no classes if they are `images`, or named as the split's.
        wrapper = re.compile(rf"(?:{_FILLER})+|{re.escape(name)}", re.I)
        shared = commonprefix([inner[row] for row in rows])
        count = len([*itertools.takewhile(wrapper.fullmatch, shared)])
        for row in rows:
            inner[row] = inner[row][count:]
    if not any(inner) and len({tuple(parts[:depth]) for parts in folders}) > 1:  # cat/train/, dog/train/
        inner = [parts[:depth][-1:] for parts in folders]
    return [*map(splits.get, outer)], [parts[0] if parts else None for parts in inner], outer


def _find_depth(folders: Sequence[Sequence[str]], chosen: Splits) -> tuple[int, dict[str, str]]:
    """Return how many folders are above those of splits, and the split of each; more than there are without splits.

    Images beside the folders of the root change nothing here. They are refused, unless they are few.
    """
    for depth in range(_DEEPEST):
        names = [parts[depth] for parts in folders if len(parts) > depth]
        splits = find_splits({*names}, chosen)
        if splits and (depth == 0 or is_few(len(folders) - len(names), len(folders))):
            return depth, splits
    return sys.maxsize, {}


def is_few(count: int, total: int) -> bool:
    """Return whether so few images say nothing about a layout."""
    return count <= total // 10
