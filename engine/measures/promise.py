"""A promise about a classifier: with 95 % confidence, at most a share `risk` of its answers is wrong.

The classifier answers if the probability of its first class reaches a threshold. Thresholds are tested from strict to
loose by the exact binomial bound. The first failure ends the sequence, so all tests together err in 5 % of
calibrations. The sequence begins with the answers to a quarter of the images, or with enough answers to prove the
promise. The beginning does not depend on labels.

Sources: Clopper and Pearson 1934, The use of confidence or fiducial limits; Angelopoulos et al. 2021, Learn then Test
(fixed-sequence testing).
"""

import math

import numpy as np
from scipy.special import betaincinv

from engine.measures.tag_scores import measured_row
from engine.measures.tags import TagCounts
from utils.errors import UserError
from utils.formats.thresholds import OVERALL, RISK, ThresholdTable
from utils.formats.vocabulary import Vocabulary
from utils.record.logging import log

_CONFIDENCE = 0.95
_FIRST_SHARE = 0.25  # of the images, which the first threshold answers
_MOST_TIMES_IMAGES = 100  # advice goes up to this multiple of the images
_NO_ADVICE = "no number of such images in reach would do, but better weights might"


def bound(wrong: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the upper bound of the share of wrong answers, with 95 % confidence."""
    return betaincinv(wrong + 1, np.maximum(right, 1e-9), _CONFIDENCE)


def find_edge(wrong: np.ndarray, right: np.ndarray, risk: float) -> int:
    """Return the edge of the loosest threshold that keeps the promise.

    wrong, right: the answers of at least an edge's probability, int [BINS], falling; the first edge has all images.
    Raises UserError (`risk`) with advice.
    """
    answered = wrong + right
    images = answered[0]
    times = np.geomspace(1, _MOST_TIMES_IMAGES, 50)  # multiples of the images; the first is 1
    least = math.log(1 - _CONFIDENCE) / math.log1p(-risk)  # answers that prove it if all are right
    starts = (answered >= np.clip(least / times, _FIRST_SHARE * images, images)[:, None]).sum(1) - 1
    first = starts[0]
    fails = np.flatnonzero(bound(wrong, right)[: first + 1] > risk)
    if first not in fails:
        return fails.max(initial=-1) + 1
    # With half a wrong answer more, the number suffices in 7 of 10 calibrations.
    enough = times[bound(times * (wrong[starts] + 0.5), times * (right[starts] - 0.5)) <= risk]
    advice = [f"about {math.ceil(times * images / 50) * 50:,} such images would do" for times in enough]
    now = math.ceil(100 * bound(wrong[first], right[first])) / 100
    raise UserError(
        f"risk: {risk:g} cannot be promised on {images:,} images: {right[first]:,} of the {answered[first]:,} most "
        f"probable answers are right; {[*advice, _NO_ADVICE][0]}; risk={now:g} can be promised now"
    )


def make_promise(counts: TagCounts, risk: float) -> ThresholdTable:
    """Return the table of a classifier from its right and wrong answers. Raises UserError (`risk`)."""
    wrong, right = counts.histograms[0].cpu().numpy()[:, ::-1].cumsum(1)[:, ::-1]
    edge = find_edge(wrong, right, risk)
    answered, images = (wrong + right)[[edge, 0]].tolist()
    note = (
        f"with 95 % confidence, at most {100 * risk:g} % of the answers of at least this probability are wrong, on "
        f"images like those of the calibration; {wrong[edge]:,} of {answered:,} were"
    )
    row = measured_row(RISK, OVERALL, "all", edge, (right[edge], answered, images), note)
    log.info("threshold %g: %s", row.threshold, note)
    return ThresholdTable(Vocabulary.of(()).hash, (row,))
