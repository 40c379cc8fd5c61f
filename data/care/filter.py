"""Exclude images that do not meet rules: too few tags, too small, too long, of another rating, poor, blurred."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from data.care.exclude import ExcludingTool
from data.collection import Collection
from data.config import DataConfig
from data.facts import Facts, measure_files
from data.open import load_collection
from data.tags.names import parse_rating
from utils.config.bounds import Count, Factor, KnobValue, Side
from utils.config.schema import Strict
from utils.errors import UserError

_PIXEL_RULES = ("min_side_px", "max_aspect", "min_sharpness")


class Rules(Strict):
    """What an image needs to stay; null asks for nothing.

    max_aspect: longer side / shorter side. ratings: one of them. min_score: in the manifest's column score.
    min_sharpness: as data/facts.py measures it.
    """

    min_tags: Count | None
    min_side_px: Side | None
    max_aspect: Annotated[float, Field(ge=1, le=1e6)] | None
    ratings: list[str] | None
    min_score: KnobValue | None
    min_sharpness: Factor | None


class Filter(ExcludingTool, Rules):
    """Exclude or list the images that break a rule; without a rule, take back what an earlier call excluded."""

    name: Literal["filter"]

    def run(self, data: DataConfig) -> str:
        """Find and exclude them. Raises UserError (`data.root`, `job`)."""
        return self.exclude(data, find_failing(load_collection(data), self, data))


def find_failing(collection: Collection, rules: Rules, data: DataConfig) -> dict[str, str]:
    """Return the paths of the images that break a rule, and the first that each breaks.

    A rule on pixels passes over images that cannot be read, which job=verify lists.
    """
    table = collection.table
    paths = table["path"].to_pylist()
    facts = [Facts()] * len(paths)
    if any(getattr(rules, name) is not None for name in _PIXEL_RULES):
        facts = measure_files(Path(data.root), paths, data.max_pixels)
    failing: dict[str, str] = {}
    for fault in (*_check_columns(collection, rules), *_check_pixels(facts, rules)):
        for row in np.flatnonzero(fault.rows).tolist():
            failing.setdefault(paths[row], fault.describe(row))
    return failing


class _Fault(NamedTuple):
    """The rows that break a rule, bool [N], and how a row does."""

    rows: np.ndarray
    describe: Callable[[int], str]


def _check_columns(collection: Collection, rules: Rules) -> Iterator[_Fault]:
    """Yield the faults in tags, ratings and scores."""
    table = collection.table
    if rules.min_tags is not None:
        lengths = pc.list_value_length(table["tags"]).to_numpy()
        yield _Fault(lengths < rules.min_tags, lambda row: f"too few tags: {lengths[row]}")
    if rules.ratings is not None:
        ratings = _parse_ratings(table["rating"])
        wanted = [parse_rating(text) for text in rules.ratings]
        yield _Fault(~np.isin(ratings, wanted), lambda row: f"another rating: {ratings[row] or 'none'}")
    if rules.min_score is not None:
        scores = collection.column("score")
        if scores.dtype.kind not in "if":
            raise UserError("job.min_score: the column score of the manifest holds no numbers; give it numbers")
        yield _Fault(~(scores >= rules.min_score), lambda row: f"too low a score: {scores[row]:g}")


def _parse_ratings(column: pa.ChunkedArray) -> np.ndarray:
    """Return the ratings as one of four, text [N]; "" for none."""
    parsed = {text: parse_rating(text) for text in pc.unique(column).drop_null().to_pylist()}
    return np.array([parsed.get(text, "") for text in column.to_pylist()])


def _check_pixels(facts: list[Facts], rules: Rules) -> Iterator[_Fault]:
    """Yield the faults in size, aspect and sharpness."""
    sides = np.array([(fact.width or np.nan, fact.height or np.nan) for fact in facts], float).reshape(-1, 2)
    short, long = sides.min(axis=1), sides.max(axis=1)
    if rules.min_side_px is not None:
        yield _Fault(short < rules.min_side_px, lambda row: f"too small: {sides[row, 0]:.0f} x {sides[row, 1]:.0f}")
    if rules.max_aspect is not None:
        yield _Fault(
            long / short > rules.max_aspect, lambda row: f"too long: {sides[row, 0]:.0f} x {sides[row, 1]:.0f}"
        )
    if rules.min_sharpness is not None:
        sharp = np.array([np.nan if fact.sharpness is None else fact.sharpness for fact in facts])
        yield _Fault(sharp < rules.min_sharpness, lambda row: f"blurred: {sharp[row]:.1f}")
