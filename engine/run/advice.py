"""Advice on how to improve a run, from its measurements, for its last screen and result.json."""

from collections.abc import Mapping, Sequence

import numpy as np

from utils.io.files import Values
from utils.record.figures import interval

_SHOWN_CLASSES = 3  # classes

Table = Sequence[Values]


def advise(tables: Mapping[str, Table], class_images: Sequence[int]) -> list[str]:
    """Return lines of advice that chance cannot explain. Without a table of the classes there is no line.

    A class is named if its accuracy is below the accuracy of all images and their intervals do not overlap. Labels are
    named for a check if the network is right more often than not, by its interval.

    tables: of the last evaluation. class_images: the training images of each class.
    """
    classes = tables.get("classes", ())
    decisions = tables.get("decisions", ())
    if not class_images or len(classes) != len(class_images) or not decisions:
        return []
    low, _ = _bounds(decisions[0]["precision"], decisions[0]["predicted"])
    wrong = [row["samples"] - row["correct"] for row in classes]
    worse = [number for number, row in enumerate(classes) if _bounds(row["recall"], row["samples"])[1] < low]
    worst = sorted(worse, key=lambda number: -wrong[number])
    lines = []
    if worst:
        shown = []
        for number in worst[:_SHOWN_CLASSES]:
            row = classes[number]
            share = wrong[number] / sum(wrong)
            shown.append(f"{row['class']} {share:.0%} (accuracy {row['recall']:.2g}, {class_images[number]:,} images)")
        lines.append(f"most errors: {', '.join(shown)}")
    sure, differ = _count_sure(decisions)
    if differ and low > 0.5:
        differing = f"{differ:,} of {sure:,} sure predictions differ from the label"
        lines.append(f"labels to check: {differing}; prepare.py job=labels judges each by all other images")
    return lines


def _bounds(share: float, images: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of images."""
    return interval("top1", {"top1": share, "samples": images}) or (0.0, 1.0)


def _count_sure(decisions: Table) -> tuple[int, int]:
    """Count the predictions at least as probable as the mean right one, and those of them that differ from the label.

    With 5 % of the labels changed and an accuracy of 0.64, 46 % of the differing labels were changed labels. With a
    threshold for each class it was 24 %, with the thresholds of confident learning (arXiv:1911.00068) 14 %.
    """
    threshold = [row["threshold"] for row in decisions]
    correct = [row["correct"] for row in decisions]
    mean = np.trapezoid(correct, threshold) / max(1, correct[0])
    level = min(np.searchsorted(threshold, mean), len(threshold) - 1)
    predicted = int(decisions[level]["predicted"])
    return predicted, predicted - int(correct[level])
