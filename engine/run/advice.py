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

import numpy as np

from utils.record.figures import interval, show_evaluated
from utils.record.metrics_log import Row, series
from utils.record.run_reader import RunReader
from utils.record.tables import read_table

_TABLES, _DECISIONS = ("classes", "decisions"), ("threshold", "predicted", "correct")
_SHOWN = 3  # classes
_LEAST_CLASSES = 5  # with fewer, not even a perfect order of ranks is significant


def advise(run: Path, metric: str, images: int, class_images: Sequence[int]) -> tuple[dict[str, Any], list[str]]:
    """Return what is known as JSON values, and as lines for people; nothing without a table of classes.

    images: of the validation split. class_images: the training images of each class.
    """
    try:
        (names, rows), (columns, decisions) = (read_table(run / "tables" / f"{name}.csv") for name in _TABLES)
    except (OSError, csv.Error):
        return {}, []
    if len(rows) != len(class_images) or not decisions:  # too many classes to read
        return {}, []
    classes = [dict(zip(names, row)) | {"images": count} for row, count in zip(rows, class_images)]
    found, lines = _about_images([row for row in classes if int(row["samples"])])
    sure, differ = _count_sure(dict(zip(columns, zip(*decisions))))
    if 0 < 2 * differ < sure:  # else the network is no judge of labels
        command = shlex.join(["python", "evaluate.py", f"run_dir={run}", "split=all", "per_image=true"])
        shown = f"{differ:,} of {sure:,} sure predictions differ from the label"
        lines.append(f"labels to check: {shown}; {command}, then Review in view.py")
    fit, line = _about_fit(RunReader(run).rows, metric, images)
    return found | {"sure": sure, "labels_to_check": differ} | fit, [*lines, *line]


def _count_sure(decisions: Mapping[str, Sequence[str]]) -> tuple[int, int]:
    """Count the predictions at least as probable as the right ones on average, and those that differ from the label.

    With 5 % of labels changed at an accuracy of 0.64, 46 % of these were changed ones; with a threshold for each class,
    24 %; with those of confident learning (arXiv:1911.00068), 14 %.
    """
    threshold, predicted, correct = (np.array(decisions[name], float) for name in _DECISIONS)
    mean = np.trapezoid(correct, threshold) / max(1, correct[0])
    level = min(np.searchsorted(threshold, mean), len(threshold) - 1)
    return int(predicted[level]), int(predicted[level] - correct[level])


def _about_images(classes: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Return the classes with most errors, and how accuracy depends on the number of training images."""
    names, counts, recalls = ([row[name] for row in classes] for name in ("class", "images", "recall"))
    wrong = [int(row["samples"]) - int(row["correct"]) for row in classes]
    worst = sorted((number for number, count in enumerate(wrong) if count), key=lambda number: -wrong[number])
    recalls = [*map(float, recalls)]
    if not worst:
        return {}, []
    keys = ("class", "share_of_errors", "accuracy", "training_images")
    most = [dict(zip(keys, (names[i], wrong[i] / sum(wrong), recalls[i], counts[i]))) for i in worst[:_SHOWN]]
    text = "{class} {share_of_errors:.0%} (accuracy {accuracy:.2g}, {training_images:,} images)"
    found, lines = {"most_errors": most}, [f"most errors: {', '.join(text.format(**row) for row in most)}"]
    if (ranks := rank_correlation(counts, recalls)) is not None:
        value, low, high = ranks
        few = [names[number] for number in worst if counts[number] <= median(counts)][:_SHOWN] if low > 0 else []
        found |= {"rank_correlation": value, "rank_interval": [low, high], "more_images_of": few}
        means = f"so more images of {', '.join(few)} should help" if few else "which may be chance"
        shown = f"rank correlation {value:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"images of a class and its accuracy: {shown}, {means}")
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
    """Compare the last evaluation with the one before and with the accuracy on training images of the last epoch.

    A higher accuracy on training images does not speak against a longer run: on 189 drawings it was 0.73, and twice the
    updates raised top-1 from 0.499 to 0.577.
    """
    trained = series(rows, "train/accuracy", "epoch")[1]
    values = next((found for name in (f"ema/{metric}", metric) if (found := series(rows, name, "evaluate")[1])), ())
    if metric != "top1" or len(values) < 2 or not len(trained) or not images:
        return {}, []
    ends = interval(metric, {metric: values[-1], "samples": images})
    (before, last), training, name = values[-2:], trained[-1], show_evaluated(metric)
    shown = f"{name} is {last:.3g}, and {training:.3g} on augmented training images"
    if training > ends[1]:
        means = f"{shown}: more images or stronger augmentation"
    elif before < ends[0]:
        means = f"{name} rose from {before:.3g} to {last:.3g} between the last two evaluations: a longer run"
    else:
        means = f"{shown}, which is not more: a longer run or a larger network"
    return {"training": training, "last": last, "before": before, "fit": means}, [means]
