"""Exclude images that do not meet rules: too few tags, too small, too long, of another rating, poor, blurred."""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow.compute as pc
from pydantic import Field

from data.care.finder import Finder
from data.collection import Collection
from data.config import DataConfig
from data.facts import measure_files
from data.open import load_collection
from data.tags.names import parse_rating
from utils.config.bounds import Count, Factor, KnobValue, Side
from utils.config.schema import Strict
from utils.errors import UserError


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


class Filter(Finder, Rules):
    """Exclude or list the images that break a rule; without a rule, take back what an earlier call excluded."""

    name: Literal["filter"]

    def find(self, data: DataConfig) -> dict[str, str]:
        """Return the images that break a rule. Raises UserError (`data.root`, `job`)."""
        return find_failing(load_collection(data), self, data)


def find_failing(collection: Collection, rules: Rules, data: DataConfig) -> dict[str, str]:
    """Return the paths of the images that break a rule, and the first that each breaks.

    A rule on pixels passes over images that cannot be read, which job=verify lists.
    """
    table, failing = collection.table, {}
    paths = table["path"].to_pylist()

    def fail(rows: np.ndarray, reason: str, *values: np.ndarray) -> None:
        """Note the rows [N] that break a rule; their values are filled into the reason."""
        for row in np.flatnonzero(rows).tolist():
            failing.setdefault(paths[row], reason.format(*(value[row] for value in values)))

    if rules.min_tags is not None:
        lengths = pc.list_value_length(table["tags"]).to_numpy()
        fail(lengths < rules.min_tags, "too few tags: {}", lengths)
    if rules.ratings is not None:
        ratings = np.array([parse_rating(text) if text else "none" for text in table["rating"].to_pylist()])
        fail(~np.isin(ratings, [parse_rating(text) for text in rules.ratings]), "another rating: {}", ratings)
    if rules.min_score is not None:
        scores = collection.column("score")
        if scores.dtype.kind not in "if":
            raise UserError("job.min_score: the column score of the manifest holds no numbers; give it numbers")
        fail(~(scores >= rules.min_score), "too low a score: {:g}", scores)
    if rules.min_side_px or rules.max_aspect or rules.min_sharpness:
        facts = measure_files(Path(data.root), paths, data.max_pixels)
        width, height, sharpness = (  # None becomes NaN, which breaks no rule
            np.array([getattr(fact, name) for fact in facts], float) for name in ("width", "height", "sharpness")
        )
        short, long = np.minimum(width, height), np.maximum(width, height)
        fail(short < (rules.min_side_px or 0), "too small: {:.0f} x {:.0f}", width, height)
        fail(long / short > (rules.max_aspect or np.inf), "too long: {:.0f} x {:.0f}", width, height)
        fail(sharpness < (rules.min_sharpness or 0), "blurred: {:.1f}", sharpness)
    return failing
