"""Folders for results that belong to no run: the same source finds its folder again, another gets its own."""

from itertools import count
from pathlib import Path
from typing import Any

from utils.io.files import output_errors, read_json, write_json

_SOURCE = "source.json"


def open_result_folder(place: Path, source: dict[str, Any]) -> Path:
    """Return `place`, or `place`-2, `place`-3 and so on: the first that is of this source or is not there yet.

    source: JSON values that say what the results are of. They are written into the folder as source.json.
    Raises UserError (`output`) where it cannot be written.
    """
    folders = (place if number == 1 else place.with_name(f"{place.name}-{number}") for number in count(1))
    folder = next(folder for folder in folders if not folder.exists() or _read_source(folder) == source)
    with output_errors("output", folder):
        write_json(folder / _SOURCE, source)
    return folder


def _read_source(folder: Path) -> Any:
    """Return what a folder's results are of; None where it does not say."""
    try:
        return read_json(folder / _SOURCE)
    except (OSError, ValueError):
        return None
