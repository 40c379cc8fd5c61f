"""A tagger's thresholds: thresholds.csv, which evaluation writes and prediction and exports read.

    category,name,threshold,precision,recall,f1,support,profile,vocabulary
    0,general,0.412,0.71,0.71,0.71,51234,balanced,9f0c...
    0,1girl,0.433,0.95,0.97,0.96,8120,per_tag,9f0c...

A row belongs to a category, to all tags (category -1) or, with profile per_tag, to a tag. An image gets a tag if its
probability is at least the threshold. A category's balanced row comes first: tools that read `category,name,threshold`
take a category's first row (deepghs/imgutils:imgutils/generic/multilabel_timm.py).
"""

import csv
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from utils.config.bounds import Fraction
from utils.errors import UserError, about
from utils.record.logging import get_logger
from utils.record.report import write_table
from utils.vocabulary import Vocabulary, describe_difference

log = get_logger(__name__)

CATEGORY_PROFILES = ("balanced", "high_precision", "high_recall")
PER_TAG = "per_tag"
DEFAULT = 0.35  # as in most tools
DEFAULT_LOGIT = math.log(DEFAULT / (1 - DEFAULT))
MCUT, MCUT_FLOOR = "mcut", 0.15  # the floor for characters is from deepghs/imgutils:imgutils/tagging/wd14.py
OVERALL = -1  # the category of all tags
FILE = "thresholds.csv"


@dataclass(frozen=True)
class Threshold:
    """A threshold and the scores it reaches, which are None without support."""

    category: int
    name: str | None
    threshold: Fraction
    precision: float | None
    recall: float | None
    f1: float | None
    support: int
    profile: str


@dataclass(frozen=True)
class ThresholdTable:
    """The thresholds for a vocabulary, given by its hash. per_tag rows are in the vocabulary's order."""

    vocabulary: str
    rows: tuple[Threshold, ...]

    def of_categories(self, profile: str) -> dict[int, float]:
        """Return {category: threshold} for a profile; OVERALL is the category of all tags."""
        return {row.category: row.threshold for row in self.rows if row.profile == profile}

    def of_tags(self, vocabulary: Vocabulary, profile: str) -> list[float]:
        """Return each tag's threshold: the tag's, else its category's, else the one of all tags."""
        by_tag = {(row.category, row.name): row.threshold for row in self.rows if row.profile == profile == PER_TAG}
        by_category = self.of_categories("balanced" if profile == PER_TAG else profile)
        return [by_tag.get(key, by_category.get(key[0], by_category[OVERALL])) for key in vocabulary.columns]


def write_thresholds(path: Path, table: ThresholdTable) -> None:
    """Write thresholds.csv atomically."""
    write_table(path, [{**asdict(row), "vocabulary": table.vocabulary} for row in table.rows])


@about("thresholds")
def find_thresholds(
    named: str | None, run_dir: str | None, vocabulary: Vocabulary, trained: str | None = None
) -> ThresholdTable | None:
    """Read the thresholds from the file `named`, or from a run folder; return None if there are none.

    trained: the hash of the vocabulary in training, if an export orders the tags differently. Raises UserError
    (`thresholds`) if a file is incomplete or has another vocabulary.
    """
    path = Path(named or Path(run_dir or "") / FILE)
    if named is None and (run_dir is None or not path.is_file()):
        return None
    log.info("thresholds: %s", path)
    try:
        with open(path, encoding="utf-8", newline="") as stream:
            read = [{name: text or None for name, text in row.items()} for row in csv.DictReader(stream)]
        rows, file_hash = TypeAdapter(tuple[Threshold, ...]).validate_python(read), read[0]["vocabulary"]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; evaluate.py calibrate=true writes one") from None
    except (LookupError, ValueError, OSError, csv.Error) as error:
        raise UserError(
            f"{path} is no thresholds.csv ({error}); it needs the columns that evaluate.py calibrate=true writes"
        ) from None
    table = ThresholdTable(file_hash, rows)
    tags = Vocabulary.of((row.category, row.name) for row in rows if row.profile == PER_TAG)
    if file_hash not in (vocabulary.hash, trained):
        raise UserError(
            f"{path} has another vocabulary than the tagger: {describe_difference(vocabulary, tags)}; name "
            "the file that evaluate.py calibrate=true wrote for this tagger"
        )
    missing = [profile for profile in CATEGORY_PROFILES if OVERALL not in table.of_categories(profile)]
    if missing or tags.hash != file_hash:
        raise UserError(
            f"{path} is not complete: {len(tags)} of {len(vocabulary)} tags, profiles without a row of "
            f"category {OVERALL}: {', '.join(missing) or 'none'}; write it again by evaluate.py calibrate=true"
        )
    return table


def mcut(probs: np.ndarray) -> np.ndarray:
    """Return a threshold for each image [B]: the middle of the largest gap in its sorted probabilities [B, n >= 2].

    Source: Largeron, Moulin and Géry 2012, MCut: A Thresholding Strategy for Multi-label Classification.
    """
    ranked = np.sort(probs, axis=1)[:, ::-1]
    gap = (ranked[:, :-1] - ranked[:, 1:]).argmax(axis=1)[:, None]
    return (np.take_along_axis(ranked, gap, 1) + np.take_along_axis(ranked, gap + 1, 1))[:, 0] / 2
