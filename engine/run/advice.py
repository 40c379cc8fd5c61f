"""What a run has measured about what would improve it: for its last screen and result.json."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.record.figures import interval, show_evaluated
from utils.record.metrics_log import Row, series

_SHOWN = 3  # classes

Table = Sequence[Mapping[str, Any]]
Advice = tuple[dict[str, Any], list[str]]  # JSON values, and lines for people


def advise(
    run: Path,
    tables: Mapping[str, Table],
    rows: Sequence[Row],
    *,
    metric: str,
    images: int,
    class_images: Sequence[int],
) -> Advice:
    """Return what is known; nothing without a table of the classes.

    tables: of the last evaluation. rows: of metrics.jsonl. images: of the validation split. class_images: the training
    images of each class.
    """
    classes = tables.get("classes", ())
    decisions = tables.get("decisions", ())
    if not class_images or len(classes) != len(class_images) or not decisions:
        return {}, []
    known = [{**row, "images": count} for row, count in zip(classes, class_images) if row["samples"]]
    found, lines = _about_images(known)
    sure, differ = _count_sure(decisions)
    if 0 < 2 * differ < sure:  # else the network is no judge of labels
        command = shlex.join(["python", "evaluate.py", f"run_dir={run}", "split=all", "per_image=true"])
        shown = f"{differ:,} of {sure:,} sure predictions differ from the label"
        lines.append(f"labels to check: {shown}; {command}, then Review in view.py")
    fit, more = _about_fit(rows, metric, images)
    return found | {"sure": sure, "labels_to_check": differ} | fit, lines + more


def _count_sure(decisions: Table) -> tuple[int, int]:
    """Count the predictions at least as probable as the right ones on average, and those that differ from the label.

    With 5 % of labels changed at an accuracy of 0.64, 46 % of these were changed ones; with a threshold for each class,
    24 %; with those of confident learning (arXiv:1911.00068), 14 %.
    """
    threshold = [row["threshold"] for row in decisions]
    correct = [row["correct"] for row in decisions]
    mean = np.trapezoid(correct, threshold) / max(1, correct[0])
    level = min(np.searchsorted(threshold, mean), len(threshold) - 1)
    predicted = int(decisions[level]["predicted"])
    return predicted, predicted - int(correct[level])


def _about_images(classes: Table) -> Advice:
    """Return the classes with most errors, each with its accuracy and number of training images."""
    wrong = [row["samples"] - row["correct"] for row in classes]
    worst = sorted((number for number, count in enumerate(wrong) if count), key=lambda number: -wrong[number])
    if not worst:
        return {}, []
    most = [
        {
            "class": classes[number]["class"],
            "share_of_errors": wrong[number] / sum(wrong),
            "accuracy": classes[number]["recall"],
            "training_images": classes[number]["images"],
        }
        for number in worst[:_SHOWN]
    ]
    text = "{class} {share_of_errors:.0%} (accuracy {accuracy:.2g}, {training_images:,} images)"
    return {"most_errors": most}, [f"most errors: {', '.join(text.format(**row) for row in most)}"]


def _about_fit(rows: Sequence[Row], metric: str, images: int) -> Advice:
    """Compare the last evaluation with the one before and with the accuracy on training images of the last epoch.

    A higher accuracy on training images does not speak against a longer run: on 189 drawings it was 0.73, and twice the
    updates raised top-1 from 0.499 to 0.577.
    """
    _, trained = series(rows, "train/accuracy", "epoch")
    _, values = series(rows, f"ema/{metric}", "evaluate")
    if not values:
        _, values = series(rows, metric, "evaluate")
    if metric != "top1" or len(values) < 2 or not trained or not images:
        return {}, []
    before, last = values[-2:]
    training = trained[-1]
    low, high = interval(metric, {metric: last, "samples": images})
    name = show_evaluated(metric)
    shown = f"{name} is {last:.3g} on validation images and {training:.3g} on training images"
    if training > high:
        means = f"{shown}: more images or stronger augmentation"
    elif before < low:
        means = f"{name} rose from {before:.3g} to {last:.3g} between the last two evaluations: a longer run"
    else:
        means = f"{shown}: it has not learned them yet; train longer, or take a larger network"
    return {"training": training, "last": last, "before": before, "fit": means}, [means]
