"""Questions that files and tables alone answer. They are asked when a collection is indexed.

Questions that need features of a frozen network are in engine/recipe/validity.py.
"""

from collections.abc import Callable

import pyarrow.compute as pc
from pyarrow import Table

from data.collection.split import count_twins
from data.validity.finding import Finding

Question = Callable[[Table, str], Finding | None]  # of the table of all rows, with splits, and `data.root`


def find_twins(table: Table, root: str) -> Finding | None:
    """Name the splits whose images have an equal or similar image in training."""
    shown = []
    for split, twins in count_twins(table).items():
        if twins:
            images = pc.sum(pc.equal(table["split"], split)).as_py()
            shown.append(f"{twins:,} of {images:,} images of the {split} split")
    if not shown:
        return None
    line = (
        f"{', '.join(shown)} have an equal or similar image in training, so figures are too good; prepare.py "
        "job=duplicates shows them; job.apply=true excludes copies"
    )
    return Finding(0.9, "data.root", line, "with copies of training images")


QUESTIONS: tuple[Question, ...] = (find_twins,)


def ask(table: Table, root: str) -> list[Finding]:
    """Return the findings about a collection."""
    return [finding for question in QUESTIONS if (finding := question(table, root)) is not None]
