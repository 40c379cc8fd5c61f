"""Read a folder of images as it is into one Arrow table, for a collection without a manifest.

Layouts: class folders with splits (root/train/<class>/**/x.jpg, root/val/<class>/...) or without (root/<class>/x.jpg),
and flat folders (root/x.jpg, root/train/x.jpg). Any image may have sidecars beside it: `x.txt` or `x.jpg.txt` (comma
separated tags; the raw text is the caption) and `x.json` or `x.jpg.json` (a booru's record). Names that begin with a
dot are ignored, links are followed.
"""

import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from data.table import SPLIT_NAMES, build_table, settle_test_split, show_some
from utils.errors import UserError
from utils.record.logging import get_logger

log = get_logger(__name__)

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".jpc"),
)
_MAX_SIDECAR_BYTES = 16 * 2**20
_WARNED = 5  # folders without an image that are named


class Sidecar(NamedTuple):
    """The content of the files beside an image."""

    tags: tuple[str, ...] = ()
    rating: str | None = None
    caption: str | None = None


class _Image(NamedTuple):
    path: str
    size: int
    sidecar: Sidecar


# By folder ("" or ending with a slash): the number of its files that are no images, and the first of them.
_Others = dict[str, tuple[int, str]]


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
    """Read every image and sidecar below a folder into a table of SCHEMA, sorted by path.

    Logs nested folders, and warns of folders that hold no image or are named like one.
    Raises UserError (`data.root`): no image; images both beside and inside class folders, or beside split folders; a
    dangling or circular link; a name that is not UTF-8; a sidecar that cannot be read.
    """
    images: list[_Image] = []
    others: _Others = {}
    for folder, entries, names in _walk(root):
        place = root / folder
        suffixed = [entry for entry in entries if _is_image_name(entry.name)]
        images += [_read_image_entry(root, place, folder, entry, names) for entry in suffixed]
        rest = names.difference(entry.name for entry in suffixed)
        others[folder] = (len(rest), min(rest, default=""))
    if not images:
        raise UserError(
            f"data.root: {str(root)!r} holds no image, {_describe_others(others, '')}; allowed are "
            f"{' '.join(IMAGE_SUFFIXES)}, or a manifest.parquet, manifest.jsonl or manifest.csv that names the images"
        )
    paths = [image.path for image in images]
    places = _place_images(root, paths)
    class_depth = 2 if _is_in_split(paths[0]) else 1
    _warn_of_folders(paths, others, class_depth)
    _log_nested(paths, class_depth)
    columns = {
        "path": paths,
        "size": [image.size for image in images],
        "split": [split for split, _ in places],
        "label": [label for _, label in places],
        "tags": [image.sidecar.tags for image in images],
        "rating": [image.sidecar.rating for image in images],
        "caption": [image.sidecar.caption for image in images],
    }
    return settle_test_split(build_table(columns))


def _is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _walk(root: Path) -> Iterator[tuple[str, list[os.DirEntry[str]], set[str]]]:
    """Yield each folder as its path relative to the root (with a slash at the end), its files' entries and names."""
    stack = [("", (os.path.realpath(root),))]
    while stack:
        folder, chain = stack.pop()
        files = []
        for entry in list_folder(root / folder):
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                stack.append((f"{folder}{entry.name}/", _extend_chain(entry, chain)))
            else:
                files.append(entry)
        yield folder, files, {entry.name for entry in files}


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


def _read_image_entry(root: Path, place: Path, folder: str, entry: os.DirEntry[str], names: set[str]) -> _Image:
    """Take an image's path, size and sidecars. Raises UserError for a dangling link or a name that is not UTF-8."""
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
    return _Image(path, status.st_size, read_sidecars(root, place, entry.name, names))


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


def _describe_others(others: _Others, folder: str) -> str:
    """Say which files there are in a folder without an image, those of its sub-folders included."""
    found = {inner: files for inner, files in others.items() if inner.startswith(folder) and files[0]}
    if not found:
        return "and no other file"
    count = sum(count for count, _ in found.values())
    first = min(inner + name for inner, (_, name) in found.items())
    return f"but {count} other {'file' if count == 1 else 'files'} (such as {first!r})"


def _warn_of_folders(paths: list[str], others: _Others, class_depth: int) -> None:
    """Warn of split and class folders that hold no image, and of folders that are named like one.

    class_depth: the depth of the class folders, 1 or 2 (below a split).
    """
    empty = _find_empty(paths, others, class_depth)
    for folder in empty[:_WARNED]:
        log.warning(
            "data.root: %r holds no image, %s; it is ignored: add images or remove it",
            folder[:-1], _describe_others(others, folder),
        )  # fmt: skip
    if len(empty) > _WARNED:
        log.warning("data.root: %d more folders hold no image and are ignored", len(empty) - _WARNED)
    if named := sorted(repr(folder[:-1]) for folder in others if _is_image_name(folder[:-1])):
        log.warning(
            "data.root: %s: a folder that is named like an image is read as a folder; rename it, or put an image in "
            "its place",
            show_some(named),
        )


