"""Annotation files: what they say of the class of an image is its label, and several classes are its tags.

Where they say more, outlines or how many of a class there are, no task here learns it. Then they are read only if
`data.table` names the file or its folder.
"""

import functools
from collections.abc import Mapping, Sequence
from os.path import dirname, join
from pathlib import Path

from data.layouts.annotation_forms import CLASSES, NAMES, OUTLINES, Mark, read_form
from data.layouts.listed import add_waiting, build_finder
from data.layouts.names import stem_of
from data.layouts.places import find_splits
from data.layouts.readers import Described, Sidecar
from data.layouts.scan import Folder
from data.layouts.sidecars import decode, refuse_link_out
from data.layouts.unused import ORPHANS, ROWS, WITH
from data.layouts.values import READ
from utils.errors import UserError
from utils.io.memo import in_threads

_TAKE = "data.table=FILE, or its folder, reads the classes in each image"
_PLACES = f"{WITH} outlines, or with several of a class in an image, which no task learns ({_TAKE})"
_BESIDE = f"{WITH}out effect: beside others, or beside folders of classes ({_TAKE})"
_FEW = 0.1  # of the images may have several of a class
_Told = dict[str, list[tuple[str | None, str, str]]]  # by image: class, kind and file of its marks


def read_annotations(folder: Folder, files: Sequence[str]) -> Described:
    """Return what the form with the most images says, and all images of their folders.

    Raises UserError (`data.table`): the stated file or folder says nothing.
    """
    stated = folder.choice.table
    folder.unused.pop(ORPHANS, None)  # all of them are files here
    told, splits = _read_all(folder, [name for name in dict.fromkeys(files) if (folder.root / name).is_file()])
    form = max(told, key=lambda form: len(told[form]), default="")
    found = _choose(folder, form, told.pop(form, {}), splits)
    for other in told.values():
        folder.unused.add(_BESIDE, *_list_files(other))
    if stated not in ("auto", "none") and not found:
        raise UserError(f"data.table: {stated!r} has no class of an image of '{folder.root}'")
    return found


def _read_all(folder: Folder, names: Sequence[str]) -> tuple[dict[str, _Told], dict[str, str]]:
    """Return what the files say, by form, and the splits of files, by name without ending."""
    stated = folder.choice.table
    parsed = dict(zip(names, in_threads(functools.partial(_parse, folder), names)))
    words = next((marks for form, marks in parsed.values() if form == NAMES and marks), [])
    classes = {str(number): word for number, (_, word, _) in enumerate(words)}
    find = build_finder(folder.splits)
    splits = find_splits({Path(name).stem for name in names if parsed[name][1]}, folder.choice.splits)
    told = {}
    for name, (form, marks) in parsed.items():
        own = stem_of(name)
        beside = dirname(name)
        split = splits.get(Path(name).stem, "")
        is_read = stated == "auto" or f"{name}/".startswith(f"{stated.rstrip('/')}/")
        for image, word, kind in marks if is_read and form != NAMES else ():
            path = find(image, split) or find(join(beside, image), split) or find(own, split)
            if path is None:
                folder.unused.add(f"{ROWS} annotation files without an image", f"{image} in {name}")
            else:
                told.setdefault(form, {}).setdefault(path, []).append((classes.get(word, word), kind, name))
    return told, splits


def _parse(folder: Folder, name: str) -> tuple[str, list[Mark]]:
    """Return the form of a file, and its marks. A file without them is added to `unused`."""
    file = folder.root / name
    try:
        refuse_link_out(folder.root, file)
        form, marks = read_form(file, decode(file.read_bytes()))
        marks = [(str(image), None if word is None else str(word), kind) for image, word, kind in marks]
    except Exception as error:  # any type
        folder.unused.add("annotation files that cannot be read", f"{name} ({error})")
        return "", []
    if not marks:
        folder.unused.add(form, name)
    return form, marks


def _choose(folder: Folder, form: str, told: _Told, splits: Mapping[str, str]) -> Described:
    """Return classes as labels, or as tags if an image has several or a box is none; nothing if they say more."""
    kinds = {kind for marks in told.values() for word, kind, _ in marks if word}
    used = {CLASSES} & kinds or kinds
    words = {path: [word for word, kind, _ in marks if word and kind in used] for path, marks in told.items()}
    several = sum(len({*each}) > 1 for each in words.values())
    bare = sum(not each for each in words.values())
    again = sum(len({*each}) < len(each) for each in words.values())
    is_auto = folder.choice.table == "auto"
    is_beside = is_auto and len({folder.labels[path] for path in words} - {None}) > 1
    has_places = is_auto and (OUTLINES in used or (CLASSES not in used and again > _FEW * len(words)))
    if is_beside or has_places or not used:
        folder.unused.add(_PLACES if has_places else _BESIDE, *_list_files(told))
        return {}
    field = "tags" if several or (bare and CLASSES not in used) else "label"
    line = f"{form}: {', '.join(sorted(used))} are read as {field}: {several} of {len(words)} images have several"
    folder.unused.said += (f"{line}, {bare} have none",)
    own = {path: splits.get(Path(marks[0][2]).stem) for path, marks in told.items()}
    has_splits = len({*own.values()}) > 1
    sidecars = {}
    for path, texts in words.items():
        if texts:
            split = folder.splits[path] or (own[path] if has_splits else None)
            sidecars[path] = Sidecar(split=split, **{field: READ[field](texts if field == "tags" else texts[0])})
    return add_waiting(folder, sidecars, form, {*map(dirname, words)})


def _list_files(told: _Told) -> set[str]:
    return {name for marks in told.values() for *_, name in marks}
