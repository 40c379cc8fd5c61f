"""Read a folder of images as it is into one Arrow table, for a collection without a manifest.

Layouts: class folders with splits (root/train/<class>/**/x.jpg, root/val/<class>/...) or without (root/<class>/x.jpg),
and flat folders (root/x.jpg, root/train/x.jpg). Any image may have sidecars beside it (data/tags/sidecars.py), and
kohya's metadata at the root may know more (data/tags/sidecars.py). Names that begin with a dot are ignored, links are
followed.
"""

import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from data.table import SPLIT_NAMES, build_table, settle_test_split, show_some
from data.tags.records import Sidecar
from data.tags.sidecars import SUFFIXES, read_metadata, read_sidecars
from utils.errors import UserError
from utils.record.logging import get_logger

log = get_logger(__name__)

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".jpc"),
)
_AT_ONCE, _PART = 16, 32  # folders that are listed, and images whose sidecars are read, at once


class FoundImage(NamedTuple):
    """An image file: its path relative to the root, and its bytes."""

    path: str
    size: int


def check_root(root: str) -> Path:
    """Return the collection's folder. Raises UserError (`data.root`) where there is none that can be read."""
    folder = Path(root).expanduser()
    advice = "set data.root to the folder that holds the images"
    if not root or not folder.exists():
        raise UserError(f"data.root: {root!r} does not exist (looked from {Path.cwd()}); {advice}")
    if not folder.is_dir():
        raise UserError(f"data.root: {root!r} is a file, not a folder; {advice}")
    return folder


def list_folder(folder: Path) -> list[os.DirEntry[str]]:
    """List a folder. Raises UserError (`data.root`) where this user may not."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except PermissionError as error:
        raise UserError(
            f"data.root: {str(folder)!r} cannot be read ({error.strerror}); give this user the right to list it"
        ) from error


def scan_folder(root: Path) -> pa.Table:
    """Read every image and sidecar below a folder into a table of SCHEMA, sorted by path; with ids, if any has one.

    Logs nested folders, images without sidecars and sidecars without images, and warns of folders that hold no image.
    Raises UserError (`data.root`): no image; images both beside and inside class folders, or beside split folders; a
    dangling or circular link; a name that is not UTF-8; a sidecar that cannot be read.
    """
    images: list[FoundImage] = []
    sidecars: list[Sidecar] = []
    folders: list[str] = []
    orphans: list[str] = []
    broken: list[str] = []
    for folder, entries, names in walk_folders(root):
        suffixed = [entry for entry in entries if is_image_name(entry.name)]
        images += [_read_image_entry(folder, entry) for entry in suffixed]
        for sidecar in _read_all_sidecars(root, folder, [entry.name for entry in suffixed], names):
            (sidecars if isinstance(sidecar, Sidecar) else broken).append(sidecar)
        rest = names.difference(entry.name for entry in suffixed)
        folders.append(folder)
        orphans += [folder + name for name in find_orphans(rest, names - rest)]
    if not images:
        raise UserError(
            f"data.root: {str(root)!r} holds no image; allowed are "
            f"{' '.join(IMAGE_SUFFIXES)}, or a manifest.parquet, manifest.jsonl or manifest.csv that names the images"
        )
    if broken:
        more = f" (and {len(broken) - 1:,} more sidecars have an error)" if len(broken) > 1 else ""
        raise UserError(broken[0] + more)
    paths = [image.path for image in images]
    places = _place_images(root, paths)
    class_depth = 2 if _is_in_split(paths[0]) else 1
    _warn_of_empty(paths, folders)
    _log_nested(paths, class_depth)
    _log_sidecars(sidecars, orphans)
    metadata = read_metadata(root, paths)
    sidecars = [sidecar.updated(metadata.get(path)) for path, sidecar in zip(paths, sidecars)]
    columns = {
        "path": paths,
        "size": [image.size for image in images],
        "split": [split for split, _ in places],
        "label": [label for _, label in places],
        "tags": [sidecar.tags or () for sidecar in sidecars],
        "rating": [sidecar.rating for sidecar in sidecars],
        "caption": [sidecar.caption for sidecar in sidecars],
    }
    if any(sidecar.id is not None for sidecar in sidecars):
        columns["id"] = [sidecar.id for sidecar in sidecars]
    return settle_test_split(build_table(columns))


def list_images(root: Path) -> list[FoundImage]:
    """Return every image below a folder. Raises UserError (`data.root`) for links and names as `scan_folder` does."""
    return [
        _read_image_entry(folder, entry)
        for folder, entries, _ in walk_folders(root)
        for entry in entries
        if is_image_name(entry.name)
    ]


def holds_image(root: Path) -> bool:
    """Return whether an image is anywhere below a folder."""
    return any(is_image_name(entry.name) for _, entries, _ in walk_folders(root) for entry in entries)


def is_image_name(name: str) -> bool:
    """Return whether a file's name ends as an image's."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _read_all_sidecars(root: Path, folder: str, images: list[str], names: set[str]) -> Iterator[Sidecar | str]:
    """Yield the sidecar of each image in a folder, or what is wrong with it; several are read at once."""

    def read(image: str) -> Sidecar | str:
        try:
            return read_sidecars(root, root / folder, image, names)
        except UserError as error:
            return str(error)

    if len(images) <= _PART or len(images) == len(names):
        yield from map(read, images)
        return
    parts = [images[start : start + _PART] for start in range(0, len(images), _PART)]
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # which a file server answers in the time of one
        for found in pool.map(lambda part: [read(image) for image in part], parts):
            yield from found


