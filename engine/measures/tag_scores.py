"""A tagger's scores (all tags, each category, each tag) and its thresholds.

P = R is the threshold at which precision equals recall, to the nearest edge of the histograms. Micro scores count the
decisions on all tags. Macro scores are means over the tags with positives, as scikit-learn's with `labels` set to them.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from engine.measures.tags import EDGES, PROBS, Rates, TagCounts, decision_rows, edge_below, rates
from utils import rng
from utils.contracts import Figures
from utils.errors import UserError
from utils.formats.spelling import RATING, category_name
from utils.formats.thresholds import CATEGORY_PROFILES, DEFAULT_LOGIT, OVERALL, PER_TAG, Threshold, ThresholdTable
from utils.formats.vocabulary import Vocabulary
from utils.io.files import Json
from utils.record.logging import log

_DEFAULT_EDGE = int(edge_below(DEFAULT_LOGIT))
_PRIOR_POSITIVES = 50  # the weight of a category's threshold in the threshold of a tag
_Z = 1.645  # of the normal distribution at 95 %
_RECALL_MARGIN = 0.1  # `balanced` needs to know a recall of 0.5 to this margin
OLD = "old"  # groups of tags
NEW = "new"
_NONE = np.zeros(0, bool)


def equal_point(precision: np.ndarray, recall: np.ndarray) -> int:
    """Return the edge nearest to the point where precision meets recall, or the last edge if they never meet."""
    above = np.flatnonzero(precision >= recall)
    edge = int(above[0]) if len(above) else len(precision) - 1
    gaps = np.abs(precision - recall)
    return edge - 1 if edge > 0 and gaps[edge - 1] < gaps[edge] else edge


@dataclass(frozen=True)
class Group:
    """A group of tags, with curves over the edges."""

    num_tags: int  # tags with positives
    num_empty: int  # tags without positives, but with known labels
    tp: np.ndarray  # [BINS]
    predicted: np.ndarray  # [BINS]
    macro: np.ndarray  # [3, BINS]: precision, recall, F1, averaged over `num_tags`
    mean_ap: float

    @property
    def support(self) -> int:
        """The number of positives of all tags."""
        return int(self.tp[0])

    def micro(self) -> Rates:
        """Return the micro precision, recall and F1 at each edge."""
        return rates(self.tp, self.predicted, self.tp[0])

    def row(self) -> Figures:
        """Return the group's scores."""
        micro, macro = (equal_point(*curves[:2]) for curves in (self.micro(), self.macro))
        f1 = self.micro()[2]
        mean_f1 = self.macro[2]
        figures = {
            "mAP": self.mean_ap,
            "macro_f1": mean_f1[macro],
            "macro_pr_threshold": PROBS[macro],
            "micro_f1": f1[micro],
            "micro_pr_threshold": PROBS[micro],
            "macro_f1_at_0.35": mean_f1[_DEFAULT_EDGE],
            "micro_f1_at_0.35": f1[_DEFAULT_EDGE],
        }
        return {name: float(value) for name, value in figures.items()} | {
            "tags": self.num_tags,
            "tags_without_positives": self.num_empty,
            "support": self.support,
        }


def _members(vocabulary: Vocabulary, old: np.ndarray) -> dict[str, np.ndarray]:
    """Return the tags of groups as bool [T], by name: all tags but ratings, then `old` and new ones, the categories."""
    categories = np.asarray(vocabulary.categories)
    is_rating = categories == RATING
    members = {"all": ~is_rating | is_rating.all()}
    if len(old):
        members |= {OLD: old & ~is_rating, NEW: ~old & ~is_rating}
    return members | {category_name(number): categories == number for number in np.unique(categories)}


