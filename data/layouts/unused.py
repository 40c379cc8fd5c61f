"""Files that no reader uses. Every start logs their number and the reason, so that no file vanishes.

Every reader of `layouts/` takes an `Unused` and adds what it does not use. The index keeps the lines of `describe`, so
that a start that reads no file again says the same.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from pyarrow import Table

from data.layouts.names import INSTALL, MISSING
from data.layouts.table import show_some
from data.layouts.values import FIELDS
from utils.errors import UserError
from utils.record.logging import log

_ALL = "prepare.py job=check lists all of these"  # the last line, if others end in ...
FAULT = "sidecar_fault"  # a column; see `Sidecar` in data/layouts/readers.py
ORPHANS = "sidecars without an image"  # a reason
ROWS = "rows of"  # how reasons about rows of tables begin
UNNAMED = "images that no row of"
WITH = "annotation files with"  # how reasons about annotation files begin
UNREADABLE = "tables that cannot be read"  # a reason
BESIDE = "images that are not in"
OTHERS = "files of kinds that no reader takes"  # a reason
LACKING = f"images whose package is not installed ({INSTALL} reads them)"
UNFINISHED = "files of downloads and copies that have not ended (fetch them again, or remove them)"
FORMS = "forms of an answer (predict.py form=FILE output=ANSWER.csv fills one in)"
_COUNTED = (OTHERS, LACKING)  # by ending
POSSIBLE = "columns that may be labels ('data.columns={label: NAME}' takes one)"  # names have counts of values
UNREAD = "tables that nobody has read (data.table=FILE 'data.columns={path: COLUMN, label: COLUMN}' reads a .csv)"
_KINDS = {
    UNREAD: ".csv .tsv .xlsx .xls .ods",
    "archives, which are not looked into (unpack them)": ".zip .rar .7z .gz .tgz .bz2 .tbz .xz .txz .zst",
    UNFINISHED: ".part .partial .tmp .crdownload .download",
    "volumes of NIfTI, which are not read (write slices as PNG or DICOM)": ".nii .nii.gz",
    "annotation files, whose boxes and outlines are not read": ".xml",
}
_BY_ENDING = {ending: reason for reason, endings in _KINDS.items() for ending in endings.split()}


class Unused(dict[str, list[str]]):
    """The names of unused files, members, rows or columns, by reason. Threads may share one.

    said: lines about what a reader has found and uses, for the log. whole: the form that alone describes the images.

    unused.add("sidecars without an image", "cat/x.txt", "cat/y.txt")
    unused.describe()      ["2 sidecars without an image: cat/x.txt, cat/y.txt"]
    """

    said: tuple[str, ...] = ()
    whole: str = ""

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

    def merge(self, other: "Unused") -> None:
        """Add the names that a reader in another process did not use."""
        for reason, names in other.items():
            self.add(reason, *names)

    def describe(self) -> list[str]:
        """Return a line for each reason: count, reason and the first names."""
        lines = []
        for reason, names in sorted(self.items()):
            names = sorted({*names})  # threads add in any order, and columns recur in each shard
            shown = count_endings(names) if reason in _COUNTED else names
            lines.append(f"{len(names):,} {reason}: {show_some(shown)}")
        return [*lines, *[_ALL] * any(line.endswith("...") for line in lines)]


def is_form(name: str) -> bool:
    """Return whether a file is the form of a competition's answer, whose labels are none."""
    return "submission" in name.lower() and name.lower().endswith(".csv")


def find_ending(name: str) -> str:
    """Return the ending of a file."""
    return re.search(r"(\.nii)?\.[^./]*$|$", name.lower())[0] or "no ending"


def count_endings(names: Iterable[str]) -> list[str]:
    """Return each ending with the number of names, the most frequent first, and the package that would read it."""
    counts = Counter(map(find_ending, names)).most_common()
    return [f"{ending} {count:,}" + (f" ({MISSING[ending]})" if ending in MISSING else "") for ending, count in counts]


def say_unused(lines: Iterable[str], key: str = "data.root", said: Iterable[str] = ()) -> None:
    """Log the lines of `describe`, after the lines `said`, which tell how files were read."""
    for line in said:
        log.info("%s: %s", key, line)
    for line in lines:
        log.warning("%s: not used: %s", key, line)


def list_faults(table: Table, unused: Unused, on_bad: Literal["stop", "skip"], fields: Sequence[str] = FIELDS) -> Table:
    """Add bad sidecars to `unused`; return the table without the column of faults.

    With `stop`, it raises UserError for faults of `fields`; without fields, the column stays for later readers.
    """
    if FAULT not in table.column_names:
        return table
    faults = table[FAULT].drop_null().to_pylist()
    unused.add("bad sidecars", *faults)
    if on_bad == "stop":
        if not fields:
            return table
        refuse_faults(faults, *fields)
    return table.drop_columns(FAULT)


def refuse_faults(faults: Iterable[str], *fields: str) -> None:
    """Raise UserError (`data.on_bad_sidecar`) if a fault is about one of `fields`, or about a whole file."""
    lines = [line for fault in faults for line in fault.split("\n") if line.split(":")[0] in (*fields, "file")]
    if lines:
        raise UserError(
            f"data.on_bad_sidecar: stop, and {len(lines):,} sidecars cannot be read, such as {lines[0]} (prepare.py "
            "job=check lists all); fix or remove them, or set data.on_bad_sidecar=skip to ignore them"
        )
