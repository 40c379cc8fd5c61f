"""Walk the folders of a collection. Hidden names and what systems put beside pictures are passed over."""

import os
from collections.abc import Iterator
from pathlib import Path

from data.layouts.names import IMAGE_SUFFIXES, SUFFIXES, has_reader, is_passed_over
from data.layouts.unused import OTHERS, Unused
from utils.errors import UserError
from utils.io.memo import in_threads

_HIDDEN = "hidden names, thumbnails, bins and indexes of systems"
_Folder = tuple[str, list[os.DirEntry[str]], set[str]]


def check_root(root: str) -> Path:
    """Return the collection's folder. Raises UserError (`data.root`) if it does not exist."""
    folder = Path(root).expanduser()
    if not root or not folder.is_dir():
        fault = "is a file, not a folder" if root and folder.exists() else f"does not exist (in {Path.cwd()})"
        raise UserError(f"data.root: {root!r} {fault}; set data.root to the folder that holds the images")
    return folder


def list_folder(folder: Path) -> list[os.DirEntry[str]]:
    """List a folder. Raises UserError (`data.root`) if that is not possible."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"data.root: {str(folder)!r} cannot be listed ({error.strerror})") from error


def walk_folders(root: Path, unused: Unused) -> Iterator[_Folder]:
    """Yield each folder: its path relative to the root (with a final slash), and the entries and names of its files.

    Folders of the same depth are listed in parallel. Files that no reader takes are added to `unused`. Raises UserError
    (`data.root`) for a circle of links.
    """
    level = [("", (os.path.realpath(root),))]  # each with the real paths of its parents and itself
    while level:
        below = []
        for (folder, chain), entries in zip(level, in_threads(lambda item: list_folder(root / item[0]), level)):
            files = []
            for entry in entries:
                if is_passed_over(entry.name):
                    if entry.name.lower().endswith((*IMAGE_SUFFIXES, *SUFFIXES)) or entry.is_dir(follow_symlinks=False):
                        unused.add(_HIDDEN, folder + entry.name)
                elif (real := _real_folder(entry, chain)) is None:
                    files.append(entry)
                else:
                    below.append((f"{folder}{entry.name}/", (*chain, real)))
            names = {entry.name for entry in files}
            unused.add(OTHERS, *(folder + name for name in names if not has_reader(folder + name)))
            yield folder, files, names
        level = below


def _real_folder(entry: os.DirEntry[str], chain: tuple[str, ...]) -> str | None:
    """Return the real path of a folder, or None for a file; `chain` has those of its parents. Raises UserError."""
    if not entry.is_symlink():
        return os.path.join(chain[-1], entry.name) if entry.is_dir() else None
    if not os.path.isdir(entry.path):
        return None
    real = os.path.realpath(entry.path)
    if real in chain:
        raise UserError(f"data.root: {entry.path!r} is a link back to {real!r}, a circle; remove it")
    return real