def _find_empty(paths: list[str], others: _Others, class_depth: int) -> list[str]:
    """Return the split and class folders without an image, sorted; of those inside each other the outer one."""
    used = {""}
    for parts in {tuple(path.split("/")[:-1][:class_depth]) for path in paths}:
        used |= {"/".join(parts[: depth + 1]) + "/" for depth in range(len(parts))}
    empty = []
    for folder in sorted(others):
        parent = folder[: folder[:-1].rfind("/") + 1]
        has_place = folder.count("/") <= class_depth and (class_depth == 1 or _is_in_split(folder))
        if has_place and folder not in used and parent in used:
            empty.append(folder)
    return empty


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


def read_sidecars(root: Path, folder: Path, name: str, names: set[str]) -> Sidecar:
    """Read the sidecars of the image `name` in a folder of the collection `root` whose file names are `names`.

    The JSON file takes precedence over the text file, `x.jpg.txt` over `x.txt`.
    Raises UserError (`data.root`) naming the sidecar where it cannot be read.
    """
    stem = os.path.splitext(name)[0]
    texts = [folder / file for file in (f"{name}.txt", f"{stem}.txt") if file in names]
    records = [folder / file for file in (f"{name}.json", f"{stem}.json") if file in names]
    for file in (*texts[:1], *records[:1]):
        _check_sidecar(root, file, folder / name)
    caption = _read_text(texts[0]).strip() or None if texts else None
    tags = _unique_tags(re.split(r"[,\n]", caption)) if caption else ()
    if not records:
        return Sidecar(tags, None, caption)
    record = _read_record(records[0])
    stated = _tags_of_record(records[0], record)
    return Sidecar(
        tags if stated is None else stated,
        _text_of_record(records[0], record, "rating"),
        _text_of_record(records[0], record, "caption") or caption,
    )


def _check_sidecar(root: Path, file: Path, image: Path) -> None:
    """Raise UserError for a sidecar that is not a file, is too large, or is a link out of the collection.

    A link may lead into the collection, or to a file beside the image's own target, as in a folder of links to pairs.
    Otherwise any text file of this machine could become a caption.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise UserError(f"data.root: the sidecar {str(file)!r} cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_SIDECAR_BYTES:
        raise UserError(
            f"data.root: the sidecar {str(file)!r} is not a file of at most {_MAX_SIDECAR_BYTES:,} bytes; remove it"
        )
    if file.is_symlink():
        target, allowed = os.path.realpath(file), (os.path.realpath(root), os.path.dirname(os.path.realpath(image)))
        if os.path.dirname(target) != allowed[1] and not target.startswith(allowed[0].rstrip("/") + "/"):
            raise UserError(
                f"data.root: the sidecar {str(file)!r} is a link out of the collection, to {target!r}; put the file "
                "in its place, or remove the link"
            )


def _read_text(file: Path) -> str:
    """Read a sidecar as UTF-8, with or without a byte order mark."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"data.root: the sidecar {str(file)!r} is not UTF-8 ({error}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"data.root: the sidecar {str(file)!r} cannot be read ({error.strerror})") from error


def parse_json(text: str) -> Any:
    """Parse JSON. Raises ValueError for invalid JSON, and for half a surrogate pair, which UTF-8 cannot encode."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _read_record(file: Path) -> dict[str, Any]:
    """Read a JSON sidecar, which must be one object."""
    try:
        record = parse_json(_read_text(file))
    except ValueError as error:
        raise UserError(f"data.root: the sidecar {str(file)!r} is broken JSON ({error}); fix or remove it") from error
    if not isinstance(record, dict):
        raise UserError(
            f"data.root: the sidecar {str(file)!r} holds a JSON {type(record).__name__}; an object with tags, rating "
            "or caption is allowed"
        )
    return record


def _text_of_record(file: Path, record: dict[str, Any], key: str) -> str | None:
    """Return a text of a record, None where it is absent, null or blank."""
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f"data.root: {key!r} in the sidecar {str(file)!r} is {value!r}; write a text, or leave it out")
    return (value or "").strip() or None


def _tags_of_record(file: Path, record: dict[str, Any]) -> tuple[str, ...] | None:
    """Return a record's tags, None where it states none: from `tags`, else `tag_string`, else `tag_string_*`."""
    key = next((key for key in ("tags", "tag_string") if record.get(key) is not None), None)
    found = [record[key]] if key else [value for name, value in record.items() if name.startswith("tag_string_")]
    if not found:
        return None
    tags = []
    for value in found:
        # e621 groups its tags by kind: {"general": [...], "species": [...]}
        parts = list(value.values()) if isinstance(value, dict) else [value]
        for part in parts:
            # Boorus separate with spaces and allow no comma in a tag; people who write JSON by hand use commas.
            words = re.split(r"[,\n]" if "," in part else r"\s", part) if isinstance(part, str) else part
            if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                raise UserError(
                    f"data.root: the tags in the sidecar {str(file)!r} are {value!r}; write a list of texts, or one "
                    "text with spaces between the tags"
                )
            tags += words
    return _unique_tags(tags)


def _unique_tags(tags: list[str]) -> tuple[str, ...]:
    """Strip tags and drop blank and repeated ones, keeping the order. Interned, for a collection repeats them."""
    return tuple(dict.fromkeys(sys.intern(tag.strip()) for tag in tags if tag.strip()))
