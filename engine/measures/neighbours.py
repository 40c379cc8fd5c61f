"""Nearest neighbours by cosine similarity, in blocks."""

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.ranks.signals import check_stop

_QUERIES_AT_ONCE = 2_000  # between two checks for a stop request


def find_nearest(queries: Tensor, features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the similarities [M, count], largest first, and rows of the features [N, C] nearest to queries [M, C]."""
    features = F.normalize(features, dim=1)
    nearest = []
    for block in F.normalize(queries, dim=1).split(_QUERIES_AT_ONCE):
        check_stop(alone=True)
        nearest.append((block @ features.T).topk(count, dim=1))
    similarities, rows = zip(*nearest)
    return torch.cat(similarities), torch.cat(rows)
