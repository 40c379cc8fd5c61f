"""Which images to label next: those from which a classifier on frozen features learns most about all others.

rows = order_next(features, labelled, labels, 20)
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from optim.linear import fit_classes
from utils.ranks.signals import check_stop

_AXES = 64  # principal axes of the features; more cost time and change little
_NOISE = 0.1  # variance of a label, where the features of an image have length 1
_COPY = 0.9  # cosine similarity from which two images count as copies, such as one saved again as a JPEG
_AT_ONCE = 2_000  # images


@torch.no_grad()
def order_next(features: Tensor, labelled: Tensor, labels: Tensor, count: int) -> list[int]:
    """Return up to `count` rows of images without a label, the most useful first.

    features: float32 [N, D]. labelled: rows [L]; labels: their classes [L]. Each label reduces the variance of a
    regression on the features; the next image is the one that reduces its sum over all images most. Without labels,
    all images count alike, so typical ones come first; later, those that are hard to classify count more. Copies of an
    image that is taken come last.

    Source: Yu, Bi & Tresp 2006, Active learning via transductive experimental design, sequential. Differs: the weights.
    """
    features = F.normalize(features - features.mean(dim=0), dim=1)
    points = _reduce(features)
    known = points[labelled]
    spread = torch.linalg.inv(known.T @ known + _NOISE * torch.eye(points.shape[1]))
    moments = (find_doubts(features, labelled, labels) * points.T) @ points
    late = torch.zeros(len(points))  # copies that are taken; infinite for images that are taken themselves
    for part in features[labelled].split(_AT_ONCE):
        late += (features @ part.T > _COPY).sum(dim=1)
    late[labelled] = torch.inf
    rows = []
    for _ in range(min(count, len(points) - len(labelled))):
        check_stop(alone=True)
        moved = points @ spread
        gain = ((moved @ moments) * moved).sum(dim=1) / (1 + (moved * points).sum(dim=1))
        row = (gain / gain.max() - late).argmax().item()
        rows.append(row)
        late += features @ features[row] > _COPY
        late[row] = torch.inf
        spread -= torch.outer(moved[row], moved[row]) / (1 + moved[row] @ points[row])
    return rows


def find_doubts(features: Tensor, labelled: Tensor, labels: Tensor) -> Tensor:
    """Return for each image 1 less the lead of its most probable class [N]; 1 if fewer than two classes have labels."""
    classes, labels = labels.unique(return_inverse=True)
    if len(classes) < 2:
        return torch.ones(len(features))
    weight, bias, *_ = fit_classes(features[labelled].double(), labels, len(classes))
    probs = F.linear(features, weight.float(), bias.float()).softmax(dim=1).topk(2, dim=1).values
    return 1 - probs[:, 0] + probs[:, 1]


def _reduce(features: Tensor) -> Tensor:
    """Return features [N, D] on the principal axes of some images."""
    sample = features[:: len(features) // _AT_ONCE + 1]
    return features @ torch.linalg.eigh(sample.T @ sample).eigenvectors[:, -_AXES:]
