"""Walk the folders of a collection. Skip hidden names, and files that operating systems put beside pictures.

A file or a folder that cannot be read is added to `Unused` with the reason. All others are read.
"""

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from os.path import expanduser, realpath
from pathlib import Path

from data.layouts.names import (
    MANIFESTS,
    MISSING,
    RESOURCE_FORK,
    is_image_name,
    is_passed_over,
    is_remote,
    is_sidecar,
    suffix_of,
)
from data.layouts.readers import has_reader, is_table
from data.layouts.unused import LACKING, UNFINISHED, Unused
from utils.errors import UserError
from utils.io.memo import in_threads
from utils.io.names import is_utf8, show_file_name

HIDDEN = "hidden names, thumbnails, bins and indexes of systems"  # a reason
NOT_UTF8 = "names that are not UTF-8 (rename them; convmv does it for a whole folder)"  # a reason
_NOT_FOLLOWED = "links to folders that are not followed (circles; predict.py follows none)"
_SPECIAL = "pipes, sockets and devices"
# Of a file beside the images, whose place no key names.
COPY = "make room, let your user write there, or work on a copy: prepare.py job=copy data.root=PATH job.to=FOLDER"
_NOT_READ = "files and folders that cannot be read"
# How reasons begin that are faults: a name or a file cannot be read, or not yet.
FAULTS = (NOT_UTF8, _NOT_FOLLOWED, _SPECIAL, _NOT_READ, LACKING, UNFINISHED)


def check_root(root: str) -> Path:
    """Return the collection's folder. Raises UserError (`data.root`) if it is none, or may not be entered."""
    if is_remote(root):
        raise UserError(
            f"data.root: {root!r} is a URL, and this job writes beside the images; run "
            "it on the folder that was packed, and pack it again"
        )
    folder = expanduser(root)
    try:
        os.stat(folder and f"{folder}/.")
    except OSError as error:
        raise UserError(
            f"data.root: {root!r} does not exist, or is no folder that can be read ({error.strerror}; seen from "
            f"{Path.cwd()}); set data.root to the folder that holds the images"
        ) from error
    return Path(folder)


def list_folder(folder: Path) -> list[os.DirEntry[str]]:
    """List a folder. Raises UserError (`data.root`) if that is not possible."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(
            f"data.root: '{folder}' cannot be listed ({error.strerror}); give your user the right to read it, or "
            "name another folder"
        ) from error


def walk_folders(
    root: Path, unused: Unused, takes: Callable[[str], bool] = has_reader, *, follows_links: bool = True
) -> Iterator[tuple[str, list[os.DirEntry[str]], set[str]]]:
    """Yield each folder: its path relative to the root (with a final slash), and the entries and names of its files.

    Folders of the same depth are listed in parallel. Files whose path nobody `takes`, and what cannot be read, are
    added to `unused`.
    """
    level = [("", (realpath(root),))]  # each with the real paths of its parents and itself
    while level:
        below = []
        listed = in_threads(lambda item: _list_below(root, item[0], unused), level)
        for (folder, chain), entries in zip(level, listed):
            files = []
            for entry in entries:
                path = folder + entry.name
                if fault := _find_fault(entry, path):
                    unused.add(fault, show_file_name(path))
                elif is_passed_over(entry.name):
                    continue
                elif not entry.is_dir():
                    files.append(entry)
                elif entry.is_symlink() and (not follows_links or realpath(entry.path) in chain):
                    unused.add(_NOT_FOLLOWED, path)
                else:
                    below.append((f"{path}/", (*chain, realpath(entry.path))))
            names = {entry.name for entry in files}
            others = (folder + name for name in names if not takes(folder + name))
            unused.add_files(*(path for path in others if not is_picture(root, path)))
            yield folder, files, names
        level = below


def is_picture(root: Path, path: str) -> bool:
    """Return whether a file has the name of an image, or is a DICOM without an ending: IM0001, 1.2.840.113619.2."""
    if is_image_name(path) or suffix_of(path).strip(".0123456789") or ".dcm" in MISSING:
        return is_image_name(path)
    with suppress(OSError), open(root / path, "rb") as stream:
        return stream.read(132).endswith(b"DICM") and not path.endswith("DICOMDIR")
    return False


def _list_below(root: Path, folder: str, unused: Unused) -> list[os.DirEntry[str]]:
    """List the root or a folder below it; one that cannot be listed is added to `unused`."""
    try:
        return list_folder(root / folder)
    except UserError as error:
        unused.add(unreadable(error.__cause__), folder or ".")
        return []


def _find_fault(entry: os.DirEntry[str], path: str) -> str | None:
    """Return why a file or a folder is not read, as a reason for `Unused`; None for a good one."""
    if is_passed_over(entry.name):
        is_picture = is_image_name(entry.name) and not entry.name.startswith(RESOURCE_FORK)
        return HIDDEN if is_picture or entry.is_dir(follow_symlinks=False) else None
    if not is_utf8(entry.name):
        return NOT_UTF8
    fault = None
    try:
        mode = entry.stat().st_mode
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            fault = _SPECIAL
    except OSError as error:
        fault = unreadable(error)
    return None if is_sidecar(path) and not is_table(path) else fault  # data.on_bad_sidecar says what becomes of one


def unreadable(error: OSError) -> str:
    """Return the reason for `Unused` of a file that cannot be read."""
    return f"{_NOT_READ} ({error.strerror})"


def find_one(root: Path, names: Iterable[str]) -> Path | None:
    """Return the file at the root with one of these names, or None. Raises UserError if there are two."""
    file, *others = [file for file in map(root.joinpath, names) if file.is_file() or file.is_dir()] or [None]  # no pipe
    if others:
        raise UserError(f"data.root: '{file.parent}' holds both {file.name} and {others[0].name}; keep the correct one")
    return file


def find_manifest(root: Path) -> Path | None:
    """Return the manifest of the root, or None. Raises UserError if there are two."""
    return find_one(root, MANIFESTS)
