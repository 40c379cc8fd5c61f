"""Read a folder of images into a table, for a collection without a manifest.

Layouts: class folders with splits (root/train/<class>/**/x.jpg, root/val/<class>/...) or without (root/<class>/x.jpg),
and flat folders (root/x.jpg, root/train/x.jpg). Any image may have sidecars beside it (sidecars.py), and
tables (metadata.py) take precedence over them. Masks of images, hidden names and what systems put beside pictures are
passed over; links are followed.
"""

import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from data.layouts.listed import read_listed_images
from data.layouts.metadata import read_metadata, read_posts
from data.layouts.names import (
    CORRECTIONS,
    IMAGE_SUFFIXES,
    PARQUET,
    POSTS,
    SHARD_SUFFIXES,
    is_image_name,
    is_mask_name,
    is_raw,
    is_table,
    is_table_of_user,
    masked_stem,
)
from data.layouts.places import lacks_labels, place_images
from data.layouts.sidecars import Sidecar, pair_sidecars, read_sidecars
from data.layouts.table import build_table, show_some
from data.layouts.tables import TableChoice, find_one
from data.layouts.unused import ORPHANS, Unused
from data.layouts.walk import walk_folders
from utils.errors import UserError
from utils.io.memo import in_threads
from utils.record.logging import get_logger

log = get_logger(__name__)

_MASKS = "masks, which task.mask alone reads, and OneTrainer's conditioning images"
# Folders of dumps: the last digits of a post's id, with zeros before them, or the first ones of a hash.
_OF_POST = re.compile(r"0*(\d{2,3})/\d*\1|([0-9a-f]{2,5})/(?=[0-9a-f]{9,}$)\2.*")
REPEATS = re.compile(r"(\d{1,3})_(.+)")  # a folder of sd-scripts: repeats, and the caption of images without one


def read_folder(root: Path, unused: Unused, choice: TableChoice) -> pa.Table:
    """Read a collection without a manifest into a table, sorted by path.

    By its table of posts, else by a table of the user (`choice`; data/layouts/listed.py), else by folders and sidecars.
    A table that `choice` does not name is read if neither folders of two classes nor sidecars describe the images.

    Raises UserError (`data.root`): no image; images both in and beside class folders or split folders. Unreadable
    sidecars are in the column `sidecar_fault`.
    """
    images, sidecars, tables = scan_folder(root, unused)
    if not images:
        others = "".join(f" ({line})" for line in unused.describe())
        raise UserError(
            f"data.root: {str(root)!r} holds no image{others}; allowed are the endings "
            f"{' '.join(IMAGE_SUFFIXES)}; or add a manifest.parquet, manifest.jsonl or manifest.csv with the images"
        )
    if (file := find_one(root, POSTS)) is not None:
        unused.add("sidecars, because posts describe the images", *itertools.chain(*sidecars.values()))
        posts = read_posts(root, file, images, unused)
        return _build_rows({path: images[path] for path in posts}, ["train"] * len(posts), list(posts.values()))
    if slashed := sorted(path for path in images if "\\" in path):
        what = "names with backslashes, as an archive of Windows leaves them, are read as folders"
        log.warning("data.root: %s %s: %s", f"{len(slashed):,}", what, show_some(slashed))
    splits, labels = place_images([*images])
    is_described = len({*labels} - {None}) > 1 or 2 * len(sidecars) > len(images)  # one folder tells no class
    if choice.table != "auto" or not is_described:
        listed = read_listed_images(root, images, dict(zip(images, splits)), choice, unused)
        if listed is not None:
            unused.add("sidecars beside a table", *itertools.chain(*sidecars.values()))
            return listed
    splits = _check_places(root, list(images), splits, labels)
    folders = {path.rpartition("/")[0] for path in images}
    numbered = (folder for folder in folders if REPEATS.fullmatch(os.path.basename(folder)))
    unused.add("numbers of folders as repeats: finetune_sdxl.py alone reads them, if all folders have one", *numbered)
    known = in_threads(lambda path: read_sidecars(root, path, sidecars[path], unused), list(sidecars))
    known = dict(zip(sidecars, known))
    try:
        described = read_metadata(root, tables, images, unused, choice.columns)
    except (OSError, ValueError) as error:  # UserError is one
        described = {next(iter(images)): Sidecar(sidecar_fault=f"file: {str(error).removeprefix('data.root: ')}")}
    none = Sidecar()
    records = [known.get(path, none).updated(described.get(path, none)) for path in images]
    return _build_rows(images, splits, _add_labels(list(images), labels, records))


