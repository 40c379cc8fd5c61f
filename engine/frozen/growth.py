"""Estimate how much more labels would help: accuracy on parts of a collection, extrapolated with an interval.

The accuracy is the leave-one-out accuracy of a ridge regression on the features.
"""

import math

import torch
from torch import Tensor

from optim.linear import count_right

FEWEST = 64  # images of a curve
_TIMES = torch.tensor([1.0, 2.0])  # multiples of the images
# The logit of accuracy is about linear in the logarithm of the images. The constants are the slope, the standard
# deviations of the slope and of a measured point, and a third of the variance of the slope's drift per unit
# (docs/how_much.md).
_SLOPE = 0.35
_SLOPE_STD = 0.2
_MISFIT = 0.04
_DRIFT = 0.008
_STDS_OF_90 = 1.645  # standard deviations on each side of 90 %


def extrapolate(features: Tensor, labels: Tensor) -> dict[str, list]:
    """Return the columns images, accuracy, low and high for the images, and for twice as many.

    features: [N, C] float64. labels: [N], N >= `FEWEST`. 90 % of measurements would lie between low and high.
    """
    count = len(labels)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    right = [sum(count_right(features[rows], labels[rows]) for rows in order.chunk(parts)) for parts in (4, 1)]
    quarter, whole = (torch.tensor(right) / count).logit(eps=0.5 / count).tolist()
    sample = (2 + 2 * math.cosh(whole)) / count  # variance of the logit of the measured share
    span = math.log(4)
    known = _SLOPE_STD**-2
    measured = 1 / ((sample + 2 * _MISFIT**2) / span**2 + _DRIFT * span)
    slope = ((whole - quarter) / span * measured + _SLOPE * known) / (measured + known)
    further = _TIMES.log()
    logit = whole + slope * further
    wanders = _DRIFT * further**3 + further**2 / (measured + known)
    margin = _STDS_OF_90 * (sample * (1 - 1 / _TIMES) + wanders).sqrt()
    return {
        "images": (_TIMES * count).int().tolist(),
        "accuracy": logit.sigmoid().tolist(),
        "low": (logit - margin).sigmoid().tolist(),
        "high": (logit + margin).sigmoid().tolist(),
    }
