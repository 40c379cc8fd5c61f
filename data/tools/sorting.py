"""Sort images into folders by their predicted classes (predict.py sort=FOLDER). Nothing is moved or overwritten."""

import filecmp
import os
import shutil
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache, partial
from os.path import abspath, lexists
from pathlib import Path
from shlex import quote

from data.layouts.names import is_image_name
from utils.io.files import Json, write_atomically
from utils.record.logging import log


def sort_rows(rows: Iterable[Json], folder: Path, by: str) -> Iterator[Json]:
    """Yield rows with the path of the image's copy or link in the folder of its class; unreadable images have none.

    by: copy or link. Files beside an image that share its name go with it. undo.sh removes each new file that still
    equals its source. The log has the number of images in each folder.
    """
    counts = Counter()
    if (folder / "undo.sh").exists():
        log.warning("sort: %s has copies of an earlier command, which stay; sh undo.sh in it takes them back", folder)
    put = shutil.copy2 if by == "copy" else os.symlink
    with open(folder / "undo.sh", "a", buffering=1, encoding="utf-8", errors="surrogateescape") as undo:
        for row in rows:
            name = "unreadable"
            if "error" not in row:
                name = "unsure" if row.get("unsure") else row["class"].replace("/", "_").lstrip(".")
                files = _list_own(Path(abspath(row["path"])))
                place = _choose_place(folder / name, files)
                for file in files:
                    copy = place / file.name
                    if not lexists(copy):
                        undo.write(f"cmp -s {quote(str(file))} {quote(str(copy))} && rm {quote(str(copy))}\n")
                        write_atomically(copy, partial(put, file), flush=False)
                row["sorted"] = str(place)
            counts[name] += 1
            yield row
    log.info("sorted: %s", ", ".join(f"{name} {count:,}" for name, count in counts.most_common()))


def _choose_place(place: Path, files: list[Path]) -> Path:
    """Return the folder, or the first of 2/, 2/2/ ... in it in which no other file has the name of one of the files."""
    present = [file for file in files if lexists(place / file.name)]
    is_free = all(filecmp.cmp(file, place / file.name, shallow=False) for file in present)
    return place if is_free else _choose_place(place / "2", files)


def _list_own(image: Path) -> list[Path]:
    """Return an image and the other files that share its name, such as x.txt and x.MOV; no other image."""
    start = f"{image.stem}."
    names = _list_names(image.parent)
    same = names[bisect(names, start) : bisect(names, f"{image.stem}/")]  # "/" follows "." and is in no name
    return [image.with_name(name) for name in same if name == image.name or not is_image_name(name)]


@cache
def _list_names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))
