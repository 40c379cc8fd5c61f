"""Thresholds of a tagger, fitted to the counts of one set of images and measured on those of another."""

import numpy as np
from torch import Tensor

from engine.measures.tag_scores import PROBS, Group, TagScores, equal_point, rates
from engine.measures.tags import EDGES, edge_below
from utils.thresholds import CATEGORY_PROFILES, OVERALL, PER_TAG, Threshold, ThresholdTable
from utils.vocabulary import category_name

_PRIOR = 50  # positives that a category's threshold counts as, beside those of a tag


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
