"""Read a folder of images into a table, for a collection without a manifest.

Layouts: class folders with splits (root/train/<class>/**/x.jpg, root/val/<class>/...) or without (root/<class>/x.jpg),
and flat folders (root/x.jpg, root/train/x.jpg). What describes the images is the list of data/layouts/readers.py.
Masks of images, hidden names and what systems put beside pictures are passed over; links are followed.
"""

import re
from collections.abc import Iterable
from os.path import basename, commonprefix

from pyarrow import Table

from data.layouts.names import IMAGE_SUFFIXES, is_dicom_name, stem_of
from data.layouts.places import is_few
from data.layouts.readers import READERS, Described, Reader, Sidecar
from data.layouts.scan import Folder
from data.layouts.table import TEST, build_table, show_some
from data.layouts.unused import BESIDE
from data.layouts.values import read_label
from utils.errors import UserError
from utils.record.logging import log
from utils.start import open_name

# Folders of dumps: the last digits of a post's id, with zeros before them, or the first ones of a hash.
_OF_POST = re.compile(r"0*((?<!\d)\d{2}|\d{3})/\d{2,}\1|([0-9a-f]{2,5})/(?=[0-9a-f]{9,}$)\2.*")
# A folder of a year or a day, as programs of photographs write them: `Photos from 2024`, `2024-01-31`.
_YEAR = re.compile(r"(?:(?:photos?|fotos?|foto's|bilder)\b\D*)?(?:19|20)\d\d(?:[-_ .]?\d\d){0,2}", re.I)
REPEATS = re.compile(r"(\d{1,3})_(.+)")  # a folder of sd-scripts: repeats, and the caption of images without one


def read_folder(folder: Folder) -> Table:
    """Read a collection without a manifest into a table, sorted by path.

    Raises UserError (`data.root`): no image; images both in and beside class folders or split folders; and as readers
    do. Files that cannot be read are in the column `sidecar_fault`.
    """
    unused = folder.unused
    unused.add("shards beside images", *folder.shards)
    if not folder.images:
        others = "".join(f" ({line})" for line in unused.describe())
        raise UserError(
            f"data.root: '{folder.root}' holds no image{others}; allowed are the endings "
            f"{' '.join(IMAGE_SUFFIXES)}; or add a manifest.parquet, manifest.jsonl or manifest.csv with the images"
        )
    if slashed := sorted(path for path in folder.images if "\\" in path):
        log.warning(
            "data.root: %s names with backslashes, as an archive of Windows leaves them, are read as folders: %s",
            f"{len(slashed):,}", show_some(slashed),
        )  # fmt: skip
    known = dict.fromkeys(folder.images, Sidecar())
    if dicom := [path for path in known if is_dicom_name(path)]:
        known |= open_name("data.layouts.dicom:read_fields")(folder.root, dicom)
    for number, reader in enumerate(READERS):
        found = _read_form(folder, reader)
        if reader.is_whole and found:
            unused.whole = reader.name
            for later in READERS[number + 1 :]:
                unused.add(f"{later.name} beside {reader.name}", *folder.files.get(later.name, ()))
            return _build_rows(folder, {path: sidecar.updated(known[path]) for path, sidecar in found.items()})
        for path, sidecar in found.items():
            known[path] = sidecar.updated(known[path])
    if not _settle_albums(folder, known):
        _settle_places(folder)
    folders = {path.rpartition("/")[0] for path in folder.images}
    numbered = (name for name in folders if REPEATS.fullmatch(basename(name)))
    unused.add("numbers of folders as repeats: finetune_sdxl.py alone reads them, if all folders have one", *numbered)
    return _build_rows(folder, _add_labels(folder, known))


def _read_form(folder: Folder, reader: Reader) -> Described:
    """Return what the files of a form describe; one that cannot be read is a fault of the first image."""
    files = folder.files.get(reader.name)
    try:
        return open_name(reader.place)(folder, files) if files else {}
    except (OSError, ValueError) as error:  # UserError is one
        if reader.is_whole:
            raise
        return {next(iter(folder.images)): Sidecar(sidecar_fault=f"file: {str(error).removeprefix('data.root: ')}")}


