"""Thresholds of taggers and classifiers: best_thresholds.csv, which prediction and exports read.

    category,name,threshold,precision,recall,f1,support,profile,note,vocabulary,weights
    0,general,0.412,0.71,0.71,0.71,51234,balanced,,9f0c...,77ab...
    0,1girl,0.433,0.95,0.97,0.96,8120,per_tag,,9f0c...,77ab...

The last two columns are hashes: of the tags, which detects a file that is not complete, and of the weights.

A row belongs to a category, to all tags (category -1) or, with profile per_tag, to a tag. An image gets a tag if its
probability is at least the threshold. A category's balanced row comes first: tools that read `category,name,threshold`
take a category's first row (deepghs/imgutils:imgutils/generic/multilabel_timm.py).

A classifier's table has one row, for all classes, of profile risk; its note is a promise (engine/measures/promise.py).
"""

import csv
import math
from collections.abc import Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter

from utils.config.bounds import Fraction
from utils.errors import UserError, about
from utils.formats.vocabulary import Vocabulary
from utils.io.files import readable
from utils.record.logging import log
from utils.record.report import write_table

CATEGORY_PROFILES = ("balanced", "high_precision", "high_recall", "best_f1")
PER_TAG = "per_tag"
RISK = "risk"  # of all classes of a classifier
DEFAULT = 0.35  # as in most tools
DEFAULT_LOGIT = math.log(DEFAULT / (1 - DEFAULT))
OVERALL = -1  # the category of all tags
_KEPT = "of the tagger before task.append_to: the collection does not label all of its tags"


@dataclass(frozen=True)
class Threshold:
    """A threshold and the scores it reaches, which are None without support. note: why a promise is not kept."""

    category: int
    name: str | None
    threshold: Fraction
    precision: float | None
    recall: float | None
    f1: float | None
    support: int
    profile: str
    note: str | None = None

    @property
    def tag(self) -> tuple[int, str | None]:
        """The key of a tag in vocabularies."""
        return self.category, self.name


class ThresholdTable(NamedTuple):
    """The thresholds for a vocabulary, given by its hash. per_tag rows are in the vocabulary's order."""

    vocabulary: str
    rows: tuple[Threshold, ...]

    def keep(self, tags: Set[tuple[int, str]], earlier: "ThresholdTable | None") -> "ThresholdTable":
        """Return the table with the rows of `earlier` for some tags, their categories and all tags; None: DEFAULT."""
        default = {} if earlier else {"threshold": DEFAULT, "precision": None, "recall": None, "f1": None}
        kept = [replace(row, note=_KEPT, **default) for row in (earlier or self).rows]
        categories = {OVERALL, *(category for category, _ in tags)}
        by_tag = {row.tag: row for row in kept if row.profile == PER_TAG and row.tag in tags}
        rows = [row for row in kept if row.profile != PER_TAG and row.category in categories]
        rows += [row for row in self.rows if row.profile != PER_TAG and row.category not in categories]
        rows += [by_tag.get(row.tag, row) for row in self.rows if row.profile == PER_TAG]
        return ThresholdTable(self.vocabulary, tuple(rows))

    def of_categories(self, profile: str) -> dict[int, float]:
        """Return {category: threshold} for a profile; OVERALL is the category of all tags."""
        return {row.category: row.threshold for row in self.rows if row.profile == profile}

    def of_tags(self, vocabulary: Vocabulary, profile: str) -> list[float]:
        """Return each tag's threshold: the tag's, else its category's, else the one of all tags."""
        by_tag = {row.tag: row.threshold for row in self.rows if row.profile == profile == PER_TAG}
        by_category = self.of_categories("balanced" if profile == PER_TAG else profile) or self.of_categories(RISK)
        if not by_category:
            raise UserError(f"profile: the thresholds have no {profile}; fit them again (evaluate.py calibrate=true)")
        return [by_tag.get(key, by_category.get(key[0], by_category[OVERALL])) for key in vocabulary.columns]


def thresholds_path(weights: Path) -> Path:
    """Return the file of the thresholds of a weight file."""
    return weights.with_name(f"{weights.stem.removesuffix('_weights')}_thresholds.csv")


def write_thresholds(path: Path, table: ThresholdTable, weights_hash: str) -> None:
    """Write a table atomically. weights_hash: of the weights that it was fitted to."""
    hashes = {"vocabulary": table.vocabulary, "weights": weights_hash}
    write_table(path, [{**asdict(row), **hashes} for row in table.rows])


@about("thresholds")
def find_thresholds(named: str | None, weights: Path, weights_hash: str | None) -> ThresholdTable | None:
    """Read the thresholds from the file `named`, or from the one beside a weight file; return None if there are none.

    Raises UserError (`thresholds`) if a file is incomplete, or was fitted to other weights.
    """
    path = thresholds_path(weights) if named is None else Path(named)
    if named is None and not path.is_file():
        return None
    log.info("thresholds: %s", path)
    with readable(path, "thresholds", "evaluate.py calibrate=true writes one"):
        with open(path, encoding="utf-8-sig", newline="") as stream:
            read = [{name: text or None for name, text in row.items()} for row in csv.DictReader(stream)]
        rows = TypeAdapter(tuple[Threshold, ...]).validate_python(read)
        table = ThresholdTable(read[0]["vocabulary"], rows)
        source = read[0]["weights"]
        tags = Vocabulary.of(row.tag for row in rows if row.profile == PER_TAG)
    advice = "calibrate its run, or of other files the weights alone, by evaluate.py calibrate=true"
    if weights_hash is None or source != weights_hash:
        raise UserError(f"{path} was fitted to other weights than {weights} has now; {advice}")
    profiles = {row.profile for row in rows if row.category == OVERALL}
    has_profiles = profiles >= {*CATEGORY_PROFILES[:3]} or profiles == {RISK}  # older tables lack the last
    if tags.hash != table.vocabulary or not has_profiles:
        raise UserError(f"{path} is not complete: rows of tags or profiles are missing; {advice}")
    return table
