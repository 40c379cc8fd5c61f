"""Order images for labels: a classifier on frozen features learns most from the first ones about all other images.

rows = order_next(features, labelled, predict_classes(features, labelled, labels)[0], 20)
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from optim.linear import fit_classes
from utils.ranks.signals import check_stop

_AXES = 64  # principal axes of the features; more cost time and change little
_LABEL_VARIANCE = 0.1  # variance of a label, where the features of an image have length 1
_COPY_SIMILARITY = 0.9  # the cosine similarity of copies, such as an image that was saved again as a JPEG
_IMAGES_AT_ONCE = 2_000  # images


@torch.no_grad()
def order_next(features: Tensor, labelled: Tensor, probs: Tensor, count: int) -> list[int]:
    """Return up to `count` rows of images without a label, the most useful first.

    features: float32 [N, D]. labelled: rows [L]; probs: of the classes, predicted from the labels [N, K]. A label
    reduces the variance of a regression on the features; the next image reduces the sum over all images most. The more
    probable the first class of an image is than the second, the less the image counts. Without labels, all images count
    equally, so typical images come first. Copies of a chosen image come last.

    Source: Yu, Bi & Tresp 2006, Active learning via transductive experimental design, sequential. Differs: the weights.
    """
    features = F.normalize(features - features.mean(dim=0), dim=1)
    points = reduce_features(features, _AXES)
    best = probs.topk(2, dim=1).values
    doubts = 1 - best[:, 0] + best[:, 1]
    known = points[labelled]
    spread = torch.linalg.inv(known.T @ known + _LABEL_VARIANCE * torch.eye(points.shape[1]))
    moments = (doubts * points.T) @ points
    late = torch.zeros(len(points))  # the number of chosen copies; infinite for a chosen image
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
    """Return the probabilities of the classes for images [N, K], and the share of labels that other images predict.

    labels: classes [L] of the rows `labelled`. With fewer than two classes, all images have equal probabilities.
    """
    classes, labels = labels.unique(return_inverse=True)
    if len(classes) < 2:
        return torch.full((len(features), 2), 0.5), 0.0
    weight, bias, _, share = fit_classes(features[labelled].double(), labels, len(classes))
    return F.linear(features, weight.float(), bias.float()).softmax(dim=1), share


def reduce_features(features: Tensor, count: int) -> Tensor:
    """Return features [N, C] with mean 0 on their widest principal axes, the widest last."""
    return features @ torch.linalg.eigh(features.T @ features).eigenvectors[:, -count:]
