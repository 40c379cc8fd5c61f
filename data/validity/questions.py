"""Questions that files and tables alone answer. They are asked when a collection is indexed.

Questions that need features of a frozen network are in engine/recipe/validity.py.
"""

from collections.abc import Callable

from pyarrow import Table

from data.collection.split import count_twins
from data.layouts.table import count_values
from data.validity.finding import Finding

Question = Callable[[Table, str], Finding | None]  # of the table of all rows, with splits, and `data.root`


def find_twins(table: Table, root: str) -> Finding | None:
    """Name the splits whose images have an equal or similar image, or an image of their group, in training."""
    shown = [f"{count:,} images of {split}" for split, count in count_twins(table).items() if count]
    twins = " and ".join(shown)
    line = f"{twins} belong together with training images: figures there are too good; true leaves the latter out"
    return Finding(0.9, "data.exclude_copies", line, f"{twins} belong to training images") if shown else None


def find_rare_classes(table: Table, root: str) -> Finding | None:
    """Name the class that is right for most images if it is always answered."""
    counts = count_values(table["label"])
    share = max(counts.values(), default=0) / max(sum(counts.values()), 1)
    if not 0.7 <= share < 1:  # from here on, answering one class alone looks like a result
        return None
    line = (
        f"always answering {next(iter(counts))!r} is right for {share:.0%} of the images: read the balanced accuracy "
        "and the rate of each class; loop.sampling=balanced reads all classes equally often"
    )
    return Finding(0.4, "loop.sampling", line)


QUESTIONS: tuple[Question, ...] = (find_twins, find_rare_classes)


def ask(table: Table, root: str) -> list[Finding]:
    """Return the findings about a collection."""
    return [finding for question in QUESTIONS if (finding := question(table, root)) is not None]
