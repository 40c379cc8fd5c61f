"""Which images to label next: those from which a classifier on frozen features learns most about all others.

rows = order_next(features, labelled, predict_classes(features, labelled, labels)[0], 20)
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from optim.linear import fit_classes
from utils.ranks.signals import check_stop

_AXES = 64  # principal axes of the features; more cost time and change little
_LABEL_VARIANCE = 0.1  # variance of a label, where the features of an image have length 1
_COPY_SIMILARITY = 0.9  # cosine similarity from which two images count as copies, such as one saved again as a JPEG
_IMAGES_AT_ONCE = 2_000  # images


@torch.no_grad()
def order_next(features: Tensor, labelled: Tensor, probs: Tensor, count: int) -> list[int]:
    """Return up to `count` rows of images without a label, the most useful first.

    features: float32 [N, D]. labelled: rows [L]; probs: of the classes, as the labels foretell them [N, K]. Each label
    reduces the variance of a regression on the features; the next image is the one that reduces its sum over all images
    most. An image counts the less, the more probable its first class is than the second. Without labels all count
    alike, so typical ones come first. Copies of an image that is taken come last.

    Source: Yu, Bi & Tresp 2006, Active learning via transductive experimental design, sequential. Differs: the weights.
    """
    features = F.normalize(features - features.mean(dim=0), dim=1)
    points = reduce_features(features, _AXES)
    best = probs.topk(2, dim=1).values
    doubts = 1 - best[:, 0] + best[:, 1]
    known = points[labelled]
    spread = torch.linalg.inv(known.T @ known + _LABEL_VARIANCE * torch.eye(points.shape[1]))
    moments = (doubts * points.T) @ points
    late = torch.zeros(len(points))  # copies that are taken; infinite for images that are taken themselves
    for part in features[labelled].split(_IMAGES_AT_ONCE):
        late += (features @ part.T > _COPY_SIMILARITY).sum(dim=1)
    late[labelled] = torch.inf
    rows = []
    for _ in range(min(count, len(points) - len(labelled))):
        check_stop(alone=True)
        moved = points @ spread
        gain = ((moved @ moments) * moved).sum(dim=1) / (1 + (moved * points).sum(dim=1))
        row = (gain / gain.max() - late).argmax().item()
        rows.append(row)
        late += features @ features[row] > _COPY_SIMILARITY
        late[row] = torch.inf
        spread -= torch.outer(moved[row], moved[row]) / (1 + moved[row] @ points[row])
    return rows


def predict_classes(features: Tensor, labelled: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Return the probabilities of the classes for each image [N, K], and the share of labels that the others foretell.

    labels: classes [L] of the rows `labelled`. Of fewer than two classes, all images are alike.
    """
    classes, labels = labels.unique(return_inverse=True)
    if len(classes) < 2:
        return torch.full((len(features), 2), 0.5), 0.0
    weight, bias, _, share = fit_classes(features[labelled].double(), labels, len(classes))
    return F.linear(features, weight.float(), bias.float()).softmax(dim=1), share


def reduce_features(features: Tensor, count: int) -> Tensor:
    """Return features [N, C] on their widest principal axes, the widest last. Their mean is 0."""
    return features @ torch.linalg.eigh(features.T @ features).eigenvectors[:, -count:]
