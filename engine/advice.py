"""What a run has measured about what would improve it: for its last screen and result.json.

It reads the tables and the metrics that the last evaluation has left in the run folder.
"""

import csv
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from utils.record.figures import interval, show_evaluated
from utils.record.metrics_log import Row, series
from utils.record.run_reader import RunReader
from utils.record.tables import read_table

_SHOWN = 3  # classes
_LEAST_CLASSES = 5  # with fewer, not even a perfect order of ranks is significant


def advise(run: Path, metric: str, images: int, class_images: Sequence[int]) -> tuple[dict[str, Any], list[str]]:
    """Return what is known as JSON values, and as lines for people; nothing without a table of classes.

    images: of the validation split. class_images: the training images of each class.
    """
    try:
        names, rows = read_table(run / "tables" / "classes.csv")
    except (OSError, csv.Error):
        return {}, []
    if len(rows) != len(class_images) or "sure" not in names:  # an earlier release, or too many classes to read
        return {}, []
    classes = [dict(zip(names, row)) | {"images": count} for row, count in zip(rows, class_images)]
    facts, lines = _about_images([row for row in classes if int(row["samples"])])
    sure, to_check = (sum(int(row[name]) for row in classes) for name in ("sure", "labels_to_check"))
    found = {"classes": facts, "sure": sure, "labels_to_check": to_check}
    if to_check:
        command = shlex.join(["python", "evaluate.py", f"run_dir={run}", "split=all", "per_image=true"])
        lines.append(
            f"labels to check: {to_check:,} of {sure:,} sure predictions differ from the label; {command}, then "
            "Review in view.py"
        )
    found["fit"], line = _about_fit(RunReader(run).rows, metric, images)
    return found, [*lines, *line]


def _about_images(classes: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Return the classes with most errors, and how accuracy depends on the number of training images."""
    wrong = [int(row["samples"]) - int(row["correct"]) for row in classes]
    if not sum(wrong):
        return {}, []
    worst = sorted(range(len(classes)), key=lambda number: -wrong[number])
    most = [
        {
            "class": classes[number]["class"],
            "share_of_errors": wrong[number] / sum(wrong),
            "training_images": classes[number]["images"],
            "accuracy": float(classes[number]["recall"]),
        }
        for number in worst[:_SHOWN]
    ]
    shown = [
        "{class} {share_of_errors:.0%} (accuracy {accuracy:.2g}, {training_images:,} images)".format(**row)
        for row in most
    ]
    found, lines = {"most_errors": most}, [f"most errors: {', '.join(shown)}"]
    counts = [row["images"] for row in classes]
    ranks = rank_correlation(counts, [float(row["recall"]) for row in classes])
    if ranks is not None:
        value, low, high = ranks
        few = [classes[number]["class"] for number in worst if counts[number] < median(counts)][:_SHOWN]
        found |= {"rank_correlation": value, "interval": [low, high], "more_images_of": few if low > 0 else []}
        means = f"so more images of {', '.join(few)} should help" if low > 0 else "so their number is not what decides"
        lines.append(
            f"images of a class and its accuracy: rank correlation {value:.2f} ({low:.2f} to {high:.2f}), {means}"
        )
    return found, lines


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float] | None:
    """Return Spearman's correlation and its interval, 95 %; None for too few values, or equal ones.

    Source: Bonett and Wright 2000, Sample size requirements for estimating Pearson, Kendall and Spearman correlations.
    """
    if len(first) < _LEAST_CLASSES or min(len({*first}), len({*second})) < 2:
        return None
    from scipy.stats import spearmanr  # takes half a second

    value = float(spearmanr(first, second).statistic)
    middle = math.atanh(min(max(value, -0.9999), 0.9999))
    reach = 1.96 * math.sqrt((1 + value**2 / 2) / (len(first) - 3))
    return value, math.tanh(middle - reach), math.tanh(middle + reach)


def _about_fit(rows: Sequence[Row], metric: str, images: int) -> tuple[dict[str, Any], list[str]]:
    """Compare the last evaluation with the one before and with the accuracy on training images of the last epoch."""
    trained = series(rows, "train/accuracy", "epoch")[1]
    values = next((found for name in (f"ema/{metric}", metric) if (found := series(rows, name, "evaluate")[1])), ())
    ends = interval(metric, values[-1], images) if metric == "top1" and len(values) > 1 and len(trained) else None
    if ends is None:
        return {}, []
    before, last, training, name = values[-2], values[-1], trained[-1], show_evaluated(metric)
    found = {"training": training, "last": last, "before": before, "overfits": training > ends[1]}
    found["rises"] = before < ends[0]
    on_training = f"{training:.3g} on augmented training images"
    if found["overfits"]:
        line = f"{name} is {last:.3g}, and {on_training}: more images or stronger augmentation, not a longer run"
    elif found["rises"]:
        line = f"{name} rose from {before:.3g} to {last:.3g} between the last two evaluations: a longer run"
    else:
        line = f"{name} is {last:.3g}, and not more, {on_training}: a longer run or a larger network"
    return found, [line]
