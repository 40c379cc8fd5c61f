"""Walk the folders of a collection. Hidden names and what systems put beside pictures are passed over.

What cannot be read costs itself alone: it is added to what is not used, with the reason.
"""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from data.layouts.names import IMAGE_SUFFIXES, SUFFIXES, has_reader, is_passed_over, is_sidecar
from data.layouts.unused import LACKING, OTHERS, RESOURCE_FORK, Unused
from utils.errors import UserError
from utils.io.memo import in_threads
from utils.io.names import is_utf8, show_name

HIDDEN = "hidden names, thumbnails, bins and indexes of systems"  # a reason
NOT_UTF8 = "names that are not UTF-8 (rename them; convmv does it for a whole folder)"  # a reason
_CIRCLES = "links back to a folder above, which are circles"
_BROKEN = "links to files that do not exist"
_NOT_FOLLOWED = "links to folders, which are not followed here; name the folders themselves"
_SPECIAL = "pipes, sockets and devices"
# Of a file beside the images, whose place no key names.
COPY = "make room, let your user write there, or work on a copy: prepare.py job=copy data.root=PATH job.to=FOLDER"
_ADVICE = "give your user the right to read it, or name another folder"
_NOT_READ = "files that cannot be read"
_NOT_LISTED = "folders that cannot be listed"
_Folder = tuple[str, list[os.DirEntry[str]], set[str]]


def check_root(root: str) -> Path:
    """Return the collection's folder. Raises UserError (`data.root`) if it does not exist."""
    folder = Path(root).expanduser()
    if root and os.path.isdir(folder):
        if os.access(folder, os.R_OK | os.X_OK, effective_ids=True):
            return folder
        raise UserError(f"data.root: {root!r} cannot be read ({os.strerror(errno.EACCES)}); {_ADVICE}")
    fault = f"does not exist (in {Path.cwd()})"
    try:
        fault = "is a file, not a folder" if root and os.stat(folder) else fault
    except FileNotFoundError:
        fault = f"is a link to {os.readlink(folder)}, which does not exist" if os.path.islink(folder) else fault
    except OSError as error:
        fault = f"cannot be reached ({error.strerror})"
    raise UserError(f"data.root: {root!r} {fault}; set data.root to the folder that holds the images")


def list_folder(folder: Path, key: str = "data.root") -> list[os.DirEntry[str]]:
    """List a folder. Raises UserError (`key`) if that is not possible."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"{key}: {str(folder)!r} cannot be listed ({error.strerror}); {_ADVICE}") from error


def walk_folders(
    root: Path, unused: Unused, key: str = "data.root", *, follows_links: bool = True
) -> Iterator[_Folder]:
    """Yield each folder: its path relative to the root (with a final slash), and the entries and names of its files.

    Folders of the same depth are listed in parallel. Files that no reader takes, and what cannot be read, are added to
    `unused`. Raises UserError (`key`) if the root cannot be listed.
    """
    level = [("", (os.path.realpath(root),))]  # each with the real paths of its parents and itself
    while level:
        below = []
        listed = in_threads(lambda item: _list_below(root, item[0], unused, key), level)
        for (folder, chain), entries in zip(level, listed):
            files = []
            for entry in entries:
                path = folder + entry.name
                if entry.name.startswith(RESOURCE_FORK):
                    unused.add(OTHERS, show_name(path))
                elif is_passed_over(entry.name):
                    if entry.name.lower().endswith((*IMAGE_SUFFIXES, *SUFFIXES)) or entry.is_dir(follow_symlinks=False):
                        unused.add(HIDDEN, show_name(path))
                elif (fault := _find_fault(entry, path)) is not None:
                    unused.add(fault, show_name(path))
                elif (real := _real_folder(entry, chain)) is None:
                    files.append(entry)
                elif real in chain or (entry.is_symlink() and not follows_links):
                    unused.add(_CIRCLES if real in chain else _NOT_FOLLOWED, show_name(path))
                else:
                    below.append((f"{path}/", (*chain, real)))
            names = {entry.name for entry in files}
            unused.add_files(*(folder + name for name in names if not has_reader(folder + name)))
            yield folder, files, names
        level = below


def _list_below(root: Path, folder: str, unused: Unused, key: str) -> list[os.DirEntry[str]]:
    """List the root or a folder below it; one that cannot be listed is added to `unused`. Raises UserError."""
    try:
        return list_folder(root / folder, key)
    except UserError as error:
        if not folder:
            raise
        unused.add(f"{_NOT_LISTED} ({error.__cause__.strerror})", show_name(folder))
        return []


def _find_fault(entry: os.DirEntry[str], path: str) -> str | None:
    """Return why a file cannot be read, as a reason for `Unused`; None for a good one, and for a folder."""
    try:
        if entry.is_dir():
            return None
        if not is_utf8(path):
            return NOT_UTF8
        if is_sidecar(path) or entry.is_file():  # data.on_bad_sidecar says what becomes of one that cannot be read
            return None
        entry.stat()
    except FileNotFoundError:
        return _BROKEN
    except OSError as error:
        return unreadable(error)
    return _SPECIAL


def unreadable(error: OSError) -> str:
    """Return the reason for `Unused` of a file that cannot be read."""
    return f"{_NOT_READ} ({error.strerror})"


def is_fault(reason: str) -> bool:
    """Return whether a reason for `Unused` is that a name or a file cannot be read, or not yet."""
    return reason.startswith((NOT_UTF8, _CIRCLES, _BROKEN, _SPECIAL, _NOT_READ, _NOT_LISTED, LACKING))


def _real_folder(entry: os.DirEntry[str], chain: tuple[str, ...]) -> str | None:
    """Return the real path of a folder, or None for a file; `chain` has those of its parents."""
    if not entry.is_symlink():
        return os.path.join(chain[-1], entry.name) if entry.is_dir() else None
    return os.path.realpath(entry.path) if os.path.isdir(entry.path) else None
