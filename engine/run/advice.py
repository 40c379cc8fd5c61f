"""Advice on how to improve a run, from its measurements, for its last screen and result.json."""

from collections.abc import Mapping, Sequence

from utils.io.files import Values
from utils.record.figures import interval

_SHOWN_CLASSES = 3  # classes

Table = Sequence[Values]


def advise(tables: Mapping[str, Table], class_images: Sequence[int]) -> list[str]:
    """Return lines of advice that chance cannot explain. Without a table of the classes there is no line.

    A class is named if its accuracy is below the accuracy of all images and their intervals do not overlap.

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
    shown = []
    for number in worst[:_SHOWN_CLASSES]:
        row = classes[number]
        share = wrong[number] / sum(wrong)
        shown.append(f"{row['class']} {share:.0%} (accuracy {row['recall']:.2g}, {class_images[number]:,} images)")
    return [f"most errors: {', '.join(shown)}"] if shown else []


def _bounds(share: float, images: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of images."""
    return interval("top1", {"top1": share, "samples": images}) or (0.0, 1.0)