class TagScores:
    """Compute the scores. Per tag, [T]: support, ap (NaN without positives), best_f1 and best_edge, which reaches it.

    best_edge is the middle one of equal edges. old: the tags of the tagger that the run began with, bool [T]; empty
    without one. Raises UserError if no tag has a positive.
    """

    def __init__(self, counts: TagCounts, vocabulary: Vocabulary, old: np.ndarray = _NONE) -> None:
        self.counts = counts
        self.vocabulary = vocabulary
        self.ap = counts.average_precision()
        members = _members(vocabulary, old)
        member = np.stack(list(members.values())).astype(np.float64)  # [G, T]
        sums = 0.0
        device = counts.scores.device
        per_tag = []
        for tags, tp, predicted in counts.tails():
            tp = tp.double()
            predicted = predicted.double()
            positives = tp[:, :1]
            f1 = 2 * tp / (predicted + positives).clamp(min=1)
            # For a tag without positives, the last three are 0.
            curves = [tp, predicted, tp / predicted.clamp(min=1), tp / positives.clamp(min=1), f1]
            sums = sums + torch.from_numpy(member[:, tags]).to(device) @ torch.stack(curves)  # [5, G, BINS]
            best = f1.amax(1, keepdim=True)
            order = (f1 == best).cumsum(1)
            middle = (order >= (order[:, -1:] + 1) // 2).int().argmax(1, keepdim=True)
            per_tag.append(torch.cat([positives, predicted[:, :1], best, middle], dim=1))
        support, known, self.best_f1, edges = torch.cat(per_tag).cpu().numpy().T
        self.support = support.astype(np.int64)
        self.best_edge = edges.astype(np.int64)
        has_positives = support > 0
        if not has_positives.any():
            raise UserError("data.root: no image of the validation split has a tag of the vocabulary")
        means = member @ np.stack([has_positives, (support == 0) & (known > 0), np.nan_to_num(self.ap)], axis=1)
        self.groups = {}
        for name, (size, empty, ap), curves in zip(members, means, sums.cpu().numpy().swapaxes(0, 1)):
            counted = curves[:2].astype(np.int64)
            mean = max(1.0, size)
            self.groups[name] = Group(int(size), int(empty), *counted, curves[2:] / mean, ap / mean)

    def scalars(self) -> Figures:
        """Return the scores of all tags, and the mAP of old and new ones."""
        scores = {name: float(value) for name, value in self.groups["all"].row().items()}
        parts = {name: self.groups[name] for name in (OLD, NEW) if name in self.groups}
        return scores | {f"mAP_{name}": group.mean_ap for name, group in parts.items() if group.num_tags}

    def tables(self) -> dict[str, list[Json]]:
        """Return `tag_groups`, `tags` (as in the vocabulary; None without positives), `decisions`."""
        precision, recall, _ = rates(*self.counts.at(self.best_edge), self.support)
        figures = np.stack([self.ap, self.best_f1, PROBS[self.best_edge], precision, recall], axis=1)
        names = ("ap", "best_f1", "best_threshold", "precision", "recall")
        tags = []
        columns = (*astuple(self.vocabulary), self.support.tolist(), figures.tolist())
        for name, category, count, _, support, values in zip(*columns):
            row = {"tag": name, "category": category_name(category), "training_images": count, "support": support}
            tags.append(row | dict(zip(names, values if support else repeat(None))))
        decisions = []
        groups = []
        for name, group in self.groups.items():
            if group.num_tags:
                decisions += decision_rows(name, group.predicted, group.tp, group.support)
                groups.append({"group": name, **group.row()})
        return {"tag_groups": groups, "tags": tags, "decisions": decisions}


def is_fitted(leads: Tensor) -> Tensor:
    """Return the samples that thresholds are fitted to, bool [B]; the others measure them. leads: of samples, [B]."""
    return rng.uniform(leads, ()) < 0.5


def calibrate(fitted: TagScores, reported: TagScores, precision: float, recall: float) -> ThresholdTable:
    """Return the thresholds fitted to `fitted` and measured on `reported`, the scores of other images.

    For categories and for all tags (micro): `balanced` is P = R, and `best_f1` has the best F1. `high_precision` is the
    lowest threshold with at least `precision`, `high_recall` the highest threshold with at least `recall`, both with
    95 % confidence (`lower_bound`).
    A category with too few positives for a promise has the threshold of all tags; the row of a broken promise has a
    note, which is logged.
    For a tag with n positives, in logits: (n * best + 50 * balanced) / (n + 50), rounded down to an edge. `best`
    reaches the best F1 of the tag; `balanced` is the threshold of its category.
    """
    vocabulary = fitted.vocabulary
    names = {int(number): category_name(number) for number in np.unique(vocabulary.categories)}
    names = {number: name for number, name in names.items() if fitted.groups[name].support}
    overall = _choose_edges(fitted.groups["all"], precision, recall)
    chosen = {number: _choose_edges(fitted.groups[name], precision, recall, overall) for number, name in names.items()}
    chosen[OVERALL] = overall
    names[OVERALL] = "all"
    rows = []
    for index, profile in enumerate(CATEGORY_PROFILES):
        for number, name in names.items():
            edge, note = chosen[number][index]
            group = reported.groups[name]
            counts = int(group.tp[edge]), int(group.predicted[edge]), group.support
            rows.append(measured_row(profile, number, name, edge, counts, note))
            if note:
                log.warning("thresholds: %s of %s: %s", profile, name, note)
    balanced = np.array([chosen.get(number, overall)[0][0] for number in vocabulary.categories])
    weighted = fitted.support * EDGES[fitted.best_edge] + _PRIOR_POSITIVES * EDGES[balanced]
    edges = edge_below(weighted / (fitted.support + _PRIOR_POSITIVES))
    counts = np.stack([*reported.counts.at(edges), reported.support], axis=1).tolist()
    rows += [
        measured_row(PER_TAG, *row) for row in zip(vocabulary.categories, vocabulary.names, edges.tolist(), counts)
    ]
    return ThresholdTable(vocabulary.hash, tuple(rows))


def lower_bound(rate: np.ndarray | float, count: np.ndarray | float) -> np.ndarray:
    """Return the lower end of Wilson's interval for a rate of `count` samples, one-sided, with 95 % confidence.

    Source: Wilson 1927, Probable Inference, the Law of Succession, and Statistical Inference.
    """
    spread = np.sqrt(rate * (1 - rate) * count + _Z**2 / 4)
    return (rate * count + _Z**2 / 2 - _Z * spread) / (count + _Z**2)


_Choice = tuple[int, str | None]  # an edge, and a note for a broken promise


def _choose_edges(
    group: Group, least_precision: float, least_recall: float, overall: Sequence[_Choice] | None = None
) -> list[_Choice]:
    """Return the choices for CATEGORY_PROFILES. overall: the choices of all tags, for a group with few positives.

    Decisions on the tags of an image are not independent, so a rate has at most as many samples as there are images.
    """
    precision, recall, f1 = group.micro()
    images = group.predicted[0] / (group.num_tags + group.num_empty)
    positives = min(group.support, images)
    sure = lower_bound(precision, np.minimum(group.predicted, images))
    precise = sure >= least_precision
    complete = np.flatnonzero(lower_bound(recall, positives) >= least_recall)
    if not len(complete):
        complete = np.flatnonzero(recall >= least_recall)
    edges = [equal_point(precision, recall), int(precise.argmax() if precise.any() else sure.argmax()), complete[-1]]
    edges.append(np.nanargmax(f1))
    aims = [f"a recall known to {_RECALL_MARGIN:g}", f"precision {least_precision:g}", f"recall {least_recall:g}"]
    most = lower_bound(1.0, positives)  # that can be promised
    is_few = [0.5 - lower_bound(0.5, positives) > _RECALL_MARGIN, most < least_precision, most < least_recall]
    choices = []
    for index, edge in enumerate(edges):
        note = None
        if is_few[index % 3]:
            note = f"{group.support:,} positives on {images:,.0f} images are too few for {aims[index % 3]}"
            if overall is not None:
                edge = overall[index][0]
                note += ": the threshold of all tags"
        elif index == 1 and not precise.any():
            note = f"{aims[index]} is not reached; sure is {sure.max():.2f}"
        choices.append((int(edge), note))
    return choices


def measured_row(
    profile: str, category: int, name: str, edge: int, counts: tuple[int, int, int], note: str | None = None
) -> Threshold:
    """Return a row of the table. counts: true positives, predictions, positives."""
    scores = [round(float(value), 6) for value in rates(*counts)] if counts[2] else [None] * 3
    return Threshold(category, name, float(f"{PROBS[edge]:.9g}"), *scores, counts[2], profile, note)