def walk_folders(root: Path) -> Iterator[tuple[str, list[os.DirEntry[str]], set[str]]]:
    """Yield each folder as its path relative to the root (with a slash at the end), its files' entries and names.

    Folders of one depth are listed at once.
    """
    level = [("", (os.path.realpath(root),))]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        while level:
            below = []
            for (folder, chain), entries in zip(level, pool.map(lambda place: list_folder(root / place[0]), level)):
                files = []
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if _is_folder(entry):
                        below.append((f"{folder}{entry.name}/", _extend_chain(entry, chain)))
                    else:
                        files.append(entry)
                yield folder, files, {entry.name for entry in files}
            level = below


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder, or a link to one. Raises UserError where that cannot be found out."""
    try:
        return entry.is_dir()
    except OSError as error:  # a link that leads to itself, or to where this user may not look
        raise UserError(f"data.root: {entry.path!r} cannot be followed ({error.strerror}); remove the link") from error


def _extend_chain(entry: os.DirEntry[str], chain: tuple[str, ...]) -> tuple[str, ...]:
    """Add a folder's real path to those it lies in. Raises UserError where a link leads back to one of them."""
    if not entry.is_symlink():
        return (*chain, os.path.join(chain[-1], entry.name))
    target = os.path.realpath(entry.path)
    if target in chain:
        raise UserError(f"data.root: {entry.path!r} is a link back to {target!r}, a circle; remove the link")
    return (*chain, target)


def _read_image_entry(folder: str, entry: os.DirEntry[str]) -> FoundImage:
    """Take an image's path and size. Raises UserError for a dangling link or a name that is not UTF-8."""
    path = folder + entry.name
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"data.root: the file name {path!r} is not UTF-8; rename the file") from error
    try:
        status = entry.stat()
    except FileNotFoundError as error:
        raise UserError(f"data.root: {entry.path!r} is a link to nothing; remove it, or restore its target") from error
    except OSError as error:
        raise UserError(f"data.root: {entry.path!r} cannot be read ({error.strerror}); remove it") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"data.root: {entry.path!r} is neither a file nor a folder; remove it")
    return FoundImage(path, status.st_size)


def _place_images(root: Path, paths: list[str]) -> list[tuple[str, str | None]]:
    """Return the split and the label (None in a flat folder) of each path.

    Raises UserError where only some images are in split or class folders: the split or class of the others is unknown.
    """
    in_split = [_is_in_split(path) for path in paths]
    _refuse_mixture(root, paths, in_split, "is in a split folder", "move every image below train/ and val/")
    rests = [path.split("/", 1)[1] for path in paths] if in_split[0] else paths
    in_class = ["/" in rest for rest in rests]
    advice = "move every image into a class folder, or none"
    _refuse_mixture(root, paths, in_class, "is in a class folder", advice)
    splits = [SPLIT_NAMES[path.split("/", 1)[0].lower()] if in_split[0] else "train" for path in paths]
    labels = [rest.split("/", 1)[0] if in_class[0] else None for rest in rests]
    return list(zip(splits, labels))


def _is_in_split(path: str) -> bool:
    """Tell whether a path lies in a folder named as a split; the path of a folder ends with a slash."""
    head, slash, _ = path.partition("/")
    return bool(slash) and head.lower() in SPLIT_NAMES


def _warn_of_empty(paths: list[str], folders: list[str]) -> None:
    """Warn of folders that hold no image; of those inside each other the outer one."""
    used = {path[: place + 1] for path in paths for place, letter in enumerate(path) if letter == "/"} | {""}
    empty = [folder for folder in folders if folder not in used and folder[: folder[:-1].rfind("/") + 1] in used]
    if empty:
        log.warning("data.root: %d folders hold no image and are ignored: %s", len(empty), show_some(sorted(empty)))


def find_orphans(rest: set[str], images: set[str]) -> list[str]:
    """Return the files of a folder that are named as sidecars, but of none of its images; none beside no image."""
    owners = images | {os.path.splitext(name)[0] for name in images}
    pairs = [os.path.splitext(name) for name in sorted(rest)] if images else []
    return [stem + suffix for stem, suffix in pairs if suffix in SUFFIXES and stem not in owners]


def _log_sidecars(sidecars: list[Sidecar], orphans: list[str]) -> None:
    """Log how many images lack a sidecar, and how many sidecars an image, in a collection that has sidecars."""
    count = sum(sidecar != Sidecar() for sidecar in sidecars)
    if 0 < count < len(sidecars) or (count and orphans):
        first = f" (such as {orphans[0]!r})" if orphans else ""
        log.info(
            "sidecars: %s of %s images have one; %s text and JSON files%s belong to no image and are ignored",
            f"{count:,}", f"{len(sidecars):,}", f"{len(orphans):,}", first,
        )  # fmt: skip


def _log_nested(paths: list[str], class_depth: int) -> None:
    """Log how many images lie in folders inside their class folder, with an example."""
    nested = [path for path in paths if path.count("/") > class_depth]
    if nested:
        first = min(nested)
        log.info(
            "nested folders: %s of %s images are in folders inside their class folder (such as %r of the class %r) "
            "and belong to that class",
            f"{len(nested):,}", f"{len(paths):,}", first, first.split("/")[class_depth - 1],
        )  # fmt: skip


def _refuse_mixture(root: Path, paths: list[str], marks: list[bool], what: str, advice: str) -> None:
    """Raise UserError with one image of each kind where not all marks are the same."""
    if any(marks) and not all(marks):
        yes, no = paths[marks.index(True)], paths[marks.index(False)]
        raise UserError(
            f"data.root: {str(root)!r} mixes layouts: {yes!r} {what}, {no!r} is not; {advice}, "
            "or name images, splits and labels in a manifest.jsonl"
        )
