"""What a collection has and no reader uses: counted by reason and said at every start, so that nothing vanishes.

Every reader of `layouts/` takes an `Unused` and adds what it does not use. The index keeps the lines of `describe`, so
that a start that reads no file again says the same.
"""

import csv
import io
import logging
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from data.layouts.names import INSTALL, MISSING
from data.layouts.table import SHOWN, show_some
from utils.io.files import sha256_text, write_text
from utils.record.logging import get_logger

log = get_logger(__name__)

ORPHANS = "sidecars without an image"  # a reason
ROWS = "rows of"  # how reasons about rows of tables begin
UNNAMED = "images that no row of"
OTHERS = "files of kinds that no reader takes"  # a reason; they are counted by ending
LACKING = f"images whose package is not installed ({INSTALL} reads them)"  # counted by ending, too
RESOURCE_FORK = "._"  # what macOS writes beside a file on disks of others begins so
FORMS = "forms of an answer (predict.py form=FILE output=ANSWER.csv fills one in)"
BOXES = "annotation files, whose boxes and outlines are not read"
_KINDS = {
    "tables that nobody has read (data.table=FILE data.columns={path: COLUMN, label: COLUMN} reads a .csv)": (
        ".csv .tsv .xlsx .xls .ods"
    ),
    "archives, which are not looked into (unpack them)": ".zip .rar .7z .gz .tgz .bz2 .tbz .xz .txz .zst",
    BOXES: ".xml",
}
_BY_ENDING = {ending: reason for reason, endings in _KINDS.items() for ending in endings.split()}
Lines = Iterable[tuple[int, str]]  # each with its level


class Unused(dict[str, list[str]]):
    """The names of unused files, members, rows or columns, by reason. Threads may share one.

    said: lines about what a reader has found and uses, for the log.

    unused.add("sidecars without an image", "cat/x.txt", "cat/y.txt")
    unused.describe()      [(logging.WARNING, "2 sidecars without an image: cat/x.txt, cat/y.txt")]
    """

    def __init__(self, *names: dict[str, list[str]]) -> None:
        super().__init__(*names)
        self.said = list[str]()

    def add(self, reason: str, *names: str) -> None:
        """Add names. The reason is a noun in the plural, without a name, so that equal cases are one line."""
        if names:
            self.setdefault(reason, []).extend(names)

    def add_files(self, *names: str) -> None:
        """Add files that no reader takes, each under what would make it read."""
        for name in names:
            ending = find_ending(name)
            reason = LACKING if ending in MISSING else _BY_ENDING.get(ending, OTHERS)
            self.add(FORMS if is_form(name) else reason, name)

    def remove(self, *files: str) -> None:
        """Remove files that are used after all."""
        for reason, names in [*self.items()]:
            self[reason] = [name for name in names if name not in files]
            if not self[reason]:
                del self[reason]

    def merge(self, other: "Unused") -> None:
        """Add the names that a reader in another process did not use."""
        for reason, names in other.items():
            self.add(reason, *names)

    def describe(self, images: int = 0) -> list[tuple[int, str]]:
        """Return a line for each reason: count, reason and the first names.

        Files of other kinds are a warning if they outnumber the `images` of the collection.
        """
        lines = []
        for reason in sorted(self):
            names = sorted(set(self[reason]))  # threads add in any order, and columns recur in each shard
            are_few = reason == OTHERS and len(names) <= images
            shown = count_endings(names) if reason in (OTHERS, LACKING) else names
            lines.append((logging.INFO if are_few else logging.WARNING, f"{len(names):,} {reason}: {show_some(shown)}"))
        return lines


def is_form(name: str) -> bool:
    """Return whether a file is the form of a competition's answer, whose labels are none."""
    return "submission" in name.lower() and name.lower().endswith(".csv")


def find_ending(name: str) -> str:
    """Return the ending of a file, or `._*` for the copies of macOS."""
    is_fork = os.path.basename(name).startswith(RESOURCE_FORK)
    return f"{RESOURCE_FORK}*" if is_fork else os.path.splitext(name)[1].lower() or "no ending"


def list_unused(unused: Unused, folder: Path) -> Lines:
    """Write all names into a CSV file, if the lines of `describe` leave out some or name rows; return a line of it."""
    if not any(len(names) > SHOWN or reason.startswith(ROWS) for reason, names in unused.items()):
        return []
    text = io.StringIO()
    lines = csv.writer(text)
    lines.writerow(("name", "why it is not used"))
    lines.writerows((name, reason) for reason in sorted(unused) for name in sorted({*unused[reason]}))
    file = folder / f"unused_{sha256_text(text.getvalue())[:16]}.csv"
    write_text(file, text.getvalue())
    return [(logging.INFO, f"all of these are listed in {file}")]


def count_endings(names: Iterable[str]) -> list[str]:
    """Return how many names have each ending, the most frequent first, and the package that it lacks."""
    ordered = sorted(Counter(map(find_ending, names)).items(), key=lambda item: (-item[1], item[0]))
    return [f"{ending} {count:,}" + (f" ({MISSING[ending]})" if ending in MISSING else "") for ending, count in ordered]


def say_unused(lines: Lines, key: str = "data.root") -> None:
    """Log the lines of `describe`."""
    for level, line in lines:
        log.log(level, "%s: not used: %s", key, line)