def _build_rows(images: Mapping[str, int], splits: Sequence[str], sidecars: Sequence[Sidecar]) -> pa.Table:
    """Build a table of images from their sizes in bytes by path, their splits and their sidecars."""
    fields = dict(zip(Sidecar._fields, zip(*sidecars)))
    return build_table({"path": list(images), "size": list(images.values()), "split": splits, **fields})


def scan_folder(root: Path, unused: Unused) -> tuple[dict[str, int], dict[str, list[str]], list[str]]:
    """Return the size in bytes and the sidecars of each image below a folder, by path, and its tables of metadata.

    Raises UserError as `read_folder` does.
    """
    images = {}
    sidecars = {}
    tables = []
    for folder, entries, names in walk_folders(root, unused):
        here = set(filter(is_image_name, names))
        others = names - here
        raw = set(filter(is_raw, names))
        stems = {os.path.splitext(name)[0] for name in here - raw} if raw else ()
        twins = {name for name in raw if os.path.splitext(name)[0] in stems}
        unused.add("raw photographs beside an image of the same name", *map(folder.__add__, twins))
        for entry in entries:
            if entry.name in here and entry.name not in twins:
                images[folder + entry.name] = entry.stat().st_size
        paired, orphans = pair_sidecars(folder, here, others)
        sidecars |= paired
        own = {*itertools.chain(*paired.values())}
        tables += sorted(path for path in map(folder.__add__, others) if is_table(path) and path not in own)
        unused.add(_MASKS, *map(folder.__add__, filter(is_mask_name, others)))
        shards = (folder + name for name in others if name.endswith(SHARD_SUFFIXES))
        unused.add("shards beside images", *(path for path in shards if not is_table(path) and path != PARQUET))
        unused.add(ORPHANS, *orphans)
    return images, sidecars, tables


def list_descriptions(root: Path, images: Iterable[str]) -> list[str]:
    """Return the files that describe images: sidecars, masks, and the tables of all folders."""
    found = []
    chosen = set(images)
    for folder, _, names in walk_folders(root, Unused()):
        here = [name for name in names if folder + name in chosen]
        stems = {os.path.splitext(name)[0] for name in here}
        found += itertools.chain(*pair_sidecars(folder, here, names)[0].values())
        found += (folder + name for name in names if masked_stem(name) in stems)
        found += (
            path
            for path in map(folder.__add__, names)
            if is_table(path) or path == CORRECTIONS or is_table_of_user(path)
        )
    return sorted(set(found))


def _check_places(root: Path, paths: list[str], splits: list[str | None], labels: list[str | None]) -> list[str]:
    """Return the split of each path; train if folders say none.

    Raises UserError if only some images are in split folders, or only some of train and val in class folders.
    """
    has_splits = any(splits)
    is_outside = [has_splits and split is None for split in splits]
    kinds = {"a split folder (train/, val/, test/)": is_outside, "a class folder": lacks_labels(splits, labels)}
    for what, lacking in kinds.items():
        others = [path for path, lacks in zip(paths, lacking) if lacks]
        if others:
            raise UserError(
                f"data.root: {str(root)!r} mixes layouts: {len(others):,} of {len(paths):,} images are not in {what}: "
                f"{show_some(others)}; move all images into such folders, or none, or list images, splits and labels "
                "in a manifest.jsonl"
            )
    return [split or "train" for split in splits]


def _add_labels(paths: list[str], labels: list[str | None], sidecars: list[Sidecar]) -> list[Sidecar]:
    """Return the sidecars with labels from folders, unless most images are posts of a booru.

    An image is a post if its sidecar has an id and tags, or if its folder follows from its id or hash: with
    `0123/4000123.jpg` (id % 1000, which is its id without another), `ab/ab12....webp`.
    """
    posts = 0
    ids = []
    for path, label, sidecar in zip(paths, labels, sidecars):
        name = f"{label}/{os.path.splitext(os.path.basename(path))[0]}".lower()
        found = _OF_POST.fullmatch(name)
        posts += found is not None or None not in (sidecar.id, sidecar.tags)
        has_id = sidecar.id is None and found is not None and found[1] is not None
        ids.append(int(name.rpartition("/")[2]) if has_id else sidecar.id)
    if posts <= len(paths) / 2 or not any(labels):
        return [Sidecar(label=label).updated(sidecar) for label, sidecar in zip(labels, sidecars)]
    log.info("data.root: images are posts with an id or a hash; folders such as %r are no classes", labels[0])
    return [sidecar._replace(id=number) for sidecar, number in zip(sidecars, ids)]
