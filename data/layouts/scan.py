"""What a folder has, for the readers of data/layouts/readers.py: images, sidecars, and the files of each form."""

from collections.abc import Iterable, Mapping, Sequence
from os.path import basename, dirname, getsize
from pathlib import Path
from typing import NamedTuple

from data.layouts.names import (
    CORRECTIONS,
    OURS,
    SHARD_SUFFIXES,
    is_mask_name,
    is_raw,
    is_sidecar,
    masked_stem,
    stem_of,
    suffix_of,
)
from data.layouts.places import Splits, describe_splits, place_images
from data.layouts.readers import ANNOTATIONS, SIDECARS, TABLES, find_form, has_reader
from data.layouts.unused import ORPHANS, Unused
from data.layouts.walk import is_picture, walk_folders
from utils.errors import about
from utils.io.names import Names

_MASKS = "masks, which task.mask alone reads, and OneTrainer's conditioning images"
Columns = Mapping[str, str]  # names of a table by ours, as `data.columns` has them


class TableChoice(NamedTuple):
    """What the settings say of names: `data.table` (a file, auto or none), `data.columns` and `data.splits`.

    group, exclude_copies: what they say of images that belong together.
    """

    table: str = "auto"
    columns: Columns = {}
    splits: Splits = True
    group: str = "none"
    exclude_copies: bool = False


class Folder(NamedTuple):
    """What a folder has, by paths relative to the root.

    images: their sizes in bytes; splits, labels: by the names of folders; sidecars: the files beside each image; files:
    the files of each form (data/layouts/readers.py).
    """

    root: Path
    choice: TableChoice
    unused: Unused
    images: dict[str, int]
    splits: dict[str, str | None]
    labels: dict[str, str | None]
    sidecars: dict[str, list[str]]
    files: dict[str, list[str]]
    masks: list[str]
    shards: list[str]


def scan_folder(root: Path, unused: Unused, choice: TableChoice) -> Folder:
    """Return what a folder has. Raises UserError (`data.root`): names of one look in several Unicode forms."""
    found = Folder(root, choice, unused, {}, {}, {}, {}, {}, [], [])
    if choice.table not in ("auto", "none"):
        is_table = suffix_of(choice.table) not in ("", ".json", ".xml")
        found.files[TABLES if is_table else ANNOTATIONS] = [choice.table]
    for folder, entries, names in walk_folders(
        root, unused, lambda path: has_reader(path) or find_form(path) in (TABLES, ANNOTATIONS)
    ):
        here = {name for name in names if is_picture(root, folder + name)}
        raw = set(filter(is_raw, names))
        stems = {stem_of(name) for name in here - raw} if raw else ()
        twins = {name for name in raw if stem_of(name) in stems}
        unused.add("raw photographs beside an image of the same name", *map(folder.__add__, twins))
        here -= twins
        for entry in entries:
            if entry.name in here:
                found.images[folder + entry.name] = entry.stat().st_size
        others = sorted(names - here, key=lambda name: (-len(name), name))
        beside = _pair_sidecars(folder, here, [*filter(is_sidecar, others)], found.sidecars)
        for name in others:
            path = folder + name
            form = SIDECARS if name in beside else find_form(path)
            if form == SIDECARS and name not in beside:
                unused.add(ORPHANS, path)  # until it turns out to be an annotation file
                form = ANNOTATIONS
            if form:
                found.files.setdefault(form, []).append(path)
            elif is_mask_name(name):
                found.masks.append(path)
            elif name.endswith(SHARD_SUFFIXES) and path not in OURS:
                found.shards.append(path)
    stems = {stem_of(basename(path)) for path in found.images}
    of_images = {dirname(path) for path in found.masks if basename(masked_stem(path)) in stems}
    for path in found.masks:
        if dirname(path) not in of_images:  # a class of this name: mask/1.mask.png
            found.images[path] = getsize(root / path)
    found.masks[:] = [path for path in found.masks if path not in found.images]
    unused.add(_MASKS, *found.masks)
    splits, labels, names = place_images([*found.images], choice.splits)
    unused.said += describe_splits(names, splits, "folders")
    found.splits.update(zip(found.images, splits))
    found.labels.update(zip(found.images, labels))
    return found


def _pair_sidecars(folder: str, images: Iterable[str], names: Sequence[str], pairs: dict[str, list[str]]) -> set[str]:
    """Add the sidecars of each image of a folder, `x.jpg.txt` before `x.txt`, by path, and return their names.

    folder: its path with a final slash. names: what may be sidecars, the longest first.
    """
    owners = {}
    for image in images if names else ():
        for owner in (image, stem_of(image)):
            owners.setdefault(owner, []).append(image)
    known = Names(owners)
    beside = set()
    for name in names:
        with about(f"data.root: {folder + name!r}"):
            found = owners.get(known.find(stem_of(name)), ())
        for image in found:
            pairs.setdefault(folder + image, []).append(folder + name)
            beside.add(name)
    return beside


def list_descriptions(root: Path, images: Iterable[str]) -> list[str]:
    """Return the files that describe images: sidecars, masks, and the tables of all folders."""
    folder = scan_folder(root, Unused(), TableChoice())
    stems = {stem_of(path) for path in images}
    found = {mask for mask in folder.masks if masked_stem(mask) in stems}
    folder.files.pop(SIDECARS, None)
    found.update(*folder.files.values(), *(folder.sidecars.get(path, ()) for path in images))
    if (root / CORRECTIONS).is_file():
        found.add(CORRECTIONS)
    return sorted(found)
