"""What a collection has and no reader uses: counted by reason and said at every start, so that nothing vanishes.

Every reader of `layouts/` takes an `Unused` and adds what it does not use. The index keeps the lines of `describe`, so
that a start that reads no file again says the same.
"""

from collections.abc import Iterable

from data.layouts.table import show_some
from utils.record.logging import get_logger

log = get_logger(__name__)

ORPHANS = "sidecars without an image"  # a reason


class Unused(dict[str, list[str]]):
    """The names of unused files, members, rows or columns, by reason. Threads may share one.

    unused.add("sidecars without an image", "cat/x.txt", "cat/y.txt")
    unused.describe()      ["2 sidecars without an image: cat/x.txt, cat/y.txt"]
    """

    def add(self, reason: str, *names: str) -> None:
        """Add names. The reason is a noun in the plural, without a name, so that equal cases are one line."""
        if names:
            self.setdefault(reason, []).extend(names)

    def merge(self, other: "Unused") -> None:
        """Add the names that a reader in another process did not use."""
        for reason, names in other.items():
            self.add(reason, *names)

    def describe(self) -> list[str]:
        """Return a line for each reason: count, reason and the first names. Columns, for one, recur in each shard."""
        unique = {reason: sorted(set(self[reason])) for reason in sorted(self)}  # threads add in any order
        return [f"{len(names):,} {reason}: {show_some(names)}" for reason, names in unique.items()]


def warn_unused(lines: Iterable[str]) -> None:
    """Log the lines of `describe`."""
    for line in lines:
        log.warning("data.root: not used: %s", line)
