"""What a collection has and no reader uses: counted by reason and said at every start, so that nothing vanishes.

Every reader of `layouts/` takes an `Unused` and adds what it does not use. The index keeps the lines of `describe`, so
that a start that reads no file again says the same.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterable

from data.layouts.table import show_some
from utils.record.logging import get_logger

log = get_logger(__name__)

ORPHANS = "sidecars without an image"  # a reason
OTHERS = "files of kinds that no reader takes"  # a reason; they are counted by ending
Lines = Iterable[tuple[int, str]]  # each with its level


class Unused(dict[str, list[str]]):
    """The names of unused files, members, rows or columns, by reason. Threads may share one.

    unused.add("sidecars without an image", "cat/x.txt", "cat/y.txt")
    unused.describe()      [(logging.WARNING, "2 sidecars without an image: cat/x.txt, cat/y.txt")]
    """

    def add(self, reason: str, *names: str) -> None:
        """Add names. The reason is a noun in the plural, without a name, so that equal cases are one line."""
        if names:
            self.setdefault(reason, []).extend(names)

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
            shown = count_endings(names) if reason == OTHERS else names
            lines.append((logging.INFO if are_few else logging.WARNING, f"{len(names):,} {reason}: {show_some(shown)}"))
        return lines


def count_endings(names: Iterable[str]) -> list[str]:
    """Return how many names have each ending, the most frequent first."""
    endings = Counter(os.path.splitext(name)[1].lower() or "no ending" for name in names)
    ordered = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
    return [f"{ending} {count:,}" for ending, count in ordered]


def say_unused(lines: Lines, key: str = "data.root") -> None:
    """Log the lines of `describe`."""
    for level, line in lines:
        log.log(level, "%s: not used: %s", key, line)
