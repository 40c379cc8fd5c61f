"""A finding: what a collection says about the figures of a run, in one line."""

from typing import NamedTuple


class Finding(NamedTuple):
    """The answer to a question, if it matters. Sorted, the most serious one is last.

    weight: from 0 to 1. key: the configuration key that acts on it. line: for people. mark: a few words that stand
    behind a figure while the question is open, such as `by pictures, not by patient_id`.
    """

    weight: float
    key: str
    line: str
    mark: str | None = None
