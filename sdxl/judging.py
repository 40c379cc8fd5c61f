"""How well drawn pictures show what was asked: a tagger's view of them beside its view of real pictures."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from utils.io.files import Json


class Seen(NamedTuple):
    """What a tagger sees in N pictures: `tags` bool [N, T], and its embeddings `vectors` float [N, D]."""

    tags: np.ndarray
    vectors: np.ndarray


def judge_pictures(prompted: np.ndarray, others: np.ndarray, drawn: Seen, real: Seen) -> dict[str, float]:
    """Return the figures of N pictures that were drawn for the captions of N real ones.

    prompted: bool [N, T], the tags in each caption. others: bool [N, T], the trained tags that are not in it.
    recall, real_recall: the share of prompted tags that are seen, in drawn and in real pictures.
    leakage: unprompted tags that are seen in a drawn picture, less those in a real one, on average.
    similarity: the mean cosine with the real picture of the caption, each vector less the mean of the real ones: 1 for
    equal pictures, about 0 for pictures that are not nearer to their partner than to the others.
    """
    leaked = (drawn.tags & others).sum() - (real.tags & others).sum()
    centre = real.vectors.mean(axis=0)
    pairs = (torch.from_numpy(seen.vectors - centre).double() for seen in (drawn, real))
    figures = {
        "recall": drawn.tags[prompted].mean(),
        "real_recall": real.tags[prompted].mean(),
        "leakage": leaked / len(others),
        "similarity": F.cosine_similarity(*pairs).mean(),
    }
    return {name: float(value) for name, value in figures.items()}


def tag_rows(names: Sequence[str], prompted: np.ndarray, others: np.ndarray, drawn: Seen, real: Seen) -> list[Json]:
    """Return a row for each tag that was prompted or is seen unprompted, the most prompted ones first."""
    counts = {
        "prompted": prompted,
        "seen": prompted & drawn.tags,
        "seen_in_real": prompted & real.tags,
        "leaked": others & drawn.tags,
        "leaked_in_real": others & real.tags,
    }
    sums = {name: each.sum(axis=0) for name, each in counts.items()}
    shown = np.flatnonzero(sums["prompted"] + sums["leaked"] + sums["leaked_in_real"])
    order = shown[np.argsort(-sums["prompted"][shown], kind="stable")]
    return [{"tag": names[tag], **{name: int(each[tag]) for name, each in sums.items()}} for tag in order.tolist()]
