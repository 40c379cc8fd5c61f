"""Propose labels from the labelled images, in closed form: fast enough to follow every key on a page.

points, says = read_points(collection, config, rows, tell)      once: features on their principal axes
points = turn(points)                                           once
order, classes, probs, says = propose(points, {7: "cat", 9: "dog"})           at each label
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.collection.collection import Collection
from data.config import DataConfig
from engine.frozen.choose import choose_cpu, choose_frozen
from engine.frozen.features import read_features
from engine.frozen.growth import FEWEST, extrapolate
from engine.frozen.order import order_next, predict_classes, reduce_features
from optim.ridge import standardise
from utils.record.figures import interval

_AXES = 256  # of the features; more axes propose no better
_LEAST_LABELS = 20
_NEXT_IMAGES = 96  # to label next


def read_points(
    collection: Collection, config: DataConfig, rows: np.ndarray, tell: Callable[[float], None]
) -> tuple[Tensor, str]:
    """Return the features of rows on their principal axes, float32 [N, C], and a line about the network.

    An unreadable image is in the middle. tell: called with the share of new images that is read. With 1,280 features,
    an image takes 10 KiB of memory while it is read, then 1 KiB. Raises UserError (`data.root`).
    """
    runtime = choose_cpu()
    frozen = choose_frozen(None, collection, runtime, "data.root")
    features, known = read_features(frozen, collection, config, rows, runtime, tell=tell)
    mean, scale = standardise(features)
    reduced = reduce_features(features.sub_(mean).div_(scale), _AXES)
    points = torch.zeros(len(rows), reduced.shape[1])
    points[torch.from_numpy(np.isin(rows, known))] = reduced
    return points, frozen.says


def turn(points: Tensor) -> Tensor:
    """Return points [N, C] turned at random, so that all features have about the same variance.

    Otherwise a regression on standardised features would count narrow axes as much as wide axes.
    """
    noise = torch.randn(2 * points.shape[1:], generator=torch.Generator().manual_seed(0))
    return points @ torch.linalg.qr(noise).Q


def propose(points: Tensor, labels: Mapping[int, Any]) -> tuple[list[int], list, list[float], str]:
    """Return images to label next, the classes of all images [N], their probabilities, and a line about the accuracy.

    points: from `turn`. labels: by image, the class or whether it has a tag. Less than 20 labels, or labels of one
    class, give only the order.
    """
    known = torch.tensor([*labels], dtype=torch.long)
    names, given = np.unique([*labels.values()], return_inverse=True)
    given = torch.from_numpy(given)
    probs, share = predict_classes(points, known, given)
    order = order_next(points, known, probs, _NEXT_IMAGES)
    if len(known) < _LEAST_LABELS or len(names) < 2:
        return order, [], [], ""
    probs, best = probs.max(dim=1)
    low, high = interval("top1", {"top1": share, "samples": len(known)})
    says = f"; of the rest about {share:.0%} would be right ({low:.0%} to {high:.0%})"
    if len(known) >= FEWEST:
        _, twice, low, high = (column[1] for column in extrapolate(points[known].double(), given).values())
        says += f"; with twice as many {twice:.0%} ({low:.0%} to {high:.0%})"
    return order, names[best].tolist(), probs.tolist(), says
