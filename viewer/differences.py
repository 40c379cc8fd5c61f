"""Images where network and label differ, from the tables of images that evaluations and prepare.py job=labels write."""

import math
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter

from utils.io.files import Json
from utils.record.tables import worst_images


class Difference(NamedTuple):
    """An image where network and label differ. by: how far, 0 to 1; says: a class, or tags to add (True) or take away.

    guesses: the first classes with their probabilities; near: the paths of the images most like it.
    """

    path: str
    by: float
    says: str | dict[str, bool]
    guesses: dict[str, float] = {}
    near: list[str] = []


_DIFFERENCE = TypeAdapter(Difference)


def find_differences(run: Path, most: int) -> list[Difference]:
    """Return the images of highest loss where network and label differ, by distance.

    The distance is by the probability of the label (cleanlab's self-confidence), or from a tag's threshold. Tags are
    in the order of it, the farthest first. There are none without images.parquet or `LABELS`. Raises UserError.
    """
    found = {}
    for each in filter(None, worst_images(run, most, of=_differ) or ()):
        first = found.setdefault(each.path, each)
        if isinstance(each.says, dict):  # job=labels has a row for each tag
            first.says.update(each.says)
    return sorted(found.values(), key=lambda difference: -difference.by)


def _differ(row: Json) -> Difference | None:
    by = 1 - row.get("probability", 0)
    guesses = {}
    if "tag" in row:  # of job=labels, too
        says = {row["tag"]: not row["given"]}
    elif "given" in row:  # of job=labels
        says = row["proposed"]
        guesses = dict(zip(row["guesses"], row["probabilities"]))
    elif "label" in row:
        says = row["prediction"]
        guesses = {says: row["probability"]}
        by = 1 - math.exp(-row["loss"])
    else:
        tags = [(distance, name, True) for distance, name in zip(row["wrong_by"], row["wrong"])]
        tags += [(distance, name, False) for distance, name in zip(row["missed_by"], row["missed"])]
        tags.sort(reverse=True)
        if not tags:
            return None
        says = {name: is_added for _, name, is_added in tags}
        by = tags[0][0]
    return _DIFFERENCE.validate_python(Difference(row["path"], by, says, guesses, row.get("neighbours", [])))
