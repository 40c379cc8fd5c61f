"""Names of files in either Unicode form: macOS writes an umlaut as two characters (NFD), other systems as one (NFC).

Names(os.listdir("photos")).find("Föhn.png")      the name as the folder spells it, or None
find_path("photos/Föhn.png")                      the path as the file system spells it
"""

import functools
import os
import unicodedata
from collections.abc import Callable, Collection

from utils.errors import UserError


def to_nfc(text: str) -> str:
    """Return a text in the form NFC."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def is_utf8(name: str) -> bool:
    """Return whether a name of the file system is UTF-8; Python has surrogates in place of other bytes."""
    return name.encode(errors="ignore").decode() == name


def show_file_name(name: str) -> str:
    r"""Return a name as text; bytes that are not UTF-8 as `\xf6`, as `ls -b` shows them in octal."""
    return os.fsencode(name).decode(errors="backslashreplace")


class Names:
    """Names that exist. One that is missing is found in its other Unicode form."""

    def __init__(self, names: Collection[str]) -> None:
        """Keep a set or a dictionary of names."""
        self._names = names

    @functools.cached_property
    def _forms(self) -> dict[str, list[str]]:
        forms = {}
        for name in self._names:
            forms.setdefault(to_nfc(name), []).append(name)
        return forms

    def find(self, name: str) -> str | None:
        """Return the name that exists, or None. Raises UserError if two names differ from it in their form alone."""
        if name in self._names:
            return name
        found = self._forms.get(to_nfc(name), [None])
        if len(found) > 1:
            raise UserError(
                f"{name!r} may be any of {len(found)} names that look the same and differ in their Unicode form (NFC, "
                f"NFD): {', '.join(map(ascii, found))}; rename all but one"
            )
        return found[0]


def list_names(folder: str) -> Names:
    """Return the names in a folder; none if it cannot be listed."""
    try:
        return Names(set(os.listdir(folder or ".")))
    except OSError:
        return Names(())


def find_path(path: str, list_folder: Callable[[str], Names] = list_names) -> str:
    """Return a path as the file system spells it, or as it is if there is no such file.

    list_folder: with a cache, for many paths. Raises UserError as `Names.find` does.
    """
    if path.isascii() or os.path.lexists(path):
        return path
    folder, name = os.path.split(path)
    folder = find_path(folder, list_folder)
    return os.path.join(folder, list_folder(folder).find(name) or name)
