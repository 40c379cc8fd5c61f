"""Thresholds and probabilities of a tagger, fitted to the counts of one set of images and measured on those of another.

Everything is fitted to histograms: of a category for its thresholds and its Platt scaling, of a tag for its own.
"""

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from engine.measures.tag_scores import PROBS, Group, TagScores, equal_point, rates
from engine.measures.tags import EDGES, edge_below
from utils.thresholds import CATEGORY_PROFILES, OVERALL, PER_TAG, Threshold, ThresholdTable
from utils.vocabulary import category_name

_PRIOR = 50  # positives that a category's threshold counts as, beside those of a tag
_CENTRES = np.append((EDGES[:-1] + EDGES[1:]) / 2, EDGES[-1])  # logit of each bin
_RELIABILITY_BINS = 15


def to_fit(key: Tensor) -> Tensor:
    """Return which samples thresholds are fitted to, bool [B]; the others measure them. key: the batch's, [B]."""
    return key % 2 == 0


def calibrate(fitted: TagScores, reported: TagScores, precision: float, recall: float) -> ThresholdTable:
    """Return the thresholds that `fitted` gives, as measured on `reported`, of other images and the same vocabulary.

    Of each category, and of all tags (micro): balanced, P = R; high_precision, the lowest threshold with that
    precision, or else that of the highest precision; high_recall, the highest with that recall.
    Of each tag, in logits, with n positives: (n * best + 50 * balanced) / (n + 50), rounded down to an edge; best is
    that of the tag's best F1, balanced its category's.
    """
    vocabulary = fitted.vocabulary
    groups = {int(number): category_name(number) for number in np.unique(vocabulary.categories)}
    groups = {number: name for number, name in groups.items() if fitted.groups[name].support} | {OVERALL: "all"}
    chosen = {number: _choose_edges(fitted.groups[name], precision, recall) for number, name in groups.items()}
    rows = []
    for place, profile in enumerate(CATEGORY_PROFILES):
        for number, name in groups.items():
            edge, group = chosen[number][place], reported.groups[name]
            counts = int(group.tp[edge]), int(group.predicted[edge]), group.support
            rows.append(_measured(profile, number, name, edge, counts))
    balanced = np.array([chosen.get(number, chosen[OVERALL])[0] for number in vocabulary.categories])
    own = fitted.support * EDGES[fitted.best_edge] + _PRIOR * EDGES[balanced]
    edges = edge_below(own / (fitted.support + _PRIOR))
    counts = np.stack([*reported.counts.at(edges), reported.support], axis=1).tolist()
    rows += [_measured(PER_TAG, *row) for row in zip(vocabulary.categories, vocabulary.names, edges.tolist(), counts)]
    return ThresholdTable(vocabulary.hash, tuple(rows))


def _choose_edges(group: Group, least_precision: float, least_recall: float) -> tuple[int, int, int]:
    """Return the edge of each of CATEGORY_PROFILES."""
    precision, recall, _ = group.micro()
    precise, complete = np.flatnonzero(precision >= least_precision), np.flatnonzero(recall >= least_recall)
    return (
        equal_point(precision, recall),
        int(precise[0] if len(precise) else precision.argmax()),
        int(complete[-1]),  # the first edge has recall 1
    )


def _measured(profile: str, category: int, name: str, edge: int, counts: tuple[int, int, int]) -> Threshold:
    """Return a row; counts: true positives, predictions, positives."""
    found = [round(float(value), 6) for value in rates(*counts)] if counts[2] else [None] * 3
    return Threshold(category, name, float(f"{PROBS[edge]:.6g}"), *found, counts[2], profile)


class Reliability(NamedTuple):
    """Of pairs of image and tag by their probability, [15] each: its mean, the share of positives, and the pairs."""

    prob: np.ndarray
    rate: np.ndarray
    pairs: np.ndarray

    def error(self, first: int = 0) -> float:
        """Return the expected calibration error, of the bins from `first` on."""
        gaps = np.abs(self.prob - self.rate)[first:]
        return float((gaps * self.pairs[first:]).sum() / max(1, self.pairs[first:].sum()))


def measure_reliability(group: Group, scale: float = 1.0, shift: float = 0.0) -> Reliability:
    """Return the reliability of sigmoid(scale * logit + shift) in bins of equal width."""
    probs = _sigmoid(scale * _CENTRES + shift)
    place = np.minimum((probs * _RELIABILITY_BINS).astype(int), _RELIABILITY_BINS - 1)
    positives, pairs = _histogram(group)
    prob, rate, count = (
        np.bincount(place, weights, _RELIABILITY_BINS) for weights in (probs * pairs, positives, pairs)
    )
    return Reliability(prob / np.maximum(count, 1), rate / np.maximum(count, 1), count)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return probabilities, without overflow."""
    return np.exp(-np.logaddexp(0, -logits))


def _histogram(group: Group) -> tuple[np.ndarray, np.ndarray]:
    """Return positives and all pairs of each bin."""
    return tuple(-np.diff(tail, append=0) for tail in (group.tp, group.predicted))


def fit_platt(group: Group) -> tuple[float, float]:
    """Return scale and shift of the logit that fit the positives best.

    Source: Platt 1999, with his targets (N+ + 1) / (N+ + 2) and 1 / (N- + 2), which bound the scale.
    """
    positives, pairs = _histogram(group)
    yes, no = positives.sum(), (pairs - positives).sum()
    targets = positives * (yes + 1) / (yes + 2) + (pairs - positives) / (no + 2)
    inputs, found = np.stack([_CENTRES, np.ones_like(_CENTRES)], axis=1), np.array([1.0, 0.0])

    def loss(values: np.ndarray) -> float:
        return float(pairs @ np.logaddexp(0, inputs @ values) - targets @ (inputs @ values))

    for _ in range(100):  # Newton; it halves a step that does not improve
        probs = _sigmoid(inputs @ found)
        curvature = (inputs.T * (pairs * probs * (1 - probs))) @ inputs
        step = np.linalg.solve(curvature + 1e-9 * np.eye(2), inputs.T @ (pairs * probs - targets))
        while loss(found - step) > loss(found) and np.abs(step).max() > 1e-9:
            step /= 2
        found = found - step
        if np.abs(step).max() < 1e-9:
            break
    return float(found[0]), float(found[1])


def calibration_rows(fitted: TagScores, reported: TagScores) -> list[dict[str, Any]]:
    """Return for each group its Platt scaling and, on the other images, the calibration error without and with it.

    Nearly all pairs of image and tag have a probability of almost 0 and are right there; `ece_above` is without those
    below 1/15.
    """
    rows = []
    for name, group in fitted.groups.items():
        if group.support:
            scale, shift = fit_platt(group)
            plain, scaled = (measure_reliability(reported.groups[name], *values) for values in ((), (scale, shift)))
            rows.append(
                {"group": name, "scale": scale, "shift": shift, "ece": plain.error(), "ece_scaled": scaled.error(),
                 "ece_above": plain.error(1), "ece_above_scaled": scaled.error(1)}
            )  # fmt: skip
    return rows
