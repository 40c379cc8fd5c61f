"""What small pictures of a collection tell of their classes, by the pictures that are most alike."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_FOR_COLOUR = 200  # images; fewer do not tell whether colours matter


def _nearest_right(likeness: Tensor, labels: Tensor) -> float:
    """Return how often the most alike other picture has the same class. likeness: [N, N]."""
    likeness.fill_diagonal_(-torch.inf)  # an image is not its own neighbour
    return (labels[likeness.argmax(1)] == labels).float().mean().item()


def _error(accuracy: float, images: int) -> float:
    return math.sqrt(accuracy * (1 - accuracy) / images)


def compare_mirrored(small: Tensor, labels: Tensor) -> float:
    """Return the accuracy of nearest neighbours of mirrored images, as a share of the accuracy of plain images.

    small: small pictures, float32 [N, 3, H, W]; correlated ones are alike. One standard error is added to the accuracy
    of mirrored images, so that few images do not speak against mirroring. The share is at most 1, and 1 if the
    neighbours are never right.
    """
    centred = small - small.mean((1, 2, 3), keepdim=True)
    pictures, flipped = (F.normalize(each.flatten(1)) for each in (centred, centred.flip(3)))
    plain = _nearest_right(pictures @ pictures.T, labels)
    mirrored = _nearest_right(flipped @ pictures.T, labels)
    return min(1.0, (mirrored + _error(plain, len(small))) / plain) if plain else 1.0


def tells_colour(small: Tensor, labels: Tensor) -> bool:
    """Return whether images of the nearest mean colour are of one class more often than by chance, or are too few."""
    if len(small) < _LEAST_FOR_COLOUR:
        return True
    means = small.mean((2, 3))
    right = _nearest_right(-torch.cdist(means, means), labels)
    chance = (torch.bincount(labels) / len(labels)).square().sum().item()
    return right > chance + 3 * _error(chance, len(small))