def _build_rows(folder: Folder, sidecars: Described) -> Table:
    """Build the table of the images that have a sidecar here, by path; an image without a split is in its folder's."""
    fields = dict(zip(Sidecar._fields, zip(*sidecars.values())))
    fields["split"] = [each.split or folder.splits[path] or "train" for path, each in sidecars.items()]
    more = [each or {} for each in fields.pop("more")]
    for name in {name: None for each in more for name in each}:
        fields[name] = [each.get(name) for each in more]
    for ours, theirs in folder.choice.columns.items():
        if theirs in fields:
            values = fields.pop(theirs)
            numbers = {value: number for number, value in enumerate(sorted({*values} - {None}))}
            fields[ours] = [*map(numbers.get, values)] if ours == "group" else values
    return build_table({"path": [*sidecars], "size": [folder.images[path] for path in sidecars], **fields})


def _settle_albums(folder: Folder, known: Described) -> bool:
    """Take the albums of a program of photographs for classes, not the folders around them, nor those of years.

    An image of a year that an album has, too, by name and size, is dropped from `known`. Return whether one has no
    album.
    """
    albums = _find_outer([path for path, name in _find_outer(known).items() if not _YEAR.fullmatch(name)])
    albums = {path: name for path, name in albums.items() if name}
    files = {path: (basename(path), folder.images[path]) for path in known}
    kept = {*map(files.get, albums)}
    copies = [path for path in known if path not in albums and files[path] in kept]
    is_wrapped = len({*folder.labels.values()}) == 1
    if any(folder.splits.values()) or len({*albums.values()}) < 2 or not (copies or is_wrapped):
        return False
    folder.unused.add("copies in folders of years, of images that albums have", *copies)
    for path in copies:
        del known[path]
    folder.labels.update(dict.fromkeys(known) | albums)
    return len(known) > len(albums)


def _find_outer(paths: Iterable[str]) -> dict[str, str]:
    """Return the first folder of each path below the folders around all, or ""."""
    folders = {path: path.split("/")[:-1] for path in paths}
    depth = len(commonprefix([*folders.values()]))
    return {path: "".join(parts[depth : depth + 1]) for path, parts in folders.items()}


def _settle_places(folder: Folder) -> None:
    """Take the label of the few images that are beside the folders of all others, or in folders beside all others.

    Raises UserError if many images are not in split folders, or many of train and val not in class folders.
    """
    inside = [path for path, split in folder.splits.items() if split]
    needed = [path for path in folder.images if folder.splits[path] != TEST]  # the test split needs no label
    labelled = [path for path in needed if folder.labels[path]]
    total = len(folder.images)
    for what, paths, within in (("a split folder", folder.images, inside), ("a class folder", needed, labelled)):
        others = sorted({*paths}.difference(within)) if within else []
        odd = min(others, within, key=len)
        if len(others) > 1 and not is_few(len(odd), total):
            raise UserError(
                f"data.root: '{folder.root}' mixes layouts: {len(others):,} of {total:,} images are not in "
                f"{what}: {show_some(others)}; move all images into such folders, or none; or list images, splits and "
                "labels in a manifest.jsonl. data.splits=false takes all folders for classes"
            )
        if others:
            folder.unused.add(f"{BESIDE} {what} or the only ones in it, which have no label", *odd)
            folder.labels.update(dict.fromkeys(odd))


def _add_labels(folder: Folder, known: Described) -> Described:
    """Return the sidecars with labels from folders, unless most images are posts of a booru.

    An image is a post if its sidecar has an id and tags, or if its folder follows from its id or hash: with
    `0123/4000123.jpg` (id % 1000, which is its id without another), `ab/ab12....webp`.
    """
    posts = {}
    labels = folder.labels
    for path, sidecar in known.items():
        stem = stem_of(basename(path))
        found = _OF_POST.fullmatch(f"{labels[path]}/{stem}".lower())
        if found and found[1] and sidecar.id is None:
            posts[path] = sidecar._replace(id=int(stem))
        elif found or None not in (sidecar.id, sidecar.tags):
            posts[path] = sidecar
    named = [*filter(None, labels.values())]
    if 2 * len(posts) <= len(known) or not named:
        return {path: Sidecar(label=read_label(labels[path])).updated(sidecar) for path, sidecar in known.items()}
    log.info("data.root: images are posts with an id or a hash; folders such as %r are no classes", named[0])
    return {**known, **posts}
